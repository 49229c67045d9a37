"""`urlfast train METHOD DOMAIN`: the one loop. Act, step, store, update, log, checkpoint.

To add a method or a domain, import it and give it a line in METHODS or DOMAINS, and its presets in PRESETS.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from shutil import disk_usage
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from urlfast.checkpoint import Checkpoint, Checkpoints, read_latest
from urlfast.device import keep_freed_memory
from urlfast.envs.atari import AtariConfig, make_atari
from urlfast.envs.dmc import DMCConfig, make_dmc
from urlfast.envs.dmc_tasks import domain_of
from urlfast.envs.gym import GymConfig, make_gym
from urlfast.envs.rendering import NoRenderer
from urlfast.info import hardware
from urlfast.learners.drq import DrQConfig
from urlfast.methods import stored_rows
from urlfast.methods.aps import APS, APSConfig, APSTask, APSTaskConfig
from urlfast.methods.apt import APT, APTConfig
from urlfast.methods.cpt import CPTTask, CPTTaskConfig
from urlfast.methods.ngu import NGU, NGUConfig
from urlfast.methods.recurrent import RecurrentConfig, RecurrentTask
from urlfast.methods.task import Task, TaskConfig
from urlfast.run import (
    Metrics,
    Progress,
    Run,
    UsageError,
    UserError,
    check_writable,
    command,
    flat,
    from_dict,
    human_bytes,
    human_time,
    nearest,
    unsaid,
    write_json,
)


@dataclass(frozen=True)
class TrainConfig:
    method: Annotated[Any, tyro.conf.arg(name="")]
    env: Any
    steps: int = 2_000_000  # agent steps, over all environments, whose last step together may take it past; frames = steps x frame skip
    seed: int = 1  # of the weights, the exploration, the replay's samples and the environments
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where it is usable
    log_every: int = 500  # steps between two lines of metrics.jsonl
    checkpoint_every: int = 5_000  # steps between two checkpoints
    keep: int = 3  # newest checkpoints that stay
    runs: str = "runs"  # folder in which the run makes its own
    actors: int = 0  # processes of a Ray cluster that act, with env.num_envs environments each; 0: this process does
    ray_address: str = "local"  # of that cluster: host:port, or local for one on this machine alone

    def __post_init__(self):
        for name, least in dict(steps=1, seed=0, log_every=1, checkpoint_every=1, keep=1, actors=0).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, got {getattr(self, name)}")
            if getattr(self, name) >= 2**63:
                raise ValueError(f"{name}: must be less than 2^63, got {getattr(self, name)}")


METHODS = {"apt": APT, "aps": APS, "ngu": NGU, "cpt": NGU}
METHODS |= {"drq": Task, "drq-sac": Task, "ddpg": Task, "r2d2": RecurrentTask, "aps-task": APSTask, "cpt-task": CPTTask}  # on a reward
DOMAINS = {"atari": make_atari, "dmc": make_dmc, "gym": make_gym}
FULL = AtariConfig(full_action_set=True, life_loss_terminal=False)  # R2D2's protocol
WALKER, PIXELS = DMCConfig(task="walker_walk", num_envs=1), DMCConfig(observation="pixels")
PRESETS = {  # the first of a pair is its default
    ("apt", "atari"): {
        "paper": TrainConfig(APTConfig(), AtariConfig(), steps=250_000_000),
        "mini_apt": TrainConfig(APTConfig.mini_apt(), AtariConfig(), steps=100_000_000),
    },
    ("apt", "dmc"): {
        "urlb": TrainConfig(APTConfig.urlb(), DMCConfig(), steps=2_000_000),
        "paper": TrainConfig(APTConfig.dmc(), PIXELS, steps=5_000_000),
    },
    ("aps", "atari"): {"paper": TrainConfig(APSConfig(), AtariConfig(), steps=200_000_000)},
    ("aps", "dmc"): {"urlb": TrainConfig(APSConfig.urlb(), DMCConfig(), steps=2_000_000)},
    ("ngu", "atari"): {
        "small": TrainConfig(NGUConfig().small(), replace(FULL, num_envs=16), steps=5_000_000),
        "paper": TrainConfig(NGUConfig(), replace(FULL, num_envs=256), steps=8_750_000_000),
    },
    ("cpt", "atari"): {  # its first stage; the second is a transfer
        "small": TrainConfig(NGUConfig.cpt().small(), replace(FULL, num_envs=16), steps=5_000_000),
        "paper": TrainConfig(NGUConfig.cpt(), replace(FULL, num_envs=256), steps=4_000_000_000),
    },
    ("drq", "atari"): {"paper": TrainConfig(TaskConfig(), AtariConfig(num_envs=1), steps=100_000)},
    ("drq-sac", "dmc"): {"paper": TrainConfig(TaskConfig.sac(), replace(PIXELS, task="walker_walk", num_envs=1), steps=250_000)},
    ("ddpg", "dmc"): {"urlb": TrainConfig(TaskConfig.ddpg(), WALKER, steps=2_000_000)},
    ("r2d2", "atari"): {  # the paper's has 256 actors and 29 GB of rows
        "small": TrainConfig(RecurrentConfig.small(), replace(FULL, num_envs=16), steps=5_000_000),
        "paper": TrainConfig(RecurrentConfig(), replace(FULL, num_envs=256), steps=2_500_000_000),
    },
    # What `urlfast transfer` makes of a run by CPT's rules; from scratch, eps-z-greedy exploration.
    ("cpt-task", "atari"): {
        "small": TrainConfig(CPTTaskConfig.small(), replace(FULL, num_envs=16), steps=5_000_000),
        "paper": TrainConfig(CPTTaskConfig(), replace(FULL, num_envs=256), steps=1_250_000_000),
    },
    # What `urlfast transfer` makes of an APS run; from scratch, phi is random.
    ("aps-task", "atari"): {"paper": TrainConfig(APSTaskConfig.on(TaskConfig()), AtariConfig(num_envs=1), steps=100_000)},
    ("aps-task", "dmc"): {"urlb": TrainConfig(APSTaskConfig.on(TaskConfig.ddpg()), WALKER, steps=100_000)},
}
NUMBERED = DrQConfig(tau=0.01, epsilon=0.01, epsilon_decay=0)
for method, configs in {  # of any environment of gymnasium: which one is the default follows from what it shows and takes
    "apt": {
        "discrete": replace(APTConfig.urlb(), learner=NUMBERED),
        "discrete-pixels": APTConfig(),
        "continuous": APTConfig.urlb(),
        "continuous-pixels": APTConfig.dmc(),
    },
    "aps": {
        "discrete": APSConfig(),
        "discrete-pixels": APSConfig(),
        "continuous": APSConfig.urlb(),
        "continuous-pixels": APSConfig.urlb(),
    },
    "ngu": dict.fromkeys(("discrete", "discrete-pixels"), NGUConfig.toy()),
    "cpt": dict.fromkeys(("discrete", "discrete-pixels"), NGUConfig.toy()),
    "drq": dict.fromkeys(("discrete", "discrete-pixels"), replace(TaskConfig(), reward_clip=None)),
    "drq-sac": dict.fromkeys(("continuous", "continuous-pixels"), TaskConfig.sac()),
    "ddpg": dict.fromkeys(("continuous", "continuous-pixels"), TaskConfig.ddpg()),
    "r2d2": dict.fromkeys(("discrete", "discrete-pixels"), RecurrentConfig.toy()),
    "cpt-task": dict.fromkeys(("discrete", "discrete-pixels"), CPTTaskConfig.toy()),
    "aps-task": {
        kind: APSTaskConfig.on(replace(TaskConfig(), reward_clip=None) if kind.startswith("discrete") else TaskConfig.ddpg())
        for kind in ("discrete", "discrete-pixels", "continuous", "continuous-pixels")
    },
}.items():
    PRESETS[method, "gym"] = {kind: TrainConfig(config, GymConfig(id=""), steps=100_000) for kind, config in configs.items()}


# The loop ------------------------------------------------------------------------------------------------------------


@dataclass
class Counters:
    """Where a run is. What it owes follows from these, so a resumed run owes the same."""

    steps: int = 0  # actions taken, over all environments
    updates: int = 0
    episodes: int = 0  # finished
    seconds: float = 0.0  # spent here, over all resumes

    @staticmethod
    def of(checkpoint: Checkpoint) -> Counters:
        """Those that were saved; raises ValueError where they are none."""
        saved = {name: checkpoint.state[name] for name in asdict(Counters())}
        if not all(0 <= value < 2**53 for value in saved.values()) or saved["steps"] != checkpoint.step:
            raise ValueError(f"no counters of step {checkpoint.step:,}: {saved}")
        return Counters(**saved)


def train(run: Run, config: TrainConfig, method, env, replay, counters: Counters, checkpoints: Checkpoints) -> str | None:
    """Trains until `config.steps` or a signal, whose name is returned. Either way the last thing it writes is a checkpoint."""
    keep_freed_memory()
    began, window = time.monotonic() - counters.seconds, Window(counters)
    with Stop() as stop, Metrics(run.folder, counters.steps) as metrics, Progress(config.steps, method.config.learning_start) as progress:

        def log():
            counters.seconds = time.monotonic() - began
            if counters.steps > window.begin:  # not where an interrupt came while every environment was reset
                line = window.close(counters, env.action_repeat) | source.line()
                metrics.log(line)
                progress.log(line)

        def save():
            metrics.sync()
            if counters.steps != checkpoints.step:
                checkpoints.save(counters.steps, {**vars(counters), "method": method.state_dict(), "rng": torch.get_rng_state()}, replay)

        def pay():
            for _ in range(updates_owed(counters, method.config)):
                window.add(method.update(replay))
                counters.updates += 1

        if checkpoints.step is None:
            save()  # before the first step, so that a run can always be resumed
        source = env if config.actors else Here(env, config.seed)
        source.begin(method, replay, counters)
        last = counters.steps >= config.steps
        while not last:
            before = counters.steps
            steps, scores, lengths = source.advance(pay)
            counters.steps += steps
            counters.episodes += len(scores)
            window.add_episodes(scores, lengths)

            if counters.steps >= config.steps:
                pay()  # what the last steps owe
            last = counters.steps >= config.steps or stop.signal is not None
            save_due = last or counters.steps // config.checkpoint_every > before // config.checkpoint_every
            if save_due or counters.steps // config.log_every > before // config.log_every:
                log()  # a checkpoint begins a new line, so that no average runs across it
            if save_due:
                save()
            progress.tick(counters.steps)
    return stop.signal


class Here:
    """Environments of this process, which step in threads of their own while the learner updates."""

    def __init__(self, env, seed: int):
        self.env, self.seed = env, seed

    def begin(self, method, replay, counters: Counters) -> None:
        """Running episodes begin anew after a resume, from a seed of their own: the run's would repeat its first episodes."""
        self.method, self.replay = method, replay
        self.step = self.env.reset(int(np.random.SeedSequence([self.seed, counters.steps]).generate_state(1)[0] >> 1))

    def advance(self, pay: Callable[[], None]) -> tuple[int, list[float], list[int]]:
        """One step of each goes into the replay: (steps taken, scores and lengths of the episodes that ended)."""
        step, action = self.step, self.method.act(self.step)
        self.env.send(action)
        pay()
        after = self.step = self.env.recv()
        self.replay.add(stored_rows(self.method, self.env, step, action, after))
        taken = int(np.count_nonzero(~step.is_last))  # nothing leaves a last observation
        return taken, after.score[after.is_last].tolist(), after.length[after.is_last].tolist()

    def line(self) -> dict:
        """What metrics.jsonl hears of the environments."""
        errors = getattr(self.env, "physics_errors", 0)
        return {"physics_errors": errors} if errors else {}


