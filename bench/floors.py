"""The machine's peaks, measured: what bench_X.py's Work is divided by.

read, copy, gather   bytes a second of memory far beyond the caches; copies with stores that pass them by. gather: frames of 84 x 84 bytes.
fp32                 float32 operations a second: fused multiply-adds in registers.
bf16                 the same with bfloat16 factors: torch's product of two 2048 x 2048 matrices, so a little below the true peak.

The first four are loops of floors.cpp, compiled here for this processor; without a C++ compiler they are left out.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch

from bench.harness import CLOCKS, equal_threads
from urlfast.device import has_bf16

FRAME = 84 * 84


@cache
def loops() -> ctypes.CDLL | None:
    """floors.cpp, compiled; None without a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not compiler:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/floors.so"
        source = Path(__file__).with_name("floors.cpp")
        subprocess.run([compiler, "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", library], check=True)
        found = ctypes.CDLL(library)  # stays loaded when the file is gone
    found.read_all.restype = ctypes.c_float
    found.multiply_add.restype = ctypes.c_double
    return found


def peaks(threads: int, *, quick: bool = False, clock: str = "wall") -> dict[str, float]:
    """Bytes or operations a second by name, on `threads` threads: the best of several measurements."""
    turns, size = (3, 1 << 26) if quick else (15, 1 << 28)
    work = {**memory_and_arithmetic(threads, size), **matrix_products()}
    with equal_threads(threads):
        found = {}
        for name, (call, amount) in work.items():
            call()
            found[name] = amount / min(CLOCKS[clock](call, 1) for _ in range(turns))
    return found


def memory_and_arithmetic(threads: int, size: int) -> dict[str, tuple]:
    """{name: (call, bytes or operations of a call)}; ctypes lets go of the interpreter, so plain threads do."""
    native = loops()
    if not native:
        return {}
    pool = ThreadPoolExecutor(threads)
    source, target = (np.full(size, i, np.uint8) for i in (0, 1))
    starts = np.random.default_rng(0).integers(0, size // FRAME, size // FRAME) * FRAME
    parts = [(int(i[0]), len(i)) for i in np.array_split(np.arange(size // FRAME), threads)]  # first frame, frames
    out = (ctypes.c_float * threads)()

    def spread(part):
        return (lambda: list(pool.map(part, range(threads)))) if threads > 1 else lambda: part(0)

    def read(i):
        native.read_all(at(source, parts[i][0] * FRAME), ctypes.c_size_t(parts[i][1] * FRAME // 4))

    def copy(i):
        start, count = parts[i]
        native.copy_all(at(target, start * FRAME), at(source, start * FRAME), ctypes.c_size_t(count * FRAME))

    operations = []

    def multiply_add(i):
        operations.append(native.multiply_add(ctypes.c_size_t(4_000_000), ctypes.byref(out, 4 * i)))

    multiply_add(0)
    every = size // FRAME * FRAME
    return {
        "read": (spread(read), every),
        "copy": (spread(copy), every),
        "gather": (gathers(source, target, [starts], FRAME, threads), every),
        "fp32": (spread(multiply_add), operations[0] * threads),
    }


def gathers(source: np.ndarray, target: np.ndarray, starts: list[np.ndarray], run: int, threads: int):
    """A call that copies runs of `run` bytes from `source` into `target`, past the caches; None without a compiler.

    starts: where the runs begin, in bytes (int64); each call takes the next of these arrays, so that no cache holds what it reads.
    """
    native = loops()
    if not native:
        return None
    pool = ThreadPoolExecutor(threads)
    order = itertools.cycle(starts)
    parts = [(int(i[0]), len(i)) for i in np.array_split(np.arange(len(starts[0])), threads)]

    def part(chosen, first, count):
        native.gather(at(target, first * run), at(source), at(chosen, first * 8), ctypes.c_size_t(count), ctypes.c_size_t(run))

    def call():
        chosen = next(order)
        list(pool.map(lambda p: part(chosen, *p), parts))

    return call if threads > 1 else lambda: part(next(order), *parts[0])  # a small copy takes no longer than the way to a thread


def at(array: np.ndarray, offset: int = 0) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data + offset)


def matrix_products() -> dict[str, tuple]:
    if not has_bf16(torch.device("cpu")):
        return {}
    a, b, out = (torch.ones(2048, 2048, dtype=torch.bfloat16) for _ in range(3))
    return {"bf16": (lambda: torch.mm(a, b, out=out), 2 * 2048**3)}
