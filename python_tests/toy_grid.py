"""An open square of cells, each shown as a one-hot vector: to cover it in one episode, an agent must not go where it has been."""

import numpy as np

from urlfast.envs import Episodes, VectorEnv


class Grid(VectorEnv):
    """Actions: up, down, left, right; the border stops the agent. Episodes of `limit` steps begin in the middle and end without a terminal.

    `pays` at every step. `covered` lists how many cells each finished episode has met.
    """

    action_repeat, frame_stack, num_actions, fps = 1, 1, 4, 15

    def __init__(self, num_envs=8, side=9, limit=40, pays=0.0, seed=0):
        self.num_envs, self.side, self.limit, self.pays, self._seed = num_envs, side, limit, pays, seed
        self.observation_shape = self.frame_shape = (side * side,)
        self._episodes = Episodes(num_envs)
        self.covered: list[int] = []

    def _begin(self, which):
        self._at[which] = self.side // 2
        self._met[which] = False

    def _show(self):
        cell = self._at @ (self.side, 1)
        self._met[np.arange(self.num_envs), cell] = True
        return np.eye(self.side**2, dtype=np.float32)[cell]

    def _reset(self, seed):
        self._at, self._met = np.zeros((self.num_envs, 2), np.int64), np.zeros((self.num_envs, self.side**2), bool)
        self._begin(np.ones(self.num_envs, bool))
        return self._episodes.reset(self._show())

    def _send(self, actions):
        self._actions = actions

    def _recv(self):
        moves = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])[self._actions]
        self._at = np.clip(self._at + moves, 0, self.side - 1)
        first, over = self._episodes.is_last, self._episodes.length + 1 >= self.limit
        self._begin(first)
        observation = self._show()
        self.covered += self._met[over & ~first].sum(1).tolist()
        return self._episodes.step(observation, np.full(self.num_envs, self.pays), np.zeros(self.num_envs, bool), over)

    def _close(self):
        pass
