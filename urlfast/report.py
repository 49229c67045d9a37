"""`urlfast report RUN...`: what one run or several did, as one HTML file that needs no network and no script.

Reads a run's folder and changes nothing in it but report.html. Everything shown comes from config.json, metrics.jsonl (while training),
results.json (`urlfast evaluate`), videos/, and the newest valid checkpoint with its replay (the particles).
"""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from html import escape
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from urlfast import __version__, stats
from urlfast.figures import Chart, data_url, extent, png, short, smooth, thin
from urlfast.run import Run, UserError, command, human_bytes, human_time, open_plain, read_json, read_metrics, replacing

LEARNERS = {"drq": "DrQ"}  # on the environment's own reward
METHODS = {"apt": "APT"} | LEARNERS
BESIDE = {
    "seed",
    "env.game",
    "device",
    "runs",
    "log_every",
    "checkpoint_every",
    "keep",
}  # options in which runs that are compared may differ
PARTICLES = 2048
BATCH = 256  # sampled at a time
RARE = 0.05  # fraction of the particles that counts as the rarest
EXTREMES = 8  # frames shown at each end of the reward
NBSP = "\u00a0"
VIDEO_LIMIT = 48_000_000  # bytes; base64 adds a third
VIDEO_PIXELS = 4_000_000  # of a frame


@dataclass(frozen=True)
class Options:
    """What `urlfast report` takes."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of runs, or names under runs/."""
    out: Path | None = None
    """The page; RUN/report.html for one run, report.html here for several."""


# A run, read ---------------------------------------------------------------------------------------------------------


@dataclass
class Particles:
    """Observations of a run's replay as its newest checkpoint sees them."""

    frames: np.ndarray | None  # uint8 [B, H, W] or [B, H, W, 3], the newest frame of each; None where observations are no images
    reward: np.ndarray  # [B]
    z: np.ndarray  # [B, d]
    step: int


@dataclass
class Story:
    """All that a page says of one run. A part that is missing is None, and `lacks` says in a line how to get it."""

    folder: Path
    config: dict
    metrics: dict[str, tuple[np.ndarray, np.ndarray]]  # name -> steps (T,), values (T,) or (T, K)
    results: dict | None = None
    particles: Particles | None = None
    video: Path | None = None
    lacks: dict[str, str] = field(default_factory=dict)
    row: str = ""  # of the sweep that it is from
    group: str = ""  # what it is compared as, beside other runs

    @property
    def options(self) -> dict:
        return self.config.get("config") or {}

    @property
    def method(self) -> str:
        name = str(self.config.get("method", "?"))
        return METHODS.get(name, name)

    @property
    def game(self) -> str:
        env = self.options.get("env") or {}
        return str(env.get("game") or env.get("task") or self.config.get("domain", "?"))

    @property
    def seed(self):
        return self.options.get("seed", "?")

    @property
    def pretraining(self) -> str:
        """Where a run of `urlfast transfer` comes from, in a few words; empty for others."""
        source = self.config.get("transfer")
        if not source:
            return ""
        return f"{METHODS.get(source['method'], source['method'])} ({number(source['step'])} steps, {source['rule']})"

    @property
    def kind(self) -> str:
        preset = self.config.get("preset")
        name = self.method if preset in (None, "paper") else f"{self.method} ({preset})"
        return f"{name} after {self.pretraining}" if self.pretraining else name

    @property
    def repeat(self) -> float:
        """Frames of one agent step."""
        steps, frames = self.last("step"), self.last("frames")
        skip = (self.options.get("env") or {}).get("frame_skip", 1)
        return frames / steps if steps and frames else float(skip) if _plottable(skip) else 1.0

    def last(self, name, default=None):
        steps, values = self.metrics.get(name, ((), ()))
        return values[-1] if len(steps) else default

    def evaluation(self, policy) -> dict | None:
        """The last evaluation of a policy, never the best one; of several at one step, the one of most episodes."""
        found = [e for e in (self.results or {}).get("evaluations", ()) if e["policy"] == policy]
        return sorted(found, key=lambda e: (e.get("frames") or 0, len(e["returns"])))[-1] if found else None

    @property
    def hns(self) -> float | None:
        agent = self.evaluation("agent")
        if agent is None or self.game not in stats.ATARI_SCORES:
            return None
        return float(stats.human_normalised_score(self.game, np.mean(agent["returns"])))


def read(folder: str | Path) -> Story:
    """Everything there is of one run; raises UserError where the folder is none."""
    run = Run.find(folder)
    story = Story(run.folder, run.config, _columns(read_metrics(run.folder)))
    if not story.metrics:
        story.lacks["metrics"] = "Nothing logged yet: metrics.jsonl is empty."
    evaluate = f"urlfast evaluate {run.folder}"
    path = run.folder / "results.json"
    try:
        story.results = {"evaluations": list(map(_evaluation, read_json(path)["evaluations"]))}
    except FileNotFoundError:
        story.lacks["results"] = f"Not evaluated yet: {evaluate} plays the policy and a random one by the protocol."
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        story.lacks["results"] = f"results.json is damaged ({error}); {evaluate} writes it anew."
    videos = sorted((run.folder / "videos").glob("[!.]*.mp4"), key=lambda file: (file.lstat().st_mtime, file.name))
    if videos:
        story.video = videos[-1]
    else:
        story.lacks["video"] = f"No video yet: {evaluate} records one."
    try:
        story.particles = load_particles(run)
    except UserError as error:
        story.lacks["particles"] = f"No picture of the particles: {error}."
    return story


def read_all(folder: str | Path) -> list[Story]:
    """Of a run, or of every run of a sweep's folder, by the names of its rows."""
    if not (Path(folder) / "sweep.json").is_file():
        return [read(folder)]
    from urlfast.sweep import runs_of

    stories = [replace(read(run), row=row) for run, row in runs_of(folder).items()]
    if not stories:
        raise UserError(f"{folder}: no run of this sweep has begun")
    return stories


