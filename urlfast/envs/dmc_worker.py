"""The process behind DMControl: `python -m urlfast.envs.dmc_worker`, started by urlfast.envs.dmc alone.

It holds a few simulations; urlfast.envs.workers says how it talks with its parent. Its parent chose what it draws with, if anything.
"""

from __future__ import annotations

import importlib
import logging
import os
from types import SimpleNamespace

import dm_control._render
import numpy as np
from dm_control import composer, suite
from dm_control.mujoco.engine import Camera
from dm_control.rl.control import PhysicsError

from urlfast.envs import rendering, workers
from urlfast.envs.dmc_quick import Suite, quick_step, quicken
from urlfast.envs.dmc_tasks import JACO, TASKS

SUITE = {f"{domain}_{task}".lower(): (domain, task) for domain, task in suite.ALL_TASKS}
NAMES = [*SUITE, *TASKS, *JACO]
ATTEMPTS = 10  # at a reset, whose random state may be one that MuJoCo cannot simulate
DRAWN = 240  # side of the picture that `render` gives


def can_draw() -> bool:
    return dm_control._render.BACKEND not in (None, "off")


def load(task: str, seed: int):
    """dm_control's environment of a task's model, initial states and observations; the reward of one in TASKS is left to the caller."""
    if task in JACO:
        return load_jaco(JACO[task], seed)
    base = TASKS[task].base if task in TASKS else task
    env = suite.load(*SUITE[base], task_kwargs={"random": seed})
    env.__class__ = Suite
    env.physics.step = quick_step(env.physics)
    if task == "quadruped_escape" and not can_draw():  # it asks for a picture's ground at every reset
        env.physics.__class__ = type("Undrawn", (type(env.physics),), {"contexts": None})
    if task in TASKS:
        sizes, planes = env.physics.model.geom_size, env.physics.model.geom_type == 0
        sizes[planes, 0] *= TASKS[task].floor
    return env


def load_jaco(place: tuple[float, float], seed: int):
    from dm_control.entities import props
    from dm_control.manipulation import reach
    from dm_control.manipulation.shared import arenas, constants, observations, robots, workspaces

    def box(lower, upper):
        return workspaces.BoundingBox(lower=lower, upper=upper)

    features = observations.PERFECT_FEATURES
    brick = (*place, 0.001)  # just above the table, as reach_duplo has it
    task = reach.Reach(
        arena=arenas.Standard(),
        arm=robots.make_arm(obs_settings=features),
        hand=robots.make_hand(obs_settings=features),
        prop=props.Duplo(observable_options=observations.make_options(features, observations.FREEPROP_OBSERVABLES)),
        obs_settings=features,
        workspace=SimpleNamespace(
            target_bbox=box(brick, brick), tcp_bbox=box((-0.1, -0.1, 0.2), (0.1, 0.1, 0.4)), arm_offset=robots.ARM_OFFSET
        ),
        control_timestep=constants.CONTROL_TIMESTEP,
    )
    once = dict(recompile_mjcf_every_episode=False)  # the model is the same in all
    return Manipulation(task, time_limit=10.0, random_state=seed, max_reset_attempts=ATTEMPTS, **once)


class Manipulation(composer.Environment):
    """With the face of Suite; its steps are dm_control's own, which observes each."""

    def reset(self):
        self.now = super().reset()
        return self.now

    def advance(self, action: np.ndarray) -> tuple[float, float | None]:
        self.now = self.step(action)
        return self.now.reward, self.now.discount if self.now.last() else None

    def observe(self) -> list[np.ndarray]:
        return list(self.now.observation.values())


