"""`pytest bench`: all contestants of all cases under pytest-benchmark, on one and two threads; --benchmark-group-by=group sorts them."""

from functools import lru_cache

import pytest

from bench.harness import FLOOR, cases_of, equal_threads, pieces, prepare

CASES = [case for piece in pieces() for case in cases_of(piece, (1, 2))]
TURNS = [(case, name) for case in CASES for name in [*case.contestants, *([FLOOR] if callable(case.floor) else [])]]


@lru_cache(1)  # a case's arrays live until the next case
def prepared(case):
    with equal_threads(case.threads):
        return prepare(case)[0]


@pytest.mark.parametrize("case, name", TURNS, ids=[f"{case}, {name}" for case, name in TURNS])
def test_case(benchmark, case, name):
    call = prepared(case).get(name)
    if call is None:
        pytest.skip(f"{name} is not installed")
    benchmark.group = str(case)
    with equal_threads(case.threads):
        if case.unit == "s":
            benchmark(call)
        else:
            benchmark.pedantic(call, rounds=1)
            benchmark.extra_info[case.unit] = call()
