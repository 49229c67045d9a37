"""Gymnasium environments behind our face, against a plain loop over gymnasium's own."""

import functools
import os
import signal
import subprocess
import sys
import time

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Sequence

from urlfast.envs import stream_seeds
from urlfast.envs.gym import GymConfig, GymVector, make_gym
from urlfast.envs.rendering import NoRenderer


class Counter(gymnasium.Env):
    """Shows its number of steps in the form asked for; `ends` says at which step it terminates. Remembers its last action."""

    def __init__(self, space, action_space=None, ends=1000):
        self.observation_space, self.action_space, self.ends = space, action_space or Discrete(2), ends

    def show(self):
        space = self.observation_space
        if isinstance(space, Dict):
            return {"phase": self.steps % 3, "value": np.full(2, self.steps, np.float32)}
        return np.full(space.shape, self.steps + 1, space.dtype)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.show(), {}

    def step(self, action):
        self.action = action
        self.steps += 1
        return self.show(), float(self.steps), self.steps == self.ends, False, {}


def counter(*arguments, limit=None, **settings):
    env = Counter(*arguments, **settings)
    return gymnasium.wrappers.TimeLimit(env, limit) if limit else env


def numbers(shape=(1,), dtype=np.float32):
    return Box(0, 255, shape, dtype)


def plain_rows(env, seed, actions):
    """(observation, reward, terminated, is_first, is_last, score, length) of every row, by the loop one would write down first."""
    observation, _ = env.reset(seed=int(seed))
    rows = [(observation, 0.0, False, True, False, 0.0, 0)]
    for action in actions:
        if rows[-1][4]:
            observation, _ = env.reset()
            rows.append((observation, 0.0, False, True, False, 0.0, 0))
            continue
        observation, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, reward, terminated, False, terminated or truncated, rows[-1][5] + reward, rows[-1][6] + 1))
    return rows


def same_as_plain(steps, rows, i):
    for t, (step, row) in enumerate(zip(steps, rows, strict=True)):
        names = ("observation", "reward", "terminated", "is_first", "is_last", "score", "length")
        for name, value in zip(names, row, strict=True):
            np.testing.assert_allclose(getattr(step, name)[i], value, rtol=1e-6, err_msg=f"{name} of row {t}")


@pytest.mark.parametrize("backend", ["serial", "processes"])
def test_cartpole_equals_a_plain_loop(backend):
    with make_gym(GymConfig(num_envs=2, backend=backend)) as env:
        assert (env.num_actions, env.observation_shape, env.frame_shape) == (2, (4,), (4,))
        actions = np.random.default_rng(0).integers(0, 2, (150, 2))
        steps = [env.reset(seed=9), *(env.step(row) for row in actions)]
    assert sum(step.terminated.sum() for step in steps) > 6 and steps[0].observation.dtype == np.float32
    for i, seed in enumerate(stream_seeds(9, 2)):
        same_as_plain(steps, plain_rows(gymnasium.make("CartPole-v1"), seed, actions[:, i]), i)


def test_pendulum_takes_actions_in_one_and_ends_by_its_time_limit():
    with make_gym(GymConfig(id="Pendulum-v1"), num_envs=2, seed=4) as env:
        assert (env.num_actions, env.action_shape) == (None, (1,))
        actions = np.random.default_rng(0).uniform(-1, 1, (405, 2, 1)).astype(np.float32)
        steps = [env.reset(), *(env.step(row) for row in actions)]
    for i, seed in enumerate(stream_seeds(4, 2)):
        same_as_plain(steps, plain_rows(gymnasium.make("Pendulum-v1"), seed, 2 * actions[:, i]), i)
    ends = [t for t, step in enumerate(steps) if step.is_last.all()]
    assert ends == [200, 401] and not any(step.terminated.any() for step in steps)


@pytest.mark.parametrize("ends, limit, terminated", [(3, None, True), (1000, 3, False), (3, 3, True)])
def test_terminal_state_and_time_limit(ends, limit, terminated):
    with GymVector(functools.partial(counter, numbers(), ends=ends, limit=limit), 1, frame_stack=3) as env:
        steps = [env.reset(), *(env.step(np.zeros(1, int)) for _ in range(5))]
    assert [step.is_last[0] for step in steps] == [False, False, False, True, False, False]
    assert [step.is_first[0] for step in steps] == [True, False, False, False, True, False]
    assert [step.terminated[0] for step in steps] == [False, False, False, terminated, False, False]
    assert [step.reward[0] for step in steps] == [0, 1, 2, 3, 0, 1]
    assert [step.score[0] for step in steps] == [0, 1, 3, 6, 0, 1]
    stacks = [step.observation[0].tolist() for step in steps]
    assert stacks == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [0, 0, 1], [0, 1, 2]]


