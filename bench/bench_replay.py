"""SequenceReplay beside the copies it cannot do without, plain NumPy and cpprb (where installed), at Atari's shapes.

The floor copies the same bytes, run by run, with memcpy on as many threads. `pytest bench/bench_replay.py --benchmark-group-by=group`.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import urlfast
from urlfast import Field, SequenceReplay

FRAME, STREAMS, ROWS, EPISODE = (1, 84, 84), 8, 4000, 500
THREADS = [1, 2]


def filled(**options):
    """Frames whose first bytes are their row numbers, and the same frames as one array [stream, row, ...]."""
    fields = {"observation": Field(FRAME, "uint8"), "action": Field((), "int64")}
    if options.get("sequence_length"):
        fields["state"] = Field((2, 512), "float32", every=options["stride"])
    replay = SequenceReplay(STREAMS * ROWS, fields, num_streams=STREAMS, frame_stack=4, **options)
    frames = np.random.default_rng(0).integers(0, 256, (STREAMS, ROWS, *FRAME), dtype=np.uint8)
    for t in range(ROWS):
        first, last = np.full(STREAMS, t % EPISODE == 0), np.full(STREAMS, t % EPISODE == EPISODE - 1)
        rows = {"observation": frames[:, t], "action": np.full(STREAMS, t), "reward": np.ones(STREAMS, np.float32)}
        if "state" in fields:
            rows["state"] = np.zeros((STREAMS, 2, 512), np.float32)
        replay.add({**rows, "terminated": np.zeros(STREAMS, bool), "is_first": first, "is_last": last})
    return replay, frames


@pytest.fixture(scope="module")
def transitions():
    return filled(n_step=10, gamma=0.99)


@pytest.fixture(scope="module")
def sequences():
    return filled(sequence_length=120, stride=40, burn_in=40, priority_exponent=0.9, importance_exponent=0.6)


def starts(rng, count, length):
    """`count` runs of `length` frames, as (stream, row), none of them across an episode."""
    return rng.integers(0, STREAMS, count), rng.integers(0, ROWS // EPISODE, count) * EPISODE + rng.integers(0, EPISODE - length, count)


def copies(frames, out, threads):
    """memcpy of random runs into the rows of `out` [count, length, ...]."""
    rng, pool = np.random.default_rng(0), ThreadPoolExecutor(threads)
    count, length = out.shape[:2]

    def part(chosen, where):
        for i in where:
            np.copyto(out[i], frames[chosen[0][i], chosen[1][i] : chosen[1][i] + length])

    def call():
        chosen = starts(rng, count, length)
        list(pool.map(lambda where: part(chosen, where), np.array_split(np.arange(count), threads)))

    return call


def takes(frames, out):
    rng, flat = np.random.default_rng(0), frames.reshape(-1, *FRAME)
    count, length = out.shape[:2]

    def call():
        s, t = starts(rng, count, length)
        np.take(flat, ((s * ROWS + t)[:, None] + np.arange(length)).reshape(-1), 0, out=out.reshape(-1, *FRAME), mode="clip")

    return call


def run(benchmark, call, group, threads, rounds):
    benchmark.group = f"{group}, {threads} thread{'s' * (threads > 1)}"
    before = urlfast.ops._core.num_threads()
    urlfast.set_num_threads(threads)
    try:
        benchmark.pedantic(call, rounds=rounds, iterations=1, warmup_rounds=3)
    finally:
        urlfast.set_num_threads(before)


def check_transitions(replay, frames):
    batch = replay.sample(64)
    for i, index in enumerate(batch.indices):
        t, s = divmod(int(index), STREAMS)
        for array, row in ((batch.observation, t), (batch.next_observation, t + int(batch.steps[i]))):
            known = min(4, row % EPISODE + 1)
            np.testing.assert_array_equal(array[i, 4 - known :], frames[s, row - known + 1 : row + 1, 0])
            assert not array[i, : 4 - known].any()


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("size", [32, 512])
@pytest.mark.parametrize("name", ["urlfast", "floor", "numpy", "cpprb"])
def test_transitions(benchmark, transitions, name, size, threads):
    replay, frames = transitions
    check_transitions(replay, frames)
    out = np.empty((2 * size, 4, *FRAME), np.uint8)
    if name == "cpprb":
        cpprb = pytest.importorskip("cpprb")
        shape = {"shape": (84, 84, 4), "dtype": np.uint8}
        fields = {"obs": shape, "act": {"dtype": np.int64}, "rew": {}, "done": {}}
        peer = cpprb.ReplayBuffer(STREAMS * ROWS, fields, next_of="obs", stack_compress="obs")
        stack = np.zeros((84, 84, 4), np.uint8)
        for s, t in np.ndindex(STREAMS, ROWS):
            newer = np.concatenate([stack[..., 1:], frames[s, t, 0][..., None]], -1)
            peer.add(obs=stack, act=t, rew=1.0, next_obs=newer, done=0.0)
            stack = newer
        call = lambda: peer.sample(size)  # noqa: E731
    else:
        call = {"urlfast": lambda: replay.sample(size), "floor": copies(frames, out, threads), "numpy": takes(frames, out)}[name]
    run(benchmark, call, f"transitions, B = {size}", threads, 100)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("name", ["urlfast", "floor", "numpy", "cpprb"])
def test_sequences(benchmark, sequences, name, threads):
    replay, frames = sequences
    batch = replay.sample(16)
    for i, index in enumerate(batch.indices):
        t, s = divmod(int(index), STREAMS)
        rows = int(batch.mask[i].sum()) + 1
        np.testing.assert_array_equal(batch.observation[i, :rows, -1], frames[s, t : t + rows, 0])
    if name == "cpprb":
        cpprb = pytest.importorskip("cpprb")
        peer = cpprb.PrioritizedReplayBuffer(400, {"obs": {"shape": (123, 84, 84), "dtype": np.uint8}, "state": {"shape": (2, 512)}})
        for i in range(400):
            peer.add(obs=frames[i % STREAMS, 8 * i : 8 * i + 123, 0], state=np.zeros((2, 512), np.float32))
        call = lambda: peer.sample(64)  # noqa: E731
    else:
        out = np.empty((64, 123, *FRAME), np.uint8)
        call = {"urlfast": lambda: replay.sample(64), "floor": copies(frames, out, threads), "numpy": takes(frames, out)}[name]
    run(benchmark, call, "sequences, B = 64, T = 120", threads, 30)


@pytest.mark.parametrize("name", ["urlfast", "cpprb"])
def test_priorities(benchmark, sequences, name):
    replay, _ = sequences
    td = np.random.default_rng(0).random((64, 79), np.float32)
    if name == "cpprb":
        cpprb = pytest.importorskip("cpprb")
        peer = cpprb.PrioritizedReplayBuffer(4000, {"obs": {"shape": (4,)}})
        peer.add(obs=np.zeros((4000, 4), np.float32))
        indices = peer.sample(64)["indexes"]
        call = lambda: peer.update_priorities(indices, 0.9 * td.max(1) + 0.1 * td.mean(1))  # noqa: E731
    else:
        indices = replay.sample(64).indices.copy()
        call = lambda: replay.update_priorities(indices, td)  # noqa: E731
    run(benchmark, call, "priorities of 64 sequences", 1, 1000)


@pytest.mark.parametrize("streams", [1, 8])
def test_add(benchmark, streams):
    replay = SequenceReplay(
        4000, {"observation": Field(FRAME, "uint8"), "action": Field((), "int64")}, num_streams=streams, n_step=10, gamma=0.99
    )
    flags = {"terminated": np.zeros(streams, bool), "is_first": np.ones(streams, bool), "is_last": np.zeros(streams, bool)}
    stacks = np.zeros((streams, 4, 84, 84), np.uint8)
    rows = {"observation": stacks[:, -1:], "action": np.zeros(streams, np.int64), "reward": np.zeros(streams, np.float32), **flags}
    for _ in range(4100):
        replay.add(rows)
    run(benchmark, lambda: replay.add(rows), f"add, {streams} streams", 1, 2000)
