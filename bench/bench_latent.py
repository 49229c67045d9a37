"""LatentDynamics.step, its noise drawn, beside NumPy and torch doing the same, at D = 512. One thread.

Floor: the step without its noise, z.lerp_(actions, 1 - beta).
"""

import shutil
from functools import partial

import numpy as np
import torch

import urlfast
from bench.harness import Case

ALPHA, BETA, DIM = 0.5, 0.5, 512  # time does not depend on beta; at 0.5 the start is soon forgotten


def ours(actions):
    dynamics = urlfast.LatentDynamics(len(actions), DIM, alpha=ALPHA, beta=BETA, episode_length=10**9)
    dynamics.reset()
    return lambda: dynamics.step(actions)[0]


def numpy(actions):
    rng = np.random.default_rng(0)
    z, noise, mixed = (np.zeros_like(actions) for _ in range(3))

    def step():
        rng.standard_normal(dtype=np.float32, out=noise)
        np.multiply(actions, ALPHA, out=mixed)
        np.multiply(noise, 1 - ALPHA, out=noise)
        np.add(mixed, noise, out=mixed)
        np.multiply(mixed, 1 - BETA, out=mixed)
        np.multiply(z, BETA, out=z)
        return np.add(z, mixed, out=z)

    return step


def torch_step(z, actions):
    return BETA * z + (1 - BETA) * (ALPHA * actions + (1 - ALPHA) * torch.randn_like(z))


def torch_eager(actions, step=torch_step):
    actions = torch.from_numpy(actions)
    z = torch.zeros_like(actions)

    def call():
        nonlocal z
        z = step(z, actions)
        return z.numpy()

    return call


def torch_compiled(actions):
    return torch_eager(actions, torch.compile(torch_step, dynamic=False))


def without_noise(actions):
    actions = torch.from_numpy(actions)
    z = torch.zeros_like(actions)
    return lambda: z.lerp_(actions, 1 - BETA)


def warmed_up(make):
    """Long enough after the start that what a call returns is a draw from the stationary process."""

    def with_steps_taken(actions):
        call = make(actions)
        for _ in range(12):
            call()
        return call

    return with_steps_taken


def check(results):
    """The process is stationary at alpha * a, with the variance of the closed form."""
    for name, z in results.items():
        np.testing.assert_allclose(z.mean(), ALPHA * 0.5, rtol=0.02, err_msg=name)
        np.testing.assert_allclose(z.var(), (1 - ALPHA) ** 2 * (1 - BETA) / (1 + BETA), rtol=0.05, err_msg=name)


CONTESTANTS = {
    "urlfast": ours,
    "NumPy": numpy,
    "torch": torch_eager,
    "torch.compile": torch_compiled if shutil.which("c++") else None,
}


def cases(threads):
    if threads > 1:
        return []
    return [
        Case(
            "latent",
            f"{n:,} x {DIM}",
            threads,
            partial(lambda n: (np.full((n, DIM), 0.5, np.float32),), n),
            {name: make and warmed_up(make) for name, make in CONTESTANTS.items()},
            check,
            floor=without_noise,
            targets={"NumPy": 3.0, "torch": 3.0, "torch.compile": 1.2},
            slow=("torch.compile",),
        )
        for n in (64, 512, 4096, 16384)
    ]
