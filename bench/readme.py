"""`python -m bench.readme`: writes README's section on speed, docs/bench.md with every case, and docs/bench.png, from bench/results/.

Of each case the newest measurement on each processor counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

from bench import results

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench: written by python -m bench.readme -->", "<!-- bench: end -->"


def merged(runs: Iterable[dict]) -> list[dict]:
    """One for each processor: its newest run, with the newest of every case that any of its runs measured, and how those were measured."""
    by_processor: dict[str, dict] = {}
    for run in sorted(runs, key=lambda run: run["date"]):
        how = f"{run['date'][:10]}: `{run['command']}`" + (f" (on a shared machine, load {run['load']:.0f})" if run["load"] > 0.5 else "")
        before = by_processor.get(run["processor"], {"cases": [], "mean_targets": {}})
        cases = {key(case): case for case in before["cases"]} | {key(case): case | {"how": how} for case in run["cases"]}
        by_processor[run["processor"]] = run | {
            "cases": sorted(cases.values(), key=lambda case: case["piece"]),
            "mean_targets": before["mean_targets"] | run["mean_targets"],
        }
    for run in by_processor.values():
        run["how"] = list(dict.fromkeys(case["how"] for case in run["cases"]))
    return list(by_processor.values())


def key(case: dict) -> tuple:
    return case["piece"], case["shape"], case["threads"]


def load(folder: Path = ROOT / "bench" / "results") -> list[dict]:
    runs = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    return merged(run for run in runs if "cases" in run)  # learning curves (bench.precision) lie there too


# The section -------------------------------------------------------------------------------------------------------------------


def section(runs: list[dict]) -> str:
    """README's part: for each processor a line a piece, with the date of its newest run."""
    picture = "![How many times longer the fastest alternative takes, case by case](docs/bench.png)"
    every = "[docs/bench.md](docs/bench.md) has every case, and what falls short of its target."
    return "\n\n".join([BEGIN, picture, *map(part, runs), every, END])


def part(run: dict) -> str:
    rows = ["| | cases | the fastest alternative takes | at the least | targets met |", "|-|-|-|-|-|"]
    means = results.means(run["cases"])
    for piece in dict.fromkeys(case["piece"] for case in run["cases"]):
        cases = [case for case in run["cases"] if case["piece"] == piece]
        rows.append(summary(piece, cases, {t: mean for (p, t), mean in means.items() if p == piece}, run["mean_targets"].get(piece)))
    return "\n".join([f"{machine(run)}, {run['date'][:10]}.", "", *rows])


def page(runs: list[dict]) -> str:
    """docs/bench.md: for each processor how it was measured, what is not met, and every case."""
    return "\n\n".join(["# Speed, case by case", "Written by `python -m bench.readme` from `bench/results/`.", *map(details, runs)]) + "\n"


def details(run: dict) -> str:
    flags = ", ".join(flag for flag in run["flags"] if flag not in ("fma", "avx512bw"))
    peaks = "; ".join(
        f"{plural(threads)}: {', '.join(f'{name} {value / 1e9:.0f}' for name, value in found.items())}"
        for threads, found in run["peaks"].items()
    )
    missed = [f"- {case['piece']}: {case['shape']}, {plural(case['threads'])}: {text}" for case in run["cases"] for text in unmet(case)]
    every = ["| | threads | urlfast | the others take | of the floor |", "|-|-|-|-|-|", *map(row, run["cases"])]
    return "\n".join(
        [
            f"{machine(run)}, {flags}. {'; '.join(run['how'])}.",
            f"Measured peaks, GB/s and GFLOP/s: {peaks}.",
            "",
            *(["Targets that are not met:", "", *missed, ""] if missed else []),
            *every,
        ]
    )


def plural(threads: int | str) -> str:
    return f"{threads} thread{'s' * (int(threads) > 1)}"


def machine(run: dict) -> str:
    return f"**{run['processor']}**, {run['cores']} cores, {run['memory'] / 2**30:.0f} GiB"


def summary(piece: str, cases: list[dict], means: dict[int, float], mean_target: float | None) -> str:
    """One piece: the geometric mean and the least of its ratios to the fastest alternative, and how many targets it meets."""
    verdicts = [met for case in cases for _, met in results.verdicts(case)]
    verdicts += [mean >= mean_target for mean in means.values()] if mean_target else []
    ratios = [results.fastest(case) for case in cases if case["unit"] == "s" and results.fastest(case)]
    mean = ", ".join(f"{results.times(means[t])} ({t} thread{'s' * (t > 1)})" for t in sorted(means))
    met = f"{verdicts.count(True)} of {len(verdicts) - verdicts.count(None)}" if verdicts else ""
    met += f", {verdicts.count(None)} not measured" if None in verdicts else ""
    return f"| {piece} | {len(cases)} | {mean} | {results.times(min(ratios)) if ratios else ''} | {met} |"