@pytest.mark.parametrize(
    "shape, frame", [((8, 6), (1, 8, 6)), ((8, 6, 3), (3, 8, 6)), ((8, 6, 1), (1, 8, 6)), ((3, 8, 6), (3, 8, 6)), ((12,), None)]
)
def test_images_are_shown_channels_first(shape, frame):
    with GymVector(functools.partial(counter, numbers(shape, np.uint8)), 2, frame_stack=2) as env:
        env.reset()
        step = env.step(np.zeros(2, int))
    if frame is None:  # uint8, but no image
        assert env.frame_shape == (12,) and step.observation.dtype == np.float32
    else:
        channels, *sides = frame
        assert env.frame_shape == frame and env.observation_shape == (2 * channels, *sides)
        assert step.observation.shape == (2, 2 * channels, *sides) and step.observation.dtype == np.uint8
        assert (step.observation[:, :channels] == 1).all() and (step.observation[:, channels:] == 2).all()


def test_channels_last_keeps_the_pixels_in_place():
    image = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)

    class Picture(Counter):
        def show(self):
            return image

    with GymVector(lambda: Picture(numbers((8, 6, 3), np.uint8)), 1) as env:
        np.testing.assert_array_equal(env.reset().observation[0], image.transpose(2, 0, 1))


def test_other_observations_are_flattened():
    space = Dict({"phase": Discrete(3), "value": numbers((2,))})
    with GymVector(functools.partial(counter, space), 1) as env:
        env.reset()
        assert env.step(np.zeros(1, int)).observation.tolist() == [[0, 1, 0, 1, 1]]


def test_actions_reach_the_environment_in_its_own_terms():
    with GymVector(lambda: Counter(numbers(), Discrete(3, start=5)), 1) as env:
        env.reset()
        env.step(np.array([2]))
        assert env._env.envs[0].action == 7
    low, high = np.array([[-1, 0], [10, -np.inf]], np.float32), np.array([[1, 4], [20, np.inf]], np.float32)
    with GymVector(lambda: Counter(numbers(), Box(low, high)), 1) as env:
        assert env.action_shape == (4,)
        env.reset()
        env.step(np.array([[-1.0, 0.5, 1.0, 30.0]]))
        assert env._env.envs[0].action.tolist() == [[-1, 3], [20, 30]]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: make_gym(GymConfig(id="CartPol-v1")), "id: .*CartPol"),
        (lambda: make_gym(GymConfig(id="nomodule:X-v0")), "id: .*nomodule"),
        (lambda: GymConfig(num_envs=0), "num_envs: must be at least 1, got 0"),
        (lambda: make_gym(GymConfig(), num_envs=0), "num_envs: must be at least 1, got 0"),
        (lambda: GymConfig(frame_stack=0), "frame_stack: must be at least 1, got 0"),
        (lambda: GymConfig(backend="threads"), "backend: must be one of serial, processes, got 'threads'"),
        (lambda: make_gym(GymConfig(), seed=-1), "seed: must be 0 or more, got -1"),
        (lambda: GymVector(lambda: Counter(numbers(), MultiDiscrete([2, 2]))), r"Discrete or a floating Box, got MultiDiscrete"),
        (lambda: GymVector(lambda: Counter(Sequence(numbers()))), "must have a fixed size, got Sequence"),
    ],
)
def test_what_cannot_be_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_constructor_must_return_an_environment():
    with pytest.raises(TypeError, match=r"constructor: must return a gymnasium\.Env, got str"):
        GymVector(lambda: "CartPole-v1")


@pytest.mark.parametrize(
    "actions, error, message",
    [
        (np.zeros(2), ValueError, r"actions: must have shape \(2, 1\)"),
        (np.zeros((2, 1), int), TypeError, "actions: must be floating, got int64"),
        (np.array([[0.0], [1.1]]), ValueError, r"actions: must lie in -1\.\.1, got 1\.1"),
        (np.array([[0.0], [np.nan]]), ValueError, r"actions: must lie in -1\.\.1, got nan"),
    ],
)
def test_bad_actions_are_named(actions, error, message):
    with make_gym(GymConfig(id="Pendulum-v1"), num_envs=2) as env:
        env.reset()
        with pytest.raises(error, match=message):
            env.send(actions)


