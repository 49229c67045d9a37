"""knn_reward beside torch.cdist + topk, faiss's exact search, scikit-learn and URLB's formula; and many episodic memories in one call.

All return log(1 + mean distance to the k nearest). Floor: the products' float32 operations, half of them where the batch is its own pool;
or one pass over the memory, if that takes longer. Of many memories: a pass over the very rows, timed in turns, since how fast rows can be
read hangs on the pages that they lie on.
"""

import itertools
import mmap
from functools import partial

import numpy as np
import torch

import urlfast
from bench.floors import reads
from bench.harness import Case, Work, agree, optional

faiss = optional("faiss")
sklearn = optional("sklearn.neighbors")

MEAN_TARGET = 4.0
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
MEMORIES = [(64, 10_000, 10_000), (256, 30_000, 30_000), (64, 10_000, 30_000), (256, 10_000, 30_000)]  # how many, fewest and most rows


PRODUCTS = dict.fromkeys(("cdist", "faiss", "scikit-learn", "baddbmm"), 2e-3)  # cancel: a row's distance to itself is not quite 0


def log_mean(distance):
    """(B, k) -> (B,)"""
    return torch.log1p(torch.as_tensor(distance).mean(-1))


def ours(z, pool, k):
    memory = None if pool is z else pool
    return lambda: urlfast.knn_reward(z, k, memory)


def cdist(mode):
    def make(z, pool, k):
        z, pool = torch.from_numpy(z), torch.from_numpy(pool)
        return lambda: log_mean(torch.cdist(z, pool, compute_mode=mode).topk(k, largest=False).values)

    return make


def faiss_exact(z, pool, k):
    return lambda: log_mean(np.sqrt(np.maximum(faiss.knn(z, pool, k)[0], 0)))  # |a|^2 + |b|^2 - 2ab may fall below 0


def brute_force(z, pool, k):
    search = sklearn.NearestNeighbors(n_neighbors=k, algorithm="brute").fit(pool)
    return lambda: log_mean(search.kneighbors(z)[0])


def urlb(z, pool, k):
    """The array of all differences, as URLB's PBE makes it."""
    z, pool = torch.from_numpy(z), torch.from_numpy(pool)
    return lambda: log_mean(torch.norm(z[:, None, :] - pool[None, :, :], dim=-1, p=2).topk(k, largest=False).values)


def batch(b, m, d, k):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((b, d), dtype=np.float32)
    return z, z if m is None else rng.standard_normal((m, d), dtype=np.float32), k


def one_batch(threads, b, m, d, k):
    contestants = {
        "urlfast": ours,
        "cdist": cdist("use_mm_for_euclid_dist"),
        "cdist, direct": cdist("donot_use_mm_for_euclid_dist"),
        "faiss": faiss and faiss_exact,
    }
    if m is None:
        contestants["scikit-learn"] = sklearn and brute_force
    if b * (m or b) * d * 4 < 3e9:  # bytes of the array of all differences
        contestants["URLB"] = urlb
    return Case(
        "knn",
        f"{b:,} x {f'{m:,}' if m else 'self'} x {d}, k {k}",
        threads,
        partial(batch, b, m, d, k),
        contestants,
        agree(rtol=1e-5, **PRODUCTS),
        floor=Work(fp32=2 * b * m * d, read=4 * m * d) if m else Work(fp32=b * b * d),
        targets={"fastest": 2.0, **({"URLB": 30.0} if (b, m) == (1024, None) else {})},
    )


# Many memories, one query each, 32 features, k = 10 -----------------------------------------------------------------------------


def ours_ragged(z, memory, lengths):
    return lambda: urlfast.knn_reward(z, 10, memory, lengths=lengths)


def faiss_each(z, memory, lengths):
    def call():
        found = [faiss.knn(z[i], memory[i, :n], 10)[0] for i, n in enumerate(lengths)]
        return log_mean(np.sqrt(np.maximum(np.stack(found), 0)))

    return call


def baddbmm(z, memory, lengths):
    z, memory = torch.from_numpy(z), torch.from_numpy(memory)
    beyond = torch.arange(memory.shape[1]) >= torch.tensor(lengths)[:, None, None]

    def call():
        square = torch.baddbmm(memory.square().sum(-1).unsqueeze(1), z, memory.mT, alpha=-2) + z.square().sum(-1, keepdim=True)
        return log_mean(square.masked_fill_(beyond, torch.inf).clamp_min_(0).topk(10, largest=False).values.sqrt())

    return call