COUNTS = ("frames", "unique_states", "unique_places", "frames_of_unique_states")


def _evaluation(entry: dict) -> dict:
    """An entry of results.json; ValueError where a number that is drawn is none."""
    returns, coverage = entry["returns"], [*(entry.get("coverage") or []), *(entry.get("places") or [])]
    counted = [entry[name] for name in COUNTS if entry.get(name) is not None]
    numbers = [*returns, *counted, *(number for point in coverage for number in point)]
    if not 0 < len(returns) <= 100_000 or not all(map(_plottable, numbers)) or any(len(point) != 2 for point in coverage):
        raise ValueError("an evaluation whose numbers are none")
    if not isinstance(entry["policy"], str) or not isinstance(entry.get("protocol", {}), dict):
        raise ValueError("an evaluation of no policy, or by no protocol")
    return entry


def _plottable(value) -> bool:
    """Finite, and so far from the end of float64 that no axis ends beyond it."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < 1e30


def _columns(lines: list[dict]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What of the log can be drawn: numbers, and as many quantiles as there should be."""
    columns: dict[str, tuple[list, list]] = {}
    for line in lines:
        for name, value in line.items():
            numbers = value if isinstance(value, list) else [value]
            if len(numbers) == (5 if name == "intrinsic_reward_quantiles" else 1) and all(map(_plottable, numbers)):
                steps, values = columns.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(numbers if len(numbers) > 1 else numbers[0])
    return {name: (np.asarray(steps, np.float64), np.asarray(values, np.float64)) for name, (steps, values) in columns.items()}


def load_particles(run: Run, count: int = PARTICLES) -> Particles | None:
    """Observations drawn from a run's replay, with the encoding and the reward that its newest valid checkpoint gives them.

    None for a method without an intrinsic reward. Changes nothing: the replay is opened read-only, and no running statistic moves.
    Raises UserError where the run has no checkpoint that can be read, or nothing in its replay yet.
    """
    if run.config.get("method") in LEARNERS:
        return None
    import torch

    from urlfast.checkpoint import read_latest
    from urlfast.train import DOMAINS, check_replay, load, make_method, refusals

    checkpoint = read_latest(run.folder, replay=True, say=lambda text: print(text, file=sys.stderr))
    replay = checkpoint.load_replay(read_only=True)
    if replay.sampleable < BATCH:
        raise UserError(f"the checkpoint of step {checkpoint.step:,} holds only {replay.sampleable} transitions")
    name, domain, config = load(run.config)
    with refusals(), closing(DOMAINS[domain](config.env, num_envs=1)) as env:
        method, channels = make_method(name, replace(config, device="auto"), env), env.frame_shape[0]
        with checkpoint.fitting("replay.json"):
            check_replay(replay, method, replay.num_streams)
    with checkpoint.fitting():
        method.load_state_dict(checkpoint.state["method"])
    drawn = {}  # a transition that is drawn twice would be its own neighbour
    for _ in range(0, count, BATCH):
        batch = replay.sample(BATCH)
        drawn |= {
            index: o.copy() for index, o in zip(batch.indices.tolist(), batch.next_observation, strict=True)
        }  # the reward is paid for s'
    observation = np.stack(list(drawn.values()))
    with torch.no_grad(), refusals():  # a network that has diverged
        reward, z = method.intrinsic_reward(torch.from_numpy(observation).to(method.device))
    frames = None
    if observation.ndim == 4 and channels in (1, 3):
        frames = observation[:, -1] if channels == 1 else observation[:, -3:].transpose(0, 2, 3, 1)
    return Particles(frames, reward.float().cpu().numpy(), z.float().cpu().numpy(), checkpoint.step)


# Words and numbers ---------------------------------------------------------------------------------------------------


def title(story: Story) -> str:
    after = f" after {METHODS.get(name := story.config['transfer']['method'], name)}" if story.pretraining else ""
    return f"{story.method}{after} on {story.game.replace('_', ' ').title()}"


def number(value, digits=3) -> str:
    """1234.5 -> '1,234'; small numbers keep `digits` significant ones."""
    if not isinstance(value, Real) or not abs(value) < 1e300:
        return "n/a"
    text = f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.{digits}g}"
    return text.replace("-", "−")


def percent(value, digits=1) -> str:
    return "n/a" if value is None else f"{round(100 * value, digits) + 0.0:.{digits}f}{NBSP}%".replace("-", "−")


def interval(returns) -> tuple[float, float] | None:
    """95 % bootstrap interval of a mean over episodes."""
    return stats.bootstrap_interval(stats.mean, np.reshape(returns, (-1, 1)), repeats=5000) if len(returns) >= 3 else None


def coverage_at_equal_frames(agent: dict, random: dict | None) -> tuple[float, float | None, float] | None:
    """(agent's unique places or states, random's, frames): both at the frames that the shorter curve reaches; as counted, where it was."""
    mine, theirs = _coverage(agent), _coverage(random)
    if mine is None:
        return None
    if theirs is None:
        return mine[-1, 1], None, mine[-1, 0]
    counted = [(e.get(f"unique_{covers(agent)}"), e.get("frames_of_unique_states")) for e in (agent, random)]
    if counted[0][0] is not None and counted[1][0] is not None and counted[0][1] == counted[1][1]:
        return counted[0][0], counted[1][0], counted[0][1]
    frames = min(mine[-1, 0], theirs[-1, 0])
    return float(np.interp(frames, *mine.T)), float(np.interp(frames, *theirs.T)), frames


def covers(evaluation: dict) -> str:
    """What coverage counts: places, where it is known which bytes of the memory they are; states of all of it, where not."""
    return "places" if evaluation.get("places") else "states"


COUNTED = {
    "places": "Distinct rooms and positions of the player, as the console's memory has them,",
    "states": "Distinct contents of the console's 128 bytes of memory (timers make most of them new: compare the curves, not the numbers)",
}


