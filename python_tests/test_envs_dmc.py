"""DMControl behind our face, against a plain loop over dm_control's own, and our rewards against its tolerances."""

import importlib
import itertools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from urlfast.envs import rendering, stream_seeds
from urlfast.envs.dmc import DMCConfig, make_dmc
from urlfast.envs.dmc_tasks import JACO, OURS, TASKS, URLB, domain_of, is_sparse, rise, task_id

with pytest.MonkeyPatch.context() as patch:  # this process draws nothing
    patch.setenv("MUJOCO_GL", "disabled")
    from dm_control import composer, suite
    from dm_control.manipulation import reach
    from dm_control.rl.control import PhysicsError
    from dm_control.utils.rewards import tolerance

    worker = importlib.import_module("urlfast.envs.dmc_worker")
    quick = importlib.import_module("urlfast.envs.dmc_quick")

    if worker.dm_control._render.BACKEND != "off":  # another test was first to import dm_control
        importlib.reload(worker.dm_control._render)

NAMES = ("observation", "reward", "terminated", "is_first", "is_last", "score", "length", "physics")


def plain_env(task, seed):
    domain, name = worker.SUITE[task]
    return suite.load(domain, name, task_kwargs={"random": int(seed)}, environment_kwargs={"flat_observation": True})


def plain_rows(env, actions, action_repeat=1):
    """What one environment must show for actions in -1..1, by the loop one would write down first."""

    def row(reward, score, length):
        observation = np.concatenate([np.ravel(part) for part in now.observation.values()])
        return observation, reward, now.discount == 0, now.first(), now.last(), score, length, env.physics.get_state()

    spec, now = env.action_spec(), env.reset()
    rows = [row(0.0, 0.0, 0)]
    for action in actions:
        if now.last():
            now = env.reset()
            rows.append(row(0.0, 0.0, 0))
            continue
        reward = 0.0
        for _ in range(action_repeat):
            now = env.step(spec.minimum + (action + 1) / 2 * (spec.maximum - spec.minimum))
            reward += now.reward
            if now.last():
                break
        rows.append(row(reward, rows[-1][5] + reward, rows[-1][6] + 1))
    return rows


def play(env, actions, seed=None):
    return [env.reset(seed), *(env.step(row) for row in actions)]


def random_actions(env, steps):
    return np.random.default_rng(0).uniform(-1, 1, (steps, env.num_envs, *env.action_shape)).astype(np.float32)


def same_rows(one, other):
    for t, (a, b) in enumerate(zip(one, other, strict=True)):
        for name in NAMES:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), f"{name} of row {t}")


# Against the plain loop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, action_repeat, steps", [("cartpole_swingup", 3, 360), ("quadruped_walk", 1, 60)])
def test_rows_equal_a_plain_loop(task, action_repeat, steps):
    with make_dmc(DMCConfig(task=task, num_envs=2, action_repeat=action_repeat, workers=1)) as env:
        actions = random_actions(env, steps)
        shown = play(env, actions, seed=5)
    for i, seed in enumerate(stream_seeds(5, 2)):
        rows = plain_rows(plain_env(task, seed), actions[:, i].astype(np.float64), action_repeat)
        for t, (step, row) in enumerate(zip(shown, rows, strict=True)):
            for name, value in zip(NAMES, row, strict=True):
                np.testing.assert_allclose(getattr(step, name)[i], value, rtol=1e-6, atol=1e-6, err_msg=f"{name} of row {t}")
    if task == "cartpole_swingup":  # 1000 control steps: 333 times three, and one more
        assert [t for t, step in enumerate(shown) if step.is_last.all()] == [334]
        assert not any(step.terminated.any() for step in shown)
    assert shown[0].observation.dtype == np.float32 and shown[0].physics.dtype == np.float64


