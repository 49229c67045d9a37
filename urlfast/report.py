"""`urlfast report RUN...`: what one run or several did, as one HTML file that needs no network and no script.

Reads a run's folder and changes nothing in it but report.html. Everything shown comes from config.json, metrics.jsonl (while training),
results.json (`urlfast evaluate`), videos/, and the newest valid checkpoint with its replay (the particles). Of several runs, or of a
sweep's folder, it compares what they came to (compare.py), and writes the tables beside the page as CSV and LaTeX.
"""

from __future__ import annotations

import io
import math
import os
import re
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

from urlfast import __version__, compare, papers, stats
from urlfast.envs.dmc_tasks import domain_of
from urlfast.figures import Chart, data_url, extent, png, short, smooth, thin
from urlfast.run import (
    Run,
    UsageError,
    UserError,
    command,
    human_bytes,
    human_time,
    open_plain,
    read_json,
    read_metrics,
    replacing,
    runs_of,
)
from urlfast.tables import UNITS, Number, Table, over_tasks

LEARNERS = {  # on the environment's own reward
    "drq": "DrQ",
    "drq-sac": "DrQ-SAC",
    "ddpg": "DDPG",
    "r2d2": "R2D2",
    "aps-task": "APS's task",
    "cpt-task": "CPT's transfer",
}
PRETRAINING = {"apt": "APT", "aps": "APS", "ngu": "NGU", "cpt": "CPT"}
METHODS = PRETRAINING | LEARNERS
BESIDE = {
    "seed",
    "env.game",
    "env.task",
    "env.id",
    "device",
    "runs",
    "log_every",
    "checkpoint_every",
    "keep",
    "actors",
    "ray_address",
}  # options in which runs that are compared may differ
PARTICLES = 2048
BATCH = 256  # sampled at a time
RARE = 0.05  # fraction of the particles that counts as the rarest
EXTREMES = 8  # frames shown at each end of the reward
NBSP = "\u00a0"
WHOLE = 12  # runs of which a page shows all; of more, it compares them
FEW = 4  # tasks, up to which more is drawn of each than its score
FILMS = 4  # videos beside each other
ROOMS = 12  # that are drawn of a game
FILM = re.compile(r"step-([0-9]{9,18})\.mp4")
VIDEO_LIMIT = 48_000_000  # bytes; base64 adds a third
VIDEO_PIXELS = 4_000_000  # of a frame


@dataclass(frozen=True)
class Options:
    """What `urlfast report` takes."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of runs, or names under runs/; or of sweeps, for all their runs."""
    out: Path | None = None
    """The page; RUN/report.html for one run, report.html here for several, whose tables go beside it as CSV and LaTeX."""


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
    films: list[tuple[int, Path]] = field(default_factory=list)  # step, video: of several checkpoints
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
        return str(env.get("game") or env.get("task") or env.get("id") or self.config.get("domain", "?"))

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

    def evaluations(self, policy, elsewhere=False) -> list[dict]:
        """On the run's own task, or on others, which are zero-shot; the last one last."""
        found = [e for e in (self.results or {}).get("evaluations", ()) if e["policy"] == policy]
        found = [e for e in found if (e.get("task", self.game) != self.game) == elsewhere]
        return sorted(found, key=lambda e: (e.get("frames") or 0, len(e["returns"])))

    def evaluation(self, policy) -> dict | None:
        """The last evaluation of a policy, never the best one; of several at one step, the one of most episodes."""
        return next(reversed(self.evaluations(policy)), None)

    def normalised(self, unit: str, score: float) -> float | None:
        """A score on the run's task, human-normalised or divided by URLB's expert."""
        if unit == "human" and self.game in stats.ATARI_SCORES:
            return float(stats.human_normalised_score(self.game, score))
        if unit == "expert" and self.game in stats.URLB_EXPERT:
            return float(score) / stats.URLB_EXPERT[self.game]
        return None

    @property
    def hns(self) -> float | None:
        agent = self.evaluation("agent")
        return self.normalised("human", np.mean(agent["returns"])) if agent else None


