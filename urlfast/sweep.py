"""`urlfast sweep FILE|NAME`: many runs from one list: rows x tasks x seeds, each trained and evaluated, then one report of all.

The list is a JSON file, or a ready one by name (READY):

    {"seeds": [1, 2, 3],                        of every row that has none of its own; [1, 2, 3] where left out
     "tasks": ["walker_walk"],                  likewise: games, tasks or environments; left out: the preset's own. hard6, ablation12,
                                                atari26 and atari57 stand for their games
     "evaluate": "--episodes 10",               options of `urlfast evaluate` after each run; null: no evaluation
     "rows": [
        {"name": "APT", "train": "apt dmc --steps 100_000", "tasks": ["walker_stand"]},
        {"name": "APT, fine-tuned", "transfer": "--steps 50_000", "after": "APT"},
        {"name": "APT, zero-shot", "evaluate": "--epsilon 0", "after": "APT"},
        {"name": "from scratch", "train": "ddpg dmc --steps 50_000"}]}

"train" is what follows `urlfast train`; "transfer" and "evaluate" are the options of `urlfast transfer RUN` and `urlfast evaluate RUN`,
whose RUN is that of the row `after` with the same seed and task, or where that row has none of the task, of the task's robot, or its only
one. An option given twice has the value given last.

    sweeps/NAME/                                all that a sweep knows, so that the same command goes on after a kill
        sweep.json                              the list, with the command line's changes in it
        ROW/TASK-s1/ job.json log.txt RUN/      which of a job's commands are done, what they printed, and the run they made
        report.html

Options and names are checked before the first command runs. In a call each job has one try, and where it fails or is killed the others
go on. The next call skips what is finished, resumes what was interrupted, and tries anew what failed.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated

import tyro

from urlfast.envs.dmc_tasks import domain_of
from urlfast.run import (
    Run,
    UsageError,
    UserError,
    check_writable,
    command,
    human_time,
    nearest,
    newest_run,
    one_line,
    read_json,
    runs_of,
    saved,
    slug,
    write_json,
)
from urlfast.stats import ABLATION_12, ATARI_26, GAME_SETS, URLB_EXPERT

COMMANDS = {name: [sys.executable, "-m", f"urlfast.{name}"] for name in ("train", "transfer", "evaluate")}
TASK_OPTION = {"atari": "--env.game", "gym": "--env.id"}  # --env.task elsewhere
LIST_KEYS, ROW_KEYS = ("seeds", "tasks", "evaluate", "rows"), ("name", "train", "transfer", "evaluate", "after", "tasks", "seeds")


@dataclass(frozen=True)
class SweepConfig:
    sweep: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE|NAME")]  # a JSON file, or the name of a ready sweep
    folder: str = ""  # where the sweep keeps its runs; sweeps/NAME where empty
    jobs: int = 1  # processes at a time, among which the processors' threads are shared out (OMP_NUM_THREADS, where it is not set)
    ray: str = ""  # runs them on a Ray cluster instead: its host:port, or local for one on this machine; the folder is shared by all
    rows: tuple[str, ...] = ()  # only these of the list, and those they follow
    tasks: tuple[str, ...] = ()  # only these of each row; those of rows that have none. Sets of games by name, as in the list
    seeds: tuple[int, ...] = ()  # instead of the list's
    train: str = ""  # options added to every training, as "--steps 20_000"
    transfer: str = ""  # likewise to every transfer
    evaluate: str = ""  # likewise to every evaluation
    dry_run: bool = False  # prints the commands, and runs none

    def __post_init__(self):
        if not 1 <= self.jobs <= 4096:
            raise ValueError(f"jobs: must lie in 1..4096, got {self.jobs}")


# Ready sweeps --------------------------------------------------------------------------------------------------------


def ablations(method: str, tasks: Sequence[str], pretraining: dict[str, str], tuning: dict[str, str]) -> dict:
    """The paper's table: `method` and each change of its pre-training, fine-tuned alike, and each change of the fine-tuning."""
    rows = []
    for name, change in {method: "", **pretraining}.items():
        before = f"{name}, pre-training"
        rows.append({"name": before, "train": f"{method.lower()} atari {change}".strip()})
        rows.append({"name": name, "transfer": "", "after": before})
    rows += [{"name": name, "transfer": change, "after": f"{method}, pre-training"} for name, change in tuning.items()]
    return {"tasks": list(tasks), "rows": rows}


