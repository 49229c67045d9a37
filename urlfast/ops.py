"""The thin Python face of the native core. Needs NumPy alone; torch is looked for only where the caller has it already."""

from __future__ import annotations

import contextlib
import json
import operator
import os
import re
import reprlib
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

try:
    from urlfast import _core
except ImportError as error:
    raise ImportError(
        f"urlfast's native extension could not be loaded ({error}).\n"
        "It is compiled at installation: from a checkout, run `pip install .`; after an update of Python or a move to another machine,\n"
        "run `pip install --force-reinstall --no-deps urlfast`. When working inside the checkout, mind that `urlfast/` there hides the\n"
        "installed package: run from another folder, or install with `pip install --no-build-isolation -e .`."
    ) from error

__version__: str = _core.__version__
Array = Any  # of NumPy, torch, CuPy or JAX; each function says where and of which dtype


def set_num_threads(n: int) -> None:
    """Threads that the native core uses on the CPU from the next call on, 1..4096; OMP_NUM_THREADS, or the cores, until this is called.

    No result depends on it. Raises TypeError (no int) and ValueError (out of that range).
    """
    _core.set_num_threads(n)


def get_num_threads() -> int:
    """Threads that the native core uses on the CPU."""
    return _core.num_threads()


def _detached(array):
    """A torch tensor without its gradient history (sharing its memory); anything else as it is."""
    torch = sys.modules.get("torch")
    return array.detach() if torch is not None and isinstance(array, torch.Tensor) and array.requires_grad else array


# knn ------------------------------------------------------------------------------------------------------------------


def knn(
    queries: Array, keys: Array | None = None, k: int = 12, *, lengths: Sequence[int] | None = None, include_self: bool = True
) -> tuple[Array, Array]:
    """The k nearest rows of `keys` to each row of `queries`: Euclidean, exact, ascending, ties to the lowest index.

    queries: (B, D), or (S, B, D) for S independent problems; float16, bfloat16, float32 or float64, finite, C-contiguous; NumPy, torch,
        CuPy or JAX, on CPU or CUDA.
    keys: (M, D) or (S, M, D), like queries. None: each batch is its own pool, and a row is its own first neighbour.
    k: 1 <= k <= M.
    lengths: S host integers in 0..M, with keys (S, M, D): problem s sees keys[s, :lengths[s]] alone, and nothing is copied. Any k >= 1 is
        then accepted.
    include_self: False excludes each row from its own neighbours, by index (duplicates of it stay); then k <= B - 1. Not with keys.
    Returns (distances, indices), (B, k) or (S, B, k), in queries' library, on queries' device, without gradient: float64 for float64 and
    float32 otherwise (computed in that precision, from differences, so a large mean costs no digits); int64, of which JAX makes int32
    unless jax_enable_x64 is set. Where a problem has fewer than k keys, rows end in infinity and -1. Deterministic, whatever the number
    of threads. Of values above 1e15 beside small ones, float32 distances below 1e-24 of the largest value are 0: give float64 there.
    Raises TypeError (no array, dtype, a wrong type), ValueError (shape, layout, k, lengths, devices; on the CPU also NaN or infinity in
    rows in use: on CUDA NaN propagates instead).
    """
    return _core.knn(_detached(queries), _detached(keys), k, lengths, include_self)


def knn_reward(
    z: Array,
    k: int = 12,
    memory: Array | None = None,
    *,
    lengths: Sequence[int] | None = None,
    reduction: Literal["mean", "kth"] = "mean",
    exponent: float = 1.0,
    c: float = 1.0,
    include_self: bool = True,
    normalizer: RunningNormalizer | None = None,
    update_normalizer: bool = True,
) -> Array:
    """Particle-entropy reward: log(c + mean over the k nearest neighbours of distance ** exponent), for each row of z.

    z: (B, D), or (S, B, D) for S independent batches; float16, bfloat16, float32 or float64, finite, C-contiguous; NumPy, torch, CuPy or
        JAX, on CPU or CUDA.
    k: 1 <= k <= the rows of the pool.
    memory: (M, D) or (S, M, D), like z: the neighbours come from here. None: the batch is its own pool, and a row counts as the first of
        its own k neighbours, at distance 0, as in the released APT and URLB code.
    lengths: S host integers in 0..M, with memory (S, M, D): batch s sees memory[s, :lengths[s]] alone, and nothing is copied. The mean is
        over min(k, length) neighbours; an empty memory gives log(c). Any k >= 1 is then accepted.
    reduction: "mean" over the neighbours, or "kth": the farthest of them alone.
    include_self: False excludes each row from its own neighbours, by index; then k <= B - 1. Not with memory.
    normalizer: a RunningNormalizer of shape () on z's device. The neighbours' distances (with "kth" the k-th ones) first update it, unless
        update_normalizer is False, and are then divided by its scale, clipped if it clips, raised to the exponent and reduced.
    Returns (B,) or (S, B), float64 for float64 and float32 otherwise, in z's library, on z's device; carries no gradient. No B x M matrix
    is ever made. Deterministic, whatever the number of threads.
    Raises TypeError (no array, dtype, a wrong type), ValueError (shape, layout, k, lengths, reduction, exponent <= 0, c <= 0, devices, the
    normalizer's shape; on the CPU also NaN or infinity in rows in use: on CUDA NaN propagates instead).
    Source: APT (Liu, Abbeel 2021), eq. 5 with exponent 1.
    """
    return _core.knn_reward(
        _detached(z), k, _detached(memory), lengths, reduction, exponent, c, include_self, normalizer, update_normalizer
    )