def updates_owed(counters: Counters, config) -> int:
    """`updates_per_step` for each step after `learning_start`: a fraction waits until it is whole, and the steps before owe nothing."""
    return int(config.updates_per_step * max(0, counters.steps - config.learning_start)) - counters.updates


class Window:
    """What the next line of metrics.jsonl averages. Sums stay on the device: only the line waits for it."""

    def __init__(self, counters: Counters):
        self._empty(counters)

    def _empty(self, counters: Counters) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._scores: list[float] = []
        self._lengths: list[int] = []
        self.begin, self._time = counters.steps, time.monotonic()

    def add(self, metrics: dict) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def add_episodes(self, scores: list[float], lengths: list[int]) -> None:
        self._scores += scores
        self._lengths += lengths

    def rate(self, counters: Counters) -> float:
        return (counters.steps - self.begin) / max(time.monotonic() - self._time, 1e-9)

    def close(self, counters: Counters, action_repeat: int) -> dict:
        """The line, and a new window."""
        line = {
            "step": counters.steps,
            "frames": counters.steps * action_repeat,
            "updates": counters.updates,
            "episodes": counters.episodes,
            "seconds": round(counters.seconds, 3),
            "steps_per_second": round(self.rate(counters), 3),
        }
        if self._scores:
            line |= {"score": sum(self._scores) / len(self._scores), "episode_length": sum(self._lengths) / len(self._lengths)}
        for name, total in self._sums.items():
            mean = total / self._counts[name]
            line[name] = mean.tolist() if hasattr(mean, "tolist") else mean
        self._empty(counters)
        return line


