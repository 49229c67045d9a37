"""Small environments with the face of urlfast.envs, whose right answers are known: vectorised NumPy, one grey frame or vector a step."""

import numpy as np

from urlfast.envs import Episodes, FrameStack, VectorEnv


class _Toy(VectorEnv):
    action_repeat = 1
    dtype = np.uint8

    def __init__(self, num_envs, num_actions, seed, frame_stack):
        self.num_envs = num_envs
        self.num_actions = num_actions
        self.frame_stack = frame_stack
        self.observation_shape = (frame_stack * self.frame_shape[0], *self.frame_shape[1:])
        self._seed = seed
        self._episodes = Episodes(num_envs)
        self._stack = FrameStack(num_envs, frame_stack, self.frame_shape, self.dtype)
        self._every = np.arange(num_envs)

    def _reset(self, seed):
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        everywhere = np.ones(self.num_envs, bool)
        self._begin(everywhere)
        return self._episodes.reset(self._stack.push(self._draw(), everywhere))

    def _send(self, actions):
        self._actions = actions

    def _recv(self):
        is_first = self._episodes.is_last
        reward, terminated, is_last = self._move(self._actions)
        self._begin(is_first)
        return self._episodes.step(self._stack.push(self._draw(), is_first), reward, terminated, is_last)

    def _close(self):
        pass


class Catch(_Toy):
    """A ball falls down a board of 10 rows and 7 columns; the paddle in the bottom row moves left, stays or moves right.

    Episodes of 9 steps, reward +1 or -1 at the end, which is terminal. A random policy earns -0.71, the best 1.
    """

    frame_shape = (1, 44, 44)
    rows, columns = 10, 7

    def __init__(self, num_envs=1, seed=0, frame_stack=4):
        super().__init__(num_envs, 3, seed, frame_stack)
        self._row, self._ball, self._paddle = np.zeros((3, num_envs), np.int64)

    def _begin(self, which):
        self._row[which] = 0
        self._ball[which] = self._rng.integers(0, self.columns, which.sum())
        self._paddle[which] = self.columns // 2

    def _move(self, actions):
        self._row += 1
        self._paddle = np.clip(self._paddle + actions - 1, 0, self.columns - 1)
        end = self._row == self.rows - 1
        return np.where(end, np.where(self._ball == self._paddle, 1.0, -1.0), 0.0), end, end

    def _draw(self):
        board = np.zeros((self.num_envs, self.rows, self.columns), np.uint8)
        board[self._every, self._row, self._ball] = 255
        board[self._every, self.rows - 1, self._paddle] = 255
        frame = np.zeros((self.num_envs, *self.frame_shape), np.uint8)
        frame[:, 0, 2:42, 1:43] = board.repeat(4, 1).repeat(6, 2)  # cells of 4 x 6 pixels
        return frame