def test_same_rows_whatever_the_workers_and_at_every_reset_to_a_seed():
    config = dict(task="lqr_lqr_6_2", num_envs=3)  # draws its very model from the seed
    with make_dmc(DMCConfig(**config, workers=1), seed=3) as env, make_dmc(DMCConfig(**config, workers=3), seed=8) as other:
        actions = random_actions(env, 10)
        first = play(env, actions)
        second = play(env, actions)  # the random numbers go on
        same_rows(first, play(env, actions, seed=3))
        same_rows(first, play(other, actions, seed=3))
    assert (first[0].physics != second[0].physics).any()
    assert len({row.tobytes() for row in first[0].physics}) == 3


def test_an_episode_is_followed_by_its_reset_and_a_step_belongs_to_the_caller():
    with make_dmc(DMCConfig(task="jaco_reach_top_left", num_envs=2, action_repeat=50, frame_stack=2, workers=1)) as env:
        assert (env.num_actions, env.action_shape, env.action_repeat, env.frame_stack) == (None, (9,), 50, 2)
        assert env.observation_shape == (2 * env.frame_shape[0],)
        actions = random_actions(env, 13)
        shown = play(env, actions)
        copies = [{name: getattr(step, name).copy() for name in NAMES} for step in shown]
        again = actions.copy()
        for t, step in enumerate(shown[:-1]):
            again[t, step.is_last] = np.nan  # not even looked at
        assert np.isnan(again).any()
        same_rows(shown, play(env, again, seed=0))
    size = env.frame_shape[0]
    assert [t for t, step in enumerate(shown) if step.is_last.all()] == [5, 11]  # 250 control steps
    for step, copy in zip(shown, copies, strict=True):
        for name in NAMES:
            np.testing.assert_array_equal(getattr(step, name), copy[name])
    for before, step in itertools.pairwise(shown):
        np.testing.assert_array_equal(step.is_first, before.is_last)
        if step.is_first.any():
            assert not (step.reward.any() or step.score.any() or step.length.any() or step.observation[:, :size].any())
        else:
            np.testing.assert_array_equal(step.observation[:, :size], before.observation[:, size:])


@pytest.mark.parametrize("task", JACO)
def test_jaco_is_dm_controls_reach_with_the_brick_in_its_place(task):
    place = [*JACO[task], 0.001]
    simulation = worker.Simulation(task, 7, 1, None, 0)
    reaching = reach.reach_duplo_features()
    reaching._prop_placer._position = type(reaching._prop_placer._position)(place, place)  # a uniform distribution over one point
    env = composer.Environment(reaching, time_limit=10.0, random_state=7, recompile_mjcf_every_episode=False)
    simulation.reset(7)
    now = env.reset()
    spec, random = env.action_spec(), np.random.default_rng(0)
    brick = next(name for name in now.observation if name.endswith("/position"))
    np.testing.assert_allclose(now.observation[brick][0, :2], place[:2], atol=5e-3)  # it settles
    steps = 252 if task == "jaco_reach_top_left" else 3
    for t in range(steps):
        action = random.uniform(spec.minimum, spec.maximum)
        if now.last():
            assert t == 250
            simulation.reset(None)
            now = env.reset()
        else:
            now = env.step(action)
            assert simulation.step(action) == (now.reward, False, now.last())
        np.testing.assert_allclose(simulation.state(), np.concatenate([np.ravel(part) for part in now.observation.values()]), rtol=1e-9)
    simulation.free()
    env.close()


def test_a_discount_of_0_is_terminated():
    simulation = worker.Simulation("lqr_lqr_2_1", 0, 4, None, 0)
    simulation.reset(0)
    assert simulation.step(np.zeros(1))[1:] == (False, False)
    with simulation.env.physics.reset_context():
        simulation.env.physics.set_state(np.zeros(4))  # the goal
    reward, terminated, last = simulation.step(np.zeros(1))
    assert terminated and last and simulation.env._reset_next_step
    assert reward == pytest.approx(simulation.env.task.get_reward(simulation.env.physics))  # one control step, not four
    simulation.free()


# Quicker than dm_control, to the last bit ------------------------------------------------------------------------------------------