def urlb() -> dict:
    """Twelve tasks on three robots, each fine-tuned after 2M steps without reward on its robot, and from scratch."""
    robots, tasks = ["walker_stand", "quadruped_walk", "jaco_reach_top_left"], list(URLB_EXPERT)
    rows = []
    for method in ("APT", "APS"):
        rows.append({"name": f"{method}, pre-training", "train": f"{method.lower()} dmc", "tasks": robots})
        rows.append({"name": method, "transfer": "", "after": f"{method}, pre-training"})
    return {"tasks": tasks, "rows": [*rows, {"name": "DDPG", "train": "ddpg dmc --steps 100_000"}]}


def atari_100k() -> dict:
    rows = []
    for method in ("APT", "APS"):
        rows.append({"name": f"{method}, pre-training", "train": f"{method.lower()} atari"})
        rows.append({"name": method, "transfer": "", "after": f"{method}, pre-training"})
    return {"tasks": list(ATARI_26), "rows": [*rows, {"name": "DrQ", "train": "drq atari"}]}


def cpt_ablations() -> dict:
    """CPT and its parts on the paper's twelve games, each after the same pre-training; and three baselines on the same learner."""
    before = "CPT, pre-training"
    rows = [{"name": before, "train": "cpt atari --preset paper"}, {"name": "CPT", "transfer": "--rule cpt", "after": before}]
    for rule in ("exploitation", "exploration", "cpt-shared-torso", "frozen-torso", "fine-tuning"):
        rows.append({"name": rule.replace("-", " "), "transfer": f"--rule {rule}", "after": before})
    rows += [
        {"name": "eps-z-greedy", "train": "cpt-task atari --preset paper"},
        {"name": "eps-greedy", "train": "cpt-task atari --preset paper --flight.by none"},
        {"name": "constant reward", "train": "cpt atari --preset paper --novelty.reward constant"},
    ]
    return {"tasks": list(ABLATION_12), "rows": rows}


READY: dict[str, dict] = {
    "apt-ablations": ablations(
        "APT",
        ATARI_26,
        {
            "random neighbour": "--reward.neighbours random",
            "fixed encoder": "--encoder-learns never",
            "without contrastive learning": "--encoder-learns q",
            "positive reward": "--reward.neighbours none",
            "without optimisation change": "--updates-per-step 1",
            "without architecture change": "--encoder.activation relu --encoder.features 0 --encoder.no-spectral-norm",
        },
        {"random head": "--rule random-head"},
    ),
    "aps-ablations": ablations(
        "APS",
        ATARI_26,
        {"entropy only": "--skill-weight 0", "skill only": "--entropy-weight 0", "without GPI": "--gpi 0"},
        {"random w": "--infer-at 1_000_000_000", "URLB's regression": "--regression urlb"},
    ),
    "urlb": urlb(),
    "atari-100k": atari_100k(),
    "cpt-ablations": cpt_ablations(),
}