def _coverage(evaluation: dict | None) -> np.ndarray | None:
    evaluation = evaluation or {}
    points = evaluation.get("places") or evaluation.get("coverage")
    return np.asarray(points, np.float64) if points else None


def trend(story: Story, name: str) -> tuple[float, float] | None:
    """Mean of a metric over the first and the last tenth of the logged lines."""
    _, values = story.metrics.get(name, ((), np.empty(0)))
    values = values[np.isfinite(values)] if len(values) else values
    tenth = math.ceil(len(values) / 10)
    return (float(values[:tenth].mean()), float(values[-tenth:].mean())) if len(values) >= 2 else None


def lead(story: Story) -> str:
    """The run in a sentence or two, from its own numbers alone."""
    steps = story.last("step")
    if steps is None:
        return "The run has not logged anything yet."
    free = "on the game's own reward" if story.config.get("method") in LEARNERS else "without a reward from the game"
    text = f"After {number(steps)} agent steps {free}" + (f", begun from {story.pretraining}" if story.pretraining else "")
    agent, random = story.evaluation("agent"), story.evaluation("random")
    if agent is None:
        return text + ", not evaluated yet."
    text += f", the policy scores {number(np.mean(agent['returns']))}"
    if random:
        text += f" where random play scores {number(np.mean(random['returns']))}"
    covered = coverage_at_equal_frames(agent, random)
    if covered and covered[1]:
        text += f", and sees {number(covered[0])} distinct {covers(agent)} where random play sees {number(covered[1])} in the same time"
    return text + "."


# Pieces of a page ----------------------------------------------------------------------------------------------------


def tile(label, value, note) -> str:
    parts = "".join(f'<div class="{kind}">{escape(text)}</div>' for kind, text in (("label", label), ("value", value), ("note", note)))
    return f'<div class="tile">{parts}</div>'


def figure(chart: str, caption: str, heading: str = "") -> str:
    heading = f"<h3>{escape(heading)}</h3>" if heading else ""
    return f"<figure>{heading}{chart}<figcaption>{escape(caption)}</figcaption></figure>"


def section(heading, *parts, say="") -> str:
    parts = "".join(part for part in parts if part)
    if not parts:
        return ""
    return f"<h2>{escape(heading)}</h2>" + (f'<p class="say">{escape(say)}</p>' if say else "") + parts


def missing(story: Story, part: str) -> str:
    return f'<p class="missing">{escape(story.lacks[part])}</p>' if part in story.lacks else ""


def grid(*figures) -> str:
    figures = [f for f in figures if f]
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric_from: int) -> str:
    """Cells are escaped, but for one given as ("html", text)."""

    def cell(tag, i, content):
        content = content[1] if isinstance(content, tuple) else escape(str(content))
        return (f'<{tag} class="n">' if i >= numeric_from else f"<{tag}>") + f"{content}</{tag}>"

    body = "".join("<tr>" + "".join(cell("td", i, c) for i, c in enumerate(row)) + "</tr>" for row in rows)
    top = "".join(cell("th", i, h) for i, h in enumerate(head))
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(items) -> str:
    rows = "".join(f"<div><dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd></div>" for k, v in items if v not in (None, ""))
    return f"<dl>{rows}</dl>" if rows else ""


# One run -------------------------------------------------------------------------------------------------------------


def tiles(story: Story) -> str:
    steps = story.last("step")
    out = []
    if steps is not None:
        seconds, updates = story.last("seconds"), story.last("updates")
        note = f"{number(story.repeat * steps)} frames"
        note += f", {number(updates)} updates" if updates is not None else ""
        out.append(
            tile("Agent steps", number(steps), note + (f", {human_time(seconds).replace(' ', NBSP)} of training" if seconds else ""))
        )
    agent, random = story.evaluation("agent"), story.evaluation("random")
    if agent:
        note = f"random play, measured here, {number(np.mean(random['returns']))}" if random else f"over {len(agent['returns'])} episodes"
        out.append(
            tile(
                "Score",
                number(np.mean(agent["returns"])),
                note + (f"; human-normalised {percent(story.hns)}" if story.hns is not None else ""),
            )
        )
        covered = coverage_at_equal_frames(agent, random)
        if covered and covered[1]:
            note = f"{number(covered[0])} against {number(covered[1])}, each in {short(covered[2])} frames"
            out.append(tile(f"Unique {covers(agent)}, against random", f"{covered[0] / covered[1]:.2f}×", note))
        elif covered:
            out.append(tile(f"Unique {covers(agent)}", number(covered[0]), f"in {short(covered[2])} frames"))
    accuracy = trend(story, "contrastive_accuracy")  # not the intrinsic reward, whose unit moves with the encoder
    if accuracy:
        note = f"of the encoder in the last tenth of the run; {percent(accuracy[0], 0)} in the first"
        out.append(tile("Contrastive accuracy", percent(accuracy[1], 0), note))
    elif story.last("episodes") is not None:
        out.append(tile("Episodes", number(story.last("episodes")), "finished while training"))
    return f'<div class="tiles">{"".join(out)}</div>' if out else ""


def curve(story: Story, name: str, heading: str, caption: str, bounds=(), levels=()) -> str:
    """One metric over agent steps: every logged value faint, its running mean bold."""
    if name not in story.metrics:
        return ""
    steps, values = thin(*story.metrics[name])
    if not len(steps):
        return ""
    mean = smooth(values, max(len(values) / 20, 1))
    chart = Chart(
        f"{heading} over agent steps",
        (0, story.last("step")),
        extent(values, include=[*bounds, *(level for level, _ in levels)], tails=0.005 if len(values) > 50 else 0.0),
        xlabel="agent steps",
        right=64 if levels else 20,
    )
    for level, label in levels:
        chart.rule(level, "other", label)
    chart.line(steps, values, "s0 raw").line(steps, mean, "s0")
    return figure(chart.svg(), caption, heading)


