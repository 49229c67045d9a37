"""Tables in all their forms, aggregates over tasks, and what a report says of many runs: from numbers made by hand."""

import csv
import io
import json
import re

import numpy as np
import pytest
from test_report import Page, make_run, make_video

from urlfast import compare, papers, report, stats
from urlfast.run import UserError
from urlfast.tables import Number, Table, over_tasks, tex

MADE = Table("t", "A title", ("method", "runs", "score"), [("a & b", 3, Number(1.23456, (1.0, 2.0))), ("=1+1", 1, None)], "a note")


def test_a_table_reads_the_same_everywhere():
    assert MADE.text().splitlines() == [
        "A title:",
        "method  runs                   score",
        "a & b      3  1.235 (1.000 to 2.000)",
        "=1+1       1                     n/a",
        "a note",
    ]
    rows = list(csv.reader(io.StringIO(MADE.csv())))
    assert rows == [
        ["method", "runs", "score", "score, low", "score, high"], ["a & b", "3", "1.23456", "1.0", "2.0"], ["'=1+1", "1", "", "", ""],
    ]  # fmt: skip
    latex = MADE.latex().splitlines()
    assert latex[:3] == ["% A title", "% a note", r"\begin{tabular}{lrr}"]
    assert latex[4] == r"method & runs & score \\" and latex[6] == r"a \& b & 3 & 1.235 (1.000 to 2.000) \\"
    assert tex(r"50 % of a_b \ {x}") == r"50 \% of a\_b \textbackslash{} \{x\}"


def test_aggregates_are_those_of_stats_with_intervals_from_three_runs_on():
    rng = np.random.default_rng(0)
    x = rng.uniform(-0.2, 1.5, (3, 26))
    groups = {"three": dict(zip(stats.ATARI_26, x.T.tolist(), strict=True)), "two": {"pong": [0.1, 0.2], "qbert": [1.0, 2.0]}}
    groups |= {"one task": {"pong": [1.0]}, "uneven": {"pong": [1.0], "qbert": [1.0, 2.0]}}
    made, matrices = over_tasks(groups, "human", repeats=500)
    assert [row[:3] for row in made.rows] == [("three", "the 26", 3), ("two", "2", 2)] and set(matrices) == {"three", "two"}
    cells = dict(zip(made.head, made.rows[0], strict=True))
    for name, statistic in (
        ("IQM", stats.iqm), ("mean", stats.mean), ("median", stats.median), ("capped mean", stats.capped_mean),
        ("human level (1)", stats.human_level), ("above random", stats.above_random),
    ):  # fmt: skip
        assert cells[name].value == pytest.approx(statistic(x))
        assert cells[name].between == pytest.approx(stats.bootstrap_interval(statistic, x, repeats=500))
    assert cells["human level (0.75)"].value == stats.human_level(x, 0.75)
    assert all(cell.between is None for cell in made.rows[1][3:]) and "none is shown below three runs" in made.note
    assert "uneven: not aggregated over tasks, which have unequal numbers of runs (pong 1, qbert 2)." in made.note
    whole = {game: [0.5] for game in stats.ATARI_57}
    assert [row[1] for row in over_tasks({"a": whole}, "human")[0].rows] == ["the 26", "all 57"]
    assert [row[1] for row in over_tasks({"a": {task: [1.0] for task in stats.URLB_EXPERT}}, "expert")[0].rows] == ["URLB's 12"]
    assert over_tasks({"a": {"pong": [1.0]}}, "human") == (None, {})


def test_a_papers_own_column_has_no_difference_from_itself():
    games = {game: [score] for game, score in papers.SCORES["apt"][1].items()}
    rows = compare.beside_paper({"APT": ("apt", games)}).rows
    assert len(rows) == 26 + 2 and all(str(row[5]) in ("+0.0", "−0.0") for row in rows)
    assert [[str(cell) for cell in row[3:5]] for row in rows[-2:]] == [["47.5", "47.5"], ["66.6", "66.6"]]
    normalised = {game: [float(stats.human_normalised_score(game, score[0]))] for game, score in games.items()}
    rows = compare.beside_aggregates({"APT": normalised, "my own": normalised}).rows
    assert [row[:3] for row in rows] == [("APT", "median", 26), ("APT", "mean", 26)]
    assert [[str(cell) for cell in row[3:5]] for row in rows] == [["47.5", "47.5"], ["66.6", "69.5"]]
    assert compare.beside_paper({"APT": ("apt", {"venture": [1.0]})}) is None and compare.beside_aggregates({"x": normalised}) is None
    assert all(set(printed) <= set(stats.ATARI_26) for _, printed in papers.SCORES.values())


