"""SequenceReplay beside cpprb, Stable-Baselines3, torchrl, torch and NumPy, at Atari's shapes: 1e5 frames of 84 x 84 bytes.

Frames begin with their own number, so every contestant's batch is checked against what was stored. Where a peer lacks n-step returns or
priorities it is timed without; NumPy is what one writes by hand, drawn uniformly. Floor: the same bytes copied in runs as long, past the
caches, into an array that is reused.
"""

import ctypes
import logging
from functools import lru_cache, partial
from operator import attrgetter, itemgetter
from types import SimpleNamespace

import numpy as np
import torch

from bench.floors import gathers
from bench.harness import Case, optional
from urlfast import Field, SequenceReplay

cpprb = optional("cpprb")
gymnasium = optional("gymnasium")
sb3 = optional("stable_baselines3.common.buffers")
torchrl = optional("torchrl.data")
tensordict = optional("tensordict")

STREAMS, ROWS, FRAME = 8, 12_500, (1, 84, 84)  # each stream is one long episode
SEQUENCES, LENGTH, STRIDE, STACK = 64, 120, 40, 4
RUN = LENGTH + STACK - 1  # frames of a sequence, each held once


# What is stored ----------------------------------------------------------------------------------------------------------------


@lru_cache(1)
def stored_frames():
    """[stream, row, 84, 84], each beginning with its number, from 1: uint32."""
    frames = np.random.default_rng(0).integers(0, 256, (STREAMS, ROWS, 84, 84), np.uint8)
    frames.reshape(STREAMS, ROWS, -1)[..., :4] = np.arange(1, STREAMS * ROWS + 1, dtype=np.uint32).reshape(STREAMS, ROWS, 1).view(np.uint8)
    return frames


def flags(row, streams):
    """is_first and is_last are never set but in the first row, terminated never."""
    return {"terminated": np.zeros(streams, bool), "is_first": np.full(streams, row == 0), "is_last": np.zeros(streams, bool)}


def replay_of(frames, **options):
    fields = {"observation": Field(FRAME, "uint8"), "action": Field((), "int64")}
    if "sequence_length" in options:
        fields["state"] = Field((2, 512), "float32", every=STRIDE)
    replay = SequenceReplay(frames.shape[0] * frames.shape[1], fields, num_streams=len(frames), frame_stack=STACK, **options)
    state = {"state": np.zeros((len(frames), 2, 512), np.float32)} if "state" in fields else {}
    for t in range(frames.shape[1]):
        row = {"observation": frames[:, t, None], "action": np.full(len(frames), t), "reward": np.ones(len(frames), np.float32)}
        replay.add({**row, **state, **flags(t, len(frames))})
    return replay


def stacks(frames):
    """[row, ...] -> [row, 4, ...], a view: of rows from the fourth on, oldest frame first."""
    return np.lib.stride_tricks.sliding_window_view(frames, STACK, axis=0).transpose(0, 3, 1, 2)


def numbers(frames):
    """[..., 84, 84] -> the numbers that frames carry; 0 where there is padding."""
    frames = np.ascontiguousarray(frames)
    return frames.reshape(*frames.shape[:-2], -1)[..., :4].copy().view(np.uint32)[..., 0].astype(np.int64)


