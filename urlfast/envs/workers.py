"""Environments in processes of their own: how those are started, asked and stopped, and what memory they share with their parent.

The parent's half is WorkerEnv, a VectorEnv; the workers' half is Worker, whose module is run by `python -m` and calls `serve`. They talk by
a pipe, in requests (method, *arguments) and answers, and exchange what a step needs through arrays in shared memory. Neither half imports
torch, and a worker does not import its parent's main module.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import signal
import subprocess
import sys
import traceback
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import numpy as np

from urlfast.envs import VectorEnv

Columns = Mapping[str, tuple[tuple[int, ...], type]]  # {name: (shape, dtype)}


def shared_arrays(memory: mmap.mmap | None, columns: Columns) -> tuple[dict[str, np.ndarray], int]:
    """Columns as views of `memory` (None: only count), and their bytes. Every worker touches the rows of its own environments only."""
    arrays, offset = {}, 0
    for name, (shape, dtype) in columns.items():
        if memory is not None:
            arrays[name] = np.frombuffer(memory, dtype, int(np.prod(shape)), offset).reshape(shape)
        offset += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // 64) * 64  # no two columns in one cache line
    return arrays, offset


_STEP = pickle.dumps(("step",))

# The parent's half ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Process:
    process: subprocess.Popen
    pipe: Connection
    environments: range


class WorkerEnv(VectorEnv):
    """A VectorEnv over processes, each with its share of the environments.

    They end with `close`, with this object, and with the process that made it, even by `kill -9`. Ctrl-C does not reach them. A worker that
    dies or fails is a RuntimeError that says which, and closes the environment.
    """

    _kind: str  # what an error calls the processes
    _worker: str  # the module that they run

    def _start(self, workers: int, environment: Mapping[str, str] | None = None) -> None:
        """Start `workers` processes (0: one per processor; never more than environments) with `environment` added to their own."""
        workers = min(workers or len(os.sched_getaffinity(0)), self.num_envs)
        self._memory_fd = os.memfd_create("urlfast")
        self._pool: list[_Process] = []
        self._stop = weakref.finalize(self, _stop_workers, self._pool, os.getpid())
        try:
            for share in np.array_split(np.arange(self.num_envs), workers):
                environments = range(int(share[0]), int(share[-1]) + 1)
                self._pool.append(_start_worker(self._worker, environments, self._memory_fd, environment or {}))
        except BaseException:
            self._drop_memory()
            raise

    def _share(self, columns: Columns) -> None:
        """Make `self._shared`, the arrays of `columns`, and show them to the workers."""
        _, size = shared_arrays(None, columns)
        os.ftruncate(self._memory_fd, size)
        self._shared, _ = shared_arrays(mmap.mmap(self._memory_fd, size), columns)
        self._all("share", columns)
        self._drop_memory()

    def _drop_memory(self) -> None:
        """Close the memory's descriptor: the workers have theirs, and the arrays keep the memory."""
        if self._memory_fd is not None:
            os.close(self._memory_fd)
            self._memory_fd = None

    def _ask(self, worker: _Process, *request) -> None:
        self._tell(worker, pickle.dumps(request))

    def _ask_for_steps(self) -> None:
        """Ask every worker for ("step",), the one request that is made often."""
        for worker in self._pool:
            self._tell(worker, _STEP)

    def _tell(self, worker: _Process, message: bytes) -> None:
        try:
            worker.pipe.send_bytes(message)
        except ConnectionError:
            self._fail(worker)

    def _answer(self, worker: _Process):
        try:
            good, answer = worker.pipe.recv()
        except (EOFError, ConnectionError):
            self._fail(worker)
        if not good:
            self._fail(worker, answer)
        return answer

    def _all(self, *request) -> list:
        """What each worker answers to `request`."""
        for worker in self._pool:
            self._ask(worker, *request)
        return [self._answer(worker) for worker in self._pool]

    def _ask_about(self, i: int, *request):
        """What the worker of environment `i` answers to (method, i, ...)."""
        if self._state != "ready":
            raise RuntimeError(f"{request[0]}: only after reset or recv")
        if not 0 <= i < self.num_envs:
            raise ValueError(f"i: must lie in 0..{self.num_envs - 1}, got {i}")
        worker = next(worker for worker in self._pool if i in worker.environments)
        self._ask(worker, request[0], i, *request[1:])
        return self._answer(worker)

    def _fail(self, worker: _Process, report: str | None = None):
        code = None if report else worker.process.wait(timeout=10)
        self.close()
        who = f"the {self._kind} process of environments {worker.environments.start}..{worker.environments.stop - 1}"
        if report:
            raise RuntimeError(f"{who} failed:\n{report}")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        raise RuntimeError(f"{who} {how}")

    def _close(self):
        self._drop_memory()
        self._stop()


def _start_worker(module: str, environments: range, memory_fd: int, environment: Mapping[str, str]) -> _Process:
    """A fresh interpreter, not multiprocessing's spawn, which would import the caller's main module (and so torch) into each."""
    ours, theirs = Pipe()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module, *map(str, (theirs.fileno(), memory_fd, environments.start, environments.stop))],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OPENBLAS_NUM_THREADS": "1",  # the processes are the parallelism
            **environment,
        },
        stdin=subprocess.DEVNULL,
        pass_fds=(theirs.fileno(), memory_fd),
        process_group=0,  # a Ctrl-C in the terminal is the parent's to handle
    )
    theirs.close()
    return _Process(process, ours, environments)


def _stop_workers(pool: list[_Process], owner: int) -> None:
    if os.getpid() != owner:  # a fork's copy of the object does not own the processes
        return
    for worker in pool:
        with contextlib.suppress(OSError):  # it has died before
            worker.pipe.send(("close",))
        worker.pipe.close()
    for worker in pool:
        try:
            worker.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


# The workers' half ---------------------------------------------------------------------------------------------------------------


class Worker:
    """Some environments of the parent, by their numbers there. A subclass has a method for each thing that the parent can ask."""

    def __init__(self, memory_fd: int, environments: range):
        self.memory_fd, self.environments = memory_fd, environments

    def share(self, columns: Columns) -> None:
        self.shared, _ = shared_arrays(mmap.mmap(self.memory_fd, 0), columns)

    def close(self) -> None:
        """What is to be done before the process ends."""


def serve(kind: type[Worker]) -> None:
    """Answer each (method, *arguments) with (True, result) or (False, traceback), until told to close or the parent is gone."""
    pipe, memory_fd, first, end = map(int, sys.argv[1:])
    pipe, worker = Connection(pipe), kind(memory_fd, range(first, end))
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        while (request := pipe.recv())[0] != "close":
            method, *arguments = request
            try:
                answer = (True, getattr(worker, method)(*arguments))
            except Exception:
                answer = (False, traceback.format_exc())
            pipe.send(answer)
    worker.close()