def read(folder: str | Path, whole: bool = True) -> Story:
    """Everything there is of one run, or only its numbers; raises UserError where the folder is none."""
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
    if not whole:
        return story
    videos = sorted((run.folder / "videos").glob("[!.]*.mp4"), key=lambda file: (file.lstat().st_mtime, file.name))
    if videos:
        story.video = videos[-1]
        films = sorted((int(match[1]), video) for video in videos if (match := FILM.fullmatch(video.name)))
        story.films = [films[i] for i in np.unique(np.linspace(0, len(films) - 1, FILMS).round().astype(int))] if len(films) > 1 else []
    else:
        story.lacks["video"] = f"No video yet: {evaluate} records one."
    try:
        story.particles = load_particles(run)
    except UserError as error:
        story.lacks["particles"] = f"No picture of the particles: {error}."
    return story


def read_all(runs: Sequence[str | Path]) -> list[Story]:
    """Of runs, and of every run of a sweep's folder by the names of its rows."""
    rows: list[tuple[Path, str]] = []
    for run in runs:
        if (Path(run) / "sweep.json").is_file():
            found = list(runs_of(run).items())
            if not found:
                raise UserError(f"{run}: no run of this sweep has begun")
            rows += found
        else:
            rows.append((Path(run), ""))
    return [replace(read(run, whole=len(rows) <= WHOLE), row=row) for run, row in rows]


COUNTS = (
    "frames",
    "success",
    "state_entropy",
    "collected_entropy",
    "unique_states",
    "unique_places",
    "unique_rooms",
    "frames_of_unique_states",
)


def _evaluation(entry: dict) -> dict:
    """An entry of results.json; ValueError where a number that is drawn is none."""
    returns, coverage = entry["returns"], [*(entry.get("coverage") or []), *(entry.get("places") or [])]
    counted = [entry[name] for name in COUNTS if entry.get(name) is not None]
    physics, visited = entry.get("physics") or [], entry.get("visited") or []
    numbers = [*returns, *counted, *(number for point in (*coverage, *physics, *visited) for number in point)]
    if any(len(place) != 5 for place in visited):
        raise ValueError("places that are no level, room, x, y and steps")
    if len({len(state) for state in physics}) > 1:
        raise ValueError("physical states of unequal lengths")
    if not 0 < len(returns) <= 100_000 or not all(map(_plottable, numbers)) or any(len(point) != 2 for point in coverage):
        raise ValueError("an evaluation whose numbers are none")
    named = isinstance(entry["policy"], str) and isinstance(entry.get("task", ""), str)
    if not named or not isinstance(entry.get("protocol", {}), dict):
        raise ValueError("an evaluation of no policy, on no task or by no protocol")
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

    None for a method without an intrinsic reward, or whose reward hangs on its episode. Changes nothing: the replay is opened read-only,
    and no running statistic moves.
    Raises UserError where the run has no checkpoint that can be read, or nothing in its replay yet.
    """
    if run.config.get("method") in LEARNERS:
        return None
    import torch

    from urlfast.checkpoint import read_latest
    from urlfast.train import DOMAINS, METHODS, check_replay, load, make_method, refusals

    if not hasattr(METHODS.get(run.config.get("method")), "intrinsic_reward"):
        return None
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
        if not (reward.isfinite().all() and z.isfinite().all()):
            raise ValueError(f"the network of step {checkpoint.step:,} gives NaN or infinity")
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


def alone(evaluation: dict) -> str:
    """What stands behind a headline's number where it rests on one episode, which says little."""
    return " (in a single episode)" if len(evaluation["returns"]) == 1 else ""