# The list ------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One row on one task with one seed."""

    row: str
    task: str  # empty: the preset's own
    seed: int
    kind: str  # train | transfer | evaluate
    words: list[str]  # of its command, without the run, the task and the seed
    evaluation: list[str] | None  # options of the evaluation that follows
    folder: Path
    after: Job | None = None
    state: str = "waits"  # waits | runs | done | failed
    says: str = ""  # why it failed
    began: float = 0.0
    handle: object = None
    done: list[list[str]] = field(default_factory=list)  # commands that ended well

    @property
    def name(self) -> str:
        return ", ".join([self.row, *([self.task] if self.task else []), f"seed {self.seed}"])

    @property
    def domain(self) -> str:
        return self.after.domain if self.after else (self.words[1] if len(self.words) > 1 else "")

    @property
    def run(self) -> Path | None:
        """The folder of its run, once it has begun."""
        return self.after.run if self.kind == "evaluate" else newest_run(self.folder)

    def stages(self) -> list[list[str]]:
        """Its commands, in order: each a command's name and words, but for the run, which is known when it begins."""
        place = [] if self.kind == "evaluate" else ["--seed", str(self.seed), "--runs", str(self.folder)]
        if self.task and not (self.kind == "evaluate" and self.task == self.after.task):
            place = [TASK_OPTION.get(self.domain, "--env.task") if self.kind == "train" else "--task", self.task, *place]
        stages = [[self.kind, *self.words, *place]]
        if self.evaluation is not None:
            stages.append(["evaluate", *self.evaluation])
        return stages

    def argv(self, stage: list[str]) -> list[str]:
        """What is run: a training that has saved something goes on with that."""
        name, *words = stage
        if name == "evaluate":
            return [*COMMANDS[name], str(self.run), *words]
        if self.run is not None and saved(self.run):
            return [*COMMANDS["train"], "--resume", str(self.run)]
        return [*COMMANDS[name], *([str(self.after.run)] if name == "transfer" else []), *words]

    def read(self) -> None:
        """What of it earlier calls have done. Raises UsageError where its run is of another command, with which it would not go on."""
        stages = self.stages()
        try:
            found = read_json(self.folder / "job.json")
            made_by, done = list(map(str, found["run"])), [list(map(str, stage)) for stage in found["done"]]
        except (OSError, ValueError, KeyError, TypeError):
            made_by, done = stages[0], []  # it has not begun
        if self.kind != "evaluate" and made_by != stages[0]:
            says = f"was begun by `{shlex.join(made_by)}`, and is now to be `{shlex.join(stages[0])}`"
            raise UsageError(f"{self.folder} {says}: name another --folder, or remove that one")
        self.done = [stage for stage in done if stage in stages]
        self.state = "done" if self.next() is None else "waits"

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "job.json", {"run": self.stages()[0], "done": self.done})

    def next(self) -> list[str] | None:
        return next((stage for stage in self.stages() if stage not in self.done), None)

    def end(self, status: int) -> None:
        """Its command ended."""
        stage = self.next()
        if status == 0:
            self.done.append(stage)
            self.state = "done" if self.next() is None else "waits"
            self.write()
        else:
            self.state = "failed"
            self.says = f"{stage[0]} " + (f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}")
            if last := last_line(self.log):
                self.says += f": {last}"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def progress(self) -> str:
        """Where its run is, from its log."""
        run = self.run
        try:
            steps = read_json(run / "config.json")["config"]["steps"]
            with open(run / "metrics.jsonl", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
                step = json.loads(file.read().splitlines()[-1])["step"]
            return f"{min(step / steps, 1):.0%}"
        except (OSError, ValueError, KeyError, TypeError, IndexError, ZeroDivisionError):
            return "begins"


def last_line(log: Path) -> str:
    """What a command said last; of tyro's box, its first line."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            _, box, text = file.read().decode(errors="replace").rpartition("╭")
    except OSError:
        return ""
    lines = [line for line in (line.strip(" \t│╭╮╰╯─") for line in text.splitlines()) if line]
    return one_line(lines[min(1, len(lines) - 1) if box else -1], 300) if lines else ""


def read_list(name: str) -> tuple[str, dict]:
    """(name, list) of a file or of a ready sweep."""
    path = Path(name)
    if name in READY:
        return name, READY[name]
    if path.suffix != ".json" and not path.exists():
        raise UsageError(f"no file {name!r}, and no ready sweep of that name{nearest(name, READY)}")
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{name}: must be an object with rows")
    return slug(path.stem), found


def words(value, where: str) -> list[str]:
    """A command's options: a string, split as a shell does, or a list of strings."""
    if isinstance(value, str):
        try:
            return shlex.split(value)
        except ValueError as error:
            raise UsageError(f"{where}: {error}, got {value!r}") from None
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return value
    raise UsageError(f"{where}: must be a string, or a list of strings, got {value!r}")


def jobs_of(found: dict, options: SweepConfig, folder: Path) -> list[Job]:
    """The list, multiplied out, those that are followed before those that follow. Raises UsageError for what a list may not hold."""
    check_keys("the list", found, LIST_KEYS)
    rows = found.get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and isinstance(row.get("name"), str) for row in rows):
        raise UsageError("rows: must be a list of objects, each with a name")
    names = [row["name"] for row in rows]
    if len({slug(name) for name in names}) < len(names):
        raise UsageError("rows: two names make the same folder; they must differ in letters and digits")
    for name in options.rows:
        if name not in names:
            raise UsageError(f"--rows: no row {name!r}{nearest(name, names)}")
    options = replace(options, tasks=tuple(games_of(options.tasks)))
    jobs: dict[str, list[Job]] = {}
    for row in rows:
        jobs[row["name"]] = row_jobs(row, found, options, folder, jobs)
    needed: set[int] = set()
    for job in (job for of in jobs.values() for job in of):
        if (not options.rows or job.row in options.rows) and (not options.tasks or job.task in options.tasks):
            while job:
                needed.add(id(job))
                job = job.after
    if not needed:
        raise UsageError(f"--tasks: no row has {' or '.join(options.tasks)}")
    return [job for of in jobs.values() for job in of if id(job) in needed]


