"""What every vector environment shows, and how its episodes are counted.

An environment object, whatever it is made of, has

    num_envs  num_actions | action_shape   observation_shape (stacked)  frame_shape  frame_stack  action_repeat
    reset(seed=None) -> Step    send(actions)    recv() -> Step    step(actions) = send, recv    close()

and resets itself one step late (gymnasium's NEXT_STEP autoreset), so that the last observation of an episode is a row of its own:

    observation  o0     o1     o2       o3     o4
    is_first     1      0      0        1      0
    is_last      0      0      1        0      0
    action          a0     a1     (a2)     a3         a2 is ignored
    reward       0      r0     r1       0      r3     shown beside the observation that the action led to
"""

from __future__ import annotations

import dataclasses

import numpy as np

__all__ = ["Episodes", "FrameStack", "Step", "VectorEnv", "stream_seeds"]


@dataclasses.dataclass
class Step:
    """What N environments show after `reset()` or `recv()`. The arrays are the caller's: no later step writes into them."""

    observation: np.ndarray  # uint8 [N, S*C, H, W], stacked for acting, oldest frame first; or float32 [N, S*D]
    reward: np.ndarray  # float32 [N], paid by the action just taken, unclipped; 0 where is_first
    terminated: np.ndarray  # bool [N]: that action ended the episode for good, or lost a life where that counts; False where is_first
    is_first: np.ndarray  # bool [N]: observation opens an episode
    is_last: np.ndarray  # bool [N]: observation closes one; the next action is ignored and the next Step has is_first there
    score: np.ndarray  # float64 [N]: unclipped sum of the running episode's rewards, so final where is_last
    length: np.ndarray  # int64 [N]: agent steps of the running episode, so final where is_last
    ram: np.ndarray | None = None  # uint8 [N, 128], where the environment gives it
    frame_reward: np.ndarray | None = None  # float32 [N, action_repeat]: what each emulated frame paid (0 where none was played)
    physics: np.ndarray | None = None  # float64 [N, P]: positions, velocities and activations of a simulation, which gives them


class Episodes:
    """Keeps the running episodes of N environments, and turns what they report into Steps."""

    def __init__(self, num_envs: int):
        self.is_last = np.zeros(num_envs, bool)
        self.score = np.zeros(num_envs, np.float64)
        self.length = np.zeros(num_envs, np.int64)

    def reset(self, observation, **more) -> Step:
        """Every environment begins an episode with `observation`. more: Step's optional columns."""
        self.is_last = np.ones_like(self.is_last)
        none = np.zeros(len(self.is_last), bool)
        return self.step(observation, none, none, none, **more)

    def step(self, observation, reward, terminated, is_last, **more) -> Step:
        """The Step after an action. Where the row before was a last one, `observation` is that of a reset and the rest is dropped."""
        is_first = self.is_last
        reward = np.where(is_first, 0.0, reward)
        self.is_last = is_last & ~is_first
        self.score = np.where(is_first, 0.0, self.score + reward)
        self.length = np.where(is_first, 0, self.length + 1)
        return Step(
            observation=observation,
            reward=reward.astype(np.float32),
            terminated=terminated & ~is_first,
            is_first=is_first.copy(),
            is_last=self.is_last.copy(),
            score=self.score.copy(),
            length=self.length.copy(),
            **more,
        )