class Stop:
    """Ctrl-C or SIGTERM, noted for the loop to see between two steps; a second one is not waited for."""

    signal: str | None = None

    def __enter__(self):
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        self.signal = signal.Signals(number).name
        # Before it is said, for who reads it may press again at once; and whatever was there: a shell's background job ignores SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print(f"\n{self.signal}: saving a checkpoint; once more to leave without it", file=sys.stderr, flush=True)

    def _restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *_):
        self._restore()


# What a run is made of -----------------------------------------------------------------------------------------------


def chosen_device(name: str) -> torch.device:
    """Raises UserError for a device that is not there."""
    usable = torch.cuda.is_available()
    if name == "cuda" and not usable:
        raise UserError("--device cuda: torch finds no usable GPU; `urlfast info` says why")
    return torch.device("cuda" if usable and name != "cpu" else "cpu")


def make(method: str, domain: str, config: TrainConfig):
    """(method, environment) of a config. What their own checks refuse is the user's to mend: UserError."""
    if config.actors and not hasattr(METHODS[method], "initial_errors"):
        able = ", ".join(name for name, kind in METHODS.items() if hasattr(kind, "initial_errors"))
        raise UsageError(f"--actors: {method} acts in this process alone; these methods act on many machines: {able}")
    with refusals():
        env = DOMAINS[domain](config.env, seed=config.seed, num_envs=1 if config.actors else None)
        if config.actors:
            from urlfast.actors import Actors

            env = Actors(method, config, env, DOMAINS[domain], make_method)
        sequences = getattr(config.method, "sequence_length", None)
        first = env.num_envs * (sequences or getattr(config.method, "n_step", 1) + 1)  # steps until every environment has a whole window
        if config.method.learning_start < first:
            env.close()
            of = f"sequences of {sequences}" if sequences else "windows of n_step"
            raise ValueError(f"learning_start: must be at least {first}, the first {of} steps, got {config.method.learning_start}")
        return make_method(method, config, env), env


