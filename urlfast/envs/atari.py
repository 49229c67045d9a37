"""Atari, on the emulator of ale-py.

Two backends with one face. "vector" is ale-py's AtariVectorEnv: native threads, the fastest, images and rewards only. "processes" runs
ALEInterface in worker processes and also gives RAM, per-frame score changes, the screen and cloned states. Both show the same rows for one
seed and one list of actions, up to a grey level or two of the resize.

Nothing is clipped and no button is pressed behind the agent's back. An episode ends where the game does or at the time limit: a lost life
only raises `terminated` (and only with life_loss_terminal), and the game goes on.

    life lost        terminated 1 or 0   is_last 0
    game over        terminated 1        is_last 1
    time limit       terminated 0        is_last 1     (1 if a life was lost in that very step and that counts)
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from typing import Literal

import numpy as np

from urlfast.envs import Episodes, FrameStack, Step, VectorEnv, stream_seeds
from urlfast.envs.atari_rewards import REWARDS
from urlfast.envs.workers import WorkerEnv


@dataclasses.dataclass(frozen=True)
class AtariConfig:
    """The protocol of Atari-100k (APT, DrQ, SimPLe). DreamerV2's is sticky 0.25, no life_loss_terminal, frame_size 64."""

    game: str = "ms_pacman"  # any ROM of ale-py in any usual spelling: MsPacman, ms-pacman, ALE/MsPacman-v5
    num_envs: int = 8  # environments that step together
    sticky: float = 0.0  # probability that a frame repeats the action before it (ALE's repeat_action_probability)
    life_loss_terminal: bool = True  # a lost life counts as terminal for learning (the game goes on); never in evaluation
    full_action_set: bool = False  # all 18 actions instead of those the game knows
    noop_max: int = 30  # an episode opens with 0..noop_max-1 frames without action
    frame_skip: int = 4  # frames that repeat an action; the newest frame is the maximum of the last two
    max_frames: int = 108_000  # time limit of an episode, in frames after the no-ops: 30 minutes
    frame_size: int = 84  # side of the grey image
    frame_stack: int = 4  # frames an agent sees at once, black before the episode's first
    backend: Literal["vector", "processes"] = "vector"  # native threads | processes: slower; RAM, screens and cloned states
    reward: Literal["game", "ghosts-easy", "ghosts-hard", "miners-easy", "miners-hard"] = "game"  # what pays, and makes the score
    # ghosts (ms_pacman): eaten ones alone, hard: and a dot costs 10; miners (hero): rescued ones alone, hard: and a blown up wall costs 300
    workers: int = 0  # threads or processes; 0: one per processor, never more than environments

    def __post_init__(self):
        for name, least in dict(num_envs=1, noop_max=0, frame_skip=1, max_frames=1, frame_size=1, frame_stack=1, workers=0).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.sticky <= 1:
            raise ValueError(f"sticky: must lie in 0..1, got {self.sticky}")
        if self.max_frames % self.frame_skip:
            raise ValueError(f"max_frames: must be a multiple of frame_skip ({self.frame_skip}), got {self.max_frames}")
        if self.frame_size > 160:
            raise ValueError(f"frame_size: must be at most 160, the screen's width, got {self.frame_size}")
        if self.backend not in _BACKENDS:
            raise ValueError(f"backend: must be one of {', '.join(_BACKENDS)}, got {self.backend!r}")
        if self.reward not in ("game", *REWARDS):
            raise ValueError(f"reward: must be one of game, {', '.join(REWARDS)}, got {self.reward!r}")
        if self.reward != "game" and self.backend != "processes":
            raise ValueError(f"reward: {self.reward} is read off the memory, which takes --env.backend processes, got {self.backend}")

    @property
    def name(self) -> str:
        """Of the game, as ale-py spells it."""
        return rom_id(self.game)

    def playing(self, game: str) -> AtariConfig:
        """This protocol on another game, in any usual spelling; ValueError where there is no such game."""
        return dataclasses.replace(self, game=rom_id(game))


def make_atari(
    config: AtariConfig, *, num_envs: int | None = None, evaluation: bool = False, seed: int = 0
) -> AtariVector | AtariProcesses:
    """The environments of `config`.

    num_envs: instead of the config's.
    evaluation: whatever the config says, a lost life never counts as terminal, and the backend is "processes", which gives the RAM.
    seed: of the first reset. Each environment draws from its own stream, made from the seed and its index.
    Raises ValueError (unknown game: lists the nearest names; a bad number), FileNotFoundError (ROM missing).
    """
    if num_envs is not None:
        config = dataclasses.replace(config, num_envs=num_envs)
    if evaluation:
        config = dataclasses.replace(config, life_loss_terminal=False, backend="processes")
    if seed < 0:
        raise ValueError(f"seed: must be 0 or more, got {seed}")
    if config.reward != "game" and rom_id(config.game) != REWARDS[config.reward][0]:
        raise ValueError(f"reward: {config.reward} is of the game {REWARDS[config.reward][0]}, got {rom_id(config.game)}")
    return _BACKENDS[config.backend](config, seed)


