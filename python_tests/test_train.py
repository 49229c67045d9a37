"""The loop, on a world where everything is known, interrupted and killed as runs are."""

import os
import signal
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_run

from urlfast import train
from urlfast.checkpoint import checkpoints, read_latest
from urlfast.run import Run, UsageError, UserError, read_json, read_metrics, write_json
from urlfast.train import Counters, updates_owed


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return toy_run.new(tmp_path_factory.mktemp("runs"))


def final(run: Run) -> dict:
    return read_latest(run.folder).state


@pytest.mark.parametrize("per_step", [0.0, 0.25, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("num_envs", [1, 8])
def test_updates_follow_the_steps_without_a_burst_and_without_drift(per_step, num_envs):
    config = SimpleNamespace(updates_per_step=per_step, learning_start=100)
    counters, most = Counters(), 0
    for _ in range(4000 // num_envs):
        owed = updates_owed(counters, config)
        most = max(most, owed)
        counters.updates += owed
        counters.steps += num_envs
        assert counters.steps > 100 or counters.updates == 0
    assert most <= np.ceil(per_step * num_envs)
    counters.updates += updates_owed(counters, config)
    assert abs(counters.updates - per_step * 3900) < 1


def test_counts(finished):
    state = final(finished)
    assert (state["steps"], state["updates"], state["episodes"]) == (200, int(0.75 * 180), 40)
    lines = read_metrics(finished.folder)
    assert [line["step"] for line in lines] == list(range(10, 201, 10))
    assert lines[-1]["frames"] == 800 and lines[-1]["updates"] == 135 and lines[-1]["episodes"] == 40
    assert all(line["updates"] == int(0.75 * max(0, line["step"] - 2 - 20)) for line in lines[:-1])  # the last vector step's follow it
    assert all(line["episode_length"] == 5.0 and line["score"] % 1.5 == 0 for line in lines)  # the score is not clipped
    assert len(lines[-1]["intrinsic_reward_quantiles"]) == 5


def test_rows_pair_what_was_seen_with_what_was_done_and_paid(finished):
    """Action 1 pays 3, which is learned from as 1; a picture of 10 * (t + 1) is followed by the end at t = 4."""
    replay = read_latest(finished.folder, replay=True).load_replay()
    batch = replay.sample(256)
    t = batch.observation[:, -1, 0, 0] // 10 - 1
    assert set(t) == {0, 1, 2, 3, 4}
    np.testing.assert_array_equal(batch.reward, batch.action)
    np.testing.assert_array_equal(batch.discount == 0, t == 4)
    np.testing.assert_array_equal(batch.next_observation[:, -1, 0, 0] // 10 - 1, t + 1)


def test_a_run_says_what_it_will_take(finished, tmp_path, capsys):
    toy_run.new(tmp_path, "--steps", "20")
    out = capsys.readouterr().out
    assert "memory" in out and "for the replay and" in out and "time    about" in out
    assert f"urlfast evaluate {next(tmp_path.iterdir())}" in out


def test_a_resumed_run_equals_one_that_was_not_interrupted(finished, tmp_path, monkeypatch, capsys):
    """Interrupted where the episodes begin anyway, nothing at all may differ but the times."""
    monkeypatch.setenv("TOY_SIGNAL", "42:SIGINT")  # seven episodes of five actions and a reset
    assert train.run_train(["toy", "corridor", "--runs", str(tmp_path)]) == 128 + signal.SIGINT
    monkeypatch.delenv("TOY_SIGNAL")
    (folder,) = tmp_path.iterdir()
    assert f"urlfast train --resume {folder}" in capsys.readouterr().out
    assert read_latest(folder).step == 70
    assert train.run_train(["--resume", str(folder)]) == 0
    mine, theirs = final(Run(folder)), final(finished)
    assert [line["step"] for line in read_metrics(folder)] == list(range(10, 201, 10))
    for state in (mine, theirs):
        del state["seconds"], state["rng"]
    assert_equal(mine, theirs)
    mine, theirs = (read_latest(f, replay=True).load_replay() for f in (folder, finished.folder))
    for _ in range(3):
        assert_equal(dict(vars(mine.sample(32))), dict(vars(theirs.sample(32))))


def assert_equal(mine, theirs):
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert_equal(mine[key], theirs[key])
    elif isinstance(mine, torch.Tensor | np.ndarray):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
    else:
        assert mine == theirs


def begin(*arguments, **variables):
    return subprocess.Popen(
        [*toy_run.COMMAND, *arguments], env=toy_run.environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_killed_twice_and_resumed_no_step_is_lost_or_counted_twice(tmp_path):
    process = begin("toy", "corridor", "--runs", str(tmp_path), "--checkpoint-every", "30", TOY_SIGNAL="40:SIGKILL")
    _, error = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, error
    (folder,) = tmp_path.iterdir()
    assert read_latest(folder).step == 60
    process = begin("--resume", str(folder), TOY_SIGNAL="40:SIGSTOP")
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), process.communicate()
    assert read_latest(folder).step == 120
    refused = subprocess.run([*toy_run.COMMAND, "--resume", str(folder)], env=toy_run.environment(), capture_output=True, text=True)
    assert refused.returncode == 1 and refused.stderr == f"urlfast train: {folder} is in use by process {process.pid}\n"
    process.kill()
    process.communicate()
    assert train.run_train(["--resume", str(folder)]) == 0
    state = final(Run(folder))
    assert (state["steps"], state["updates"]) == (200, 135)
    steps = [line["step"] for line in read_metrics(folder)]
    assert steps == list(range(10, 201, 10))
    assert all(line["updates"] == int(0.75 * max(0, line["step"] - 22)) for line in read_metrics(folder)[:-1])


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_saves_and_says_how_to_go_on(tmp_path, number, status):
    process = begin("toy", "corridor", "--runs", str(tmp_path), TOY_SIGNAL=f"28:{number.name}")
    out, error = process.communicate(timeout=120)
    assert process.returncode == status, error
    (folder,) = tmp_path.iterdir()
    assert f"stopped, and saved at step 48. Go on with: urlfast train --resume {folder}" in out and "Traceback" not in error
    saved = read_latest(folder, replay=True)
    assert saved.step == 48 and read_metrics(folder)[-1]["step"] == 48  # in 28 steps of two worlds four were resets


def test_a_second_interrupt_is_not_waited_for(tmp_path):
    folder = toy_run.new(tmp_path, "--steps", "60").folder
    process = begin("--resume", str(folder), "--steps", "200", TOY_SIGNAL="2:SIGINT", TOY_SLOW="60")
    try:
        said = [process.stderr.readline() for _ in range(2)]
        assert "SIGINT: saving a checkpoint; once more to leave without it" in said[1], said
        process.send_signal(signal.SIGINT)  # while an update of 60 seconds goes on
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in error, error
    assert read_latest(folder).step == 60


def test_the_first_checkpoint_is_there_before_the_first_step(tmp_path, monkeypatch):
    def stop(self, seed=None):
        raise RuntimeError("the first step")

    monkeypatch.setattr(toy_run.Corridor, "reset", stop)
    with pytest.raises(RuntimeError, match="the first step"):
        train.run_train(["toy", "corridor", "--runs", str(tmp_path)])
    monkeypatch.undo()
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in checkpoints(folder)] == ["step-000000000"]
    assert train.run_train(["--resume", str(folder)]) == 0
    assert final(Run(folder))["updates"] == 135


def test_a_resumed_run_keeps_its_options_and_may_go_further(tmp_path):
    run = toy_run.new(tmp_path, "--steps", "60", "--lr", "0.02")
    for option, value in (("--lr", "0.5"), ("--env.num-envs", "3"), ("--seed", "2")):
        with pytest.raises(UsageError, match=option):
            train.run_train(["--resume", str(run.folder), option, value])
    assert (
        train.run_train(["--resume", str(run.folder), "--keep", "2", "--checkpoint-every", "7", "--log-every", "5", "--device", "cpu"]) == 0
    )
    assert {name: run.config["config"][name] for name in ("keep", "checkpoint_every", "log_every", "device")} == {
        "keep": 2, "checkpoint_every": 7, "log_every": 5, "device": "cpu",
    }  # fmt: skip
    with pytest.raises(UsageError, match="--steps: may only be raised"):
        train.run_train(["--resume", str(run.folder), "--steps", "50"])
    with pytest.raises(UsageError, match="a run of toy corridor"):
        train.run_train(["apt", "atari", "--resume", str(run.folder)])
    assert train.run_train(["toy", "corridor", "--resume", str(run.folder), "--steps", "100"]) == 0
    assert run.config["config"]["steps"] == 100 and run.config["config"]["method"]["lr"] == 0.02
    assert (final(run)["steps"], final(run)["updates"]) == (100, 60)


def test_what_an_older_config_lacks_is_said_once_and_then_kept(tmp_path, capsys):
    run = toy_run.new(tmp_path, "--steps", "60")
    saved = read_json(run.folder / "config.json")
    del saved["config"]["method"]["lr"], saved["config"]["keep"]
    write_json(run.folder / "config.json", saved)
    lr = toy_run.ToyConfig().lr
    assert train.run_train(["--resume", str(run.folder), "--steps", "80"]) == 0
    says = "config.json is an older urlfast's, without these options: taken as by default are "
    assert f"{says}--lr {lr} --keep 3\n" in capsys.readouterr().err and run.config["config"]["method"]["lr"] == lr
    assert train.run_train(["--resume", str(run.folder), "--steps", "100"]) == 0
    assert says not in capsys.readouterr().err


@pytest.mark.parametrize("arguments, error, says", [
    (["tog", "corridor"], UsageError, "unknown method 'tog', did you mean 'toy'"),
    (["xyz", "corridor"], UsageError, r"unknown method 'xyz' \(known: apt"),
    (["toy", "coridor"], UsageError, "did you mean 'corridor'"),
    (["toy"], UsageError, "toy on which domain"),
    (["toy", "corridor", "--preset", "fats"], UsageError, "did you mean 'fast'"),
    (["toy", "corridor", "--resume"], UsageError, "--resume: needs a value"),
    (["toy", "corridor", "--env.game", "brakout"], UsageError, "breakout"),
    (["toy", "corridor", "--learning-start", "3"], UsageError, "learning_start: must be at least 4"),
    (["apt", "gym"], UsageError, "^--env.id: which environment\\? as in `urlfast train apt gym --env.id CartPole-v1`"),
    (["apt", "gym", "--preset", "discrete", "--steps", "20"], UsageError, "^--env.id: which environment"),
])  # fmt: skip
def test_what_is_not_known_is_answered_with_the_nearest(arguments, error, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=says):
        train.run_train(arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method, option, value, says", [
    ("apt", "--reward.k", "100", "--reward.k: must lie in 1..32, the particles of a batch, got 100"),
    ("apt", "--batch-size", "0", "--batch-size: must be at least 2, got 0"),
    ("apt", "--online-views", "3", "--online-views: must be 1 or 2, got 3"),
    ("apt", "--adam-eps", "0", "--adam-eps: must be positive, got 0.0"),
    ("apt", "--gamma", "1.5", "--gamma: must lie in 0..1, got 1.5"),
    ("apt", "--updates-per-step", "-1", "--updates-per-step: must be positive, got -1.0"),
    ("apt", "--n-step", "0", "--n-step: must be at least 1, got 0"),
    ("apt", "--replay-capacity", "0", "--replay-capacity: must be at least 1, got 0"),
    ("drq", "--batch-size", "0", "--batch-size: must be at least 1, got 0"),
    ("drq", "--gamma", "nan", "--gamma: must lie in 0..1, got nan"),
    ("drq", "--reward-clip", "0", "--reward-clip: must be positive, got 0.0"),
])  # fmt: skip
def test_a_number_out_of_range_is_one_line_that_names_the_option(method, option, value, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        train.main([method, "atari", "--runs", str(tmp_path), option, value])
    assert exit.value.code == 2 and capsys.readouterr().err == f"urlfast train: {says}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option, value, says", [
    ("--learner.lr", "0", "learner: lr: must be positive, got 0.0"),
    ("--learner.epsilon", "1.5", "learner: epsilon: must lie in 0..1, got 1.5"),
    ("--representation.temperature", "0", "representation: temperature: must be positive, got 0.0"),
    ("--representation.projection", "0", "representation: projection: must be at least 1, got 0"),
    ("--learner.adam-eps", "-1", "learner: adam_eps: must be positive"),
    ("--learner.hidden", "0", "learner: hidden: must be at least 1, got 0"),
    ("--learner.grad-clip", "0", "learner: grad_clip: must be positive"),
    ("--augment.shift", "-1", "augment: shift: must be at least 0, got -1"),
    ("--augment.jitter-probability", "2", "augment: jitter_probability: must lie in 0..1"),
    ("--reward.c", "0", "reward: c: must be positive, got 0.0"),
    ("--encoder.features", "-1", "encoder: features: must be at least 0, got -1"),
    ("--reward.k", "0", "reward: k: must be at least 1, got 0"),
])  # fmt: skip
def test_a_number_out_of_range_in_a_group_is_named(option, value, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        train.main(["apt", "atari", "--runs", str(tmp_path), option, value])
    assert exit.value.code == 2 and says in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"method": "toy", "domain": "corridor", "config": 3}', '{"name": "someone else"}'])
def test_a_folder_of_something_else_is_not_a_run(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}/config.json is not a run of urlfast"):
        train.run_train(["--resume", str(tmp_path)])


@pytest.mark.parametrize("runs", ["/proc/x", "a-file/x"])
def test_a_folder_that_cannot_be_written_is_said_before_anything_is_timed(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    monkeypatch.setattr(train, "seconds_per_update", lambda *_: pytest.fail("timed"))
    with pytest.raises(UserError, match=f"--runs: cannot write to {runs}: "):
        train.run_train(["toy", "corridor", "--runs", runs])


def test_a_gpu_that_is_not_there_is_one_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="--device cuda"):
        train.run_train(["toy", "corridor", "--device", "cuda", "--runs", str(tmp_path)])


def test_of_an_option_given_twice_the_last_value_counts():
    argv = ["--preset", "a", "--steps", "3", "--preset=b"]
    assert train.take(argv, "--preset") == "b" and argv == ["--steps", "3"] and train.take(argv, "--preset") is None


def test_a_preset_and_its_options(tmp_path):
    run = toy_run.new(tmp_path, "--preset=paper", "--preset=fast", "--steps", "40", "--env.num-envs", "1")
    assert run.config["preset"] == "fast"
    assert run.config["config"]["method"]["lr"] == 0.1 and run.config["config"]["env"]["num_envs"] == 1
    assert run.config["versions"]["urlfast"] and run.config["config"]["seed"] == 1
