import base64
import json
import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from urlfast import report, stats
from urlfast.figures import Chart, png, short, smooth, thin, ticks
from urlfast.report import Particles
from urlfast.run import UserError

VOID = {"meta", "img", "br", "link", "line", "rect", "path", "circle", "polyline", "polygon"}


class Page(HTMLParser):
    """What a browser would see: the text, every attribute, and whether each element that opens is closed."""

    def __init__(self, path):
        super().__init__()
        self.open, self.seen, self.attributes, self.text, self.ids = [], [], [], [], []
        self.feed(Path(path).read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    def words(self):
        return " ".join(" ".join(self.text).split())

    def check_alone(self):
        """No script, and nothing that a browser would fetch."""
        assert not {"script", "iframe", "link", "object"} & set(self.seen)
        for tag, name, value in self.attributes:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "poster", "data", "action", "xlink:href", "srcset"):
                assert value.startswith(("data:", "#")), (tag, name, value[:60])
        return self


def make_run(
    folder,
    method="apt",
    game="ms_pacman",
    seed=1,
    steps=20_000,
    lines=200,
    evaluated=True,
    filmed=True,
    score=420.0,
    preset="paper",
    reward_free=True,
):
    """A run's folder as `train` and `evaluate` leave it, with made-up numbers."""
    rng = np.random.default_rng(seed)
    (folder / "videos").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    config = {
        "steps": steps,
        "seed": seed,
        "device": "auto",
        "env": {"game": game, "num_envs": 8, "frame_skip": 4},
        "method": {"k": 16, "lr": 1e-4},
    }
    versions = {"python": "3.11.2", "urlfast": "0.1.0", "torch": "2.13.0"}
    document = {
        "method": method,
        "domain": "atari",
        "preset": preset,
        "config": config,
        "versions": versions,
        "started": "2026-01-31T14:05:03+0000",
    }
    (folder / "config.json").write_text(json.dumps(document))
    with open(folder / "metrics.jsonl", "w") as file:
        for i in range(1, lines + 1):
            step, t = steps * i // lines, i / lines
            line = {
                "step": step,
                "frames": 4 * step,
                "updates": 2 * step,
                "episodes": i // 2,
                "seconds": step / 30,
                "steps_per_second": 30.0,
            }
            if i % 2:
                line |= {"score": 250 + 200 * t + 60 * rng.normal(), "episode_length": 600 + 80 * rng.normal()}
            line |= {
                "q_loss": 0.02 + 0.1 * np.exp(-6 * t) * rng.uniform(0.7, 1.3),
                "q_target": 20 * (1 - np.exp(-3 * t)),
                "grad_norm": 1.0,
                "epsilon": 0.01,
            }
            if reward_free:
                middle = 0.55 + 0.12 * t + 0.01 * rng.normal()
                quantiles = [middle + d * (1 + t) + 0.005 * rng.normal() for d in (-0.2, -0.08, 0, 0.07, 0.18)]
                line |= {"intrinsic_reward": middle, "intrinsic_reward_quantiles": quantiles, "knn_distance": 1.0}
                line |= {"contrastive_loss": 4 * np.exp(-3 * t) + 0.6, "contrastive_accuracy": 1 - 0.9 * np.exp(-4 * t)}
            file.write(json.dumps(line) + "\n")
    if evaluated:
        (folder / "results.json").write_text(json.dumps(make_results(rng, method, game, seed, steps, versions, score)))
    if filmed:
        make_video(folder / "videos" / "policy.mp4")
    return folder


def make_results(rng, method, game, seed, steps, versions, score):
    evaluations = []
    for policy, mean, rate in (("agent", score, 0.55), ("random", 260.0, 0.3)):
        returns = np.maximum(0, rng.gamma(6, mean / 6, 100).round(-1)).tolist()
        coverage = [[int(f), int(rate * f**0.93)] for f in np.linspace(0, 400_000, 101)]
        row = {"policy": policy, "step": steps, "frames": 4 * steps, "mean": float(np.mean(returns))}
        row |= {"protocol": {"episodes": 100, "sticky": 0.0, "epsilon": 0.001}, "versions": versions, "hardware": "Some CPU, 2 cores"}
        row |= {"unique_states": coverage[-1][1], "frames_of_unique_states": 400_000, "frames_played": 400_000, "seconds": 30.0}
        evaluations.append(row | {"returns": returns, "lengths": rng.integers(400, 900, 100).tolist(), "coverage": coverage})
    return {
        "method": method, "domain": "atari", "preset": "paper", "game": game, "seed": seed, "evaluations": evaluations,
    }  # fmt: skip