# Names ---------------------------------------------------------------------------------------------------------------------------


def games() -> list[str]:
    """ale-py's ids of all games that it ships and that one player can play, sorted."""
    from ale_py import roms

    return sorted(set(roms.get_all_rom_ids()) - _SEVERAL_PLAYERS)


_SEVERAL_PLAYERS = {"combat", "joust", "maze_craze", "warlords"}  # shipped for PettingZoo


def rom_id(game: str) -> str:
    """ale-py's id of a game, from any usual spelling of its name.

    "MsPacman", "ms-pacman", "Ms. Pacman", "ALE/MsPacman-v5" and "MsPacmanNoFrameskip-v4" are all "ms_pacman".
    Raises ValueError, with the nearest names, where there is no such game.
    """
    from ale_py import roms

    bare = re.sub(r"^ALE/|(-ram)?(NoFrameskip|Deterministic)?(-v\d+)?$", "", game.strip())
    ids = {_letters(name): name for name in roms.get_all_rom_ids()}
    ids["montezumasrevenge"] = "montezuma_revenge"  # its name on the box
    if _letters(bare) not in ids:
        near = difflib.get_close_matches(_letters(bare), ids, n=5, cutoff=0.5)
        hint = f"the nearest are {', '.join(ids[name] for name in near)}" if near else f"the games are {', '.join(games())}"
        raise ValueError(f"game: no game is called {game!r}; {hint}")
    return ids[_letters(bare)]


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _rom_path(game: str) -> str:
    import ale_py
    from ale_py import ALEInterface, roms

    name = rom_id(game)
    try:
        path = str(roms.get_rom_path(name))
    except FileNotFoundError as error:
        where = "the folder that ALE_ROMS_DIR names" if os.environ.get("ALE_ROMS_DIR") else "ale-py, which ships it (reinstall ale-py)"
        raise FileNotFoundError(f"game: the ROM of {name!r} is missing from {where}: {error.filename}") from error
    if ALEInterface.isSupportedROM(path) is None:  # the emulator would end the whole process
        raise ValueError(f"game: ale-py {ale_py.__version__} cannot run its ROM of {name!r} for one player")
    return path


# What both backends share --------------------------------------------------------------------------------------------------------


class _Atari(VectorEnv):
    def __init__(self, config: AtariConfig, seed: int):
        self.config = config
        self.num_envs = config.num_envs
        self.frame_stack = config.frame_stack
        self.action_repeat = config.frame_skip
        self.fps = 60 / config.frame_skip
        self.frame_shape = (1, config.frame_size, config.frame_size)
        self.observation_shape = (config.frame_stack, config.frame_size, config.frame_size)
        self._seed = seed
        self._episodes = Episodes(config.num_envs)
        self._lives = np.zeros(config.num_envs, np.int64)

    def _first(self, observation, lives, **more) -> Step:
        self._lives = lives
        return self._episodes.reset(observation, **more)

    def _next(self, observation, reward, over, lives, **more) -> Step:
        """`over`: the game has ended. A life that goes with the game is no lost life: some games show 0 lives for a while and go on."""
        lost = (lives < self._lives) & (lives > 0)
        self._lives = lives
        terminated = over | lost if self.config.life_loss_terminal else over
        return self._episodes.step(observation, reward, terminated, over | self._at_limit(), **more)

    def _at_limit(self) -> np.ndarray:
        """Whether the action now under way is the last that the time limit allows."""
        return self._episodes.length + 1 >= self.config.max_frames // self.config.frame_skip


# ale-py's vector environment -----------------------------------------------------------------------------------------------------


class AtariVector(_Atari):
    """AtariVectorEnv, which steps in native threads between `send` and `recv`.

    Two of its habits are worked around. It leaves the newest screen out where an episode ends, so that the last frame shows older ones.
    The last observation of a time limit is bootstrapped from, so the limit is kept here and the environment told to reset. (At game over
    nothing is bootstrapped, and the newest frame stays up to a step old.) And it does not call the time limit truncated if a life was lost
    in that step.
    """

    def __init__(self, config: AtariConfig, seed: int = 0):
        super().__init__(config, seed)
        _rom_path(config.game)  # its errors say more
        from ale_py.vector_env import AtariVectorEnv

        self._env = AtariVectorEnv(
            rom_id(config.game),
            config.num_envs,
            num_threads=min(config.workers or len(os.sched_getaffinity(0)), self.num_envs),
            max_num_frames_per_episode=2**30,
            repeat_action_probability=config.sticky,
            full_action_space=config.full_action_set,
            img_height=config.frame_size,
            img_width=config.frame_size,
            stack_num=config.frame_stack,
            frameskip=config.frame_skip,
            noop_max=config.noop_max,
            episodic_life=False,
            life_loss_info=False,
            reward_clipping=False,
            use_fire_reset=False,
        )
        self.num_actions = int(self._env.single_action_space.n)
        self._cut = np.zeros(config.num_envs, bool)  # the time limit closed the episode, so the emulator goes on unless told to reset

    def _reset(self, seed):
        observation, info = self._env.reset(seed=None if seed is None else stream_seeds(seed, self.num_envs))
        self._cut[:] = False
        return self._first(observation, info["lives"])

    def _send(self, actions):
        self._env.send(actions)

    def _recv(self):
        observation, reward, over, _, info = self._env.recv()
        if self._cut.any():
            observation, info = self._env.reset(options={"reset_mask": self._cut})
        step = self._next(observation, reward, over, info["lives"])
        self._cut = step.is_last & ~over
        return step

    def _close(self):
        del self._env


