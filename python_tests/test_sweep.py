"""`urlfast sweep`: what runs when, what a second call does, and what a killed or failing child leaves; on commands that take no time."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy_run
import tyro

from urlfast import actors, report, sweep, train
from urlfast.envs.atari import games
from urlfast.methods.cpt import VARIANTS
from urlfast.run import UsageError, UserError, read_json, runs_of
from urlfast.stats import GAME_SETS
from urlfast.sweep import READY, SweepConfig, jobs_of
from urlfast.transfer import TransferConfig

# Stands in for train, transfer and evaluate: writes what it was asked for, makes a run that has saved something, and ends as told.
FAKE = """
import json, os, pathlib, signal, sys, time
kind, *words = sys.argv[1:]
def option(name):
    return words[words.index(name) + 1] if name in words else None
with open(os.environ["JOURNAL"], "a") as file:
    file.write(json.dumps([kind, *words, os.getpid(), os.environ.get("OMP_NUM_THREADS")]) + "\\n")
if "--slow" in words:
    time.sleep(1)
resumed = "--resume" in words
if kind != "evaluate" and not resumed:
    run = pathlib.Path(option("--runs")) / f"{kind}-run"
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text(json.dumps({"config": {"steps": 10}}))
    (run / "metrics.jsonl").write_text('{"step": 5}\\n')
    if "--unsaved" not in words:
        (run / "checkpoints" / "step-000000005").mkdir(parents=True, exist_ok=True)
if "--die" in words and not resumed:
    os.kill(os.getpid(), signal.SIGKILL)
if "--fail" in words:
    sys.exit("fake: --fail was asked for")
