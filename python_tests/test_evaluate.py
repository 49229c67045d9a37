"""Evaluation: whose episodes count, what is covered, and what is written, on a world whose scores are known."""

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import toy_run

from urlfast import evaluate
from urlfast.envs import Episodes
from urlfast.evaluate import PLACE, EvaluateConfig, count_at, fingerprints, play, thinned, uniform, visits
from urlfast.run import Run, UsageError, UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return toy_run.new(tmp_path_factory.mktemp("runs"), "--steps", "80")


@pytest.fixture
def run(finished, tmp_path):
    return Run(shutil.copytree(finished.folder, tmp_path / finished.name))


class Lengths:
    """Environment i plays episodes of i + 2 actions, each paying 1; its RAM counts the actions of the episode."""

    action_repeat = 4

    def __init__(self, num_envs):
        self.num_envs, self.lengths, self.episodes = num_envs, np.arange(num_envs) + 2, Episodes(num_envs)

    def reset(self, seed):
        self.at = np.zeros(self.num_envs, np.int64)
        return self.episodes.reset(self.at, ram=self.ram())

    def step(self, actions):
        self.at = np.where(self.episodes.is_last, 0, self.at + 1)
        over = self.at == self.lengths
        return self.episodes.step(self.at, np.ones(self.num_envs), over, over, ram=self.ram())

    def ram(self):
        return np.repeat(self.at[:, None], 128, 1).astype(np.uint8)


def still(step):
    return np.zeros(len(step.is_last), np.int64)


def test_short_episodes_are_not_favoured():
    played = play(Lengths(3), still, 12, seed=0)
    assert sorted(played.lengths) == [2] * 4 + [3] * 4 + [4] * 4
    assert sorted(played.returns) == sorted(played.lengths)
    assert played.frames == 4 * sum(played.lengths)
    assert played.coverage[-1] == (played.frames, 5)  # 0..4 actions into an episode


def test_episodes_that_do_not_divide_are_shared_out():
    assert sorted(play(Lengths(3), still, 4, seed=0).lengths) == [2, 2, 3, 4]


def test_playing_on_for_coverage_adds_no_episodes():
    played = play(Lengths(3), still, 3, seed=0, frames=1000)
    assert len(played.returns) == 3 and 1000 <= played.frames <= 1012


@pytest.mark.parametrize("frames", [0, 1000])
def test_progress_counts_episodes_and_what_is_played_on_for_coverage(frames):
    ticks, lines = [], []
    progress = SimpleNamespace(tick=ticks.append, log=lines.append)
    played = play(Lengths(3), still, 3, seed=0, frames=frames, progress=progress)
    assert [line["step"] for line in lines] == [1, 2, 3] and sorted(ticks) == ticks and ticks[-1] == 3
    assert [line["score"] for line in lines] == ([2.0, 2.5, 3.0] if not frames else [3.0] * 3)
    assert ticks.count(3) == 1 and played.frames >= frames  # at the very end, and never before


def test_only_the_first_episode_of_the_first_environment_is_watched():
    watched = []
    play(Lengths(2), still, 6, seed=0, watch=lambda env: watched.append(env.at[0]))
    assert watched == [0, 1]


def test_states_are_counted_at_the_same_frames():
    seen = [(0, 1), (100, 11), (200, 13)]
    assert count_at(seen, 99) == 1 and count_at(seen, 100) == 11 and count_at(seen, 1000) == 13  # counts, never between two
    assert count_at([], 50) is None
    curve = [(i, i) for i in range(12_345)]
    assert len(thinned(curve)) <= 501 and thinned(curve)[0] == (0, 0) and thinned(curve)[-1] == curve[-1]


def test_places_are_told_apart_by_their_bytes_alone():
    class Clock(Lengths):
        def ram(self):  # byte 0 is a timer, byte 5 the place
            ram = np.zeros((self.num_envs, 128), np.uint8)
            self.time = getattr(self, "time", 0) + 1
            ram[:, 0], ram[:, 5] = self.time, self.at // 2
            return ram

    played = play(Clock(3), still, 12, seed=0, place={"x": (5, 1)})
    assert played.places[-1] == (played.frames, 3) and played.coverage[-1][1] > 12  # 0..4 actions into an episode are places 0, 1, 2
    assert play(Clock(3), still, 12, seed=0).places == []