def row_jobs(row: dict, found: dict, options: SweepConfig, folder: Path, jobs: dict[str, list[Job]]) -> list[Job]:
    """Those of one row; `jobs`: of the rows above it."""
    name = row["name"]
    where = f"row {name!r}"
    check_keys(where, row, ROW_KEYS)
    kind = next((kind for kind in ("train", "transfer", "evaluate") if kind in row), None)
    if kind is None or ("train" in row and "transfer" in row):
        raise UsageError(f"{where}: must have one of train, transfer, evaluate")
    if kind == "train" and "after" in row:
        raise UsageError(f"{where}: after: a training follows no row")
    if kind != "train" and row.get("after") not in jobs:
        raise UsageError(f"{where}: after: must name a row above it, got {row.get('after')!r}{nearest(str(row.get('after')), jobs)}")
    seeds = options.seeds or row.get("seeds", found.get("seeds", [1, 2, 3]))
    tasks = row.get("tasks", found.get("tasks", []) if kind != "evaluate" else [])
    if not isinstance(seeds, list | tuple) or not all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds):
        raise UsageError(f"{where}: seeds: must be a list of whole numbers, got {seeds!r}")
    if not isinstance(tasks, list) or not all(isinstance(task, str) and task for task in tasks):
        raise UsageError(f"{where}: tasks: must be a list of names, got {tasks!r}")
    tasks = games_of(tasks)
    evaluation = row.get("evaluate", found.get("evaluate", "")) if kind != "evaluate" else None
    if evaluation is not None:
        evaluation = [*words(evaluation, f"{where}: evaluate"), *words(options.evaluate, "--evaluate")]
    mine = [*words(row[kind], f"{where}: {kind}"), *words(getattr(options, kind), f"--{kind}")]
    if kind == "train" and (len(mine) < 2 or mine[0].startswith("-") or mine[1].startswith("-")):
        raise UsageError(f"{where}: train: must begin with a method and a domain, got {row[kind]!r}")
    before = jobs.get(row.get("after"), [])
    if kind == "evaluate" and not tasks:  # each run above, on its own task
        places = [(job.task, job.seed, job) for job in before if job.seed in seeds]
    else:
        places = [(task, seed, None) for task in (tasks or list(options.tasks) or [""]) for seed in seeds]
    made = []
    for task, seed, after in places:
        if kind != "train" and after is None:
            after = followed(before, where, task, seed)
        place = folder / slug(name) / (f"{slug(task)}-s{seed}" if task else f"s{seed}")
        made.append(Job(name, task, seed, kind, mine, evaluation, place, after))
    return made