def learning(story: Story) -> str:
    random = story.evaluation("random")
    if random:
        levels, dashed = [(float(np.mean(random["returns"])), "random")], " Dashed: random play, measured here."
    elif story.game in stats.ATARI_SCORES:
        levels, dashed = [(stats.ATARI_SCORES[story.game][0], "random")], " Dashed: published random play."
    else:
        levels, dashed = [], ""
    return grid(
        curve(
            story,
            "score",
            "Score of finished episodes",
            "Mean unclipped score of the episodes that ended since the last log line, explored as in training." + dashed,
            levels=levels,
        ),
        curve(
            story,
            "contrastive_accuracy",
            "Contrastive accuracy",
            "How often a view of an observation is nearest, in the whole batch, to the other view of it.",
            bounds=(0, 1),
        ),
        curve(story, "contrastive_loss", "Contrastive loss", "NT-Xent between two augmented views of one observation."),
        curve(story, "q_loss", "Q loss", "Temporal-difference error of the critic, Huber.", bounds=(0,)),
        curve(story, "q_target", "Q target", "Mean target of the critic: the discounted reward it expects."),
        curve(story, "episode_length", "Episode length", "Agent steps of the finished episodes.", bounds=(0,)),
    )


def reward_bands(story: Story) -> str:
    if "intrinsic_reward_quantiles" not in story.metrics:
        return ""
    steps, q = thin(*story.metrics["intrinsic_reward_quantiles"], points=240)
    if not len(steps) or q.ndim != 2 or q.shape[1] != 5:
        return ""
    chart = Chart(
        "Quantiles of the intrinsic reward over agent steps",
        (0, steps[-1]),
        extent(q),
        width=1060,
        height=330,
        xlabel="agent steps",
        right=64,
    )
    chart.band(steps, q[:, 0], q[:, 4], "s0").band(steps, q[:, 1], q[:, 3], "s0 inner").line(steps, q[:, 2], "s0", "median")
    chart.ends += [(float(chart.place(0, q[-1, i])[1]), name, "other") for i, name in ((0, "5 %"), (1, "25 %"), (3, "75 %"), (4, "95 %"))]
    return figure(
        chart.svg(),
        "Distribution of the particle-entropy reward within the training batches: median, the middle half (dark) and 5 to 95 % (light). It "
        "is computed anew at each update, with the encoder of that moment; a wide band means that states differ in how rare they are.",
    )


def scores(story: Story) -> str:
    rows = [(name, e) for name in ("agent", "random") if (e := story.evaluation(name))]
    if not rows:
        return ""
    x = extent(*[e["returns"] for _, e in rows])
    chart = Chart(
        "Score of each evaluation episode",
        x,
        (-0.55, len(rows) - 0.45),
        height=60 + 78 * len(rows),
        xlabel="score of an episode",
        yticks=[],
        left=70,
    )
    notes = []
    for y, (name, e) in zip(reversed(range(len(rows))), rows, strict=True):
        returns, style = np.asarray(e["returns"], np.float64), "s0" if name == "agent" else "other"
        spread = (np.arange(len(returns)) * 0.6180339887 % 1 - 0.5) * 0.44  # spread so that equal scores can be told apart
        chart.dots(returns, y + spread, f"{style} soft", radius=2.6)
        at, between = returns.mean(), interval(returns)
        if between:
            chart.span(*between, y + 0.36, style)
        chart.dots([at], [y + 0.36], style, radius=4.5)
        chart.text(x[0], y, name, "name", anchor="end", dx=-14)
        chart.text(between[1] if between else at, y + 0.36, number(at), "name", dx=9)
        notes.append(f"{name}: mean {number(at)}" + (f" (95 % interval {number(between[0])} to {number(between[1])})" if between else ""))
    caption = (
        f"One dot per episode, above it the mean with a bootstrap interval over episodes. {'; '.join(notes)}. Unclipped score, full games."
    )
    if story.game in stats.ATARI_SCORES:
        random, human = stats.ATARI_SCORES[story.game]
        caption += (
            f" Published random play {random:,g}, published human {human:,g}; human-normalised score of the agent {percent(story.hns)}."
        )
    return figure(chart.svg(), caption, "Score by the evaluation protocol")


def coverage(story: Story) -> str:
    curves = [(name, points) for name in ("agent", "random") if (points := _coverage(story.evaluation(name))) is not None]
    if not curves:
        return ""
    top = max(points[:, 1].max() for _, points in curves)
    what = covers(story.evaluation(curves[0][0]))
    chart = Chart(f"Unique {what} over frames", (0, max(p[-1, 0] for _, p in curves)), (0, top * 1.06), xlabel="frames", right=64)
    for name, points in reversed(curves):
        x, y = thin(points[:, 0], points[:, 1])
        chart.line(np.insert(x, 0, 0), np.insert(y, 0, 0), "s0" if name == "agent" else "other", name)
    return figure(
        chart.svg(),
        f"{COUNTED[what]} met so far, at each agent step of the evaluation episodes; random play goes on until it has as many frames.",
        "Coverage",
    )


def progress_of_evaluations(story: Story) -> str:
    """Evaluated score against training, where a run was evaluated more than once."""
    found = [e for e in (story.results or {}).get("evaluations", ()) if e["policy"] == "agent" and e.get("frames") is not None]
    found.sort(key=lambda e: e["frames"])
    if len({e["frames"] for e in found}) < 2:
        return ""
    x, y = np.array([e["frames"] for e in found], np.float64), np.array([np.mean(e["returns"]) for e in found])
    between = np.array([interval(e["returns"]) or (m, m) for e, m in zip(found, y, strict=True)])
    chart = Chart("Evaluated score over training frames", (0, x[-1]), extent(between, y), xlabel="training frames")
    chart.band(x, between[:, 0], between[:, 1], "s0").line(x, y, "s0").dots(x, y, "s0", radius=3.5)
    return figure(
        chart.svg(), "Mean score of each evaluated checkpoint, with a 95 % bootstrap interval over its episodes.", "Score over training"
    )


