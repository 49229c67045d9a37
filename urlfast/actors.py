"""Acting on many machines: actors of a Ray cluster play with copies of the policy, and one learner learns from what they send.

The roles are Ape-X's (Horgan et al. 2018), the sequences and their first priorities R2D2's (Kapturowski et al. 2019): computed by the actor
from the Q values that it acted with.

    learner: train.py's loop, the replay                    actor i of N: one CPU, E environments, streams i E .. (i + 1) E - 1
    puts the policy into the object store, now and then     loads it, where it is newer than its own
    calls `collect`, AHEAD times before an answer     -->   plays `period` steps of each environment
    adds the rows to the replay, pays updates owed    <--   sends rows whose sequences are whole, with a priority for each sequence
                                                            an evaluator plays the newest policy greedily, and sends scores

A row goes once every sequence that begins in it or before it is whole, for only then is its priority known. Of burn-in 40, trace length 80
and period 40, in steps of one environment:

    at step 120  rows 0 .. 120 are there: the sequence from row 0 is whole, so rows 0 .. 39 go; the sequence from row 40 is not
    at step 160  rows 40 .. 79 go, and so on; an episode's end makes all its sequences whole, and its last rows go

What gets lost: with an actor the rows that it held, which no step was counted for, and one unfinished sequence of each environment, which
is counted; with a machine also the answers that the learner had not fetched. Another actor goes on with the streams, from new episodes. One
that lives and never answers is lost too, once another one has answered ANSWERS times in its SILENCE. The evaluator may take its time, for
nobody knows how long an episode is.
Statistics that acting keeps, as NGU's of what its networks see, are each actor's own; the learner and the evaluator have the first one's.
Answers wait in the object store until the learner takes them. As an actor has AHEAD calls before it and not more, that is what bounds
memory, and what keeps actors from running away from a slower learner: updates follow steps received, as in one process.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from urlfast import Field, __version__
from urlfast.methods import stored_rows
from urlfast.run import UsageError, UserError, human_bytes, one_line

AHEAD = 2  # calls that an actor has before it: one that it works on, and one that it begins before the learner has seen the first
ANSWERS = 10  # of an actor, before which another one's silence means nothing: AHEAD of them may have been ready when it began
BROADCAST_EVERY = 10  # updates between two broadcasts of the policy
PATIENCE = 180.0  # seconds in which the first actor must have begun
SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # an empty frame of that type
SILENCE = 180.0  # seconds without an answer after which an actor may be taken for one that hangs
TRIES = 3  # times in a row that an actor may fail before it has sent anything


def connect(option: str, address: str, **local):
    """The module `ray`, joined to the cluster at host:port; "local" starts one on this machine. local: options of that.

    Raises UserError, which names the command line's `option`, within seconds where Ray or the cluster is not there.
    """
    if find_spec("ray") is None:
        raise UserError(f"{option}: Ray is not installed; pip install 'urlfast[ray]'")
    import ray

    if address != "local":
        local = {}
        _reach(option, address)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a task without a GPU of its own keeps the machine's
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", namespace="urlfast", **local)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise UserError(f"{option}: no cluster answers at {address}: {one_line(error, 200)}") from None
    return ray


def _reach(option: str, address: str) -> None:
    """Ray itself tries for minutes where nobody listens, or somebody else: its server is asked for the greeting of HTTP/2 first."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal() or not host:
        raise UsageError(f"{option}: must be local, or a host:port, got {address!r}")
    try:
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS)
            if connection.recv(9)[3:4] != SETTINGS[3:4] and os.environ.get("RAY_USE_TLS", "0") == "0":
                raise ConnectionError("what listens there is not Ray")
    except (OSError, OverflowError) as error:
        raise UserError(f"{option}: no cluster answers at {address}: {one_line(error)}") from None


# On an actor's machine ------------------------------------------------------------------------------------------------