class Simulation:
    """One task, stepped `action_repeat` control steps at a time. `size`: of the frames that it shows, or None where those are states."""

    def __init__(self, task: str, seed: int, action_repeat: int, size: int | None, camera: int):
        self.task, self.action_repeat, self.size, self.camera = task, action_repeat, size, camera
        self.errors = 0  # times that MuJoCo's state became invalid
        self.env = None
        self.build(seed)

    def build(self, seed: int) -> None:
        """From the beginning, with the random numbers of `seed`."""
        self.free()
        self.env, self.seed, self.unused = load(self.task, seed), seed, True
        self.reward = TASKS[self.task].reward if self.task in TASKS else lambda physics, reward: reward
        self.cameras = {}

    def reset(self, seed: int | None) -> None:
        if seed is not None and not (self.unused and seed == self.seed):
            self.build(seed)
        self.unused = False
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self.env.reset()
                self.valid = True
                return
            except PhysicsError:
                self.errors += 1
                if attempt == ATTEMPTS:
                    raise

    def step(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """(sum of rewards, terminated, last). After a PhysicsError the episode is over, and there is nothing to show: `valid` is False."""
        total = 0.0
        for _ in range(self.action_repeat):
            try:
                reward, discount = self.env.advance(action)
            except PhysicsError:
                self.errors += 1
                self.valid = False
                return total, False, True
            total += self.reward(self.env.physics, reward)
            if discount is not None:
                break
        return total, discount == 0, discount is not None

    def state(self, out: np.ndarray | None = None) -> np.ndarray:
        """The observation as one vector; float64, unless `out` is given to hold it."""
        return np.concatenate([np.ravel(part) for part in self.env.observe()], out=out, casting="same_kind")

    def allow_drawing(self) -> None:
        """Undo what `load` did where nothing could draw."""
        if self.task == "quadruped_escape":
            self.env.physics.__class__ = type(self.env.physics).__base__

    def picture(self, size: int) -> np.ndarray:
        """uint8 [size, size, 3]; overwritten by the next one of this size."""
        if size not in self.cameras:
            if not self.cameras:  # the context is about to be made
                screen = self.env.physics.model.vis.global_
                screen.offwidth = screen.offheight = max(self.size or 0, DRAWN)
            self.cameras[size] = Camera(self.env.physics, size, size, self.camera)
        return self.cameras[size].render()

    def free(self) -> None:
        """The memory and contexts of MuJoCo, which Python would free at a bad moment."""
        if self.env is not None:
            self.cameras = {}
            self.env.physics.free()
            self.env = None


class Worker(workers.Worker):
    simulations: dict[int, Simulation]

    def make(self, task: str, seeds: list[int], action_repeat: int, size: int | None, camera: int) -> dict:
        """What the parent has to know of the task; where there is none of that name, the names there are."""
        self.simulations = {}
        if task not in NAMES:
            return {"names": NAMES}
        self.simulations = {i: Simulation(task, seeds[i], action_repeat, size, camera) for i in self.environments}
        env = self.simulations[self.environments[0]].env
        spec = env.action_spec()
        return {
            "seconds": env.control_timestep(),
            "low": np.broadcast_to(spec.minimum, spec.shape),
            "high": np.broadcast_to(spec.maximum, spec.shape),
            "states": sum(int(np.prod(part.shape)) for part in env.observation_spec().values()),
            "physics": len(env.physics.get_state()),
            "cameras": env.physics.model.ncam,
        }

    def reset(self, seeds):
        for i, simulation in self.simulations.items():
            simulation.reset(None if seeds is None else seeds[i])
            self._show(i, simulation)

    def step(self):
        shared = self.shared
        actions, reset = shared["action"], shared["reset"].tolist()
        for i, simulation in self.simulations.items():
            if reset[i]:
                simulation.reset(None)
            else:
                shared["reward"][i], shared["terminated"][i], shared["last"][i] = simulation.step(actions[i])
            if simulation.valid:
                self._show(i, simulation)
            shared["errors"][i] = simulation.errors

    def render(self, i: int, renderer: str):
        if not can_draw():  # states: until now there was nothing to draw
            os.environ.update(rendering.variables(renderer))
            importlib.reload(dm_control._render)  # which makes its choice when it is imported
            for simulation in self.simulations.values():
                simulation.allow_drawing()
        return self.simulations[i].picture(DRAWN)

    def close(self):
        for simulation in self.simulations.values():
            simulation.free()

    def _show(self, i, simulation):
        frame, size = self.shared["frame"][i], simulation.size
        if size:
            frame[:] = simulation.picture(size).transpose(2, 0, 1)
        else:
            simulation.state(out=frame)
        self.shared["physics"][i] = simulation.env.physics.get_state()


if __name__ == "__main__":
    logging.getLogger("absl").setLevel(logging.ERROR)  # warnings: of its own old models, and of what is then a PhysicsError
    quicken()
    workers.serve(Worker)
