"""The thread pool: how many threads it takes, that fork and many callers do not disturb it. Each case in a process of its own."""

import os
import subprocess
import sys
import textwrap

import pytest

import urlfast

WORK = """
import sys, numpy as np, urlfast
from urlfast import _core
x = np.random.default_rng(0).standard_normal(400_000).astype(np.float32)
def work():
    r = urlfast.RunningNormalizer("std")
    return r(x)
"""


def run(code, **env):
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "URLFAST_NUM_THREADS")} | env
    done = subprocess.run([sys.executable, "-c", WORK + textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_where_the_number_of_threads_comes_from():
    count = "print(_core.num_threads())"
    assert run(count, OMP_NUM_THREADS="3") == "3"
    assert run(count, OMP_NUM_THREADS="3", URLFAST_NUM_THREADS="5") == "5"
    assert run(count, URLFAST_NUM_THREADS="none", OMP_NUM_THREADS="") == run(count)  # what is no number counts for nothing
    assert 1 <= int(run(count)) <= len(os.sched_getaffinity(0))


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_affinity_is_respected():
    one = min(os.sched_getaffinity(0))
    assert run(f"import os; os.sched_setaffinity(0, {{{one}}}); print(_core.num_threads())") == "1"


def test_set_num_threads():
    before = urlfast.get_num_threads()
    try:
        for n in (1, 4, 2):
            urlfast.set_num_threads(n)
            assert urlfast.get_num_threads() == n
        for bad in (0, -1, 5000):
            with pytest.raises(ValueError, match=rf"^n: must lie in 1\.\.4096, got {bad}$"):
                urlfast.set_num_threads(bad)
        assert urlfast.get_num_threads() == 2
    finally:
        urlfast.set_num_threads(before)


def test_set_num_threads_starts_and_ends_threads():
    out = run("""
    import os
    def threads(): return len(os.listdir("/proc/self/task"))
    for n in (4, 2, 6, 3):
        urlfast.set_num_threads(n); work(); work(); print(threads() - n)
    """)
    assert len(set(out.split())) == 1, out  # n threads, the caller's among them, beside whatever the process had


def test_the_pool_survives_fork():
    run("""
    import os, signal
    urlfast.set_num_threads(3)
    want = work()
    for _ in range(20):  # a child that inherited a locked mutex, or waits for threads it has not, would hang
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            ok = (work() == want).all() and (work() == want).all()
            grandchild = os.fork()
            if grandchild == 0:
                os._exit(0 if (work() == want).all() else 1)
            os._exit(0 if ok and os.waitpid(grandchild, 0)[1] == 0 else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert (work() == want).all()
    """)


def test_forking_while_another_thread_is_inside_the_pool():
    run("""
    import os, signal, threading
    urlfast.set_num_threads(3)
    want, stop = work(), threading.Event()
    def busy():
        while not stop.is_set(): work()
    caller = threading.Thread(target=busy); caller.start()
    for _ in range(30):
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            os._exit(0 if (work() == want).all() else 1)
        assert os.waitpid(pid, 0)[1] == 0
    stop.set(); caller.join()
    """)


def test_many_callers_at_once_each_get_their_own_result():
    run("""
    import threading
    urlfast.set_num_threads(3)
    want, wrong = work(), []
    def call():
        for i in range(20):
            if not (work() == want).all(): wrong.append(i)
            if i % 5 == 0: urlfast.set_num_threads(1 + i % 4)
    callers = [threading.Thread(target=call) for _ in range(6)]
    [c.start() for c in callers]; [c.join() for c in callers]
    assert not wrong
    """)


def test_multiprocessing_by_fork():
    run("""
    import multiprocessing as mp
    urlfast.set_num_threads(2)
    work()
    with mp.get_context("fork").Pool(2) as pool:
        assert all((y == work()).all() for y in pool.starmap(work, [()] * 4))
    """)


def test_threads_that_the_system_does_not_give_are_not_waited_for():
    run("""
    import resource
    want = work()
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 ** 26,) * 2)  # room for a few stacks
    urlfast.set_num_threads(64)
    assert (work() == want).all() and (work() == want).all()
    """)


def test_denormals_survive_the_import():
    assert run("print(np.float64(1e-310) * 1 > 0, np.float32(1e-40) * np.float32(1) > 0)") == "True True"
