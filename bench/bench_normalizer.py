"""RunningNormalizer, update and divide, beside Stable-Baselines3, gymnasium, URLB's formula in torch, and plain NumPy for the mean.

Everyone writes the result into an array that is reused. Floor: a pass that reads (x . x) and a pass that scales, in NumPy. One thread.
"""

from functools import partial

import numpy as np
import torch

import urlfast
from bench.harness import Case, agree, optional

sb3 = optional("stable_baselines3.common.running_mean_std")
gymnasium = optional("gymnasium.wrappers.utils")


def ours(mode):
    def make(x, out):
        normalizer = urlfast.RunningNormalizer(mode, epsilon=0)
        return lambda: normalizer(x, out=out)

    return make


def running_mean_std(module):
    """The class of that name, which Stable-Baselines3 and gymnasium each have."""

    def make(x, out):
        statistic = module.RunningMeanStd(shape=())

        def call():
            statistic.update(x)
            return np.divide(x, np.float32(np.sqrt(statistic.var)), out=out)

        return call

    return make


def urlb(x, out):
    """URLB's RMS, with the population variance so that results can be compared."""
    x, out = torch.from_numpy(x), torch.from_numpy(out)
    state = {"M": torch.zeros(1), "S": torch.ones(1), "n": 1e-4}

    def call():
        m, n = x.numel(), state["n"]
        delta = x.mean() - state["M"]
        state["M"] = state["M"] + delta * m / (n + m)
        state["S"] = (state["S"] * n + x.var(unbiased=False) * m + delta**2 * n * m / (n + m)) / (n + m)
        state["n"] = n + m
        return torch.div(x, state["S"].sqrt(), out=out)

    return call


def numpy_mean(x, out):
    state = {"mean": 0.0, "n": 1e-4}

    def call():
        state["n"] += x.size
        state["mean"] += (x.mean() - state["mean"]) * x.size / state["n"]
        return np.divide(x, np.float32(state["mean"]), out=out)

    return call


def two_passes(x, out):
    return lambda: (np.dot(x, x), np.multiply(x, np.float32(0.5), out=out))


def array(size):
    x = (3 + np.random.default_rng(0).standard_normal(size)).astype(np.float32)
    return x, np.empty_like(x)


def on_its_own(make):
    """Results are compared: every contestant writes into an array of its own."""
    return make and (lambda x, out: make(x, out.copy()))


STD = {
    "urlfast": ours("std"),
    "Stable-Baselines3": sb3 and running_mean_std(sb3),
    "gymnasium": gymnasium and running_mean_std(gymnasium),
    "URLB in torch": urlb,
}
MEAN = {"urlfast": ours("mean"), "NumPy": numpy_mean}


def targets(mode, size):
    if mode == "mean":
        return {"NumPy": 2.5} if size <= 1024 else {}
    least = {256: 8.0, 1024: 8.0, 1 << 20: 2.5}.get(size)
    return {"Stable-Baselines3": least, "gymnasium": least} if least else {}


def cases(threads):
    if threads > 1:
        return []
    return [
        Case(
            "normalizer",
            f"{mode} of {size:,} values",
            threads,
            partial(array, size),
            {name: on_its_own(make) for name, make in contestants.items()},
            agree(rtol=2e-4),  # gymnasium's statistic is float32 for float32
            floor=two_passes,
            targets=targets(mode, size),
        )
        for mode, contestants in (("std", STD), ("mean", MEAN))
        for size in (256, 1024, 65_536, 1 << 20)
    ]