def particles(story: Story) -> str:
    p = story.particles
    if p is None:
        return ""
    # What is rarest, as the first frame of an episode, lies far from all else: it would take both directions and all colours for itself.
    common = p.reward <= np.quantile(p.reward, 1 - RARE)
    xy, share = principal(p.z, common)
    colours = np.quantile(p.reward, np.arange(1, 12) / 12)
    level = np.searchsorted(colours, p.reward)
    top, bottom = extremes(p)

    ends = np.quantile(xy[common], [0.01, 0.99], axis=0)
    middle, half = ends.mean(0), max(np.ptp(ends, axis=0).max() * 0.62, 1e-6)
    flat = np.clip(np.ptp(ends[:, 1]) * 0.62 / half, 0.45, 1.0)  # both directions in one unit, without room for what is not there
    inside = np.clip(xy, middle - half * np.array([1, flat]), middle + half * np.array([1, flat]))
    outside = int((inside != xy).any(1).sum())
    chart = Chart(
        "Particles on their two principal directions, coloured by reward",
        (middle[0] - half, middle[0] + half),
        (middle[1] - half * flat, middle[1] + half * flat),
        height=10 + 26 + round(540 * flat),
        left=10,
        right=10,
        xticks=[],
        yticks=[],
    )
    for v in range(12):  # the rarest on top
        if (level == v).any():
            chart.dots(*inside[level == v].T, f"v{v}", radius=2.3)
    chart.rings(*inside[top].T, _names(len(top)))
    shares = f"{share[0]:.0%} and {share[1]:.0%}".replace("%", NBSP + "%")
    left = figure(
        chart.svg(),
        f"{len(p.z):,} observations drawn uniformly from the replay, encoded into {p.z.shape[1]:,} numbers each by the checkpoint at step "
        f"{number(p.step)}, seen along the two directions of largest variance of all but the rarest twentieth ({shares} of it). Colour: "
        "rank of the intrinsic reward, bright where high. Ringed: the frames beside."
        + (f" {_count(outside, 'particle')} farther out drawn at the edge." if outside else ""),
    )
    shown = np.minimum(p.reward, np.quantile(p.reward, 1 - RARE / 2))
    counts, edges = np.histogram(shown, bins=np.linspace(*extent(shown, margin=0.01), 49))
    bars = Chart(
        "Histogram of the particles' reward",
        (edges[0], edges[-1]),
        (0, counts.max() * 1.05),
        height=170,
        xlabel="intrinsic reward",
        yticks=[],
        left=8,
    )
    for count, a, b in zip(counts, edges, edges[1:], strict=False):
        if count:
            bars.bar(a, b, count, f"v{np.searchsorted(colours, (a + b) / 2)}")
    left += figure(
        bars.svg(),
        "The reward of the same particles, and the colours of the picture; the last bar holds all of the highest fortieth. Neighbours are "
        "searched among all these particles, more than in a training batch, so rewards are lower than those logged while training.",
    )
    if p.frames is None:
        return f'<div class="grid">{left}</div>'
    right = f"<h3>Highest reward: far from all others</h3>{_strip(p, top, _names(len(top)))}"
    right += f"<h3>Lowest reward: seen again and again</h3>{_strip(p, bottom, [''] * len(bottom))}"
    right += "<figcaption>Newest frame and reward of the particles that look least alike, among the twentieth at each end.</figcaption>"
    right = f"<figure>{right}</figure>"
    return f'<div class="grid"><div class="stack">{left}</div><div>{right}</div></div>'