def make_method(method: str, config: TrainConfig, env):
    given = dict(device=chosen_device(config.device), seed=config.seed, frame_stack=env.frame_stack)
    if method == "cpt-task":  # which follows another method, as a run has trained it

        def make_policy(run: dict):
            name, _, before = load(run)
            return make_method(name, replace(before, device=config.device), env)

        given["make_policy"] = make_policy
    return METHODS[method](config.method, env.observation_shape, env.actions, **given)


@contextmanager
def refusals():
    """ValueErrors of what is built from the command line name an option's value: one line, not a traceback."""
    try:
        yield
    except (NoRenderer, MemoryError, FileNotFoundError) as error:  # what this machine lacks
        raise UserError(str(error)) from error
    except (ValueError, OverflowError) as error:
        raise UsageError(str(error)) from error


def check_fits(domain: str, before, after, env, instead: str) -> None:
    """Raises UsageError where what was learned in the worlds of the config `before` does not fit `env`, which was made of `after`: another
    domain of DMControl, other observations or, unless `instead` is empty, other actions; `instead` says what to do then.
    """
    if domain == "dmc" and domain_of(before.name) != domain_of(after.name):  # whose shapes may agree, as those of all pictures do
        raise UsageError(f"{after.name} is no task of {domain_of(before.name)}, which is all that the run knows")
    with refusals(), closing(DOMAINS[domain](before, num_envs=1)) as own:
        seen, actions = own.observation_shape, own.actions
    if env.observation_shape != seen:
        raise UsageError(f"{after.name} shows observations of shape {env.observation_shape}, and the run knows {before.name}'s {seen}")
    if instead and env.actions != actions:
        raise UsageError(f"{after.name} has {env.actions} actions, the run's {before.name} {actions}: {instead}")