def test_curves_over_training_take_the_frames_that_all_runs_have():
    styles = {"a": "s0", "b": "s1"}
    runs = {"a": [{0: 1.0, 10: 2.0, 20: 4.0}, {0: 3.0, 20: 6.0}], "b": [{10: 5.0}]}
    svg, says, heading = compare.efficiency(runs, styles, "pong")
    line = next(part for part in svg.split("<") if part.startswith('polyline class="line s0"'))
    assert len(line.split('points="')[1].split('"')[0].split()) == 2 and heading == "pong" and "intervals" not in says
    assert "line s1" not in svg
    assert compare.efficiency({"b": runs["b"]}, styles, "pong") is None
    three = {"a": {task: [{0: i, 10: i + 1.0} for i in range(3)] for task in ("pong", "qbert")}}
    svg, says, heading = compare.efficiency_over_tasks(three, styles, "human")
    assert "band s0" in svg and heading == "Human-normalised, over training" and "95 % intervals" in says
    assert compare.efficiency_over_tasks({"a": {"pong": three["a"]["pong"]}}, styles, "human") is None


def test_bars_begin_at_zero_and_say_their_difference():
    svg, says, _ = compare.bars({"a": Number(1.0, (0.5, 1.5)), "b": Number(-0.5)}, {"a": "s0", "b": "s1"}, "score")
    assert "a: 1.000 (0.500 to 1.500)<" in svg and "b: -0.500, −1.500<" in svg and "the differences are from: a." in says
    bars = [part for part in svg.split("<") if part.startswith("rect")]
    x, width = ([float(bar.split(f'{name}="')[1].split('"')[0]) for bar in bars] for name in (" x", "width"))
    assert x[0] == pytest.approx(x[1] + width[1], abs=0.2)  # the one to the right of zero, the other to its left


def test_states_of_a_robot_are_drawn_in_its_coordinates():
    rng = np.random.default_rng(0)
    agent, random = rng.normal(0, 10, (50, 18)), rng.normal(0, 1, (50, 18))
    svg, says, heading = compare.covered("walker", {"a": agent}, random, {"a": "s0"})
    assert svg.count("M") > 90 and "pitch of the torso" in svg and "Grey: random play" in says and heading == "Where the walker was"
    assert "first coordinate" in compare.covered("acrobot", {"a": agent}, None, {"a": "s0"})[0]
    assert compare.covered("walker", {"a": agent[:, :1]}, None, {"a": "s0"}) is None
    assert compare.covered("walker", {"a": agent}, random[:, :4], {"a": "s0"}) is None


# Pages ----------------------------------------------------------------------------------------------------------------


def make_sweep(folder, rows, games, seeds, domain="atari", results=None):
    """A sweep's folder, as `urlfast sweep` leaves it, of runs that were fine-tuned from APT."""
    for row in rows:
        for game in games:
            for seed in seeds:
                run = make_run(folder / row.replace(" ", "_") / f"{game}-s{seed}" / "run", method="drq", game=game, seed=seed, lines=5,
                    filmed=False, reward_free=False)  # fmt: skip
                document = json.loads((run / "config.json").read_text()) | {"domain": domain}
                document["transfer"] = {"run": "runs/x", "method": "apt", "step": 100, "rule": "whole"}
                (run / "config.json").write_text(json.dumps(document))
                if results:
                    (run / "results.json").write_text(json.dumps({"evaluations": results(row, game, seed)}))
    (folder / "sweep.json").write_text(json.dumps({"rows": [{"name": row} for row in rows]}))
    return folder