def single_episodes(stories: list[Story]) -> str:
    """The same of runs that are compared."""
    count = sum(bool(agent and alone(agent)) for agent in (story.evaluation("agent") for story in stories))
    return f" {_count(count, 'run')} of {len(stories)} played a single episode." if count else ""


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
    world = "game" if story.config.get("domain") == "atari" else "task"
    free = f"on the {world}'s own reward" if story.config.get("method") in LEARNERS else f"without a reward from the {world}"
    text = f"After {number(steps)} agent steps {free}" + (f", begun from {story.pretraining}" if story.pretraining else "")
    agent, random = story.evaluation("agent"), story.evaluation("random")
    if agent is None:
        return text + ", not evaluated yet."
    text += f", the policy scores {number(np.mean(agent['returns']))}{alone(agent)}"
    if random:
        text += f" where random play scores {number(np.mean(random['returns']))}{alone(random)}"
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
                note + "".join(f"; {says} {percent(v)}" for says, v in relative(story, np.mean(agent["returns"]))) + alone(agent),
            )
        )
        if agent.get("success") is not None:
            note = "share of the evaluation's, on a sparse task" + alone(agent)
            out.append(tile("Episodes with reward", percent(agent["success"], 0), note))
        if has_entropy(agent, random):
            note = f"random play {number(random['state_entropy'])}; mean log distance of a physical state to its 12 nearest"
            out.append(tile("State entropy", number(agent["state_entropy"]), note + alone(agent)))
        covered = coverage_at_equal_frames(agent, random)
        if covered and covered[1]:
            note = f"{number(covered[0])} against {number(covered[1])}, each in {short(covered[2])} frames" + alone(agent)
            out.append(tile(f"Unique {covers(agent)}, against random", f"{covered[0] / covered[1]:.2f}×", note))
        elif covered:
            out.append(tile(f"Unique {covers(agent)}", number(covered[0]), f"in {short(covered[2])} frames" + alone(agent)))
    accuracy = trend(story, "contrastive_accuracy")  # not the intrinsic reward, whose unit moves with the encoder
    if accuracy:
        note = f"of the encoder in the last tenth of the run; {percent(accuracy[0], 0)} in the first"
        out.append(tile("Contrastive accuracy", percent(accuracy[1], 0), note))
    elif story.last("episodes") is not None:
        out.append(tile("Episodes", number(story.last("episodes")), "finished while training"))
    return f'<div class="tiles">{"".join(out)}</div>' if out else ""


RELATIVE = {"human-normalised": "human", "of URLB's expert": "expert"}


def relative(story: Story, score: float) -> list[tuple[str, float]]:
    return [(says, value) for says, unit in RELATIVE.items() if (value := story.normalised(unit, score)) is not None]