@given(
    x=st.floats(-3, 3) | st.sampled_from([-1.0, 0.0, 1.0, 2.0]),
    bounds=st.sampled_from([(0.0, 0.0), (-1.0, 1.0), (1.0, np.inf), (-np.inf, -1.0), (2.0, np.inf)]),
    margin=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    sigmoid=st.sampled_from(["gaussian", "hyperbolic", "long_tail", "reciprocal", "cosine", "linear", "quadratic", "tanh_squared"]),
    single=st.sampled_from([float, np.float64, np.array, lambda x: np.full(3, x)]),
)
def test_tolerance_is_dm_controls(x, bounds, margin, sigmoid, single):
    x = single(x)
    got, want = (each(x, bounds, margin, sigmoid, 0.3) for each in (quick.tolerance, tolerance))
    assert type(got) is type(want)
    np.testing.assert_array_equal(got, want, strict=isinstance(want, np.ndarray))
    for wrong in (dict(bounds=(1.0, 0.0)), dict(margin=-1.0), dict(margin=1.0, value_at_margin=7.0)):
        with pytest.raises(ValueError):
            quick.tolerance(5.0, **wrong)


def test_named_fields_are_dm_controls():
    physics = plain_env("quadruped_walk", 0).physics
    for name, keys in {
        "xpos": ["torso", ("torso", "z"), (["torso", "toe_front_left"], ["x", "z"]), 1, ("torso", slice(0, 2)), slice(1, 3)],
        "xmat": [(slice(1, None), ["xx", "xz"]), ["torso"], [0, 2], ("torso", ["xx"]), np.array([1, 2]), np.array(["torso"])],
        "sensordata": ["imu_gyro", ["imu_gyro", "velocimeter"], ("imu_gyro",)],
        "qpos": ["root", ["root", "yaw_front_left"]],
    }.items():
        plain = getattr(physics.named.data, name)
        ours = quick.NamedField(physics.data, name, plain.axes)
        for key in [*keys, *keys]:
            np.testing.assert_array_equal(ours[key], plain[key], f"{name} {key}", strict=True)
        ours[keys[0]] = 5.0
        assert np.all(plain[keys[0]] == 5)
        for wrong in ("no such name", ["no such name"], "", None):
            for field in (plain, ours):
                with pytest.raises((KeyError, IndexError)):
                    field[wrong]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", sorted({max(task for task in worker.SUITE if domain_of(task) == domain_of(one)) for one in worker.SUITE}))
def test_a_quick_environment_is_the_plain_one_to_the_last_bit(task, monkeypatch):
    plain = plain_env(task, 1)
    monkeypatch.setattr(quick.index, "FieldIndexer", quick.NamedField)
    monkeypatch.setattr(quick.rewards, "tolerance", quick.tolerance)
    env = worker.load(task, 1)
    assert type(env) is quick.Suite and type(env.physics.named.data.qpos) is quick.NamedField
    random = np.random.default_rng(0)
    for _ in range(2):
        now, _ = plain.reset(), env.reset()
        for _ in range(25):
            np.testing.assert_array_equal(np.concatenate([np.ravel(part) for part in env.observe()]), now.observation["observations"])
            np.testing.assert_array_equal(env.physics.get_state(), plain.physics.get_state())
            action = random.uniform(-1, 1, env.action_spec().shape)
            with monkeypatch.context() as patch:
                patch.setattr(quick.rewards, "tolerance", tolerance)
                now = plain.step(action)
            reward, discount = env.advance(action)
            assert reward == now.reward and (discount is not None) == now.last() and (discount is None or discount == now.discount)
            if now.last():
                break
    env.physics.free()
    plain.physics.free()