def test_a_sweep_of_many_runs_is_one_page_with_its_tables_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "load_particles", lambda run: pytest.fail("of more than a few runs, none is shown whole"))

    def results(row, game, seed):
        low, high = stats.ATARI_SCORES[game]
        level = {"APT": 1.1, "random neighbour": 0.5}[row] + 0.05 * seed
        return [{"policy": "agent", "task": game, "frames": 100 * k, "returns": [low + level * k / 2 * (high - low)] * 2} for k in (1, 2)]

    folder = make_sweep(tmp_path / "s", ("APT", "random neighbour"), ("pong", "qbert", "freeway"), (1, 2, 3), results=results)
    page = Page(report.report([folder], folder / "report.html")).check_alone()
    words = page.words()
    assert "18 runs on 3 games" in words and "APT, 9 runs" in words and "random neighbour, 9 runs" in words
    assert "APT 3 3 1.200 (" in words and "random neighbour 3 3 0.600 (" in words
    assert "What each change does" in words and "Performance profile" in words and "Human-normalised, over training" in words
    assert "APT pong 3" in words and "−8.0" in words and "Behavior From the Void (2021), Table 2" in words
    assert "random neighbour median 3 60.0 20.8 +39.2" in words
    files = {path.name for path in folder.iterdir() if path.is_file()}
    names = ("scores", "human-normalised", "beside-paper", "beside-aggregates")
    assert files == {"report.html", "sweep.json", *(f"report-{name}.{kind}" for name in names for kind in ("csv", "tex"))}
    downloads = {value for tag, name, value in page.attributes if tag == "a" and name == "download"}
    assert downloads == {f"{name}.{kind}" for name in names for kind in ("csv", "tex")}
    for path in folder.glob("*.csv"):
        head, *rows = csv.reader(path.open())
        for name, *cells in zip(head, *rows, strict=True):
            texts = [cell for cell in cells if re.search("[%−\u00a0]", cell)]
            assert not texts, (path.name, name, texts)
            if name.endswith(("%", "low", "high")) or name in ("runs", "games", "IQM of scores", "here", "paper", "difference"):
                assert [float(cell) for cell in cells if cell], (path.name, name)
    rows = list(csv.DictReader((folder / "report-beside-paper.csv").open()))
    game = next(row for row in rows if row["game"] == "qbert")
    assert game["paper"] == "17671.2" and float(game["difference"]) == pytest.approx(float(game["here"]) - 17671.2)
    assert any(float(row["difference"]) < 0 for row in rows)
    rows = list(csv.DictReader((folder / "report-scores.csv").open()))
    assert float(rows[0]["human-normalised, %"]) == pytest.approx(120)
    rows = list(csv.DictReader((folder / "report-human-normalised.csv").open()))
    assert float(rows[0]["IQM"]) == pytest.approx(1.2) and float(rows[0]["IQM, low"]) <= 1.2
    with pytest.raises(UserError, match="no run of this sweep has begun"):
        empty = tmp_path / "empty"
        empty.mkdir()
        (empty / "sweep.json").write_text('{"rows": []}')
        report.report([empty])


def test_physics_zero_shot_and_videos_over_training(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "load_particles", lambda run: None)
    rng = np.random.default_rng(0)

    def results(row, game, seed):
        entries = []
        for policy, spread in (("agent", 3.0), ("random", 1.0)):
            physics = rng.normal(0, spread, (20, 18)).tolist()
            one = {"policy": policy, "frames": 100, "returns": [400.0, 500.0], "physics": physics, "state_entropy": spread}
            one["collected_entropy"] = spread / 2
            entries += [one | {"task": "walker_walk"}, one | {"task": "walker_run", "returns": [77.0] * 3}]
            entries.append(one | {"task": "walker_walk", "frames": 50, "collected_entropy": 2.0})
        return entries

    folder = make_sweep(tmp_path / "s", ("A", "B"), ("walker_walk",), (1,), domain="dmc", results=results)
    run = folder / "A" / "walker_walk-s1" / "run"
    for step in (100, 200, 300, 400, 500):
        make_video(run / "videos" / f"step-{step:09d}.mp4", frames=5)
    page = Page(report.report([run])).check_alone()
    words = page.words()
    assert "Where the walker was" in words and "of URLB's expert 46.3" in words and "State entropy 3" in words
    assert "entropy of what was collected, above random play's" in words
    assert "run walker_run 100 77 77" in words and "walker_walk 100" not in words  # not mixed with its own task
    assert page.seen.count("video") == 1 + 4 and "After 100 steps" in words and "After 500 steps" in words
    words = Page(report.report([folder], folder / "report.html")).check_alone().words()
    assert words.count("Where the walker was") == 3 and "On other tasks, as they are" in words


@pytest.mark.parametrize("change", [{"physics": [[1.0], [1.0, 2.0]]}, {"physics": [["x"]]}, {"physics": 3}, {"task": []}, {"success": "x"}])
def test_entries_that_are_none_are_named_as_damaged(tmp_path, monkeypatch, change):
    monkeypatch.setattr(report, "load_particles", lambda run: None)
    run = make_run(tmp_path / "run", filmed=False)
    results = json.loads((run / "results.json").read_text())
    results["evaluations"][0] |= change
    (run / "results.json").write_text(json.dumps(results))
    assert "results.json is damaged" in Page(report.report([run])).check_alone().words()
