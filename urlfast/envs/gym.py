"""Any gymnasium environment, by its id or from a constructor, behind the face of urlfast.envs.

    CartPole-v1          an id that gymnasium knows
    ale_py:ALE/Pong-v5   the same, after importing the module that registers it
    mypkg.envs:make      a callable of a module that returns a gymnasium.Env: a function without arguments, or the environment's class

A name after the colon that Python could have (no version, no slash) is the third. Modules are looked for in the current folder too.

Observations: a uint8 image [H, W], [H, W, C] or [C, H, W] is shown as uint8 [C, H, W]; everything else as one float32 vector, flattened as
gymnasium.spaces.flatten does (one-hot for a discrete part). Actions: a number for a Discrete space; for a Box a vector in -1..1, stretched
to the space's bounds. Terminated and truncated are gymnasium's: only `terminated` says that there is no next value, both end the episode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Literal

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from urlfast.envs import Episodes, FrameStack, Step, VectorEnv, stream_seeds
from urlfast.envs.rendering import NoRenderer

_BACKENDS = ("serial", "processes")


@dataclasses.dataclass(frozen=True)
class GymConfig:
    """A gymnasium environment by name."""

    id: str = "CartPole-v1"  # gymnasium's, as CartPole-v1 or ale_py:ALE/Pong-v5; or module:factory, as mypkg.envs:make
    num_envs: int = 8  # environments that step together
    frame_stack: int = 1  # observations an agent sees at once, zero before the episode's first
    backend: Literal["serial", "processes"] = "serial"  # serial: one after the other in this process | processes: one process each

    def __post_init__(self):
        _check(self.num_envs, self.frame_stack, self.backend)

    @property
    def name(self) -> str:
        return self.id

    def playing(self, id: str) -> GymConfig:
        """These options on another environment."""
        return dataclasses.replace(self, id=id)


def make_gym(config: GymConfig, *, num_envs: int | None = None, evaluation: bool = False, seed: int = 0) -> GymVector:
    """The environments of `config`, time limit and wrappers as registered, or as the factory has them.

    num_envs: instead of the config's.
    evaluation: with render_mode="rgb_array", for `render`, where the environment offers that; a factory does by a parameter of that name.
    Raises ValueError (gymnasium knows no such id: has its suggestions; no such module, no such callable in it, or not one of environments).
    """
    module, colon, name = config.id.rpartition(":")
    where = _imported(module) if colon else None
    if colon and re.fullmatch(r"[A-Za-z_][\w.]*", name):
        factory = _factory(where, name)
        constructor, draws = functools.partial(_built, config.id, factory), "render_mode" in inspect.signature(factory).parameters
    else:
        constructor, draws = functools.partial(gymnasium.make, config.id), "rgb_array" in _render_modes(name)
    if evaluation and draws:
        constructor = functools.partial(constructor, render_mode="rgb_array")
    number = config.num_envs if num_envs is None else num_envs
    return GymVector(constructor, number, frame_stack=config.frame_stack, backend=config.backend, seed=seed)


def _imported(module: str) -> ModuleType:
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # as `python -m` has it, and the `urlfast` command has not
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"id: cannot import {module!r}, from the current folder or an installed package: {error}") from error


def _factory(module: ModuleType, name: str) -> Callable[..., gymnasium.Env]:
    found = functools.reduce(lambda found, part: getattr(found, part, None), name.split("."), module)
    if not callable(found):
        has = "has no" if found is None else "has, but cannot call,"
        id = f"{module.__name__}:{name}-v0"
        raise ValueError(f"id: the module {module.__name__!r} {has} {name!r}; an id that it registers has a version, as in {id}")
    return found


def _render_modes(id: str) -> list[str]:
    try:
        creator = gymnasium.spec(id).entry_point
        if isinstance(creator, str):
            creator = load_env_creator(creator)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"id: {error}") from error
    return getattr(creator, "metadata", {}).get("render_modes", [])


def _built(id: str, factory: Callable[..., gymnasium.Env], **arguments) -> gymnasium.Env:
    env = factory(**arguments)
    if not isinstance(env, gymnasium.Env):
        raise ValueError(f"id: {id} must return a gymnasium.Env, got {type(env).__name__}")
    return env


class GymVector(VectorEnv):
    """N environments made by `constructor`, a function of no arguments that returns a gymnasium.Env.

    num_envs, frame_stack, backend: as in GymConfig. With "processes" the environments step between `send` and `recv`, with "serial" inside
    `recv`; `constructor` is then pickled (by cloudpickle), and the caller's main module needs its `if __name__ == "__main__"`.
    Raises ValueError (a number, the backend, actions neither Discrete nor a floating Box, an observation without fixed size).
    """

    action_repeat = 1

    def __init__(
        self, constructor: Callable[[], gymnasium.Env], num_envs: int = 8, *, frame_stack: int = 1, backend: str = "serial", seed: int = 0
    ):
        _check(num_envs, frame_stack, backend)
        if seed < 0:
            raise ValueError(f"seed: must be 0 or more, got {seed}")
        self.num_envs = num_envs
        self.frame_stack = frame_stack
        self._seed = seed
        self._processes = backend == "processes"
        make = functools.partial(_make, constructor, os.getpid())
        if self._processes:  # spawn: a fork would copy the threads' locks of whatever runs here
            self._env = AsyncVectorEnv([make] * num_envs, context="spawn", autoreset_mode=AutoresetMode.NEXT_STEP)
        else:
            self._env = SyncVectorEnv([make] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP)
        try:
            self._read_spaces(self._env.single_observation_space, self._env.single_action_space)
        except ValueError:
            self.close()
            raise
        self.fps = float(self._env.metadata.get("render_fps", 30))
        self.observation_shape = (frame_stack * self.frame_shape[0], *self.frame_shape[1:])
        self._episodes = Episodes(num_envs)
        self._stack = FrameStack(num_envs, frame_stack, self.frame_shape, np.uint8 if self._image else np.float32)

    def _read_spaces(self, observation, action):
        if not isinstance(observation, Box):
            raise ValueError(f"constructor: the observation space must have a fixed size, got {observation}")
        shape = observation.shape
        self._image = _is_image(observation)
        self._channels_last = self._image and len(shape) == 3 and shape[-1] in (1, 3, 4)
        if not self._image:
            self.frame_shape = (int(np.prod(shape)),)
        elif self._channels_last:
            self.frame_shape = (shape[2], shape[0], shape[1])
        else:
            self.frame_shape = (*(1,) * (3 - len(shape)), *shape)
        if isinstance(action, Discrete):
            self.num_actions, self.action_shape = int(action.n), ()
        elif isinstance(action, Box) and action.dtype.kind == "f":
            self.num_actions, self.action_shape = None, (int(np.prod(action.shape)),)
            self._bound(action.low.ravel(), action.high.ravel())
        else:
            raise ValueError(f"constructor: the action space must be Discrete or a floating Box, got {action}")

    def render(self, i: int = 0) -> np.ndarray:
        """Environment `i` in colour, as it draws itself: uint8 [H, W, 3].

        Raises NoRenderer where the environments were made without render_mode="rgb_array", or lack a package to draw with.
        """
        if self._state != "ready":
            raise RuntimeError("render: only after reset or recv")
        if not 0 <= i < self.num_envs:
            raise ValueError(f"i: must lie in 0..{self.num_envs - 1}, got {i}")
        if self._env.render_mode != "rgb_array":
            raise NoRenderer("render: these environments draw nothing; they were made without render_mode='rgb_array'")
        try:
            with self._dead_process_named():
                return self._env.call("render")[i] if self._processes else self._env.envs[i].render()
        except gymnasium.error.DependencyNotInstalled as error:
            raise NoRenderer(f"render: {error}") from error

    def _reset(self, seed):
        seeds = None if seed is None else [int(s) for s in stream_seeds(seed, self.num_envs)]
        observation, _ = self._env.reset(seed=seeds)
        return self._episodes.reset(self._stack.push(self._frame(observation), np.ones(self.num_envs, bool)))

    def _send(self, actions):
        self._actions = actions
        if self._processes:
            with self._dead_process_named():
                self._env.step_async(actions)

    def _recv(self) -> Step:
        with self._dead_process_named():
            observation, reward, terminated, truncated, _ = self._env.step_wait() if self._processes else self._env.step(self._actions)
        observation = self._stack.push(self._frame(observation), self._episodes.is_last)
        return self._episodes.step(observation, reward, terminated, terminated | truncated)

    def _close(self):
        self._env.close()

    @contextlib.contextmanager
    def _dead_process_named(self):
        try:
            yield
        except (EOFError, ConnectionError) as error:
            for process in self._env.processes:
                process.join(0.1)  # its pipe breaks a moment before it is gone
            dead = [i for i, process in enumerate(self._env.processes) if not process.is_alive()]
            self._state = "closed"
            self._env.close(terminate=True)
            raise RuntimeError(f"the process of environment {', '.join(map(str, dead))} has died") from error

    def _frame(self, observation: np.ndarray) -> np.ndarray:
        """[N, *frame_shape]"""
        if self._channels_last:
            observation = np.moveaxis(observation, -1, 1)
        return observation.reshape(self.num_envs, *self.frame_shape)

    def _checked(self, actions):
        """The actions as the environments take them."""
        space = self._env.single_action_space
        actions = super()._checked(actions)
        if self.num_actions is not None:
            return actions + space.start
        return actions.reshape(self.num_envs, *space.shape).astype(space.dtype)


def _check(num_envs, frame_stack, backend):
    for name, value in (("num_envs", num_envs), ("frame_stack", frame_stack)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    if backend not in _BACKENDS:
        raise ValueError(f"backend: must be one of {', '.join(_BACKENDS)}, got {backend!r}")


def _make(constructor, parent: int) -> gymnasium.Env:
    if os.getpid() != parent:  # a Ctrl-C in the terminal is the parent's to handle
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    env = constructor()
    if not isinstance(env, gymnasium.Env):
        raise TypeError(f"constructor: must return a gymnasium.Env, got {type(env).__name__}")
    return env if isinstance(env.observation_space, Box) else gymnasium.wrappers.FlattenObservation(env)


def _is_image(space: Box) -> bool:
    return space.dtype == np.uint8 and len(space.shape) in (2, 3)
