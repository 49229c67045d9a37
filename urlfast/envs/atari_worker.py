"""The process behind Atari's backend "processes": `python -m urlfast.envs.atari_worker`, started by urlfast.envs.atari alone.

It holds a few games; urlfast.envs.workers says how it talks with its parent.
"""

from __future__ import annotations

import pickle

import numpy as np

from urlfast.envs import workers
from urlfast.envs.atari_rewards import REWARDS


def area_weights(size: int, source: int) -> np.ndarray:
    """How much of each of `source` pixels lies in each of `size`: float32 [size, source], whole numbers; rows sum to `source`."""
    edge = np.arange(size + 1) * source  # measured in pixels / size, so that every edge is a whole number
    pixel = np.arange(source + 1) * size
    overlap = np.minimum(edge[1:, None], pixel[None, 1:]) - np.maximum(edge[:-1, None], pixel[None, :-1])
    return np.maximum(overlap, 0).astype(np.float32)


class AreaResize:
    """Shrinks a grey image to [size, size] by the mean over areas, as OpenCV's INTER_AREA does, but exactly (OpenCV adds in float32)."""

    def __init__(self, size: int, height: int, width: int):
        self.rows, self.columns = area_weights(size, height), area_weights(size, width).T.copy()
        self.area = np.float32(height * width)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        # Every partial sum is a whole number below 255 * 250 * 160 < 2^24, so float32 holds it whatever the order.
        total = self.rows @ image.astype(np.float32) @ self.columns
        return np.rint(total / self.area).astype(np.uint8)


class NoOps:
    """How many no-op frames ale-py's vector environment draws for each reset: std::mt19937 and libstdc++'s uniform_int_distribution."""

    def __init__(self, noop_max: int, seed: int):
        self.span = max(noop_max, 1)
        self.bits = np.random.RandomState(seed)  # seeds as std::mt19937 does; a Generator does not

    def __call__(self) -> int:
        while True:
            product = int(self.bits.randint(0, 2**32, dtype=np.uint32)) * self.span
            if product % 2**32 >= 2**32 % self.span:  # Lemire's rejection
                return product // 2**32


class Emulator:
    """One game over ALEInterface, preprocessed as ale-py's vector environment does it: the same order, the same random numbers."""

    def __init__(self, rom: str, frame_skip: int, frame_size: int, noop_max: int, sticky: float, full_action_set: bool, reward: str):
        from ale_py import ALEInterface, LoggerMode

        ALEInterface.setLoggerMode(LoggerMode.Error)
        self.rom, self.frame_skip, self.noop_max = rom, frame_skip, noop_max
        self.ale = ALEInterface()
        self.ale.setFloat("repeat_action_probability", sticky)
        self.ale.loadROM(rom)
        self.actions = self.ale.getLegalActionSet() if full_action_set else self.ale.getMinimalActionSet()
        self.screens = np.zeros((2, *self.ale.getScreenDims()), np.uint8)  # newest, and the one before it
        self.resize = AreaResize(frame_size, *self.screens.shape[1:])
        self.over = False
        self.pays = None if reward == "game" else REWARDS[reward][1]

    def reset(self, seed: int | None) -> None:
        if seed is not None:
            self.noops = NoOps(self.noop_max, seed)
            self.ale.setInt("random_seed", seed)
            self.ale.loadROM(self.rom)  # takes the seed up
        self.ale.reset_game()
        for _ in range(self.noops()):
            self.ale.act(0)
            if self.ale.game_over():
                self.ale.reset_game()
        self.over = False
        self.screens[1] = 0
        self.ale.getScreenGrayscale(self.screens[0])

    def step(self, action: int) -> list[int]:
        """Repeat the action, and return what every frame that was played pays: its score change, or what `reward` makes of it."""
        rewards = []
        for left in reversed(range(self.frame_skip)):
            rewards.append(self._frame(self.actions[action]))
            self.over = self.ale.game_over()
            if self.over:  # this screen is left out, as in the vector environment
                break
            if left < 2:
                self.ale.getScreenGrayscale(self.screens[left])
        np.maximum(self.screens[0], self.screens[1], out=self.screens[0])
        return rewards

    def _frame(self, action) -> int:
        if self.pays is None:
            return self.ale.act(action)
        before = self.ale.getRAM().tolist()
        points = self.ale.act(action)
        return self.pays(points, before, self.ale.getRAM().tolist())

    def clone(self) -> bytes:
        state = self.ale.cloneState(include_rng=True)
        return pickle.dumps((state, self.screens, self.noops, self.over))

    def restore(self, state: bytes) -> None:
        ale, screens, self.noops, self.over = pickle.loads(state)
        self.ale.restoreState(ale)
        self.screens[:] = screens


class Worker(workers.Worker):
    def make(self, emulator: dict) -> int:
        """The number of actions."""
        self.games = {i: Emulator(**emulator) for i in self.environments}
        return len(self.games[self.environments[0]].actions)

    def reset(self, seeds):
        for i, game in self.games.items():
            game.reset(None if seeds is None else int(seeds[i]))
            self._show(i, [])

    def step(self):
        for i, game in self.games.items():
            reset = self.shared["reset"][i]
            # After a time limit the vector environment plays a step more before it can be told to reset; so do we: sticky actions draw.
            rewards = [] if reset and game.over else game.step(self.shared["action"][i])
            if reset:
                game.reset(None)
            self._show(i, [] if reset else rewards)

    def clone(self, i):
        return self.games[i].clone()

    def restore(self, i, state):
        self.games[i].restore(state)

    def render(self, i):
        return self.games[i].ale.getScreenRGB()

    def _show(self, i, rewards):
        game = self.games[i]
        self.shared["frame"][i, 0] = game.resize(game.screens[0])
        self.shared["frame_reward"][i] = 0
        self.shared["frame_reward"][i, : len(rewards)] = rewards
        self.shared["over"][i] = game.over
        self.shared["lives"][i] = game.ale.lives()
        game.ale.getRAM(self.shared["ram"][i])


if __name__ == "__main__":
    workers.serve(Worker)
