"""RunningNormalizer, update and normalise, beside Stable-Baselines3, gymnasium, URLB's formula in torch, and plain NumPy for the mean.

pytest bench/bench_normalizer.py --benchmark-group-by=group          one thread each
"""

import gymnasium.wrappers.utils
import numpy as np
import pytest
import torch
from stable_baselines3.common.running_mean_std import RunningMeanStd

import urlfast

SIZES = [256, 1024, 65_536, 1 << 20]


def urlfast_std(x):
    return urlfast.RunningNormalizer("std", epsilon=0)


def urlfast_mean(x):
    return urlfast.RunningNormalizer("mean", epsilon=0)


def peer(statistic):
    def call(x):
        statistic.update(x)
        return x / np.sqrt(statistic.var)

    return call


def stable_baselines3(x):
    return peer(RunningMeanStd(shape=()))


def gymnasium_(x):
    return peer(gymnasium.wrappers.utils.RunningMeanStd(shape=()))


def urlb_torch(x):
    """URLB's RMS with the population variance, so that results can be compared."""
    state = {"M": torch.zeros(1), "S": torch.ones(1), "n": 1e-4}

    def call(x):
        x = torch.from_numpy(x)
        m = x.numel()
        delta = x.mean() - state["M"]
        n = state["n"]
        state["M"] = state["M"] + delta * m / (n + m)
        state["S"] = (state["S"] * n + x.var(unbiased=False) * m + delta**2 * n * m / (n + m)) / (n + m)
        state["n"] = n + m
        return (x / state["S"].sqrt()).numpy()

    return call


def numpy_mean(x):
    state = [0.0, 1e-4]

    def call(x):
        state[0] += (x.mean() - state[0]) * x.size / (state[1] + x.size)
        state[1] += x.size
        return x / np.float32(state[0])

    return call


CONTESTS = {"std": [urlfast_std, stable_baselines3, gymnasium_, urlb_torch], "mean": [urlfast_mean, numpy_mean]}


@pytest.mark.parametrize("mode, contestant", [(mode, c) for mode in CONTESTS for c in CONTESTS[mode]])
@pytest.mark.parametrize("size", SIZES)
def test_update_and_normalize(benchmark, one_thread, size, mode, contestant):
    x = (3 + np.random.default_rng(0).standard_normal(size)).astype(np.float32)
    ours, theirs = CONTESTS[mode][0](x), contestant(x)
    for _ in range(3):
        np.testing.assert_allclose(theirs(x), ours(x), rtol=2e-4)  # gymnasium's statistic is float32 for float32
    benchmark.group = f"normalizer {mode} {size}"
    benchmark(theirs, x)