def test_rooms_of_each_level_and_cells_of_the_position_are_counted():
    class Walker(Lengths):
        def ram(self):  # every action is four pixels to the right; the third leads into the next room, at level 1
            ram = np.zeros((self.num_envs, 128), np.uint8)
            ram[:, 42], ram[:, 43], ram[:, 3], ram[:, 57] = 4 * self.at, 200, self.at > 2, self.at > 2
            return ram

    place = PLACE["montezuma_revenge"]
    played = play(Walker(3), still, 3, seed=0, place=place)  # episodes of 2, 3 and 4 actions
    assert played.rooms[-1][1] == 2
    assert played.places[-1][1] == 4  # cells 0 and 1 of the first room, 1 and 2 of the second
    rows = {tuple(row[:4]): row[4] for row in visits(played.visited, place)}
    assert set(rows) == {(0, 0, 0, 200), (0, 0, 4, 200), (0, 0, 8, 200), (1, 1, 12, 200), (1, 1, 16, 200)}
    assert rows[0, 0, 0, 200] == 4 and rows[1, 1, 16, 200] == 1  # three episodes begin, and where all are done one more has begun
    assert visits(play(Walker(3), still, 3, seed=0).visited, {}) is None
    close = Counter({bytes([0, 1, 40, 200]): 2, bytes([0, 1, 41, 201]): 3, bytes([0, 1, 42, 200]): 1})
    assert visits(close, place) == [[0, 1, 40, 200, 5], [0, 1, 42, 200, 1]]


def test_fingerprints_tell_single_bits_apart():
    ram = np.zeros((1 + 128 * 8, 128), np.uint8)
    ram[1:] = np.packbits(np.eye(128 * 8, dtype=np.uint8), axis=1)
    assert len(set(fingerprints(ram))) == len(ram)


def test_the_random_policy_is_uniform():
    step = SimpleNamespace(is_last=np.zeros(30_000, bool))
    counts = np.bincount(uniform(3, np.random.default_rng(0))(step))
    assert len(counts) == 3 and abs(counts - 10_000).max() < 400


def test_results(run, capsys):
    """Greedy, the toy takes action 1, which pays 3, five times: 15 an episode, and 7.5 at random."""
    options = EvaluateConfig((run.folder.as_posix(),), episodes=40, num_envs=4, epsilon=0.0)
    evaluate.evaluate(options)
    out = capsys.readouterr().out
    results = json.loads((run.folder / "results.json").read_text())
    agent, random = results["evaluations"]
    assert (agent["policy"], random["policy"]) == ("agent", "random")
    assert agent["returns"] == [15.0] * 40 and agent["lengths"] == [5] * 40 and agent["step"] == 80 and agent["frames"] == 320
    assert agent["human_normalised"] == pytest.approx((15 + 20.7) / (14.6 + 20.7))
    assert 5 < random["mean"] < 10 and random["frames_played"] >= agent["frames_played"] == 800
    assert agent["unique_states"] == random["unique_states"] == 6
    assert results["method"] == "toy" and results["game"] == "pong" and results["seed"] == 1
    protocol = {"episodes": 40, "epsilon": 0, "num_envs": 4, "seed": 10_000}
    assert protocol.items() <= agent["protocol"].items() and random["protocol"] == agent["protocol"] | {"epsilon": 1.0}
    assert agent["versions"]["urlfast"] and agent["hardware"]
    assert "15.0" in out and "101.1 %" in out
    assert "agent: episode 40 of 40 (100.0%)" in out and "random: episode 40 of 40 (100.0%)" in out

    import av

    with av.open(str(run.folder / "videos" / "step-000000080.mp4")) as video:
        frames = list(video.decode(video=0))
    assert len(frames) == 5 and (frames[0].height, frames[0].width) == (20, 24)
    assert [round(frame.to_ndarray(format="rgb24").mean(), -1) for frame in frames] == [0, 10, 20, 30, 40]