def check_runs(results):
    """Every row of frames [B, n, 84, 84] follows the one before in its stream, zeros come before a stream's first row alone and leave a
    frame of a stack, and the first two items are what was stored, byte for byte."""
    for name, frames in results.items():
        frames = np.asarray(frames)
        found = numbers(frames)
        padding = (found == 0).sum(1, keepdims=True)
        assert padding.max() < STACK, f"{name}: zeros instead of frames"
        first = np.take_along_axis(found, padding, 1)
        order = first + np.arange(found.shape[1]) - padding
        assert (found == np.where(order < first, 0, order)).all(), f"{name}: frames that do not follow each other"
        assert ((first - 1) % ROWS == 0)[padding > 0].all(), f"{name}: zeros within a stream"
        assert ((first - 1) // ROWS == (found[:, -1:] - 1) // ROWS).all(), f"{name}: frames of two streams"
        stored = stored_frames().reshape(-1, 84, 84)[found[:2] - 1]
        np.testing.assert_array_equal(np.where((found[:2] == 0)[..., None, None], 0, stored), frames[:2], err_msg=name)


# Sequences: 64 of 120 rows, 40 of them burn-in, with stacks of 4 and a recurrent state -------------------------------------------


def ours_prioritised():
    options = dict(sequence_length=LENGTH, stride=STRIDE, burn_in=40, priority_exponent=0.9, importance_exponent=0.6)
    return replay_of(stored_frames(), **options)


def cpprb_prioritised():
    """A sequence is an item, overlaps stored again."""
    starts = [(s, t) for s in range(STREAMS) for t in range(0, ROWS - RUN, STRIDE)]
    fields = {"obs": {"shape": (RUN, 84, 84), "dtype": np.uint8}, "state": {"shape": (2, 512)}}
    buffer = cpprb.PrioritizedReplayBuffer(len(starts), fields, alpha=0.9)
    for s, t in starts:
        buffer.add(obs=stored_frames()[s, t : t + RUN], state=np.zeros((2, 512), np.float32))
    return buffer


def torchrl_slices():
    """Its faster sampler: without priorities, and told that the buffer stands still."""
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    sampler = torchrl.SliceSampler(slice_len=RUN, traj_key="episode", cache_values=True)
    storage = torchrl.LazyTensorStorage(STREAMS * ROWS)
    buffer = torchrl.TensorDictReplayBuffer(storage=storage, sampler=sampler, batch_size=SEQUENCES * RUN)
    episode = torch.arange(STREAMS).repeat_interleave(ROWS)
    frames = torch.from_numpy(stored_frames().reshape(-1, 84, 84))
    buffer.extend(tensordict.TensorDict({"frame": frames, "episode": episode}, batch_size=[STREAMS * ROWS]))
    return buffer


def sequence_stores():
    return stored_frames(), SimpleNamespace(
        urlfast=ours_prioritised(), cpprb=cpprb and cpprb_prioritised(), torchrl=torchrl and torchrl_slices()
    )


def kept(fill, memory={}):  # noqa: B006
    """What `fill` made the last time, unless another was asked for in between: all of them at once do not fit everywhere."""
    if fill not in memory:
        memory.clear()
        memory[fill] = fill()
    return memory[fill]


def random_starts(rng, count, run):
    """Rows of the flat store at which `count` runs of `run` frames begin, none of them across streams."""
    return rng.integers(0, STREAMS, count) * ROWS + rng.integers(0, ROWS - run, count)


def numpy_runs(count, run):
    """Uniform draws, frames taken into an array that is reused."""

    def make(frames, _):
        rng, flat, out = np.random.default_rng(0), frames.reshape(-1, 84, 84), np.empty((count * run, 84, 84), np.uint8)

        def call():
            rows = random_starts(rng, count, run)[:, None] + np.arange(run)
            np.take(flat, rows.reshape(-1), 0, out=out, mode="clip")
            return out.reshape(count, run, 84, 84)

        return call

    return make


def torch_runs(count, run):
    def make(frames, _):
        rng, flat = np.random.default_rng(0), torch.from_numpy(frames.reshape(-1, 84, 84))
        out = torch.empty((count * run, 84, 84), dtype=torch.uint8)

        def call():
            rows = random_starts(rng, count, run)[:, None] + np.arange(run)
            torch.index_select(flat, 0, torch.from_numpy(rows.reshape(-1)), out=out)
            return out.view(count, run, 84, 84)

        return call

    return make


def copies(count, run, threads):
    """The floor: `count` runs of `run` frames."""

    def make(frames, _):
        rng, size = np.random.default_rng(0), 84 * 84
        starts = [random_starts(rng, count, run) * size for _ in range(max(4, 20_000 // (count * run)))]
        return gathers(frames, np.empty(count * run * size, np.uint8), starts, run * size, threads)

    return make


def sequences(threads):
    return Case(
        "replay",
        "64 sequences of 120, stack 4",
        threads,
        partial(kept, sequence_stores),
        {
            "urlfast": lambda _, stores: lambda: stores.urlfast.sample(SEQUENCES).frames["observation"][:, :, 0],
            "cpprb": cpprb and (lambda _, stores: lambda: stores.cpprb.sample(SEQUENCES)["obs"]),
            "torchrl": torchrl and (lambda _, stores: lambda: stores.torchrl.sample()["frame"].view(SEQUENCES, RUN, 84, 84)),
            "NumPy": numpy_runs(SEQUENCES, RUN),
            "torch": torch_runs(SEQUENCES, RUN),
        },
        check_runs,
        floor=copies(SEQUENCES, RUN, threads),
        targets={"cpprb": 2.0 if threads == 1 else 3.5, "floor": 0.85},
    )


# Transitions: the stacks of o_t and o_{t+10} -------------------------------------------------------------------------------------


def ours_n_step():
    return replay_of(stored_frames(), n_step=10, gamma=0.99)


def cpprb_n_step(streams=STREAMS, rows=ROWS):
    stack = {"shape": (84, 84, STACK), "dtype": np.uint8}
    fields = {"obs": stack, "next_obs": stack, "act": {"dtype": np.int64}, "rew": {}, "done": {}}
    n_step = {"size": 10, "gamma": 0.99, "rew": "rew", "next": "next_obs"}
    buffer = cpprb.ReplayBuffer(streams * rows, fields, stack_compress=["obs", "next_obs"], Nstep=n_step)
    for frames in stored_frames()[:streams, :rows]:
        view = stacks(frames).transpose(0, 2, 3, 1)
        for t in range(0, len(view) - 1, 500):
            n = min(500, len(view) - 1 - t)
            rest = {"act": np.zeros(n), "rew": np.ones(n), "done": np.zeros(n)}
            buffer.add(obs=view[t : t + n], next_obs=view[t + 1 : t + 1 + n], **rest)
        buffer.on_episode_end()
    return buffer


def sb3_stacks(streams=STREAMS, rows=ROWS):
    """One step: its n-step buffer keeps both stacks, and is slower. Filled by hand, which is what its add would do row by row."""
    space = gymnasium.spaces.Box(0, 255, (STACK, 84, 84), np.uint8)
    options = dict(n_envs=streams, optimize_memory_usage=True, handle_timeout_termination=False)
    buffer = sb3.ReplayBuffer((rows - STACK + 1) * streams, space, gymnasium.spaces.Discrete(9), "cpu", **options)
    for s in range(streams):
        buffer.observations[:, s] = stacks(stored_frames()[s, :rows])
    buffer.full = True
    return buffer


def n_step_stores():
    return stored_frames(), SimpleNamespace(urlfast=ours_n_step(), cpprb=cpprb and cpprb_n_step(), sb3=sb3 and sb3_stacks())


class NumpyColumns:
    """What one writes by hand: action, n-step return, discount of uniformly drawn rows, from flat columns."""

    def __init__(self, rows, action, n, gamma=0.99):
        self.action, self.reward, self.terminated = np.zeros((rows, *action)), np.ones(rows, np.float32), np.zeros(rows, bool)
        self.n, self.gamma, self.discount = n, (gamma ** np.arange(n)).astype(np.float32), gamma**n

    def sample(self, first):
        window = first[:, None] + np.arange(self.n)
        alive = np.cumprod(~self.terminated[window], axis=1)
        before = np.concatenate([np.ones_like(alive[:, :1]), alive[:, :-1]], axis=1)
        return self.action[first], (self.reward[window] * before * self.gamma).sum(1), alive[:, -1] * self.discount


def numpy_transitions(batch):
    def make(frames, _):
        rng, flat, out = np.random.default_rng(0), frames.reshape(-1, 84, 84), np.empty((2 * batch * STACK, 84, 84), np.uint8)
        columns = NumpyColumns(len(flat), (), 10)

        def call():
            first = random_starts(rng, batch, STACK + 10)
            columns.sample(first + STACK - 1)
            rows = np.stack([first, first + 10])[..., None] + np.arange(STACK)
            np.take(flat, rows.reshape(-1), 0, out=out, mode="clip")
            return out.reshape(2, batch, STACK, 84, 84)

        return call

    return make


def transitions(threads, batch):
    # both stacks, by the names each gives them
    of_ours, of_cpprb = attrgetter("observation", "next_observation"), itemgetter("obs", "next_obs")
    of_sb3 = attrgetter("observations", "next_observations")
    return Case(
        "replay",
        f"{batch} transitions, stack 4, n 10",
        threads,
        partial(kept, n_step_stores),
        {
            "urlfast": lambda _, stores: lambda: of_ours(stores.urlfast.sample(batch)),
            "cpprb": cpprb and (lambda _, stores: lambda: of_cpprb(stores.cpprb.sample(batch))),
            "Stable-Baselines3": sb3 and (lambda _, stores: lambda: of_sb3(stores.sb3.sample(batch))),
            "NumPy": numpy_transitions(batch),
        },
        check_transitions,
        floor=copies(2 * batch, STACK, threads),
        targets={"cpprb": 1.0 if batch == 32 else 2.0} if threads == 2 else {},
    )


def check_transitions(results):
    """Both stacks are runs of stored frames, the same number of steps apart in every row (less where a stream ends)."""
    for name, pair in results.items():
        obs, later = (np.asarray(x) for x in pair)
        if obs.shape[-1] == STACK:
            obs, later = np.moveaxis(obs, -1, 1), np.moveaxis(later, -1, 1)
        check_runs({name: obs})
        check_runs({name: later})
        steps = numbers(later)[:, -1] - numbers(obs)[:, -1]
        assert np.mean(steps == np.median(steps)) > 0.9 and np.median(steps) in (1, 10), f"{name}: {steps} steps apart"


# Rows without images: 24 floats, one step ---------------------------------------------------------------------------------------

VECTOR, ACTION, BATCH = 24, 6, 1024


def vectors():
    """[row, 24]: row t holds t."""
    return (np.arange(STREAMS * ROWS, dtype=np.float32)[:, None] + np.zeros(VECTOR, np.float32),)


def ours_vectors(rows):
    fields = {"observation": Field((VECTOR,), "float32"), "action": Field((ACTION,), "float32")}
    replay = SequenceReplay(len(rows), fields, num_streams=1, n_step=1, gamma=0.99)
    for t, row in enumerate(rows):
        replay.add({"observation": row[None], "action": np.zeros((1, ACTION), np.float32), "reward": np.ones(1, np.float32), **flags(t, 1)})

    def call():
        found = replay.sample(BATCH)
        return found.observation, found.next_observation

    return call


def cpprb_vectors(rows):
    fields = {"obs": {"shape": VECTOR}, "act": {"shape": ACTION}, "rew": {}, "done": {}}
    buffer = cpprb.ReplayBuffer(len(rows), fields, next_of="obs")
    n = len(rows) - 1
    buffer.add(obs=rows[:-1], next_obs=rows[1:], act=np.zeros((n, ACTION)), rew=np.ones(n), done=np.zeros(n))

    def call():
        found = buffer.sample(BATCH)
        return found["obs"], found["next_obs"]

    return call


def sb3_vectors(rows):
    spaces = [gymnasium.spaces.Box(-np.inf, np.inf, (n,), np.float32) for n in (VECTOR, ACTION)]
    buffer = sb3.ReplayBuffer(len(rows), *spaces, "cpu")
    buffer.observations[:, 0], buffer.next_observations[:-1, 0] = rows, rows[1:]
    buffer.pos = len(rows) - 1

    def call():
        found = buffer.sample(BATCH)
        return found.observations, found.next_observations

    return call


def numpy_vectors(rows):
    rng, out = np.random.default_rng(0), np.empty((2, BATCH, VECTOR), np.float32)
    columns = NumpyColumns(len(rows), (ACTION,), 1)

    def call():
        chosen = rng.integers(0, len(rows) - 1, BATCH)
        columns.sample(chosen)
        np.take(rows, chosen, 0, out=out[0], mode="clip")
        np.take(rows, chosen + 1, 0, out=out[1], mode="clip")
        return out

    return call


def check_vectors(results):
    for name, (obs, later) in results.items():
        assert (np.asarray(later) == np.asarray(obs) + 1).all(), f"{name}: not one step apart"


def vector_transitions(threads):
    return Case(
        "replay",
        f"{BATCH:,} transitions of {VECTOR} floats",
        threads,
        vectors,
        {"urlfast": ours_vectors, "cpprb": cpprb and cpprb_vectors, "Stable-Baselines3": sb3 and sb3_vectors, "NumPy": numpy_vectors},
        check_vectors,
        floor=lambda rows: gathers(
            rows,
            np.empty((2, BATCH, VECTOR), np.float32),
            [np.random.default_rng(i).integers(0, len(rows), 2 * BATCH) * 4 * VECTOR for i in range(16)],
            4 * VECTOR,
            1,  # so few bytes are not worth a second thread
        ),
    )


# Priorities of 64 sequences ------------------------------------------------------------------------------------------------------


def ours_priorities(td):
    fields = {"observation": Field((4,), "float32")}
    replay = SequenceReplay(100_000, fields, num_streams=STREAMS, sequence_length=LENGTH, stride=STRIDE, burn_in=40, priority_exponent=0.9)
    row = {"observation": np.zeros((STREAMS, 4), np.float32), "reward": np.zeros(STREAMS, np.float32)}
    for t in range(ROWS):
        replay.add({**row, **flags(t, STREAMS)})
    indices = replay.sample(SEQUENCES).indices.copy()

    def call(td=td):
        replay.update_priorities(indices, td)

    return call, lambda: replay.sample(SEQUENCES).indices == indices[0]


def cpprb_priorities(td):
    buffer = cpprb.PrioritizedReplayBuffer(STREAMS * ROWS // STRIDE, {"obs": {"shape": 4}}, alpha=0.9)
    buffer.add(obs=np.zeros((STREAMS * ROWS // STRIDE, 4)))
    indices = np.arange(SEQUENCES)

    def call(td=td):
        buffer.update_priorities(indices, 0.9 * td.max(1) + 0.1 * td.mean(1))

    return call, lambda: buffer.sample(SEQUENCES)["indexes"] == 0


def tried(make):
    """The call, once it has shown that an item of overwhelming priority is nearly all that is drawn."""

    def checked(td):
        call, is_first = make(td)
        high = td.copy()
        high[0] = 1e6
        call(high)
        assert np.mean(is_first()) > 0.9, make.__name__
        call()
        return call

    return checked


def priorities():
    contestants = {"urlfast": ours_priorities, "cpprb": cpprb and cpprb_priorities}
    return Case(
        "replay",
        "priorities of 64 sequences",
        1,
        lambda: (np.random.default_rng(0).random((SEQUENCES, LENGTH - 41), np.float32),),
        {name: make and tried(make) for name, make in contestants.items()},
        lambda results: None,
        targets={"cpprb": 4.0},
    )


# A row added, and what it takes --------------------------------------------------------------------------------------------------


RING = 4000  # rows; long since full, so that no call meets memory for the first time


def ours_add(stack):
    fields = {"observation": Field(FRAME, "uint8"), "action": Field((), "int64")}
    replay = SequenceReplay(RING, fields, num_streams=1, n_step=10, gamma=0.99, frame_stack=STACK)
    row = {"observation": stack[-1:, None], "action": np.zeros(1, np.int64), "reward": np.ones(1, np.float32)}
    replay.add({**row, **flags(0, 1)})
    row |= flags(1, 1)
    return lambda: replay.add(row)


def cpprb_add(stack):
    fields = {"obs": {"shape": (84, 84, STACK), "dtype": np.uint8}, "act": {"dtype": np.int64}, "rew": {}, "done": {}}
    buffer = cpprb.ReplayBuffer(RING, fields, next_of="obs", stack_compress="obs")
    stack = np.ascontiguousarray(np.moveaxis(stack, 0, -1))
    return lambda: buffer.add(obs=stack, next_obs=stack, act=0, rew=1.0, done=0.0)


def sb3_add(stack):
    space = gymnasium.spaces.Box(0, 255, (STACK, 84, 84), np.uint8)
    options = dict(optimize_memory_usage=True, handle_timeout_termination=False)
    buffer = sb3.ReplayBuffer(RING, space, gymnasium.spaces.Discrete(9), "cpu", **options)
    action, reward, done = np.zeros((1, 1)), np.ones(1), np.zeros(1)
    return lambda: buffer.add(stack[None], stack[None], action, reward, done, [{}])


def filled(make):
    def and_full(stack):
        call = make(stack)
        for _ in range(RING + 100):
            call()
        return call

    return and_full


def add():
    return Case(
        "replay",
        "one row added, 84 x 84",
        1,
        lambda: (stored_frames()[0, :STACK],),
        {"urlfast": filled(ours_add), "cpprb": cpprb and filled(cpprb_add), "Stable-Baselines3": sb3 and filled(sb3_add)},
        lambda results: None,
        targets={"at most": 5e-6},
    )


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def grown(fill):
    """Bytes of memory a row takes, of 2 x 4,000 rows."""

    def make():
        def call():
            stored_frames()  # made once for all, and not counted
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # memory that was freed before would take rows without growing
            if trim is not None:
                trim(0)
            before = resident()
            buffer = fill(2, 4000)
            grown = resident() - before
            del buffer
            return grown / 8000

        return call

    return make


def check_bytes(results):
    """A row is a frame at least: who takes less has not stored it, or has written where memory was before."""
    for name, found in results.items():
        assert found >= 84 * 84, f"{name}: {found:.0f} bytes a row"


def memory():
    return Case(
        "replay",
        "bytes a row takes, stack 4, n 10",
        1,
        lambda: (),
        {
            "urlfast": grown(lambda streams, rows: replay_of(stored_frames()[:streams, :rows], n_step=10, gamma=0.99)),
            "cpprb": cpprb and grown(cpprb_n_step),
            "Stable-Baselines3": sb3 and grown(sb3_stacks),
        },
        check_bytes,
        targets={"at most": 7200},
        unit="B",
    )


def cases(threads):
    found = [sequences(threads), transitions(threads, 32), transitions(threads, 512)]
    return [*found, vector_transitions(threads), priorities(), add(), memory()] if threads == 1 else found