class Sequences:
    """Rows of E environments, which are held until the sequences that begin in them are whole and have a priority."""

    def __init__(self, num_envs: int, config, fields: dict[str, Field], first: int = 0):
        """fields: the replay's. first: stream of the first environment."""
        self.config, self.fields, self.first = config, fields, first
        self.held = np.zeros(num_envs, np.int64)  # rows
        self.position = np.zeros(num_envs, np.int64)  # of the newest row in its episode
        self.columns: dict[str, np.ndarray] = {}  # (E, room, ...)

    def add(self, rows: dict[str, np.ndarray], q: torch.Tensor, step) -> None:
        """One row of each environment; `period` of them at most before the next `take`."""
        self.position = np.where(rows["is_first"], 0, self.position + 1)
        rows = rows | {" q": q.numpy(), " score": step.score, " length": step.length, " position": self.position}
        if not self.columns:
            room = self.config.sequence_length + self.config.period
            self.columns = {name: np.empty((len(self.held), room, *value.shape[1:]), value.dtype) for name, value in rows.items()}
        every = np.arange(len(self.held))
        for name, value in rows.items():
            self.columns[name][every, self.held] = value
        self.held += 1

    def take(self, initial_errors: Callable) -> dict[str, Any]:
        """All rows that can go, those of an environment together, oldest first, and the episodes that ended in them; see `spread`."""
        c, columns = self.config, self.columns
        room = columns["is_last"].shape[1]
        index = np.arange(room)
        there = index < self.held[:, None]  # (E, room), as all that follows
        starts = there & (columns[" position"] % c.period == 0)
        last = np.where(there & columns["is_last"], index, room)
        last = np.minimum.accumulate(last[:, ::-1], 1)[:, ::-1]  # the next last row
        end = np.minimum(index + c.sequence_length, last + 1)  # of a sequence that begins here
        waits = starts & (end > self.held[:, None])
        goes = np.where(waits.any(1), waits.argmax(1), self.held)
        going = index < goes[:, None]
        env, row = np.nonzero(going)

        chunk = {name: column[env, row] for name, column in columns.items() if name in self.fields and self.fields[name].every == 1}
        chunk |= {name: columns[name][env, row] for name in ("reward", "terminated", "is_first", "is_last")}
        position = columns[" position"][env, row]
        packed = {name: columns[name][env, row][position % f.every == 0] for name, f in self.fields.items() if f.every > 1}
        if c.priority_exponent > 0:
            columns[" priority"] = np.full(going.shape, np.nan, np.float32)
            at = np.nonzero(starts & going)
            if len(at[0]):
                columns[" priority"][at] = self.priorities(*at, end[at], initial_errors)
            chunk["priority"] = columns.pop(" priority")[env, row]
        ended = columns["is_last"][env, row]
        done = {
            "rows": chunk,
            "packed": packed,
            "position": position,
            "streams": self.first + env,
            "scores": columns[" score"][env, row][ended].tolist(),
            "lengths": columns[" length"][env, row][ended].tolist(),
        }
        for e, (n, held) in enumerate(zip(goes, self.held, strict=True)):
            for column in columns.values():
                column[e, : held - n] = column[e, n:held]
        self.held -= goes
        return done

    def priorities(self, env: np.ndarray, start: np.ndarray, end: np.ndarray, initial_errors: Callable) -> np.ndarray:
        """eta max |error| + (1 - eta) mean |error| of the sequences that begin in these rows and end before `end`, (B,) float32."""
        c, steps = self.config, np.arange(self.config.sequence_length)
        rows = np.minimum(start[:, None] + steps, end[:, None] - 1)
        mask = start[:, None] + steps[1:] < end[:, None]  # the row after it belongs to the same sequence
        names = [name for name in self.columns if name != "observation" and name[0] != " "]
        names = [name for name in names if name not in self.fields or self.fields[name].every == 1]
        batch = {name: torch.from_numpy(self.columns[name][env[:, None], rows]) for name in names}
        batch = SimpleNamespace(**{"choice": None, "weight": None, **batch}, mask=torch.from_numpy(mask))
        errors = initial_errors(batch, torch.from_numpy(self.columns[" q"][env[:, None], rows])).double().numpy()
        count = mask[:, c.learner.burn_in :].sum(1).clip(1)
        return c.priority_eta * errors.max(1) + (1 - c.priority_eta) * errors.sum(1) / count


def spread(chunk: dict[str, Any], fields: dict[str, Field]) -> dict[str, np.ndarray]:
    """The rows of a chunk as SequenceReplay.add takes them. Columns that are kept every so many rows were sent for those rows alone."""
    rows, position = dict(chunk["rows"]), chunk["position"]
    for name, packed in chunk["packed"].items():
        rows[name] = np.empty((len(position), *packed.shape[1:]), packed.dtype)  # what is not written the replay does not read
        rows[name][position % fields[name].every == 0] = packed
    return rows