def test_an_evaluation_by_the_same_protocol_is_replaced_and_others_are_kept(run):
    def found():
        entries = json.loads((run.folder / "results.json").read_text())["evaluations"]
        assert [entry["policy"] for entry in entries] == ["agent", "random"] * (len(entries) // 2)
        return [(entry["step"], entry["protocol"]["seed"], entry["protocol"]["num_envs"]) for entry in entries[::2]]

    for checkpoint, seed in (("40", 3), ("latest", 4), ("latest", 5), ("latest", 4)):
        options = EvaluateConfig((run.folder.as_posix(),), episodes=2, num_envs=2, checkpoint=checkpoint, seed=seed, video=False)
        evaluate.evaluate(options)
    assert found() == [(40, 3, 2), (80, 5, 2), (80, 4, 2)]


def test_several_runs_are_evaluated_in_turn_and_none_is_refused(run):
    other = shutil.copytree(run.folder, run.folder.with_name("other"))
    evaluate.evaluate(EvaluateConfig((run.folder.as_posix(), other.as_posix()), episodes=2, epsilon=0.0, video=False))
    for folder in (run.folder, other):
        agent, random = json.loads((folder / "results.json").read_text())["evaluations"]
        assert (agent["policy"], agent["returns"], random["policy"]) == ("agent", [15.0, 15.0], "random")
    with pytest.raises(UserError, match="no run 'absent'"):
        evaluate.evaluate(EvaluateConfig((run.folder.as_posix(), "absent")))
    with pytest.raises(UserError, match="name at least one run"):
        evaluate.evaluate(EvaluateConfig(()))


def test_one_episode_has_no_error_and_one_process_evaluates_at_a_time(run, capsys):
    options = EvaluateConfig((run.folder.as_posix(),), episodes=1, epsilon=0.0, video=False)
    with run.locked():  # while it trains
        evaluate.evaluate(options)
    out = capsys.readouterr().out
    assert "15.0 ± n/a" in out and "nan" not in out
    agent = json.loads((run.folder / "results.json").read_text())["evaluations"][-2]
    assert agent["protocol"]["num_envs"] == 1  # not the 8 that were allowed
    with run.locked(".evaluate.lock"), pytest.raises(UserError, match="in use by process"):
        evaluate.evaluate(options)


def test_epsilon_is_the_share_of_random_actions():
    method = SimpleNamespace(act=lambda step, explore: np.ones(100_000, np.int64))
    action = evaluate.greedy(method, 0.1, 2, np.random.default_rng(0))(SimpleNamespace(is_last=np.zeros(100_000, bool)))
    assert abs(np.mean(action == 0) - 0.05) < 0.005


def test_every_checkpoint_and_a_task_that_is_not_the_runs_own(run, capsys):
    evaluate.evaluate(EvaluateConfig((str(run.folder),), episodes=2, num_envs=2, checkpoint="all", video=False))
    evaluate.evaluate(EvaluateConfig((str(run.folder),), episodes=2, num_envs=2, task="freeway"))
    results = json.loads((run.folder / "results.json").read_text())
    assert results["game"] == "pong"
    assert [(e["task"], e["step"]) for e in results["evaluations"][::2]] == [("pong", 0), ("pong", 40), ("pong", 80), ("freeway", 80)]
    assert results["evaluations"][-2]["human_normalised"] == pytest.approx(15 / 29.6, rel=0.2)  # by the other game's scores
    assert [path.name for path in (run.folder / "videos").glob("*.mp4")] == ["step-000000080-freeway.mp4"]


def test_several_games_are_aggregated(run, tmp_path, capsys):
    others = []
    for game in ("freeway", "boxing"):
        others.append(shutil.copytree(run.folder, tmp_path / game))
        document = json.loads((others[-1] / "config.json").read_text())
        document["config"]["env"]["game"] = game
        (others[-1] / "config.json").write_text(json.dumps(document))
    folders = tuple(map(str, (run.folder, *others)))
    evaluate.evaluate(EvaluateConfig(folders, episodes=2, epsilon=0.0, video=False))
    out = capsys.readouterr().out
    assert "Human-normalised, over games:" in out and "human level (0.75)" in out and "below three runs" in out
    wanted = [(15 + 20.7) / 35.3, 15 / 29.6, (15 - 0.1) / 12.0]
    assert f"toy 3 1 {np.mean(wanted):.3f} {np.mean(wanted):.3f} {np.median(wanted):.3f} " in " ".join(out.split())


def test_physical_states_are_drawn_evenly():
    assert evaluate.sampled([]) is None
    states = [np.full((2, 3), i, np.float64) + 0.123456 for i in range(1000)]
    drawn = np.array(evaluate.sampled(states))
    assert drawn.shape == (evaluate.PHYSICS, 3) and drawn[0, 0] == 0.1235 and drawn[-1, 0] == pytest.approx(999.1)
    assert np.ptp(np.diff(drawn[:, 0])) <= 1.01
    assert len(evaluate.sampled(states[:3])) == 6


@pytest.mark.parametrize("part, option, value, says", [("env", "game", "qbort", "game: .*qbert"), ("method", "lr", -2.5, "learning rate")])
def test_a_config_that_nothing_can_be_made_of_is_refused(tmp_path, part, option, value, says):
    run = toy_run.new(tmp_path, "--steps", "20")
    saved = json.loads((run.folder / "config.json").read_text())
    saved["config"][part][option] = value
    (run.folder / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UsageError, match=says):
        evaluate.evaluate(EvaluateConfig((str(run.folder),)))


def left_by(run):
    """Names in the run's folder that an evaluation makes, hidden ones too."""
    return sorted(path.name for path in (*run.folder.glob("videos/*"), *run.folder.glob("*results*")))


def test_a_stopped_evaluation_leaves_nothing_and_says_so(run, interruptible, monkeypatch, capsys):
    monkeypatch.setenv("TOY_SIGNAL", "15:SIGINT")  # eleven steps are the agent's two episodes, in four environments each
    with pytest.raises(SystemExit) as exit:
        evaluate.main([str(run.folder), "--episodes", "8", "--num-envs", "4"])
    assert exit.value.code == 130
    said = capsys.readouterr()
    assert "agent: episode 8 of 8" in said.out and said.err.startswith("\nstopped: this evaluation leaves nothing, and those ")
    assert left_by(run) == []


def test_checkpoints_that_were_evaluated_before_one_is_stopped_stay(run, monkeypatch):
    greedy = evaluate.greedy

    def stopped(method, *others):
        if method.rows:  # as that of every checkpoint but the first has
            raise KeyboardInterrupt
        return greedy(method, *others)

    monkeypatch.setattr(evaluate, "greedy", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(EvaluateConfig((str(run.folder),), episodes=2, num_envs=2, checkpoint="all"))
    assert left_by(run) == ["results.json", "step-000000000.mp4"]
    assert {entry["step"] for entry in json.loads((run.folder / "results.json").read_text())["evaluations"]} == {0}


def test_what_a_killed_evaluation_leaves_is_hidden_and_goes_with_the_next(tmp_path):
    run = toy_run.new(tmp_path, "--steps", "40", "--env.length", "200")  # more frames than the encoder holds back
    command = [sys.executable, "-c", "import toy_run; from urlfast import evaluate; evaluate.main()", str(run.folder)]
    options, variables = ["--episodes", "4", "--num-envs", "4"], toy_run.environment(TOY_SIGNAL="205:SIGKILL")
    killed = subprocess.run([*command, *options], env=variables, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert left_by(run) == [".step-000000040.mp4"]
    (run.folder / ".results.json.1").write_text("{")  # of one that was killed while it wrote
    evaluate.evaluate(EvaluateConfig((str(run.folder),), episodes=2, num_envs=2, video=False))
    assert left_by(run) == ["results.json"]


def test_an_unknown_checkpoint_lists_those_there_are(run):
    with pytest.raises(UsageError, match="none of step 41, did you mean '40'"):
        evaluate.evaluate(EvaluateConfig((run.folder.as_posix(),), checkpoint="41"))


def test_results_that_lead_elsewhere_are_neither_read_nor_followed(run, tmp_path):
    evaluate.evaluate(EvaluateConfig((str(run.folder),), episodes=2, video=False))
    path, elsewhere = run.folder / "results.json", tmp_path / "results.json"
    path.symlink_to(path.rename(elsewhere))
    before = elsewhere.read_bytes()
    evaluate.evaluate(EvaluateConfig((str(run.folder),), episodes=2, seed=9, video=False))
    assert not path.is_symlink() and elsewhere.read_bytes() == before
    assert {entry["protocol"]["seed"] for entry in json.loads(path.read_text())["evaluations"]} == {9}


def test_results_that_are_damaged_are_written_anew_and_strangers_entries_left_out(run):
    path = run.folder / "results.json"
    for text in ('{"evaluations": [3, {"policy": "agent", "step": 1}, null]}', "[]", '{"evaluations": 3}', "[" * 10_000, "\udcff", "{}"):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        evaluate.evaluate(EvaluateConfig((str(run.folder),), episodes=2, video=False))
        found = json.loads(path.read_text())["evaluations"]
        assert [entry["policy"] for entry in found] == (["agent"] if "agent" in text else []) + ["agent", "random"]


def test_episodes_are_shared_out_without_being_counted_one_by_one():
    with pytest.raises(StopIteration):  # at the first step, and not for want of memory
        play(SimpleNamespace(num_envs=3, reset=lambda seed: next(iter(()))), None, 10**15, 0)
