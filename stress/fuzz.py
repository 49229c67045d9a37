# ruff: noqa: B023 (a closure is called before its loop goes on)
"""Random calls of every public native function and method, most of them wrong in some way.

    python stress/fuzz.py [--calls 10000] [--seed N] [--target NAME ...]     at least so many calls of each
    python stress/fuzz.py --seed N --target NAME --only ROUND                one round again, as a failure prints it

Each call must end in what the float64 reference says, or in a TypeError, ValueError, RuntimeError, OSError or MemoryError whose message
begins with an argument's name; what is right in every argument must not be refused. A target is one process, so that a crash or a hang is
reported with its round, and what its memory grew by after a warm-up is measured. Arrays are NumPy's, torch's and, where installed, JAX's.
"""

import argparse
import collections
import contextlib
import copy
import ctypes
import faulthandler
import gc
import importlib.util
import inspect
import mmap
import os
import pickle
import re
import shutil
import struct
import sys
import tempfile
import time
import traceback

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "python_tests"))
import reference_knn
import reference_stats
import torch
from reference_replay import ReferenceReplay, check_batch, replay_rows, replay_settings
from together import together

import urlfast
from urlfast import EpisodicMemory, Field, LatentDynamics, RunningNormalizer, SequenceReplay, ema_update_, knn, knn_reward

HANG = 120  # seconds for one round
FLOATS = ["float32", "float32", "float64", "float16", "bfloat16"]
DTYPES = [
    "bool",
    "uint8",
    "int16",
    "int32",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "longdouble",
    "M8[s]",
    "O",
    "S3",
    "f4,i4",
]
JUNK = [None, 3, -1, 1.5, "x", b"x", [], [1.0], (), {}, object(), float("nan"), 2**70, True, np.float32(1), np.array("x"), len]
ERRORS = (TypeError, ValueError, RuntimeError, OSError, MemoryError)
TORCH = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


class Exporter:
    """An array that only DLPack can read, of either generation, or one that lies about itself."""

    def __init__(self, array, old, lie=None):
        self.array, self.old, self.lie = array, old, lie

    def __dlpack_device__(self):
        return self.lie if self.lie is not None else (1, 0)

    def __dlpack__(self, **options):
        if self.old and "max_version" in options:
            raise TypeError("no such argument")
        return torch.utils.dlpack.to_dlpack(self.array) if self.old else self.array.__dlpack__(**options)


class TensorOfSomeone(torch.Tensor):
    pass


