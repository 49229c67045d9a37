"""Contests: a piece of urlfast and what its user would take instead, timed in turns, on equal threads, beside what the machine allows.

A bench_X.py has `cases(threads) -> list[Case]` and nothing else that anyone asks for; it may have `MEAN_TARGET`, what the geometric mean of
its cases' ratios to the fastest peer must reach. `python -m bench` finds the file by its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import urlfast
from urlfast import _core

Call = Callable[[], Any]
Make = Callable[..., Call]


@dataclasses.dataclass(frozen=True)
class Work:
    """What a piece cannot do without: bytes, and operations on numbers. Its time at the measured peaks is the longest of the parts'."""

    read: float = 0  # bytes read from memory
    copy: float = 0  # bytes copied: each is read and written
    gather: float = 0  # bytes copied from random places, in frames of 84 x 84
    fp32: float = 0  # float32 operations, two for a fused multiply-add
    bf16: float = 0  # the same with bfloat16 factors

    def seconds(self, peaks: Mapping[str, float]) -> float | None:
        """None where a peak that it needs could not be measured."""
        parts = {name: amount for name, amount in vars(self).items() if amount}
        if not all(name in peaks for name in parts):
            return None
        return max(amount / peaks[name] for name, amount in parts.items())


def agree(rtol: float, atol: float = 0.0, **own: float) -> Callable[[dict[str, Any]], None]:
    """A check that all results, arrays or lists of arrays, equal the first contestant's. own: another rtol, by the contestant's name."""

    def check(results):
        (ours, first), *others = results.items()
        for name, result in others:
            pairs = zip(result, first, strict=True) if isinstance(first, list | tuple) else [(result, first)]
            for got, want in pairs:
                got, want = np.asarray(got), np.asarray(want)
                np.testing.assert_allclose(got, want, own.get(name, rtol), atol, err_msg=f"{name} and {ours} disagree")

    return check


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One contest. Declaring it costs nothing; `prepare` makes the arrays.

    piece, shape, threads   name it. `threads` holds for every contestant.
    inputs       () -> tuple, made once.
    contestants  {name: make}, ours first; make(*inputs) -> call, a function without arguments that does the work. None: what the contestant
                 needs is not installed, which the table then says.
    check        raises AssertionError unless {name: what its first call returned} are all as they should be. Runs before anything is timed.
    floor        what none can beat: make(*inputs), timed in turns with the contestants, or Work at the measured peaks. A make that gives
                 None has no way to measure it here.
    targets      {a peer's name, or "fastest": how many times as fast ours must be; "floor": the fraction of the floor it must reach;
                 "at most": the figure it may not exceed}.
    unit         "s": calls are timed. "B": a call returns a number of bytes and is asked once.
    slow         contestants that take long to get ready, left out by --quick.
    processes    some contestant works in other processes, so that only the wall clock sees it.
    """

    piece: str
    shape: str
    threads: int
    inputs: Callable[[], tuple]
    contestants: dict[str, Make | None]
    check: Callable[[dict[str, Any]], None]
    floor: Make | Work | None = None
    targets: dict[str, float] = dataclasses.field(default_factory=dict)
    unit: str = "s"
    slow: tuple[str, ...] = ()
    processes: bool = False

    def __post_init__(self):
        known = {*self.contestants, "fastest", "at most", *(["floor"] if self.floor else [])}
        if unknown := set(self.targets) - known:
            raise ValueError(f"{self}: targets must name a contestant, 'fastest', 'at most' or its floor, got {sorted(unknown)}")

    def __str__(self):
        return f"{self.piece} {self.shape} x{self.threads}"


def optional(module: str):
    """The module, or None where its package is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module.partition(".")[0]:
            raise
        return None


def pieces() -> list[str]:
    """The X of every bench_X.py here."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def cases_of(piece: str, threads: Iterable[int]) -> list[Case]:
    """The piece's cases on so many threads each, those of one shape side by side."""
    module = importlib.import_module(f"bench.bench_{piece}")
    cases = [case for count in threads for case in module.cases(count)]
    shapes = list(dict.fromkeys(case.shape for case in cases))
    return sorted(cases, key=lambda case: shapes.index(case.shape))


# Equal threads and clocks ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def equal_threads(count: int) -> Iterator[None]:
    """`count` threads for torch, urlfast, faiss, and the OpenMP and BLAS libraries that are loaded; afterwards as before."""
    before = torch.get_num_threads(), _core.num_threads()
    faiss, limits = optional("faiss"), optional("threadpoolctl")
    with contextlib.ExitStack() as stack:
        if limits:
            stack.enter_context(limits.threadpool_limits(count))
        if faiss:
            stack.callback(faiss.omp_set_num_threads, faiss.omp_get_max_threads())
            faiss.omp_set_num_threads(count)
        torch.set_num_threads(count)
        urlfast.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before[0])
            urlfast.set_num_threads(before[1])


