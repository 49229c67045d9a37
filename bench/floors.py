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
        subprocess.run(
            [compiler, "-O3", "-march=native", "-std=c++17", "-pthread", "-shared", "-fPIC", str(source), "-o", library], check=True
        )
        found = ctypes.CDLL(library)  # stays loaded when the file is gone
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
    """{name: (call, bytes or operations of a call)}"""
    native = loops()
    if not native:
        return {}
    source, target = (np.full(size, i, np.uint8) for i in (0, 1))
    starts = np.random.default_rng(0).integers(0, size // FRAME, size // FRAME) * FRAME
    out = (ctypes.c_float * threads)()

    def multiply_add():
        return native.multiply_add(ctypes.c_size_t(4_000_000), out, threads)

    every = size // FRAME * FRAME
    return {
        "read": (reads(source, threads), size),
        "copy": (lambda: native.copy_all(at(target), at(source), ctypes.c_size_t(size), threads), size),
        "gather": (gathers(source, target, [starts], FRAME, threads), every),
        "fp32": (multiply_add, multiply_add()),
    }


def reads(array: np.ndarray, threads: int):
    """A call that reads all of a contiguous array once; None without a compiler."""
    native = loops()
    if not native:
        return None
    out = (ctypes.c_float * threads)()
    return lambda: native.read_all(at(array), ctypes.c_size_t(array.nbytes // 4), out, threads)


def gathers(source: np.ndarray, target: np.ndarray, starts: list[np.ndarray], run: int, threads: int):
    """A call that copies runs of `run` bytes from `source` into `target`, past the caches; None without a compiler.

    starts: where the runs begin, in bytes (int64); each call takes the next of these arrays, so that no cache holds what it reads.
    """
    native = loops()
    if not native:
        return None
    order = itertools.cycle(starts)

    def call():
        chosen = next(order)
        native.gather(at(target), at(source), at(chosen), ctypes.c_size_t(len(chosen)), ctypes.c_size_t(run), threads)

    return call


def at(array: np.ndarray, offset: int = 0) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data + offset)


def matrix_products() -> dict[str, tuple]:
    if not has_bf16(torch.device("cpu")):
        return {}
    a, b, out = (torch.ones(2048, 2048, dtype=torch.bfloat16) for _ in range(3))
    return {"bf16": (lambda: torch.mm(a, b, out=out), 2 * 2048**3)}
