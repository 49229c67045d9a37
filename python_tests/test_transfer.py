"""What a transfer carries over, on the real game and the real methods, for a few steps."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from urlfast import evaluate, train, transfer
from urlfast.checkpoint import read, read_latest
from urlfast.evaluate import EvaluateConfig
from urlfast.run import Run, UsageError, UserError

SMALL = ["--learning-start", "16", "--env.num-envs", "4", "--learner.hidden", "32", "--log-every", "10", "--replay-capacity", "2000"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    assert train.run_train(["apt", "atari", "--env.game", "pong", "--steps", "40", "--runs", str(runs), *SMALL]) == 0
    return Run(next(runs.iterdir()))


def tuned(pretrained, tmp_path, *options) -> Run:
    small = ["--steps", "40", "--learning-start", "20", "--log-every", "10", "--replay-capacity", "2000", "--runs", str(tmp_path)]
    assert transfer.run_transfer([str(pretrained.folder), *small, *options]) == 0
    return Run(next(tmp_path.iterdir()))


def same(mine: dict, theirs: dict) -> bool:
    return all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("rule, loaded, frozen", [
    ("whole", {"encoder", "q"}, set()),
    ("random-head", {"encoder"}, set()),
    ("frozen-encoder", {"encoder", "q"}, {"encoder"}),
])  # fmt: skip
def test_rules(pretrained, tmp_path, capsys, rule, loaded, frozen):
    run = tuned(pretrained, tmp_path, "--rule", rule)
    out = capsys.readouterr().out
    source = read_latest(pretrained.folder).state["method"]
    first = read(run.folder / "checkpoints" / "step-000000000").state["method"]
    last = read_latest(run.folder).state["method"]
    for part in ("encoder", "q"):
        assert same(first[part], source[part]) == (part in loaded), part
        assert same(last[part], source[part]) == (part in frozen), part
        said = "loaded and frozen" if part in frozen else "loaded" if part in loaded else "begins anew"
        assert any(line.split() == [part, *said.split()] for line in out.splitlines()), out
    assert any(line.split() == ["representation", "not", "used"] for line in out.splitlines()), out
    assert run.config["transfer"] == {"run": str(pretrained.folder), "method": "apt", "step": 40, "rule": rule}
    assert run.name.startswith(f"apt-transfer-{rule}-atari-pong-s1") and run.config["method"] == "drq"


def test_a_transfer_is_resumed_as_any_run_and_what_is_frozen_stays_frozen(pretrained, tmp_path):
    run = tuned(pretrained, tmp_path, "--rule", "frozen-encoder")
    assert train.run_train(["--resume", str(run.folder), "--steps", "60"]) == 0
    state = read_latest(run.folder).state
    assert (state["steps"], state["updates"]) == (60, 40)
    assert same(state["method"]["encoder"], read_latest(pretrained.folder).state["method"]["encoder"])


def test_another_game_has_other_actions(pretrained, tmp_path, capsys):
    says = "breakout has 4 actions, the run's pong 6: use --rule random-head, or pre-train with --env.full-action-set"
    with pytest.raises(UserError) as error:
        tuned(pretrained, tmp_path, "--task", "Breakout")
    assert str(error.value) == says and not capsys.readouterr().out and not list(tmp_path.iterdir())
    run = tuned(pretrained, tmp_path, "--task", "breakout", "--rule", "random-head")
    assert run.config["config"]["env"]["game"] == "breakout"


def test_a_misspelt_game_lists_the_nearest(pretrained, tmp_path):
    with pytest.raises(UserError, match="no game is called 'pnog'; the nearest are"):
        tuned(pretrained, tmp_path, "--task", "pnog")


def test_a_policy_is_not_evaluated_where_it_cannot_act_and_random_play_is_the_same_beside_every_checkpoint(pretrained):
    options = dict(episodes=2, num_envs=2, video=False)
    with pytest.raises(UsageError, match=r"breakout has 4 actions, the run's pong 6: its policy cannot act there"):
        evaluate.evaluate(EvaluateConfig((str(pretrained.folder),), task="breakout", **options))
    returns = []
    for policy in (None, lambda step: np.zeros(len(step.is_last), np.int64)):  # random play's, after two agents that play differently
        with pytest.MonkeyPatch.context() as patch:
            if policy:
                patch.setattr(evaluate, "greedy", lambda *_, policy=policy: policy)
            evaluate.evaluate(EvaluateConfig((str(pretrained.folder),), **options))
        entries = json.loads((pretrained.folder / "results.json").read_text())["evaluations"]
        returns.append([(entry["returns"], entry["lengths"]) for entry in entries if entry["policy"] == "random"][-1])
    assert returns[0] == returns[1]


@pytest.mark.parametrize("method, domain, preset, rule, says", [
    ("apt", "dmc", "urlb", "cpt", "'cpt' is not for this run of apt on dmc, but for those of apt, aps, ngu, cpt, .* with numbered actions"),
    ("apt", "atari", "paper", "fine-tuning", "'fine-tuning' is not for this run of apt on atari, but for those of ngu, cpt, r2d2, cpt-"),
    ("cpt-task", "atari", "small", "whole", r"'whole' is not for this run of cpt-task on atari, .* apt, .* r2d2 \(here: cpt, "),
    ("apt", "atari", "paper", "hole", r"unknown 'hole', did you mean 'whole'\? \(known: whole, random-head, "),
])  # fmt: skip
def test_a_rule_of_other_runs_says_whose(tmp_path, method, domain, preset, rule, says):
    config = asdict(train.PRESETS[method, domain][preset])
    run = Run.create(tmp_path, "run", {"method": method, "domain": domain, "preset": preset, "config": config})
    with pytest.raises(UsageError, match=f"^--rule: {says}"):
        transfer.run_transfer([str(run.folder), "--rule", rule])


def test_a_run_that_no_rule_begins_from_says_so(tmp_path):
    config = asdict(train.PRESETS["aps-task", "dmc"]["urlb"])
    run = Run.create(tmp_path, "run", {"method": "aps-task", "domain": "dmc", "config": config})
    with pytest.raises(UsageError, match="from a run of aps-task on dmc no rule leads on"):
        transfer.run_transfer([str(run.folder)])


def test_a_run_is_needed(tmp_path):
    with pytest.raises(UsageError, match="which run"):
        transfer.run_transfer([])
    with pytest.raises(UserError, match="no run"):
        transfer.run_transfer([str(tmp_path)])