# Every task ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("domain", sorted({domain_of(task) for task in [*worker.SUITE, *TASKS, *JACO]}))
def test_every_task_makes_steps(domain):
    tasks = [task for task in [*worker.SUITE, *TASKS, *JACO] if domain_of(task) == domain]
    for task in tasks:
        simulation = worker.Simulation(task, 0, 2, None, 0)
        simulation.reset(0)
        for _ in range(2):
            reward, _, last = simulation.step(np.zeros(simulation.env.action_spec().shape))
            assert simulation.env.physics.model.ncam > (2 if domain == "quadruped" else 0)  # the camera that is taken
            assert not last and np.isfinite(simulation.state()).all() and (0 <= reward <= 2 or domain == "lqr"), task
        simulation.free()


def test_running_backwards_there_is_floor():
    for task, length in [("cheetah_run", 1), ("cheetah_run_backward", 2), ("hopper_flip", 2), ("walker_flip", 1)]:
        there, plain = (
            env.physics.model.geom_size[0] for env in (worker.load(task, 0), plain_env(TASKS[task].base if task in TASKS else task, 0))
        )
        np.testing.assert_array_equal(there, plain * [length, 1, 1])


def test_names():
    assert len(suite.ALL_TASKS) == len(worker.SUITE) and not set(worker.SUITE) & {*TASKS, *JACO}
    for name in ("Walker-Walk", "walker walk", " walker_walk"):
        assert task_id(name) == "walker_walk"
    assert task_id("cup_catch") == "ball_in_cup_catch" and task_id("humanoid_CMU_run") == "humanoid_cmu_run"
    for domain, name in suite.ALL_TASKS:
        assert task_id(f"{domain}_{name}") in worker.SUITE and domain_of(f"{domain}_{name}") == domain.lower()
    assert all(domain_of(task) == domain_of(TASKS[task].base) for task in TASKS) and {domain_of(task) for task in JACO} == {"jaco"}
    assert {task for task in [*OURS, "cartpole_swingup_sparse"] if not is_sparse(task)} == {"cheetah_flip_sparse"}
    assert not any(is_sparse(task) for task in [*URLB, "walker_walk"])


# Rewards -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full, margin, at_margin", [(5, 5, 0), (10, 10, 0), (2, 1, 0.5), (1, 2, 0), (1, 1, 0.5)])
def test_rise_is_dm_controls_linear_tolerance(full, margin, at_margin):
    for value in np.linspace(-15, 15, 301):
        expected = tolerance(value, bounds=(full, np.inf), margin=margin, value_at_margin=at_margin, sigmoid="linear")
        assert rise(value, full, margin, at_margin) == pytest.approx(expected, abs=1e-12)


def spinning(physics, direction):
    momentum = direction * physics.named.data.subtree_angmom["torso", "y"]
    return tolerance(momentum, bounds=(5, np.inf), margin=5, value_at_margin=0, sigmoid="linear")


def fast(speed, least, margin, at_margin):
    return tolerance(speed, bounds=(least, np.inf), margin=margin, value_at_margin=at_margin, sigmoid="linear")


def standing(physics):
    return tolerance(physics.height(), (0.6, 2))


def upright(physics):
    return tolerance(physics.torso_upright(), bounds=(1, np.inf), sigmoid="linear", margin=2, value_at_margin=0)


DENSE = {
    "walker_flip": lambda p, stand: stand * (5 * spinning(p, 1) + 1) / 6,
    "cheetah_run_backward": lambda p, _: fast(-p.speed(), 10, 10, 0),
    "cheetah_flip": lambda p, _: spinning(p, 1),
    "cheetah_flip_backward": lambda p, _: spinning(p, -1),
    "hopper_hop_backward": lambda p, _: standing(p) * fast(-p.speed(), 2, 1, 0.5),
    "hopper_flip": lambda p, _: standing(p) * spinning(p, 1),
    "hopper_flip_backward": lambda p, _: standing(p) * spinning(p, -1),
    "quadruped_stand": lambda p, _: upright(p),
    "quadruped_jump": lambda p, _: upright(p) * fast(p.named.data.subtree_com["torso", "z"], 1, 1, 0.5),
    "quadruped_roll": lambda p, _: upright(p) * fast(np.linalg.norm(p.torso_velocity()), 0.5, 0.5, 0.5),
    "quadruped_roll_fast": lambda p, _: upright(p) * fast(np.linalg.norm(p.torso_velocity()), 5, 5, 0.5),
}


