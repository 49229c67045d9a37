"""A world whose rows tell where they are from, for actors that are killed: `--env.id toy_actors:Counted`."""

import os
import tempfile
import threading
import uuid
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

LENGTH, STEP = 50, 2.0**-14  # steps of an episode; how a life's next step shows, which float32 holds


class Counted(gymnasium.Env):
    """Shows (which of all these worlds it is, how many steps it has made in its life, a coin); the action that the coin says pays 1."""

    observation_space, action_space = Box(-1, np.inf, (3,), np.float32), Discrete(2)

    def __init__(self):
        self.id, self.life = uuid.uuid4().int % 2**20 / 2**20, -1
        self.random = np.random.default_rng()

    def _show(self):
        self.life += 1
        self.coin = int(self.random.integers(2))
        return np.array([self.id, self.life * STEP, 2 * self.coin - 1], np.float32)

    def reset(self, *, seed=None, options=None):
        self.begun = self.life + 1
        return self._show(), {}

    def step(self, action):
        reward = float(action == self.coin)
        observation = self._show()
        return observation, reward, False, self.life - self.begun >= LENGTH, {}


def hangs(process: int) -> Path:
    """The file that makes the worlds of a process hang."""
    return Path(tempfile.gettempdir(), f"{os.environ['URLFAST_TEST']}-{process}-hangs")


class Hanging(Counted):
    """The same, whose next step never ends once that file is there."""

    def step(self, action):
        if hangs(os.getpid()).exists():
            threading.Event().wait()
        return super().step(action)