def fresh(shape):
    """Float32 on pages of its own, huge ones where the system has them, whatever was allocated and freed before."""
    pages = mmap.mmap(-1, 4 * int(np.prod(shape)), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.float32).reshape(shape)


CACHED = 1 << 28  # bytes of rows of which a last cache might still hold a part when they are read again


def memories(lengths):
    """(z, [rows, ...], lengths): twice as many rows where caches could tell, to be asked in turns (`in_memory`)."""
    rng = np.random.default_rng(0)
    z, every = rng.standard_normal((len(lengths), 1, 32), dtype=np.float32), []
    for _ in range(2 if 4 * 32 * sum(lengths) < CACHED else 1):
        every.append(fresh((len(lengths), max(lengths), 32)))
        rng.standard_normal(dtype=np.float32, out=every[-1])
    return z, every, lengths


def in_memory(make):
    """make(z, rows, lengths) for all of the rows, each call asking the next."""

    def for_all(z, every, lengths):
        calls = itertools.cycle([make(z, rows, lengths) for rows in every])
        return lambda: next(calls)()

    return make and for_all


def one_pass(threads):
    """The floor: as many of the rows as are in use."""

    def make(_, every, lengths):
        passes = [reads(rows.reshape(-1)[: 32 * sum(lengths)], threads) for rows in every]
        turn = itertools.cycle(passes)
        return passes[0] and (lambda: next(turn)())

    return make


def many_memories(threads, count, low, high):
    lengths = np.linspace(low, high, count).astype(int).tolist()
    contestants = {"urlfast": ours_ragged, "faiss": faiss and faiss_each, "baddbmm": baddbmm}
    return Case(
        "knn",
        f"{count} memories x {f'{low:,}' if low == high else f'{low:,}-{high:,}'} x 32, k 10",
        threads,
        partial(memories, lengths),
        {name: in_memory(make) for name, make in contestants.items()},
        agree(rtol=1e-5, **PRODUCTS),
        floor=one_pass(threads),
        targets={"fastest": 2.0},
    )


# NGU's memories: the distances to what 64 actors have seen, and their new rows in place of the oldest ---------------------------


def embeddings(rows):
    """(streams, dim) of every step."""
    streams, _, dim = rows.shape
    return itertools.cycle(np.random.default_rng(1).standard_normal((256, streams, dim), dtype=np.float32))


def ours_episodic(_, rows, lengths):
    (streams, capacity, dim), new = rows.shape, embeddings(rows)
    memory, none = urlfast.EpisodicMemory(streams, capacity, dim, k=10), np.zeros(streams, bool)
    memory.load_state_dict({"lengths": lengths, "rows": rows.reshape(-1, dim)})
    return lambda: log_mean(memory.step(next(new), none))[:, None]


def appending(make):
    """A peer, on rows of its own, that writes the new ones itself."""

    def with_rows(z, rows, lengths):
        z, own, new, oldest = np.empty_like(z), fresh(rows.shape), embeddings(rows), itertools.cycle(range(rows.shape[1]))
        own[:] = rows
        search = make(z, own, lengths)

        def call():
            z[:, 0] = next(new)
            found = search()
            own[:, next(oldest)] = z[:, 0]
            return found

        return call

    return with_rows


def episodic(threads, streams=64, capacity=10_000):
    contestants = {"urlfast": ours_episodic, "faiss": faiss and appending(faiss_each), "baddbmm": appending(baddbmm)}
    return Case(
        "knn",
        f"EpisodicMemory, {streams} x {capacity:,} x 32, k 10",
        threads,
        partial(memories, [capacity] * streams),
        {name: in_memory(make) for name, make in contestants.items()},
        agree(rtol=1e-5, **PRODUCTS),
        floor=one_pass(threads),
        targets={"floor": 0.75, **({"faiss": 2.5, "baddbmm": 1.5} if threads == 2 else {})},
    )


def cases(threads):
    found = [one_batch(threads, *shape) for shape in SHAPES]
    return [*found, *(many_memories(threads, *shape) for shape in MEMORIES), episodic(threads)]