def moved(physics, random):
    """Hand-made states that reach what random actions do not: fast, spinning, in the air."""
    for _ in range(60):
        with physics.reset_context():
            physics.data.qpos[:] += random.normal(0, 0.2, len(physics.data.qpos))
            physics.data.qvel[:] = random.normal(0, 5, len(physics.data.qvel))
            physics.data.time = random.uniform(0, 1)
        yield physics


@pytest.mark.parametrize("task", URLB)
def test_urlbs_rewards(task):
    assert set(DENSE) == set(URLB)
    env = plain_env(TASKS[task].base, 0)
    env.reset()
    paid = []
    for physics in moved(env.physics, np.random.default_rng(0)):
        base = env.task.get_reward(physics)
        paid.append(TASKS[task].reward(physics, base))
        assert paid[-1] == pytest.approx(DENSE[task](physics, base), abs=1e-9)
    assert max(paid) > 0.2 and min(paid) < max(paid)


def test_angular_momentum_is_that_of_the_step_just_made():
    simulation = worker.Simulation("walker_flip", 0, 1, None, 0)
    simulation.reset(0)
    physics = simulation.env.physics
    for _ in range(5):
        with physics.reset_context():
            physics.named.data.qvel["rooty"] = 30
            physics.named.data.qpos["rootz"] = 1
        reward, *_ = simulation.step(np.zeros(6))
        assert reward == pytest.approx(DENSE["walker_flip"](physics, simulation.env.task.get_reward(physics)))
        shown = physics.named.data.subtree_angmom["torso", "y"]
        worker.dm_control.mujoco.wrapper.mjbindings.mjlib.mj_subtreeVel(physics.model.ptr, physics.data.ptr)
        assert shown == physics.named.data.subtree_angmom["torso", "y"] and shown > 5 and reward > 0.5
    simulation.free()


def test_hopper_jump_is_paid_for_standing_in_the_air_after_the_fall():
    physics = plain_env("hopper_hop", 0).physics

    def paid(rise_by, time, bent=0.0):
        with physics.reset_context():
            physics.named.data.qpos["rootz"] += rise_by
            physics.named.data.qpos["hip"] = bent
            physics.data.time = time
        return TASKS["hopper_jump"].reward(physics, 0.7)

    with physics.reset_context():
        pass
    assert physics.height() > 0.6 and physics.named.data.xipos["foot", "z"] < 0.15  # as it stands
    assert paid(0.0, 1.0) == 0 and paid(0.3, 1.0) == 1 and paid(0.3, 0.4) == 1
    assert paid(0.3, 0.39) == 0
    assert paid(0.3, 1.0, bent=-1.3) == 0 and 0 < physics.height() < 0.6 and physics.named.data.xipos["foot", "z"] > 0.15


@pytest.mark.parametrize(
    "task, least", [("hopper_hop_sparse", 0.25), ("walker_walk_sparse", 0.7), ("walker_run_sparse", 0.25), ("cheetah_run_sparse", 0.25)]
)
def test_sparse_rewards_are_the_dense_ones_above_a_threshold(task, least):
    assert TASKS[task].base == task.removesuffix("_sparse")
    reward = TASKS[task].reward
    assert [reward(None, paid) for paid in (0.0, least - 1e-9, least, 0.9)] == [0, 0, least, 0.9]


@pytest.mark.parametrize("domain", ["walker", "hopper", "cheetah"])
def test_sparse_flips_pay_1_from_half_of_the_dense_reward_on(domain):
    sparse, dense = TASKS[f"{domain}_flip_sparse"], TASKS[f"{domain}_flip"]
    assert sparse.base == dense.base
    env = plain_env(dense.base, 0)
    env.reset()
    paid = set()
    for physics in moved(env.physics, np.random.default_rng(1)):
        base = env.task.get_reward(physics)
        expected = float(DENSE[f"{domain}_flip"](physics, base) >= 0.5)
        assert sparse.reward(physics, base) == expected
        paid.add(expected)
    assert paid == {0.0, 1.0}


