"""`urlfast evaluate RUN`: the score of a run's policy by the protocol of its game, what it covers, and a random policy beside it.

A lost life never ends an evaluation episode, rewards are not clipped, and each environment plays a fixed share of the episodes: taking
those that finish first would favour the short ones. Coverage is the number of distinct 128-byte RAM contents seen at agent steps, and,
where it is known which bytes hold the player's room and position, of distinct places: timers make most contents new, places they do not.
A place is a level, a room and a cell of a few pixels (in Montezuma's Revenge 8 by 8); rooms, a level's each, are counted by themselves too.
Where the environment shows its physics, coverage is the particle entropy of the physical states: how far they lie from each other. What
is evaluated does not explore, so where observations are vectors those that training has collected are measured too.

R2D2's and CPT's evaluators, whole games and the mean of 300 of them: --episodes 300 --num-envs 5 --epsilon 0.01

results.json: method, game, seed, and `evaluations`, each of one policy at one number of training frames by one protocol:

    policy "agent" | "random"   task   step, frames (of training)   returns [...], lengths [...] (one an episode)   mean, human_normalised
    coverage [[frames played, distinct states], ...]         unique_states within frames_of_unique_states, which both policies reached
    places   [[frames played, distinct places], ...]         unique_places likewise; null where the bytes are not known
    rooms    [[frames played, distinct rooms], ...]          unique_rooms likewise
    visited  [[level, room, x, y, agent steps there], ...]   in pixels, to two of them; null where the bytes of x and y are not known
    collected_entropy   of the observations in the replay, for random of those it is shown here; null for pictures
    state_entropy   of physical states; success   share of episodes with a return above 0; expert_normalised   URLB's; null where unknown
    physics  [[...], ...] some of the physical states, drawn evenly; null where none are shown
    protocol {epsilon, episodes, num_envs, seed, ...}        versions, hardware: by which, and with what, it was played
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import av
import numpy as np
import tyro

from urlfast import knn, stats, tables
from urlfast.checkpoint import Checkpoint, Refused, checkpoints, read, read_at, read_latest, step_of
from urlfast.envs.dmc_tasks import is_sparse
from urlfast.envs.rendering import NoRenderer
from urlfast.info import hardware
from urlfast.run import Progress, Run, UsageError, UserError, command, read_json, versions, write_json
from urlfast.train import DOMAINS, check_fits, load, make_method, refusals

VIDEO_SECONDS = 120
PHYSICS = 256  # physical states that results.json keeps of each policy
PLACE = {  # bytes of the RAM that say where the player is, and how wide a cell of x and y is (Anand et al. 2019, AtariARI; ALE's readers)
    "hero": {"level": (117, 1), "room": (28, 1), "x": (27, 8), "y": (31, 8)},
    "montezuma_revenge": {"level": (57, 1), "room": (3, 1), "x": (42, 8), "y": (43, 8)},
    "ms_pacman": {"x": (10, 1), "y": (16, 1)},
    "private_eye": {"room": (92, 1), "x": (63, 8), "y": (86, 8)},
    "venture": {"room": (90, 1)},
}


@dataclass(frozen=True)
class EvaluateConfig:
    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]  # folders, or names under runs/
    episodes: int | None = None  # of each policy, shared out evenly among the environments; None: 100 on Atari, 10 elsewhere
    epsilon: float = 0.001  # probability of a random one where actions are numbers, DrQ published 0.05; vectors are the policy's mean
    num_envs: int = 8  # environments that play in parallel
    checkpoint: str = "latest"  # latest, or the step of one of the run's checkpoints, or all of them
    task: str = ""  # zero-shot: another game, or another task of the same robot, than the run's own
    skill: tuple[float, ...] = ()  # of APS: the one to play, its length does not matter; none: random ones, or the task's where it is known
    seed: int = 10_000  # of the games and of the random actions
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where it is usable
    video: bool = True  # records the first episode, two minutes at most, into the run's videos/

    def __post_init__(self):
        for name, least in dict(episodes=1, num_envs=1, seed=0).items():
            if getattr(self, name) is None:
                continue
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
    rooms: list[tuple[int, int]] = field(default_factory=list)  # and of rooms
    visited: Counter = field(default_factory=Counter)  # agent steps at (level, room, x, y)
    physics: list[np.ndarray] = field(default_factory=list)  # (environments, P): after every step
    vectors: list[np.ndarray] = field(default_factory=list)  # (environments, D): observations that are no pictures
    frames: int = 0
    seconds: float = 0.0


def play(
    env,
    policy: Callable,
    episodes: int,
    seed: int,
    *,
    frames: int = 0,
    place: dict[str, tuple[int, int]] | None = None,
    watch: Callable | None = None,
    progress: Progress | None = None,
) -> Played:
    """Plays `episodes`, a fixed share in each environment, and then on, for coverage alone, until `frames` frames were played.

    policy: Step -> actions. place: as PLACE has them, the RAM's bytes that tell places apart.
    watch: called before each action of the first episode of environment 0. progress: told of episodes, each worth its share of `frames`.
    """
    began, played, seen, places, rooms, place = time.monotonic(), Played(), set(), set(), set(), place or {}
    columns, widths = ([part[i] for part in place.values()] for i in (0, 1))
    room = [i for i, name in enumerate(place) if name in ("level", "room")]
    share = episodes // env.num_envs + (np.arange(env.num_envs) < episodes % env.num_envs)
    finished, told = np.zeros(env.num_envs, np.int64), 0
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
                at = step.ram[active][:, columns]
                places.update(map(bytes, at // np.array(widths, np.uint8)))
                played.places.append((played.frames, len(places)))
                if "room" in place:
                    rooms.update(map(bytes, at[:, room]))
                    played.rooms.append((played.frames, len(rooms)))
                if "x" in place:
                    played.visited.update(map(bytes, at))
        if step.physics is not None:
            played.physics.append(step.physics[active])
        if step.observation.ndim == 2:
            played.vectors.append(step.observation[active])
        if not counted.any() and played.frames >= frames:
            break
        after = env.step(policy(step))
        played.frames += env.action_repeat * int(np.count_nonzero(active & ~step.is_last))
        over = counted & after.is_last
        played.returns += after.score[over].tolist()
        played.lengths += after.length[over].tolist()
        finished += over
        step = after
        if progress:
            done = min(len(played.returns), episodes * played.frames // frames if frames else episodes)
            progress.tick(done)
            if done > told:
                rate = done / (time.monotonic() - began)
                progress.log({"step": done, "steps_per_second": rate, "score": float(np.mean(played.returns))})
                told = done
    played.seconds = time.monotonic() - began
    return played


def visits(visited: Counter, place: dict) -> list[list[int]] | None:
    """[level, room, x, y, agent steps there], of pairs of pixels; None where the bytes of x and y are not known."""
    if not visited:
        return None
    steps: Counter = Counter()
    for at, n in visited.items():
        found = dict(zip(place, at, strict=True))
        steps[found.get("level", 0), found.get("room", 0), found["x"] // 2 * 2, found["y"] // 2 * 2] += n
    return [[*where, n] for where, n in sorted(steps.items())]


def fingerprints(ram: np.ndarray) -> list[bytes]:
    """64 bits of each row: among ten million states, two share theirs once in 370,000 evaluations."""
    return [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in ram]


def particle_entropy(*samples: np.ndarray, k: int = 12, most: int = 5_000) -> list[float]:
    """mean log of the mean distance to the k nearest other states, of each sample of states (N, P), of which `most` are drawn.

    Each number of a state is divided by its standard deviation over all samples, so their entropies compare with each other alone.
    """
    scale = np.concatenate(samples).std(0)
    random, entropies = np.random.default_rng(0), []
    for sample in samples:
        states = random.permutation(sample)[:most] / np.where(scale > 0, scale, 1)
        distances, _ = knn(states, k=min(k, len(states) - 1), include_self=False)
        entropies.append(float(np.log(distances.mean(-1).clip(1e-6)).mean()))
    return entropies


def thinned(curve: list, points: int = 500) -> list:
    return curve[:: len(curve) // points + 1] + curve[-1:]


def greedy(method, epsilon: float, actions: int | tuple[int, ...], random: np.random.Generator) -> Callable:
    """What the method would do, but at random with probability `epsilon` where actions are numbers."""
    at_random = uniform(actions, random)

    def policy(step):
        action = method.act(step, explore=False)
        if not isinstance(actions, int):
            return action
        action = np.where(random.random(len(action)) < epsilon, at_random(step), action)
        if hasattr(method, "took"):
            method.took(action)  # one that remembers what it did
        return action

    return policy


def uniform(actions: int | tuple[int, ...], random: np.random.Generator) -> Callable:
    if isinstance(actions, int):
        return lambda step: random.integers(0, actions, len(step.is_last))
    return lambda step: random.uniform(-1, 1, (len(step.is_last), *actions)).astype(np.float32)


class Video:
    """An mp4 of what environment 0 shows in colour, at the game's own speed; there whole, or not at all."""

    def __init__(self, path: Path, fps: float):
        self.path, self.fps, self.limit = path, round(fps), int(VIDEO_SECONDS * fps)
        self._temporary = path.with_name(f".{path.name}")
        self._frames = 0

    def __enter__(self):
        self.path.parent.mkdir(exist_ok=True)
        self._container = av.open(str(self._temporary), "w", format="mp4")
        self._stream = self._container.add_stream("libx264", rate=self.fps, options={"crf": "20"})
        self._stream.pix_fmt = "yuv420p"
        return self

    def watch(self, env) -> None:
        self.add(env.render(0))

    def add(self, screen: np.ndarray) -> None:
        if self._frames < self.limit:
            screen = screen.repeat(2, axis=0).repeat(2, axis=1)  # sharp edges, and the even sides that the codec wants
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


