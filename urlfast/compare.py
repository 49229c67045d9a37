"""What several runs come to beside each other: charts and tables from plain scores, for a report to lay out.

A group is what runs are compared as. A chart is (svg, caption, heading), as report.figure takes them; `styles` gives each group its colour.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from urlfast import papers, stats
from urlfast.figures import Chart, extent
from urlfast.tables import UNITS, Number, Table

Figure = tuple[str, str, str]
REPEATS = 2_000  # of the bootstrap, for what is drawn

COORDINATES = {  # of a robot's physics state, positions first: two that say where it was, and what they are called
    "walker": (2, "pitch of the torso", 0, "height of the torso"),
    "hopper": (2, "pitch of the torso", 1, "height of the torso"),
    "cheetah": (2, "pitch of the torso", 1, "height of the torso"),
    "quadruped": (0, "x of the torso", 1, "y of the torso"),
    "humanoid": (0, "x of the torso", 1, "y of the torso"),
    "cartpole": (0, "cart", 1, "pole's angle"),
    "pendulum": (0, "angle", 1, "angular velocity"),
    "point_mass": (0, "x", 1, "y"),
}


def profiles(matrices: dict[str, np.ndarray], styles: dict[str, str], unit: str) -> Figure:
    """Performance profiles of (runs, tasks) each."""
    tau = np.linspace(min(0.0, *(x.min() for x in matrices.values())), max(x.max() for x in matrices.values()) * 1.02 + 1e-9, 201)
    normalised = "human-normalised score" if unit == "human" else "share of the expert's score"
    options = {"width": 1060, "height": 320, "left": 44, "xlabel": f"{normalised} τ", "ylabel": "runs above τ"}
    chart = Chart("Performance profiles", (tau[0], tau[-1]), (0, 1.02), **options)
    for group, x in matrices.items():
        if len(x) >= 3:
            chart.band(tau, *stats.bootstrap_interval(lambda s: stats.performance_profile(s, tau), x, repeats=REPEATS), styles[group])
        chart.line(tau, stats.performance_profile(x, tau), styles[group])
    says = "Performance profile: the fraction of all runs on all tasks that score above τ. Higher and further right is better."
    return chart.svg(), says, ""


def bars(values: dict[str, Number], styles: dict[str, str], label: str) -> Figure:
    """One bar a group, from 0, with its interval; dashed: the first."""
    x = extent([v.value for v in values.values()], *[v.between for v in values.values() if v.between], include=[0])
    options = {"width": 1060, "height": 50 + 46 * len(values), "left": 12, "right": 20, "yticks": [], "xlabel": label}
    chart = Chart(f"{label} by method", x, (-0.6, len(values) - 0.1), **options)
    first = next(iter(values.values()))
    for y, (group, value) in zip(reversed(range(len(values))), values.items(), strict=True):
        chart.bar_across(0, value.value, y - 0.32, y + 0.12, f"{styles[group]} fill")
        if value.between:
            chart.span(*value.between, y - 0.1, "ink")
        difference = f", {value.value - first.value:+.3f}".replace("-", "−") if value is not first else ""
        chart.text(max(x[0], 0), y, f"{group}: {value}{difference}", "name", dy=-11)
    chart.upright(first.value, "other")
    says = f"Interquartile mean of all runs on all tasks. Dashed, and what the differences are from: {next(iter(values))}."
    return chart.svg(), says + (" Lines: 95 % intervals." if any(v.between for v in values.values()) else ""), "What each change does"


def efficiency(curves: dict[str, list[dict[int, float]]], styles: dict[str, str], heading: str, of: str = "score") -> Figure | None:
    """{group: [{training frames: score} of each run]}: means over runs, at the frames that all of a group were evaluated at."""
    lines = {}
    for group, runs in curves.items():
        frames = sorted(set.intersection(*map(set, runs)))
        if len(frames) > 1:
            lines[group] = (np.array(frames, np.float64), np.array([[run[at] for at in frames] for run in runs])[:, None])
    return _over_frames(lines, lambda x: x.mean((-3, -2)), styles, heading, f"Mean over runs of the {of}", of) if lines else None


def efficiency_over_tasks(curves: dict[str, dict[str, list[dict[int, float]]]], styles: dict[str, str], unit: str) -> Figure | None:
    """{group: {task: as in efficiency, but of normalised scores}}: interquartile means over runs and tasks."""
    lines = {}
    for group, tasks in curves.items():
        runs = [run for of in tasks.values() for run in of]
        frames = sorted(set.intersection(*map(set, runs)))
        if len(tasks) > 1 and len(frames) > 1 and len({len(of) for of in tasks.values()}) == 1:
            scores = [[[run[at] for at in frames] for run in of] for of in tasks.values()]  # tasks, runs, frames
            lines[group] = (np.array(frames, np.float64), np.array(scores).swapaxes(0, 1))
    if not lines:
        return None

    def iqm(x):  # (..., runs, tasks, frames)
        return np.stack([stats.iqm(x[..., at]) for at in range(x.shape[-1])], -1)

    heading = f"{UNITS[unit][0].partition(',')[0]}, over training"
    return _over_frames(lines, iqm, styles, heading, "Interquartile mean over runs and tasks of the normalised score", "normalised score")


def _over_frames(lines: dict, statistic: Callable, styles: dict[str, str], heading: str, says: str, ylabel: str) -> Figure:
    """lines: {group: (frames (T,), scores (runs, tasks, T))}."""
    drawn = {}
    for group, (x, scores) in lines.items():
        runs, tasks, times = scores.shape
        between = None
        if runs >= 3:
            flat = scores.reshape(runs, tasks * times)

            def at_each(s, tasks=tasks, times=times):
                return statistic(s.reshape(*s.shape[:-1], tasks, times))

            between = stats.bootstrap_interval(at_each, flat, repeats=REPEATS)
        drawn[group] = (x, statistic(scores), between)
    y = extent(*[np.ravel(v) for _, middle, between in drawn.values() for v in (middle, *(between or ()))])
    last = max(x[-1] for x, _, _ in drawn.values())
    chart = Chart(heading, (0, last), y, xlabel="training frames", ylabel=ylabel)
    for group, (x, middle, between) in drawn.items():
        if between is not None:
            chart.band(x, *between, styles[group])
        chart.line(x, middle, styles[group]).dots(x, middle, styles[group], radius=3)
    shaded = ", with 95 % intervals" if any(between is not None for *_, between in drawn.values()) else ""
    return chart.svg(), f"{says}, of each evaluated checkpoint{shaded}.", heading


def covered(domain: str, agents: dict[str, np.ndarray], random: np.ndarray | None, styles: dict[str, str]) -> Figure | None:
    """Physics states (N, P) of each group and of random play, in two coordinates, in units of their spread over all that is shown."""
    samples = [*agents.values(), *([random] if random is not None else [])]
    width = min(sample.shape[1] for sample in samples)
    i, across, j, up = COORDINATES.get(domain, (0, "first coordinate", 1, "second coordinate"))
    if width <= max(i, j) or len({sample.shape[1] for sample in samples}) > 1:
        return None
    everything = np.concatenate(samples)[:, [i, j]]
    middle, scale = everything.mean(0), everything.std(0)
    scale = np.where(scale > 0, scale, 1)
    shown = {group: (sample[:, [i, j]] - middle) / scale for group, sample in agents.items()}
    chance = None if random is None else (random[:, [i, j]] - middle) / scale
    both = np.concatenate([*shown.values(), *([chance] if chance is not None else [])])
    chart = Chart(f"States of {domain}", extent(both[:, 0]), extent(both[:, 1]), height=400, xlabel=across, ylabel=up)
    for group, points in shown.items():
        chart.dots(*points.T, f"{styles[group]} soft", radius=2.4)
    if chance is not None:
        chart.dots(*chance.T, "other", radius=1.6)
    grey = " Grey: random play." if chance is not None else ""
    says = f"Physical states in the evaluation episodes, drawn evenly, in standard deviations of all that is shown.{grey}"
    return chart.svg(), says, f"Where the {domain.replace('_', ' ')} was"


# Beside the papers ---------------------------------------------------------------------------------------------------


def beside_paper(groups: dict[str, tuple[str, dict[str, list[float]]]]) -> Table | None:
    """{group: (key of papers.SCORES, {game: score of each run})}: game by game, then over the same games."""
    rows = []
    for group, (key, games) in groups.items():
        source, printed = papers.SCORES[key]
        shared = [game for game in games if game in printed]
        for game in shared:
            mine = games[game]
            here = float(np.mean(mine))
            rows.append((group, game, len(mine), *_beside(here, printed[game], _between(mine)), source))
        if len(shared) > 1:
            ours = np.array([[float(np.mean(stats.human_normalised_score(game, games[game]))) for game in shared]])
            theirs = np.array([[float(stats.human_normalised_score(game, printed[game])) for game in shared]])
            for name, statistic in (("median", stats.median), ("mean", stats.mean)):
                a, b = 100 * float(statistic(ours)), 100 * float(statistic(theirs))
                text = f"{name} of these {len(shared)}, human-normalised, percent"
                rows.append((group, text, "", *_beside(a, b), "recomputed from its scores"))
    if not rows:
        return None
    head = ("method", "game", "runs", "here", "paper", "difference", "source")
    return Table("beside-paper", "Beside the paper, game by game", head, rows, "Mean scores; the paper's are of 100,000 interactions.", 2)


def beside_aggregates(groups: dict[str, dict[str, list[float]]]) -> Table | None:
    """{group: {game: human-normalised score of each run}} of rows whose aggregates a paper prints."""
    rows = []
    for group, games in groups.items():
        if group not in papers.AGGREGATES:
            continue
        source, *printed = papers.AGGREGATES[group]
        x = np.array([[float(np.mean(games[game])) for game in games]])
        for name, statistic, theirs in (("median", stats.median, printed[0]), ("mean", stats.mean, printed[1])):
            ours = 100 * float(statistic(x))
            rows.append((group, name, len(games), *_beside(ours, theirs), source))
    if not rows:
        return None
    note = "Human-normalised. The papers' are as printed, over 26 games after 100,000 interactions."
    head = ("method", "over games", "games", "here, %", "paper, %", "difference, %", "source")
    return Table("beside-aggregates", "Beside the paper's aggregates", head, rows, note, 2)


def _between(values: list[float]) -> tuple[float, float] | None:
    if len(values) < 3:
        return None
    low, high = stats.bootstrap_interval(stats.mean, np.reshape(values, (-1, 1)), repeats=REPEATS)
    return float(low), float(high)


def _beside(here: float, paper: float, between: tuple[float, float] | None = None) -> tuple[Number, Number, Number]:
    """Ours, theirs, and by how much ours is larger."""
    return Number(here, between, plain), Number(paper, None, plain), Number(here - paper, None, signed)


def plain(value: float) -> str:
    return f"{value:,.1f}".replace("-", "−")


def signed(value: float) -> str:
    return f"{value:+,.1f}".replace("-", "−")