def games_of(tasks: Sequence[str]) -> list[str]:
    """The tasks, and the games of those that name a set, each once."""
    return list(dict.fromkeys(game for task in tasks for game in GAME_SETS.get(task, (task,))))


def check_keys(where: str, found: dict, known: tuple[str, ...]) -> None:
    for key in found:
        if key not in known:
            raise UsageError(f"{where}: unknown {key!r}{nearest(key, known)}")


def followed(before: list[Job], where: str, task: str, seed: int) -> Job:
    """The job that one on `task` with `seed` follows."""
    same = [job for job in before if job.seed == seed]
    for fits in (lambda job: job.task == task, lambda job: job.task and task and domain_of(job.task) == domain_of(task), lambda job: True):
        found = [job for job in same if fits(job)]
        if len(found) == 1:
            return found[0]
    has = ", ".join(dict.fromkeys(f"{job.task or 'its own task'} s{job.seed}" for job in before))
    raise UsageError(f"{where}: after: no single run there for {task or 'it'} with seed {seed}: it has {has or 'none'}")


def check(jobs: list[Job]) -> None:
    """Before the first command runs: the options of each row, and each name of a game, a task or an environment.

    Raises UsageError, or ends in tyro's words, for what a command would refuse when its turn comes.
    """
    from urlfast.envs.dmc import check_task
    from urlfast.evaluate import EvaluateConfig
    from urlfast.train import DOMAINS, PRESETS, parse, pick, refusals
    from urlfast.transfer import plan

    made: dict[str, tuple] = {}  # by each row: method, domain, preset and config
    seen = set()
    for row, same in groupby(jobs, lambda job: job.row):
        first, *others = same
        words, prog = first.stages()[0][1:], f"urlfast {first.kind} (row {row!r})"
        try:
            if first.kind == "train":
                method, domain, preset = pick(words)
                made[row] = method, domain, preset, parse(PRESETS[method, domain][preset], words, prog)
            elif first.kind == "transfer":
                method, preset, config = plan(*made[first.after.row], words, prog)
                made[row] = method, first.domain, preset, config
            else:
                made[row] = made[first.after.row]
            evaluation = words if first.kind == "evaluate" else first.evaluation or []
            evaluated = tyro.cli(EvaluateConfig, args=["RUN", *evaluation], prog=f"urlfast evaluate (row {row!r})").task
            _, domain, _, config = made[row]
            with refusals():
                names = [config.env.name, evaluated, *(job.task for job in others)]
                for name in names:
                    if name and (domain, name) not in seen:
                        seen.add((domain, name))
                        check_task(name) if domain == "dmc" else DOMAINS[domain](config.env.playing(name), num_envs=1).close()
        except UserError as error:
            raise UsageError(f"row {row!r}: {error}") from None