def make_video(path, frames=40):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=20)
        stream.width, stream.height, stream.pix_fmt = 160, 210, "yuv420p"
        for i in range(frames):
            image = np.zeros((210, 160, 3), np.uint8)
            image[60:90, 3 * i % 130 : 3 * i % 130 + 30] = (230, 180, 60)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def make_particles(seed=0, count=2048, images=True):
    """Three clusters and a few strays, with frames that show where a particle lies."""
    rng = np.random.default_rng(seed)
    z = np.concatenate(
        [
            rng.normal(c, s, (n, 15))
            for c, s, n in ((0, 0.1, count // 2), (0.7, 0.15, count // 4), (-0.6, 0.3, count - count // 2 - count // 4))
        ]
    )
    z = np.tanh(z)
    distance = np.sqrt(((z[:, None] - z[None]) ** 2).sum(-1))
    reward = np.log(1 + np.sort(distance, 1)[:, :16].mean(1))
    frames = np.zeros((count, 84, 84), np.uint8)
    for frame, point in zip(frames, z, strict=True):
        x, y = (38 + 34 * point[:2]).astype(int)
        frame[20:24], frame[y : y + 8, x : x + 8] = 60, 220
    return Particles(frames if images else None, reward, z, 19_200)


@pytest.fixture
def particles(monkeypatch):
    made = make_particles(count=300)
    monkeypatch.setattr(report, "load_particles", lambda run: made)
    return made


def test_one_run_stands_alone_and_is_well_formed(tmp_path, particles):
    run = make_run(tmp_path / "apt-run")
    path = report.report([run])
    assert path == run / "report.html"
    page = Page(path).check_alone()
    assert page.seen.count("h1") == 1 and page.seen.count("video") == 1 and page.seen.count("img") == 2 * report.EXTREMES
    assert len(page.ids) == len(set(page.ids))
    for heading in ("What it learned to do", "Learning", "Intrinsic reward over time", "The states it reached", "The run"):
        assert heading in page.text
    assert "APT on Ms Pacman" in page.text
    assert [file.name for file in run.iterdir() if file.name.startswith(".")] == []  # no temporary name stays


def test_numbers_are_those_of_the_files(tmp_path, particles):
    run = make_run(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    agent, random = (np.mean(e["returns"]) for e in results["evaluations"])
    words = Page(report.report([run])).words()
    assert "After 20,000 agent steps" in words and "80,000 frames, 40,000 updates" in words
    assert f"the policy scores {agent:.0f} where random play scores {random:.0f}" in words
    hns = 100 * (agent - 307.3) / (6951.6 - 307.3)
    assert f"human-normalised {hns:.1f} %" in words
    mine, theirs = (e["coverage"][-1][1] for e in results["evaluations"])
    assert f"{mine / theirs:.2f}×" in words and f"{mine:,} against {theirs:,}, each in 400k frames" in words
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracy = [line["contrastive_accuracy"] for line in lines]
    first, last = np.mean(accuracy[:20]), np.mean(accuracy[-20:])
    assert f"Contrastive accuracy {last:.0%}".replace("%", " %") in words and f"of the run; {first:.0%}".replace("%", " %") in words
    assert f"random play, measured here, {random:.0f}" in words and "Published random play 307.3, published human 6,951.6" in words
    for text in ("torch 2.13.0", "Some CPU", "env.num_envs", "env.game", "method.k"):
        assert text in words
    assert f"{particles.reward.max():.3f}" in words and f"{particles.reward.min():.3f}" in words


@pytest.mark.parametrize("where", ["game", "folder", "preset", "version", "hardware", "option", "transfer", "seed", "policy"])
def test_hostile_text_stays_text(tmp_path, particles, where):
    evil = "<script>alert(1)</script>\"'><img src=https://x.test/y onerror=alert(1)>&amp;"
    name = "run-<img src=x onerror=alert(1)>&" if where == "folder" else "run"
    runs = [make_run(tmp_path / name), make_run(tmp_path / "other", seed=2)]
    document, results = (json.loads((runs[0] / file).read_text()) for file in ("config.json", "results.json"))
    if where == "game":
        document["config"]["env"]["game"] = evil
    elif where == "preset":
        document["preset"] = evil
    elif where == "version":
        document["versions"][evil] = evil
    elif where == "hardware":
        results["evaluations"][0]["hardware"] = evil
        results["evaluations"][0]["protocol"][evil] = evil
    elif where == "option":
        document["config"]["method"][evil] = evil
    elif where == "transfer":
        document["transfer"] = {"run": evil, "method": evil, "step": 3, "rule": evil}
    elif where == "seed":
        document["config"]["seed"] = document["config"]["steps"] = document["started"] = evil
    elif where == "policy":
        results["evaluations"][1] |= {"policy": evil, "protocol": {evil: [evil]}}
        (runs[0] / "videos" / "<img src=x>.mp4").write_bytes(evil.encode())
        with open(runs[0] / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 20_001, evil: 1.0, "q_loss": evil}) + "\n")
    (runs[0] / "config.json").write_text(json.dumps(document))
    (runs[0] / "results.json").write_text(json.dumps(results))
    for page in (Page(report.report(runs[:1])), Page(report.report(runs, tmp_path / "out.html"))):
        page.check_alone()
        assert page.seen.count("script") == 0
        assert any("<img src=" in text for text in page.text)  # shown, as what it is


def test_a_killed_run_with_a_torn_last_line_is_read(tmp_path, particles):
    run = make_run(tmp_path / "run", evaluated=False, filmed=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 20100, "score": 3')
    words = Page(report.report([run])).check_alone().words()
    assert "After 20,000 agent steps" in words


def test_missing_parts_say_how_to_get_them(tmp_path):
    run = make_run(tmp_path / "run", evaluated=False, filmed=False)  # and no checkpoint
    page = Page(report.report([run])).check_alone()
    words = page.words()
    assert words.count(f"urlfast evaluate {run}") == 2 and "not evaluated yet" in words
    assert "No picture of the particles" in words and "no checkpoint" in words
    assert "Dashed: published random play." in words
    assert "video" not in page.seen and "img" not in page.seen
    assert "Coverage" not in page.text and "Score by the evaluation protocol" not in page.text
    assert "Intrinsic reward over time" in page.text


def test_a_run_on_the_games_own_reward_has_no_intrinsic_part(tmp_path):
    words = Page(report.report([make_run(tmp_path / "run", method="drq", reward_free=False)])).check_alone().words()
    assert "DrQ on Ms Pacman" in words and "on the game's own reward" in words
    assert "ntrinsic reward" not in words and "Contrastive" not in words and "particles" not in words


def test_a_fine_tuned_run_says_what_it_began_from(tmp_path):
    runs = [make_run(tmp_path / name, method="drq", reward_free=False, filmed=False) for name in ("tuned", "scratch")]
    document = json.loads((runs[0] / "config.json").read_text())
    document["transfer"] = {"run": "runs/apt-1", "method": "apt", "step": 20_000, "rule": "whole"}
    (runs[0] / "config.json").write_text(json.dumps(document))
    words = Page(report.report(runs[:1])).check_alone().words()
    assert "DrQ after APT on Ms Pacman" in words and "begun from APT (20,000 steps, whole)" in words and "runs/apt-1" in words
    words = Page(report.report(runs, tmp_path / "out.html")).check_alone().words()
    assert "DrQ after APT (20,000 steps, whole), 1 run DrQ, 1 run" in words


def test_a_run_that_has_only_begun(tmp_path):
    run = make_run(tmp_path / "run", lines=1, evaluated=False, filmed=False)
    Page(report.report([run])).check_alone()
    (run / "metrics.jsonl").write_text("")
    assert "has not logged anything yet" in Page(report.report([run])).check_alone().words()


def test_damaged_results_and_videos_are_named(tmp_path, particles):
    run = make_run(tmp_path / "run")
    (run / "results.json").write_text('{"evaluations": [')
    (run / "videos" / "policy.mp4").write_bytes(b"not a video")
    words = Page(report.report([run])).check_alone().words()
    assert "results.json is damaged" in words and "policy.mp4 cannot be read" in words


def test_numbers_that_are_none_or_infinite_do_not_reach_a_chart(tmp_path, particles):
    run = make_run(tmp_path / "run", lines=20)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[3] |= {"q_loss": float("nan"), "score": float("inf"), "intrinsic_reward": None, "contrastive_loss": "high"}
    lines[4] |= {"intrinsic_reward_quantiles": [0.1, 0.2]}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(report.report([run])).check_alone()
    assert not any(
        "nan" in value or "inf" in value for tag, name, value in page.attributes if name in ("points", "d", "x", "y", "cx", "y1")
    )


@pytest.mark.parametrize("change", [
    {"returns": "<script>"}, {"returns": [None]}, {"returns": [float("nan")]}, {"returns": [10**400]}, {"returns": 3}, {"returns": []},
    {"coverage": [[1, 2, 3]]}, {"coverage": [["a", "b"]]}, {"coverage": 5}, {"frames": "many"}, {"unique_states": {}}, {"policy": None},
    {"protocol": 3}, {"visited": [[0, 1, 2, 3]]}, {"visited": [[0, 1, 2, 3, "<script>"]]}, {"visited": 3}, {"unique_rooms": "many"},
])  # fmt: skip
def test_results_whose_numbers_are_none_are_named_as_damaged(tmp_path, particles, change):
    run = make_run(tmp_path / "run", filmed=False)
    results = json.loads((run / "results.json").read_text())
    results["evaluations"][0] |= change
    (run / "results.json").write_text(json.dumps(results))
    assert "results.json is damaged" in Page(report.report([run])).check_alone().words()


@pytest.mark.parametrize("change", [
    {"score": 1e308, "q_loss": -1e308}, {"seconds": float("nan"), "steps_per_second": float("inf")}, {"frames": "x"}, {"score": [1.0, 2.0]},
    {"intrinsic_reward_quantiles": [1.0, 2.0]}, {"intrinsic_reward_quantiles": 3.0}, {"step": 0}, {"episodes": None, "updates": 10**30},
])  # fmt: skip
def test_a_line_that_cannot_be_drawn_leaves_the_others(tmp_path, particles, change):
    runs = [make_run(tmp_path / name, lines=20, evaluated=False, filmed=False, seed=seed) for name, seed in (("a", 1), ("b", 2))]
    lines = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]

    def curves():
        """Points of every line and of every band, which has two at each step."""
        page = Page(report.report(runs[:1], tmp_path / "out.html")).check_alone()
        return [(tag, len(value.split())) for tag, name, value in page.attributes if name == "points"]

    whole = curves()
    (runs[0] / "metrics.jsonl").write_text("".join(json.dumps(line | (change if i == 7 else {})) + "\n" for i, line in enumerate(lines)))
    lost = {tag: [a - b for (of, a), (_, b) in zip(whole, curves(), strict=True) if of == tag] for tag in ("polyline", "polygon")}
    assert max(lost["polyline"]) <= 1 and max(lost["polygon"]) <= 2  # that line's
    assert sum(map(bool, lost["polyline"])) <= 2 and sum(map(bool, lost["polygon"])) <= 2  # and of the curves that it changed alone
    (runs[0] / "metrics.jsonl").write_text("".join(json.dumps(line | change) + "\n" for line in lines))
    for chosen in (runs[:1], runs):
        Page(report.report(chosen, tmp_path / "out.html")).check_alone()


def test_a_video_is_nothing_but_an_mp4_of_the_runs_own(tmp_path, particles):
    """No link out of the folder, no playlist of other files, no picture of more pixels than memory holds."""
    run = make_run(tmp_path / "run", evaluated=False, filmed=False)
    make_video(tmp_path / "secret.mp4")
    path, playlist = run / "videos" / "a.mp4", f"ffconcat version 1.0\nfile {tmp_path}/secret.mp4\n"
    for make in (
        lambda: path.symlink_to(tmp_path / "secret.mp4"),
        lambda: path.symlink_to(path),
        lambda: os.mkfifo(path),
        path.mkdir,
        lambda: path.write_text(playlist),
        lambda: path.write_text("#EXTM3U\n#EXTINF:1,\nfile://" + str(tmp_path / "secret.mp4")),
    ):
        make()
        page = Page(report.report([run])).check_alone()
        assert "a.mp4 cannot be read" in page.words() and "video" not in page.seen
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_video_of_too_many_pixels_is_left_out(tmp_path, particles, monkeypatch):
    run = make_run(tmp_path / "run", evaluated=False)
    monkeypatch.setattr(report, "VIDEO_PIXELS", 160 * 210 - 1)
    assert "policy.mp4 cannot be read (160 x 210 pixels)" in Page(report.report([run])).check_alone().words()


def test_a_page_goes_into_a_file_or_nowhere(tmp_path, particles):
    run = make_run(tmp_path / "run", evaluated=False, filmed=False)
    for out in ("/dev/null", tmp_path, "", "x" * 300, "/proc/x.html"):
        with pytest.raises(UserError):
            report.report([run], out)
    assert not Path("/dev/null").is_file()


def test_several_runs_side_by_side(tmp_path, particles, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [make_run(tmp_path / f"apt-{s}", seed=s, score=300 + 40 * s, filmed=False) for s in (1, 2, 3)]
    runs += [make_run(tmp_path / f"drq-{s}", method="drq", seed=s, reward_free=False, filmed=False) for s in (1, 2)]
    path = report.report(runs)
    assert path.resolve() == tmp_path / "report.html"
    page = Page(path).check_alone()
    words = page.words()
    assert "5 runs on Ms Pacman" in words and "APT, 3 runs" in words and "DrQ, 2 runs" in words
    links = {value for tag, name, value in page.attributes if tag == "a" and name == "href"}
    assert {link for link in links if link[0] == "#"} == {f"#run-{i}" for i in range(1, 6)} <= {f"#{i}" for i in page.ids}
    assert len(page.ids) == len(set(page.ids))

    def mean_scores(method):
        documents = [json.loads((run / "results.json").read_text()) for run in runs if run.name.startswith(method)]
        return np.array([[np.mean(document["evaluations"][0]["returns"])] for document in documents])

    low, high = stats.bootstrap_interval(stats.iqm, mean_scores("apt"), repeats=5000)
    assert f"APT {stats.iqm(mean_scores('apt')):.0f} ({low:.0f} to {high:.0f})" in words
    assert f"DrQ {stats.iqm(mean_scores('drq')):.0f}." in words  # two runs: no interval
    assert "ms_pacman DrQ 2 " + f"{stats.iqm(mean_scores('drq')):.0f}" in words


def test_runs_that_differ_in_an_option_are_not_one_group(tmp_path, particles):
    runs = [make_run(tmp_path / f"run-{s}", seed=s, filmed=False) for s in (1, 2, 3)]
    document = json.loads((runs[2] / "config.json").read_text())
    document["config"]["method"]["k"] = 5
    (runs[2] / "config.json").write_text(json.dumps(document))
    words = Page(report.report(runs, tmp_path / "out.html")).check_alone().words()
    assert "APT, k 16, 2 runs APT, k 5, 1 run " in words


def test_several_games_are_aggregated_only_when_balanced(tmp_path, particles, monkeypatch):
    runs = [make_run(tmp_path / f"{g}-{s}", game=g, seed=s, filmed=False) for g in ("ms_pacman", "pong") for s in (1, 2, 3)]
    words = Page(report.report(runs, tmp_path / "even.html")).check_alone().words()
    hns = np.array([[report.read(run).hns for run in runs[start::3]] for start in range(3)])
    low, high = stats.bootstrap_interval(stats.iqm, hns, repeats=20_000)
    assert f"APT 2 3 {stats.iqm(hns):.3f} ({low:.3f} to {high:.3f}) {stats.mean(hns):.3f} (" in words
    words = Page(report.report(runs[:-1], tmp_path / "odd.html")).check_alone().words()
    assert "APT: not aggregated over tasks, which have unequal numbers of runs (ms_pacman 3, pong 2)." in words
    assert "Human-normalised, over games" not in words


def test_rooms_are_drawn_where_the_player_was(tmp_path, particles):
    """Of 14 rooms the 12 with most steps, each with the agent's pixels and, under them, random play's."""
    run = make_run(tmp_path / "run", method="ngu", game="montezuma_revenge", filmed=False)
    results = json.loads((run / "results.json").read_text())
    agent, random = results["evaluations"]
    agent |= {"visited": [[0, room, 20 + 2 * i, 180, room + 1] for room in range(14) for i in range(3)], "unique_rooms": 14}
    random |= {"visited": [[0, 13, 60, 200, 5]], "unique_rooms": 1}
    (run / "results.json").write_text(json.dumps(results))
    page = Page(report.report([run])).check_alone()
    labels = [value for tag, name, value in page.attributes if name == "aria-label" and "the player was" in value]
    assert labels == [f"Where the player was in room {room}" for room in range(2, 14)]
    assert "The 12 rooms of 14" in page.words() and "Where the player was" in page.words() and "NGU on Montezuma Revenge" in page.words()
    chart = report.visited(report.read(run))
    assert chart.count('class="dots s0"') == 12 and chart.count('class="dots other"') == 1 and chart.count("h0") == 3 * 12 + 1
    agent |= {"visited": [[level, 1, 20, 180, 1] for level in (0, 1)]}
    (run / "results.json").write_text(json.dumps(results))
    assert "level 1, room 1" in Page(report.report([run])).words()


def test_last_evaluation_counts_not_the_best(tmp_path, particles):
    run = make_run(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    results["evaluations"].insert(0, {"policy": "agent", "step": 10_000, "frames": 40_000, "returns": [9000.0] * 5})
    (run / "results.json").write_text(json.dumps(results))
    words = Page(report.report([run])).check_alone().words()
    assert "the policy scores 9,000" not in words and "Score over training" in words


def test_a_number_that_rests_on_one_episode_says_so(tmp_path, particles):
    runs = [make_run(tmp_path / name, filmed=False, seed=seed) for name, seed in (("one", 1), ("many", 2))]
    results = json.loads((runs[0] / "results.json").read_text())
    results["evaluations"][0]["returns"], results["evaluations"][0]["lengths"] = [420.0], [600]
    (runs[0] / "results.json").write_text(json.dumps(results))
    one, many, both = (Page(report.report(chosen, tmp_path / "out.html")).words() for chosen in (runs[:1], runs[1:], runs))
    assert "the policy scores 420 (in a single episode) where random play scores" in one
    assert one.count("(in a single episode)") == 3  # the sentence, the score's tile, the coverage's
    assert "single episode" not in many
    assert both.count("1 run of 2 played a single episode.") == 2 and "420 (in a single episode)" in both


def test_a_large_video_is_left_beside_the_page(tmp_path, particles, monkeypatch):
    monkeypatch.setattr(report, "VIDEO_LIMIT", 100)
    page = Page(report.report([make_run(tmp_path / "run")])).check_alone()
    assert "video" not in page.seen and "too much to carry" in page.words()


def test_particles_without_images_keep_their_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "load_particles", lambda run: make_particles(count=64, images=False))
    page = Page(report.report([make_run(tmp_path / "run", filmed=False)])).check_alone()
    assert "img" not in page.seen and "64 observations drawn uniformly" in page.words()


def test_extremes_are_of_the_ends_and_unlike():
    p = make_particles(count=1000)
    order = np.argsort(-p.reward)
    p.frames[order[:30]] = p.frames[order[0]]  # thirty draws that look the same
    p.frames[order[-50:]] = 7
    top, bottom = report.extremes(p)
    assert top[0] == order[0] and set(top) <= set(order[:50].tolist()) and bottom == [order[-1]]
    assert len({p.frames[i].tobytes() for i in top}) == len(top) == report.EXTREMES
    assert np.all(np.diff(p.reward[top]) < 0)
    assert report.extremes(make_particles(count=100, images=False))[0] == np.argsort(-make_particles(count=100).reward)[:8].tolist()


def test_particles_of_a_checkpoint_are_those_of_the_method(tmp_path, monkeypatch):
    from dataclasses import asdict, replace

    import torch

    from urlfast import train
    from urlfast.checkpoint import Checkpoints, read_latest
    from urlfast.run import Run

    config = train.PRESETS["apt", "atari"]["paper"]
    config = replace(config, env=replace(config.env, game="pong"), device="cpu", runs=str(tmp_path))
    saved = {"method": "apt", "domain": "atari", "preset": "paper", "config": asdict(config)}
    run = Run.create(tmp_path, "apt", saved)
    method = train.METHODS["apt"](config.method, (4, 84, 84), 6, device="cpu", seed=3)
    replay, rng = method.make_replay(2, 1000), np.random.default_rng(0)
    flags = dict.fromkeys(("terminated", "is_last"), np.zeros(2, bool))
    for i in range(200):
        frame = rng.integers(0, 256, (2, 1, 84, 84), np.uint8)
        replay.add(
            {
                "observation": frame,
                "action": np.zeros(2, np.int64),
                "reward": np.zeros(2, np.float32),
                "is_first": np.full(2, i == 0),
                **flags,
            }
        )
    Checkpoints(run.folder, 3).save(400, {"method": method.state_dict()}, replay)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    p = report.load_particles(run)
    assert p.step == 400 and p.frames.shape == (len(p.z), 84, 84) and p.z.shape[1] == 15
    assert 350 < len(p.z) < 400 and len({frame.tobytes() for frame in p.frames}) == len(p.z)  # of 398 transitions, each once
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before
    batch = read_latest(run.folder, replay=True).load_replay(read_only=True).sample(256)
    _, z = method.intrinsic_reward(torch.from_numpy(batch.next_observation.copy()))
    found = {frame.tobytes(): z for frame, z in zip(p.frames, p.z, strict=True)}
    for image, want in zip(batch.next_observation[:, -1], z.float().numpy(), strict=True):
        if image.tobytes() in found:
            np.testing.assert_allclose(found[image.tobytes()], want, atol=0.02)  # bf16 where the processor has it

    class Diverged(type(method)):
        def intrinsic_reward(self, observation):
            reward, z = super().intrinsic_reward(observation)
            return reward, z * float("nan")

    monkeypatch.setitem(train.METHODS, "apt", Diverged)
    with pytest.raises(UserError, match="the network of step 400 gives NaN or infinity"):
        report.load_particles(run)


def test_principal_directions_are_those_of_the_svd():
    rng = np.random.default_rng(0)
    for shape in ((40, 15), (15, 40), (30, 1)):
        z = rng.normal(5, 1, shape) * np.linspace(3, 1, shape[1])
        fit = np.arange(len(z)) > 3
        centred = z - z[fit].mean(0)
        _, scale, axes = np.linalg.svd(centred[fit], full_matrices=False)
        xy, share = report.principal(z.astype(np.float32), fit)
        count = min(2, shape[1])
        np.testing.assert_allclose(np.abs(xy[:, :count]), np.abs(centred @ axes.T)[:, :count], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(share[:count], (scale**2 / (scale**2).sum())[:count], rtol=1e-4)
        assert xy.shape == (shape[0], 2) and share.shape == (2,)


def test_equal_rewards_make_a_picture_too(tmp_path, monkeypatch):
    made = make_particles(count=64)
    made.z[:], made.reward[:] = 0, 0
    monkeypatch.setattr(report, "load_particles", lambda run: made)
    page = Page(report.report([make_run(tmp_path / "run", filmed=False)])).check_alone()
    assert not any("nan" in value for _, name, value in page.attributes if name in ("d", "x", "cx"))


def test_coverage_is_compared_at_equal_frames():
    agent, random = {"coverage": [[100, 50], [200, 100]]}, {"coverage": [[50, 10], [100, 20]]}
    assert report.coverage_at_equal_frames(agent, random) == (50, 20, 100)
    counts = ({"unique_states": n, "frames_of_unique_states": 100} for n in (51, 20))
    assert report.coverage_at_equal_frames(agent | next(counts), random | next(counts)) == (51, 20, 100)  # counted, not interpolated
    assert report.coverage_at_equal_frames(agent, None) == (100, None, 200)
    assert report.coverage_at_equal_frames({"coverage": []}, random) is None
    places = ({"places": [[0, 1], [100, n]], "unique_places": n, "frames_of_unique_states": 100} for n in (7, 5))
    agent, random = agent | next(places), random | next(places)
    assert report.coverage_at_equal_frames(agent, random) == (7, 5, 100) and report.covers(agent) == "places"  # of both, the one that tells


def test_a_page_that_fails_leaves_the_old_one(tmp_path, particles, monkeypatch):
    run = make_run(tmp_path / "run", filmed=False)
    before = report.report([run]).read_text()

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("urlfast.run.sync", full)
    with pytest.raises(UserError, match="No space left"):
        report.report([run])
    assert (run / "report.html").read_text() == before and not list(run.glob(".report*"))


def test_command_line(tmp_path, particles, capsys, monkeypatch):
    run = make_run(tmp_path / "runs" / "one", filmed=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        report.main(["one", "--out", str(tmp_path / "x.html")])
    assert not exit_.value.code and (tmp_path / "x.html").exists() and not (run / "report.html").exists()
    assert "x.html" in capsys.readouterr().out
    for arguments, message in ((["two"], "no run 'two'"), (["one", "--out", "none/x.html"], "--out: none is no folder"), ([], "RUN: name")):
        with pytest.raises(SystemExit) as exit_:
            report.main(arguments)
        assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_png_is_what_was_given():
    from av import CodecContext, Packet

    rng = np.random.default_rng(0)
    for image in (rng.integers(0, 256, (84, 84), np.uint8), rng.integers(0, 256, (21, 16, 3), np.uint8)):
        content = base64.b64decode(png(image).removeprefix("data:image/png;base64,"))
        (frame,) = CodecContext.create("png", "r").decode(Packet(content))
        np.testing.assert_array_equal(frame.to_ndarray(format="gray" if image.ndim == 2 else "rgb24"), image)
    with pytest.raises(ValueError, match="image: must be uint8"):
        png(np.zeros((3, 3)))


def test_ticks_and_numbers():
    assert ticks(0, 20_000) == [0, 5000, 10000, 15000, 20000] and ticks(-0.11, 0.31) == [-0.1, 0, 0.1, 0.2, 0.3]
    assert [short(v) for v in (0, 0.25, 12, 1500, 20_000, 1.5e6, -30_000)] == ["0", "0.25", "12", "1,500", "20k", "1.5M", "−30k"]
    assert [short(v, 20_000) for v in (0, 5000)] == ["0", "5k"]


def test_thinning_keeps_means_and_smoothing_keeps_levels():
    x, y = thin(np.arange(1000), np.stack([np.arange(1000), np.ones(1000)], 1), points=100)
    assert len(x) == 100 and y.shape == (100, 2)
    np.testing.assert_allclose(x, np.arange(1000).reshape(100, 10).mean(1))
    np.testing.assert_allclose(y, np.stack([x, np.ones(100)], 1))
    x, y = thin([0, 1, 2], [1.0, np.nan, 3.0])
    assert x.tolist() == [0, 2] and y.tolist() == [1, 3]
    for count in (1, 2, 3, 50):
        np.testing.assert_allclose(smooth(np.full(count, 3.0), 10), 3)
    np.testing.assert_allclose(smooth(np.arange(50.0), 6)[10:40], np.arange(10, 40))  # centred: it does not lag


def test_chart_places_data_where_it_says():
    chart = Chart("a < b", (0, 10), (0, 1), width=200, height=120, left=20, right=20).line([0, 10], [0, 1], "s0", "end & all")
    svg = chart.svg()
    assert f'points="20.0,{chart.bottom:.1f} 180.0,{chart.top:.1f}"' in svg
    assert "a &lt; b" in svg and "end &amp; all" in svg