def has_entropy(*evaluations: dict | None) -> bool:
    return all(evaluation and evaluation.get("state_entropy") is not None for evaluation in evaluations)


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
        curve(story, "inverse_accuracy", "Inverse accuracy", "How often the action is read off the embeddings around it.", bounds=(0, 1)),
        curve(story, "rnd_loss", "RND loss", "Error of the network that learns to predict a random one: it falls where nothing is new."),
        curve(story, "inverse_error", "Inverse error", "Distance of the actions read off two observations to those taken."),
        curve(story, "forward_error", "Forward error", "Distance of the predicted features of the next observation to what they are."),
        curve(
            story, "phi_loss", "Feature loss", "Minus the mean of phi(o')ᵀw: how little observations tell of the skill they were met under."
        ),
        curve(story, "skill_reward", "Skill reward", "Mean of phi(o')ᵀw, which pays for following the skill.", bounds=(0,)),
        curve(story, "entropy_reward", "Entropy reward", "Mean particle-entropy reward, which pays for exploring."),
        curve(
            story,
            "q_loss",
            "Q loss",
            "Of temporal-difference errors: DrQ's Huber loss, or R2D2's half squares summed over a sequence.",
            bounds=(0,),
        ),
        curve(story, "critic_loss", "Critic loss", "Temporal-difference error of both critics, squared.", bounds=(0,)),
        curve(story, "alpha", "Temperature", "Weight of the policy's entropy, as it was learned.", bounds=(0,)),
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
    reward, when = "the particle-entropy reward", "is computed anew at each update, with the encoder of that moment"
    if story.config.get("method") in ("ngu", "cpt"):
        reward, when = "NGU's reward", "was computed when the agent was there, as it hangs on what the episode had seen"
    return figure(
        chart.svg(),
        f"Distribution of {reward} within the training batches: median, the middle half (dark) and 5 to 95 % (light). It {when}; "
        "a wide band means that states differ in how rare they are.",
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
    caption = f"One dot per episode, above it the mean with a bootstrap interval over episodes. {'; '.join(notes)}. Unclipped score."
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


def visited(story: Story) -> str:
    """Where the player was, room by room: those where the agent spent most time."""
    found = {name: np.array(places) for name in ("random", "agent") if (places := (story.evaluation(name) or {}).get("visited"))}
    if "agent" not in found:
        return ""
    steps: dict[tuple, float] = {}
    for level, room, _, _, n in found["agent"].tolist():
        steps[level, room] = steps.get((level, room), 0) + n
    rooms = sorted(sorted(steps, key=lambda at: -steps[at])[:ROOMS])
    levels = len({level for level, _ in steps}) > 1
    everywhere = np.concatenate(list(found.values()))
    (low, high), (bottom, top) = ((everywhere[:, i].min() - 4, everywhere[:, i].max() + 4) for i in (2, 3))
    drawn = []
    for at in rooms:
        name = (f"level {at[0]:g}, " if levels else "") + f"room {at[1]:g}"
        chart = Chart(f"Where the player was in {name}", (low, high), (bottom, top), width=270, height=190, left=8, right=8, ylabel=name,
                      xticks=[], yticks=[])  # fmt: skip
        for policy, places in found.items():
            here = places[(places[:, :2] == at).all(1)]
            if len(here):
                chart.dots(here[:, 2], here[:, 3], "s0" if policy == "agent" else "other", radius=1.6 if policy == "agent" else 2.6)
        drawn.append(chart.svg())
    others = "" if "random" not in found else ", under them grey those of random play, which goes on until it has as many frames"
    caption = f"Pixels where the player was at an agent step of the evaluation episodes, from the console's memory{others}."
    if len(steps) > len(rooms):
        caption += f" The {len(rooms)} rooms of {len(steps)} in which the agent spent most steps."
    return figure(f'<div class="rooms">{"".join(drawn)}</div>', caption, "Where the player was")


def progress_of_evaluations(story: Story) -> str:
    """Evaluated score against training, where a run was evaluated more than once."""
    newest = {e["frames"]: e for e in story.evaluations("agent") if e.get("frames") is not None}  # of each checkpoint
    found = [newest[frames] for frames in sorted(newest)]
    if len(found) < 2:
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
    if p.frames is not None:
        chart.rings(*inside[top].T, _names(len(top)))
    shares = f"{share[0]:.0%} and {share[1]:.0%}".replace("%", NBSP + "%")
    left = figure(
        chart.svg(),
        f"{len(p.z):,} observations drawn uniformly from the replay, encoded into {p.z.shape[1]:,} numbers each by the checkpoint at step "
        f"{number(p.step)}, seen along the two directions of largest variance of all but the rarest twentieth ({shares} of it). Colour: "
        "rank of the intrinsic reward, bright where high."
        + (" Ringed: the frames beside." if p.frames is not None else "")
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
    shown = "Each environment with a skill of its own" if story.video.name.startswith("skills-") else "The first evaluation episode"
    return film(story.video, shown + ", {seconds} of it, at the speed of the game ({name}).", VIDEO_LIMIT)


def films(story: Story) -> str:
    """The same episode as several checkpoints played it."""
    shown = [film(path, f"After {number(step)} steps: {{seconds}}.", VIDEO_LIMIT // FILMS) for step, path in story.films]
    return f'<div class="films">{"".join(shown)}</div>' if shown else ""


def film(path: Path, caption: str, limit: int) -> str:
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                says = f"The video takes {human_bytes(size)}, too much to carry in this page: {path}"
                return f'<p class="missing">{escape(says)}</p>'
            content = file.read()
    except OSError as error:
        return f'<p class="missing">{escape(f"{path} cannot be read ({error.strerror}).")}</p>'
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
        return f'<p class="missing">{escape(f"{path} cannot be read ({error}).")}</p>'
    source = f'width="{width}" height="{height}"{"".join(poster)} src="{data_url(content, "video/mp4")}"'
    caption = caption.format(seconds=human_time(seconds), name=path.name)
    return f"<figure><video controls autoplay loop muted playsinline {source}></video><figcaption>{escape(caption)}</figcaption></figure>"


def play(story: Story) -> str:
    """The policy: seen, and measured beside it."""
    styles = {story.group: "s0"}
    above = [compare.efficiency(groups, styles, "Coverage", ENTROPY) for groups in entropies([story]).values()]
    where = [*where_it_was([story], styles), *(figure(*one) for one in above if one)]
    measured = [part for part in (scores(story), coverage(story), visited(story), *where, progress_of_evaluations(story)) if part]
    seen = video(story)
    return grid(seen, f'<div class="stack">{"".join(measured)}</div>') if seen and measured else grid(seen, *measured)


def where_it_was(stories: list[Story], styles: dict[str, str]) -> list[str]:
    """A picture for each robot of DMControl whose physics was kept."""
    robots: dict[str, tuple[dict[str, list], list]] = {}
    for story in stories:
        if story.config.get("domain") == "dmc":
            for policy in ("agent", "random"):
                physics = (story.evaluation(policy) or {}).get("physics")
                if physics:
                    agents, random = robots.setdefault(domain_of(story.game), ({}, []))
                    (agents.setdefault(story.group, []) if policy == "agent" else random).append(np.asarray(physics, np.float64))
    figures = []
    for robot, (agents, random) in robots.items():
        samples = {group: np.concatenate(of) for group, of in agents.items()}
        drawn = compare.covered(robot, samples, np.concatenate(random) if random else None, styles) if samples else None
        figures.append(figure(*drawn) if drawn else "")
    return figures


def elsewhere(stories: list[Story]) -> str:
    """Evaluations on tasks that are not the run's own, beside random play."""
    rows = []
    for story in stories:
        chance = {e["task"]: e for e in story.evaluations("random", elsewhere=True)}
        for task, e in {e["task"]: e for e in story.evaluations("agent", elsewhere=True)}.items():
            against = number(np.mean(chance[task]["returns"])) if task in chance else None
            rows.append((story.folder.name, task, number(e.get("frames")), number(np.mean(e["returns"])), against))
    return (
        table(("run", "task", "training frames", "score", "random"), [["n/a" if c is None else c for c in r] for r in rows], 2)
        if rows
        else ""
    )


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
            section("Over training", films(story), say="The first evaluation episode of several checkpoints."),
            section(
                "On other tasks, as it is", elsewhere([story]), say="Zero-shot: the same policy, which has not learned from their rewards."
            ),
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


def game_scores(stories: list[Story]) -> list[tuple[str, str, Number, list[float]]]:
    """(game, group, IQM over runs with its interval from three runs on, the mean score of each run)."""
    out = []
    for game, runs in by_game(stories).items():
        groups: dict[str, list[float]] = {}
        for story in runs:
            if agent := story.evaluation("agent"):
                groups.setdefault(story.group, []).append(float(np.mean(agent["returns"])))
        for group, values in groups.items():
            x = np.array(values)[:, None]
            between = stats.bootstrap_interval(stats.iqm, x, repeats=5000) if len(x) >= 3 else None
            out.append((game, group, Number(float(stats.iqm(x)), between and tuple(map(float, between)), number), values))
    return out


def shown(made: Table) -> str:
    """A table, and itself as files: beside the page too, and in it, so that the page goes alone."""
    links = "".join(
        f'<a download="{made.name}.{kind}" href="{data_url(text.encode(), f"text/{of}")}">{says}</a>'
        for kind, of, says, text in (("csv", "csv", "CSV", made.csv()), ("tex", "x-tex", "LaTeX", made.latex()))
    )
    note = f'<p class="missing">{escape(made.note)}</p>' if made.note else ""
    if not made.rows:
        return note
    heading = f'<h3 style="margin-top:34px">{escape(made.title)}</h3>'
    rows = [[_stacked(cell) if isinstance(cell, Number) else text for cell, text in zip(*row, strict=True)]
        for row in zip(made.rows, made.cells(), strict=True)]  # fmt: skip
    return f'{heading}{table(made.head, rows, made.numeric_from)}<p class="files">{links}</p>{note}'


def _stacked(value: Number) -> tuple[str, str]:
    """A number, its interval below it in small."""
    at, _, between = str(value).partition(" ")
    return "html", escape(at) + (f' <span class="between">{escape(between)}</span>' if between else "")


def aggregates(stories: list[Story], styles: dict[str, str]) -> tuple[str, list[Table]]:
    """Interquartile means with intervals: of each game's runs, and over games where each has as many runs. And the tables in it."""
    found = game_scores(stories)
    if not found:
        return '<p class="missing">No run here has been evaluated: urlfast evaluate RUN writes the scores that are compared.</p>', []
    of = {story.game: story for story in stories}
    units = [unit for unit in UNITS if any(story.normalised(unit, 0) is not None for story in stories)]
    rows = []
    for game, group, at, values in found:
        relative = [of[game].normalised(unit, at.value) for unit in units]
        rows.append((game, group, len(values), at, *(None if v is None else Number(100 * v, show=compare.plain) for v in relative)))
    head = (
        "game",
        "method",
        "runs",
        "IQM of scores",
        *(f"{says}, %" for says, unit in RELATIVE.items() if unit in units),
    )
    note = "Interquartile mean over runs of the mean evaluation score. In brackets: 95 % interval, bootstrap over runs"
    note += "; none is shown below three runs, which say nothing about spread." if any(len(v) < 3 for *_, v in found) else "."
    note += single_episodes(stories)
    tables = [Table("scores", "Score on each task", head, rows, note, numeric_from=2)]
    out = shown(tables[0])
    if len({game for game, *_ in found}) == 1 and len(found) > 1:
        x = extent(*[values for *_, values in found], *[at.between for _, _, at, _ in found if at.between])
        size = {"width": 1060, "height": 54 + 58 * len(found), "left": 16}
        chart = Chart("Scores by method", x, (-0.45, len(found) - 0.3), **size, yticks=[], xlabel="mean evaluation score")
        for y, (_, group, at, values) in zip(reversed(range(len(found))), found, strict=True):
            chart.dots(values, [y - 0.17] * len(values), f"{styles[group]} soft", radius=3)
            if at.between:
                chart.span(*at.between, y, styles[group])
            chart.dots([at.value], [y], styles[group], radius=5.5).text(x[0], y, group, "name", dy=-14)
        out += figure(
            chart.svg(),
            "Large: interquartile mean over runs, with its interval where there are three or more. Small: the mean score of each.",
        )
    for unit in units:
        text, made = over_games(stories, styles, unit)
        out, tables = out + text, tables + made
    for made in beside_papers(stories):
        out, tables = out + shown(made), [*tables, made]
    return out, tables


def over_games(stories: list[Story], styles: dict[str, str], unit: str) -> tuple[str, list[Table]]:
    groups: dict[str, dict[str, list[float]]] = {}
    for story in stories:
        agent = story.evaluation("agent")
        value = story.normalised(unit, np.mean(agent["returns"])) if agent else None
        if value is not None:
            groups.setdefault(story.group, {}).setdefault(story.game, []).append(value)
    made, matrices = over_tasks(groups, unit)
    if made is None:
        return "", []
    out = shown(made)
    if matrices:
        drawn = [compare.profiles(matrices, styles, unit)]
        if len(matrices) > 1:
            drawn.append(compare.bars({row[0]: row[3] for row in made.rows}, styles, "interquartile mean, normalised"))
        out += f'<div class="stack">{"".join(figure(*one) for one in drawn)}</div>'
    return out, [made] if made.rows else []


def learning_curves(stories: list[Story], styles: dict[str, str]) -> str:
    """Scores of evaluated checkpoints over training, on each task and over all."""
    tasks: dict[str, dict[str, list[dict[int, float]]]] = {}
    over: dict[str, dict[str, dict[str, list[dict[int, float]]]]] = {}
    for story in stories:
        scores = {e["frames"]: float(np.mean(e["returns"])) for e in story.evaluations("agent") if e.get("frames") is not None}
        if scores:
            tasks.setdefault(story.game, {}).setdefault(story.group, []).append(scores)
            for unit in UNITS:
                if story.normalised(unit, 0) is not None:
                    normalised = {at: story.normalised(unit, score) for at, score in scores.items()}
                    over.setdefault(unit, {}).setdefault(story.group, {}).setdefault(story.game, []).append(normalised)
    drawn = [compare.efficiency_over_tasks(groups, styles, unit) for unit, groups in over.items()]
    drawn += [compare.efficiency(groups, styles, game.replace("_", " ")) for game, groups in tasks.items()]
    drawn += [
        compare.efficiency(groups, styles, f"Coverage · {game.replace('_', ' ')}", ENTROPY) for game, groups in entropies(stories).items()
    ]
    return grid(*(figure(*one) for one in drawn if one))


ENTROPY = "entropy of what was collected, above random play's"


def entropies(stories: list[Story]) -> dict[str, dict[str, list[dict[int, float]]]]:
    """{task: {group: [{training frames: how far the entropy of what was collected is above random play's, measured with it}]}}."""
    tasks: dict[str, dict[str, list[dict[int, float]]]] = {}
    for story in stories:
        chance = {e.get("frames"): e["collected_entropy"] for e in story.evaluations("random") if e.get("collected_entropy") is not None}
        chance.pop(None, None)
        both = [e for e in story.evaluations("agent") if e.get("collected_entropy") is not None and e.get("frames") in chance]
        if both:
            above = {e["frames"]: e["collected_entropy"] - chance[e["frames"]] for e in both}
            tasks.setdefault(story.game, {}).setdefault(story.group, []).append(above)
    return tasks


def beside_papers(stories: list[Story]) -> list[Table]:
    """Of what was fine-tuned on Atari: the papers' own numbers beside ours."""
    games: dict[str, tuple[str, dict[str, list[float]]]] = {}
    relative: dict[str, dict[str, list[float]]] = {}
    for story in stories:
        source, agent = story.config.get("transfer"), story.evaluation("agent")
        if story.config.get("domain") != "atari" or agent is None or (not source and story.config.get("method") in PRETRAINING):
            continue  # the papers' numbers are of what was fine-tuned
        score = float(np.mean(agent["returns"]))
        if story.hns is not None:
            relative.setdefault(story.group, {}).setdefault(story.game, []).append(story.hns)
        if source and source["rule"] == "whole" and source["method"] in papers.SCORES and story.row in ("", METHODS[source["method"]]):
            games.setdefault(story.group, (source["method"], {}))[1].setdefault(story.game, []).append(score)
        elif source and source["rule"] == "random-head" and source["method"] == "apt":
            games.setdefault(story.group, ("apt, random head", {}))[1].setdefault(story.game, []).append(score)
    return [made for made in (compare.beside_paper(games), compare.beside_aggregates(relative)) if made]


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


def worlds(stories: list[Story]) -> str:
    """What a task is called here."""
    return "game" if all(story.config.get("domain") == "atari" for story in stories) else "task"


def several(stories: list[Story]) -> tuple[str, list[Table]]:
    """The page's body, and the tables in it."""
    name_groups(stories)
    whole = len(stories) <= WHOLE
    groups = list(dict.fromkeys(story.group for story in stories))
    styles = {group: f"s{i % 6}" for i, group in enumerate(groups)}
    games = by_game(stories)
    heading = (
        f"{len(stories)} runs on {next(iter(games)).replace('_', ' ').title()}"
        if len(games) == 1
        else f"{len(stories)} runs on {len(games)} {worlds(stories)}s"
    )
    legend = "".join(
        f'<li class="{styles[g]}"><span>{escape(g)}, {_count(sum(s.group == g for s in stories), "run")}</span></li>' for g in groups
    )
    rows = []
    for i, story in enumerate(stories):
        agent, random = story.evaluation("agent"), story.evaluation("random")
        covered = coverage_at_equal_frames(agent, random) if agent else None
        shares = dict(relative(story, np.mean(agent["returns"]))) if agent else {}
        rows.append(
            (
                ("html", f'<a href="#run-{i + 1}">{escape(story.folder.name)}</a>') if whole else story.folder.name,
                story.group,
                story.game,
                story.seed,
                number(story.last("step")),
                number(np.mean(agent["returns"])) + alone(agent) if agent else "not evaluated",
                number(np.mean(random["returns"])) if random else "",
                *(percent(shares[says]) if says in shares else None for says in RELATIVE),
                f"{covered[0] / covered[1]:.2f}×" if covered and covered[1] else None,
                f"{number(agent['state_entropy'])}, random {number(random['state_entropy'])}" if has_entropy(agent, random) else None,
            )
        )
    means = [f"{group} {at}" for _, group, at, _ in game_scores(stories)]
    if len(games) == 1 and means:
        text = f"Interquartile mean of the evaluation scores: {', '.join(means)}.{single_episodes(stories)}"
    else:
        text = f"{', '.join(groups)}, side by side."
    head = ("run", "method", worlds(stories), "seed", "steps", "score", "random", *RELATIVE, "coverage, against random", "state entropy")
    kept = [i for i in range(len(head)) if any(row[i] is not None for row in rows)]
    head, rows = [head[i] for i in kept], [["" if row[i] is None else row[i] for i in kept] for row in rows]
    panels = []
    for game, runs in games.items():
        name = f" · {game}" if len(games) > 1 else ""
        panels.append(
            overlay(
                runs,
                styles,
                "score",
                f"Score of finished episodes{name}",
                "While training, explored, unclipped; running mean over a twentieth of the run.",
            )
        )
        if len(games) > FEW:
            continue
        panels += [
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
    scores, tables = aggregates(stories, styles)
    if not whole:
        each = f'<p class="missing">More than {WHOLE} runs: urlfast report RUN makes a page that shows all of one.</p>'
    else:
        each = "".join(one(story, f"run-{i + 1}") for i, story in enumerate(stories))
    body = "".join(
        (
            f'<header><h1>{escape(heading)}</h1><p class="lead">{escape(text)}</p></header>',
            section(
                "Side by side",
                f'<ul class="legend">{legend}</ul>',
                grid(*panels),
                say="Thin: single runs. Bold: the mean of a method's runs, as far as all of them have come.",
            ),
            section("Scores", scores),
            section("Score over training", learning_curves(stories, styles)),
            section("What was covered", grid(*where_it_was(stories, styles))),
            section("On other tasks, as they are", elsewhere(stories), say="Zero-shot: policies that have not learned from these rewards."),
            section("The runs", table(head, rows, numeric_from=4)),
            each,
        )
    )
    return body, tables


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


# The page ------------------------------------------------------------------------------------------------------------


def page(stories: list[Story]) -> tuple[str, list[Table]]:
    """The page, and the tables in it."""
    body, tables = (one(stories[0], "run-1"), []) if len(stories) == 1 else several(stories)
    heading = title(stories[0]) if len(stories) == 1 else f"{len(stories)} runs"
    style = Path(__file__).with_name("report.css").read_text()
    written = time.strftime("%Y-%m-%d %H:%M")
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(heading)} – urlfast</title><style>{style}</style></head><body><main>"
        '<header><p class="kicker">urlfast report</p></header>'
        f"{body}<footer>Written by urlfast {escape(__version__)} on {written}.</footer></main></body></html>\n"
    )
    return text, tables


def report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the page of one run or several and returns its path: `out`, else RUN/report.html for one run and ./report.html for several."""
    if not runs:
        raise UsageError("RUN: name at least one run's folder")
    stories = read_all(runs)
    path = Path(out) if out is not None else stories[0].folder / "report.html" if len(stories) == 1 else Path("report.html")
    content, tables = page(stories)
    files = {path: content} | {path.with_name(f"{path.stem}-{made.name}.csv"): made.csv() for made in tables}
    files |= {path.with_name(f"{path.stem}-{made.name}.tex"): made.latex() for made in tables}
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"--out: {path} is not a file")
        for name, text in files.items():
            with replacing(name) as file:
                file.write(text.encode("utf-8", "backslashreplace").decode())
    except OSError as error:
        if not path.parent.is_dir():
            raise UsageError(f"--out: {path.parent} is no folder") from None
        raise UserError(f"{path}: {error.strerror}") from None
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