class FrameStack:
    """The last `size` frames of N environments, oldest first, zero before an episode's first frame."""

    def __init__(self, num_envs: int, size: int, frame_shape: tuple[int, ...], dtype):
        self.stack = np.zeros((num_envs, size * frame_shape[0], *frame_shape[1:]), dtype)

    def push(self, frame: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """The stack with `frame` [N, *frame_shape] as its newest, in a new array."""
        kept = self.stack[:, frame.shape[1] :]
        self.stack = np.concatenate([kept, frame], axis=1, dtype=self.stack.dtype)
        self.stack[is_first, : kept.shape[1]] = 0
        return self.stack.copy()


class VectorEnv:
    """The order of calls that every environment keeps: reset, then send and recv in turns, then close.

    A subclass sets the attributes of the module's docstring and `_seed` (that of the first reset), and writes
    `_reset(seed) -> Step`, `_send(actions)`, `_recv() -> Step`, `_close()`.
    """

    num_envs: int
    num_actions: int | None  # None where actions are vectors, of action_shape
    action_shape: tuple[int, ...] = ()
    observation_shape: tuple[int, ...]
    frame_shape: tuple[int, ...]
    frame_stack: int
    action_repeat: int
    fps: float  # agent steps in a second of the world's own time, for videos
    _seed: int
    _episodes: Episodes
    _state = "new"  # new -> ready <-> sent; closed

    @property
    def actions(self) -> int | tuple[int, ...]:
        """How many there are to choose from, or the shape of a vector in -1..1."""
        return self.action_shape if self.num_actions is None else self.num_actions

    def reset(self, seed: int | None = None) -> Step:
        """Every environment begins anew. The same seed and actions give the same Steps.

        seed: None takes the seed given at construction for the first reset, and later ones continue the random numbers.
        Raises ValueError (a negative seed), RuntimeError (closed).
        """
        if seed is not None and seed < 0:
            raise ValueError(f"seed: must be 0 or more, got {seed}")
        if self._state == "closed":
            raise RuntimeError("reset: the environment is closed")
        if self._state == "sent":
            self._recv()
        if seed is None and self._state == "new":
            seed = self._seed
        step = self._reset(seed)
        self._state = "ready"
        return step

    def send(self, actions: np.ndarray) -> None:
        """Hand in one action per environment and return at once; they run until `recv`.

        actions: integers [N] in 0..num_actions-1, or floating [N, *action_shape] in -1..1; ignored where the episode has just closed.
        Raises ValueError (shape, range), TypeError (dtype), RuntimeError (not after `reset` or `recv`).
        """
        if self._state != "ready":
            after = {"new": "call reset first", "sent": "call recv first", "closed": "the environment is closed"}[self._state]
            raise RuntimeError(f"send: {after}")
        self._send(self._checked(np.asarray(actions)))
        self._state = "sent"

    def recv(self) -> Step:
        """Wait for the environments and return what they show. Raises RuntimeError without a `send` before it."""
        if self._state != "sent":
            raise RuntimeError("recv: call send first")
        step = self._recv()
        self._state = "ready"
        return step

    def step(self, actions: np.ndarray) -> Step:
        """`send`, then `recv`."""
        self.send(actions)
        return self.recv()

    def close(self) -> None:
        """Free the environments, their threads and their processes. A second call does nothing."""
        if self._state != "closed":
            self._state = "closed"
            self._close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _checked(self, actions: np.ndarray) -> np.ndarray:
        """The actions, int64 [N], or float64 [N, A] within what `_bound` was told."""
        vectors = self.num_actions is None
        shape = (self.num_envs, *self.action_shape) if vectors else (self.num_envs,)
        if actions.shape != shape:
            raise ValueError(f"actions: must have shape {shape}, one {'row ' * vectors}for each environment, got {actions.shape}")
        if actions.dtype.kind not in ("f" if vectors else "iu"):
            raise TypeError(f"actions: must be {'floating' if vectors else 'integers'}, got {actions.dtype}")
        return self._stretched(actions) if vectors else self._numbered(actions)

    def _numbered(self, actions: np.ndarray) -> np.ndarray:
        actions = np.where(self._episodes.is_last, 0, actions).astype(np.int64)
        if actions.min() < 0 or actions.max() >= self.num_actions:
            raise ValueError(f"actions: must lie in 0..{self.num_actions - 1}, got {actions.min()}..{actions.max()}")
        return actions

    def _bound(self, low: np.ndarray, high: np.ndarray) -> None:
        """Where actions are vectors: what -1 and 1 stand for, [A] each. A number with an infinite bound is taken as it is."""
        self._free = ~(np.isfinite(low) & np.isfinite(high))
        low, high = (np.where(self._free, free, bound.astype(np.float64)) for free, bound in ((-1.0, low), (1.0, high)))
        self._middle, self._half = (low + high) / 2, (high - low) / 2
        self._low, self._high = np.where(self._free, -np.inf, low), np.where(self._free, np.inf, high)

    def _stretched(self, actions: np.ndarray) -> np.ndarray:
        actions = actions.astype(np.float64)
        actions[self._episodes.is_last] = 0.0
        inside = np.abs(actions) <= 1 + 1e-6  # what tanh and noise may round to
        if not inside.all():
            inside |= self._free & np.isfinite(actions)
            if not inside.all():
                raise ValueError(f"actions: must lie in -1..1, got {actions[~inside][0]}")
        return np.clip(self._middle + actions * self._half, self._low, self._high)


def stream_seeds(seed: int, num_envs: int) -> np.ndarray:
    """One seed in 0..2^31-1 for each environment, int64 [N]. Neighbouring seeds share none, as seed + i would."""
    return (np.random.SeedSequence(seed).generate_state(num_envs) >> 1).astype(np.int64)
