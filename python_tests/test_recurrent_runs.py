"""`urlfast train r2d2` as a user types it: train, resume, evaluate, transfer, report."""

import json
import shutil

import numpy as np
import pytest
import torch

from urlfast import evaluate, report, train, transfer
from urlfast.checkpoint import read_at, read_latest
from urlfast.evaluate import EvaluateConfig, greedy
from urlfast.run import Run, UserError

RUN = "--device cpu --checkpoint-every 60 --log-every 60 --env.num-envs 2 --precision fp32 --learning-start 60 --steps 120".split()
SMALL = "--batch-size 4 --trace-length 6 --period 3 --learner.torso 8 --learner.lstm 8 --learner.hidden 8".split()


def newest(runs):
    return Run(max(runs.iterdir(), key=lambda path: path.stat().st_mtime_ns))


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    assert train.run_train(["r2d2", "gym", "--env.id", "CartPole-v1", *RUN, *SMALL, "--replay-ratio", "2", "--runs", str(runs)]) == 0
    return newest(runs)


def weights(run):
    return {part: state for part, state in read_latest(run.folder).state["method"].items() if part in ("q", "q_target", "q_optimizer")}


def test_two_resumes_of_one_checkpoint_are_one_run(cartpole, tmp_path):
    state = read_latest(cartpole.folder).state
    assert cartpole.config["preset"] == "discrete" and state["updates"] == 60 * 2 // (4 * 6)
    twins = [Run(shutil.copytree(cartpole.folder, tmp_path / name)) for name in ("a", "b")]
    for run in twins:
        assert train.run_train(["--resume", str(run.folder), "--steps", "240"]) == 0
    a, b = map(weights, twins)
    assert all(torch.equal(a["q"][name], b["q"][name]) for name in a["q"])
    state = read_latest(twins[0].folder).state
    assert state["updates"] == state["method"]["progress"]["updates"] == (240 - 60) * 2 // (4 * 6)
    assert not torch.equal(a["q"]["lstm.weight_hh_l0"], weights(cartpole)["q"]["lstm.weight_hh_l0"])


def test_a_run_is_evaluated_and_reported(cartpole):
    evaluate.evaluate(EvaluateConfig((str(cartpole.folder),), episodes=3, num_envs=2, video=False))
    assert len(json.loads((cartpole.folder / "results.json").read_text())["evaluations"][0]["returns"]) == 3
    assert "CartPole" in report.report([cartpole.folder]).read_text()


def test_what_an_evaluation_does_at_random_is_remembered(cartpole):
    method, domain, config = train.load(cartpole.config)
    with train.DOMAINS[domain](config.env, num_envs=4) as env:
        agent = train.make_method(method, config, env)
        policy = greedy(agent, 1.0, env.actions, np.random.default_rng(0))
        actions = policy(env.reset(0))
        assert agent.agent.previous_action.tolist() == actions.tolist()


def test_a_run_is_transferred(cartpole, tmp_path, capsys):
    options = [*RUN, "--batch-size", "4", "--trace-length", "6", "--period", "3", "--runs", str(tmp_path)]
    assert transfer.run_transfer([str(cartpole.folder), "--rule", "whole", *options]) == 0
    out, run = capsys.readouterr().out, newest(tmp_path)
    assert any(line.split() == ["q", "loaded"] for line in out.splitlines()), out
    assert any(line.split() == ["q_optimizer", "begins", "anew"] for line in out.splitlines()), out
    first, source = (saved.state["method"]["q"] for saved in (read_at(run.folder, "0"), read_latest(cartpole.folder)))
    assert all(torch.equal(first[name], source[name]) for name in source)


def test_atari_has_all_actions_and_lives_that_do_not_end_an_episode(tmp_path):
    small = [*RUN, *SMALL, "--learner.burn-in", "2", "--replay-capacity", "2000", "--steps", "80"]
    assert train.run_train(["r2d2", "atari", "--env.game", "pong", *small, "--runs", str(tmp_path)]) == 0
    run = newest(tmp_path)
    env = run.config["config"]["env"]
    assert env["full_action_set"] and not env["life_loss_terminal"] and env["frame_stack"] == 4 and env["noop_max"] == 30
    assert read_latest(run.folder).state["method"]["q"]["head.advantage.weight"].shape == (18, 8)


def test_sequences_need_their_rows_before_the_first_update(tmp_path):
    with pytest.raises(UserError, match="learning_start: must be at least 242, the first sequences of 121 steps, got 100"):
        train.run_train(["r2d2", "atari", "--env.num-envs", "2", "--learning-start", "100", "--runs", str(tmp_path)])
    with pytest.raises(UserError, match="r2d2 takes no continuous actions, which Pendulum-v1 has; these methods do: apt, aps, drq-sac"):
        train.run_train(["r2d2", "gym", "--env.id", "Pendulum-v1", "--runs", str(tmp_path)])
    assert not list(tmp_path.iterdir())