def unmet(case: dict) -> list[str]:
    return [text for text, met in results.verdicts(case) if met is False]


def row(case: dict) -> str:
    others = ", ".join(f"{name} {results.times(ratio)}" for name, ratio in results.ratios(case).items())
    floor = results.of_floor(case)
    figure = results.amount(results.ours(case), case["unit"])
    return f"| {case['piece']}: {case['shape']} | {case['threads']} | {figure} | {others} | {f'{floor:.0%}' if floor else ''} |"


def rewritten(readme: str, text: str) -> str:
    """`readme` with what stands between the two markers, markers included, replaced by `text`. Raises ValueError where one is missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README: must have the lines {BEGIN!r} and {END!r}")
    return before + text + after


# The picture -------------------------------------------------------------------------------------------------------------------


def shown(run: dict) -> list[dict]:
    """Of every timed case that has a peer, the one with the most threads."""
    most = {}
    for case in run["cases"]:
        if case["unit"] == "s" and results.fastest(case):
            name = case["piece"], case["shape"]
            most[name] = max(most.get(name, case), case, key=lambda case: case["threads"])
    return list(most.values())


def target(case: dict) -> float | None:
    """The ratio asked for over the fastest peer, by whichever name."""
    return case["targets"].get("fastest", case["targets"].get(next(iter(results.ratios(case)))))


def draw(runs: list[dict], path: Path) -> None:
    """One bar a case and processor: how many times longer the fastest alternative takes, and a stroke where it was asked to end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = dict.fromkeys((case["piece"], case["shape"]) for run in runs for case in shown(run))
    places, place = {}, 0.0
    for i, (piece, shape) in enumerate(rows):
        place += 0.0 if i == 0 else 1.0 if piece == list(rows)[i - 1][0] else 1.7
        places[piece, shape] = place
    figure, axes = plt.subplots(figsize=(9.5, 0.9 + 0.25 * (place + 1)), layout="constrained")
    height = 0.8 / len(runs)
    highest = max(max(results.fastest(case), target(case) or 0) for run in runs for case in shown(run))
    for i, run in enumerate(runs):
        for case in shown(run):
            y = places[case["piece"], case["shape"]] - 0.4 + (i + 0.5) * height
            ratio, peer = results.fastest(case), next(iter(results.ratios(case)))
            colour = (COLOURS if ratio >= 1 else SLOWER)[i % 2]
            axes.barh(y, math.log10(ratio), height * 0.9, color=colour)
            axes.text(math.log10(max(ratio, target(case) or 0, 1)) + 0.02, y, f"{results.times(ratio)} {peer}", va="center", fontsize=7.5)
            if target(case):
                axes.plot([math.log10(target(case))] * 2, [y - height / 2, y + height / 2], color="black", linewidth=1.6)
    axes.set_yticks(list(places.values()), [f"{piece}: {shape}" for piece, shape in places], fontsize=8)
    axes.invert_yaxis()
    axes.set_ylim(place + 0.7, -0.7)
    ticks = [t for t in (0.5, 1, 2, 4, 10, 20, 50, 100, 1000) if t <= highest * 1.3]
    axes.set_xticks([math.log10(t) for t in ticks], [f"{t:g}x" for t in ticks], fontsize=8)
    axes.set_xlim(right=math.log10(highest) + 0.45)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("the fastest alternative's time over urlfast's (equal threads, log axis); black stroke: the target over it", fontsize=8)
    if len(runs) > 1:
        handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[i % 2]) for i in range(len(runs))]
        axes.legend(handles, [run["processor"] for run in runs], fontsize=8, loc="lower right")
    axes.set_title("; ".join(f"{run['processor']}, {run['cores']} cores, {run['date'][:10]}" for run in runs), fontsize=9, loc="left")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


COLOURS, SLOWER = ("#2f6f9f", "#7fb069"), ("#c1554d", "#d99a6c")


def main() -> None:
    runs = load()
    if not runs:
        raise SystemExit("bench.readme: bench/results/ holds no run yet; `python -m bench` makes one")
    readme = ROOT / "README.md"
    readme.write_text(rewritten(readme.read_text(), section(runs)))
    (ROOT / "docs" / "bench.md").write_text(page(runs))
    draw(runs, ROOT / "docs" / "bench.png")


if __name__ == "__main__":
    main()