def value(array):
    """What an array holds, as NumPy."""
    if isinstance(array, Exporter):
        array = array.array
    if isinstance(array, torch.Tensor):
        array = array.detach()
        return (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    return np.asarray(array)


class Source:
    """Random arguments. `wrong` tells that one of them is not what is asked for: the call may be refused then, and only then."""

    def __init__(self, rng, flaw=0.12):
        self.rng, self.flaw, self.wrong = rng, flaw, False

    def chance(self, p):
        return self.rng.random() < p

    def flawed(self, p=None):
        hit = self.chance(self.flaw if p is None else p)
        self.wrong |= hit
        return hit

    def pick(self, options):
        return options[int(self.rng.integers(len(options)))]

    def integer(self, low, high):
        return int(self.rng.integers(low, high + 1))

    def scale(self):
        return self.pick([1.0, 1.0, 1.0, 1e30, 1e-30])

    def floats(self, shape, scale=1.0):
        x = self.rng.standard_normal(shape) * scale
        kind = self.integer(0, 5)
        if kind == 1:
            x = np.round(x / scale) * scale  # many ties
        elif kind == 2:
            x = x + 1000 * scale
        elif kind == 3:
            x = np.zeros(shape)
        return x

    def arg(self, good, bad=JUNK):
        return self.pick(bad) if self.flawed(self.flaw / 4) else good

    def size(self, good, low, high):
        """An int that must lie in low..high; `good` does."""
        if not self.flawed(self.flaw / 2):
            return np.int64(good) if self.chance(0.1) else good
        return self.pick(
            [low - 1, high + 1, 0, -1, -(2**31), 2**31, 2**40, 2**62, 2**63 - 1, 2**63, -(2**70), True, 1.0, "2", None, np.ones(2)]
        )

    def array(self, x, dtype, libraries=("numpy", "torch", "jax", "old", "new"), finite=True, contiguous=True):
        """x as an array of `dtype` in some library, perhaps with a flaw."""
        x = np.asarray(x)
        if self.flawed(self.flaw / 4):
            return self.pick(JUNK)
        library = self.pick([n for n in libraries if n != "jax" or jax is not None])
        if dtype == "bfloat16":
            library = self.pick(["torch", "new"])
        if self.flawed(self.flaw / 3):  # a wrong shape
            x = self.pick(
                [
                    lambda: x[None],
                    lambda: x[..., None],
                    lambda: x.ravel(),
                    lambda: x.ravel()[:0],
                    lambda: x.sum(),
                    lambda: x.ravel()[1:],
                    lambda: np.concatenate([x, x]) if x.ndim else x,
                    lambda: x.reshape((1,) * 9 + x.shape),
                ]
            )()
        if self.flawed(self.flaw / 3):
            dtype, library = self.pick(DTYPES), self.pick(["numpy", "torch"])
        with np.errstate(all="ignore"):
            x = np.asarray(np.asarray(x).astype("float32" if dtype == "bfloat16" else dtype))
        if finite and x.dtype.kind == "f" and x.size:
            if self.flawed(self.flaw / 3) or not np.isfinite(x).all():  # float16's range ends early
                self.wrong = True
                x = np.array(x)
                x.flat[self.integer(0, x.size - 1)] = self.pick([np.nan, np.inf, -np.inf])
        if dtype == "bool" and x.ndim and x.size and self.chance(0.3):
            x = (np.ascontiguousarray(x).view(np.uint8) * self.pick([1, 2, 255])).view(bool)
        if library == "numpy" or x.dtype.kind not in "fiub" or x.dtype.name in ("longdouble", "float128"):
            return self.layout(x, contiguous)
        x = np.array(x, order="C")  # a copy that may be written
        if library == "jax":
            made = jax.device_put(x)  # jax.numpy.asarray compiles, and keeps, a program for each new shape
            return made
        if x.dtype.kind == "u" and x.dtype.itemsize > 1:
            return x
        t = torch.from_numpy(x)
        if dtype == "bfloat16":
            t = t.to(torch.bfloat16)
        if self.flawed(self.flaw / 6):
            return self.pick([lambda: t.to("meta"), lambda: t.to_sparse(), lambda: TensorOfSomeone.__new__(TensorOfSomeone)])()
        if library in ("old", "new"):
            lie = self.pick([(99, 0), (2, 0), (2, 7), None, (1,), ("x", 0), 3, (2**40, 0)]) if self.flawed(self.flaw / 6) else None
            return Exporter(t, library == "old", lie)
        if contiguous and t.ndim and t.numel() > 1 and self.flawed(self.flaw / 6):
            t = self.pick(
                [lambda: t.repeat_interleave(2, -1)[..., ::2], lambda: t.expand(2, *t.shape)[1:].squeeze(0).mT if t.ndim > 1 else t[::2]]
            )()
        if t.is_floating_point() and self.chance(0.1):
            t.requires_grad_()
        return t.as_subclass(TensorOfSomeone) if not t.requires_grad and self.chance(0.1) else t

    def layout(self, x, contiguous):
        """The same values, laid in memory otherwise."""
        if x.size > 1 and x.ndim and self.flawed(self.flaw / 3 if contiguous else 0):
            kind = self.integer(0, 4)
            if kind == 0:
                return np.repeat(x, 2, -1)[..., ::2]
            if kind == 1:
                return np.ascontiguousarray(x[::-1])[::-1]
            if kind == 2:
                return np.asfortranarray(x)
            if kind == 3:
                return np.broadcast_to(x.ravel()[:1].reshape((1,) * x.ndim), x.shape)
            raw = bytearray(x.nbytes + 1)  # not aligned
            made = np.frombuffer(raw, np.uint8)[1:].view(x.dtype).reshape(x.shape) if x.dtype.kind in "fiub" else x
            made[...] = x
            return made
        if x.dtype.kind in "fiu" and x.dtype.itemsize > 1 and self.flawed(self.flaw / 6):
            return x.astype(x.dtype.newbyteorder())
        x = np.array(x, order="C")
        if self.chance(0.15):
            x.flags.writeable = False
        return x.view(np.matrix) if x.ndim == 2 and self.chance(0.02) else x


def same(got, want, rtol, atol, what):
    got = value(got)
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(got.astype(np.float64), np.float64(want), rtol=rtol, atol=atol, err_msg=what, equal_nan=True)


class Target:
    """One function, or one class and its methods. `names` may begin a message."""

    names: frozenset[str] = frozenset()
    methods: tuple[str, ...] = ()

    def __init__(self, folder):
        self.counts, self.folder = collections.Counter(), folder

    def call(self, s, method, function, *, may_fail=()):
        """The result, or None where the call was refused, as it may be where something is wrong. may_fail: messages that state explains."""
        self.counts[method] += 1
        try:
            return (function(),)
        except ERRORS as error:
            message = str(error)
            if not s.wrong and not any(re.match(m, message) for m in may_fail):
                raise AssertionError(f"{method}: refused what is right: {type(error).__name__}: {message}") from error
            named = re.match(r"(\w+)(\['\w+'\]|\[\d+\])?: \S", message)
            told = message.startswith(("/", "Unable to allocate")) or getattr(error, "filename", None)
            if not (named and named[1] in self.names) and not told:
                raise AssertionError(f"{method}: names no argument: {type(error).__name__}: {message}") from error


def distances_of(q, m):
    with np.errstate(all="ignore"):
        top = max(np.abs(q).max(initial=0), np.abs(m).max(initial=0), 1e-300)
        return np.sqrt((((q[:, None] - m[None]) / top) ** 2).sum(-1)) * top


class Knn(Target):
    names = frozenset(
        [
            "queries",
            "keys",
            "z",
            "memory",
            "k",
            "lengths",
            "include_self",
            "reduction",
            "exponent",
            "c",
            "normalizer",
            "update_normalizer",
            "RunningNormalizer",
        ]
    )
    methods = ("knn", "knn_reward")

    def problem(self, s):
        dtype = s.pick(FLOATS)
        big = s.chance(0.01)
        b, m, d = (
            (s.integer(100, 220), s.integer(100, 300), s.integer(32, 50)) if big else (s.integer(1, 12), s.integer(1, 24), s.integer(1, 9))
        )
        batch = (s.integer(1, 4),) if s.chance(0.5) else ()
        scale = 1.0 if dtype == "float16" else s.scale()
        x, y = s.floats((*batch, b, d), scale), s.floats((*batch, m, d), scale)
        if s.chance(0.3):
            y[..., : min(b, m), :] = x[..., : min(b, m), :]
        keys = None if s.chance(0.4) else s.array(y, dtype if not s.flawed(0.02) else s.pick(FLOATS))
        queries = s.array(x, dtype)
        lengths, most = None, b if keys is None else m
        if batch and keys is not None and s.chance(0.5):
            true = s.rng.integers(0, m + 1, batch[0])
            lengths = s.pick(
                [
                    lambda: true.tolist(),
                    lambda: tuple(true.tolist()),
                    lambda: true,
                    lambda: torch.from_numpy(true),
                    lambda: true.astype(np.int32),
                ]
            )()
            if s.flawed(0.1):
                lengths = s.pick(
                    [
                        [m + 1] * batch[0],
                        [-1] * batch[0],
                        [0] * (batch[0] + 1),
                        [2**70] * batch[0],
                        [1.0] * batch[0],
                        3,
                        "ab",
                        [None],
                        [],
                        [True] * batch[0],
                        true * 1.0,
                    ]
                )
        include = True
        if keys is None and s.chance(0.3):
            include, most = False, b - 1
            s.wrong |= most == 0
        elif keys is not None and s.flawed(0.02):
            include = False
        k = s.size(s.integer(1, max(most, 1)) if lengths is None or s.chance(0.7) else m + s.integer(1, 9), 1, most)
        return queries, keys, k, lengths, s.arg(include)

    def references(self, queries, keys, lengths, include):
        """Of each problem: its queries, the rows it sees, their distances."""
        q = np.float64(value(queries))
        m = None if keys is None else np.float64(value(keys))
        if q.ndim == 2:
            q, m = q[None], None if m is None else m[None]
        lengths = [None] * len(q) if lengths is None else np.asarray(lengths).tolist()
        for i in range(len(q)):
            rows = q[i] if m is None else m[i][: lengths[i]]
            distance = distances_of(q[i], rows)
            if not include:
                np.fill_diagonal(distance, np.inf)
            yield q[i], rows, distance

    def round(self, s):
        if s.chance(0.5):
            self.knn(s)
        else:
            self.reward(s)

    def knn(self, s):
        queries, keys, k, lengths, include = self.problem(s)
        done = self.call(s, "knn", lambda: knn(queries, keys, k, lengths=lengths, include_self=include))
        if not done:
            return
        (distances, indices), rtol = done[0], 1e-12 if "float64" in str(done[0][0].dtype) else 3e-6
        assert type(distances) is type(indices)
        d, i = value(distances), value(indices)
        assert d.shape == i.shape == (*value(queries).shape[:-1], k) and i.dtype == np.int64
        for row, (_, rows, want) in enumerate(self.references(queries, keys, lengths, include)):
            got, at = (d[row], i[row]) if d.ndim == 3 else (d, i)
            n = min(int(k), len(rows) - (not include))
            order = np.argsort(want, axis=1, kind="stable")[:, :n]
            size = np.abs(want[np.isfinite(want)]).max(initial=0)
            same(got[:, :n], np.take_along_axis(want, order, 1), rtol, size * rtol, "distances")
            same(got[:, :n], np.take_along_axis(want, at[:, :n], 1), rtol, size * rtol, "distances of the indices")
            assert (got[:, n:] == np.inf).all() and (at[:, n:] == -1).all()
            assert all(len(set(line)) == n for line in at[:, :n].tolist()), "an index stands twice"
            if n < 2:
                continue
            copies = (rows[at[:, 1:n]] == rows[at[:, : n - 1]]).all(-1)
            assert (at[:, 1:n] > at[:, : n - 1])[copies].all(), "ties go to the lowest index"

    def reward(self, s):
        queries, memory, k, lengths, include = self.problem(s)
        reduction, exponent = s.arg(s.pick(["mean", "kth"])), s.arg(s.pick([1.0, 2.0, 0.5, 1, 3.0]))
        c, update = s.arg(s.pick([1.0, 1e-3, 7])), s.arg(s.chance(0.7))
        if s.flawed(0.02):
            reduction, exponent, c = s.pick(
                [
                    ("max", 1, 1),
                    ("mean", 0, 1),
                    ("mean", -1, 1),
                    ("mean", np.inf, 1),
                    ("kth", 1, 0),
                    ("kth", 1, -np.inf),
                    ("kth", np.nan, 1),
                ]
            )
        normalizer = model = None
        if s.chance(0.3):
            how = {"mode": s.pick(["mean", "std", "var", "ema_abs"]), "clip": s.pick([None, 0.0, 0.5])}
            normalizer, model = RunningNormalizer(**how), reference_stats.ReferenceNormalizer(**how)
            if s.flawed(0.05):
                normalizer = s.pick([RunningNormalizer(shape=(2,)), RunningNormalizer.__new__(RunningNormalizer), model, 3])
        options = {"lengths": lengths, "reduction": reduction, "exponent": exponent, "c": c, "include_self": include}
        before = normalizer.state_dict() if not s.wrong and normalizer is not None else None
        large = float(np.abs(value(queries)).max(initial=0)) > 1e20 if not s.wrong else True
        done = self.call(
            s,
            "knn_reward",
            lambda: knn_reward(queries, k, memory, **options, normalizer=normalizer, update_normalizer=update),
            may_fail=["normalizer: cannot take distances above 1e150"],
        )
        if not done:
            if before is not None:
                assert normalizer.state_dict() == before
            return
        kept = []
        for _, rows, want in self.references(queries, memory, lengths, include):
            line = np.sort(want, axis=1)[:, : min(int(k), len(rows) - (not include))]
            kept.append(line[:, -1:] if reduction == "kth" else line)
        scale, clip = 1.0, None
        if normalizer is not None:
            flat = np.concatenate([x.ravel() for x in kept])
            if update and flat.size:
                model.update(flat)
            scale, clip = model.scale, model.clip
            same(normalizer.scale, scale, 1e-4, 1e-6 * float(np.abs(flat).max(initial=0)), "scale")
            scale = float(normalizer.scale)
        with np.errstate(all="ignore"):
            want = [np.array([reference_knn.reward(r, "mean", float(exponent), float(c), scale, clip) for r in x]) for x in kept]
        got = value(done[0])
        same(got, np.stack(want) if got.ndim == 2 else want[0], 1e-5, 1e-3 if large and clip else 2e-5, "reward")


class Memory(Target):
    names = frozenset(
        ["num_streams", "capacity", "dim", "k", "device", "embeddings", "reset", "state", "rows", "lengths", "EpisodicMemory"]
    )
    methods = ("__init__", "step", "lengths", "state_dict", "load_state_dict")

    def make(self, s):
        n, capacity, dim, k = s.integer(1, 4), s.integer(1, 8), s.integer(1, 6), s.integer(1, 10)
        device = (
            s.pick(["gpu", "cuda", "cuda:99", "", None, 3, "cpu:1", "meta"]) if s.flawed(0.01) else s.pick(["cpu", torch.device("cpu")])
        )
        most = 2**31 - 1
        # sizes that are right, and more than there is
        done = self.call(
            s,
            "__init__",
            lambda: EpisodicMemory(
                s.size(n, 1, most), s.size(capacity, 1, most), s.size(dim, 1, most), k=s.size(k, 1, most), device=device
            ),
        )
        if not done or s.wrong:
            return None
        return done[0], n, capacity, dim, k

    def round(self, s):
        made = self.make(s)
        if made is None:
            return
        memory, n, capacity, dim, k = made
        rows, scale = [[] for _ in range(n)], s.scale()
        if s.chance(0.03):

            def work():
                mine = Source(np.random.default_rng(s.integer(0, 2**31)), 0)
                for _ in range(30):
                    mine.pick(
                        [
                            lambda: memory.step(np.zeros((n, dim), np.float32), mine.rng.random(n) < 0.2),
                            memory.lengths,
                            lambda: memory.load_state_dict(memory.state_dict()),
                        ]
                    )()

            return together(work, work, work)
        for _ in range(16):
            s.wrong = False
            method = s.pick(["step", "step", "step", *self.methods[2:], "other"])
            if method == "step":
                x = s.floats((n, dim), scale)
                reset = s.rng.random(n) < 0.15
                given, flags = s.array(x, "float32"), s.array(reset, "bool")
                done = self.call(s, "step", lambda: memory.step(given, flags))
                if not done:
                    continue
                x, reset = np.float64(value(given)), value(flags).view(np.uint8) != 0
                want = np.full((n, k), np.inf)
                for i in range(n):
                    if reset[i]:
                        rows[i].clear()
                    if rows[i]:
                        d = np.sort(distances_of(x[i : i + 1], np.array(rows[i]))[0])[:k]
                        want[i, : len(d)] = d
                    rows[i] = [*rows[i], x[i]][-capacity:]
                same(done[0], want, 3e-6, np.abs(want[np.isfinite(want)]).max(initial=0) * 3e-6, "distances")
            elif method == "lengths":
                assert self.call(s, method, memory.lengths)[0] == [len(r) for r in rows]
            elif method == "state_dict":
                state = self.call(s, method, memory.state_dict)[0]
                assert state["lengths"] == [len(r) for r in rows]
                np.testing.assert_array_equal(state["rows"], np.array([x for r in rows for x in r]).reshape(-1, dim))
            elif method == "load_state_dict":
                state = memory.state_dict()
                if s.flawed(0.4):
                    state[s.pick(["lengths", "rows"])] = s.pick(
                        [
                            *JUNK,
                            [0] * n,
                            [9] * n,
                            [-1] * n,
                            [2**70] * n,
                            state["rows"][1:],
                            state["rows"].astype(float),
                            state["rows"] * np.nan,
                            state["rows"].T,
                        ]
                    )
                    if s.chance(0.2):
                        del state["rows"]
                state = s.arg(state)
                if self.call(s, method, lambda: memory.load_state_dict(state)) and s.wrong:
                    whole = memory.state_dict()
                    ends = np.cumsum(whole["lengths"])
                    rows = [list(np.float64(whole["rows"][e - m : e])) for e, m in zip(ends, whole["lengths"], strict=True)]
            else:
                s.wrong = True
                other = EpisodicMemory.__new__(EpisodicMemory)
                self.call(
                    s,
                    "unmade",
                    s.pick([other.lengths, other.state_dict, lambda: other.step(np.zeros((n, dim), np.float32), np.zeros(n, bool))]),
                )
                with contextlib.suppress(TypeError):
                    s.pick([copy.copy, copy.deepcopy, pickle.dumps])(memory)
                    raise AssertionError("copied")


class Normalizer(Target):
    names = frozenset(["mode", "shape", "epsilon", "clip", "momentum", "device", "x", "out", "other", "state", "RunningNormalizer"])
    methods = ("__init__", "update", "normalize", "__call__", "merge", "state_dict", "load_state_dict", "scale", "copy")

    def round(self, s):
        how = {
            "mode": s.pick(["mean", "std", "var", "ema_abs"]),
            "shape": s.pick([(), (), (3,), (2, 3), 3, [2]]),
            "epsilon": s.pick([1e-8, 1e-4, 1]),
            "clip": s.pick([None, None, 0.0, 0.5]),
            "momentum": s.pick([0.99, 0.0, 0.5]),
            "device": s.pick(["cpu", torch.device("cpu")]),
        }
        if s.flawed():
            name = s.pick(list(how))
            how[name] = s.pick(
                [
                    x
                    for x in [*JUNK, "median", (0,), (-1, 2), (2**28 + 1,), (2**40,), (1,) * 9, -1.0, 1.0, np.inf, "cuda", "tpu", [2.0]]
                    if name != "shape" or x is not None
                ]
            )
        done = self.call(s, "__init__", lambda: RunningNormalizer(**how))
        if not done or s.wrong:
            return
        normalizer = done[0]
        shape = (
            how["shape"] if isinstance(how["shape"], tuple) else (how["shape"],) if isinstance(how["shape"], int) else tuple(how["shape"])
        )
        kinds = {"shape": shape, "epsilon": how["epsilon"], "clip": how["clip"], "momentum": how["momentum"]}
        model = reference_stats.ReferenceNormalizer(how["mode"], **kinds)
        if s.chance(0.03):
            x = np.ones((5, *shape), np.float32)

            def work():
                mine = Source(np.random.default_rng(s.integer(0, 2**31)), 0)
                for _ in range(30):
                    mine.pick(
                        [
                            lambda: normalizer(x),
                            lambda: normalizer.update(x),
                            lambda: normalizer.scale,
                            normalizer.state_dict,
                            lambda: how["mode"] == "ema_abs" or normalizer.merge(RunningNormalizer(**how)),
                            lambda: normalizer.load_state_dict(normalizer.state_dict()),
                        ]
                    )()

            return together(work, work, work)
        for _ in range(14):
            s.wrong = False
            before, method = normalizer.state_dict(), s.pick(self.methods[1:])
            if method in ("update", "normalize", "__call__"):
                dtype = s.pick(FLOATS)
                x = s.array(s.floats((*s.pick([(1,), (4,), (2, 3), (40,)]), *shape)), dtype, finite=method != "normalize")
                if method == "update":
                    done = self.call(s, method, lambda: normalizer.update(x))
                else:
                    out = None
                    if s.chance(0.3) and not s.wrong:
                        v = value(x)
                        out = s.array(np.zeros(v.shape), "float64" if v.dtype == np.float64 else "float32", ("numpy", "torch"))
                        if isinstance(out, np.ndarray) and not out.flags.writeable:
                            s.wrong = True
                        if isinstance(out, torch.Tensor) and out.requires_grad:
                            s.wrong = True
                        if s.chance(0.2):
                            out, s.wrong = x, True
                    held = np.array(value(x)) if not s.wrong else None
                    done = self.call(
                        s, method, lambda: normalizer.normalize(x, out=out) if method == "normalize" else normalizer(x, out=out)
                    )
                if not done:
                    assert normalizer.state_dict() == before, "refused, and changed"
                    continue
                if s.wrong:  # taken all the same: what it was is not known any more
                    return
                if method != "normalize":
                    model.update(value(x))
                if method != "update":
                    with np.errstate(all="ignore"):
                        want = np.float64(held) / np.asarray(normalizer.scale)
                        same(done[0], want if model.clip is None else np.maximum(want - model.clip, 0), 1e-6, 1e-6, "normalized")
            elif method == "merge":
                other, theirs = RunningNormalizer(**how), s.rng.standard_normal((s.integer(1, 5), *shape))
                other.update(theirs)
                s.wrong |= how["mode"] == "ema_abs"
                if s.flawed():
                    other = s.pick(
                        [
                            *JUNK,
                            RunningNormalizer("ema_abs"),
                            RunningNormalizer(shape=(7,)),
                            RunningNormalizer.__new__(RunningNormalizer),
                            model,
                        ]
                    )
                if self.call(s, method, lambda: normalizer.merge(other)):
                    if s.wrong:
                        return
                    model.update(theirs)
            elif method == "state_dict":
                state = self.call(s, method, normalizer.state_dict)[0]
                assert state["mode"] == how["mode"] and tuple(state["shape"]) == shape and state["count"] == len(model.rows)
            elif method == "load_state_dict":
                state = dict(before)
                if s.flawed(0.4):
                    state[s.pick(list(state))] = s.pick([*JUNK, "std", [1.0] * 99, [np.nan], [np.inf], -1.0, [-1.0], [[1.0]]])
                state = s.arg(state)
                if self.call(s, method, lambda: normalizer.load_state_dict(state)) and s.wrong:
                    return
            elif method == "scale":
                scale = self.call(s, method, lambda: normalizer.scale)[0]
                assert np.shape(scale) == shape
                same(scale, model.scale, 1e-6, 1e-8 * max(1, float(np.abs(model.rows).max(initial=0)) ** 2), "scale")
            else:
                made = self.call(
                    s, method, lambda: s.pick([copy.copy, copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])(normalizer)
                )[0]
                assert made.state_dict() == before and repr(made) == repr(normalizer)
                normalizer = made  # and the one it came from is gone


class Latents(Target):
    names = frozenset(
        ["num_envs", "latent_dim", "num_classes", "alpha", "beta", "episode_length", "seed", "device", "actions", "state", "LatentDynamics"]
    )
    methods = ("__init__", "reset", "step", "state_dict", "load_state_dict", "copy")

    def round(self, s):
        n, d, classes, length = s.integer(1, 4), s.integer(1, 9), s.integer(1, 4), s.integer(1, 6)
        how = {
            "alpha": s.pick([0.0, 0.5, 1.0, 1]),
            "beta": s.pick([0.0, 0.95, 1.0]),
            "episode_length": s.size(length, 1, 2**63 - 1),
            "seed": s.size(s.integer(0, 99), 0, 2**64 - 1),
        }
        if s.flawed():
            how[s.pick(list(how))] = s.pick([*JUNK, 1.5, -0.1, np.nan])
        if s.flawed(0.02):
            how["device"] = s.pick(["cuda", "tpu", 3])
        sizes = s.size(n, 1, 2**31), s.size(d, 1, 2**31), s.size(classes, 1, 2**31 - 1)
        if 2**31 in [x for x in sizes if type(x) is int]:  # 8 GB, which a machine may well have
            return
        done = self.call(s, "__init__", lambda: LatentDynamics(*sizes, **how))
        if not done or s.wrong:
            return
        dynamics, z, t, shown = done[0], None, None, None
        noise = LatentDynamics(n, d, classes, alpha=0.0, beta=0.0, episode_length=2**40, seed=how["seed"])  # shows it bare
        drawn = LatentDynamics(n, d, classes, alpha=1.0, beta=0.0, episode_length=length, seed=how["seed"])  # and the first action
        if s.chance(0.03):
            dynamics.reset()

            def work():
                mine = Source(np.random.default_rng(s.integer(0, 2**31)), 0)
                for _ in range(30):
                    mine.pick(
                        [
                            dynamics.reset,
                            lambda: dynamics.step(np.zeros((n, d), np.float32)),
                            lambda: dynamics.load_state_dict(dynamics.state_dict()),
                        ]
                    )()

            return together(work, work, work)

        def opened():
            """The noise and the action that a first row draws."""
            action = np.array(drawn.reset()[0])
            return np.array((noise.reset() if z is None else noise.step(np.zeros((n, d), np.float32)))[0]), action

        for _ in range(14):
            s.wrong = False
            method = s.pick(["step", "step", *self.methods[1:]])
            if method in ("reset", "step"):
                a = s.rng.uniform(-1, 1, (n, d)).astype(np.float32)
                if method == "reset":
                    row, first = self.call(s, method, dynamics.reset)[0], True
                else:
                    given = s.array(a, "float32", finite=False)
                    if z is not None and s.chance(0.1):  # its own memory
                        given = shown
                        a = np.array(value(given))
                    done = self.call(s, method, lambda: dynamics.step(given), may_fail=["LatentDynamics: call reset"] if z is None else [])
                    if not done:
                        continue
                    row, first = done[0], t == length
                shown = row[0]
                if first:
                    mask = np.full(n, True)
                    eps, action = opened()
                    t = 0
                else:
                    mask, t = np.full(n, False), t + 1
                    eps, action = np.array(noise.step(a)[0]), a
                    drawn.step(a) if t <= length else None
                z = reference_stats.latent_step(0 if first else z, action, eps, mask, float(how["alpha"]), float(how["beta"]))
                same(row[0], z, 1e-5, 5e-6, "z")
                kinds = value(row[1])
                assert (
                    ((kinds >= 0) & (kinds < classes)).all()
                    and value(row[2]).tolist() == [first] * n
                    and value(row[3]).tolist() == [t == length] * n
                )
                z = np.float64(value(row[0]))
                # `drawn` counts its rows too: keep it where the others are
                state = dynamics.state_dict()
                for twin in (noise, drawn):
                    twin.load_state_dict({**twin.state_dict(), "rows": state["rows"], "t": 0 if twin is noise else min(t, length)})
            elif method == "state_dict":
                state = self.call(s, method, dynamics.state_dict)[0]
                if z is not None:
                    np.testing.assert_array_equal(np.frombuffer(state["z"], np.float32).reshape(n, d), z.astype(np.float32))
            elif method == "load_state_dict":
                state = dynamics.state_dict()
                if s.flawed(0.4):
                    state[s.pick(list(state))] = s.pick([*JUNK, 99, -5, b"", b"1" * 4 * n * d, [0] * n, [99] * n, [-1] * n])
                state = s.arg(state)
                if self.call(s, method, lambda: dynamics.load_state_dict(state)) and s.wrong:
                    return
            else:
                made = self.call(s, method, lambda: s.pick([copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])(dynamics))[
                    0
                ]
                assert made.state_dict() == dynamics.state_dict()
                dynamics = made
                s.wrong = True
                other = LatentDynamics.__new__(LatentDynamics)
                self.call(s, "unmade", s.pick([other.reset, other.state_dict, lambda: other.step(np.zeros((n, d), np.float32))]))


class Ema(Target):
    names = frozenset(["targets", "sources", "tau", "n"])
    methods = ("ema_update_", "set_num_threads")

    def round(self, s):
        before = urlfast.ops._core.num_threads()
        n = s.size(s.integer(1, 3), 1, 4096)
        if self.call(s, "set_num_threads", lambda: urlfast.set_num_threads(n)) and not s.wrong:
            assert urlfast.ops._core.num_threads() == n
        urlfast.set_num_threads(before)
        s.wrong = False
        dtype, targets, sources = s.pick(list(TORCH)), [], []
        for _ in range(s.integer(0, 4)):
            shape = tuple(s.integer(0 if s.chance(0.05) else 1, 5) for _ in range(s.integer(0, 3)))
            x, y = s.floats(shape), s.floats(shape)
            libraries = ("torch",) if dtype == "bfloat16" or s.chance(0.5) else ("numpy",)
            target, source = s.array(x, dtype, libraries, finite=False), s.array(y, dtype, libraries, finite=False)
            readonly = isinstance(target, np.ndarray) and not target.flags.writeable
            subclass = any(isinstance(t, TensorOfSomeone) and t.requires_grad for t in (target, source))
            if readonly or subclass:
                s.wrong = True
            if isinstance(target, torch.Tensor) and isinstance(source, torch.Tensor) and target.ndim == 3 and s.chance(0.2) and not s.wrong:
                with torch.no_grad():
                    target, source = target.clone().mT, source.clone().mT  # dense in another order
            targets.append(target), sources.append(source)
        tau = s.pick([0, 1, 0.0, 0.01, 0.5, 1.0, np.float32(0.5)])
        if s.flawed():
            tau = s.pick([*JUNK, -0.1, 1.1, np.inf])
        if s.flawed(0.03):
            targets = s.pick([None, 3, targets[:-1], np.ones(3), {}, "ab", [None], [*targets, 1]])
        known = not s.wrong
        held = [np.array(np.float64(value(t))) for t in targets] if known else []
        done = self.call(s, "ema_update_", lambda: ema_update_(s.pick([list, tuple, iter])(targets) if known else targets, sources, tau))
        if not done or not known:
            return
        tolerance = {"float64": 1e-14, "float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
        for target, source, old in zip(targets, sources, held, strict=True):
            same(target, reference_stats.ema(old, np.float64(value(source)), float(tau)), tolerance, tolerance * (1e3 + 1), "ema")


class Replay(Target):
    options = (
        "capacity",
        "fields",
        "num_streams",
        "sequence_length",
        "stride",
        "burn_in",
        "n_step",
        "gamma",
        "frame_stack",
        "cross_episodes",
    )
    names = frozenset(
        [
            *inspect.signature(SequenceReplay.__init__).parameters,
            *inspect.signature(SequenceReplay.load).parameters,
            "B",
            "out",
            "rows",
            "streams",
            "indices",
            "td",
            "mask",
            "observation",
            "action",
            "state",
            "reward",
            "terminated",
            "is_first",
            "is_last",
            "priority",
            "keep",
            "SequenceReplay",
            "sample",
            "extra",
        ]
    )
    methods = (
        "__init__",
        "add",
        "sample",
        "sample(out)",
        "layout",
        "update_priorities",
        "len",
        "sampleable",
        "stale_updates",
        "capacity",
        "num_streams",
        "bytes",
        "save",
        "load",
        "prune",
        "close",
    )

    def settings(self, s):
        observations = [Field(s.pick([(2,), (1, 2, 3), (3, 1)]), s.pick(["uint8", "float32", "int16", "float64", "bool"]))]
        small = {"n_steps": range(1, 5), "lengths": range(2, 5), "importance": [0.0, 0.6, 1.0]}
        capacity, fields, how = replay_settings(s.pick, observations, **small)
        fields["action"] = Field((), s.pick(["int64", "float16"]))
        how.update(seed=s.integer(0, 99), ring=s.integer(1, 4))
        if s.chance(0.1):
            how.update(storage="file", path=self.folder)
        if s.chance(0.1):
            how["expected_rows"] = s.integer(0, 9)
        return capacity, fields, how

    def round(self, s):
        capacity, fields, how = self.settings(s)
        given, columns = dict(how, capacity=capacity), fields
        if s.flawed(0.3):
            name = s.pick(
                [*given, "fields", "gamma", "stride", "burn_in", "cross_episodes", "device", "storage", "path", "expected_rows", "eta"]
            )
            sizes = [0, -1, 1, 7, 2**31, 2**40, 2**62, 2**63, 2**31 - 64, 2**20]
            kinds = [
                Field((2**33,), "uint8"),
                Field((2**40,), "uint8"),
                Field((0,), "uint8"),
                Field((-1,)),
                Field((2,) * 7),
                Field((2,), "complex64"),
                Field((2,), "O"),
                Field((2,), "(2,"),
                Field([2]),
                Field((2.0,)),
                Field((2**62, 2**62)),
                Field((2,), every=5),
                Field((2,), every=0),
                None,
                3,
            ]
            if name == "fields":
                columns = s.pick(
                    [
                        {},
                        None,
                        [],
                        {"observation": s.pick(kinds)},
                        {**fields, s.pick(["reward", "mask", "_x", "a b", "extra", 3]): s.pick([Field(), *kinds])},
                    ]
                )
            else:
                given[name] = s.pick([*sizes, *JUNK, "file", "cuda", "memory", "/nowhere", "a\0b", np.nan, -0.5, 1.5])
                if s.chance(0.3):
                    given["expected_rows"] = 0
        done = self.call(s, "__init__", lambda: SequenceReplay(fields=columns, **given))
        if not done:
            return
        if s.wrong:
            return done[0].close()
        told = {k: v for k, v in how.items() if k not in ("ring", "storage", "path", "expected_rows")}
        state = State(done[0], ReferenceReplay(capacity, fields, **told), fields, how, np.full(how["num_streams"], True))
        if s.chance(0.03):
            return self.shared(s, state)
        folder = os.path.join(self.folder, "saved")
        for _ in range(s.integer(10, 40)):
            s.wrong = False
            method = s.pick(["add", "add", "add", "add", *self.methods[1:-1]])
            getattr(self, method.replace("(", "_").rstrip(")"), self.ask)(s, state, method, folder)
        root, leaves = state.replay._core.totals()
        assert root == leaves
        s.wrong = False
        self.call(s, "close", state.replay.close)
        s.wrong, closed = True, state.replay
        for call in (
            lambda: closed.add({}),
            lambda: closed.sample(3),
            lambda: len(closed),
            lambda: closed.save(folder),
            closed.close,
            lambda: closed.layout(3),
            lambda: closed.bytes,
        ):
            self.call(s, "closed", call)
        shutil.rmtree(folder, ignore_errors=True)

    def ask(self, s, state, method, folder):
        replay, reference = state.replay, state.reference
        ask = {"len": lambda: len(replay)}.get(method, lambda: getattr(replay, method))
        got = self.call(s, method, ask)[0]
        if method == "len":
            assert got == sum(min(len(r), reference.kept) for r in reference.rows)
        elif method == "sampleable":
            assert got == len(reference.items())
        elif method == "stale_updates":
            assert got == reference.stale
        elif method == "capacity":
            assert got == reference.kept * reference.streams

    def rows(self, s, state, streams):
        opens = state.opens.copy()
        return replay_rows(s.rng, state.fields, opens, streams, priority=state.how.get("priority_exponent", 0) > 0), opens

    def add(self, s, state, method, folder):
        streams = None if s.chance(0.6) else s.rng.integers(0, state.reference.streams, s.integer(0, 6))
        which = range(state.reference.streams) if streams is None else streams
        rows, opens = self.rows(s, state, which)
        given = {name: s.array(x, x.dtype.name, finite=name == "reward", contiguous=x.ndim > 1) for name, x in rows.items()}
        if s.flawed():
            name = s.pick([*given, "extra"])
            given.pop(name, None) if s.chance(0.5) else given.update({name: s.pick([None, 3, np.zeros(7, np.float32)])})
        if s.flawed(0.03):
            given["is_first"] = s.rng.random(len(which)) < 0.5
        if streams is not None:
            streams = (
                s.pick([streams + 9, streams - 9, streams[None], streams.astype(float), 3, "x"])
                if s.flawed()
                else s.array(streams, "int64", ("numpy", "torch"))
            )
        given = s.arg(given)
        before = len(state.replay)
        if not self.call(s, "add", lambda: state.replay.add(given, streams)):
            assert len(state.replay) == before, "refused, and appended"
            return
        if s.wrong:  # taken all the same: say what was taken
            which = range(state.reference.streams) if streams is None else value(streams).tolist()
            rows = {name: value(x) for name, x in given.items()}
            opens = state.opens.copy()
            for i, stream in enumerate(which):
                opens[stream] = rows["is_last"][i]
        state.opens = opens
        rows = {name: (x.view(np.uint8) != 0 if name in ("terminated", "is_first", "is_last") else x) for name, x in rows.items()}
        state.reference.add(rows, None if streams is None else which)

    def check(self, state, batch, size, compared):
        drawn = state.reference.sample(size)
        if compared:
            check_batch(batch, state.reference, drawn)

    def sample(self, s, state, method, folder):
        size = s.integer(1, 5)
        B = s.size(size, 1, 2**24)
        empty = not state.reference.items()
        done = self.call(s, "sample", lambda: state.replay.sample(B), may_fail=["sample: nothing to sample yet"] if empty else [])
        if done and not s.wrong:
            assert not empty
            self.check(state, done[0], size, s.chance(0.5))
            state.indices = np.concatenate([state.indices, value(done[0].indices)])[-20:]
        elif done:
            state.reference.draws += 1

    def sample_out(self, s, state, method, folder):
        size = s.integer(1, 5)
        empty = not state.reference.items()
        out = {name: np.zeros(shape, dtype) for name, (shape, dtype) in state.replay.layout(size).items()}
        if s.flawed(0.3):
            name = s.pick(list(out))
            x = out[name]
            readonly = x.copy()
            readonly.flags.writeable = False
            out[name] = s.pick(
                [None, x[:0], x[None], x.astype("complex64"), readonly, np.repeat(x, 2, -1)[..., ::2], torch.from_numpy(x), x[1:], 3]
            )
            if s.chance(0.2):
                out["extra"] = x
            if s.chance(0.2):
                del out[name]
        out = s.arg(out)
        done = self.call(s, method, lambda: state.replay.sample(size, out), may_fail=["sample: nothing to sample yet"] if empty else [])
        if done:
            self.check(state, done[0], size, not s.wrong)

    def layout(self, s, state, method, folder):
        B = s.size(s.integer(1, 9), 1, 2**24)
        done = self.call(s, method, lambda: state.replay.layout(B))
        if done and not s.wrong:
            assert all(shape[0] == B for shape, _ in done[0].values())

    def update_priorities(self, s, state, method, folder):
        indices = np.unique(s.rng.choice(state.indices, min(6, len(state.indices)), False)) if len(state.indices) else np.zeros(0, np.int64)
        shape = (len(indices),) if state.how.get("n_step") else (len(indices), state.how["sequence_length"] - 1 - state.how["burn_in"])
        td, mask = s.rng.standard_normal(shape).astype(np.float32), None
        if s.chance(0.3):
            mask = s.rng.random(shape) < 0.5
        given = [
            s.array(indices, "int64", contiguous=False),
            s.array(td, "float32", contiguous=len(shape) > 1),
            mask if mask is None else s.array(mask, "bool", contiguous=len(shape) > 1),
        ]
        if s.flawed(0.1):
            given[0] = s.pick(
                [
                    indices - 10**6,
                    indices + 10**9,
                    indices.astype(np.int32),
                    indices[None],
                    -indices - 1,
                    np.full_like(indices, 2**62),
                    np.full_like(indices, -(2**63)),
                ]
            )
        before = state.replay._core.totals()
        if not self.call(s, method, lambda: state.replay.update_priorities(*given)):
            assert state.replay._core.totals() == before, "refused, and changed"
            return
        if s.wrong:
            taken = [value(x) if x is not None else None for x in given]
            taken[2] = taken[2] if taken[2] is None else taken[2].view(np.uint8) != 0
            indices, td, mask = taken
        if mask is not None and state.how.get("n_step"):
            keep = mask.reshape(-1)
            # the reference knows no mask for windows: those without a step keep their priority, and late ones still count
            late = [i for i, m in zip(indices.tolist(), keep, strict=True) if not m]
            items = set(state.reference.items())
            state.reference.stale += sum((i % state.reference.streams, i // state.reference.streams) not in items for i in late)
            indices, td, mask = indices[keep], td[keep], None
        if len(indices):
            state.reference.update(indices, td, mask)

    def save(self, s, state, method, folder):
        where = s.pick([None, 3, "a\0b", os.path.join(self.folder, "file")]) if s.flawed() else folder
        open(os.path.join(self.folder, "file"), "w").close()
        if self.call(s, method, lambda: state.replay.save(where)) and where == folder:
            state.saved = len(state.replay)

    def load(self, s, state, method, folder):
        if state.saved is None:
            s.wrong = True
        how = (
            {
                "storage": s.pick(["memory", "file", "disk", 3]),
                "device": s.pick(["cpu", "cpu", "cuda", 3]),
                "manifest": s.pick([None, None, "/nowhere", 3]),
            }
            if s.flawed(0.2)
            else {}
        )
        if state.saved is not None and s.flawed(0.3):  # a copy of it, damaged
            copied = os.path.join(self.folder, "damaged")
            shutil.rmtree(copied, ignore_errors=True)
            shutil.copytree(folder, copied)
            name = os.path.join(copied, s.pick(sorted(os.listdir(copied))))
            with open(name, "rb") as file:
                data = bytearray(file.read())
            if data:
                place = s.integer(0, len(data) - 1)
                data = s.pick([data[:place], data + b"x", data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :], b"{}", b"[" * 9999])
            with open(name, "wb") as file:
                file.write(data)
            folder = copied
        read_only = s.arg(s.chance(0.3))
        done = self.call(s, method, lambda: SequenceReplay.load(s.arg(folder), read_only, **how))
        if done:
            if not s.wrong:
                assert len(done[0]) == state.saved
            done[0].close()

    def prune(self, s, state, method, folder):
        where, keep = s.arg(folder), s.arg([])
        done = self.call(s, method, lambda: SequenceReplay.prune(where, keep), may_fail=[".*No such file"] if state.saved is None else [])
        if done and state.saved is not None and not s.wrong:
            SequenceReplay.load(folder).close()

    def shared(self, s, state):
        """One object, three threads: whatever they do, in whatever order."""
        replay = state.replay

        def work(seed):
            mine = Source(np.random.default_rng(seed), 0.05)
            own = State(replay, state.reference, state.fields, state.how, np.full(state.how["num_streams"], True))
            for i in range(25):
                try:
                    streams = range(state.how["num_streams"])
                    rows, _ = self.rows(mine, own, streams)
                    rows["is_first"][:] = True  # so that any order will do
                    mine.pick(
                        [
                            lambda: replay.add(rows),
                            lambda: replay.sample(3),
                            lambda: len(replay),
                            lambda: replay.save(os.path.join(self.folder, "shared", str(seed))),
                            lambda: replay.update_priorities(
                                replay.sample(2).indices[:0],
                                np.zeros(0, np.float32)
                                if state.how.get("n_step")
                                else np.zeros((0, state.how["sequence_length"] - 1 - state.how["burn_in"]), np.float32),
                            ),
                            lambda: replay.sampleable,
                            lambda: replay.close() if i > 20 and seed % 7 == 0 else replay.bytes,
                        ]
                    )()
                except (ValueError, RuntimeError) as error:
                    assert re.match(r"sample: nothing|SequenceReplay: it has been closed", str(error)), error

        seeds = s.rng.integers(0, 2**31, 3).tolist()
        together(*[lambda seed=seed: work(seed) for seed in seeds])
        with contextlib.suppress(RuntimeError):
            root, leaves = replay._core.totals()
            assert root == leaves
        replay.close()
        shutil.rmtree(os.path.join(self.folder, "shared"), ignore_errors=True)


class State:
    """A replay, what it should be, and what a caller keeps beside it."""

    def __init__(self, replay, reference, fields, how, opens):
        self.replay, self.reference, self.fields, self.how, self.opens = replay, reference, fields, how, opens
        self.indices, self.saved = np.zeros(0, np.int64), None


TARGETS = {"knn": Knn, "memory": Memory, "normalizer": Normalizer, "latent": Latents, "ema": Ema, "replay": Replay}


def resident():
    """Bytes of memory the process holds, after everything that may be given back was."""
    gc.collect()
    if jax is not None:
        jax.clear_caches()  # it keeps a program for each shape
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def run(name, calls, seed, only, most, told):
    """A target in this process; tells by shared memory which round it is in."""
    global jax
    if importlib.util.find_spec("jax"):
        import jax

        jax.config.update("jax_enable_x64", True)  # else it makes other dtypes of some results, by a program for each shape
    faulthandler.enable()
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="urlfast-fuzz-", dir=base) as folder:
        target = TARGETS[name](folder)
        first, begin, warm = only or 0, time.monotonic(), None
        number = first
        while True:
            told[:8] = struct.pack("q", number)
            faulthandler.dump_traceback_later(HANG, exit=True)
            target.round(Source(np.random.default_rng([seed, list(TARGETS).index(name), number])))
            number += 1
            least = min(target.counts[m] for m in target.methods)
            if only is not None or least >= calls:
                break
            if warm is None and least >= calls * 0.4:
                warm = resident()
        faulthandler.cancel_dump_traceback_later()
        growth = resident() - warm if warm else 0
        assert growth < most << 20, f"its memory grew by {growth >> 10} kB in {sum(target.counts.values()) * 0.6:.0f} calls"
        counts = ", ".join(f"{m} {target.counts[m]:,}" for m in target.methods)
        print(f"{name}: {counts}; {number - first:,} rounds, {time.monotonic() - begin:.0f} s, memory {growth >> 10:+d} kB", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--target", choices=TARGETS, nargs="*", default=list(TARGETS))
    parser.add_argument("--only", type=int)
    parser.add_argument("--growth", type=int, default=8, help="MB that a target may grow by, which the allocator's habits explain")
    given = parser.parse_args()
    print(f"seed {given.seed}, {given.calls:,} calls of each", flush=True)
    failed, told = False, mmap.mmap(-1, 8)
    for name in given.target:
        process = os.fork()
        if process == 0:
            try:
                run(name, given.calls, given.seed, given.only, given.growth, told)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code:
            (number,) = struct.unpack("q", told[:8])
            how = f"signal {-code}" if code < 0 else f"exit {code}"
            print(f"{name}: FAILED in round {number} ({how}); again: --seed {given.seed} --target {name} --only {number}", flush=True)
            failed = True
    return failed


jax = None
if __name__ == "__main__":
    sys.exit(main())
