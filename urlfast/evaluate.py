"""`urlfast evaluate RUN`: the score of a run's policy by the protocol of its game, what it covers, and a random policy beside it.

A lost life never ends an evaluation episode, rewards are not clipped, and each environment plays a fixed share of the episodes: taking
those that finish first would favour the short ones. Coverage is the number of distinct 128-byte RAM contents seen at agent steps, and,
where it is known which bytes hold the player's room and position, of distinct places: timers make most contents new, places they do not.

results.json: method, game, seed, and `evaluations`, each of one policy at one number of training frames by one protocol:

    policy "agent" | "random"   step, frames (of training)   returns [...], lengths [...] (one an episode)   mean, human_normalised
    coverage [[frames played, distinct states], ...]         unique_states within frames_of_unique_states, which both policies reached
    places   [[frames played, distinct places], ...]         unique_places likewise; null where the bytes are not known
    protocol {epsilon, episodes, num_envs, seed, ...}        versions, hardware: by which, and with what, it was played
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import av
import numpy as np
import tyro

from urlfast import stats
from urlfast.checkpoint import read_at, read_latest
from urlfast.info import hardware
from urlfast.run import Run, UsageError, command, read_json, versions, write_json
from urlfast.train import DOMAINS, load, make_method, refusals

VIDEO_SECONDS = 120
PLACE = {  # bytes of the RAM that say where the player is: room, x, y, as far as known (Anand et al. 2019, AtariARI)
    "hero": (28,),
    "montezuma_revenge": (3, 42, 43),
    "ms_pacman": (10, 16),
    "private_eye": (92,),
    "venture": (90,),
}


@dataclass(frozen=True)
class EvaluateConfig:
    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]  # folders, or names under runs/
    episodes: int = 100  # of each policy, shared out evenly among the environments
    epsilon: float = 0.001  # probability of a random action; DrQ published 0.05
    num_envs: int = 8  # environments that play in parallel
    checkpoint: str = "latest"  # latest, or the step of one of the run's checkpoints
    seed: int = 10_000  # of the games and of the random actions
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where it is usable
    video: bool = True  # records the first episode, two minutes at most, into the run's videos/

    def __post_init__(self):
        for name, least in dict(episodes=1, num_envs=1, seed=0).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, got {getattr(self, name)}")
            if getattr(self, name) >= 2**31:
                raise ValueError(f"{name}: must be less than 2^31, got {getattr(self, name)}")
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon: must lie in 0..1, got {self.epsilon}")


# Playing -------------------------------------------------------------------------------------------------------------


@dataclass
class Played:
    """What a policy did."""

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    coverage: list[tuple[int, int]] = field(default_factory=list)  # frames played, distinct states so far: after every step
    places: list[tuple[int, int]] = field(default_factory=list)  # the same of places
    frames: int = 0
    seconds: float = 0.0


def play(
    env, policy: Callable, episodes: int, seed: int, *, frames: int = 0, place: tuple[int, ...] = (), watch: Callable | None = None
) -> Played:
    """Plays `episodes`, a fixed share in each environment, and then on, for coverage alone, until `frames` frames were played.

    policy: Step -> actions. place: the RAM's bytes that tell places apart.
    watch: called before each action of the first episode of environment 0.
    """
    began, played, seen, places = time.monotonic(), Played(), set(), set()
    share = episodes // env.num_envs + (np.arange(env.num_envs) < episodes % env.num_envs)
    finished = np.zeros(env.num_envs, np.int64)
    step = env.reset(seed)
    while True:
        counted = finished < share
        if watch and finished[0] == 0:
            watch(env)
        active = counted if counted.any() else np.ones_like(counted)
        if step.ram is not None:
            seen.update(fingerprints(step.ram[active]))
            played.coverage.append((played.frames, len(seen)))
            if place:
                places.update(map(bytes, step.ram[active][:, place]))
                played.places.append((played.frames, len(places)))
        if not counted.any() and played.frames >= frames:
            break
        after = env.step(policy(step))
        played.frames += env.action_repeat * int(np.count_nonzero(active & ~step.is_last))
        over = counted & after.is_last
        played.returns += after.score[over].tolist()
        played.lengths += after.length[over].tolist()
        finished += over
        step = after
    played.seconds = time.monotonic() - began
    return played


def fingerprints(ram: np.ndarray) -> list[bytes]:
    """64 bits of each row: among ten million states, two share theirs once in 370,000 evaluations."""
    return [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in ram]


def thinned(curve: list, points: int = 500) -> list:
    return curve[:: len(curve) // points + 1] + curve[-1:]


def greedy(method, epsilon: float, num_actions: int, random: np.random.Generator) -> Callable:
    def policy(step):
        action = method.act(step, explore=False)
        at_random = random.random(len(action)) < epsilon
        return np.where(at_random, random.integers(0, num_actions, len(action)), action)

    return policy


def uniform(num_actions: int, random: np.random.Generator) -> Callable:
    return lambda step: random.integers(0, num_actions, len(step.is_last))


class Video:
    """An mp4 of what environment 0 shows in colour, at the game's own speed; there whole, or not at all."""

    def __init__(self, path: Path, fps: float):
        self.path, self.fps, self.limit = path, round(fps), int(VIDEO_SECONDS * fps)
        self._temporary = path.with_name(f".{path.name}")
        self._frames = 0

    def __enter__(self):
        self.path.parent.mkdir(exist_ok=True)
        self._temporary.unlink(missing_ok=True)
        self._container = av.open(str(self._temporary), "w", format="mp4")
        self._stream = self._container.add_stream("libx264", rate=self.fps, options={"crf": "20"})
        self._stream.pix_fmt = "yuv420p"
        return self

    def watch(self, env) -> None:
        if self._frames < self.limit:
            screen = env.render(0).repeat(2, axis=0).repeat(2, axis=1)  # sharp edges, and the even sides that the codec wants
            if self._frames == 0:
                self._stream.height, self._stream.width = screen.shape[:2]
            self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(screen, format="rgb24")))
            self._frames += 1

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self._container.mux(self._stream.encode())
            self._container.close()
            if kind is None:
                self._temporary.replace(self.path)
        finally:
            self._temporary.unlink(missing_ok=True)


