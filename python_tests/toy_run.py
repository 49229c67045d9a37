"""`urlfast train toy corridor`: a method and a world that train in milliseconds, to be killed and resumed.

Run as a script it is `urlfast train` with this method and domain beside the real ones. TOY_SIGNAL=n:NAME: its n-th step begins by sending
the process that signal. TOY_SLOW=s: an update takes s seconds.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from urlfast import Field, SequenceReplay, train
from urlfast.envs import Episodes, FrameStack, VectorEnv
from urlfast.envs.atari import rom_id
from urlfast.run import Run


@dataclass(frozen=True)
class CorridorConfig:
    """A world of corridors."""

    game: str = "pong"  # a name that the command knows
    num_envs: int = 2  # corridors
    length: int = 5  # actions of an episode

    @property
    def name(self):
        return rom_id(self.game)

    def playing(self, game):
        return replace(self, game=rom_id(game))


class Corridor(VectorEnv):
    """Every frame shows how far the episode is; action 1 pays 3. Nothing is random, so a run can be compared with itself."""

    frame_shape, observation_shape, frame_stack, action_repeat, num_actions, fps = (1, 8, 8), (2, 8, 8), 2, 4, 2, 15

    def __init__(self, config, *, seed=0, num_envs=None, evaluation=False):
        self.num_envs, self.length, self._seed = num_envs or config.num_envs, config.length, seed
        self._episodes = Episodes(self.num_envs)
        self._stack = FrameStack(self.num_envs, 2, self.frame_shape, np.uint8)
        self._calls = 0

    def _frames(self, at):
        return np.broadcast_to(10 * (at + 1).astype(np.uint8)[:, None, None, None], (self.num_envs, 1, 8, 8))

    def _reset(self, seed):
        self._at = np.zeros(self.num_envs, np.int64)
        return self._episodes.reset(self._stack.push(self._frames(self._at), np.ones(self.num_envs, bool)), ram=self._ram())

    def _send(self, actions):
        self._actions = actions
        self._calls += 1
        when, _, name = os.environ.get("TOY_SIGNAL", "0:").partition(":")
        if self._calls == int(when):
            os.kill(os.getpid(), signal.Signals[name])

    def _recv(self):
        is_first = self._episodes.is_last
        self._at = np.where(is_first, 0, self._at + 1)
        over = self._at == self.length
        return self._episodes.step(self._stack.push(self._frames(self._at), is_first), 3.0 * self._actions, over, over, ram=self._ram())

    def _ram(self):
        return np.repeat(self._at[:, None], 128, axis=1).astype(np.uint8)

    def render(self, i):
        return np.full((10, 12, 3), 10 * self._at[i], np.uint8)

    def _close(self):
        pass


@dataclass(frozen=True)
class ToyConfig:
    lr: float = 0.01  # learning rate
    batch_size: int = 4  # transitions of an update
    updates_per_step: float = 0.75  # updates for each step
    learning_start: int = 20  # steps before the first update
    reward_clip: float | None = 1.0  # limit of the reward that is learned from
    replay_capacity: int = 1_000  # rows


class Toy:
    """Regresses the reward on the picture, and acts at random."""

    def __init__(self, config, observation_shape, num_actions, *, device, seed, frame_stack):
        self.config, self.num_actions, self.seed, self.frame_stack = config, num_actions, seed, frame_stack
        self.weight = torch.zeros(2, requires_grad=True)
        self.optim = torch.optim.Adam([self.weight], lr=config.lr)
        self.random = np.random.default_rng(seed)
        self.rows = 0

    def make_replay(self, num_envs, steps):
        fields = {"observation": Field((1, 8, 8), "uint8"), "action": Field((), "int64")}
        return SequenceReplay(
            self.config.replay_capacity, fields, num_streams=num_envs, n_step=1, gamma=0.9, frame_stack=self.frame_stack, seed=self.seed
        )

    def act(self, step, explore=True):
        if not explore:
            return np.ones(len(step.reward), np.int64)
        return self.random.integers(0, self.num_actions, len(step.reward))

    def observe(self, rows):
        self.rows += len(rows["action"])

    def update(self, replay):
        time.sleep(float(os.environ.get("TOY_SLOW", 0)))
        batch = replay.sample(self.config.batch_size)
        picture = torch.from_numpy(batch.observation[:, -1, 0, 0].astype(np.float32)) / 255
        loss = (self.weight[0] * picture + self.weight[1] - torch.from_numpy(batch.reward)).square().mean()
        self.optim.zero_grad()
        loss.backward()
        self.optim.step()
        return {
            "q_loss": loss.detach(),
            "intrinsic_reward_quantiles": torch.from_numpy(batch.reward).quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])),
        }

    def state_dict(self):
        return {
            "weight": self.weight,
            "optim": self.optim.state_dict(),
            "random": self.random.bit_generator.state,
            "rows": np.int64(self.rows),
        }

    def load_state_dict(self, state):
        self.weight.data.copy_(state["weight"])
        self.optim.load_state_dict(state["optim"])
        self.random.bit_generator.state = state["random"]
        self.rows = state["rows"]


train.METHODS["toy"] = Toy
train.DOMAINS["corridor"] = Corridor
train.PRESETS["toy", "corridor"] = {
    "paper": train.TrainConfig(ToyConfig(), CorridorConfig(), steps=200, log_every=10, checkpoint_every=40),
    "fast": train.TrainConfig(ToyConfig(lr=0.1), CorridorConfig(), steps=200, log_every=10, checkpoint_every=40),
}

COMMAND = [sys.executable, __file__]


def new(runs: Path, *options: str) -> Run:
    """The folder of a run that was trained to its end in this process."""
    assert train.run_train(["toy", "corridor", "--runs", str(runs), *options]) == 0
    return Run(max(runs.iterdir()))


def environment(**variables: str) -> dict[str, str]:
    """For a process of its own: it finds what this one found, and two of its threads do not wait for each other."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", **variables}


if __name__ == "__main__":
    train.main()
