"""NGU acting: steps of sixteen Montezuma's Revenge environments, chosen by R2D2's network on NGU's reward of every observation.

"a step" is a vector step of the training loop without storing or learning: novelty of the observations, Q, actions, emulators. The other
two cases are what it is made of: the emulators with actions at hand, and the networks (Q's, the embedding's, RND's two) on inputs at hand,
their images already floats. Its floor is these two, one after the other; acting adds normalisation, memories, states and bookkeeping.
"""

import itertools

import numpy as np
import torch

from bench.harness import Case
from urlfast.envs.atari import AtariConfig, make_atari
from urlfast.methods.ngu import NGU, NGUConfig

GAME, ENVS = "montezuma_revenge", 16


def agent():
    """Its weights are random, and so its games are as short as any."""
    config = NGUConfig.cpt().small()
    return NGU(config, (4, 84, 84), 18, seed=0)


def environment(threads):
    env = make_atari(AtariConfig(game=GAME, num_envs=ENVS, full_action_set=True, life_loss_terminal=False, workers=threads))
    return env, env.reset(0)


def acting(threads):
    def make():
        method, (env, step) = agent(), environment(threads)

        def call():
            nonlocal step
            step = env.step(method.act(step))
            return step.observation

        return call

    return make


def emulators(threads):
    def make():
        env, _ = environment(threads)
        script = itertools.cycle(np.random.default_rng(0).integers(0, 18, (500, ENVS)))
        return lambda: env.step(next(script)).observation

    return make


def networks():
    method = agent()
    learner, novelty = method.agent.learner, method.novelty
    images = torch.rand(ENVS, 4, 84, 84).contiguous(memory_format=torch.channels_last)
    given = images.to(method.agent.arithmetic.dtype)
    action, reward, state = torch.zeros(ENVS, 1, dtype=torch.int64), torch.zeros(ENVS, 1), learner.q.start(ENVS, method.device)

    @torch.no_grad()
    def call():
        with method.agent.arithmetic.autocast():
            features = learner.encoder(given)
        q, _ = learner.q(features.float()[:, None], action, reward, state)
        novelty.embedding["f"](images)
        novelty.rnd["target"](images)
        novelty.rnd["predictor"](images)
        return q.argmax(-1)

    return call


def one_after_the_other(threads):
    def make():
        steps, forward = emulators(threads)(), networks()

        def call():
            steps()
            forward()

        return call

    return make


def of_shape(*shape):
    def check(results):
        assert results["urlfast"].shape == shape

    return check


def cases(threads):
    images = of_shape(ENVS, 4, 84, 84)
    parts = {"emulators alone": (emulators(threads), images), "networks alone": (networks, of_shape(ENVS, 1))}
    return [
        Case(
            "ngu",
            f"{ENVS} x {GAME}, a step",
            threads,
            tuple,
            {"urlfast": acting(threads)},
            images,
            floor=one_after_the_other(threads),
            targets={"floor": 0.85},
            processes=True,
        ),
        *(
            Case("ngu", f"{ENVS} x {GAME}, {name}", threads, tuple, {"urlfast": make}, check, processes=True)
            for name, (make, check) in parts.items()
        ),
    ]