# ALEInterface in processes -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AtariState:
    """One environment as it was: the emulator with its random numbers, and the row of the Step that it showed. Picklable."""

    config: AtariConfig
    emulator: bytes
    stack: np.ndarray
    lives: int
    row: dict[str, np.ndarray]


class AtariProcesses(WorkerEnv, _Atari):
    """ALEInterface in `workers` processes, each with its share of the environments; they exchange arrays by shared memory.

    Beside what the vector backend shows, each Step has `ram`, and `frame_reward` with the score change of each of its frames. The processes
    import neither torch nor the caller's main module. They end with `close`, with this object, and with the process that made it, even
    by `kill -9`. Ctrl-C does not reach them. A worker that dies or fails is a RuntimeError that says which, and closes the environment.
    """

    _kind = "Atari"
    _worker = "urlfast.envs.atari_worker"

    def __init__(self, config: AtariConfig, seed: int = 0):
        super().__init__(config, seed)
        emulator = dict(rom=_rom_path(config.game), full_action_set=config.full_action_set)
        emulator |= {name: getattr(config, name) for name in ("frame_skip", "frame_size", "noop_max", "sticky", "reward")}
        n = self.num_envs
        self._start(config.workers)
        self._share(
            dict(
                action=((n,), np.int64),
                reset=((n,), np.bool_),  # to the worker: the row before was a last one
                frame=((n, *self.frame_shape), np.uint8),
                frame_reward=((n, config.frame_skip), np.float32),
                over=((n,), np.bool_),
                lives=((n,), np.int64),
                ram=((n, 128), np.uint8),
            )
        )
        self.num_actions, *_ = self._all("make", emulator)
        self._stack = FrameStack(n, self.frame_stack, self.frame_shape, np.uint8)

    def clone_state(self, i: int) -> AtariState:
        """Environment `i` as it is after `reset` or `recv`, for `restore_state` here or in another object of the same config."""
        emulator = self._ask_about(i, "clone")
        row = {name: column[i].copy() for name, column in vars(self._step).items() if column is not None}
        return AtariState(self.config, emulator, self._stack.stack[i].copy(), int(self._lives[i]), row)

    def restore_state(self, i: int, state: AtariState) -> Step:
        """Put environment `i` back to `state`; it goes on from there as it did then, random numbers included.

        Returns the current Step with row i as it was. `render` shows the restored screen after the next step only.
        Raises ValueError where the state is another game's, or was played with other settings.
        """
        mine, other = (dataclasses.replace(c, num_envs=1, workers=0, game=rom_id(c.game)) for c in (self.config, state.config))
        if mine != other:
            raise ValueError(f"state: must come from {mine}, got one from {other}")
        self._ask_about(i, "restore", state.emulator)
        self._stack.stack[i] = state.stack
        self._lives[i] = state.lives
        self._step = dataclasses.replace(self._step, **{name: getattr(self._step, name).copy() for name in state.row})
        for name, value in state.row.items():
            getattr(self._step, name)[i] = value
        for name in ("is_last", "score", "length"):
            getattr(self._episodes, name)[i] = state.row[name]
        return self._step

    def render(self, i: int = 0) -> np.ndarray:
        """The screen of environment `i` in colour: uint8 [210, 160, 3] (a few games have up to 250 lines)."""
        return self._ask_about(i, "render")

    def _reset(self, seed):
        seeds = None if seed is None else stream_seeds(seed, self.num_envs)
        self._all("reset", seeds)
        self._step = self._first(self._stack.push(self._shared["frame"], np.ones(self.num_envs, bool)), **self._shown())
        return self._step

    def _send(self, actions):
        self._shared["action"][:] = actions
        self._shared["reset"][:] = self._episodes.is_last
        self._ask_for_steps()

    def _recv(self):
        for worker in self._pool:
            self._answer(worker)
        observation = self._stack.push(self._shared["frame"], self._episodes.is_last)
        reward = self._shared["frame_reward"].sum(1, dtype=np.float64)
        self._step = self._next(observation, reward, self._shared["over"].copy(), **self._shown())
        return self._step

    def _shown(self):
        return {name: self._shared[name].copy() for name in ("lives", "ram", "frame_reward")}


_BACKENDS = {"vector": AtariVector, "processes": AtariProcesses}
