"""Tables of results that read the same on a terminal, on a page, as CSV and as LaTeX; and the one that aggregates over tasks."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from urlfast import stats

Interval = tuple[float, float]


@dataclass(frozen=True)
class Number:
    """A measured value with its 95 % interval, where there are runs enough for one; `show` makes the text of either."""

    value: float
    between: Interval | None = None
    show: Callable[[float], str] = "{:.3f}".format

    def __str__(self) -> str:
        return self.show(self.value) + (f" ({self.show(self.between[0])} to {self.show(self.between[1])})" if self.between else "")


@dataclass
class Table:
    """`head` names the columns, and a row holds texts and Numbers; None is a value that there is not, shown as n/a."""

    name: str  # of its files
    title: str
    head: Sequence[str]
    rows: list[Sequence[str | int | Number | None]]
    note: str = ""
    numeric_from: int = field(default=1)  # the column from which on they are numbers

    def cells(self) -> list[list[str]]:
        return [["n/a" if cell is None else str(cell) for cell in row] for row in self.rows]

    def text(self) -> str:
        lines = [list(self.head), *self.cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            "  ".join(
                c.ljust(w) if i < self.numeric_from else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([f"{self.title}:", *aligned, *([self.note] if self.note else [])])

    def csv(self) -> str:
        """Every digit of the Numbers; where a column has intervals, they are two columns of their own, empty where there is none."""
        wide = [any(isinstance(row[i], Number) and row[i].between for row in self.rows) for i in range(len(self.head))]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(
            [h for head, w in zip(self.head, wide, strict=True) for h in ([head, f"{head}, low", f"{head}, high"] if w else [head])]
        )
        for row in self.rows:
            cells: list = []
            for cell, w in zip(row, wide, strict=True):
                cells.append("" if cell is None else cell.value if isinstance(cell, Number) else _harmless(cell))
                if w:
                    cells += getattr(cell, "between", None) or ("", "")
            writer.writerow(cells)
        return out.getvalue()

    def latex(self) -> str:
        """A tabular that needs no package."""
        columns = "l" * self.numeric_from + "r" * (len(self.head) - self.numeric_from)
        lines = [" & ".join(map(tex, row)) + r" \\" for row in (self.head, *self.cells())]
        body = "\n".join([lines[0], r"\hline", *lines[1:]])
        note = "".join(f"% {line}\n" for line in [self.title, *([self.note] if self.note else [])])
        return f"{note}\\begin{{tabular}}{{{columns}}}\n\\hline\n{body}\n\\hline\n\\end{{tabular}}\n"


def _harmless(cell):
    """A text that a spreadsheet would take for a formula is marked as text."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in "=+-@\t\r" and cell else cell


_TEX = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"−": "$-$", "≥": r"$\geq$", "\u00a0": "~", "\n": " ", "×": r"$\times$"})  # fmt: skip


def tex(text) -> str:
    return str(text).translate(_TEX)


# Over tasks ----------------------------------------------------------------------------------------------------------

UNITS = {  # what a score is divided by: (title, the name of 1)
    "human": ("Human-normalised, over games", "human level"),
    "expert": ("Divided by URLB's expert, over tasks", "expert's level"),
}


def aggregates(unit: str) -> dict[str, Callable]:
    level = UNITS[unit][1]
    return {
        "IQM": stats.iqm,
        "mean": stats.mean,
        "median": stats.median,
        "capped mean": stats.capped_mean,
        "optimality gap": stats.optimality_gap,
        f"{level} (1)": stats.human_level,
        f"{level} (0.75)": lambda x: stats.human_level(x, 0.75),
        "above random" if unit == "human" else "above 0": stats.above_random,
    }


def subsets(tasks: Sequence[str], unit: str) -> dict[str, list[str]]:
    """Of all tasks a group has, by name: the benchmarks that are whole, else all that there are."""
    known = {"human": {"the 26": stats.ATARI_26, "all 57": stats.ATARI_57}, "expert": {"URLB's 12": tuple(stats.URLB_EXPERT)}}[unit]
    whole = {name: list(members) for name, members in known.items() if set(members) <= set(tasks)}
    return whole or {str(len(tasks)): list(tasks)}


def over_tasks(groups: dict[str, dict[str, list[float]]], unit: str, repeats: int = 20_000) -> tuple[Table | None, dict[str, np.ndarray]]:
    """The aggregates of {group: {task: normalised scores of its runs}}, and {group: (runs, tasks)} of those that can be aggregated.

    A group of one task is not aggregated, nor one whose tasks have unequal numbers of runs, which the note says.
    """
    statistics, rows, matrices, notes = aggregates(unit), [], {}, []
    for group, tasks in groups.items():
        if len(tasks) < 2:
            continue
        for name, members in subsets(list(tasks), unit).items():
            if len({len(tasks[task]) for task in members}) > 1:
                counts = ", ".join(f"{task} {len(tasks[task])}" for task in members)
                notes.append(f"{group}: not aggregated over tasks, which have unequal numbers of runs ({counts}).")
                continue
            x = matrices[group] = np.array([tasks[task] for task in members]).T
            rows.append((group, name, len(x), *(_aggregate(f, x, label, repeats) for label, f in statistics.items())))
    if not rows:
        return (Table(f"{unit}-normalised", UNITS[unit][0], ("method",), [], " ".join(notes)) if notes else None), matrices
    note = "In brackets: 95 % interval, stratified bootstrap over runs"
    note += "; none is shown below three runs, which say nothing about spread." if any(row[2] < 3 for row in rows) else "."
    head = ("method", "tasks", "runs each", *statistics)
    return Table(f"{unit}-normalised", UNITS[unit][0], head, rows, " ".join([note, *notes])), matrices


def _aggregate(statistic: Callable, x: np.ndarray, label: str, repeats: int) -> Number:
    between = stats.bootstrap_interval(statistic, x, repeats=repeats) if len(x) >= 3 else None
    counted = label.endswith(")") or label.startswith("above")
    return Number(float(statistic(x)), between and tuple(map(float, between)), "{:.0f}".format if counted else "{:.3f}".format)