# What goes wrong -----------------------------------------------------------------------------------------------------------------


def test_an_invalid_state_of_mujoco_ends_the_episode_and_not_the_run(monkeypatch, capfd):
    with make_dmc(DMCConfig(task="cheetah_run", num_envs=2, action_repeat=2, workers=1)) as env:
        actions = random_actions(env, 8)
        good = play(env, actions, seed=1)
        monkeypatch.setattr(env, "_checked", lambda actions: actions)
        bad = actions.copy()
        bad[[2, 4, 7], 0] = np.nan  # which MuJoCo calls BADCTRL; the one after an episode's end is not looked at
        shown = play(env, bad, seed=1)
        assert env.physics_errors == 3
    assert [step.is_last[0] for step in shown] == [False, False, False, True, False, True, False, False, True]
    assert [step.is_first[0] for step in shown] == [True, False, False, False, True, False, True, False, False]
    assert not any(step.terminated.any() for step in shown)
    for name in NAMES:
        for t, (step, before) in enumerate(zip(shown, good, strict=True)):
            assert np.isfinite(getattr(step, name)).all()
            np.testing.assert_array_equal(getattr(step, name)[1], getattr(before, name)[1], f"{name} of row {t}")  # the other one
    assert shown[3].reward[0] == 0 and (shown[3].score[0], shown[3].length[0]) == (shown[2].score[0], 3)
    for name in ("observation", "physics"):
        np.testing.assert_array_equal(getattr(shown[3], name), [getattr(shown[2], name)[0], getattr(shown[3], name)[1]])
        assert (getattr(shown[4], name)[0] != getattr(shown[3], name)[0]).any()
    said = capfd.readouterr().err
    assert said.count("PhysicsError") == 1 and "cheetah_run: MuJoCo's state became invalid" in said


def test_a_reset_tries_again_and_in_the_end_gives_up(monkeypatch):
    simulation = worker.Simulation("pendulum_swingup", 0, 1, None, 0)
    reset, bad = simulation.env.reset, itertools.count()

    def fails(times):
        def attempt():
            if next(bad) < times:
                raise PhysicsError("bad")
            return reset()

        monkeypatch.setattr(simulation.env, "reset", attempt)

    fails(3)
    simulation.reset(None)
    assert simulation.errors == 3 and simulation.valid
    fails(100)
    with pytest.raises(PhysicsError):
        simulation.reset(None)
    simulation.free()