if "--wait" in words:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("waits", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def journal(tmp_path, monkeypatch):
    """A function that gives what was run so far: [command, words..., process, threads]."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(
        sweep, "COMMANDS", {name: [sys.executable, "-S", str(tmp_path / "fake.py"), name] for name in ("train", "transfer", "evaluate")}
    )
    monkeypatch.setenv("JOURNAL", str(tmp_path / "journal"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sweep, "check", lambda jobs: None)  # who stands in has options of its own
    monkeypatch.setattr(sweep, "write_report", lambda folder: None)
    (tmp_path / "journal").touch()
    return lambda: [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]


def write(**found) -> str:
    Path("list.json").write_text(json.dumps(found))
    return "list.json"


CHAIN = dict(
    seeds=[1, 2],
    rows=[
        {"name": "pre", "train": "apt dmc --slow", "tasks": ["walker_stand", "hopper_hop"], "evaluate": None},
        {"name": "tuned", "transfer": "--rule whole", "after": "pre", "tasks": ["walker_run", "hopper_hop"], "evaluate": "--episodes 2"},
        {"name": "zero", "evaluate": "--epsilon 0", "after": "pre"},
        {"name": "other", "evaluate": [], "after": "pre", "tasks": ["walker_walk"]},
    ],
)


def test_what_follows_a_row_waits_for_its_run_and_a_second_call_skips_all(journal, capsys):
    assert sweep.sweep(SweepConfig(write(**CHAIN), jobs=20)) == 0
    ran = [shlex.join(words[:-2]) for words in journal()]
    assert len(ran) == 4 + 2 * 4 + 4 + 2
    place = "sweeps/list"
    for task, robot in (("walker_run", "walker_stand"), ("hopper_hop", "hopper_hop")):
        for seed in (1, 2):
            first = ran.index(f"train apt dmc --slow --env.task {robot} --seed {seed} --runs {place}/pre/{robot}-s{seed}")
            run, runs = f"{place}/pre/{robot}-s{seed}/train-run", f"{place}/tuned/{task}-s{seed}"
            second = ran.index(f"transfer {run} --rule whole --task {task} --seed {seed} --runs {runs}")
            third = ran.index(f"evaluate {runs}/transfer-run --episodes 2")
            assert first < second < third
            assert first < ran.index(f"evaluate {run} --epsilon 0")
    assert f"evaluate {place}/pre/walker_stand-s1/train-run --task walker_walk" in ran
    assert list(runs_of(place).values()) == ["pre"] * 4 + ["tuned"] * 4

    capsys.readouterr()
    assert sweep.sweep(SweepConfig("list.json")) == 0
    assert "14 jobs, 14 of them done before" in capsys.readouterr().out and len(journal()) == len(ran)
    assert sweep.sweep(SweepConfig("list.json", evaluate="--episodes 3")) == 0  # the evaluations are others, the runs are not
    assert {words[0] for words in journal()[len(ran) :]} == {"evaluate"}


def test_a_killed_child_is_named_and_resumed_by_the_next_call(journal, capsys):
    rows = [
        {"name": "a", "train": "apt atari --die"},
        {"name": "after a", "transfer": "", "after": "a"},
        {"name": "b", "train": "apt atari"},
    ]
    assert sweep.sweep(SweepConfig(write(seeds=[1], rows=rows))) == 1
    out = capsys.readouterr().out
    assert "failed: a, seed 1: train was killed by SIGKILL" in out and "sweeps/list/a/s1/log.txt" in out
    assert "failed: after a, seed 1: follows a, seed 1, which failed" in out and "2 of 3 failed" in out
    assert [words[0] for words in journal()] == ["train", "train", "evaluate"]  # b went on
    assert sweep.sweep(SweepConfig("list.json")) == 0
    ran = [words[:-2] for words in journal()[3:]]
    assert ran[0] == ["train", "--resume", "sweeps/list/a/s1/train-run"]
    assert sorted(words[0] for words in ran[1:]) == ["evaluate", "evaluate", "transfer"]


def test_a_failing_child_says_why_and_begins_anew_where_nothing_was_saved(journal, capsys):
    assert sweep.sweep(SweepConfig(write(seeds=[1], rows=[{"name": "a", "train": "apt atari --fail --unsaved"}]))) == 1
    out = capsys.readouterr().out
    assert "a, seed 1: train ended with status 1: fake: --fail was asked for" in out
    assert sweep.sweep(SweepConfig("list.json")) == 1
    assert [words[:2] for words in journal()] == [["train", "apt"]] * 2


def test_a_signal_is_passed_on_and_the_next_call_goes_on(journal, capsys):
    def interrupt():
        while not journal():
            time.sleep(0.02)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    rows = [{"name": "a", "train": "apt atari --wait"}, {"name": "b", "train": "apt atari"}]
    before, thread = signal.getsignal(signal.SIGTERM), threading.Thread(target=interrupt)
    thread.start()
    assert sweep.sweep(SweepConfig(write(seeds=[1], rows=rows))) == 128 + signal.SIGTERM
    thread.join()
    assert "stopped, and saved" in capsys.readouterr().out and len(journal()) == 1  # b did not begin
    assert signal.getsignal(signal.SIGTERM) is before  # Ray leaves one of its own in a process that has used it
    assert sweep.sweep(SweepConfig("list.json", rows=("b",))) == 0
    with pytest.raises(UserError, match=r"s1 was begun by `train .*, and is now to be `train .*--steps 5.*name another --folder"):
        sweep.sweep(SweepConfig("list.json", rows=("b",), train="--steps 5"))


def test_a_sweep_that_is_killed_leaves_no_child(journal, tmp_path):
    code = "import sys; from urlfast import sweep; sweep.COMMANDS['train'], sweep.check = sys.argv[2:], list; sweep.main([sys.argv[1]])"
    name = write(seeds=[1], rows=[{"name": "a", "train": "apt atari --wait"}])
    process = subprocess.Popen([sys.executable, "-c", code, name, *sweep.COMMANDS["train"]], env=toy_run.environment())
    log = tmp_path / "sweeps" / "list" / "a" / "s1" / "log.txt"
    while not (log.exists() and "waits" in log.read_text()):
        time.sleep(0.05)
        assert process.poll() is None
    process.kill()
    process.wait()
    child = journal()[0][-2]
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{child}/stat").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
        time.sleep(0.05)
    assert time.monotonic() < deadline
    assert read_json(Path("sweeps/list/a/s1/job.json"))["done"] == []


def test_jobs_run_side_by_side_and_share_the_threads(journal, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    place = sweep.Local(2)
    jobs = jobs_of({"seeds": [1, 2, 3], "rows": [{"name": "a", "train": "apt atari", "evaluate": None}]}, SweepConfig("x"), Path("f"))
    most = []
    start = place.start
    place.start = lambda *a: (most.append(sum(job.state == "runs" for job in jobs)), start(*a))[1]
    with sweep.Table(jobs) as table:
        sweep.run_jobs(jobs, place, lambda: 0, table)
    assert max(most) == 1 and {words[-1] for words in journal()} == {"4"}  # one ran when the second began, never two when a third did
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert sweep.Local(2).environment == {}


def test_what_a_command_said_last_is_found_in_a_box_too(tmp_path):
    log = tmp_path / "log.txt"
    assert sweep.last_line(log) == ""
    log.write_text("$ x\nfirst\nlast words\n\n")
    assert sweep.last_line(log) == "last words"
    log.write_text("$ x\n╭─ Unrecognized options ─╮\n│ Unrecognized options: --stepz │\n│ For full helptext ... │\n╰────╯\n")
    assert sweep.last_line(log) == "Unrecognized options: --stepz"


@pytest.mark.parametrize("found, says", [
    ({"rows": []}, "rows: must be a list of objects"),
    ({"rows": [{"name": "a", "train": "apt dmc"}], "sedes": [1]}, "unknown 'sedes', did you mean 'seeds'"),
    ({"rows": [{"name": "a", "trian": "apt dmc"}]}, "row 'a': unknown 'trian', did you mean 'train'"),
    ({"rows": [{"name": "a"}]}, "must have one of train, transfer, evaluate"),
    ({"rows": [{"name": "a", "train": "apt"}]}, "must begin with a method and a domain"),
    ({"rows": [{"name": "a", "train": "apt 'dmc"}]}, "row 'a': train: No closing quotation"),
    ({"rows": [{"name": "a", "train": 3}]}, "train: must be a string, or a list of strings, got 3"),
    ({"rows": [{"name": "a", "train": "apt dmc", "seeds": 3}]}, "seeds: must be a list of whole numbers, got 3"),
    ({"rows": [{"name": "a", "train": "apt dmc", "tasks": [""]}]}, "tasks: must be a list of names"),
    ({"rows": [{"name": "a", "train": "apt dmc", "after": "a"}]}, "a training follows no row"),
    ({"rows": [{"name": "a", "transfer": "", "after": "b"}]}, "after: must name a row above it, got 'b'"),
    ({"rows": [{"name": "a", "transfer": ""}]}, "after: must name a row above it, got None"),
    ({"rows": [{"name": "a b", "train": "apt dmc"}, {"name": "a_b", "train": "apt dmc"}]}, "two names make the same folder"),
    ({"rows": [{"name": "a", "train": "apt dmc", "tasks": ["walker_run", "hopper_hop"]}, {"name": "b", "transfer": "", "after": "a"}]},
     "row 'b': after: no single run there for it with seed 1: it has walker_run s1"),
])  # fmt: skip
def test_a_list_that_cannot_be_run_says_why(found, says):
    with pytest.raises(UserError) as error:
        jobs_of(found, SweepConfig("x"), Path("f"))
    assert says in str(error.value)


@pytest.mark.parametrize("row, says", [
    ({"train": "drq atari", "tasks": ["hard6", "brakout"]}, "game: no game is called 'brakout'; the nearest are breakout"),
    ({"train": "drq atari --env.game brakout"}, "game: no game is called 'brakout'; the nearest are breakout"),
    ({"train": "drq atari", "tasks": ["joust"]}, "ROM of 'joust' for one player"),
    ({"train": "apt dmc", "tasks": ["hopper_hop", "walker_wlak"]}, "task: no task is called 'walker_wlak'; the nearest are walker_walk"),
    ({"train": "apt gym", "tasks": ["CartPol-v1"]}, "id: Environment `CartPol` doesn't exist"),
    ({"train": "apt gym"}, "--env.id: which environment?"),
    ({"train": "aptt atari"}, "unknown method 'aptt', did you mean 'apt'"),
    ({"train": "apt atari --preset mini"}, "--preset: unknown 'mini', did you mean 'mini_apt'"),
    ({"train": "apt atari --batch-size 0"}, "--batch-size: must be at least 2, got 0"),
    ({"transfer": "", "after": "first", "tasks": ["brakout"]}, "no game is called 'brakout'"),
    ({"transfer": "--task brakout", "after": "first"}, "no game is called 'brakout'"),
    ({"transfer": "--rule ctp", "after": "first"}, "--rule: unknown 'ctp', did you mean 'cpt'"),
    ({"transfer": "", "after": "first", "evaluate": "--task brakout"}, "no game is called 'brakout'"),
    ({"evaluate": "", "after": "first", "tasks": ["brakout"]}, "no game is called 'brakout'"),
])  # fmt: skip
def test_a_typo_in_the_last_row_is_told_before_the_first_run(row, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "COMMANDS", {name: ["false"] for name in sweep.COMMANDS})
    name = write(seeds=[1], rows=[{"name": "first", "train": "apt atari"}, {"name": "last", **row}])
    for options in (SweepConfig(name), SweepConfig(name, dry_run=True)):
        with pytest.raises(UsageError) as error:
            sweep.sweep(options)
        assert str(error.value).startswith("row 'last': ") and says in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("row", [
    {"train": "apt atari --stepz 5"}, {"transfer": "--stepz 5", "after": "first"}, {"train": "apt atari", "evaluate": "--episods 5"},
])  # fmt: skip
def test_options_that_are_none_are_told_before_the_first_run(row, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "COMMANDS", {name: ["false"] for name in sweep.COMMANDS})
    name = write(seeds=[1], rows=[{"name": "first", "train": "apt atari"}, {"name": "last", **row}])
    with pytest.raises(SystemExit) as exit:
        sweep.sweep(SweepConfig(name))
    assert exit.value.code == 2 and "(row 'last')" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", READY)
def test_ready_sweeps_name_what_there_is(name):
    sweep.check(jobs_of(READY[name], SweepConfig(name, seeds=(1,)), Path("f")))


def test_files_that_are_none_are_named(journal):
    Path("broken.json").write_text("{")
    for name, says in (
        ("apt-ablation", "did you mean 'apt-ablations'"),
        ("broken.json", "broken.json: Expecting"),
        ("no.json", "No such file"),
    ):
        with pytest.raises(UserError, match=says):
            sweep.sweep(SweepConfig(name))


@pytest.mark.parametrize("name", READY)
def test_ready_sweeps_are_commands_that_the_options_know(name):
    """A change of an option's name must be made here too: parsing refuses those that are not known."""
    jobs = jobs_of(READY[name], SweepConfig(name, seeds=(1,)), Path("f"))
    seen = set()
    for job in jobs:
        kind, *words = job.stages()[0]
        if (job.row, kind) in seen:
            continue
        seen.add((job.row, kind))
        if kind == "train":
            method, domain, preset = train.pick(words)
            config = train.parse(train.PRESETS[method, domain][preset], words, "x")
            assert config.env.name == job.task and config.seed == 1
        else:
            method, domain = job.after.words[:2]
            task = "aps-task" if method == "aps" else "drq" if domain == "atari" else "ddpg"
            default = next(iter(train.PRESETS[task, domain].values()))
            options = {name: getattr(default, name) for name in train.TrainConfig.__dataclass_fields__}
            assert tyro.cli(TransferConfig, default=TransferConfig(**options), args=words).task == job.task
            assert job.after.task.split("_")[0] == job.task.split("_")[0]
    rows = [row["name"] for row in READY[name]["rows"]]
    if name == "apt-ablations":
        assert len(jobs) == 26 * (2 * 7 + 1) and "random head" in rows
        plain, changed = (
            train.parse(train.PRESETS["apt", "atari"]["paper"], next(j for j in jobs if j.row == row).words[2:], "x")
            for row in ("APT, pre-training", "without architecture change, pre-training")
        )
        assert plain.method.encoder.spectral_norm and changed.method.encoder == type(changed.method.encoder)()
    elif name == "urlb":
        assert len(jobs) == 2 * (3 + 12) + 12
    elif name == "cpt-ablations":
        ruled = {row["transfer"].split()[1] for row in READY[name]["rows"] if "transfer" in row}
        assert ruled == VARIANTS.keys() - {"eps-z-greedy"} and len(jobs) == 12 * (1 + 6 + 3)


def test_tasks_and_rows_choose_and_bring_what_they_follow():
    options = SweepConfig("urlb", seeds=(7,), tasks=("walker_run",), rows=("APS", "DDPG"), train="--steps 5", transfer="--steps 4")
    jobs = jobs_of(READY["urlb"], options, Path("f"))
    assert [(job.row, job.task) for job in jobs] == [
        ("APS, pre-training", "walker_stand"), ("APS", "walker_run"), ("DDPG", "walker_run"),
    ]  # fmt: skip
    assert jobs[0].words[-2:] == ["--steps", "5"] and jobs[1].words == ["--steps", "4"]
    with pytest.raises(UserError, match="--tasks: no row has pong"):
        jobs_of(READY["urlb"], SweepConfig("urlb", tasks=("pong",)), Path("f"))


def test_sets_of_games_stand_for_their_games(journal):
    known = set(games())
    assert {name: len(of) for name, of in GAME_SETS.items()} == {"hard6": 6, "ablation12": 12, "atari26": 26, "atari57": 57}
    assert all(set(of) <= known for of in GAME_SETS.values())
    found = {"seeds": [1], "tasks": ["hard6", "pong", "venture"], "rows": [{"name": "r", "train": "drq atari"}]}
    jobs = sweep.jobs_of(found, sweep.SweepConfig("s"), Path("x"))
    assert [job.task for job in jobs] == [*GAME_SETS["hard6"], "pong"]
    chosen = sweep.jobs_of(found, sweep.SweepConfig("s", tasks=("ablation12",)), Path("x"))
    assert [job.task for job in chosen] == ["montezuma_revenge", "private_eye", "gravitar", "pong"]
    own = {"seeds": [1], "rows": [{"name": "r", "train": "drq atari"}]}
    assert len(sweep.jobs_of(own, sweep.SweepConfig("s", tasks=("atari26",)), Path("x"))) == 26


def test_a_dry_run_prints_and_does_nothing(journal, capsys):
    arguments = [write(**CHAIN), "--dry-run", "--seeds", "1", "--train", "--batch-size 3", "--evaluate=--epsilon 1"]
    assert sweep.run_sweep(arguments) == 0
    out = capsys.readouterr().out
    assert "urlfast train apt dmc --slow --batch-size 3 --env.task walker_stand --seed 1" in out and "--epsilon 0 --epsilon 1" in out
    assert "urlfast transfer '<pre, walker_stand, seed 1>' --rule whole --task walker_run --seed 1" in out
    assert not Path("sweeps").exists() and not journal()


# Ray ------------------------------------------------------------------------------------------------------------------


def test_ray_is_asked_for_where_it_is_missing_or_silent(monkeypatch):
    monkeypatch.setattr(actors, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--ray: Ray is not installed; pip install 'urlfast\[ray\]'"):
        sweep.Ray("local", 1)
    monkeypatch.setattr(actors, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    began = time.monotonic()
    with pytest.raises(UserError, match=r"--ray: no cluster answers at 127\.0\.0\.1:1: "):
        sweep.Ray("127.0.0.1:1", 1)
    with pytest.raises(UsageError, match="--ray: must be local, or a host:port, got 'somewhere'"):
        sweep.Ray("somewhere", 1)
    assert time.monotonic() - began < 10


def test_ray_runs_the_same_commands(journal, monkeypatch, capsys):
    """On a stand-in that runs a task when it is first asked for."""

    class RayError(Exception):
        pass

    class Task:
        def __init__(self, call):
            self.call = call

    asked = []
    ray = SimpleNamespace(
        init=lambda **options: asked.append(options["address"]),
        remote=lambda **_: lambda f: SimpleNamespace(remote=lambda *a: Task(lambda: f(*a))),
        wait=lambda tasks, timeout: (tasks, []),
        get=lambda task: task.call(),
        shutdown=lambda: asked.append("shutdown"),
        exceptions=SimpleNamespace(RayError=RayError, TaskCancelledError=type("T", (RayError,), {})),
    )
    monkeypatch.setattr(actors, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setitem(sys.modules, "ray", ray)
    rows = [{"name": "a", "train": "apt atari"}, {"name": "b", "train": "apt atari --fail"}]
    assert sweep.sweep(SweepConfig(write(seeds=[1], rows=rows), ray="local")) == 1
    assert sorted(words[0] for words in journal()) == ["evaluate", "train", "train"]
    assert asked == ["local", "shutdown"] and "failed: b, seed 1: train ended with status 1" in capsys.readouterr().out


# The real commands, on the toy world ----------------------------------------------------------------------------------


def test_the_toy_world_killed_resumed_evaluated_and_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", toy_run.environment()["PYTHONPATH"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    evaluate = [sys.executable, "-c", "import toy_run; from urlfast import evaluate; evaluate.main()"]
    monkeypatch.setattr(sweep, "COMMANDS", {"train": toy_run.COMMAND, "evaluate": evaluate})
    monkeypatch.setattr(report, "load_particles", lambda run: None)
    monkeypatch.setitem(sweep.TASK_OPTION, "corridor", "--env.game")
    name = write(
        seeds=[1], tasks=["pong"], evaluate="--episodes 2 --no-video", rows=[{"name": "Toy, as it is", "train": "toy corridor --steps 120"}]
    )
    monkeypatch.setenv("TOY_SIGNAL", "40:SIGKILL")  # after the checkpoint at 40 steps
    assert sweep.sweep(SweepConfig(name)) == 1
    assert "train was killed by SIGKILL" in capsys.readouterr().out
    monkeypatch.delenv("TOY_SIGNAL")
    assert sweep.sweep(SweepConfig(name)) == 0
    folder = Path("sweeps/list")
    assert "on from step" in (folder / "Toy_as_it_is" / "pong-s1" / "log.txt").read_text()
    (run,) = runs_of(folder)
    assert [e["step"] for e in read_json(run / "results.json")["evaluations"]] == [120, 120]
    assert "report.html" in capsys.readouterr().out and (folder / "report.html").exists()
    words = [story.row for story in report.read_all([folder])]
    assert words == ["Toy, as it is"]