# Where commands run --------------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """A sweep that is killed leaves no training behind: the kernel asks its children to stop, and they save first."""
    _libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def begin(argv: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
    """In a session of its own, so that the terminal's Ctrl-C reaches the sweep alone, which passes it on."""
    with open(log, "ab") as file:
        file.write(f"$ {shlex.join(argv)}\n".encode())
        file.flush()
        options = dict(stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        return subprocess.Popen(argv, env={**os.environ, **environment}, preexec_fn=_end_with_parent, **options)


class Local:
    """Processes of this machine."""

    def __init__(self, jobs: int):
        self.slots = jobs
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        self.environment = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}

    def start(self, argv: list[str], log: Path) -> subprocess.Popen:
        return begin(argv, log, self.environment)

    def poll(self, process: subprocess.Popen) -> int | None:
        return process.poll()

    def stop(self, process: subprocess.Popen) -> None:
        process.terminate()

    def close(self) -> None:
        pass


class Ray:
    """Tasks of a Ray cluster, whose machines see the sweep's folder under the same path."""

    def __init__(self, address: str, jobs: int):
        from urlfast.actors import connect

        self._ray, self.slots = connect("--ray", address), jobs
        self._execute = self._ray.remote(max_retries=0, num_cpus=1)(execute)
        self.environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}

    def start(self, argv: list[str], log: Path):
        return self._execute.remote(argv, str(log), os.getcwd(), self.environment)

    def poll(self, task) -> int | None:
        ready, _ = self._ray.wait([task], timeout=0)
        if not ready:
            return None
        try:
            return self._ray.get(task)
        except self._ray.exceptions.TaskCancelledError:
            return 128 + signal.SIGTERM
        except self._ray.exceptions.RayError:  # the machine or its worker is gone
            return -signal.SIGKILL

    def stop(self, task) -> None:
        self._ray.cancel(task)

    def close(self) -> None:
        self._ray.shutdown()


def execute(argv: list[str], log: str, folder: str, environment: dict[str, str]) -> int:
    """On a machine of the cluster: the command, to its end, or asked to stop where the task is cancelled."""
    os.chdir(folder)
    process = begin(argv, Path(log), environment)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        return process.wait()


# The sweep -----------------------------------------------------------------------------------------------------------


class Table:
    """One line a row; live on a terminal, else a line for each command that begins or ends."""

    def __init__(self, jobs: list[Job], stream=None):
        self.jobs, self._stream, self._live, self._at = jobs, stream or sys.stdout, None, 0.0

    def __enter__(self):
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self._stream), auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_):
        if self._live:
            self.show(force=True)
            self._live.stop()

    def say(self, text: str) -> None:
        (self._live.console.print(text, markup=False, highlight=False) if self._live else print(text, file=self._stream, flush=True))

    def show(self, force: bool = False) -> None:
        if not self._live or (not force and time.monotonic() < self._at + 1):
            return
        from rich.table import Table as Grid

        self._at = time.monotonic()
        grid = Grid("row", "done", "failed", "running", box=None, pad_edge=False)
        for row in dict.fromkeys(job.row for job in self.jobs):
            of = [job for job in self.jobs if job.row == row]
            running = [f"{job.task or 's'}{'-s' if job.task else ''}{job.seed} {job.progress()}" for job in of if job.state == "runs"]
            failed = sum(job.state == "failed" for job in of)
            grid.add_row(row, f"{sum(job.state == 'done' for job in of)} of {len(of)}", str(failed or ""), ", ".join(running))
        self._live.update(grid, refresh=True)


def run_jobs(jobs: list[Job], place, stopped: Callable[[], bool], table: Table) -> None:
    """Every job that can, to its end. `stopped`: asks those that run to save and end, and begins no other."""
    asked = False
    while True:
        for job in jobs:
            if job.state == "runs":
                stage, status = job.next(), place.poll(job.handle)
                if status and asked:
                    job.state = "waits"  # for the next call
                elif status is not None:
                    job.end(status)
                    took = human_time(time.monotonic() - job.began)
                    table.say(f"{job.name}: {stage[0]} done in {took}" if status == 0 else f"{job.name}: {job.says}")
            if job.state == "waits" and job.after and job.after.state == "failed":
                job.state, job.says = "failed", f"follows {job.after.name}, which failed"
        if stopped() and not asked:
            asked = True
            for job in jobs:
                if job.state == "runs":
                    place.stop(job.handle)
        for job in jobs if not asked else ():
            free = sum(other.state == "runs" for other in jobs) < place.slots
            if free and job.state == "waits" and (job.after is None or job.after.state == "done") and not evaluated_now(job, jobs):
                stage = job.next()
                job.write()
                job.handle, job.state, job.began = place.start(job.argv(stage), job.log), "runs", time.monotonic()
                table.say(f"{job.name}: {stage[0]} begins, {job.log}")
        table.show()
        if not any(job.state == "runs" for job in jobs):
            break
        time.sleep(0.1)