def test_a_dead_worker_is_an_error_and_leaves_nothing_behind():
    env = make_dmc(DMCConfig(task="pendulum_swingup", num_envs=4, workers=2))
    env.reset()
    workers = [worker.process for worker in env._pool]
    with open(f"/proc/{workers[0].pid}/maps") as maps:
        assert "torch" not in maps.read()
    os.kill(workers[1].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"DMControl process of environments 2\.\.3 was killed by SIGKILL"):
        for _ in range(2):
            env.step(np.zeros((4, 1)))
    assert all(worker.returncode is not None for worker in workers)
    with pytest.raises(RuntimeError, match="closed"):
        env.reset()


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_with_the_process_that_made_them():
    script = (
        f"import sys; sys.path[:] = {[path or os.getcwd() for path in sys.path]!r}\n"
        "from urlfast.envs.dmc import *\n"
        "env = make_dmc(DMCConfig(task='pendulum_swingup', num_envs=1)); env.reset()\n"
        "assert not {'torch', 'dm_control', 'mujoco'} & set(sys.modules)\n"
        "print(env._pool[0].process.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    for how in (signal.SIGKILL, None):
        with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
            pid = int(parent.stdout.readline())
            assert alive(pid)
            if how:
                parent.send_signal(how)
            parent.stdin.close()  # or it runs to its end, without close()
            parent.wait(timeout=20)
            for _ in range(100):
                if not alive(pid):
                    break
                time.sleep(0.1)
            assert not alive(pid), how


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_envs=0), "num_envs: must be at least 1, got 0"),
        (dict(action_repeat=-1), "action_repeat: must be at least 0, got -1"),
        (dict(frame_stack=-1), "frame_stack: must be at least 0, got -1"),
        (dict(frame_size=0), "frame_size: must be at least 1, got 0"),
        (dict(camera=-2), "camera: must be at least -1, got -2"),
        (dict(workers=-1), "workers: must be at least 0, got -1"),
        (dict(observation="images"), "observation: must be one of states, pixels, got 'images'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        DMCConfig(**settings)


def test_what_is_not_there_is_named():
    for settings, message in [
        (dict(task="Walker-Wlk"), "^task: no task is called 'Walker-Wlk'; the nearest are walker_walk"),
        (dict(task="hopper_jumps"), "nearest are hopper_jump"),
        (dict(task="???"), "the tasks are acrobot_swingup, .*walker_flip, .*jaco_reach"),
        (dict(task="walker_walk", camera=7), r"camera: must lie in 0\.\.1, the cameras of walker_walk, got 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_dmc(DMCConfig(**settings, num_envs=1))
    with pytest.raises(ValueError, match="seed: must be 0 or more, got -1"):
        make_dmc(DMCConfig(), seed=-1)


def test_bad_actions_are_named():
    with make_dmc(DMCConfig(task="cup_catch", num_envs=2, workers=1)) as env:
        env.reset()
        for actions, error, message in [
            (np.zeros(2), ValueError, r"actions: must have shape \(2, 2\), one row for each environment, got \(2,\)"),
            (np.zeros((2, 2), int), TypeError, "actions: must be floating, got int64"),
            (np.array([[0.0, 0.0], [1.1, 0.0]]), ValueError, r"actions: must lie in -1\.\.1, got 1\.1"),
            (np.array([[0.0, np.nan], [0.0, 0.0]]), ValueError, r"actions: must lie in -1\.\.1, got nan"),
        ]:
            with pytest.raises(error, match=message):
                env.send(actions)
        with pytest.raises(RuntimeError, match="render: only after reset or recv"):
            env.send(np.zeros((2, 2)))
            env.render()


# Pixels --------------------------------------------------------------------------------------------------------------------------


def no_renderer():
    try:
        rendering.choose()
    except rendering.NoRenderer as error:
        return str(error)


needs_renderer = pytest.mark.skipif("no_renderer() is not None", reason="no renderer works here: `urlfast info` says why")

PLAIN_PICTURES = """
import sys
import numpy as np
from dm_control import suite
env = suite.load("quadruped", "walk", task_kwargs={"random": int(sys.argv[3])})
low, high = env.action_spec().minimum, env.action_spec().maximum
actions = low + (np.load(sys.argv[1]) + 1) / 2 * (high - low)
env.reset()
pictures = [env.physics.render(84, 84, camera_id=2)]
for action in actions:
    env.step(action), env.step(action)
    pictures.append(env.physics.render(84, 84, camera_id=2))
np.savez(sys.argv[2], small=pictures, large=env.physics.render(240, 240, camera_id=2))
env.physics.free()
"""


@needs_renderer
def test_pixels_are_dm_controls(tmp_path):
    with make_dmc(DMCConfig(task="quadruped_walk", observation="pixels", num_envs=2, workers=2)) as env:
        assert (env.action_repeat, env.frame_stack) == (2, 3)
        assert (env.frame_shape, env.observation_shape) == ((3, 84, 84), (9, 84, 84))
        actions = random_actions(env, 4)
        shown = play(env, actions, seed=2)
        drawn = env.render(1)
    np.save(tmp_path / "actions.npy", actions[:, 1].astype(np.float64))
    files = [str(tmp_path / "actions.npy"), str(tmp_path / "pictures.npz"), str(stream_seeds(2, 2)[1])]
    environment = {**os.environ, **rendering.variables(rendering.choose())}
    subprocess.run([sys.executable, "-c", PLAIN_PICTURES, *files], env=environment, check=True)
    pictures = np.load(tmp_path / "pictures.npz")
    for t, (step, picture) in enumerate(zip(shown, pictures["small"], strict=True)):
        assert step.observation.dtype == np.uint8
        np.testing.assert_array_equal(step.observation[1, -3:], picture.transpose(2, 0, 1), f"row {t}")
        for back in (1, 2):  # oldest first, black before the first
            older = shown[t - back].observation[1, -3:] if t >= back else 0
            np.testing.assert_array_equal(step.observation[1, 6 - 3 * back : 9 - 3 * back], np.broadcast_to(older, (3, 84, 84)))
    np.testing.assert_array_equal(drawn, pictures["large"])
    assert shown[-1].physics.shape[0] == 2 and drawn.std() > 10


@needs_renderer
def test_every_kind_of_model_is_drawn():
    with make_dmc(DMCConfig(task="jaco_reach_top_right", observation="pixels", frame_size=500, num_envs=1)) as env:
        shown = [*play(env, random_actions(env, 1)), *play(env, random_actions(env, 1), seed=3)]  # built a second time
        assert all(step.observation[0, -3:].std() > 10 and step.observation.shape == (1, 9, 500, 500) for step in shown)
        assert (shown[2].observation != shown[0].observation).any() and env.render().std() > 10


@needs_renderer
def test_states_are_drawn_when_asked_for():
    with make_dmc(DMCConfig(task="quadruped_escape", num_envs=1)) as env:
        for _ in range(2):  # before and after a reset, whose ground is another
            env.reset()
            env.step(np.zeros((1, 12)))
            picture = env.render()
            assert picture.shape == (240, 240, 3) and picture.dtype == np.uint8 and picture.std() > 10


@pytest.fixture
def fresh_probes():
    rendering.probe.cache_clear()
    yield
    rendering.probe.cache_clear()


@pytest.mark.usefixtures("fresh_probes")
def test_a_model_is_built_in_silence(capfd):
    """dm_control's cheetah has an attribute that MuJoCo calls deprecated, of which absl would warn."""
    with make_dmc(DMCConfig(task="cheetah_run", num_envs=1)) as env:
        env.reset(0)
    assert capfd.readouterr() == ("", "")


def test_a_missing_renderer_is_one_clear_error_and_states_need_none(monkeypatch):
    pixels = DMCConfig(observation="pixels", num_envs=1)
    monkeypatch.setenv("MUJOCO_GL", "off")
    with pytest.raises(ValueError, match=r"^observation: pixels need a renderer; no renderer: MUJOCO_GL=off forbids drawing"):
        make_dmc(pixels)
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(rendering.NoRenderer, match=r"glfw fails \(needs a display\).* MUJOCO_GL=glfw is set: without it, egl and osmesa"):
        rendering.choose()
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(rendering, "_TRIED", ("egl",))
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", "/nowhere.json")
    with pytest.raises(ValueError, match=r"pixels need a renderer; no renderer works here: egl fails \(apt install libegl1 .*\)"):
        make_dmc(pixels)
    with make_dmc(DMCConfig(task="pendulum_swingup", num_envs=1)) as env:
        env.reset()
        with pytest.raises(rendering.NoRenderer, match="apt install libegl1"):
            env.render()
        assert env.step(np.zeros((1, 1))).length == 1


@pytest.mark.usefixtures("fresh_probes")
def test_egl_is_taken_first_then_osmesa(monkeypatch):
    works = {"egl": "works", "osmesa": "works"}
    monkeypatch.setattr(rendering, "probe", works.get)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert rendering.choose() == "egl"
    works["egl"] = "fails"
    assert rendering.choose() == "osmesa"
    works["egl"] = "works"
    monkeypatch.setenv("MUJOCO_GL", "OSMesa")
    assert rendering.choose() == "osmesa"