class EpisodicMemory(_core.EpisodicMemory):
    """The episodic memories of many actors, kept native: each asks for its nearest earlier embeddings and adds its new one, in one call.

    num_streams actors, each with a ring of `capacity` rows of `dim` float32 on `device` ("cpu" or "cuda[:N]"); memory is taken as rows are
    written on the CPU, and at once on CUDA (num_streams * capacity * dim * 4 bytes).
    k: neighbours that step returns. NGU's 10, not the 12 of knn and knn_reward, which is APT's: here no row is its own neighbour.

    step(embeddings, reset) -> distances (num_streams, k)
        embeddings: (num_streams, dim) float32, finite, C-contiguous, on `device`. reset: (num_streams,) bool, on `device` or the host.
        First empties the memories whose reset is set, so reset goes with the first embedding of an episode; then finds each stream's k
        lowest distances, ascending, Euclidean, ending in infinity while it holds fewer than k rows; then appends, over the oldest row
        where a memory is full. Distances are float32, in embeddings' library, on its device.
    lengths()                              rows held by each stream
    state_dict(), load_state_dict(state)   {"lengths": list, "rows": NumPy (sum of lengths, dim)}, for a memory of the same num_streams and
                                           dim, and at least the capacity that the rows need
    On the CPU, NaN or infinity in embeddings is a ValueError and changes nothing. On CUDA nothing waits for the device but state_dict,
    load_state_dict and lengths, and steps must be ordered by streams.
    Raises TypeError (no array, dtype, a wrong type), ValueError (everything else), naming the argument; RuntimeError where `device` is
    CUDA and none is usable.
    Source: the episodic memory of NGU (Badia et al. 2020), section 3.
    """

    def __init__(self, num_streams: int, capacity: int, dim: int, *, k: int = 10, device: Any = "cpu"):
        super().__init__(num_streams, capacity, dim, k, device)
        self._shown = f"EpisodicMemory({self.num_streams}, {self.capacity}, {self.dim}, k={self.k}, device={self.device!r})"

    def step(self, embeddings: Array, reset: Array) -> Array:
        return super().step(_detached(embeddings), reset)

    def __repr__(self):
        return self.__dict__.get("_shown", "EpisodicMemory(refused)")  # a traceback may show one whose native part was never made


# normaliser -----------------------------------------------------------------------------------------------------------


class RunningNormalizer(_core.RunningNormalizer):
    """Divides rewards or distances by a running statistic of them. It does not centre.

    mode      divides by                    as in
    "mean"    |M| + epsilon                 URLB's PBE and APS (distances, before the log); APT (rewards)
    "std"     sqrt(S + epsilon)             gymnasium's NormalizeReward, Stable-Baselines3's VecNormalize
    "var"     S + epsilon                   mini_apt and CIC, which divide by the variance
    "ema_abs" A + epsilon                   APV's StreamNorm: A <- momentum * A + (1 - momentum) * mean |x|, 1 at first

    M and S are the mean and the population variance of all values seen, with URLB's prior (M = 0, S = 1, weight 1e-4); URLB itself
    takes the sample variance of each batch. A normalizer that has seen nothing divides by 1.

    shape: () for one statistic over all values, (F,) for one per feature over the leading axes.
    clip: c takes c off after dividing and floors at 0, as URLB's PBE does (its knn_clip); None does neither.
    epsilon >= 0; momentum in [0, 1), used by "ema_abs" alone. device: where the data will be, "cpu" or "cuda[:N]".

    update(x)                 takes x (..., *shape) into the statistic
    normalize(x, out=None)    x divided by it
    normalizer(x, out=None)   both, in this order
    merge(other)              as if this one had seen the other's values too; ValueError for "ema_abs", whose average has an order
    state_dict(), load_state_dict(state)   floats, strings and lists; the statistic, not the arguments above
    scale                     what values are divided by now (NumPy float64)

    x: float16, bfloat16, float32 or float64, C-contiguous, not empty, on `device`; NumPy, torch, CuPy or JAX. Results are float64 for
    float64 and float32 otherwise, in x's library, and carry no gradient; `out` must have that dtype and may be x itself.
    The state is float64. Sums do not depend on the number of threads, nor suffer from a large mean. On the CPU, NaN or infinity in
    update(x) is a ValueError and changes nothing; normalize(x) passes them on. On CUDA nothing waits for the device, the work goes to
    the caller's current stream, and NaN or infinity enters the statistic: check what may hold it.
    Raises TypeError (no array, dtype, a wrong type), ValueError (everything else), naming the argument; RuntimeError where `device` is
    CUDA and none is usable.
    """

    def __init__(
        self,
        mode: Literal["mean", "std", "var", "ema_abs"] = "mean",
        *,
        shape: tuple[int, ...] = (),
        epsilon: float = 1e-8,
        clip: float | None = None,
        momentum: float = 0.99,
        device: Any = "cpu",
    ):
        super().__init__(mode, shape, epsilon, clip, momentum, device)
        arguments = f"{self.mode!r}, shape={self.shape}, epsilon={self.epsilon}, clip={self.clip}, momentum={self.momentum}"
        self._shown = f"RunningNormalizer({arguments}, device={self.device!r})"

    def __repr__(self):
        return self.__dict__.get("_shown", "RunningNormalizer(refused)")  # a traceback may show one whose native part was never made

    def __reduce__(self):  # for copy.deepcopy and pickle
        return _restored_normalizer, (self.mode, self.shape, self.epsilon, self.clip, self.momentum, self.device, self.state_dict())


