"""`python -m bench`: every piece beside its peers and the machine's floor, in one table."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import results
from bench.floors import peaks
from bench.harness import CLOCKS, cases_of, pieces, run
from urlfast import _core
from urlfast.info import hardware, memory
from urlfast.run import versions

RESULTS = Path(__file__).parent / "results"
PEERS = ("faiss-cpu", "scikit-learn", "cpprb", "stable-baselines3", "torchrl", "opencv-python-headless")  # besides what urlfast needs
FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")  # those that decide speed


def machine() -> dict:
    """The processor and what runs on it."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    about = dict(re.findall(r"^(cpu family|model|flags)\s*:\s*(.*)$", cpuinfo, re.MULTILINE))
    family = f" (family {about['cpu family']}, model {about['model']})" if "model" in about else ""  # the name alone may say "AMD EPYC"
    found = dict(versions())
    for package in PEERS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": hardware().partition(",")[0] + family,
        "cores": len(os.sched_getaffinity(0)),
        "memory": memory(),
        "flags": [flag for flag in FLAGS if flag in about.get("flags", "").split()],
        "isa": _core.build_info()["isa"],
        "load": os.getloadavg()[0],  # before the run began: above 1 someone else is at work
        "versions": found,
    }


def commit() -> str | None:
    """The checkout's; with '+' where files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() or None


def default_file(found: dict) -> Path:
    """bench/results/<processor>-<date>.json."""
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', found['processor'].lower()).strip('-')}-{found['date'][:10]}.json"


def write(path: Path, found: dict) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.rename(path)


def table(found: dict) -> Table:
    """One row a case: our time, the peers' by how many times longer they take, the fraction of the floor, and what was asked."""
    load = f", shared (load {found['load']:.1f})" if found["load"] > 0.5 else ""
    title = f"{found['processor']}, {found['cores']} cores{load}, {found['isa']}, {found['date'][:10]}"
    out = Table(title=title + (", --quick" if found["quick"] else ""), title_style="bold", pad_edge=False)
    for name, options in {
        "": {},
        "shape": {},
        "threads": {"justify": "right"},
        "urlfast": {"justify": "right"},
        "the others take, fastest first": {"overflow": "fold"},
        "of floor": {"justify": "right"},
        "target": {},
    }.items():
        out.add_column(name, **options)
    means = results.means(found["cases"])
    for piece in dict.fromkeys(case["piece"] for case in found["cases"]):
        rows = [case for case in found["cases"] if case["piece"] == piece]
        for case in rows:
            others = [f"{escape(name)} {results.times(ratio)}" for name, ratio in results.ratios(case).items()]
            others += [f"[dim]{escape(name)} absent[/]" for name in case["absent"]]
            floor = results.of_floor(case)
            out.add_row(
                piece if case is rows[0] else "",
                escape(case["shape"]),
                str(case["threads"]),
                results.amount(results.ours(case), case["unit"]),
                ", ".join(others),
                f"{floor:.0%}" if floor else "",
                "\n".join(coloured(*verdict) for verdict in results.verdicts(case)),
            )
        for (_, threads), mean in ((key, mean) for key, mean in means.items() if key[0] == piece):
            wanted = found["mean_targets"].get(piece)
            asked = coloured(f"{results.times(mean)} (target {results.times(wanted)})", mean >= wanted) if wanted else ""
            out.add_row("", "[i]geometric mean[/]", str(threads), "", f"[i]the fastest {results.times(mean)}[/]", "", asked)
        out.add_section()
    return out


def coloured(text: str, met: bool | None) -> str:
    return f"{escape(text)}" if met is None else f"[green]{escape(text)}[/]" if met else f"[red]{escape(text)}: not met[/]"


def names(text: str) -> list[str]:
    chosen = text.split(",")
    for name in chosen:
        if name not in pieces():
            raise argparse.ArgumentTypeError(f"no piece is called {name!r}: {', '.join(pieces())}")
    return chosen


def counts(text: str) -> list[int]:
    found = [int(word) for word in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {min(found)}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition(": ")[2])
    parser.add_argument("--only", type=names, default=pieces(), metavar="PIECE,...", help=f"of {', '.join(pieces())}")
    parser.add_argument("--threads", type=counts, default=[1, 2], metavar="N,...", help="threads of every contestant (1,2)")
    parser.add_argument("--quick", action="store_true", help="few turns, and no contestant that is slow to get ready: to see that it works")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: CPU time of the busiest thread, for one thread on a shared machine (of several, those that wait may spin)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go; a whole run's go to bench/results/")
    options = parser.parse_args(argv)

    whole = options.only == pieces() and not options.quick
    found = {
        **machine(),
        "date": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "commit": commit(),
        "command": re.sub(r" --json[= ]\S+", "", shlex.join(["python", "-m", "bench", *(sys.argv[1:] if argv is None else argv)])),
        "quick": options.quick,
        "peaks": {},
        "mean_targets": {},
        "cases": [],
    }
    path = options.json or (default_file(found) if whole else None)
    failures = []
    progress = Console(stderr=True)
    with progress.status("the machine's peaks") as status:
        for threads in options.threads:
            found["peaks"][str(threads)] = peaks(threads, quick=options.quick, clock=options.clock)
        for piece in options.only:
            for case in cases_of(piece, options.threads):
                status.update(escape(str(case)))
                try:
                    found["cases"].append(run(case, found["peaks"][str(case.threads)], quick=options.quick, clock=options.clock))
                except AssertionError as error:  # the other cases are still worth measuring
                    failures.append(str(error))
                if path:
                    write(path, found)
            if (mean := getattr(sys.modules[f"bench.bench_{piece}"], "MEAN_TARGET", None)) is not None:
                found["mean_targets"][piece] = mean
    Console(width=None if sys.stdout.isatty() else 170).print(table(found))
    for failure in failures:
        print(f"bench: {failure}", file=sys.stderr)
    if path:
        write(path, found)
        print(f"written to {os.path.relpath(path)}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
