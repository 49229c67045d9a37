"""The bench's own machinery. Nothing here depends on how long anything takes."""

import json
import pathlib
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from urlfast import _core

ROOT = pathlib.Path(__file__).parent.parent
if not (ROOT / "bench").exists():
    pytest.skip("the tests run outside a checkout", allow_module_level=True)
sys.path.append(str(ROOT))  # at the end: an installed urlfast stays the one that is tested

from bench import __main__ as command  # noqa: E402
from bench import harness, readme, results  # noqa: E402


def array_of(value):
    return lambda x: lambda: x + value


def case(contestants=None, **options):
    contestants = contestants or {"urlfast": array_of(0.0), "peer": array_of(0.0)}
    options = {"check": harness.agree(1e-6), **options}
    return harness.Case("piece", "3 floats", 1, lambda: (np.ones(3),), contestants, **options)


# Contests ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda array: array, lambda array: [torch.from_numpy(array)], lambda array: (array, array)])
def test_a_contestant_that_computes_something_else_is_named(wrap):
    def contest(*values):
        return case({f"contestant {v}": (lambda x, v=v: lambda: wrap(x + v)) for v in values})

    harness.prepare(contest(0.0, 1e-9))
    with pytest.raises(AssertionError, match=r"piece 3 floats x1: (.|\n)*contestant 0\.1 and contestant 0\.0 disagree"):
        harness.prepare(contest(0.0, 1e-9, 0.1))


def test_what_is_not_installed_is_absent_and_what_is_slow_is_left_out_when_quick():
    contest = case({"urlfast": array_of(0.0), "slow": array_of(0.0), "missing": None}, slow=("slow",))
    assert harness.optional("no_such_package_anywhere") is None
    for quick, names in ((False, ["urlfast", "slow"]), (True, ["urlfast"])):
        calls, absent = harness.prepare(contest, quick)
        assert list(calls) == names and absent == ["missing"]
    assert harness.run(contest, {}, quick=True)["absent"] == ["missing"]


def test_turns_are_taken_in_turn_and_every_call_has_enough():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = harness.in_turns(calls, seconds=0.0, rounds=4, clock="wall")
    assert {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4, "c": 4}
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]  # a turn may be many calls
    assert "".join(turns) == "abc" * 5  # once to see how long a call takes
    assert all(t > 0 for several in times.values() for t in several)


def test_the_cpu_clock_counts_the_busiest_thread_and_no_sleep():
    import threading
    import time

    assert harness.time_cpu(lambda: time.sleep(0.05), 1) < 0.04

    def elsewhere():
        done = threading.Event()

        def work():
            end = time.thread_time() + 0.05
            while time.thread_time() < end:
                pass
            done.set()
            release.wait()

        threads.append(threading.Thread(target=work))
        threads[-1].start()
        done.wait()

    threads, release = [], threading.Event()
    spent = harness.time_cpu(elsewhere, 1)
    release.set()
    threads[0].join()
    assert 0.05 <= spent < 0.1


def test_a_run_holds_what_is_stored(capsys):
    floor = harness.Work(read=10.0, fp32=30.0)
    found = harness.run(case(floor=floor, targets={"peer": 0.5, "floor": 0.1}), {"read": 2.0, "fp32": 3.0}, quick=True)
    assert found == json.loads(json.dumps(found))
    assert found["floor"] == 10.0  # the longer of 10 / 2 and 30 / 3
    assert list(found["figures"]) == ["urlfast", "peer"] and found["figures"]["peer"]["turns"] >= 3
    assert harness.run(case(floor=floor), {"read": 2.0}, quick=True)["floor"] is None  # a peak that could not be measured

    timed = harness.run(case(floor=array_of(1.0)), {}, quick=True)
    assert list(timed["figures"]) == ["urlfast", "peer"] and timed["floor"] > 0

    held = harness.run(case({"urlfast": lambda x: lambda: 7100}, unit="B", check=lambda results: None), {}, quick=True)
    assert held["figures"]["urlfast"]["median"] == 7100


def test_threads_are_equal_and_come_back():
    before = torch.get_num_threads(), _core.num_threads()
    with harness.equal_threads(3):
        assert (torch.get_num_threads(), _core.num_threads()) == (3, 3)
    assert (torch.get_num_threads(), _core.num_threads()) == before


def test_a_target_over_nobody_is_refused():
    with pytest.raises(ValueError, match=r"piece 3 floats x1: targets must name .* got \['floor', 'pear'\]"):
        case(targets={"pear": 2.0, "floor": 0.9})


# What a stored run says ---------------------------------------------------------------------------------------------------------


def stored(piece="knn", shape="a", ours=1e-3, threads=2, floor=None, targets=None, unit="s", absent=(), **peers):
    figures = {name: {"median": value, "min": value, "turns": 5} for name, value in {"urlfast": ours, **peers}.items()}
    return {
        "piece": piece,
        "shape": shape,
        "threads": threads,
        "unit": unit,
        "targets": targets or {},
        "clock": "wall",
        "figures": figures,
        "floor": floor,
        "absent": list(absent),
    }


def a_run(*cases, date="2026-01-02T03:04Z", processor="Some Processor", **more):
    return {
        "processor": processor,
        "cores": 2,
        "memory": 2**34,
        "flags": ["avx2"],
        "isa": "avx2",
        "load": 0.1,
        "versions": {},
        "date": date,
        "commit": "abc",
        "command": "python -m bench",
        "quick": False,
        "peaks": {"2": {"read": 4e10}},
        "mean_targets": {"knn": 4.0},
        "cases": list(cases),
        **more,
    }