def apart(make, threads):
    """The contestant in a process of its own, which ends when nobody holds the call any more."""

    def made(*inputs):
        spawn = multiprocessing.get_context("spawn")
        here, there = spawn.Pipe()
        spawn.Process(target=_serve, args=(there, make, threads, inputs), daemon=True).start()
        there.close()

        def call():
            here.send(None)
            return here.recv()

        return call

    return made


def _serve(pipe, make, threads, inputs):
    with equal_threads(threads), contextlib.suppress(EOFError):
        call = make(*inputs)
        while True:
            pipe.recv()
            pipe.send({name: float(value) for name, value in call().items() if value.numel() == 1})


def time_wall(call: Call, loops: int) -> float:
    """Seconds a call takes, of `loops` in a row."""
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - start) / loops


def time_cpu(call: Call, loops: int) -> float:
    """The same in CPU time of this process's busiest thread, which other programs on the machine disturb less."""
    before = _thread_times()
    for _ in range(loops):
        call()
    return max(seconds - before.get(thread, 0.0) for thread, seconds in _thread_times().items()) / loops


def _thread_times() -> dict[str, float]:
    times = {}
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended
            times[thread] = time.clock_gettime(~int(thread) << 3 | 6)  # Linux's name for the CPU clock of a thread
    return times


CLOCKS = {"wall": time_wall, "cpu": time_cpu}


# One contest -------------------------------------------------------------------------------------------------------------------

FLOOR = "floor"  # the floor's name among the calls


def prepare(case: Case, quick: bool = False) -> tuple[dict[str, Call], list[str]]:
    """The calls by name, checked against each other, with a timed floor among them; and the names of those that are absent.

    Raises AssertionError, which names the case, where results are not what they should be.
    """
    inputs = case.inputs()
    makes = {name: make for name, make in case.contestants.items() if make and not (quick and name in case.slow)}
    calls = {name: make(*inputs) for name, make in makes.items()}
    try:
        case.check({name: call() for name, call in calls.items()})
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from error
    if callable(case.floor) and (floor := case.floor(*inputs)):
        calls[FLOOR] = floor
    return calls, [name for name, make in case.contestants.items() if make is None]


def in_turns(calls: dict[str, Call], seconds: float, rounds: int, clock: str, warm: float = 0.0) -> dict[str, list[float]]:
    """Times of each call, taken a b c a b c ..., so that drift hits all alike; for `seconds` each, warming included, and `rounds` times.

    warm: seconds of untimed calls before each turn, in which the threads of the contestant before stop spinning and its own wake up.
    """
    measure = CLOCKS[clock]
    loops, times, spent = {}, {name: [] for name in calls}, dict.fromkeys(calls, 0.0)
    for name, call in calls.items():
        once = time_wall(call, 1)
        if once < TURN:
            once = max(min(time_wall(call, 1) for _ in range(10)), 1e-7)
        loops[name] = max(1, round(TURN / once))
    gc.collect()
    gc.disable()
    try:
        while turn := [name for name in calls if len(times[name]) < rounds or spent[name] < seconds]:
            for name in turn:
                start = time.perf_counter()
                while warm and time.perf_counter() < start + warm:
                    calls[name]()
                times[name].append(measure(calls[name], loops[name]))
                spent[name] += time.perf_counter() - start
    finally:
        gc.enable()
    return times


TURN = 4e-3  # seconds that a turn of a short call is filled up to: with warm caches, and beyond what a clock can resolve


def run(case: Case, peaks: Mapping[str, float], *, quick: bool = False, clock: str = "wall") -> dict:
    """What the case measures, as it is stored:

    {"piece", "shape", "threads", "unit", "clock", "figures": {name: {"median", "min", "turns"}}, "floor": figure or None, "absent": [name],
    "targets": {...}}, figures in the case's unit, ours first.
    """
    clock = "wall" if case.processes else clock
    with equal_threads(case.threads):
        calls, absent = prepare(case, quick)
        if case.unit == "s":
            # OpenMP's threads spin for some 5 ms after their work (libgomp: 300,000 times), on the cores that the next contestant needs
            times = in_turns(calls, 0.1 if quick else 2.0, 3, clock, warm=30e-3 if case.threads > 1 else 0.0)
        else:
            times = {name: [float(call())] for name, call in calls.items()}
    figures = {name: {"median": float(np.median(t)), "min": float(np.min(t)), "turns": len(t)} for name, t in times.items()}
    if callable(case.floor):
        floor = figures.pop(FLOOR)["median"] if FLOOR in figures else None
    else:
        floor = case.floor and case.floor.seconds(peaks)
    return {
        **{name: getattr(case, name) for name in ("piece", "shape", "threads", "unit", "targets")},
        "clock": clock,
        "figures": figures,
        "floor": floor,
        "absent": absent,
    }
