"""DMControl: every task of dm_control's suite, URLB's, and sparse ones of our own (dmc_tasks), as states or as pixels.

The simulations run in worker processes, so that N environments use N processors, and drawing does not hold up the learner. Every episode of
the suite ends by its time limit, but for a few that dm_control ends with a discount of 0, which alone is `terminated`. Where MuJoCo's state
becomes invalid (PhysicsError), the episode ends with the observation it had, not terminated; that is counted, and the run goes on.

    time limit       terminated 0   is_last 1
    discount of 0    terminated 1   is_last 1
    PhysicsError     terminated 0   is_last 1     observation and physics are those of the row before
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import subprocess
import sys
from typing import Literal

import numpy as np

from urlfast.envs import Episodes, FrameStack, Step, stream_seeds
from urlfast.envs.dmc_tasks import domain_of, task_id
from urlfast.envs.rendering import NoRenderer, choose, variables
from urlfast.envs.workers import WorkerEnv

_UNBOUNDED = 1e10  # MuJoCo's largest value, which it shows where an action has no bound


@dataclasses.dataclass(frozen=True)
class DMCConfig:
    """The protocol of URLB. Where DrQ repeats an episode's first frame to fill the stack, ours is zero before it."""

    task: str = "walker_stand"  # <domain>_<task>: dm_control's, as cup_catch; URLB's, as jaco_reach_top_left; or ours, as hopper_jump
    observation: Literal["states", "pixels"] = "states"  # positions and velocities as a vector | pictures in colour
    num_envs: int = 8  # environments that step together
    action_repeat: int = 0  # control steps that repeat an action, whose rewards are summed; 0: 1 for states, 2 for pixels
    frame_stack: int = 0  # observations an agent sees at once, zero before the episode's first; 0: 1 for states, 3 for pixels
    frame_size: int = 84  # side of a picture
    camera: int = -1  # of the model's, from 0 on; -1: 2 for quadruped and 0 for all else
    workers: int = 0  # processes; 0: one per processor, never more than environments

    def __post_init__(self):
        for name, least in dict(num_envs=1, action_repeat=0, frame_stack=0, frame_size=1, camera=-1, workers=0).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, got {getattr(self, name)}")
        if self.observation not in ("states", "pixels"):
            raise ValueError(f"observation: must be one of states, pixels, got {self.observation!r}")

    @property
    def name(self) -> str:
        """Of the task, as <domain>_<task>."""
        return task_id(self.task)

    def playing(self, task: str) -> DMCConfig:
        """This protocol on another task."""
        return dataclasses.replace(self, task=task_id(task))


def make_dmc(config: DMCConfig, *, num_envs: int | None = None, evaluation: bool = False, seed: int = 0) -> DMC:
    """The environments of `config`.

    num_envs: instead of the config's. evaluation: taken as every domain takes it; these environments are the same then.
    seed: of the first reset. Each environment draws from its own stream, made from the seed and its index.
    Raises ValueError (unknown task: lists the nearest names; a bad number; pixels where no renderer works: says what to install).
    """
    if num_envs is not None:
        config = dataclasses.replace(config, num_envs=num_envs)
    if seed < 0:
        raise ValueError(f"seed: must be 0 or more, got {seed}")
    return DMC(config, seed)


# Names ---------------------------------------------------------------------------------------------------------------------------


