"""`urlfast` on control tasks and on any environment of gymnasium, as a user types it: train, resume, evaluate, transfer, report."""

import json
from contextlib import closing

import numpy as np
import pytest

from urlfast import evaluate, report, train, transfer
from urlfast.checkpoint import read_latest
from urlfast.envs.dmc import DMCConfig
from urlfast.evaluate import EvaluateConfig
from urlfast.run import Run, UsageError, UserError

RUN = "--device cpu --checkpoint-every 40 --log-every 20 --env.num-envs 2 --precision fp32 --learning-start 40 --steps 80".split()
SMALL = "--batch-size 8 --learner.hidden 12 --reward.k 3".split()
ICM = "--representation.features 6 --representation.hidden 12".split()


def trained(runs, *arguments):
    assert train.run_train([*arguments, "--runs", str(runs)]) == 0
    return newest(runs)


def newest(runs):
    return Run(max(runs.iterdir(), key=lambda path: path.stat().st_mtime_ns))


@pytest.fixture(scope="module")
def apt(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs"), "apt", "dmc", *RUN, *SMALL, *ICM, "--env.workers", "1")


@pytest.fixture(scope="module")
def aps(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs"), "aps", "dmc", *RUN, *SMALL, "--phi-hidden", "12", "--env.workers", "1")


def test_apt_on_states_goes_on_where_it_was_and_is_evaluated_and_reported(apt):
    assert apt.name.startswith("apt-dmc-walker_stand-s1") and apt.config["preset"] == "urlb"
    assert train.run_train(["--resume", str(apt.folder), "--steps", "120"]) == 0
    last = read_latest(apt.folder)
    assert last.step == 120 and last.state["updates"] == (120 - 40) / 2 and last.state["method"]["progress"]["steps"] == 120
    evaluate.evaluate(EvaluateConfig((str(apt.folder),), episodes=2, num_envs=2, video=False))
    agent, random = json.loads((apt.folder / "results.json").read_text())["evaluations"]
    assert agent["lengths"] == random["lengths"] == [1000, 1000] and all(0 < r < 1000 for r in agent["returns"] + random["returns"])
    assert agent["expert_normalised"] == pytest.approx(agent["mean"] / 984) and agent["human_normalised"] is None
    assert agent["state_entropy"] != random["state_entropy"] and agent["success"] is None and agent["unique_states"] is None
    collected = [agent["collected_entropy"], random["collected_entropy"]]
    assert np.isfinite(collected).all() and collected[0] != collected[1]
    aside = (apt.folder / "replay").rename(apt.folder / "aside")
    assert evaluate.observations(last) is None  # the rest of an evaluation needs no replay
    aside.rename(apt.folder / "replay")
    assert evaluate.observations(last).shape == (5000, 24)
    assert "walker" in report.report([apt.folder]).read_text()


def test_apt_is_transferred_to_another_task_of_its_domain(apt, capsys):
    assert transfer.run_transfer([str(apt.folder), "--task", "walker-walk", *RUN, "--batch-size", "8", "--steps", "60"]) == 0
    out, run = capsys.readouterr().out, newest(apt.folder.parent)
    assert run.name.startswith("apt-transfer-whole-dmc-walker_walk-s1") and run.config["method"] == "ddpg"
    for part, says in [
        ("actor", "loaded"),
        ("critic_target", "loaded"),
        ("critic_optimizer", "begins anew"),
        ("representation", "not used"),
    ]:
        assert any(line.split() == [part, *says.split()] for line in out.splitlines()), out
    with pytest.raises(UsageError, match="hopper_hop is no task of walker, which is all that the run knows"):
        transfer.run_transfer([str(apt.folder), "--task", "hopper_hop", *RUN])


def test_aps_infers_the_tasks_skill_and_keeps_it(aps, capsys):
    options = [*RUN, "--batch-size", "8", "--infer-at", "50", "--steps", "60"]
    assert transfer.run_transfer([str(aps.folder), "--task", "walker_walk", *options]) == 0
    run = newest(aps.folder.parent)
    assert run.config["method"] == "aps-task" and "the task's skill is" in capsys.readouterr().out
    state = read_latest(run.folder).state["method"]
    skill = state["regression"]["skill"]
    assert skill.norm() == pytest.approx(1, abs=1e-5) and state["regression"]["due"] == 10_050
    assert train.run_train(["--resume", str(run.folder), "--steps", "80"]) == 0
    assert read_latest(run.folder).state["method"]["regression"]["skill"].tolist() == skill.tolist()


def test_one_skill_can_be_evaluated(aps):
    options = dict(episodes=1, num_envs=1, video=False)
    evaluate.evaluate(EvaluateConfig((str(aps.folder),), skill=(1.0, *[0.0] * 9), **options))
    evaluate.evaluate(EvaluateConfig((str(aps.folder),), skill=(0.0, 1.0, *[0.0] * 8), **options))
    entries = json.loads((aps.folder / "results.json").read_text())["evaluations"]
    assert [e["protocol"]["skill"] for e in entries[::2]] == [[1, *[0] * 9], [0, 1, *[0] * 8]]
    with pytest.raises(UserError, match="skill: must be 10 finite numbers"):
        evaluate.evaluate(EvaluateConfig((str(aps.folder),), skill=(1.0,), **options))


@pytest.mark.parametrize("method, id, preset, options", [
    ("apt", "CartPole-v1", "discrete", ICM),
    ("apt", "Pendulum-v1", "continuous", ICM),
    ("aps", "CartPole-v1", "discrete", ["--phi-hidden", "12"]),
    ("drq", "CartPole-v1", "discrete", None),
    ("drq-sac", "Pendulum-v1", "continuous", None),
])  # fmt: skip
def test_any_environment_of_gymnasium(method, id, preset, options, tmp_path):
    small = ["--batch-size", "8", "--learner.hidden", "12"] if options is None else [*SMALL, *options]
    run = trained(tmp_path, method, "gym", "--env.id", id, *RUN, *small)
    assert run.name.startswith(f"{method}-gym-{id}-s1") and run.config["preset"] == preset
    evaluate.evaluate(EvaluateConfig((str(run.folder),), episodes=2, num_envs=2, video=False))
    assert len(json.loads((run.folder / "results.json").read_text())["evaluations"][0]["returns"]) == 2


def test_a_method_that_cannot_take_an_environments_actions_says_which_can(tmp_path):
    with pytest.raises(
        UserError, match="ddpg takes no discrete actions, which CartPole-v1 has; these methods do: apt, aps, ngu, cpt, drq, r2d2"
    ):
        train.run_train(["ddpg", "gym", "--env.id", "CartPole-v1", "--runs", str(tmp_path)])
    with pytest.raises(UserError, match="drq takes no continuous actions, which Pendulum-v1 has"):
        train.run_train(["drq", "gym", "--env.id", "Pendulum-v1", "--runs", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_where_nothing_draws_only_the_video_is_missing(aps, monkeypatch, capsys):
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    evaluate.evaluate(EvaluateConfig((str(aps.folder),), episodes=1, num_envs=1, seed=77))
    assert "no video: no renderer: MUJOCO_GL=disabled forbids drawing" in capsys.readouterr().out
    assert not list((aps.folder / "videos").iterdir()) and (aps.folder / "results.json").exists()


def test_an_invalid_state_of_mujoco_is_counted_in_the_metrics_and_the_run_goes_on(tmp_path, monkeypatch, capfd):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'urlfast.envs.dmc_worker' in sys.orig_argv:\n"
        "    import mujoco\n"
        "    step, steps = mujoco.mj_step2, iter(range(10**9))\n"
        "    def mj_step2(model, data):\n"
        "        if next(steps) % 25 == 24:\n"
        "            data.qvel[0] = float('nan')\n"
        "        step(model, data)\n"
        "    mujoco.mj_step2 = mj_step2\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))  # workers take the path of their parent
    run = trained(tmp_path / "runs", "apt", "dmc", *RUN, *SMALL, *ICM, "--env.task", "cheetah_run", "--env.workers", "1")
    last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] >= 80 and (last["physics_errors"], last["episodes"]) == (3, 3)
    said = capfd.readouterr().err
    assert "cheetah_run: MuJoCo's state became invalid (PhysicsError, 1 so far)" in said and "absl" not in said


def test_what_was_learned_leaves_neither_its_domain_nor_what_an_agent_sees():
    before = DMCConfig(task="finger_turn_easy", num_envs=1)

    def check(after):
        with closing(train.DOMAINS["dmc"](after)) as env:
            train.check_fits("dmc", before, after, env, "begin anew")

    with pytest.raises(UsageError, match="point_mass_easy is no task of finger, which"):  # it has 12 numbers and 2 actions, as well
        check(DMCConfig(task="point_mass_easy", num_envs=1, frame_stack=3))
    with pytest.raises(UsageError, match=r"shows observations of shape \(24,\), and the run knows finger_turn_easy's \(12,\)"):
        check(DMCConfig(task="finger_turn_hard", num_envs=1, frame_stack=2))
    check(before.playing("finger_turn_hard"))


@pytest.mark.parametrize("task, near", [("walker_wlak", "walker_walk"), ("hoper_hop", "hopper_hop")])
def test_an_unknown_task_lists_the_nearest(task, near, tmp_path):
    with pytest.raises(UsageError, match=near):
        train.run_train(["apt", "dmc", "--env.task", task, "--runs", str(tmp_path)])
