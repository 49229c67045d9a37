"""knn_reward beside torch.cdist + topk, faiss's exact search and URLB's formula, two threads.

pytest bench/bench_knn.py --benchmark-group-by=group     one contestant after another, with pytest-benchmark's statistics
python bench/bench_knn.py                                in turns: drift hits all alike; medians of wall time and ratios
"""

import sys
import time

import numpy as np
import pytest
import torch

import urlfast

try:
    import faiss
except ImportError:
    faiss = None

# queries, keys (None: the batch itself), features, k
SHAPES = [
    (256, None, 15, 12),
    (1024, None, 15, 12),
    (1024, None, 512, 12),
    (64, None, 3136, 16),
    (512, 4096, 1024, 16),
    (256, 30_000, 32, 10),
    (1024, 100_000, 64, 16),
]
RAGGED = [(64, 10_000, 32, 10), (256, 30_000, 32, 10)]  # memories, rows of each, features, k: one query each


def arrays(b, m, d):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((b, d), dtype=np.float32)
    return z, None if m is None else rng.standard_normal((m, d), dtype=np.float32)


def log_reward(distance):
    return np.log(1 + np.asarray(distance).mean(-1))


def ours(z, memory, k):
    return urlfast.knn_reward(z, k, memory)


def cdist(z, memory, k):
    z, pool = torch.from_numpy(z), torch.from_numpy(z if memory is None else memory)
    return log_reward(torch.cdist(z, pool, compute_mode="use_mm_for_euclid_dist").topk(k, largest=False).values)


def faiss_exact(z, memory, k):
    faiss.omp_set_num_threads(torch.get_num_threads())
    return log_reward(np.sqrt(np.maximum(faiss.knn(z, z if memory is None else memory, k)[0], 0)))


def urlb(z, memory, k):
    z, pool = torch.from_numpy(z), torch.from_numpy(z if memory is None else memory)
    distance = torch.norm(z[:, None, :] - pool[None, :, :], dim=-1, p=2)
    return log_reward(distance.topk(k, largest=False).values)


def contestants(b, m, d):
    out = [ours, cdist] + ([faiss_exact] if faiss else [])
    return out + [urlb] * (b * (m or b) * d <= 20_000_000)  # it makes the array of all differences


def ragged(z, memory, k):
    return urlfast.knn_reward(z, k, memory, lengths=[memory.shape[1]] * len(z))


def ragged_baddbmm(z, memory, k):
    z, memory = torch.from_numpy(z), torch.from_numpy(memory)
    square = torch.baddbmm(memory.square().sum(-1).unsqueeze(1), z, memory.mT, alpha=-2) + z.square().sum(-1, keepdim=True)
    return log_reward(square.clamp_min(0).topk(k, largest=False).values.sqrt())


@pytest.mark.parametrize("contestant", ["ours", "cdist", "faiss_exact", "urlb"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_knn_reward(benchmark, set_threads, shape, contestant):
    set_threads(2)
    call = {f.__name__: f for f in contestants(*shape[:3])}.get(contestant)
    if call is None:
        pytest.skip("faiss is not installed, or the array of all differences is too large")
    z, memory = arrays(*shape[:3])
    np.testing.assert_allclose(call(z, memory, shape[3]), ours(z, memory, shape[3]), rtol=2e-3)
    benchmark.group = f"knn {shape}"
    benchmark(call, z, memory, shape[3])


@pytest.mark.parametrize("contestant", [ragged, ragged_baddbmm])
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_ragged_memories(benchmark, set_threads, shape, contestant):
    set_threads(2)
    z, memory = many_memories(*shape[:3])
    np.testing.assert_allclose(contestant(z, memory, shape[3]), ragged(z, memory, shape[3]), rtol=2e-3)
    benchmark.group = f"ragged {shape}"
    benchmark(contestant, z, memory, shape[3])


def many_memories(s, c, d):
    rng = np.random.default_rng(0)
    return rng.standard_normal((s, 1, d), dtype=np.float32), rng.standard_normal((s, c, d), dtype=np.float32)


def in_turns(calls, z, memory, k, seconds=4.0):
    """Median milliseconds of each, called a b c a b c ..."""
    times = {f.__name__: [] for f in calls}
    for f in calls:
        np.testing.assert_allclose(f(z, memory, k), calls[0](z, memory, k), rtol=2e-3)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[calls[-1].__name__]) < 3:
        for f in calls:
            start = time.perf_counter()
            f(z, memory, k)
            times[f.__name__].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(t)) for name, t in times.items()}


def main(threads=2):
    torch.set_num_threads(threads)
    urlfast.set_num_threads(threads)
    rows = [(shape, contestants(*shape[:3]), arrays(*shape[:3])) for shape in SHAPES]
    for shape, calls, (z, memory) in rows:
        show("knn", shape, in_turns(calls, z, memory, shape[3]))
    for shape in RAGGED:
        show("ragged", shape, in_turns([ragged, ragged_baddbmm], *many_memories(*shape[:3]), shape[3]))


def show(what, shape, times):
    first, *others = times.items()
    ratios = "  ".join(f"{name} {t:.2f} ms {t / first[1]:.1f}x" for name, t in others)
    print(f"{what} {shape}: {first[1]:.2f} ms  {ratios}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
