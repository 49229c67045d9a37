"""ema_update_ beside torch._foreach_lerp_ and a loop over tensors: DrQ's 40 tensors and Dreamer's 98, one and two threads.

pytest bench/bench_ema.py --benchmark-group-by=group
"""

import pytest
import torch

import urlfast

# 4.3M parameters in 40 tensors and 26.4M in 98: a few large matrices, many small biases and norms
MODELS = {
    "drq 40": [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136), (512, 3136), (512, 512), (512, 512), (512, 1024)]
    + [(512,)] * 32,
    "dreamer 98": [(3072, 2048)] * 2 + [(1024, 1024)] * 10 + [(384, 192, 4, 4)] * 2 + [(192, 96, 5, 5), (400, 2048)] + [(1024,)] * 82,
}


def ours(targets, sources):
    urlfast.ema_update_(targets, sources, 0.01)


@torch.no_grad()
def foreach_lerp(targets, sources):
    torch._foreach_lerp_(targets, sources, 0.01)


@torch.no_grad()
def loop(targets, sources):
    for t, s in zip(targets, sources, strict=True):
        t.data.copy_(0.01 * s.data + 0.99 * t.data)


@pytest.mark.parametrize("contestant", [ours, foreach_lerp, loop])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_ema(benchmark, set_threads, model, threads, contestant):
    set_threads(threads)
    make = lambda: [torch.randn(shape) for shape in MODELS[model]]  # noqa: E731
    targets, sources = make(), make()
    copies = [t.clone() for t in targets]
    contestant(targets, sources)
    ours(copies, sources)
    for got, want in zip(targets, copies, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    benchmark.group = f"ema {model} x{threads}"
    benchmark(contestant, targets, sources)