RUN = a_run(
    stored(shape="256 x self", faiss=3e-3, cdist=2.5e-3, floor=5e-4, targets={"fastest": 2.0, "faiss": 30.0, "floor": 0.5}),
    stored(shape="64 x self", cdist=10e-3, targets={"faiss": 2.0}, absent=["faiss"]),
    stored("replay", "bytes", ours=7061.0, threads=1, unit="B", cpprb=14122.0, targets={"at most": 7200}),
)


def test_ratios_floors_and_verdicts():
    first, second, third = RUN["cases"]
    assert list(results.ratios(first)) == ["cdist", "faiss"] and results.fastest(first) == pytest.approx(2.5)
    assert results.of_floor(first) == pytest.approx(0.5) and results.of_floor(second) is None
    assert results.verdicts(first) == [
        ("fastest 2.5x (target 2.0x)", True),
        ("faiss 3.0x (target 30x)", False),
        ("floor 50% (target 50%)", True),
    ]
    assert results.verdicts(second) == [("faiss not measured (target 2.0x)", None)]
    assert results.verdicts(third) == [("7.06 kB (at most 7.2 kB)", True)]
    assert results.means(RUN["cases"]) == {("knn", 2): pytest.approx(5.0)}  # the geometric mean of 2.5 and 10; bytes are not times


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (1.5, "s", "1.5 s"),
        (1.23e-3, "s", "1.23 ms"),
        (9.996e-4, "s", "1 ms"),
        (2e-8, "s", "0.02 us"),
        (7061, "B", "7.06 kB"),
        (12, "B", "12 B"),
    ],
)
def test_amounts(value, unit, text):
    assert results.amount(value, unit) == text


def test_the_table_says_it_all_in_one_row():
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(command.table(RUN))
    lines = console.export_text().splitlines()
    row = next(line for line in lines if "256 x self" in line)
    assert all(text in row for text in ("knn", "1 ms", "cdist 2.5x, faiss 3.0x", "50%", "fastest 2.5x (target 2.0x)"))
    assert any("faiss 3.0x (target 30x): not met" in line for line in lines)
    assert "faiss absent" in next(line for line in lines if "64 x self" in line)
    assert any("geometric mean" in line and "5.0x (target 4.0x)" in line for line in lines)


# The README ---------------------------------------------------------------------------------------------------------------------


def test_readme_has_a_line_a_piece_and_the_page_every_case_and_what_is_not_met():
    text = readme.section(readme.merged([RUN]))
    assert text.startswith(readme.BEGIN) and text.endswith(readme.END)
    assert "Some Processor" in text and "2026-01-02" in text
    assert "| knn | 2 | 5.0x (2 threads) | 2.5x | 3 of 4, 1 not measured |" in text  # the mean's target among them
    assert "| replay | 1 |  |  | 1 of 1 |" in text
    every = readme.page(readme.merged([RUN]))
    assert "2026-01-02: `python -m bench`" in every and "read 40" in every
    assert "- knn: 256 x self, 2 threads: faiss 3.0x (target 30x)\n" in every
    assert "| knn: 256 x self | 2 | 1 ms | cdist 2.5x, faiss 3.0x | 50% |" in every


def test_the_newest_measurement_of_a_case_counts_on_each_processor():
    old = a_run(stored(shape="a", cdist=1.0), stored(shape="b", cdist=1.0), date="2026-01-01T00:00Z")
    new = a_run(stored(shape="a", cdist=2.0), stored("ema", cdist=3.0), date="2026-01-02T00:00Z", command="python -m bench --only knn,ema")
    other = a_run(stored(shape="a", cdist=4.0), processor="Another", date="2026-01-03T00:00Z")
    mine, others = readme.merged([new, other, old])
    figures = {readme.key(case): case["figures"]["cdist"]["median"] for case in mine["cases"]}
    assert figures == {("knn", "a", 2): 2.0, ("knn", "b", 2): 1.0, ("ema", "a", 2): 3.0}
    assert len(mine["how"]) == 2 and "2026-01-02: `python -m bench --only knn,ema`" in mine["how"]
    everything = a_run(*old["cases"], *new["cases"], date="2026-01-04T00:00Z")
    assert readme.merged([everything, old, new])[0]["how"] == ["2026-01-04: `python -m bench`"]  # of the others nothing is left
    assert [case["figures"]["cdist"]["median"] for case in others["cases"]] == [4.0]


def test_only_what_stands_between_the_markers_is_rewritten():
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter"
    assert readme.rewritten(text, f"{readme.BEGIN}\nnew\n{readme.END}") == f"before\n{readme.BEGIN}\nnew\n{readme.END}\nafter"
    with pytest.raises(ValueError, match="README: must have the lines"):
        readme.rewritten("no markers", "new")


def test_the_readme_is_what_the_stored_results_say():
    text = (ROOT / "README.md").read_text()
    runs = readme.load()
    if runs:
        assert readme.section(runs) in text, "run `python -m bench.readme`"
        assert (ROOT / "docs" / "bench.md").read_text() == readme.page(runs), "run `python -m bench.readme`"
    else:
        assert readme.BEGIN in text


def test_the_picture_is_drawn(tmp_path):
    other = a_run(stored(shape="256 x self", cdist=0.5e-3), processor="Another")
    readme.draw(readme.merged([RUN, other]), tmp_path / "docs" / "bench.png")
    assert (tmp_path / "docs" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_piece_that_does_not_exist_is_named(capsys):
    with pytest.raises(SystemExit):
        command.main(["--only", "knn,emma"])
    assert "no piece is called 'emma'" in capsys.readouterr().err