def start(method: str, domain: str, preset: str, config: TrainConfig, *, name: str = "", prepare=lambda agent: None, **noted) -> int:
    """A new run. `name` begins its folder's; `prepare` is done to its method before anything else; `noted` goes into config.json."""
    with refusals():
        config = replace(config, env=config.env.playing(config.env.name))
    agent, env = make(method, domain, config)
    with closing(env):
        with refusals():
            prepare(agent)
            prepare(trial := make_method(method, config, env))  # thrown away, so that what the run itself uses is as new
            replay = agent.make_replay(env.num_envs, config.steps)
        check_writable(config.runs)
        seconds = seconds_per_update(trial, env)
        noted["hardware"] = f"{chosen_device(config.device).type}: {hardware()}"
        saved = {"method": method, "domain": domain, "preset": preset, "config": asdict(config), **noted}
        world = re.sub(r"[^\w.-]+", "_", config.env.name)
        run = Run.create(config.runs, f"{name or f'{method}-{domain}'}-{world}-s{config.seed}", saved)
        with run.locked():
            print(cost(run, config, agent, trial, env, replay, seconds), flush=True)
            counters = Counters()
            stopped = train(run, config, agent, env, replay, counters, Checkpoints(run.folder, config.keep))
    return farewell(run, config, counters, stopped)


