"""Pendulum-v1 for the learners of continuous control: what a method does with one, on the observations themselves."""

import types

import gymnasium
import numpy as np
import torch

from urlfast import Field, SequenceReplay
from urlfast.device import Arithmetic
from urlfast.envs.gym import GymVector

OBSERVATION, ACTION = 3, 1


def pendulum(num_envs, seed):
    """Episodes of 200 steps, which time limits end. Random play earns about -1200, the best -150 on average."""
    return GymVector(lambda: gymnasium.make("Pendulum-v1"), num_envs, seed=seed)


class Control:
    """As a method, but its observations are its features and it keeps no encoder. The replay's rewards are a tenth of the world's."""

    def __init__(self, learner, networks, config, n_step, *, batch_size=256, learning_start=1000, updates_per_step=1.0, seed=0):
        self.config = types.SimpleNamespace(learning_start=learning_start, updates_per_step=updates_per_step)
        self.n_step, self.batch_size, self.seed, self.steps = n_step, batch_size, seed, 0
        torch.manual_seed(seed)
        generators = (torch.Generator().manual_seed(seed + i) for i in range(2))
        self.learner = learner(config, *networks(config, OBSERVATION, ACTION, False), ACTION, Arithmetic.choose("cpu", "fp32"), *generators)

    def make_replay(self, num_envs, steps):
        fields = {"observation": Field((OBSERVATION,), "float32"), "action": Field((ACTION,), "float32")}
        return SequenceReplay(2 * steps, fields, num_streams=num_envs, n_step=self.n_step, gamma=0.99, seed=self.seed)

    def act(self, step, explore=True):
        if explore:
            self.steps += int((~step.is_last).sum())
            if self.steps <= self.config.learning_start:
                return self.learner.uniform(len(step.is_last)).numpy()
        return self.learner.act(torch.from_numpy(step.observation), None, self.learner.exploration(self.steps) if explore else 0.0)[0]

    def observe(self, rows):
        pass

    def update(self, replay):
        b = replay.sample(self.batch_size)
        rows = {
            name: torch.from_numpy(np.array(getattr(b, name)))
            for name in ("observation", "next_observation", "action", "reward", "discount")
        }
        batch = types.SimpleNamespace(action=rows["action"], discount=rows["discount"])
        self.learner.prepare(self.steps)
        after = rows["next_observation"]
        return self.learner.update(batch, rows["reward"] / 10, [rows["observation"]], [(after, after)])[0]