def principal(z: np.ndarray, fit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z (B, d) along the two directions of largest variance of its rows `fit`: (B, 2), and the share of their variance (2,)."""
    z = np.pad(z.astype(np.float64), ((0, 0), (0, max(2 - z.shape[1], 0))))
    z -= z[fit].mean(0)
    fitted = z[fit]
    if z.shape[1] <= len(fitted):
        variance, axes = np.linalg.eigh(fitted.T @ fitted)
    else:  # the same from the smaller of the two products
        variance, axes = np.linalg.eigh(fitted @ fitted.T)
        axes = fitted.T @ axes / np.sqrt(np.maximum(variance, 1e-12))
    return z @ axes[:, :-3:-1], variance[:-3:-1] / max(variance.sum(), 1e-30)


def extremes(p: Particles) -> tuple[list[int], list[int]]:
    """Indices from the highest and from the lowest twentieth of the rewards, each ordered from the end.

    Where there are frames, those that differ most: the rarest states are often neighbours in time and look alike.
    """
    order = np.argsort(-p.reward, kind="stable")
    pool = max(int(RARE * len(order)), EXTREMES)
    return _unlike(p.frames, order[:pool]), _unlike(p.frames, order[::-1][:pool])


def _unlike(frames: np.ndarray | None, candidates: np.ndarray) -> list[int]:
    """The first candidate, then always the one farthest from all taken so far, by mean difference of pixels, while any differs."""
    if frames is None:
        return candidates[:EXTREMES].tolist()
    pictures = frames[candidates].astype(np.int16)
    taken, distance = [0], np.full(len(candidates), np.inf)
    while len(taken) < EXTREMES:
        distance = np.minimum(distance, np.abs(pictures - pictures[taken[-1]]).mean(tuple(range(1, pictures.ndim))))
        if distance.max() == 0:
            break
        taken.append(int(distance.argmax()))
    return [int(candidates[i]) for i in sorted(taken)]


def _strip(p: Particles, indices, names) -> str:
    frames = ""
    for name, i in zip(names, indices, strict=True):
        reward = f"{p.reward[i]:.3f}"
        picture = f'<img alt="frame of reward {reward}" src="{png(p.frames[i])}">'
        frames += f'<div class="frame">{picture}<div><b>{name}</b>{reward}</div></div>'
    return f'<div class="strip">{frames}</div>'


def _names(count: int) -> list[str]:
    return [chr(ord("A") + i) for i in range(count)]


def video(story: Story) -> str:
    if story.video is None:
        return ""
    try:
        with open_plain(story.video) as file:
            size = os.fstat(file.fileno()).st_size
            if size > VIDEO_LIMIT:
                says = f"The video takes {human_bytes(size)}, too much to carry in this page: {story.video}"
                return f'<p class="missing">{escape(says)}</p>'
            content = file.read()
    except OSError as error:
        return f'<p class="missing">{escape(f"{story.video} cannot be read ({error.strerror}).")}</p>'
    import av

    try:
        with av.open(io.BytesIO(content), format="mp4") as container:  # no other format, which might name other files to be read
            stream = container.streams.video[0]
            width, height = stream.codec_context.width, stream.codec_context.height
            if not 0 < width * height <= VIDEO_PIXELS:
                raise ValueError(f"{width} x {height} pixels")
            stream.codec_context.options = {"max_pixels": str(VIDEO_PIXELS)}
            shown = deque(islice(container.decode(stream), 45), maxlen=1)
            poster = [f' poster="{png(np.ascontiguousarray(frame.to_ndarray(format="rgb24")))}"' for frame in shown]
            seconds = (container.duration or 0) / av.time_base
    except (av.FFmpegError, IndexError, ValueError, OverflowError) as error:
        return f'<p class="missing">{escape(f"{story.video} cannot be read ({error}).")}</p>'
    source = f'width="{width}" height="{height}"{"".join(poster)} src="{data_url(content, "video/mp4")}"'
    caption = f"The first evaluation episode, {human_time(seconds)} of it, at the speed of the game ({story.video.name})."
    return f"<figure><video controls autoplay loop muted playsinline {source}></video><figcaption>{escape(caption)}</figcaption></figure>"


def play(story: Story) -> str:
    """The policy: seen, and measured beside it."""
    measured = [part for part in (scores(story), coverage(story), progress_of_evaluations(story)) if part]
    seen = video(story)
    return grid(seen, f'<div class="stack">{"".join(measured)}</div>') if seen and measured else grid(seen, *measured)


def about(story: Story) -> str:
    evaluation, options = story.evaluation("agent") or {}, story.options
    steps, seconds, rate = story.last("step"), story.last("seconds"), story.last("steps_per_second")
    versions = story.config.get("versions") or evaluation.get("versions") or {}
    facts = [
        ("run", story.folder.name),
        ("method", story.config.get("method")),
        ("preset", story.config.get("preset")),
        ("begun from", story.config["transfer"]["run"] + ", " + story.pretraining if story.pretraining else None),
        ("environment", f"{story.config.get('domain', '')} {story.game}".strip()),
        ("seed", story.seed),
        ("steps", f"{number(steps)} of {number(options['steps'])}" if steps is not None and options.get("steps") else None),
        ("training time", human_time(seconds) if seconds else None),
        ("speed at the end", f"{rate:.3g} steps/s" if rate else None),
        ("begun on", story.config.get("hardware")),
        ("evaluated on", evaluation.get("hardware")),
        ("started", story.config.get("started")),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else versions),
    ]
    protocol = evaluation.get("protocol") or {}
    out = pairs(facts)
    if protocol:
        out += f"<details><summary>Evaluation protocol</summary>{pairs(_flat(protocol).items())}</details>"
    if options:
        out += f"<details><summary>Every option of the run</summary>{pairs(_flat(options).items())}</details>"
    return out


def _flat(values: dict, prefix="") -> dict:
    out = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out


def one(story: Story, anchor: str) -> str:
    """The whole section of a run."""
    facts = [f"{story.config.get('domain', '')} {story.game}".strip(), f"seed {story.seed}", story.folder.name]
    return "".join(
        (
            f'<section class="run" id="{anchor}"><header><h1>{escape(title(story))}</h1><p class="lead">{escape(lead(story))}</p>',
            f'<p class="facts">{escape("  ·  ".join(facts))}</p></header>',
            tiles(story),
            section("What it learned to do", play(story), missing(story, "results"), missing(story, "video")),
            section(
                "Learning",
                learning(story),
                missing(story, "metrics"),
                say="Faint: each logged value. Bold: running mean over a twentieth of the run." if story.metrics else "",
            ),
            section(
                "Intrinsic reward over time",
                reward_bands(story),
                say="A state earns the log of its distance to its nearest neighbours in the encoder's space, so that what is rare pays.",
            ),
            section("The states it reached", particles(story), missing(story, "particles")),
            section("The run", about(story)),
            "</section>",
        )
    )


# Several runs --------------------------------------------------------------------------------------------------------


def overlay(
    stories: list[Story], styles: dict[str, str], name: str, heading: str, caption: str, column: int | None = None, bounds=()
) -> str:
    """One metric of several runs: a thin curve per run, and where a group has several, their mean in bold."""
    curves: dict[str, list] = {}
    for story in stories:
        if name in story.metrics:
            steps, values = story.metrics[name]
            steps, values = thin(steps, values if column is None else values[:, column], points=240)
            if len(steps):
                curves.setdefault(story.group, []).append((steps, smooth(values, max(len(values) / 20, 1))))
    if not curves:
        return ""
    everything = [values for group in curves.values() for _, values in group]
    last = max(story.last("step", 0) for story in stories)
    chart = Chart(f"{heading} of {len(everything)} runs", (0, last), extent(*everything, include=bounds), xlabel="agent steps")
    for group, lines in curves.items():
        for steps, values in lines:
            chart.line(steps, values, styles[group] + (" seed" if len(lines) > 1 else ""))
        if len(lines) > 1:
            x = np.linspace(max(steps[0] for steps, _ in lines), min(steps[-1] for steps, _ in lines), 200)
            if x[-1] > x[0]:
                chart.line(x, np.mean([np.interp(x, steps, values) for steps, values in lines], axis=0), styles[group])
    return figure(chart.svg(), caption, heading)


def overlaid_coverage(stories: list[Story], styles: dict[str, str], heading: str) -> str:
    curves = [(s.group, p) for s in stories if (p := _coverage(s.evaluation("agent"))) is not None]
    chance = [p for s in stories if (p := _coverage(s.evaluation("random"))) is not None]
    if not curves:
        return ""
    every = [p for _, p in curves] + chance
    what = covers(next(e for s in stories if (e := s.evaluation("agent"))))
    top = 1.06 * max(p[:, 1].max() for p in every)
    chart = Chart(f"Unique {what} over frames", (0, max(p[-1, 0] for p in every)), (0, top), xlabel="frames")
    for style, points in [("other", p) for p in chance] + [(styles[group], p) for group, p in curves]:
        x, y = thin(points[:, 0], points[:, 1])
        chart.line(np.insert(x, 0, 0), np.insert(y, 0, 0), style)
    return figure(chart.svg(), f"{COUNTED[what]} in the evaluation episodes. Grey: random play.", heading)


def by_game(stories: list[Story]) -> dict[str, list[Story]]:
    games: dict[str, list[Story]] = {}
    for story in stories:
        games.setdefault(story.game, []).append(story)
    return games


def game_scores(stories: list[Story]) -> list[tuple[str, str, float, tuple[float, float] | None, list[float]]]:
    """(game, group, IQM over runs, its interval from three runs on, the mean score of each run)."""
    out = []
    for game, runs in by_game(stories).items():
        groups: dict[str, list[float]] = {}
        for story in runs:
            if agent := story.evaluation("agent"):
                groups.setdefault(story.group, []).append(float(np.mean(agent["returns"])))
        for group, values in groups.items():
            x = np.array(values)[:, None]
            out.append((game, group, float(stats.iqm(x)), stats.bootstrap_interval(stats.iqm, x) if len(x) >= 3 else None, values))
    return out


def aggregates(stories: list[Story], styles: dict[str, str]) -> str:
    """Interquartile means with intervals: of each game's runs, and over games where each has as many runs."""
    bars = game_scores(stories)
    if not bars:
        return '<p class="missing">No run here has been evaluated: urlfast evaluate RUN writes the scores that are compared.</p>'
    rows = []
    for game, group, at, between, values in bars:
        hns = stats.human_normalised_score(game, at) if game in stats.ATARI_SCORES else None
        rows.append(
            (game, group, len(values), number(at), f"{number(between[0])} to {number(between[1])}" if between else "n/a", percent(hns))
        )
    out = table(("game", "method", "runs", "IQM of scores", "95 % interval", "human-normalised"), rows, numeric_from=2)
    note = (
        "Interquartile mean over runs of the mean evaluation score; bootstrap over runs. n/a: fewer than 3 runs say nothing about spread."
    )
    out += f'<p class="missing">{note}</p>'
    if len({game for game, *_ in bars}) == 1 and len(bars) > 1:
        x = extent(*[values for *_, values in bars], *[b for *_, b, _ in bars if b])
        size = {"width": 1060, "height": 54 + 58 * len(bars), "left": 16}
        chart = Chart("Scores by method", x, (-0.45, len(bars) - 0.3), **size, yticks=[], xlabel="mean evaluation score")
        for y, (_, group, at, between, values) in zip(reversed(range(len(bars))), bars, strict=True):
            chart.dots(values, [y - 0.17] * len(values), f"{styles[group]} soft", radius=3)
            if between:
                chart.span(*between, y, styles[group])
            chart.dots([at], [y], styles[group], radius=5.5).text(x[0], y, group, "name", dy=-14)
        out += figure(
            chart.svg(),
            "Large: interquartile mean over runs, with its interval where there are three or more. Small: the mean score of each.",
        )
    return out + over_games(stories, styles)


def over_games(stories: list[Story], styles: dict[str, str]) -> str:
    rows, profiles, notes = [], [], []
    groups: dict[str, dict[str, list[float]]] = {}
    for story in stories:
        if story.hns is not None:
            groups.setdefault(story.group, {}).setdefault(story.game, []).append(story.hns)
    for group, games in groups.items():
        if len(games) < 2:
            continue
        if len({len(runs) for runs in games.values()}) > 1:
            counts = ", ".join(f"{game} {len(runs)}" for game, runs in games.items())
            notes.append(f"{group}: not aggregated over games, which have unequal numbers of runs ({counts}).")
            continue
        x = np.array(list(games.values())).T
        between = stats.bootstrap_interval(stats.iqm, x) if len(x) >= 3 else None
        rows.append(
            (
                group,
                len(games),
                len(x),
                f"{stats.iqm(x):.3f}",
                f"{between[0]:.3f} to {between[1]:.3f}" if between else "n/a",
                f"{stats.mean(x):.3f}",
                f"{stats.median(x):.3f}",
                f"{stats.optimality_gap(x):.3f}",
                f"{stats.human_level(x)} / {stats.human_level(x, 0.75)}",
            )
        )
        profiles.append((group, x))
    out = ""
    if rows:
        head = ("method", "games", "runs each", "IQM", "95 % interval", "mean", "median", "optimality gap", "human level (1.0 / 0.75)")
        out += f'<h3 style="margin-top:34px">Human-normalised, over games</h3>{table(head, rows, numeric_from=1)}'
        tau = np.linspace(min(0.0, *(x.min() for _, x in profiles)), max(x.max() for _, x in profiles) * 1.02, 201)
        chart = Chart(
            "Performance profiles",
            (tau[0], tau[-1]),
            (0, 1.02),
            width=1060,
            height=320,
            xlabel="human-normalised score τ",
            ylabel="runs above τ",
            left=44,
        )
        for group, x in profiles:
            if len(x) >= 3:
                low, high = stats.bootstrap_interval(lambda s: stats.performance_profile(s, tau), x, repeats=2000)
                chart.band(tau, low, high, styles[group])
            chart.line(tau, stats.performance_profile(x, tau), styles[group])
        out += figure(
            chart.svg(),
            "Performance profile: the fraction of all runs on all games that score above τ. Higher and further right is better.",
        )
    return out + "".join(f'<p class="missing">{escape(note)}</p>' for note in notes)


def name_groups(stories: list[Story]) -> None:
    """Runs of one kind that differ in an option other than BESIDE are not runs of one thing: the option joins their group's name."""
    kinds: dict[str, list[Story]] = {}
    for story in stories:
        if story.row:  # whose name says what it is
            story.group = story.row
        else:
            kinds.setdefault(story.kind, []).append(story)
    for kind, same in kinds.items():
        options = [_flat(story.options) for story in same]
        names = sorted({name for o in options for name in o} - BESIDE)
        differing = [name for name in names if len({str(o.get(name)) for o in options}) > 1]
        for story, o in zip(same, options, strict=True):
            story.group = ", ".join([kind, *(f"{name.removeprefix('method.')} {o.get(name)}" for name in differing)])


def several(stories: list[Story]) -> str:
    name_groups(stories)
    groups = list(dict.fromkeys(story.group for story in stories))
    styles = {group: f"s{i % 6}" for i, group in enumerate(groups)}
    games = by_game(stories)
    heading = (
        f"{len(stories)} runs on {next(iter(games)).replace('_', ' ').title()}"
        if len(games) == 1
        else f"{len(stories)} runs on {len(games)} games"
    )
    legend = "".join(
        f'<li class="{styles[g]}"><span>{escape(g)}, {_count(sum(s.group == g for s in stories), "run")}</span></li>' for g in groups
    )
    rows = []
    for i, story in enumerate(stories):
        agent, random = story.evaluation("agent"), story.evaluation("random")
        covered = coverage_at_equal_frames(agent, random) if agent else None
        rows.append(
            (
                ("html", f'<a href="#run-{i + 1}">{escape(story.folder.name)}</a>'),
                story.group,
                story.game,
                story.seed,
                number(story.last("step")),
                number(np.mean(agent["returns"])) if agent else "not evaluated",
                number(np.mean(random["returns"])) if random else "",
                percent(story.hns) if story.hns is not None else "",
                f"{covered[0] / covered[1]:.2f}×" if covered and covered[1] else "",
            )
        )
    means = [f"{group} {number(at)}" + (f" ({number(b[0])} to {number(b[1])})" if b else "") for _, group, at, b, _ in game_scores(stories)]
    if len(games) == 1 and means:
        text = f"Interquartile mean of the evaluation scores: {', '.join(means)}."
    else:
        text = f"{', '.join(groups)}, side by side."
    head = ("run", "method", "game", "seed", "steps", "score", "random", "human-normalised", "coverage, against random")
    panels = []
    for game, runs in games.items():
        name = f" · {game}" if len(games) > 1 else ""
        panels += [
            overlay(
                runs,
                styles,
                "score",
                f"Score of finished episodes{name}",
                "While training, explored, unclipped; running mean over a twentieth of the run.",
            ),
            overlay(
                runs,
                styles,
                "intrinsic_reward_quantiles",
                f"Median intrinsic reward{name}",
                "Median of the reward within the training batches.",
                column=2,
            ),
            overlay(
                runs,
                styles,
                "contrastive_accuracy",
                f"Contrastive accuracy{name}",
                "How often a view of an observation is nearest, in the whole batch, to the other view of it.",
                bounds=(0, 1),
            ),
            overlaid_coverage(runs, styles, f"Coverage{name}"),
        ]
    return "".join(
        (
            f'<header><h1>{escape(heading)}</h1><p class="lead">{escape(text)}</p></header>',
            section(
                "Side by side",
                f'<ul class="legend">{legend}</ul>',
                grid(*panels),
                say="Thin: single runs. Bold: the mean of a method's runs, as far as all of them have come.",
            ),
            section("Scores", aggregates(stories, styles)),
            section("The runs", table(head, rows, numeric_from=4)),
            *(one(story, f"run-{i + 1}") for i, story in enumerate(stories)),
        )
    )


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


# The page ------------------------------------------------------------------------------------------------------------


def page(stories: list[Story]) -> str:
    body = one(stories[0], "run-1") if len(stories) == 1 else several(stories)
    heading = title(stories[0]) if len(stories) == 1 else f"{len(stories)} runs"
    style = Path(__file__).with_name("report.css").read_text()
    written = time.strftime("%Y-%m-%d %H:%M")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(heading)} – urlfast</title><style>{style}</style></head><body><main>"
        '<header><p class="kicker">urlfast report</p></header>'
        f"{body}<footer>Written by urlfast {escape(__version__)} on {written}.</footer></main></body></html>\n"
    )


def report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the page of one run or several and returns its path: `out`, else RUN/report.html for one run and ./report.html for several."""
    if not runs:
        raise UserError("RUN: name at least one run's folder")
    stories = [story for run in runs for story in read_all(run)]
    path = Path(out) if out is not None else stories[0].folder / "report.html" if len(stories) == 1 else Path("report.html")
    content = page(stories).encode("utf-8", "backslashreplace").decode()
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"--out: {path} is not a file")
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}" if path.parent.is_dir() else f"--out: {path.parent} is no folder") from None
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """`urlfast report RUN... [--out FILE]`."""
    command("report", _main, argv)


def _main(argv: list[str]) -> None:
    options = tyro.cli(Options, args=argv, prog="urlfast report", description="One page of one run or several, without network or script.")
    path = report(options.runs, options.out)
    print(f"{path} ({human_bytes(path.stat().st_size)})")


if __name__ == "__main__":
    main()