def resume(name: str, argv: list[str]) -> int:
    """Goes on from a run's last checkpoint as if it had been reached just now."""
    run = Run.find(name)
    with run.locked():
        saved = run.config
        method, domain, config = load(saved)
        if argv and not argv[0].startswith("-"):
            if argv[:2] != [method, domain]:
                raise UsageError(f"{run.folder} is a run of {method} {domain}, not of {' '.join(argv[:2])}")
            argv = argv[2:]
        if config.actors and config.ray_address != "local" and not any(re.match("--ray[-_]address", word) for word in argv):
            raise UsageError(  # what a cluster sends is trusted, what lies in a run's folder is not
                f"--ray-address: {run.folder} acts on the machines of a cluster, last at {config.ray_address}; say where now, or local"
            )
        config = resumed(config, parse(config, argv, f"urlfast train --resume {name}"))
        chosen_device(config.device)
        checkpoint = read_latest(run.folder, replay=True)
        agent, env = make(method, domain, config)
        with closing(env):
            with checkpoint.fitting():
                counters = Counters.of(checkpoint)
                agent.load_state_dict(checkpoint.state["method"])
                torch.set_rng_state(checkpoint.state["rng"])
            replay = checkpoint.load_replay()
            with checkpoint.fitting("replay.json"):
                check_replay(replay, agent, env.num_envs)
            write_json(run.folder / "config.json", {**saved, "config": asdict(config)})
            print(
                f"{run.folder}: on from step {counters.steps:,} of {config.steps:,}, "
                f"with {counters.updates:,} updates done and {len(replay):,} rows in the replay",
                flush=True,
            )
            checkpoints = Checkpoints(run.folder, config.keep, checkpoint)
            stopped = train(run, config, agent, env, replay, counters, checkpoints)
    return farewell(run, config, counters, stopped)


def check_replay(replay, agent, num_envs: int) -> None:
    """Raises ValueError where a saved replay holds other rows than the method's, or those of other environments."""
    like = agent.make_replay(num_envs, 1)
    for name, has, wanted in (("streams", replay.num_streams, num_envs), ("batches", replay.layout(1), like.layout(1))):
        if has != wanted:
            raise ValueError(f"{name}: must be {wanted}, got {has}")


# What a resume may change, for it decides nothing that is learned.
RESUMABLE = ("keep", "checkpoint-every", "log-every", "device", "ray-address")


def resumed(config: TrainConfig, wanted: TrainConfig) -> TrainConfig:
    """A resumed run keeps its options, but for RESUMABLE; and `steps` may be raised."""
    before, after = flat(config), flat(wanted)
    for option in before:
        if option not in ("steps", *RESUMABLE) and before[option] != after[option]:
            may = ", ".join(f"--{name}" for name in RESUMABLE)
            raise UsageError(
                f"--{option}: the run has {before[option]} and keeps its options; only {may} may change, and --steps be raised"
            )
    if wanted.steps < config.steps:
        raise UsageError(f"--steps: may only be raised, from {config.steps:,}; got {wanted.steps:,}")
    return wanted


def load(saved: dict) -> tuple[str, str, TrainConfig]:
    """(method, domain, config) of a run's config.json. What that does not name, an older one, is as today's preset has it, and is said."""
    method, domain = saved["method"], saved["domain"]
    if (method, domain) not in PRESETS:
        raise UserError(f"config.json: this urlfast has no {method!r} on {domain!r}")
    presets = PRESETS[method, domain]
    default = presets.get(saved.get("preset"), next(iter(presets.values())))  # they differ in what they are made of
    config = from_dict(default, saved["config"])
    if new := unsaid(config, saved["config"]):
        options = " ".join(f"--{name} {value}" for name, value in new.items())
        print(f"config.json is an older urlfast's, without these options: taken as by default are {options}", file=sys.stderr, flush=True)
    return method, domain, config


def farewell(run: Run, config: TrainConfig, counters: Counters, stopped: str | None) -> int:
    if stopped:
        where = f" --ray-address {config.ray_address}" if config.actors and config.ray_address != "local" else ""
        print(f"stopped, and saved at step {counters.steps:,}. Go on with: urlfast train --resume {run.folder}{where}")
        return 128 + signal.Signals[stopped]
    print(f"done. Next: urlfast evaluate {run.folder}, urlfast report {run.folder}")
    return 0


# What it will take ---------------------------------------------------------------------------------------------------


