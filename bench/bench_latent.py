"""LatentDynamics.step, its noise drawn, beside NumPy and torch doing the same: D = 512, one thread each.

pytest bench/bench_latent.py --benchmark-group-by=group
"""

import numpy as np
import pytest
import torch

import urlfast

ALPHA, BETA, DIM = 0.5, 0.5, 512  # time does not depend on beta; at 0.5 the start is soon forgotten


def urlfast_(n):
    dynamics = urlfast.LatentDynamics(n, DIM, alpha=ALPHA, beta=BETA, episode_length=10**9)
    dynamics.reset()
    return lambda actions: dynamics.step(actions)[0]


def numpy_(n):
    rng = np.random.default_rng(0)
    z, noise, mixed = (np.zeros((n, DIM), np.float32) for _ in range(3))

    def step(actions):
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


def torch_(n, step=torch_step):
    z = [torch.zeros(n, DIM)]

    def call(actions):
        z[0] = step(z[0], torch.from_numpy(actions))
        return z[0].numpy()

    return call


def torch_compile(n):
    return torch_(n, torch.compile(torch_step))


@pytest.mark.parametrize("contestant", [urlfast_, numpy_, torch_, torch_compile])
@pytest.mark.parametrize("n", [64, 512, 4096, 16384])
def test_step(benchmark, one_thread, n, contestant):
    actions = np.full((n, DIM), 0.5, np.float32)
    step = contestant(n)
    for _ in range(12):
        z = step(actions)
    # the process is stationary at the mean alpha * a, with the variance of the closed form
    np.testing.assert_allclose(z.mean(), ALPHA * 0.5, rtol=0.02)
    np.testing.assert_allclose(z.var(), (1 - ALPHA) ** 2 * (1 - BETA) / (1 + BETA), rtol=0.05)
    benchmark.group = f"latent step {n}"
    benchmark(step, actions)