# The command ---------------------------------------------------------------------------------------------------------


FORCED = {"life_loss_terminal": False, "backend": "processes"}  # whatever the run's options say, when environments are made for evaluation


def evaluate(options: EvaluateConfig) -> None:
    if not options.runs:
        raise UsageError("RUN: name at least one run's folder")
    for run in [Run.find(name) for name in options.runs]:
        with run.locked(".evaluate.lock"):  # a run may be evaluated while it trains, but by one process at a time
            measure(run, options)


def measure(run: Run, options: EvaluateConfig) -> None:
    saved = run.config
    method, domain, config = load(saved)
    checkpoint = read_latest(run.folder) if options.checkpoint == "latest" else read_at(run.folder, options.checkpoint)
    game = config.env.game
    place = PLACE.get(game, ())
    with refusals():
        env = DOMAINS[domain](config.env, num_envs=min(options.num_envs, options.episodes), evaluation=True, seed=options.seed)
    with closing(env):
        agent = make_method(method, replace(config, device=options.device), env)
        with checkpoint.fitting():
            agent.load_state_dict(checkpoint.state["method"])
        print(f"{run.folder}, step {checkpoint.step:,}: {options.episodes} episodes of {game} by each policy", flush=True)
        random = np.random.default_rng(options.seed)
        policy = greedy(agent, options.epsilon, env.num_actions, random)
        with (
            Video(run.folder / "videos" / f"step-{checkpoint.step:09d}.mp4", 60 / env.action_repeat)
            if options.video
            else nullcontext() as video
        ):
            mine = play(env, policy, options.episodes, options.seed, place=place, watch=video and video.watch)
        theirs = play(env, uniform(env.num_actions, random), options.episodes, options.seed, place=place, frames=mine.frames)
    equal = min(mine.frames, theirs.frames)
    protocol = asdict(config.env) | FORCED | {"num_envs": env.num_envs, "episodes": options.episodes, "seed": options.seed}
    entries = [
        {
            "policy": name,
            "step": checkpoint.step,
            "frames": checkpoint.step * env.action_repeat,
            "protocol": protocol | {"epsilon": epsilon},
            "versions": versions(),
            "hardware": hardware(),
            "mean": float(np.mean(played.returns)),
            "human_normalised": human_normalised(game, played),
            "unique_states": count_at(played.coverage, equal),
            "unique_places": count_at(played.places, equal),
            "frames_of_unique_states": equal,
            "frames_played": played.frames,
            "returns": played.returns,
            "lengths": played.lengths,
            "coverage": thinned(played.coverage),
            "places": thinned(played.places),
            "seconds": played.seconds,
        }
        for name, epsilon, played in (("agent", options.epsilon, mine), ("random", 1.0, theirs))
    ]
    write_results(run, saved, config, entries)
    print(table(entries))
    print(f"{run.folder}/results.json" + (f", {video.path}" if video else ""))