def _restored_normalizer(mode, shape, epsilon, clip, momentum, device, state):
    normalizer = RunningNormalizer(mode, shape=shape, epsilon=epsilon, clip=clip, momentum=momentum, device=device)
    normalizer.load_state_dict(state)
    return normalizer


# replay ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """A column of a SequenceReplay: shape and dtype of one row. every=stride: kept and returned for a sequence's first row only."""

    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    every: int = 1


class Batch:
    """Arrays by name: `batch.reward` or `batch["reward"]`; `batch.keys()` lists them."""

    def __init__(self, arrays: dict[str, np.ndarray], frames: dict[str, np.ndarray]):
        self.__dict__.update(arrays)
        self.frames = frames

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.keys():
            raise KeyError(name)
        return self.__dict__[name]

    def keys(self) -> list[str]:
        return [name for name in self.__dict__ if name != "frames"]

    def __repr__(self) -> str:
        return "Batch(" + ", ".join(f"{name} {self[name].dtype}{list(self[name].shape)}" for name in self.keys()) + ")"


class SequenceReplay:
    """Rows of many environments in a ring; n-step transitions or sequences drawn from them, uniformly or by priority.

    A row is (o_t, what was done there, what that paid): every array of `fields`, and always reward float32, terminated, is_first, is_last
    bool. reward_t and terminated_t belong to leaving o_t; is_last_t says that nothing leaves o_t, so its reward and terminated are unused.
    A transition exists where neither is_last_t nor is_first_{t+1}: an is_first without an is_last before it is a cut, as after a resume.

    capacity: rows in all; each of the num_streams streams keeps its newest capacity // num_streams. What they take is computed first:
        MemoryError where less is available. A row is stored once, whatever n_step, frame_stack, sequence_length and stride are.
    expected_rows: rows that will really be added, where they are fewer: memory is taken as it fills, so only they must fit.
    fields: {name: Field(shape, dtype, every=1)}. "observation" is the one that is stacked, and that n_step batches hold twice.
    n_step, gamma: batches of windows of m = min(n_step, steps to the episode's end, steps to a terminated row), uniform over the complete
        ones (those of a running episode become so one by one). Arrays, a row per window: observation, next_observation (o_{t+m}), the
        other fields at t, reward = sum_i gamma^i r_{t+i}, discount = gamma^m * prod(1 - terminated), steps = m.
    sequence_length: otherwise, batches of L = sequence_length rows [B, L, ...], burn_in first and one last row to bootstrap from. They
        start at an episode's first row (or a cut) and every `stride` rows after it; a short tail keeps its start, is padded with zeros,
        and is drawn when it has a transition after the burn-in. mask [B, L-1] says which transitions exist; reward, terminated,
        is_first, is_last are [B, L]. cross_episodes=True: full chunks of the stream across resets, every `stride` rows from its first.
    frame_stack: observations become stacks of that many frames along their first axis, oldest first, zeros before the episode's start.
        In sequences they are strided views of batch.frames["observation"], [B, L + frame_stack - 1, ...], which holds each frame once:
        copy that one to a device.
    priority_exponent, importance_exponent, eta: an item is drawn in proportion to p^priority_exponent (kept in units of 2^-24, at least
        one), where p = eta * max|td| + (1 - eta) * mean|td| of its last update, or |td| with n_step. New items enter with the highest p
        seen (1 before any), or with what rows["priority"] says in the row they start with (NaN: the highest seen).
        weight = (number of items * probability)^-importance_exponent, divided by the largest of the batch; that exponent lies in [0, 1].
    ring: batches are NumPy arrays in `ring` sets of buffers used in turn: a batch stays intact during the next ring - 1 calls of sample.
        Where torch uses a GPU they are pinned: `torch.from_numpy(batch.reward).to(device, non_blocking=True)` does not wait, and what was
        queued on the current stream before the following call of sample is done before the memory is written again.
    storage="file": fields live in an unlinked scratch file in folder `path`, wholly reserved at the start: OSError if the disk is full.
    device: "cpu"; "cuda" or "cuda:N" keeps rows, priorities and batches there, and no call waits for it but save, load, stale_updates and a
        first sample of a larger batch. Draws are the CPU's (priorities agree up to the rounding of their power). Batches hold arrays for
        torch.from_dlpack and its like; update_priorities takes indices, td and mask on the device, where an index that was never handed out
        or a td that is not finite is dropped and counted in stale_updates. Calls run on the stream of the arrays they are given, else on
        torch's or CuPy's current one, each after all before it; taking an array by DLPack orders the stream that takes it, and memory is
        not written again before torch's streams that took it have finished. Keep a batch from other streams than those until the ring comes
        round only if you order them yourself. Not to be captured in a CUDA graph: copy the batch to the graph's inputs.
    seed: draws depend on it and on how often sample was called before, never on threads.

    One thread may add while another samples: a batch is never torn. Methods of a closed replay raise RuntimeError.
    A replay is not copied or pickled (TypeError): save and load write and read it.
    Raises TypeError (a wrong type, a dtype, not an array), ValueError (anything else wrong with an argument, which it names), MemoryError,
    OSError; RuntimeError where `device` is CUDA and none is usable.
    """

    def __init__(
        self,
        capacity: int,
        fields: dict[str, Field],
        *,
        num_streams: int,
        expected_rows: int | None = None,
        sequence_length: int | None = None,
        stride: int = 1,
        burn_in: int = 0,
        n_step: int | None = None,
        gamma: float | None = None,
        frame_stack: int | None = None,
        cross_episodes: bool = False,
        priority_exponent: float = 0.0,
        importance_exponent: float = 0.0,
        eta: float = 0.9,
        ring: int = 3,
        storage: str = "memory",
        path: str | os.PathLike | None = None,
        device: str = "cpu",
        seed: int = 0,
    ):
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self._open(options)

    def _open(self, options: dict, read_only: bool = False) -> None:
        """Everything that construction and load have in common."""
        options = dict(options)
        expected = options.pop("expected_rows")
        expected_rows = -1 if expected is None else _integer("expected_rows", expected)
        if expected is not None and expected_rows < 0:
            raise ValueError(f"expected_rows: must be at least 0, got {expected_rows}")
        fields, ring, path = options.pop("fields"), options.pop("ring"), options.pop("path")
        if not isinstance(fields, dict) or not all(isinstance(name, str) and isinstance(f, Field) for name, f in fields.items()):
            raise TypeError(f"fields: must be a dict of str to urlfast.Field, got {_shown(fields)}")
        columns = [_replay_column(name, f) for name, f in fields.items()]
        for name in ("capacity", "num_streams", "stride", "burn_in", "sequence_length", "n_step", "frame_stack"):
            if options[name] is not None or name in ("capacity", "num_streams", "stride", "burn_in"):
                options[name] = _integer(name, options[name])
        for name in ("gamma", "priority_exponent", "importance_exponent", "eta"):
            if options[name] is not None or name != "gamma":
                options[name] = _number(name, options[name])
        if not 1 <= (ring := _integer("ring", ring)) <= 1024:
            raise ValueError(f"ring: must lie in 1..1024, got {ring}")
        options["seed"] = _integer("seed", options["seed"], 0, 2**64)
        options["cross_episodes"] = _flag("cross_episodes", options["cross_episodes"])
        _check_storage(options["storage"], path)
        scratch = _path("path", path) if path is not None else tempfile.gettempdir()
        self._core = _core.SequenceReplay(options.pop("capacity"), columns, path=scratch, expected_rows=expected_rows, **options)
        self._options = {**options, "expected_rows": expected, "capacity": self._core.capacity(), "fields": fields, "ring": ring}
        self._stack = options["frame_stack"] if options["sequence_length"] is not None else None
        self._ring: list[tuple | None] = [None] * ring
        self._next = 0
        self._read_only = read_only
        self._saved = _Saved()

    # Rows in, batches out

    def add(self, rows: dict[str, np.ndarray], streams: np.ndarray | None = None) -> None:
        """Append one row to every stream, or row i to stream streams[i] (int64; a stream may stand there several times, oldest row first).

        rows: exactly this replay's columns, [N, ...] in their dtypes, each row contiguous; NumPy or by DLPack, on the CPU or, but for
            terminated, is_first and is_last, on the replay's device. Copied. A NaN reward is a ValueError, but not looked for on a device.
        rows["priority"]: float32, optional, with priority_exponent > 0 only.
        ValueError, with nothing appended, when a row is not is_first where its stream begins or after an is_last.
        """
        self._writable("add")
        self._core.add(rows, streams)

    def sample(self, B: int, out: dict[str, np.ndarray] | None = None) -> Batch:
        """B items, drawn with replacement. The batch stays intact during the next `ring` - 1 calls; one written to `out` is the caller's.

        out: arrays by name as `layout(B)` lists them, C-contiguous and writable (the NumPy face of pinned tensors, say).
        Every batch has indices int64 (the item; for update_priorities), probability and weight float32, [B].
        """
        B = _integer("B", B)
        if out is not None:
            if not isinstance(out, Mapping):
                raise TypeError(f"out: must be a dict of str to arrays, got {_shown(out)}")
            buffers, arrays, frames = self._views(self._core.into(B, dict(out)))
        else:
            place, self._next = self._next, (self._next + 1) % len(self._ring)
            if self._ring[place] is None or self._ring[place][0].batch != B:
                self._ring[place] = self._views(self._core.empty(B))
            buffers, arrays, frames = self._ring[place]
        self._core.sample(buffers)
        return Batch(arrays, frames)

    def _views(self, buffers) -> tuple:
        arrays, frames = buffers.arrays, {}
        if self._stack and self._stack > 1:
            array = frames["observation"] = arrays["observation"]
            if not isinstance(array, np.ndarray):
                arrays["observation"] = self._core.stacks(array, self._stack)
                return buffers, arrays, frames
            n, length, frame = array.shape[0], self._options["sequence_length"], array.shape[2:]
            arrays["observation"] = np.lib.stride_tricks.as_strided(
                array, (n, length, self._stack * frame[0], *frame[1:]), (*array.strides[:2], *array.strides[2:]), writeable=True
            )
        return buffers, arrays, frames

    def layout(self, B: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """{name: (shape, dtype)} of the arrays behind a batch of B, for `out`; stacked observations stand as single frames."""
        return {name: (shape, dtype) for name, shape, dtype in self._core.layout(_integer("B", B))}

    def update_priorities(self, indices: Array, td: Array, mask: Array | None = None) -> None:
        """Set the priorities of sampled items from their errors; with priority_exponent = 0 they are only checked.

        indices: int64 [B], of a batch. td: float32, [B] with n_step, else [B, L - 1 - burn_in]. mask: bool, like td; None: the transitions
        that exist. A row without any keeps its priority. Indices whose rows were overwritten meanwhile are ignored and counted
        (`stale_updates`); of repeated ones the last counts. td must be finite where it counts.
        """
        self._writable("update_priorities")
        self._core.update_priorities(indices, _detached(td), mask)

    def __len__(self) -> int:
        return self._core.size()

    @property
    def sampleable(self) -> int:
        """Items that can be drawn now: complete transitions or sequences."""
        return self._core.sampleable()

    @property
    def stale_updates(self) -> int:
        """Priority updates that came after their rows were overwritten."""
        return self._core.stale_updates()

    @property
    def capacity(self) -> int:
        """Rows it can hold: a multiple of num_streams."""
        return self._core.capacity()

    @property
    def num_streams(self) -> int:
        return self._options["num_streams"]

    @property
    def fields(self) -> dict[str, Field]:
        """As given at construction."""
        return dict(self._options["fields"])

    @property
    def bytes(self) -> int:
        """What a full replay takes, batches aside; with Field(every=stride), for episodes longer than the stride."""
        return self._core.bytes()

    def close(self) -> None:
        """Free the rows now. Batches already handed out stay."""
        self._core.close()
        self._ring = [None] * len(self._ring)

    def __repr__(self) -> str:
        if "_core" not in self.__dict__:  # a traceback may show one whose native part was never made
            return "SequenceReplay(refused)"
        return f"SequenceReplay({self.capacity} rows in {self.num_streams} streams, device={self._options['device']!r})"

    def __reduce__(self):  # what copy.copy, copy.deepcopy and pickle ask
        raise TypeError("SequenceReplay: cannot be copied or pickled; save(folder) writes it and SequenceReplay.load(folder) reads it")

    def _writable(self, what: str) -> None:
        if self._read_only:
            raise ValueError(f"{what}: this replay was loaded with read_only=True")

    # Files: rows-*.bin hold rows and never change, state-*.bin holds the rest of one save, manifest.json names what belongs together

    def save(self, folder: str | os.PathLike) -> list[str]:
        """Write what is new since the last save into `folder`, then its manifest.json; returns the names of the files this state needs.

        Rows go to one new file per save, priorities and counters to another; neither ever changes, and nothing is deleted: a copy of an
        older manifest.json stays loadable until `prune` is told that nobody keeps it. Every file is written under a name that begins with a
        dot, synced and renamed, the manifest last: a crash at any moment leaves the previous save whole. Another thread may go on adding.
        OSError, with errno and filename, when a file cannot be written: it is removed, and save works again once there is room.
        """
        self._writable("save")
        folder = os.path.realpath(_path("folder", folder))
        os.makedirs(folder, exist_ok=True)
        segments = self._saved.segments if self._saved.whole(folder) else []
        begin = segments[-1]["end"] if segments else [0] * self.num_streams
        number = max([int(name[1]) for name in map(_REPLAY_FILE.fullmatch, os.listdir(folder)) if name], default=0) + 1
        tag = f"{number:06d}-{os.urandom(6).hex()}.bin"
        rows, state = f"rows-{tag}", f"state-{tag}"
        made = [os.path.join(folder, "." + rows), os.path.join(folder, "." + state)]
        try:
            begin, end, size, crc, state_size, state_crc = self._core.save(*made, begin)
            kept = self.capacity // self.num_streams
            segments = [s for s in segments if any(b > e - kept for b, e in zip(s["end"], end, strict=True))]
            if begin != end:
                segments.append({"file": rows, "size": size, "crc32c": crc, "begin": begin, "end": end})
                os.rename(made[0], path := os.path.join(folder, rows))
                made[0] = path
            else:
                os.unlink(made.pop(0))
            os.rename(made[-1], path := os.path.join(folder, state))
            made[-1] = path
            sync_folder(folder)
            manifest = {
                "format": "urlfast-replay",
                "version": 1,
                "options": {name: value for name, value in self._options.items() if name not in ("fields", "storage", "device")},
                "fields": {name: [list(f.shape), np.dtype(f.dtype).name, f.every] for name, f in self._options["fields"].items()},
                "state": {"file": state, "size": state_size, "crc32c": state_crc},
                "segments": segments,
            }
            manifest["crc32c"] = _manifest_crc(manifest)
            made.append(os.path.join(folder, ".manifest.json"))
            with open(made[-1], "w") as file:
                json.dump(manifest, file)
                file.flush()
                os.fsync(file.fileno())
            os.rename(made[-1], os.path.join(folder, "manifest.json"))
        except Exception:  # not KeyboardInterrupt: one that comes just after the last rename must not undo it
            for path in made:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            raise
        sync_folder(folder)
        self._saved = _Saved(folder, segments)
        return [s["file"] for s in segments] + [state]

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        read_only: bool = False,
        *,
        manifest: str | os.PathLike | None = None,
        storage: str = "memory",
        path: str | os.PathLike | None = None,
        device: str = "cpu",
    ) -> SequenceReplay:
        """The replay that was saved; it goes on sampling exactly as that one would have. Its next save into `folder` writes what is new.

        manifest: a copy of an older manifest.json; None: the folder's own. storage, path, device: as at construction.
        read_only: for reports: takes the memory of the rows held alone (on the CPU); add, update_priorities and save are refused.
        ValueError names the file that is missing, truncated, damaged (every file has a checksum) or not a saved replay's.
        """
        folder = os.path.realpath(_path("folder", folder))
        read_only = _flag("read_only", read_only)
        _check_storage(storage, path)
        source = os.path.join(folder, "manifest.json") if manifest is None else _path("manifest", manifest)
        saved = _read_manifest(source)
        try:
            fields = {name: Field(tuple(shape), dtype, every) for name, (shape, dtype, every) in saved["fields"].items()}
            options = {**saved["options"], "fields": fields, "storage": storage, "path": path, "device": device}
            segments, state = saved["segments"], saved["state"]
            end = segments[-1]["end"] if segments else []
            held = sum(min(n, options["capacity"] // options["num_streams"]) for n in end)
            if read_only:
                options["expected_rows"] = held
            elif options["expected_rows"] is not None:
                options["expected_rows"] = max(held, options["expected_rows"])
            files = [(s["file"], s["begin"], s["end"], s["size"], s["crc32c"]) for s in segments]
            last = (state["file"], state["size"], state["crc32c"])
            for name, *numbers in [*files, last]:
                if not _REPLAY_FILE.fullmatch(name):
                    raise ValueError(f"names a file that no replay writes: {name!r}")
                for n in np.hstack([np.array(x, dtype=object) for x in numbers]):
                    if not (isinstance(n, int) and 0 <= n < 2**48):
                        raise ValueError(f"says {n!r} where rows, bytes or a checksum belong")
            replay = cls.__new__(cls)
            replay._open(options, read_only)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if str(error).startswith(("device:", "path:")):  # the caller's, not the manifest's
                raise
            raise ValueError(f"{source}: is not the manifest of a saved replay: {error}") from error
        for name, *rest in files:
            replay._core.load_rows(os.path.join(folder, name), *rest)
        replay._core.load_state(os.path.join(folder, last[0]), *last[1:])
        replay._saved = _Saved(folder, segments)
        return replay

    @staticmethod
    def prune(folder: str | os.PathLike, keep: list[str | os.PathLike] = ()) -> list[str]:
        """Delete saved files of `folder` that neither its manifest.json nor a manifest in `keep` names, and those a crash left unfinished.

        Returns the deleted names. A manifest that cannot be read is an error (ValueError), and then nothing is deleted.
        """
        folder = _path("folder", folder)
        try:
            paths = None if isinstance(keep, (str, bytes, os.PathLike)) else list(keep)
        except TypeError:
            paths = None
        if paths is None:
            raise TypeError(f"keep: must be a list of paths, got {_shown(keep)}")
        keep = [_path("keep", path) for path in paths]
        own = os.path.join(folder, "manifest.json")
        manifests = [_read_manifest(path) for path in [*keep, *([own] if os.path.exists(own) else [])]]
        needed = {entry["file"] for manifest in manifests for entry in [*manifest["segments"], manifest["state"]]}
        names = sorted(os.listdir(folder))
        gone = [n for n in names if n == ".manifest.json" or (_REPLAY_FILE.fullmatch(n.removeprefix(".")) and n not in needed)]
        for name in gone:
            os.unlink(os.path.join(folder, name))
        return gone


def _shown(value) -> str:
    """What came, for a message: short and in one line. Of an array or another object, its type."""
    plain = value is None or isinstance(value, (bool, int, float, str, tuple, np.generic))
    return reprlib.repr(value) if plain else type(value).__qualname__


def _integer(name: str, value, low: int = -(2**63), end: int = 2**63) -> int:
    """`value` as an int that fits the native core, whose own checks then name what they accept."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: must be an int, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: must be an int, got {_shown(value)}") from None
    if not low <= number < end:
        raise ValueError(f"{name}: must lie in {low if low == 0 else '-2^63'}..2^{end.bit_length() - 1}-1, got {_shown(number)}")
    return number


def _number(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: must be a number, got {_shown(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: must lie in the range of float64, got {_shown(value)}") from None


def _flag(name: str, value) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: must be a bool, got {_shown(value)}")
    return bool(value)


def _path(name: str, value) -> str:
    try:
        path = os.fsdecode(value)
    except TypeError:
        raise TypeError(f"{name}: must be a path, got {_shown(value)}") from None
    if "\0" in path:
        raise ValueError(f"{name}: must not hold a null character, got {_shown(path)}")
    return path


def _check_storage(storage: str, path) -> None:
    if not isinstance(storage, str) or storage not in ("memory", "file"):
        raise ValueError(f"storage: must be 'memory' or 'file', got {_shown(storage)}")
    if path is not None and storage == "memory":
        raise ValueError("path: is for storage='file'")


def _replay_column(name: str, f: Field) -> tuple:
    if not name.isidentifier() or name.startswith("_"):
        raise ValueError(f"fields: '{name}' must be an identifier without a leading underscore")
    if not isinstance(f.shape, tuple) or not all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in f.shape):
        raise TypeError(f"fields: '{name}' must have a tuple of ints as its shape, got {_shown(f.shape)}")
    if not isinstance(f.every, (int, np.integer)) or isinstance(f.every, bool):
        raise TypeError(f"fields: '{name}' must have an int every, got {_shown(f.every)}")
    try:
        dtype = np.dtype(f.dtype)
    except (TypeError, ValueError, SyntaxError):
        raise TypeError(f"fields: '{name}' must have a NumPy dtype, got {_shown(f.dtype)}") from None
    shape = [_integer(f"fields: '{name}' shape", n) for n in f.shape]
    return name, shape, dtype.name, _integer(f"fields: '{name}' every", f.every)


_REPLAY_FILE = re.compile(r"(?:rows|state)-(\d{6,})-[0-9a-f]{12}\.bin")


@dataclass
class _Saved:
    """What the last save or load left where: those files need not be written again."""

    folder: str | None = None
    segments: list[dict] = field(default_factory=list)

    def whole(self, folder: str) -> bool:
        try:
            return self.folder == folder and all(os.path.getsize(os.path.join(folder, s["file"])) == s["size"] for s in self.segments)
        except OSError:
            return False


def _manifest_crc(manifest: dict) -> int:
    rest = {name: value for name, value in manifest.items() if name != "crc32c"}
    return _core.crc32c(json.dumps(rest, sort_keys=True).encode())


def _read_manifest(path: str | os.PathLike) -> dict:
    try:
        with open(path, "rb") as file:
            manifest = json.loads(file.read())
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not the manifest of a saved replay ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != "urlfast-replay":
        raise ValueError(f"{path}: is not the manifest of a saved replay")
    if manifest.get("version") != 1:
        raise ValueError(f"{path}: has version {manifest.get('version')!r}; this urlfast reads version 1")
    if manifest.get("crc32c") != _manifest_crc(manifest):
        raise ValueError(f"{path}: is damaged: its checksum is not the one that was saved")
    return manifest


def sync_folder(folder: str | os.PathLike) -> None:
    """Names created in or renamed within `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# latent ---------------------------------------------------------------------------------------------------------------


class LatentDynamics(_core.LatentDynamics):
    """PALM's environment in the latent space of a generator G: actions and noise are mixed, and smoothed over time.

        z'  = alpha * a_t + (1 - alpha) * noise          noise ~ N(0, I), fresh in every row
        z_0 = z'                                         with an action drawn uniformly from [-1, 1): none was chosen yet
        z_t = beta * z_{t-1} + (1 - beta) * z'
        class: uniform over num_classes, drawn at an episode's first row and fixed until its last

    num_envs, latent_dim, num_classes >= 1 (num_classes=1 for a generator without classes); alpha, beta in [0, 1].
    episode_length: steps, so an episode has episode_length + 1 rows. All environments open and close theirs together.
    seed: 0..2^64-1. Draws are counted, not carried: they depend on the seed, the row, the environment and the coordinate, neither
    on threads nor on the device, where the values agree to rounding.
    device: "cpu", "cuda[:N]" or a torch.device; the latter makes reset() return torch tensors from the start.

    reset() and step(actions) return (z, class, is_first, is_last): float32 (num_envs, latent_dim), int64 and two bool (num_envs,).
    After a row with is_last the next step ignores its actions and shows an episode's first row (is_first), as everywhere in urlfast.
    The arrays are the state itself: they stay valid until the next reset, step or load_state_dict, which overwrite them, and must not
    be written to (NumPy's are read-only). They come in the library of the last actions: torch tensors, CuPy arrays, otherwise NumPy
    arrays on the CPU and DLPack exporters on CUDA.
    actions: float32 (num_envs, latent_dim), C-contiguous, on `device`; taken as they are, NaN included.
    One kernel does a step; on CUDA it goes to the caller's current stream and nothing waits for it. reset draws anew; it does not go
    back to the seed's first episode.
    state_dict(), load_state_dict(state): ints, a list and bytes, for dynamics of the same sizes and seed.
    Raises TypeError and ValueError, naming the argument, and RuntimeError for a step before the first reset, or where `device` is CUDA
    and none is usable.
    """

    def __init__(
        self,
        num_envs: int,
        latent_dim: int,
        num_classes: int = 1,
        *,
        alpha: float = 0.5,
        beta: float = 0.95,
        episode_length: int = 100,
        seed: int = 0,
        device: Any = "cpu",
    ):
        super().__init__(num_envs, latent_dim, num_classes, alpha, beta, episode_length, seed, device)
        self._arguments = (num_envs, latent_dim, num_classes, alpha, beta, episode_length, seed, device)

    def __repr__(self) -> str:
        if "_arguments" not in self.__dict__:
            return "LatentDynamics(refused)"
        num_envs, dim, classes, alpha, beta, length, seed, device = self._arguments
        given = f"alpha={alpha}, beta={beta}, episode_length={length}, seed={seed}, device={str(device)!r}"
        return f"LatentDynamics({num_envs}, {dim}, {classes}, {given})"

    def __reduce__(self):  # for copy.deepcopy and pickle
        return _restored_dynamics, (self._arguments, self.state_dict())


def _restored_dynamics(arguments, state):
    *sizes, alpha, beta, episode_length, seed, device = arguments
    dynamics = LatentDynamics(*sizes, alpha=alpha, beta=beta, episode_length=episode_length, seed=seed, device=device)
    dynamics.load_state_dict(state)
    return dynamics


def ema_update_(targets: Iterable[Array], sources: Iterable[Array], tau: float) -> None:
    """targets[i] += tau * (sources[i] - targets[i]) for every i, in place, in one pass over all of them.

    targets, sources: lists or other iterables of arrays, as many, such as `module.parameters()`; requires_grad does not matter. Pairs
    agree in shape, dtype (float16, bfloat16, float32, float64), device and memory layout, which is any dense one: channels_last is,
    a slice is not. Empty lists are allowed and do nothing. Targets must not share memory with each other.
    tau: in [0, 1]; 1 copies the sources. Integer buffers, BatchNorm's counters among them, are the caller's to copy.
    Everything is checked before anything is written; TypeError and ValueError name the array as targets[i] or sources[i].
    On CUDA the work goes to the caller's current stream, a launch per hundred tensors, and nothing waits for it.
    """
    _core.ema_update_(targets, sources, tau)
