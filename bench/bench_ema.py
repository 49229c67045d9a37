"""ema_update_ beside torch._foreach_lerp_ and a loop over the tensors.

Floor: one lerp_ over a single array of as many floats.
"""

from functools import partial

import torch

import urlfast
from bench.harness import Case, agree

TAU = 0.01
# 4.3M parameters in 40 tensors and 26.4M in 98: a few large matrices, many small biases and norms
DRQ = [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136), (512, 3136), (512, 512), (512, 512), (512, 1024)] + [(512,)] * 32
DREAMER = [(3072, 2048)] * 2 + [(1024, 1024)] * 10 + [(384, 192, 4, 4)] * 2 + [(192, 96, 5, 5), (400, 2048)] + [(1024,)] * 82


def ours(targets, sources):
    def call():
        urlfast.ema_update_(targets, sources, TAU)
        return targets

    return call


def foreach_lerp(targets, sources):
    @torch.no_grad()
    def call():
        torch._foreach_lerp_(targets, sources, TAU)
        return targets

    return call


def loop(targets, sources):
    @torch.no_grad()
    def call():
        for t, s in zip(targets, sources, strict=True):
            t.data.copy_(TAU * s.data + (1 - TAU) * t.data)
        return targets

    return call


def one_array(targets, sources):
    target, source = (torch.cat([x.flatten() for x in tensors]) for tensors in (targets, sources))
    return lambda: target.lerp_(source, TAU)


def on_its_own(make):
    """Every contestant moves targets of its own."""
    return lambda targets, sources: make([t.clone() for t in targets], sources)


def tensors(shapes):
    torch.manual_seed(0)
    return tuple([torch.randn(shape) for shape in shapes] for _ in range(2))


def cases(threads):
    return [
        Case(
            "ema",
            shape,
            threads,
            partial(tensors, shapes),
            {"urlfast": on_its_own(ours), "torch foreach": on_its_own(foreach_lerp), "loop": on_its_own(loop)},
            agree(rtol=1e-5, atol=1e-6),
            floor=one_array,
            targets={"torch foreach": target},
        )
        for shape, shapes, target in [("DrQ, 4.3M in 40 tensors", DRQ, 0.97), ("Dreamer, 26.4M in 98 tensors", DREAMER, 1.15)]
    ]