def arrays(state):
    """A saved part with NumPy in place of tensors: Ray sends those without a copy, and maps them into the processes that read them."""
    if isinstance(state, torch.Tensor):
        return state.detach().cpu().numpy()
    if isinstance(state, dict):
        return {name: arrays(value) for name, value in state.items()}
    return type(state)(map(arrays, state)) if isinstance(state, list | tuple) else state


def tensors(state):
    """A part as `arrays` made it, with tensors of its own."""
    if isinstance(state, np.ndarray):
        return torch.from_numpy(state.copy())
    if isinstance(state, dict):
        return {name: tensors(value) for name, value in state.items()}
    return type(state)(map(tensors, state)) if isinstance(state, list | tuple) else state


def fingerprint(config, method) -> str:
    """Of what learner and actor must agree on beside the version: the options, the rows, and the networks that act."""
    layout = method.make_replay(1, 1).layout(1)
    state = method.state_dict()
    shapes = {part: {name: list(getattr(value, "shape", ())) for name, value in state[part].items()} for part in method.acting}
    text = json.dumps([asdict(config.method), asdict(config.env), layout, shapes], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Spec:
    """What an actor is made of. make_env and make_method are train.py's."""

    method: str
    config: Any
    make_env: Callable
    make_method: Callable
    steps: int  # of the run when it began: a resumed one has other random numbers


class Actor:
    """A process of the cluster. `index`: which of the actors it is, or None for the evaluator."""

    def hello(self, version: str, spec: bytes, index: int | None, attempt: int, parts: list) -> dict[str, Any]:
        """Builds what `collect` or `evaluate` needs, where this machine has the learner's version; says who it is either way."""
        me = {"urlfast": __version__, "host": socket.gethostname(), "pid": os.getpid()}
        if version != __version__:
            return me
        import ray

        torch.set_num_threads(1)
        self.ray, self.version = ray, -1
        spec = ray.cloudpickle.loads(spec)
        config = spec.config
        random = np.random.SeedSequence([config.seed, spec.steps, config.actors if index is None else index, attempt])
        env_seed, method_seed = (int(seed) >> 1 for seed in random.generate_state(2))
        evaluates = {} if index is not None else {"num_envs": 1, "evaluation": True}
        self.env = spec.make_env(config.env, seed=env_seed, **evaluates)
        self.method = spec.make_method(spec.method, replace(config, device="cpu", seed=method_seed), self.env)
        self.own = ()
        self.load(parts)
        self.own = () if index is None else self.method.statistics  # what it keeps of its own acting
        self.told = self.own if index == 0 else ()
        if index is not None:
            n = self.env.num_envs
            self.method.agent.first, self.method.agent.of = index * n, config.actors * n
            self.sequences = Sequences(n, config.method, self.method.make_replay(1, 1).fields, index * n)
            self.step = self.env.reset()
        return me | {"fingerprint": fingerprint(config, self.method)}

    def load(self, parts: list) -> None:
        """parts: references in a list, which Ray passes on unread: they are fetched only where they are needed."""
        for part, state in [entry for held in self.ray.get(parts) for entry in held.items()]:
            if part not in self.own:
                self.method.load_part(part, tensors(state))

    def refresh(self, version: int, parts: list) -> None:
        if version != self.version:
            self.load(parts)
            self.version = version

    def collect(self, version: int, parts: list) -> dict[str, Any]:
        """`period` steps of every environment with that policy; see Sequences.take."""
        self.refresh(version, parts)
        for _ in range(self.method.config.period):
            action = self.method.act(self.step)
            q, after = self.method.agent.q, self.env.step(action)
            self.sequences.add(stored_rows(self.method, self.env, self.step, action, after), q, self.step)
            self.step = after
        state = self.method.state_dict() if self.told else {}
        statistics = {part: arrays(state[part]) for part in self.told}
        seen, self.method.seen = self.method.seen, np.zeros_like(self.method.seen)
        return self.sequences.take(self.method.initial_errors) | {"version": version, "statistics": statistics, "seen": seen}

    def evaluate(self, version: int, parts: list) -> dict[str, Any]:
        """One episode, greedily."""
        self.refresh(version, parts)
        step = self.env.reset()
        while not step.is_last[0]:
            step = self.env.step(self.method.act(step, explore=False))
        return {"score": float(step.score[0]), "version": version}


# The learner's side ---------------------------------------------------------------------------------------------------


@dataclass
class Slot:
    """The place of an actor, which others take after it. index: None for the evaluator's."""

    index: int | None
    handle: Any = None
    calls: deque = field(default_factory=deque)  # (what to do with the answer, reference), oldest first
    there: bool = False  # has said hello
    answers: deque = field(default_factory=lambda: deque(maxlen=ANSWERS))  # when its last ones were taken, the hello among them
    attempt: int = -1  # how many held this place before
    failures: int = 0  # since something was received

    @property
    def name(self) -> str:
        return "the evaluator" if self.index is None else f"actor {self.index}"


class Actors:
    """N actors of E environments each, and an evaluator, for train.py's loop: to whoever asks, N E environments that step elsewhere."""

    def __init__(self, method: str, config, env, make_env: Callable, make_method: Callable):
        """env: one environment like the actors', which is read and closed. Raises UserError where Ray does not answer."""
        self.spec = Spec(method, config, make_env, make_method, 0)
        self.actions, self.observation_shape, self.frame_shape = env.actions, env.observation_shape, env.frame_shape
        self.frame_stack, self.action_repeat = env.frame_stack, env.action_repeat
        self.num_envs = config.actors * config.env.num_envs
        env.close()
        most = 8 * os.cpu_count()
        if config.ray_address == "local" and config.actors > most:
            raise UsageError(f"--actors: this machine alone takes {most} at most, got {config.actors}; --ray-address names a cluster")
        self.ray = connect("--ray-address", config.ray_address, num_cpus=config.actors + 1, include_dashboard=False)
        self.remote = self.ray.remote(num_cpus=1, max_restarts=0)(Actor)
        self._empty()

    def begin(self, method, replay, counters) -> None:
        """Places the actors; none is waited for."""
        self.method, self.replay, self.counters = method, replay, counters
        self.fingerprint = fingerprint(self.spec.config, method)
        self.pickled = self.ray.cloudpickle.dumps(replace(self.spec, steps=counters.steps))
        self.fixed = self._put(method.fixed)
        self._broadcast()
        actors, each = self.spec.config.actors, self.spec.config.env.num_envs
        self.slots = [Slot(index) for index in (*range(actors), None)]
        self.arrived: deque[Slot] = deque()
        self.heard = time.monotonic()
        for slot in self.slots:
            self._place(slot)
        flying = AHEAD * self.num_envs * method.config.period * replay.bytes / replay.capacity
        cpus = int(self.ray.cluster_resources().get("CPU", 0))
        later = f"; it has CPUs for {cpus} of {actors + 1}, the others begin when machines join" if cpus <= actors else ""
        print(f"  actors  {actors} x {each} environments on {self.spec.config.ray_address}, "
              f"{human_bytes(flying)} on its way at most{later}", flush=True)  # fmt: skip

    def advance(self, pay: Callable[[], None]) -> tuple[int, list[float], list[int]]:
        """What one actor has sent goes into the replay: (steps, scores and lengths of episodes). Nothing, where none did for a second."""
        pay()
        if self.counters.updates >= self.version + BROADCAST_EVERY:
            self._broadcast()
        if not self.arrived:
            self._wait()
        if self.arrived:
            slot = self.arrived.popleft()
            take, call = slot.calls.popleft()
            try:
                answer = self.ray.get(call, timeout=60)
            except self.ray.exceptions.RayError as error:
                self._replace(slot, error)
            else:
                slot.answers.append(time.monotonic())
                return take(slot, answer)
        return 0, [], []

    def line(self) -> dict[str, float]:
        """For metrics.jsonl, since the line before: who acts, who was lost, how many updates a policy was behind, and how well it plays."""
        line = {"actors": sum(slot.there for slot in self.slots if slot.index is not None), **self.lost}
        if self.ages:
            line |= {"policy_age": float(np.mean(self.ages)), "policy_age_max": max(self.ages)}
        if self.scores:
            line |= {"evaluation_score": float(np.mean(self.scores)), "evaluations": len(self.scores)}
        self._empty()
        return line

    def close(self) -> None:
        self.ray.shutdown()

    def _empty(self) -> None:
        self.lost = {"actors_lost": 0, "sequences_dropped": 0}
        self.ages: list[int] = []
        self.scores: list[float] = []

    def _put(self, parts):
        state = self.method.state_dict()
        return self.ray.put({part: arrays(state[part]) for part in parts if part in state})

    def _broadcast(self) -> None:
        """One copy for all: each machine fetches it once, when an actor there needs it; it goes when no call names it any more."""
        self.version, self.policy = self.counters.updates, self._put((*self.method.acting, *self.method.statistics))

    def _place(self, slot: Slot) -> None:
        slot.attempt, slot.there, slot.handle = slot.attempt + 1, False, self.remote.options(scheduling_strategy="SPREAD").remote()
        slot.answers.clear()
        hello = slot.handle.hello.remote(__version__, self.pickled, slot.index, slot.attempt, [self.fixed, self.policy])
        slot.calls = deque([(self._greeted, hello)])

    def _replace(self, slot: Slot, error: Exception) -> None:
        """Another actor, with other random numbers: its environments begin new episodes in the same streams."""
        says = one_line(getattr(error, "cause", None) or error, 300)
        slot.failures += 1
        if slot.failures == TRIES:
            raise UserError(f"{slot.name}: failed {TRIES} times in a row before it sent anything: {says}")
        print(f"{slot.name} is lost, another one takes its place: {says}", file=sys.stderr, flush=True)
        if slot.index is not None:
            self.lost["actors_lost"] += 1
            self.lost["sequences_dropped"] += self.spec.config.env.num_envs * slot.there
        with suppress(self.ray.exceptions.RayError):
            self.ray.kill(slot.handle)  # it may live on, where only an answer of it was lost
        self._place(slot)

    def _wait(self) -> None:
        """Until an actor has something, a second at most. Of each only the oldest call, for its rows go in their order."""
        heads = {slot.calls[0][1]: slot for slot in self.slots}
        ready, _ = self.ray.wait(list(heads), num_returns=len(heads), timeout=0)
        if not ready:
            ready, _ = self.ray.wait(list(heads), num_returns=1, timeout=1)
        self.arrived.extend(heads.pop(call) for call in ready)
        for slot in filter(self._hangs, heads.values()):
            self._replace(slot, TimeoutError(f"no answer for {SILENCE:.0f} s, while another one gave {ANSWERS}"))
        if not ready and not any(slot.there for slot in self.slots) and time.monotonic() > self.heard + PATIENCE:
            free = int(self.ray.available_resources().get("CPU", 0))
            raise UserError(f"--actors: none began within {PATIENCE:.0f} s; each takes one CPU, and {free} are free in the cluster")

    def _hangs(self, slot: Slot) -> bool:
        """Whether an actor whose oldest call is not answered never will. One that has not begun may wait for a CPU."""
        if slot.index is None or not slot.there or time.monotonic() < slot.answers[-1] + SILENCE:
            return False
        others = (other.answers for other in self.slots if other.index is not None)
        return any(len(answers) == ANSWERS and answers[0] > slot.answers[-1] for answers in others)

    def _greeted(self, slot: Slot, hello: dict[str, Any]):
        for name, mine in (("urlfast", __version__), ("fingerprint", self.fingerprint)):
            if hello[name] != mine:
                what = "urlfast" if name == "urlfast" else "other options, columns or networks: fingerprint"
                says = f"{slot.name} on {hello['host']} has {what} {hello[name]}, the learner {mine}"
                raise UserError(f"{says}; install the same urlfast on every machine")
        slot.there = True
        for _ in range(1 if slot.index is None else AHEAD):
            self._ask(slot)
        return 0, [], []

    def _ask(self, slot: Slot) -> None:
        if slot.index is None:
            slot.calls.append((self._evaluated, slot.handle.evaluate.remote(self.version, [self.policy])))
        else:
            slot.calls.append((self._received, slot.handle.collect.remote(self.version, [self.policy])))

    def _received(self, slot: Slot, chunk: dict[str, Any]):
        slot.failures = 0
        self._ask(slot)
        self.ages.append(self.counters.updates - chunk["version"])
        for part, state in chunk["statistics"].items():
            self.method.load_part(part, tensors(state))
        self.method.seen = self.method.seen + chunk["seen"]
        if len(chunk["streams"]):
            self.replay.add(spread(chunk, self.replay.fields), chunk["streams"])
        return int(np.count_nonzero(~chunk["rows"]["is_last"])), chunk["scores"], chunk["lengths"]

    def _evaluated(self, slot: Slot, result: dict[str, Any]):
        slot.failures = 0
        self._ask(slot)
        self.scores.append(result["score"])
        return 0, [], []