# From a module of one's own --------------------------------------------------------------------------------------------------------

MODULE = """
import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

class Corridor(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space, action_space = Box(0, 9, (1,), np.float32), Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        return np.full(1, self.at, np.float32), {}

    def step(self, action):
        self.at += action
        return np.full(1, self.at, np.float32), 1.0, False, False, {}

    def render(self):
        return np.full((4, 6, 3), self.at, np.uint8)

def make():
    return gymnasium.wrappers.TimeLimit(Corridor(), 3)

class makers:
    make = staticmethod(make)
    number = 3

def text():
    return "Corridor"

gymnasium.register("own/Corridor-v3", Corridor, max_episode_steps=2)
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module in the current folder, which is not where Python looks."""
    (tmp_path / "own_worlds.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    sys.modules.pop("own_worlds", None)
    gymnasium.registry.pop("own/Corridor-v3", None)


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize("backend", ["serial", "processes"])
@pytest.mark.parametrize("name, limit", [("make", 3), ("makers.make", 3), ("own/Corridor-v3", 2)])
def test_a_factory_or_an_id_of_a_module_in_the_current_folder(name, limit, backend):
    with make_gym(GymConfig(id=f"own_worlds:{name}", num_envs=2, backend=backend)) as env:
        steps = [env.reset(), *(env.step(np.array([1, 0])) for _ in range(3))]
    assert [step.is_last.all() for step in steps] == [t == limit for t in range(4)]
    assert steps[limit].observation.tolist() == [[limit], [0]]


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize("backend", ["serial", "processes"])
@pytest.mark.parametrize("name", ["Corridor", "own/Corridor-v3"])
def test_evaluation_draws_where_the_environment_offers_it(name, backend):
    config = GymConfig(id=f"own_worlds:{name}", num_envs=2, backend=backend)
    with make_gym(config, evaluation=True) as env:
        env.reset()
        env.step(np.array([0, 1]))
        assert env.render(0).tolist() == np.zeros((4, 6, 3)).tolist() and env.render(1).tolist() == np.ones((4, 6, 3)).tolist()
        with pytest.raises(ValueError, match=r"i: must lie in 0\.\.1, got 2"):
            env.render(2)
        env.send(np.array([0, 1]))
        with pytest.raises(RuntimeError, match="render: only after reset or recv"):
            env.render()
        env.recv()
    with make_gym(config) as env:
        env.reset()
        with pytest.raises(NoRenderer, match="draw nothing"):
            env.render()


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    "id, message",
    [
        ("own_worlds:mak", "id: the module 'own_worlds' has no 'mak'; an id that it registers has a version, as in own_worlds:mak-v0"),
        ("own_worlds:makers.number", r"id: the module 'own_worlds' has, but cannot call, 'makers\.number'"),
        ("own_world:make", "id: cannot import 'own_world', from the current folder or an installed package"),
        ("own_worlds:text", r"id: own_worlds:text must return a gymnasium\.Env, got str"),
        ("own_worlds:own/Corrido-v3", "id: .*Corrido"),
        ("own_world:own/Corridor-v3", "id: cannot import 'own_world'"),
    ],
)
def test_what_a_module_has_not_is_named(id, message):
    with pytest.raises(ValueError, match=message):
        make_gym(GymConfig(id=id))


@pytest.mark.usefixtures("own_module")
def test_the_command_finds_modules_of_the_current_folder():
    script = "import sys; sys.path.remove(''); from urlfast.envs.gym import *; print(make_gym(GymConfig(id='own_worlds:make')).num_actions)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True).stdout == "2\n"


def test_ctrl_c_does_not_reach_the_processes(interruptible):
    with make_gym(GymConfig(num_envs=1, backend="processes")) as env:
        env.reset()
        os.kill(env._env.processes[0].pid, signal.SIGINT)
        time.sleep(0.3)
        env.step(np.zeros(1, int))


@pytest.mark.filterwarnings("ignore:.*waiting for a pending call")
def test_a_dead_process_is_named_and_takes_the_others_along():
    env = make_gym(GymConfig(num_envs=2, backend="processes"))
    env.reset()
    processes = env._env.processes
    os.kill(processes[1].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="the process of environment 1 has died"):
        for _ in range(2):
            env.step(np.zeros(2, int))
    for process in processes:
        process.join(5)
        assert not process.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        env.reset()
