"""Eight Ms. Pac-Man environments, four frames a step, 84 x 84 grey, stacks of 4: our two backends beside ale-py's and gymnasium's own.

A call is a step of all eight, and resets where episodes end. "vector" is ale-py's environment with our rows around it (scores, lost lives,
whole last frames); "processes" also gives RAM, per-frame score changes and cloned states, which nothing beside it does.
Floor: the emulator alone, without screens: the frames that one thread has to play.
"""

import itertools
import os

import numpy as np

from bench.harness import Case, optional
from urlfast.envs import stream_seeds
from urlfast.envs.atari import AtariConfig, make_atari

ale_py = optional("ale_py")
ale_vector = optional("ale_py.vector_env")
gymnasium = optional("gymnasium")
cv2 = optional("cv2")  # gymnasium's preprocessing resizes with it

GAME, ENVS, SKIP = "ms_pacman", 8, 4


def actions():
    """A few hundred steps of random actions, for everyone the same."""
    return (np.random.default_rng(0).integers(0, 9, (500, ENVS)),)


def stepping(env, actions):
    """Steps, and returns observations."""
    script = itertools.cycle(actions)
    return lambda: env.step(next(script))


def ours(backend, threads):
    def make(actions):
        env = make_atari(AtariConfig(game=GAME, num_envs=ENVS, backend=backend, workers=threads))
        env.reset(0)
        step = stepping(env, actions)
        return lambda: step().observation

    return make


def ale_own(threads):
    def make(actions):
        env = ale_vector.AtariVectorEnv(GAME, ENVS, num_threads=threads, episodic_life=False, noop_max=30, use_fire_reset=False)
        env.reset(seed=stream_seeds(0, ENVS))
        step = stepping(env, actions)
        return lambda: step()[0]

    return make


def preprocessed():
    gymnasium.register_envs(ale_py)
    env = gymnasium.make("ALE/MsPacman-v5", frameskip=1, repeat_action_probability=0.0)
    env = gymnasium.wrappers.AtariPreprocessing(env, noop_max=30, frame_skip=SKIP, screen_size=84)
    return gymnasium.wrappers.FrameStackObservation(env, 4)


def gymnasium_own(threads):
    """One after another on one thread; else a process each, on as many processors as the others have threads."""

    def make(actions):
        if threads == 1:
            env = gymnasium.vector.SyncVectorEnv([preprocessed] * ENVS, copy=False)
        else:
            env = gymnasium.vector.AsyncVectorEnv([preprocessed] * ENVS, copy=False)
            for process in env.processes:
                os.sched_setaffinity(process.pid, sorted(os.sched_getaffinity(0))[:threads])
        env.reset(seed=0)
        step = stepping(env, actions)
        return lambda: step()[0]

    return make


def emulator(threads):
    def make(actions):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        ale = ale_py.ALEInterface()
        ale.setFloat("repeat_action_probability", 0.0)
        ale.loadROM(ale_py.roms.get_rom_path(GAME))
        legal = ale.getMinimalActionSet()
        script = itertools.cycle(actions[:, 0])

        def call():
            for _ in range(-(-ENVS // threads)):
                action = legal[next(script)]
                for _ in range(SKIP):
                    ale.act(action)
                if ale.game_over():
                    ale.reset_game()

        return call

    return make


def check(results):
    """Stacks of one shape, and as bright: everyone plays the same game, but only ale-py's own can play it from the same seeds."""
    first = results["urlfast"]
    assert first.shape == (ENVS, 4, 84, 84) and first.any()
    for name, stacks in results.items():
        assert stacks.shape == first.shape and stacks.dtype == np.uint8, f"{name}: {stacks.dtype}{stacks.shape}"
        assert abs(stacks[:, -1].mean() - first[:, -1].mean()) < 10, f"{name}: another picture"
    if "ale-py" in results:
        np.testing.assert_array_equal(results["ale-py"], first, err_msg="ale-py, from the same seeds and actions")


def cases(threads):
    gym = gymnasium_own(threads) if gymnasium and cv2 else None
    boards = {
        "vector": {"ale-py": ale_own(threads) if ale_vector else None, "gymnasium": gym},
        "processes": {"gymnasium": gym},
    }
    return [
        Case(
            "acting",
            f"{ENVS} x {GAME}, {backend}",
            threads,
            actions,
            {"urlfast": ours(backend, threads), **peers},
            check,
            floor=emulator(threads),
            processes=True,
        )
        for backend, peers in boards.items()
    ]