class NineRooms(_Toy):
    """A 3 x 3 grid of square rooms, seen from above; the agent is a white square, and the room it is in is lit.

    Every episode begins in the corner of the first room. Actions: up, down, left, right; a wall stops the agent. One narrow door joins
    each pair of neighbouring rooms. No reward, no terminal state: the time limit ends an episode. `visited` (bool, one entry per cell of
    the map) remembers every cell that any environment was ever in; `floor` says which cells can be. Of 336 cells the farthest is 38 moves
    from the start; four environments of random moves find about 100 in 1,000 steps each, and 130 in 4,000. size: of the frames.
    """

    def __init__(self, num_envs=1, seed=0, frame_stack=4, room=6, limit=100, size=84):
        self.frame_shape = (1, size, size)
        super().__init__(num_envs, 4, seed, frame_stack)
        self.limit = limit
        side = 4 + 3 * room
        self._pixels = size // side  # per cell
        cell = np.arange(side)
        inside = cell % (room + 1) != 0
        self.floor = inside[:, None] & inside[None, :]
        for wall in (room + 1, 2 * (room + 1)):
            for i, first in enumerate((1, room + 2, 2 * room + 3)):
                self.floor[wall, first + (room // 2 if i % 2 else room - 1)] = True  # doors out of line with the start and with each other
                self.floor[first + (room // 2 if i % 2 else room - 1), wall] = True
        self._room_of = np.where(inside, (cell - 1) // (room + 1), -1)  # -1: a wall's or a door's
        self.visited = np.zeros_like(self.floor)
        self._at = np.ones((num_envs, 2), np.int64)

    def _begin(self, which):
        self._at[which] = 1
        self._count()

    def _move(self, actions):
        to = self._at + np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])[actions]
        free = self.floor[to[:, 0], to[:, 1]]
        self._at = np.where(free[:, None], to, self._at)
        none = np.zeros(self.num_envs, bool)
        return none, none, self._episodes.length + 1 >= self.limit

    def _count(self):
        self.visited[self._at[:, 0], self._at[:, 1]] = True

    def _draw(self):
        self._count()
        row, column = self._room_of[self._at.T][..., None]
        lit = (self._room_of == row)[:, :, None] & (self._room_of == column)[:, None, :] & self.floor
        maze = np.where(self.floor, 0, 128) + np.where(lit, 64, 0)
        maze[self._every, self._at[:, 0], self._at[:, 1]] = 255
        side = self.floor.shape[0] * self._pixels
        low = (self.frame_shape[1] - side) // 2
        frame = np.zeros((self.num_envs, *self.frame_shape), np.uint8)
        frame[:, 0, low : low + side, low : low + side] = maze.repeat(self._pixels, 1).repeat(self._pixels, 2)
        return frame


class Grid(_Toy):
    """An open square of side x side cells, seen as its row and its column, one-hot each; every episode begins in a corner.

    Actions: stay, up, down, left, right; the border stops the agent. Being in a cell after a step pays its worth. No terminal state.
    worth: (num_envs, side, side), of each environment; None: nothing pays. `visited` is as of NineRooms.
    """

    dtype = np.float32
    moves = np.array([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)])

    def __init__(self, num_envs=1, seed=0, frame_stack=1, side=13, limit=40, worth=None):
        self.frame_shape = (2 * side,)
        super().__init__(num_envs, len(self.moves), seed, frame_stack)
        self.side, self.limit = side, limit
        self.worth = np.zeros((num_envs, side, side)) if worth is None else worth
        self.visited = np.zeros((side, side), bool)
        self._one_hot = np.eye(side, dtype=np.float32)
        self._at = np.zeros((num_envs, 2), np.int64)

    def _begin(self, which):
        self._at[which] = 0

    def _move(self, actions):
        self._at = np.clip(self._at + self.moves[actions], 0, self.side - 1)
        none = np.zeros(self.num_envs, bool)
        return self.worth[self._every, *self._at.T], none, self._episodes.length + 1 >= self.limit

    def _draw(self):
        self.visited[*self._at.T] = True
        return self._one_hot[self._at].reshape(self.num_envs, -1)

    def cells(self, observation):
        """Row-major numbers, (N,), of the cells that observations (N, 2 * side) show."""
        row, column = observation.reshape(-1, 2, self.side).argmax(-1).T
        return row * self.side + column

    def observations(self):
        """Those of all cells, (side * side, 2 * side)."""
        row, column = np.divmod(np.arange(self.side**2), self.side)
        return np.concatenate([self._one_hot[row], self._one_hot[column]], 1)


class TMaze(VectorEnv):
    """A corridor with a junction at its end; what the first observation shows, and no later one, says which way is right there.

    Observations: one-hot of cue up, cue down, corridor, junction. Actions: forward, up, down. A step into a wall costs 0.1, the right turn
    pays 1 and the wrong one -1, and both end the episode; so does the 20th step, which is no terminal. Without memory half of the turns are
    right.
    """

    frame_shape, observation_shape, frame_stack, action_repeat, num_actions, limit = (4,), (4,), 1, 1, 3, 20

    def __init__(self, num_envs=1, seed=0, corridor=10):
        self.num_envs, self.corridor, self._seed = num_envs, corridor, seed
        self._episodes = Episodes(num_envs)

    def _begin(self, which):
        self._at[which] = 0
        self._cue[which] = self._rng.integers(0, 2, which.sum())

    def _reset(self, seed):
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self._at, self._cue = np.zeros((2, self.num_envs), np.int64)
        everywhere = np.ones(self.num_envs, bool)
        self._begin(everywhere)
        return self._episodes.reset(self._shown(everywhere))

    def _send(self, actions):
        self._actions = actions

    def _recv(self):
        is_first = self._episodes.is_last
        junction, forward = self._at == self.corridor, self._actions == 0
        turned = junction & ~forward
        reward = np.where(turned, np.where(self._actions - 1 == self._cue, 1.0, -1.0), np.where(junction == forward, -0.1, 0.0))
        self._at += forward & ~junction
        last = turned | (self._episodes.length + 1 >= self.limit)
        self._begin(is_first)
        return self._episodes.step(self._shown(is_first), reward, turned, last)

    def _shown(self, is_first):
        seen = np.where(is_first, self._cue, np.where(self._at == self.corridor, 3, 2))
        return np.eye(4, dtype=np.float32)[seen]

    def _close(self):
        pass
