"""The kernels on a GPU, beside torch and the rooflines of docs/gpu.md: `python -m bench.gpu [--repeats 50]`.

Contestants in turns, the L2 cache overwritten before each call, medians of CUDA events around one call. Results are compared first. The
floor is bytes over the memory's bandwidth or float32 operations over their peak, whichever is longer, at the figures of an H200;
`--bandwidth` and `--flops` take those of another GPU.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

import urlfast
from bench import bench_knn
from urlfast import Field, LatentDynamics, RunningNormalizer, SequenceReplay


class Case(NamedTuple):
    name: str
    ours: Callable[[], object]
    peer: Callable[[], object] | None  # torch's
    bytes: float
    flops: float = 0.0
    want: Callable[[], object] | None = None  # what ours returns, where that is not random or nothing at all


def exactly(z, keys, k) -> Callable[[], object]:
    """From differences: products cancel."""

    def want():
        distance = torch.cdist(z, keys, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.log1p(distance.topk(k, largest=False).values.mean(-1))

    return want


def knn_cases() -> Iterator[Case]:
    for b, m, d, k in bench_knn.SHAPES:
        z, pool, _ = bench_knn.batch(b, m, d, k)
        z = torch.from_numpy(z).cuda()
        memory = None if m is None else torch.from_numpy(pool).cuda()
        keys = z if memory is None else memory

        def ours(z=z, memory=memory, k=k):
            return urlfast.knn_reward(z, k, memory)

        def peer(z=z, keys=keys, k=k):
            return torch.log1p(torch.cdist(z, keys).topk(k, largest=False).values.mean(-1))

        yield Case(f"knn {b}, {m or 'self'}, {d}, {k}", ours, peer, 4 * d * (b + (m or 0)), 4.0 * b * len(keys) * d, exactly(z, keys, k))
    for s, m, d, k in ((64, 10_000, 32, 10), (256, 30_000, 32, 10)):
        z, memory = torch.randn(s, 1, d, device="cuda"), torch.randn(s, m, d, device="cuda")
        lengths = [m] * s

        def ours(z=z, memory=memory, k=k, lengths=lengths):
            return urlfast.knn_reward(z, k, memory, lengths=lengths)

        def peer(z=z, memory=memory, k=k):
            return torch.log1p(torch.cdist(z, memory).topk(k, largest=False).values.mean(-1))

        yield Case(f"memories {s} x {m} x {d}", ours, peer, 4.0 * s * m * d, want=exactly(z, memory, k))


def statistic_cases() -> Iterator[Case]:
    for n in (256, 1024, 65_536, 1 << 20):
        x, normalizer, running = torch.randn(n, device="cuda"), RunningNormalizer("std", device="cuda"), torch.zeros(3, device="cuda")

        def peer(x=x, running=running):
            running.lerp_(torch.stack([x.mean(), x.var(), x.new_tensor(1.0)]), 0.01)
            return x / (running[1] + 1e-8).sqrt()

        yield Case(f"normalizer {n}", lambda x=x, f=normalizer: f(x), peer, 12.0 * n)


def ema_cases() -> Iterator[Case]:
    for name, tensors, size in (("DrQ", 40, 107_500), ("Dreamer", 98, 269_388)):
        targets, sources = ([torch.randn(size, device="cuda") for _ in range(tensors)] for _ in range(2))
        theirs = [t.clone() for t in targets]

        def ours(targets=targets, sources=sources):
            urlfast.ema_update_(targets, sources, 0.01)
            return targets

        def peer(theirs=theirs, sources=sources):
            torch._foreach_lerp_(theirs, sources, 0.01)
            return theirs

        yield Case(f"ema {name}, {tensors} tensors", ours, peer, 12.0 * tensors * size, want=peer)


def latent_cases() -> Iterator[Case]:
    for n in (64, 512, 4096, 16_384):
        actions, z = torch.randn(n, 512, device="cuda"), torch.zeros(n, 512, device="cuda")
        dynamics = LatentDynamics(n, 512, episode_length=1000, device="cuda")
        dynamics.reset()

        def peer(actions=actions, z=z):
            return z.mul_(0.9).add_(0.1 * (0.5 * actions + 0.5 * torch.randn_like(actions)))

        yield Case(f"latent {n} x 512", lambda f=dynamics, a=actions: f.step(a), peer, 12.0 * n * 512)


def replay_cases() -> Iterator[Case]:
    rng = np.random.default_rng(0)
    frame = {"observation": Field((1, 84, 84), "uint8")}
    sequences = dict(sequence_length=120, burn_in=40, stride=40, frame_stack=4, priority_exponent=0.9)
    for name, batch, frames, options in (
        ("sequences 64 x 120", 64, 64 * 123, sequences),
        ("transitions 32", 32, 32 * 8, dict(n_step=3, gamma=0.99, frame_stack=4)),
        ("transitions 512", 512, 512 * 8, dict(n_step=3, gamma=0.99, frame_stack=4)),
    ):
        replay = SequenceReplay(100_000, frame, num_streams=8, device="cuda", **options)
        for t in range(5000):
            flags = {"terminated": np.zeros(8, bool), "is_first": np.full(8, t % 500 == 0), "is_last": np.full(8, t % 500 == 499)}
            rows = {"observation": rng.integers(0, 256, (8, 1, 84, 84), np.uint8), "reward": np.zeros(8, np.float32)}
            replay.add(rows | flags)
        store = torch.zeros(40_000, 7056, dtype=torch.uint8, device="cuda")
        rows, out = torch.randint(0, 40_000, (frames,), device="cuda"), torch.empty(frames, 7056, dtype=torch.uint8, device="cuda")

        def peer(store=store, rows=rows, out=out):
            return torch.index_select(store, 0, rows, out=out)

        yield Case(f"replay {name}", lambda f=replay, b=batch: f.sample(b), peer, 2.0 * frames * 7056)
        if "priority_exponent" in options:
            indices, td = torch.from_dlpack(replay.sample(batch).indices), torch.rand(batch, 79, device="cuda")
            yield Case("priorities of 64", lambda f=replay, i=indices, e=td: f.update_priorities(i, e), None, 4.0 * batch * 79)


def microseconds(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median time of each on the device, in turns."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times = [[] for _ in calls]
    for _ in range(repeats):
        for call, own in zip(calls, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            own.append(1e3 * start.elapsed_time(end))
    return [float(np.median(own)) for own in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes a second")
    parser.add_argument("--flops", type=float, default=67e12, help="float32 operations a second")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.gpu: torch sees no CUDA device")
    print(torch.cuda.get_device_name())
    print(f"{'':34} {'us':>9} {'floor':>9} {'share':>6} {'torch':>9} {'ratio':>6}")
    for cases in (knn_cases, statistic_cases, ema_cases, latent_cases, replay_cases):
        for case in cases():
            result = case.ours()
            if case.want:
                torch.testing.assert_close(result, case.want(), rtol=1e-5, atol=1e-5)
            calls = [case.ours] + ([case.peer] if case.peer else [])
            microseconds(calls, 3)
            own, *theirs = microseconds(calls, options.repeats)
            floor = 1e6 * max(case.bytes / options.bandwidth, case.flops / options.flops)
            ratio = f"{theirs[0]:9.1f} {theirs[0] / own:6.2f}" if theirs else ""
            print(f"{case.name:34} {own:9.1f} {floor:9.2f} {floor / own:6.0%} {ratio}", flush=True)


if __name__ == "__main__":
    main()