def evaluated_now(job: Job, jobs: list[Job]) -> bool:
    """Whether another job evaluates the run that this one is to evaluate: one process may at a time."""
    return job.next()[0] == "evaluate" and any(
        other.state == "runs" and other.next()[0] == "evaluate" and other.run == job.run for other in jobs
    )


class Stop:
    """Ctrl-C or SIGTERM, noted; a second one is not waited for."""

    number = 0

    def __enter__(self):
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        self.number = number
        print(f"\n{signal.Signals(number).name}: what runs saves a checkpoint; once more to leave at once", file=sys.stderr, flush=True)
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def sweep(options: SweepConfig) -> int:
    """Runs a list; 0 where all of it is done, 1 where something failed, 128 + the signal that stopped it."""
    name, found = read_list(options.sweep)
    folder = Path(options.folder or Path("sweeps") / name)
    jobs = jobs_of(found, options, folder)
    check(jobs)
    if options.dry_run:
        for job in jobs:
            for stage in job.stages():
                after = [f"<{job.after.name}>"] if stage[0] == "transfer" else [f"<{job.name}>"] if stage[0] == "evaluate" else []
                print(shlex.join(["urlfast", stage[0], *after, *stage[1:]]))
        return 0
    check_writable(folder)
    with Run(folder).locked(), Stop() as stop:
        for job in jobs:
            job.read()
        write_json(folder / "sweep.json", found)
        finished = sum(job.state == "done" for job in jobs)
        print(f"{folder}: {len(jobs)} jobs" + (f", {finished} of them done before" if finished else ""), flush=True)
        if finished < len(jobs):
            with closing(Ray(options.ray, options.jobs) if options.ray else Local(options.jobs)) as place, Table(jobs) as table:
                run_jobs(jobs, place, lambda: stop.number, table)
    if stop.number:
        print(f"stopped, and saved. The same command goes on: {sum(job.state == 'done' for job in jobs)} of {len(jobs)} are done")
        return 128 + stop.number
    failed = [job for job in jobs if job.state == "failed"]
    for job in failed:
        print(f"failed: {job.name}: {job.says}" + (f" ({job.log})" if job.log.exists() else ""))
    if runs_of(folder):
        write_report(folder)
    if failed:
        print(f"{len(failed)} of {len(jobs)} failed; the same command tries them again, and goes on with what they saved")
    return 1 if failed else 0


def write_report(folder: Path) -> None:
    from urlfast.report import report

    try:
        print(report([folder], folder / "report.html"))
    except UserError as error:
        print(f"no report: {one_line(error)}", file=sys.stderr)


def run_sweep(argv: list[str]) -> int:
    description = f"Trains, fine-tunes and evaluates a list of rows on tasks with seeds. Ready ones: {', '.join(READY)}."
    return sweep(tyro.cli(SweepConfig, args=joined(argv), prog="urlfast sweep", description=description))


def joined(argv: list[str]) -> list[str]:
    """`--train "--steps 5"` as `--train=--steps 5`: what begins with dashes would not be taken for a value."""
    out: list[str] = []
    for word in argv:
        if out and out[-1] in ("--train", "--transfer", "--evaluate"):
            out[-1] += f"={word}"
        else:
            out.append(word)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """`urlfast sweep`."""
    command("sweep", run_sweep, argv)


if __name__ == "__main__":
    main()