def human_normalised(game: str, played: Played) -> float | None:
    """None for a game without published scores."""
    return float(stats.human_normalised_score(game, np.mean(played.returns))) if game in stats.ATARI_SCORES else None


def count_at(curve: list[tuple[int, int]], frames: int) -> int | None:
    """Counted after the last step of all environments that ends within `frames`; None where nothing was counted."""
    return max((count for at, count in curve if at <= frames), default=None)


def write_results(run: Run, saved: dict, config, entries: list[dict]) -> None:
    """results.json keeps earlier evaluations, but for those of the same policy at the same step by the same protocol."""
    path = run.folder / "results.json"
    try:
        before = [entry for entry in read_json(path)["evaluations"] if isinstance(entry, dict)]
    except (OSError, ValueError, KeyError, TypeError):
        before = []  # there is none yet, or it is damaged and written anew

    def key(entry: dict) -> tuple:
        return entry.get("policy"), entry.get("step"), json.dumps(entry.get("protocol"), sort_keys=True)

    new = {key(entry) for entry in json.loads(json.dumps(entries))}
    results = {key: saved.get(key) for key in ("method", "domain", "preset", "transfer") if key in saved}
    results |= {
        "game": config.env.game,
        "seed": config.seed,
        "evaluations": [entry for entry in before if key(entry) not in new] + entries,
    }
    write_json(path, results)


def table(entries: list[dict]) -> str:
    rows = [("policy", "score", "median", "human-normalised", "unique states", "places", "steps an episode")]
    for entry in entries:
        hns, states, places = entry["human_normalised"], entry["unique_states"], entry["unique_places"]
        several = len(entry["returns"]) > 1
        error = f"{np.std(entry['returns'], ddof=1) / len(entry['returns']) ** 0.5:.1f}" if several else "n/a"
        rows.append(
            (
                entry["policy"],
                f"{entry['mean']:,.1f} ± {error}",
                f"{np.median(entry['returns']):,.1f}",
                "n/a" if hns is None else f"{100 * hns:.1f} %",
                "n/a" if states is None else f"{states:,}",
                "n/a" if places is None else f"{places:,}",
                f"{np.mean(entry['lengths']):,.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    episodes, frames = len(entries[0]["returns"]), entries[0]["frames_of_unique_states"]
    note = (
        f"score: mean of {episodes} episodes ± its standard error, unclipped\n"
        f"states: distinct RAM contents in the first {frames:,} frames, timers included; places: distinct rooms and positions of the player"
    )
    return "\n".join([*lines, note])


def run_evaluate(argv: list[str]) -> None:
    description = "Plays a run's policy by the protocol of its game, and a random policy beside it."
    evaluate(tyro.cli(EvaluateConfig, args=argv, prog="urlfast evaluate", description=description))


def main(argv: Sequence[str] | None = None) -> None:
    """`urlfast evaluate`."""
    command("evaluate", run_evaluate, argv)


if __name__ == "__main__":
    main()