@functools.cache
def tasks() -> list[str]:
    """The names of all tasks. dm_control is asked for its own in another process: its import would decide what this one draws with."""
    ask = [sys.executable, "-P", "-c", "from urlfast.envs.dmc_worker import NAMES; print(*NAMES)"]
    path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    done = subprocess.run(ask, env={**os.environ, **variables(None), "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.split()


def check_task(task: str, names: list[str] | None = None) -> None:
    """Raises ValueError, with the nearest of `names` (None: all there are), where none of them is that of `task`."""
    name, names = task_id(task), names or tasks()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
        hint = f"the nearest are {', '.join(near)}" if near else f"the tasks are {', '.join(names)}"
        raise ValueError(f"task: no task is called {task!r}; {hint}")


# The environments ----------------------------------------------------------------------------------------------------------------


class DMC(WorkerEnv):
    """dm_control in `workers` processes, each with its share of the environments; they exchange arrays by shared memory.

    Actions are vectors in -1..1, stretched to the task's bounds. Each Step has `physics`, dm_control's physics.get_state().
    `physics_errors` counts the PhysicsErrors so far. The same seed and actions give the same Steps, whatever the number of workers.
    The processes import neither torch nor the caller's main module, and end as WorkerEnv says.
    """

    num_actions = None
    _kind = "DMControl"
    _worker = "urlfast.envs.dmc_worker"

    def __init__(self, config: DMCConfig, seed: int = 0):
        pixels = config.observation == "pixels"
        self.config = config
        self.num_envs = n = config.num_envs
        self.frame_stack = config.frame_stack or (3 if pixels else 1)
        self.action_repeat = config.action_repeat or (2 if pixels else 1)
        self.physics_errors = 0
        self._seed = seed
        self._episodes = Episodes(n)
        self._start(config.workers, variables(_renderer() if pixels else None))
        task = task_id(config.task)
        camera = config.camera if config.camera >= 0 else 2 if domain_of(task) == "quadruped" else 0
        spec, *_ = self._all("make", task, self._seeds(seed), self.action_repeat, config.frame_size if pixels else None, camera)
        try:
            if "names" in spec:
                check_task(config.task, spec["names"])
            if camera >= spec["cameras"]:
                raise ValueError(f"camera: must lie in 0..{spec['cameras'] - 1}, the cameras of {task}, got {camera}")
        except ValueError:
            self.close()
            raise
        self.fps = 1 / (spec["seconds"] * self.action_repeat)
        self.action_shape = spec["low"].shape
        unbounded = (spec["low"] <= -_UNBOUNDED) | (spec["high"] >= _UNBOUNDED)
        self._bound(np.where(unbounded, -np.inf, spec["low"]), np.where(unbounded, np.inf, spec["high"]))
        self.frame_shape = (3, config.frame_size, config.frame_size) if pixels else (spec["states"],)
        self.observation_shape = (self.frame_stack * self.frame_shape[0], *self.frame_shape[1:])
        self._stack = FrameStack(n, self.frame_stack, self.frame_shape, np.uint8 if pixels else np.float32)
        self._share(
            dict(
                action=((n, *self.action_shape), np.float64),
                reset=((n,), np.bool_),  # to the worker: the row before was a last one
                frame=((n, *self.frame_shape), self._stack.stack.dtype),
                physics=((n, spec["physics"]), np.float64),
                reward=((n,), np.float64),
                terminated=((n,), np.bool_),
                last=((n,), np.bool_),
                errors=((n,), np.int64),  # so far
            )
        )

    def render(self, i: int = 0) -> np.ndarray:
        """Environment `i` from its camera, in colour: uint8 [240, 240, 3], as states too. Raises NoRenderer where nothing can draw."""
        return self._ask_about(i, "render", choose())

    def _seeds(self, seed: int) -> list[int]:
        return stream_seeds(seed, self.num_envs).tolist()

    def _reset(self, seed):
        self._all("reset", None if seed is None else self._seeds(seed))
        frame = self._stack.push(self._shared["frame"], np.ones(self.num_envs, bool))
        return self._episodes.reset(frame, physics=self._shared["physics"].copy())

    def _send(self, actions):
        self._shared["action"][:] = actions
        self._shared["reset"][:] = self._episodes.is_last
        self._ask_for_steps()

    def _recv(self) -> Step:
        for worker in self._pool:
            self._answer(worker)
        shared = self._shared
        self._count(int(shared["errors"].sum()))
        observation = self._stack.push(shared["frame"], self._episodes.is_last)
        physics = shared["physics"].copy()
        return self._episodes.step(observation, shared["reward"], shared["terminated"], shared["last"], physics=physics)

    def _count(self, errors: int) -> None:
        if errors // 100 > self.physics_errors // 100 or errors > self.physics_errors == 0:
            what = f"{self.config.task}: MuJoCo's state became invalid (PhysicsError, {errors:,} so far)"
            print(f"{what}; the episode ends, and the run goes on", file=sys.stderr, flush=True)
        self.physics_errors = errors


def _renderer() -> str:
    try:
        return choose()
    except NoRenderer as error:
        raise NoRenderer(f"observation: pixels need a renderer; {error}") from None
