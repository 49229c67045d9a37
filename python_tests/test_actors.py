"""Acting on a Ray cluster: what actors send is what they saw; and actors, nodes and learners that are killed, on two nodes."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_actors
import toy_run
from hypothesis import given, settings
from hypothesis import strategies as st

from urlfast import Field, actors, train
from urlfast.actors import Sequences, arrays, connect, spread, tensors
from urlfast.checkpoint import checkpoints, read_latest
from urlfast.envs.gym import GymConfig, make_gym
from urlfast.learners.r2d2 import epsilons
from urlfast.methods import stored_rows
from urlfast.methods.ngu import NGU, NGUConfig
from urlfast.methods.recurrent import RecurrentConfig, RecurrentTask
from urlfast.run import UsageError, UserError, read_json, read_metrics

try:
    import ray
except ImportError:
    ray = None
needs_ray = pytest.mark.skipif(ray is None, reason="Ray is not installed: pip install 'urlfast[ray]'")

# What an actor sends ---------------------------------------------------------------------------------------------------


class Played:
    """Rows of E environments with random episodes, told apart by what their columns hold."""

    def __init__(self, num_envs, ends, seed):
        self.random, self.ends, self.t = np.random.default_rng(seed), ends, np.zeros(num_envs, np.int64)
        self.closed, self.rows = np.ones(num_envs, bool), [[] for _ in range(num_envs)]

    def step(self):
        n = len(self.closed)
        last = ~self.closed & (self.random.random(n) < self.ends)
        rows = {
            "observation": np.stack([np.arange(n), self.t], 1).astype(np.float32),
            "state": np.stack([np.arange(n), self.t], 1).astype(np.float32),
            "action": self.random.integers(0, 3, n),
            "reward": self.random.normal(size=n).astype(np.float32),
            "terminated": self.random.random(n) < 0.1,
            "is_first": self.closed,
            "is_last": last,
        }
        q = self.random.normal(size=(n, 3)).astype(np.float32)
        score = self.random.normal(size=n)
        for e in range(n):
            self.rows[e].append({name: value[e] for name, value in rows.items()} | {"q": q[e], "score": score[e]})
        self.closed, self.t = last, self.t + 1
        return rows, torch.from_numpy(q), SimpleNamespace(score=score, length=self.t)


def starts_of(rows, period):
    """Indices of the rows in which a sequence begins."""
    position, starts = -1, []
    for i, row in enumerate(rows):
        position = 0 if row["is_first"] else position + 1
        if position % period == 0:
            starts.append(i)
    return starts


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5), st.sampled_from([0.0, 0.05, 0.4]), st.integers(0, 2**32))
def test_rows_go_in_their_order_when_the_sequences_that_begin_in_them_are_whole(num_envs, period, times, burn_in, ends, seed):
    config = SimpleNamespace(period=period, sequence_length=burn_in + times * period + 1, learner=SimpleNamespace(burn_in=burn_in),
                             priority_exponent=0.5, priority_eta=0.9)  # fmt: skip
    length = config.sequence_length
    fields = {"observation": Field((2,)), "action": Field((), "int64"), "state": Field((2,), every=period)}

    def errors(batch, q):  # (B, T), of these rows and none of others; junk where there is no transition
        return torch.where(batch.mask, (q.sum(-1) + batch.reward)[:, :-1], 0.0).abs()[:, burn_in:]

    played, sequences = Played(num_envs, ends, seed), Sequences(num_envs, config, fields, first=7)
    got = [[] for _ in range(num_envs)]
    for _ in range(8):
        for _ in range(period):
            sequences.add(*played.step())
        chunk = sequences.take(errors)
        rows = spread(chunk, fields)
        assert rows.keys() == {*fields, "reward", "terminated", "is_first", "is_last", "priority"}
        last = [i for i in range(len(chunk["streams"])) if rows["is_last"][i]]
        ended = [played.rows[chunk["streams"][i] - 7][int(rows["observation"][i, 1])]["score"] for i in last]
        assert chunk["scores"] == ended and len(chunk["lengths"]) == len(ended)
        for i, stream in enumerate(chunk["streams"]):
            got[stream - 7].append({name: value[i] for name, value in rows.items()})
        for e in range(num_envs):
            full, starts = played.rows[e], starts_of(played.rows[e], period)

            def end_of(start, full=full):  # one past its last row, or None where that is not there yet
                for i in range(start, min(start + length, len(full))):
                    if full[i]["is_last"]:
                        return i + 1
                return start + length if start + length <= len(full) else None

            waiting = [s for s in starts if end_of(s) is None]
            assert len(got[e]) == (waiting[0] if waiting else len(full)), "too early, or too late"
            for i, (row, its) in enumerate(zip(got[e], full, strict=False)):
                names = [name for name in fields if name != "state" or i in starts]
                assert all(np.array_equal(row[name], its[name]) for name in (*names, "reward", "terminated", "is_first", "is_last"))
                if i in starts:
                    error = [abs(r["q"].sum(dtype=np.float64) + r["reward"]) for r in full[i + burn_in : end_of(i) - 1]] or [0.0]
                    assert row["priority"] == pytest.approx(0.9 * max(error) + 0.1 * np.mean(error), rel=1e-5, abs=1e-6)
                else:
                    assert np.isnan(row["priority"])


@pytest.mark.parametrize(
    "kind, burn_in, target",
    [
        (RecurrentTask, 0, "n-step"),
        (RecurrentTask, 3, "n-step"),
        (RecurrentTask, 3, "retrace"),
        (RecurrentTask, 3, "peng"),
        (NGU, 3, "retrace"),
    ],
)
def test_first_priorities_are_those_that_the_learner_would_find_with_the_same_weights(kind, burn_in, target):
    """Both networks are the acting one here, and the stored state leads the learner to its Q values: not a row may be off."""
    c = RecurrentConfig.toy() if kind is RecurrentTask else NGUConfig.toy()
    learner = train.replace(c.learner, burn_in=burn_in, target=target, torso=16, lstm=16, hidden=16, n_step=3, epsilon=0.9)
    config = train.replace(c, learner=learner, trace_length=8, period=4, priority_exponent=1.0, precision="fp32", batch_size=512)
    env = make_gym(GymConfig("CartPole-v1"), num_envs=3, seed=0)
    method = kind(config, env.observation_shape, env.actions, seed=1, frame_stack=1)
    replay = method.make_replay(3, 2000)
    sequences, step = Sequences(3, config, replay.fields), env.reset()
    for _ in range(60):
        for _ in range(config.period):
            action = method.act(step)
            q, after = method.agent.q, env.step(action)
            sequences.add(stored_rows(method, env, step, action, after), q, step)
            step = after
        chunk = sequences.take(method.initial_errors)
        replay.add(spread(chunk, replay.fields), chunk["streams"])
    assert len(replay) > 500
    batch = replay.sample(config.batch_size)
    given, indices = batch.probability / batch.probability[0], batch.indices.copy()
    arrays = {name: torch.from_numpy(batch[name].copy()) for name in
              ("action", "reward", "terminated", "mask", "state", "previous_action", "previous_reward", "mu")}  # fmt: skip
    frames = torch.from_numpy(batch.observation.copy())
    sequence = SimpleNamespace(**arrays, choice=None, weight=None)
    reward = sequence.reward if kind is RecurrentTask else torch.from_numpy(np.roll(batch.novelty, -1, 1))
    with torch.no_grad():
        error, _ = method.agent.learner.errors(sequence, reward, *method.agent.features(frames))
    error, mask = error[0].abs().numpy(), arrays["mask"].numpy()[:, burn_in:]
    priority = 0.9 * error.max(1) + 0.1 * error.sum(1) / mask.sum(1)
    assert len(set(indices.tolist())) > 50 and priority.max() > 2 * priority.min()
    np.testing.assert_allclose(priority / priority[0], given, rtol=2e-3)


def test_the_ladder_of_epsilons_runs_over_all_actors_environments():
    config = RecurrentConfig.toy()
    env = make_gym(GymConfig("CartPole-v1"), num_envs=4, seed=0)
    method, asked = RecurrentTask(config, env.observation_shape, env.actions, seed=1, frame_stack=1), []
    act = method.agent.learner.act
    method.agent.learner.act = lambda *a: asked.append(a[-1]) or act(*a)
    method.agent.first, method.agent.of = 8, 16  # the third of four actors
    method.act(env.reset())
    np.testing.assert_allclose(asked[0], [0.4 ** (1 + 7 * i / 15) for i in range(8, 12)], rtol=1e-6)
    np.testing.assert_allclose(asked[0], epsilons(config.learner, 16)[8:12])


def test_a_policy_arrives_as_it_was_sent():
    state = {"a": {"weight": torch.randn(3, 2), "steps": 3, "flags": [torch.tensor(True), None]}}
    there = tensors(arrays(state))
    assert isinstance(arrays(state)["a"]["weight"], np.ndarray)
    torch.testing.assert_close(there["a"]["weight"], state["a"]["weight"], rtol=0, atol=0)
    assert there["a"]["steps"] == 3 and there["a"]["flags"] == [torch.tensor(True), None]


# What is refused -------------------------------------------------------------------------------------------------------


def test_ray_is_asked_for_where_it_is_missing_and_only_there(monkeypatch):
    monkeypatch.setattr(actors, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--ray-address: Ray is not installed; pip install 'urlfast\[ray\]'"):
        train.run_train(["r2d2", "gym", "--env.id", "CartPole-v1", "--actors", "2"])
    with pytest.raises(UsageError, match=r"--actors: apt acts in this process alone; .*: ngu, cpt, r2d2, cpt-task"):
        train.run_train(["apt", "gym", "--env.id", "CartPole-v1", "--actors", "2"])
    with pytest.raises(UsageError, match=r"--actors: this machine alone takes \d+ at most, got 1000; --ray-address names a cluster"):
        train.run_train(["r2d2", "gym", "--env.id", "CartPole-v1", "--actors", "1000"])
    with pytest.raises(ValueError, match="actors: must be at least 0, got -1"):
        train.TrainConfig(RecurrentConfig(), GymConfig(), actors=-1)


def test_training_in_one_process_imports_no_ray(tmp_path):
    argv = ["r2d2", "gym", "--env.id", "CartPole-v1", "--steps", "200", "--learning-start", "180", "--runs", str(tmp_path)]
    code = f"import sys\nfrom urlfast import train\ntrain.run_train({argv})\nassert not {{'ray', 'urlfast.actors'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], env=toy_run.environment(), check=True, capture_output=True, timeout=120)


@needs_ray
def test_a_cluster_that_does_not_answer_is_said_within_seconds():
    with socket.socket() as free:  # nobody listens there when it is closed
        free.bind(("127.0.0.1", 0))
        nobody = free.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"--ray-address: no cluster answers at 127\.0\.0\.1:{nobody}: "):
        connect("--ray-address", f"127.0.0.1:{nobody}")
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UserError, match="timed out"):
        connect("--ray-address", f"127.0.0.1:{silent.getsockname()[1]}")
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            other.accept()[0].sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UserError, match="what listens there is not Ray"):
            connect("--ray-address", f"127.0.0.1:{other.getsockname()[1]}")
    with pytest.raises(UsageError, match="--ray-address: must be local, or a host:port, got 'somewhere'"):
        connect("--ray-address", "somewhere")
    assert time.monotonic() - began < 30


# On a cluster ----------------------------------------------------------------------------------------------------------

EACH, START = 2, 300
OPTIONS = {
    "env.id": "toy_actors:Counted", "env.num-envs": EACH, "actors": 2, "steps": 10_000_000, "learning-start": START,
    "trace-length": 20, "period": 10, "batch-size": 8, "replay-ratio": 16.0, "learner.torso": 16, "learner.lstm": 8, "learner.hidden": 16,
    "learner.gamma": 0.0, "learner.lr": 0.01, "learner.target-period": 10, "log-every": 200, "checkpoint-every": 400,
}  # fmt: skip
MARK = f"urlfast-test-{os.getpid()}"


@pytest.fixture(scope="module")
def cluster():
    """Two nodes, each with CPUs for all; both on this machine."""
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ |= toy_run.environment(URLFAST_TEST=MARK, RAY_USAGE_STATS_ENABLED="0")  # what the nodes' processes see
    node = {"num_cpus": 4, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    cluster.add_node(**node)
    yield SimpleNamespace(nodes=cluster, node=node, address=cluster.address)
    cluster.shutdown()
    os.environ.clear()
    os.environ |= before


@pytest.fixture
def begin(cluster):
    """`urlfast train` as a function, in a process of its own that prints to a file; what still runs after the test is killed."""
    begun = []

    def begin(runs: Path, *argv: str, method: str = "r2d2", code: str = "") -> subprocess.Popen:
        words = [method, "gym", "--ray-address", cluster.address, "--runs", str(runs)]
        words += [f"--{name}={value}" for name, value in OPTIONS.items()]
        words = argv if "--resume" in argv else (*words, *argv)
        command = [sys.executable, "-c", f"from urlfast import actors, train\n{code}\ntrain.main()", *words]
        with open(runs / "log.txt", "a") as log:
            begun.append(subprocess.Popen(command, env=toy_run.environment(), stdout=log, stderr=log))
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.wait()


def run_of(runs: Path) -> Path | None:
    return next(iter(runs.glob("*-gym-*")), None)


def until(what, process: subprocess.Popen | None, runs: Path, seconds: float = 300):
    """`what()`, as soon as it is true. seconds: for a machine that others use as well; alone none takes twenty."""
    for _ in range(int(10 * seconds)):
        if found := what():
            return found
        if process is not None and process.poll() is not None:
            break
        time.sleep(0.1)
    pytest.fail(f"not within {seconds} s, or ended before:\n{(runs / 'log.txt').read_text()}")


def lines(runs: Path) -> list[dict]:
    return read_metrics(run_of(runs)) if run_of(runs) else []


def players() -> dict[int, int]:
    """{process: its node's} of the cluster's actors."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if MARK.encode() in (path / "environ").read_bytes() and (path / "cmdline").read_bytes().startswith(b"ray::Actor"):
                found[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # gone meanwhile
            continue
    return found


def collecting() -> int | None:
    """An actor, and not the evaluator; None where none is at work now."""
    return next((pid for pid in players() if b"collect" in Path(f"/proc/{pid}/cmdline").read_bytes()), None)


def all_heard(runs: Path) -> bool:
    """Whether the newest checkpoint has rows of every environment."""
    try:
        saved = read_json(checkpoints(run_of(runs))[0] / "replay.json")
        return bool(saved["segments"]) and min(saved["segments"][-1]["end"]) > 0
    except (OSError, IndexError):  # there is none yet, or it has just made room
        return False


def finish(process: subprocess.Popen, runs: Path) -> list[dict]:
    """Stops the run. What it counted is what its replay has, every row there is once and in its place, and all updates were paid."""
    until(lambda: all_heard(runs), process, runs)
    process.terminate()
    assert until(lambda: process.poll() is not None, None, runs) and process.returncode == 128 + signal.SIGTERM, (
        runs / "log.txt"
    ).read_text()
    checkpoint = read_latest(run_of(runs), replay=True)
    replay, state, told = checkpoint.load_replay(read_only=True), checkpoint.state, lines(runs)
    assert len(replay) == state["steps"] + state["episodes"], "a row for each step, and for each last observation"
    batch = replay.sample(2000)
    world, life, mask = batch.observation[..., 0], batch.observation[..., 1], batch.mask
    assert (world[:, 1:] == world[:, :-1])[mask].all() and (life[:, 1:] == life[:, :-1] + toy_actors.STEP)[mask].all()
    assert [line["step"] for line in told] == sorted({line["step"] for line in told}) and told[-1]["step"] == state["steps"]
    for line in told:  # what the last answer owes is paid after the line
        assert 0 <= max(0, 0.1 * (line["step"] - START)) - line["updates"] < 15
    return told


def total(runs: Path, name: str) -> float:
    return sum(line[name] for line in lines(runs))


@needs_ray
def test_two_nodes_act_one_process_learns_and_the_evaluator_sees_it(begin, tmp_path):
    process = begin(tmp_path)
    seen = until(lambda: (found := players()) and len(found) == 3 and found, process, tmp_path)
    assert len(set(seen.values())) == 2, "all on one node"
    until(lambda: lines(tmp_path) and lines(tmp_path)[-1].get("evaluation_score", 0) > 0.9 * toy_actors.LENGTH, process, tmp_path)
    told = finish(process, tmp_path)
    assert told[-1]["actors"] == 2 and all(line["actors_lost"] == line["sequences_dropped"] == 0 for line in told)
    assert all(0 <= line["policy_age"] <= line["policy_age_max"] for line in told) and max(line["policy_age"] for line in told) > 0
    until(lambda: not players(), None, tmp_path)  # nobody stays behind


@needs_ray
def test_ngu_acts_elsewhere_too_and_the_learner_knows_what_its_actors_saw(begin, tmp_path):
    process = begin(tmp_path, method="ngu")
    until(lambda: len(lines(tmp_path)) >= 3 and lines(tmp_path)[-1].get("intrinsic_reward", 0) > 0, process, tmp_path)

    def seen() -> dict:
        return read_latest(run_of(tmp_path)).state["method"]["moments"]["input"]

    until(lambda: seen()["count"] > 500, process, tmp_path)  # what the first actor says, which may have begun last
    finish(process, tmp_path)
    assert 0.95 < seen()["squares"][2] / seen()["count"] < 1 + 1e-6  # the coin is 1 or -1


@needs_ray
def test_cpts_learner_tells_how_much_its_actors_flew(begin, tmp_path):
    """From scratch: its flights repeat a random action."""
    process = begin(tmp_path, method="cpt-task")
    until(lambda: 0 < sum(line.get("flight_share", 0) for line in lines(tmp_path)), process, tmp_path)
    finish(process, tmp_path)
    assert all(0 <= line["flight_share"] <= 1 for line in lines(tmp_path) if "flight_share" in line)


@needs_ray
def test_a_killed_actor_is_replaced_and_its_sequences_are_counted(begin, tmp_path):
    process = begin(tmp_path)
    until(lambda: len(lines(tmp_path)) >= 2, process, tmp_path)
    os.kill(until(collecting, process, tmp_path), signal.SIGKILL)
    until(lambda: total(tmp_path, "actors_lost") and lines(tmp_path)[-1]["actors"] == 2, process, tmp_path)
    finish(process, tmp_path)
    assert total(tmp_path, "actors_lost") == 1 and total(tmp_path, "sequences_dropped") == EACH
    assert re.search(r"actor [01] is lost, another one takes its place: .*", (tmp_path / "log.txt").read_text())


@needs_ray
def test_an_actor_that_hangs_is_replaced(begin, tmp_path):
    process = begin(tmp_path, "--env.id", "toy_actors:Hanging", code="actors.SILENCE = 10")
    until(lambda: len(lines(tmp_path)) >= 2, process, tmp_path)
    hung = until(collecting, process, tmp_path)
    told = toy_actors.hangs(hung)
    told.touch()
    try:
        until(lambda: hung not in players(), process, tmp_path)
        until(lambda: total(tmp_path, "actors_lost") and lines(tmp_path)[-1]["actors"] == 2, process, tmp_path)
    finally:
        told.unlink()
    finish(process, tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert re.search(r"actor [01] is lost, another one takes its place: no answer for 10 s, while another one gave 10", log)


def test_a_silent_actor_hangs_only_if_it_has_begun_and_another_one_answers_again_and_again(monkeypatch):
    """Of two actors and an evaluator, at second 1000: when their last answers came, who has begun, and who is taken for hanging."""
    monkeypatch.setattr(actors.time, "monotonic", lambda: 1000.0)
    busy, silent, since = [990 + i for i in range(actors.ANSWERS)], [700.0], actors.SILENCE
    for first, second, evaluator, begun, hanging in (
        (busy, silent, busy, True, [1]),
        (busy, silent, silent, True, [1]),  # an episode may be long
        (busy, silent, busy, False, []),  # it may wait for a CPU
        (busy, [1000 - since + 1], busy, True, []),
        (busy[1:], silent, busy, True, []),  # as slow as each other, for all that is known
        ([600.0, *busy[1:]], silent, busy, True, []),  # one of them was there before
        (silent, silent, busy, True, []),  # a learner that was held up, or a cluster
    ):
        slots = [actors.Slot(index, there=begun) for index in (0, 1, None)]
        for slot, answers in zip(slots, (first, second, evaluator), strict=True):
            slot.answers.extend(answers)
        found = [slot.index for slot in slots if actors.Actors._hangs(SimpleNamespace(slots=slots), slot)]
        assert found == hanging


@needs_ray
def test_a_killed_node_is_survived(begin, cluster, tmp_path):
    node = cluster.nodes.add_node(**cluster.node)
    raylet = node.all_processes["raylet"][0].process.pid
    try:
        process = begin(tmp_path)
        until(lambda: len(lines(tmp_path)) >= 2 and len(players()) == 3, process, tmp_path)
        assert raylet in players().values(), "none acts there"
        before = lines(tmp_path)[-1]["step"]
    finally:
        cluster.nodes.remove_node(node, allow_graceful=False)
    until(lambda: lines(tmp_path)[-1]["step"] > before + 1000, process, tmp_path)  # the others go on
    until(lambda: "is lost, another one takes its place" in (tmp_path / "log.txt").read_text(), process, tmp_path)
    until(lambda: lines(tmp_path)[-1]["actors"] == 2 and lines(tmp_path)[-1].get("evaluations"), process, tmp_path)
    finish(process, tmp_path)


@needs_ray
def test_a_killed_learner_goes_on_with_its_replay(begin, cluster, tmp_path):
    process = begin(tmp_path)
    until(lambda: len(list(tmp_path.glob("*-gym-*/checkpoints/step-*"))) >= 3 and players(), process, tmp_path)
    process.kill()
    process.wait()
    until(lambda: not players(), None, tmp_path)  # its actors end with it
    process = begin(tmp_path, "--resume", str(run_of(tmp_path)))  # the folder is not asked whom to trust
    until(lambda: process.poll() is not None, None, tmp_path)
    assert process.returncode == 2 and f"last at {cluster.address}; say where now" in (tmp_path / "log.txt").read_text()
    process = begin(tmp_path, "--resume", str(run_of(tmp_path)), "--ray-address", cluster.address)
    resumed = until(
        lambda: re.search(r"on from step ([\d,]+) of .*, with ([\d,]+) updates", (tmp_path / "log.txt").read_text()), process, tmp_path
    )
    step, updates = (int(number.replace(",", "")) for number in resumed.groups())
    until(lambda: lines(tmp_path)[-1]["step"] > step + 600, process, tmp_path)
    told = finish(process, tmp_path)
    assert step >= 800 and 0 <= 0.1 * (step - START) - updates < 15 and step in [line["step"] for line in told]


@needs_ray
@pytest.mark.parametrize(
    "code, says",
    [
        (
            "actors.__version__ = '0.0.1'",
            r"(actor \d|the evaluator) on \S+ has urlfast \S+, the learner 0\.0\.1; install the same urlfast on every machine",
        ),
        (
            "actors.fingerprint = lambda *a: 'another'",
            r"has other options, columns or networks: fingerprint \w{16}, the learner another; install",
        ),
        ("actors.PATIENCE = 0", r"--actors: none began within 0 s; each takes one CPU, and \d+ are free in the cluster"),
    ],
)
def test_an_actor_that_is_not_the_learners_is_refused(begin, tmp_path, code, says):
    process = begin(tmp_path, code=code)
    until(lambda: process.poll() is not None, None, tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert process.returncode == 1 and re.search("urlfast train: .*" + says, log) and "Traceback" not in log, log


@needs_ray
def test_actors_are_two_answers_ahead_of_the_learner_and_not_more(cluster):
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    config = train.parse(train.PRESETS["r2d2", "gym"]["discrete"], [*options, "--ray-address", cluster.address], "test")
    agent, env = train.make("r2d2", "gym", config)
    with closing(env):
        replay, counters = agent.make_replay(env.num_envs, 1000), train.Counters()
        env.begin(agent, replay, counters)
        frames = None
        while frames is None or not all(slot.there for slot in env.slots):  # an answer is empty where no sequence is whole
            env.advance(lambda: None)
            calls = [call for slot in env.slots[:2] if slot.there for _, call in slot.calls]
            ready, _ = env.ray.wait(calls, num_returns=len(calls), timeout=30) if calls else ([], [])
            assert len(ready) == actors.AHEAD * sum(slot.there for slot in env.slots[:2])
            chunks = [env.ray.get(call) for call in calls]
            assert all(chunk["version"] == 0 for chunk in chunks)
            frames = next((chunk["rows"]["observation"] for chunk in chunks if len(chunk["streams"])), None)
        assert not frames.flags.writeable and not frames.flags.owndata, "copied"
        env.line()
        counters.updates = 25  # of the policy that is broadcast next
        while not env.ages or env.ages[-1]:
            env.advance(lambda: None)
        assert env.ages.count(25) >= 2 * actors.AHEAD - 1 and set(env.ages) == {0, 25}