def seconds_per_update(agent, env) -> float:
    """Measured here, on noise; the method has then learned it."""
    rows_needed = max(512, 2 * getattr(agent.config, "sequence_length", 0))
    replay = agent.make_replay(1, rows_needed)
    random, pixels = np.random.default_rng(0), len(env.frame_shape) == 3
    action = np.zeros(1, np.int64) if isinstance(env.actions, int) else np.zeros((1, *env.actions), np.float32)
    for row in range(rows_needed):
        shape = (1, *env.frame_shape)
        frame = random.integers(0, 256, shape, np.uint8) if pixels else random.standard_normal(shape, np.float32)
        rows = {"observation": frame, "action": action, "reward": np.zeros(1, np.float32), "is_first": np.array([row == 0])}
        rows |= dict.fromkeys(("terminated", "is_last"), np.zeros(1, bool))
        agent.observe(rows)
        replay.add(rows)
    warm_up, timed = (5, 5) if torch.cuda.is_available() else (1, 3)  # a GPU captures the update first
    for _ in range(warm_up):
        metrics = agent.update(replay)
    [value.sum().item() for value in metrics.values()]  # waits for the device
    began = time.perf_counter()
    for _ in range(timed):
        metrics = agent.update(replay)
    [value.sum().item() for value in metrics.values()]
    return (time.perf_counter() - began) / timed


def tensor_bytes(state) -> int:
    """Of all tensors in a nest of dicts and lists."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    return sum(map(tensor_bytes, state.values() if isinstance(state, dict) else state)) if isinstance(state, dict | list) else 0


def counted(n: int, what: str) -> str:
    return f"{n:,} {what}" + "s" * (n != 1)


def cost(run: Run, config: TrainConfig, agent, trial, env, replay, seconds: float) -> str:
    """What the run will take, said before it begins. trial: such an agent that has made updates, whose optimisers are therefore whole."""
    updates = int(agent.config.updates_per_step * max(0, config.steps - agent.config.learning_start))
    row = replay.bytes / replay.capacity
    rows = min(replay.capacity, config.steps)
    on_disk = min(rows + config.keep * config.checkpoint_every, config.steps) * row  # older checkpoints keep rows that the ring has lost
    on_disk += (config.keep + 1) * tensor_bytes(trial.state_dict())  # the one being written is beside those that are kept
    free = disk_usage(run.folder).free
    device = chosen_device(config.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {counted(torch.get_num_threads(), 'thread')}"
    lines = [
        f"{run.folder}",
        f"  steps   {config.steps:,}, {config.steps * env.action_repeat:,} frames; {counted(env.num_envs, 'environment')}, {where}",
        f"  memory  {human_bytes(rows * row)} for the replay's {rows:,} rows, as it fills",
        f"  disk    {human_bytes(on_disk)} for the replay and {counted(config.keep, 'checkpoint')}; {human_bytes(free)} free",
        f"  time    about {human_time(updates * seconds)}: {updates:,} updates of {1000 * seconds:,.0f} ms, as measured here",
    ]
    if updates == 0:
        lines.append(f"  Nothing will be learned: updates begin after {agent.config.learning_start:,} steps (--learning-start).")
    if on_disk > free:
        lines.append("  The disk will not hold this run: see --keep, --replay-capacity and --runs.")
    if updates * seconds > 7 * 86400:
        lines.append("  That is the paper's length. A first look: --steps 20_000; Ctrl-C saves, and --resume goes on.")
    return "\n".join(lines)


# The command line ----------------------------------------------------------------------------------------------------

USAGE = """usage: urlfast train METHOD DOMAIN [--preset NAME] [options]
       urlfast train --resume RUN [--steps N] [--device D] [--keep N] [--checkpoint-every N] [--log-every N] [--ray-address A]

{pairs}

`urlfast train METHOD DOMAIN --help` lists every option with its default. On gym --env.id is needed, as --env.id CartPole-v1.
RUN is a run's folder, or its name under runs/."""


def parse(default: TrainConfig, argv: Sequence[str], prog: str, description: str = "") -> TrainConfig:
    with usage():
        return tyro.cli(TrainConfig, default=default, args=argv, prog=prog, description=description)


