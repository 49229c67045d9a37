"""What a stored run says: pure functions of its JSON, for the table and for the README.

A run is {"processor", "cores", "memory", "flags", "isa", "date", "commit", "command", "quick", "load", "versions", "peaks": {threads:
{name: per second}}, "mean_targets": {piece: ratio}, "cases": [what harness.run returns]}.
"""

from __future__ import annotations

import math
from collections.abc import Iterable


def ours(case: dict) -> float:
    """Our figure: seconds or bytes, the median of its turns."""
    return next(iter(case["figures"].values()))["median"]


def ratios(case: dict) -> dict[str, float]:
    """{peer: how many times our figure its figure is}, the fastest first."""
    _, *peers = case["figures"].items()
    return dict(sorted(((name, figure["median"] / ours(case)) for name, figure in peers), key=lambda peer: peer[1]))


def fastest(case: dict) -> float | None:
    """The ratio to the fastest peer; None without any."""
    return next(iter(ratios(case).values()), None)


def of_floor(case: dict) -> float | None:
    """The floor as a fraction of our figure: 1 is as fast as it can be."""
    return case["floor"] / ours(case) if case["floor"] else None


def verdicts(case: dict) -> list[tuple[str, bool | None]]:
    """Each target as (what was reached and asked for, met); met is None where the peer was not there to compare with."""
    return [_verdict(case, name, wanted) for name, wanted in case["targets"].items()]


def _verdict(case, name, wanted):
    if name == "at most":
        return f"{amount(ours(case), case['unit'])} (at most {amount(wanted, case['unit'])})", ours(case) <= wanted
    reached = {"floor": of_floor(case), "fastest": fastest(case), **ratios(case)}.get(name)
    shown = (lambda r: f"{r:.0%}") if name == "floor" else times
    if reached is None:
        return f"{name} not measured (target {shown(wanted)})", None
    return f"{name} {shown(reached)} (target {shown(wanted)})", reached >= wanted


def means(cases: Iterable[dict]) -> dict[tuple[str, int], float]:
    """{(piece, threads): geometric mean of its timed cases' ratios to the fastest peer}."""
    found: dict[tuple[str, int], list[float]] = {}
    for case in cases:
        if case["unit"] == "s" and fastest(case):
            found.setdefault((case["piece"], case["threads"]), []).append(fastest(case))
    return {key: math.exp(sum(map(math.log, values)) / len(values)) for key, values in found.items()}


def times(ratio: float) -> str:
    """3.14159 -> '3.1x'."""
    return f"{ratio:.2f}x" if ratio < 2 else f"{ratio:.1f}x" if ratio < 20 else f"{ratio:.0f}x"


def amount(value: float, unit: str) -> str:
    """0.00123 -> '1.23 ms'; 7061 bytes -> '7.06 kB'."""
    units = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")) if unit == "s" else ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
    size, name = next(((size, name) for size, name in units if value >= 0.9995 * size), units[-1])
    return f"{value / size:.3g} {name}" if value / size < 1000 else f"{value / size:.0f} {name}"