def draws(env, seed: int) -> bool:
    """Whether these environments have pictures here; where they have none, that is said, and all but the videos is measured."""
    env.reset(seed)
    try:
        env.render(0)
    except NoRenderer as error:
        print(f"no video: {error}", flush=True)
        return False
    return True


def watch_skills(agent, env, video: Video, seed: int) -> None:
    """A grid of environments, each with a skill of its own: there and back along the axes of the skills, for eight seconds at most."""
    n, d = env.num_envs, agent.skills.dim
    agent.skills.fix([[(i // d == 0) - (i // d == 1) if j == i % d else 0 for j in range(d)] for i in range(n)])
    step, columns = env.reset(seed), int(np.ceil(n**0.5))
    for _ in range(int(8 * env.fps)):
        screens = [env.render(i) for i in range(n)]
        screens += [np.zeros_like(screens[0])] * (-n % columns)
        video.add(np.concatenate([np.concatenate(screens[i : i + columns], 1) for i in range(0, len(screens), columns)]))
        step = env.step(agent.act(step, explore=False))
        if step.is_last.any():
            break


# The command ---------------------------------------------------------------------------------------------------------


FORCED = {"atari": {"life_loss_terminal": False, "backend": "processes"}}  # whatever the run's options say, in evaluation
EPISODES = {"atari": 100}  # 10 elsewhere


def evaluate(options: EvaluateConfig) -> None:
    if not options.runs:
        raise UsageError("RUN: name at least one run's folder")
    runs = [Run.find(name) for name in options.runs]
    scores: dict[str, dict[str, dict[str, list[float]]]] = {}  # unit, method, task: of the last checkpoint of each run
    for run in runs:
        with run.locked(".evaluate.lock"):  # a run may be evaluated while it trains, but by one process at a time
            for left in (*run.folder.glob("videos/.*.mp4"), *run.folder.glob(".results.json.*")):  # by one that was killed
                left.unlink()
            steps = [options.checkpoint]
            if options.checkpoint == "all":
                steps = [str(step_of(checkpoint)) for checkpoint in reversed(checkpoints(run.folder))] or ["latest"]
            for step in steps:
                with whole() as videos:
                    agent = measure(run, options, step, videos)
            for unit in tables.UNITS:
                if agent[f"{unit}_normalised"] is not None:
                    of = scores.setdefault(unit, {}).setdefault(kind(run.config), {})
                    of.setdefault(agent["task"], []).append(agent[f"{unit}_normalised"])
    for unit, groups in scores.items():
        over, _ = tables.over_tasks(groups, unit)
        if over and over.rows:
            print(f"\n{over.text()}")
        elif over:
            print(f"\n{over.note}")


def kind(saved: dict) -> str:
    """What runs are aggregated as."""
    source = saved.get("transfer")
    return f"{saved['method']} after {source['method']}, {source['rule']}" if source else saved["method"]


@contextmanager
def whole():
    """The videos of one evaluation, which appear when its results are written; where it is stopped there is neither, and that is said."""
    try:
        with ExitStack() as videos:
            yield videos
    except KeyboardInterrupt:
        print("\nstopped: this evaluation leaves nothing, and those that ended before it stay", file=sys.stderr, flush=True)
        raise


def measure(run: Run, options: EvaluateConfig, step: str, videos: ExitStack) -> dict:
    """Plays one checkpoint, writes what came of it, and returns the agent's entry."""
    saved = run.config
    method, domain, config = load(saved)
    checkpoint = read_latest(run.folder) if step == "latest" else read_at(run.folder, step)
    trained = config.env
    with refusals():
        own = trained.name
        if options.task:
            config = replace(config, env=trained.playing(options.task))
    game, episodes = config.env.name, options.episodes or EPISODES.get(domain, 10)
    place = PLACE.get(game, {})
    with refusals():
        env = DOMAINS[domain](config.env, num_envs=min(options.num_envs, episodes), evaluation=True, seed=options.seed)
    with closing(env):
        if game != own:
            check_fits(domain, trained, config.env, env, "its policy cannot act there")
        with refusals():
            agent = make_method(method, replace(config, device=options.device), env)
        with checkpoint.fitting():
            agent.load_state_dict(checkpoint.state["method"])
        if options.skill:
            if not hasattr(agent, "skills"):
                raise UsageError(f"--skill: {method} has no skills")
            with refusals():
                agent.skills.fix(options.skill)
        print(f"{run.folder}, step {checkpoint.step:,}: {episodes} episodes of {game} by each policy", flush=True)
        policy = greedy(agent, options.epsilon, env.actions, np.random.default_rng(options.seed))
        by_chance = uniform(env.actions, np.random.default_rng([options.seed, 1]))  # the same beside every agent
        films = options.video and draws(env, options.seed)
        film = f"step-{checkpoint.step:09d}" + (f"-{re.sub(r'[^A-Za-z0-9.-]+', '_', game)}" if game != own else "")
        video = videos.enter_context(Video(run.folder / "videos" / f"{film}.mp4", env.fps)) if films else None
        with Progress(episodes, of="agent: episode") as progress:
            mine = play(env, policy, episodes, options.seed, place=place, watch=video and video.watch, progress=progress)
        with Progress(episodes, of="random: episode") as progress:
            theirs = play(env, by_chance, episodes, options.seed, place=place, frames=mine.frames, progress=progress)
    if method == "aps" and films and not options.skill:
        grid = min(2 * agent.skills.dim, 9)
        with closing(DOMAINS[domain](config.env, num_envs=grid, evaluation=True, seed=options.seed)) as worlds:
            video_of_skills = videos.enter_context(Video(run.folder / "videos" / f"skills-{checkpoint.step:09d}.mp4", worlds.fps))
            watch_skills(agent, worlds, video_of_skills, options.seed)
        print(video_of_skills.path)
    equal = min(mine.frames, theirs.frames)
    entropies = particle_entropy(*(np.concatenate(played.physics) for played in (mine, theirs))) if mine.physics else (None, None)
    collected, spread = observations(checkpoint) if theirs.vectors else None, (None, None)
    if collected is not None:
        spread = particle_entropy(collected, np.concatenate(theirs.vectors)[:, -env.frame_shape[0] :])
    protocol = asdict(config.env) | FORCED.get(domain, {}) | {"num_envs": env.num_envs, "episodes": episodes, "seed": options.seed}
    protocol |= {"skill": options.skill} if options.skill else {}
    entries = [
        {
            "policy": name,
            "task": game,
            "step": checkpoint.step,
            "frames": checkpoint.step * env.action_repeat,
            "protocol": protocol | {"epsilon": epsilon},
            "versions": versions(),
            "hardware": hardware(),
            "mean": float(np.mean(played.returns)),
            "human_normalised": human_normalised(game, played) if protocol.get("reward", "game") == "game" else None,
            "expert_normalised": float(np.mean(played.returns)) / stats.URLB_EXPERT[game] if game in stats.URLB_EXPERT else None,
            "success": float(np.mean(np.array(played.returns) > 0)) if domain == "dmc" and is_sparse(game) else None,
            "state_entropy": entropy,
            "collected_entropy": apart,
            "unique_states": count_at(played.coverage, equal),
            "unique_places": count_at(played.places, equal),
            "unique_rooms": count_at(played.rooms, equal),
            "frames_of_unique_states": equal,
            "frames_played": played.frames,
            "returns": played.returns,
            "lengths": played.lengths,
            "coverage": thinned(played.coverage),
            "places": thinned(played.places),
            "rooms": thinned(played.rooms),
            "visited": visits(played.visited, place),
            "physics": sampled(played.physics),
            "seconds": played.seconds,
        }
        for name, epsilon, played, entropy, apart in zip(
            ("agent", "random"), (options.epsilon, 1.0), (mine, theirs), entropies, spread, strict=True
        )
    ]
    write_results(run, saved, own, config.seed, entries)
    print(table(entries))
    print(f"{run.folder}/results.json" + (f", {video.path}" if video else ""), flush=True)
    return entries[0]


def observations(checkpoint: Checkpoint, most: int = 5_000) -> np.ndarray | None:
    """Drawn from what the run had collected, (most, D); None where its replay is not there, is not whole, or holds next to nothing."""
    try:
        replay = read(checkpoint.folder, replay=True).load_replay(read_only=True)
    except (Refused, UserError):
        return None
    with closing(replay):
        if replay.sampleable <= 12:
            return None
        batch = replay.sample(most)
        seen = batch.observation if batch.observation.ndim == 2 else batch.observation[:, :-1][batch.mask]  # of sequences, what exists
        return seen[:most, -replay.fields["observation"].shape[0] :].copy()


def sampled(physics: list[np.ndarray]) -> list[list[float]] | None:
    """Of all states, evenly over what was played, to four digits."""
    if not physics:
        return None
    states = np.concatenate(physics)
    chosen = states[np.linspace(0, len(states) - 1, min(PHYSICS, len(states))).round().astype(int)]
    return [[float(f"{number:.4g}") for number in state] for state in chosen]


def human_normalised(game: str, played: Played) -> float | None:
    """None for a game without published scores."""
    return float(stats.human_normalised_score(game, np.mean(played.returns))) if game in stats.ATARI_SCORES else None


def count_at(curve: list[tuple[int, int]], frames: int) -> int | None:
    """Counted after the last step of all environments that ends within `frames`; None where nothing was counted."""
    return max((count for at, count in curve if at <= frames), default=None)


def write_results(run: Run, saved: dict, game: str, seed: int, entries: list[dict]) -> None:
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
        "game": game,
        "seed": seed,
        "evaluations": [entry for entry in before if key(entry) not in new] + entries,
    }
    write_json(path, results)


def table(entries: list[dict]) -> str:
    def mean(entry):
        several = len(entry["returns"]) > 1
        error = f"{np.std(entry['returns'], ddof=1) / len(entry['returns']) ** 0.5:.1f}" if several else "n/a"
        return f"{entry['mean']:,.1f} ± {error}"

    columns = {
        "policy": lambda entry: entry["policy"],
        "score": mean,
        "median": lambda entry: f"{np.median(entry['returns']):,.1f}",
        "human-normalised": lambda entry: entry["human_normalised"] and f"{100 * entry['human_normalised']:.1f} %",
        "of URLB's expert": lambda entry: entry["expert_normalised"] and f"{100 * entry['expert_normalised']:.1f} %",
        "episodes above 0": lambda entry: entry["success"] and f"{100 * entry['success']:.0f} %",
        "unique states": lambda entry: entry["unique_states"] and f"{entry['unique_states']:,}",
        "places": lambda entry: entry["unique_places"] and f"{entry['unique_places']:,}",
        "rooms": lambda entry: entry["unique_rooms"] and f"{entry['unique_rooms']:,}",
        "collected entropy": lambda entry: entry["collected_entropy"] and f"{entry['collected_entropy']:.2f}",
        "state entropy": lambda entry: entry["state_entropy"] and f"{entry['state_entropy']:.2f}",
        "steps an episode": lambda entry: f"{np.mean(entry['lengths']):,.0f}",
    }
    rows = [(name, *(cell(entry) for entry in entries)) for name, cell in columns.items()]
    rows = list(zip(*[[cell or "0" for cell in column] for column in rows if any(cell is not None for cell in column[1:])], strict=True))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    first = entries[0]
    notes = [f"score: mean of {len(first['returns'])} episodes ± its standard error, unclipped"]
    if first["unique_states"] is not None:
        seen = f"states: distinct RAM contents in the first {first['frames_of_unique_states']:,} frames, timers included"
        notes.append(f"{seen}; places: distinct rooms and positions of the player")
    if first["state_entropy"] is not None:
        notes.append("state entropy: mean log distance of a physical state to its 12 nearest, in units of the spread of all")
    if first["collected_entropy"] is not None:
        notes.append("collected entropy: the same of the observations that training has stored, beside those that random play is shown")
    return "\n".join([*lines, *notes])


def run_evaluate(argv: list[str]) -> None:
    description = "Plays a run's policy by the protocol of its game, and a random policy beside it."
    evaluate(tyro.cli(EvaluateConfig, args=argv, prog="urlfast evaluate", description=description))


def main(argv: Sequence[str] | None = None) -> None:
    """`urlfast evaluate`."""
    command("evaluate", run_evaluate, argv)


if __name__ == "__main__":
    main()