@contextmanager
def usage():
    """What the checks of a flattened config refuse, which tyro lets through as it is: "batch_size: must ..." of its options."""
    try:
        yield
    except ValueError as error:
        name, colon, says = str(error).partition(":")
        raise UsageError(f"--{name.replace('_', '-')}{colon}{says}") from None


def take(argv: list[str], option: str) -> str | None:
    """Removes `option VALUE` or `option=VALUE` from argv and returns the value, the last one where there are several, as tyro does."""
    found, index = None, 0
    while index < len(argv):
        name, equals, value = argv[index].partition("=")
        if name != option:
            index += 1
            continue
        if not equals and index + 1 == len(argv):
            raise UsageError(f"{option}: needs a value")
        found = value if equals else argv[index + 1]
        del argv[index : index + (1 if equals else 2)]
    return found


def pick(argv: list[str]) -> tuple[str, str, str]:
    """Takes method, domain and preset off argv; an unknown name is answered with the nearest."""
    if len(argv) < 1 or argv[0].startswith("-"):
        raise UsageError("which method, on which domain? " + ", ".join(" ".join(pair) for pair in PRESETS))
    method = argv.pop(0)
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}{nearest(method, METHODS)}")
    domains = [domain for name, domain in PRESETS if name == method]
    if not argv or argv[0].startswith("-"):
        raise UsageError(f"{method} on which domain? (known: {', '.join(domains)})")
    domain = argv.pop(0)
    if domain not in domains:
        raise UsageError(f"unknown domain {domain!r} for {method}{nearest(domain, domains)}")
    presets = PRESETS[method, domain]
    preset, id = take(argv, "--preset"), take(list(argv), "--env.id")
    if domain == "gym" and not id and not {"-h", "--help"} & set(argv):
        raise UsageError(f"--env.id: which environment? as in `urlfast train {method} gym --env.id CartPole-v1`, or mypackage.worlds:make")
    if preset is None:
        preset = fitting(method, presets, id) if domain == "gym" and id else next(iter(presets))
    if preset not in presets:
        raise UsageError(f"--preset: unknown {preset!r}{nearest(preset, presets)}")
    return method, domain, preset


def fitting(method: str, presets: dict[str, TrainConfig], id: str) -> str:
    """The preset for what the environment of that id shows and takes; UsageError where the method has none."""
    with refusals(), closing(make_gym(GymConfig(id=id), num_envs=1)) as env:
        kind = ("discrete" if isinstance(env.actions, int) else "continuous") + ("-pixels" if len(env.frame_shape) == 3 else "")
    if kind not in presets:
        others = ", ".join(name for name in METHODS if (name, "gym") in PRESETS and kind in PRESETS[name, "gym"])
        raise UsageError(f"{method} takes no {kind.partition('-')[0]} actions, which {id} has; these methods do: {others}")
    return kind


def run_train(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        pairs = [f"  {method:10}{domain:7} --preset {' | '.join(presets)}" for (method, domain), presets in PRESETS.items()]
        print(USAGE.format(pairs="\n".join(pairs)))
        return 0
    run = take(argv, "--resume")
    if run is not None:
        return resume(run, argv)
    method, domain, preset = pick(argv)
    default = PRESETS[method, domain][preset]
    others = ", ".join(PRESETS[method, domain])
    description = (
        f"Preset {preset!r}, whose values are the defaults below: another one with --preset NAME ({others}).\n"
        "--resume RUN goes on with a run, and takes no other method or option than it has.\n"
        "[In brackets]: the paper or the released code that a value is from; 'ours' where none decides it."
    )
    return start(method, domain, preset, parse(default, argv, f"urlfast train {method} {domain}", description))


def main(argv: Sequence[str] | None = None) -> None:
    """`urlfast train`."""
    command("train", run_train, argv)


if __name__ == "__main__":
    main()
