"""A run's folder: its lock, its metrics after a rollback, and how it is found."""

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Literal

import pytest
import toy_run

from urlfast import run as run_module
from urlfast.run import (
    Metrics,
    Progress,
    Run,
    UsageError,
    UserError,
    flat,
    from_dict,
    human_bytes,
    human_time,
    one_line,
    open_plain,
    read_json,
    read_metrics,
    unsaid,
    write_json,
)

CONFIG = {"method": "toy", "domain": "corridor", "config": {"method": {}, "env": {}}}


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "runs", "toy-corridor-pong-s1", CONFIG)


HOLDER = r"""
import sys, time, os
from urlfast.run import Run
with Run(sys.argv[1]).locked():
    if sys.argv[2] == "fork" and os.fork() == 0:
        os.write(1, b"child %d\n" % os.getpid())
        time.sleep(60)
        os._exit(0)
    os.write(1, b"held %d\n" % os.getpid())
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_run_in_use_is_refused_and_free_once_its_process_was_killed(run, how):
    """Also where a worker that it forked lives on."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, run.folder, how], env=toy_run.environment(), stdout=subprocess.PIPE, text=True)
    pids = dict(holder.stdout.readline().split() for _ in range(2 if how == "fork" else 1))
    assert pids.keys() == ({"held", "child"} if how == "fork" else {"held"})
    try:
        with pytest.raises(UserError, match=f"in use by process {holder.pid}"), run.locked():
            pass
        holder.kill()
        holder.wait()
        with run.locked():
            assert (run.folder / ".lock").read_text() == f"{os.getpid()}\n"
    finally:
        holder.kill()
        if how == "fork":
            os.kill(int(pids["child"]), signal.SIGKILL)


def test_a_lock_is_no_way_out_of_the_folder(run, tmp_path):
    (tmp_path / "precious").write_text("mine")
    lock = run.folder / ".lock"
    lock.symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"cannot write to .* is a link"), run.locked():
        pass
    assert (tmp_path / "precious").read_text() == "mine"
    lock.unlink()
    lock.write_bytes(b"\xff left by someone else")
    with run.locked():
        assert lock.read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("name", ["checkpoints", "replay", "videos"])
def test_a_run_whose_folders_lead_elsewhere_is_refused(run, tmp_path, name):
    (run.folder / name).rmdir()
    (run.folder / name).symlink_to(tmp_path)
    with pytest.raises(UserError, match=f"{name} is not a folder but a link"):
        Run.find(run.folder)


def test_a_config_that_lies_elsewhere_is_not_read(run, tmp_path):
    config = run.folder / "config.json"
    config.symlink_to(config.rename(tmp_path / "config.json"))
    with pytest.raises(UserError, match=r"config\.json"):
        Run(run.folder).config  # noqa: B018


def make_fifo(path):
    os.mkfifo(path)


@pytest.mark.parametrize("make, says", [
    (make_fifo, "is not a plain file"), (os.mkdir, "not a plain file|Is a directory"),
    (lambda path: path.symlink_to("/dev/zero"), "is a link"), (lambda path: path.symlink_to(path), "is a link"),
])  # fmt: skip
def test_what_is_not_a_plain_file_is_not_opened(run, make, says):
    path = run.folder / "metrics.jsonl"
    make(path)
    for mode in ("rb", "ab"):
        with pytest.raises(OSError, match=says if mode == "rb" else None):
            open_plain(path, mode)
    with pytest.raises(UserError, match=f"{path} cannot be read"):
        read_metrics(run.folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 40 + "]" * 40, "\xff", "{"])
def test_json_that_no_run_has_is_a_value_error(text, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError):
        read_json(tmp_path / "config.json")
    with pytest.raises(UserError, match="is not a run of urlfast"):
        Run(tmp_path).config  # noqa: B018


def test_runs_of_one_second_have_folders_of_their_own(tmp_path):
    runs = [Run.create(tmp_path, "toy", {**CONFIG, "n": n}) for n in range(3)]
    assert len({run.folder for run in runs}) == 3
    assert [run.config["n"] for run in runs] == [0, 1, 2]


def test_a_run_is_found_by_path_and_by_name_and_an_unknown_one_is_answered_with_the_nearest(run):
    runs = run.folder.parent
    assert Run.find(run.folder).folder == run.folder
    assert Run.find(run.name, runs).folder == run.folder
    with pytest.raises(UsageError, match=f"the nearest: {run.name}$"):
        Run.find(run.name[:-1], runs)
    others = [Run.create(runs, f"apt-dmc-task_{n}-s1", CONFIG).name for n in range(9)]
    with pytest.raises(UsageError) as error:  # of those that are near, and of a few
        Run.find(others[7][:-1], runs)
    near = str(error.value).partition("the nearest: ")[2].split(", ")
    assert near[0] == others[7] and len(near) == 5 and run.name not in near
    for name in ("", "x" * 5000, "a\0b", "\udc80"):
        with pytest.raises(UserError, match="no run "):
            Run.find(name, runs)


def test_what_a_resume_will_do_again_is_taken_from_the_logs(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(run.folder, 0) as metrics:
        for step in (10, 20, 30):
            metrics.log({"step": step, "score": float(step), "quantiles": [1.0, 2.0]})
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "sco')  # torn by a kill
    with Metrics(run.folder, 20) as metrics:
        metrics.log({"step": 30, "score": -30.0, "quantiles": [3.0, 4.0]})
    assert [(line["step"], line["score"]) for line in read_metrics(run.folder)] == [(10, 10.0), (20, 20.0), (30, -30.0)]
    board = EventAccumulator(str(run.folder)).Reload()
    assert [(point.step, point.value) for point in board.Scalars("score")] == [(10, 10.0), (20, 20.0), (30, -30.0)]
    assert [point.value for point in board.Scalars("quantiles/1")] == [2.0, 2.0, 4.0]


def test_damaged_lines_are_left_out_and_numbers_alone_are_kept(run):
    good = {"step": 10, "score": 1.5, "quantiles": [1.0, 2.0]}
    lines = [
        b"[3]",
        b'"step"',
        b'{"step": "10"}',
        b'{"step": -1}',
        b'{"step": 1e3}',
        b'{"score": 2}',
        b"\xff\xfe",
        b"[" * 100_000,
        b"",
        b"\0",
    ]
    damaged = {**good, "step": 20, "text": "<script>", "none": None, "deep": [[1]], "huge": 10**40, "object": {}, "on": True}
    (run.folder / "metrics.jsonl").write_bytes(b"\n".join([*lines, json.dumps(good).encode(), json.dumps(damaged).encode(), *lines]))
    assert read_metrics(run.folder) == [good, {**good, "step": 20}]
    with Metrics(run.folder, 15):
        assert (run.folder / "metrics.jsonl").read_text() == json.dumps(good) + "\n"


def test_points_are_written_whole_or_refused(tmp_path):
    """Where a limit or the end of the disk lies within a write, a file of Python's writes a part, and raises at the next one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with run_module.WholeWrites(tmp_path / "events", "x") as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            assert file.write(b"x" * 600) == 600
            with pytest.raises(OSError) as error:
                file.write(b"x" * 600)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno in run_module.FULL_DISK


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@dataclass(frozen=True)
class Inner:
    lr: float = 0.1
    widths: tuple[tuple[int, int], ...] = ((1, 2), (3, 4))


@dataclass(frozen=True)
class Outer:
    method: Inner = Inner()
    env: Inner = Inner()
    num_envs: int = 8


def test_a_config_comes_back_from_json():
    config = Outer(method=Inner(0.2, ((5, 6),)), num_envs=4)
    assert from_dict(Outer(), json.loads(json.dumps(asdict(config)))) == config
    assert flat(config) == {"lr": 0.2, "widths": ((5, 6),), "env.lr": 0.1, "env.widths": ((1, 2), (3, 4)), "num-envs": 4}
    with pytest.raises(UserError, match="unknown option 'num_env' of Outer, did you mean 'num_envs'"):
        from_dict(Outer(), {"num_env": 3})


def test_options_that_an_older_config_lacks_are_named():
    saved = json.loads(json.dumps(asdict(Outer())))
    assert unsaid(Outer(), saved) == {}
    del saved["num_envs"], saved["method"]["lr"], saved["env"]["widths"]
    assert unsaid(Outer(), saved) == {"lr": 0.1, "env.widths": ((1, 2), (3, 4)), "num-envs": 8}
    del saved["env"]
    assert unsaid(Outer(), saved) == {"lr": 0.1, "env.lr": 0.1, "env.widths": ((1, 2), (3, 4)), "num-envs": 8}


@dataclass(frozen=True)
class Typed:
    count: int = 1
    rate: float = 0.5
    clip: float | None = 1.0
    name: str = "a"
    on: bool = True
    kind: Literal["x", "y"] = "x"
    widths: tuple[int, ...] = (1,)
    inner: Inner = Inner()

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"count: must be at least 0, got {self.count}")


@pytest.mark.parametrize("option, values", [
    ("count", [-1, 1.0, True, "1", None, 10**30, [1], {}, float("nan")]),
    ("rate", ["x", True, None, float("nan"), float("inf"), 10**400, [0.5]]),
    ("clip", ["x", False, float("nan"), [], {}]),
    ("name", [1, None, ["a"], {}]),
    ("on", [1, "true", None]),
    ("kind", ["z", 1, ["x"], None]),
    ("widths", [1, "12", [1.0], [[1]], {"0": 1}, [None]]),
    ("inner", [1, [], "x", {"lr": "x"}, {"widths": [[1]]}, {"more": 1}]),
])  # fmt: skip
def test_a_value_of_another_type_or_range_is_one_line_that_names_the_option(option, values):
    assert from_dict(Typed(), {"clip": None, "rate": 2, "widths": []}) == Typed(clip=None, rate=2, widths=())
    for value in values:
        with pytest.raises(UserError, match=rf"config\.json: (unknown option )?'?({option}|lr|widths|more)"):
            from_dict(Typed(), {option: value})


def test_an_error_is_one_line_whatever_it_quotes():
    assert one_line("a\n\tb\x1b[31m \udc80 é\0") == "a b\\x1b[31m \\udc80 é\\x00"
    assert len(one_line("x" * 10**6)) <= 1000


def test_units():
    assert [human_bytes(n) for n in (999, 1500, 7.06e9, 2e12)] == ["999 B", "1.5 kB", "7.1 GB", "2.00 TB"]
    assert [human_time(s) for s in (0.4, 59, 95, 7200, 90_000)] == ["0 s", "59 s", "1 min 35 s", "2 h", "1 d 1 h"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_says_steps_rate_time_left_and_the_numbers_that_matter(stream):
    out = stream()
    with Progress(100, stream=out) as progress:
        progress.log({"step": 50, "steps_per_second": 5.0, "score": 12.5, "grad_norm": 3.0})
        progress.tick(50)
    said = out.getvalue()
    assert "step 50 of 100 (50.0%)" in said and "score 12.5" in said and "grad" not in said
    if stream is io.StringIO:
        assert "5/s  10 s left" in said


def test_progress_ends_at_all_steps_and_foretells_nothing_before_learning():
    out = io.StringIO()
    with Progress(20, 8, out) as progress:
        progress.log({"step": 8, "steps_per_second": 1000.0})
        progress.log({"step": 24, "steps_per_second": 4.0})
    first, last = out.getvalue().splitlines()
    assert "learning begins at 8" in first and "left" not in first
    assert "step 24 of 20 (100.0%)  4/s  0 s left" in last


def test_progress_of_episodes_says_so_from_the_first_one_on():
    out = Terminal()
    with Progress(5, stream=out, of="agent: episode") as progress:
        progress.tick(0)
        progress.tick(5)  # too soon to be shown
        progress.log({"step": 5, "steps_per_second": 2.0, "score": 1.5})
    assert "agent: episode 0 of 5 (0.0%)" in out.getvalue() and "learning" not in out.getvalue()
    assert out.getvalue().rpartition("agent: ")[2].startswith("episode 5 of 5 (100.0%)  2/s  0 s left  score 1.5")


@pytest.mark.parametrize("error, status, line", [
    (UserError("no such thing"), 1, "urlfast toy: no such thing\n"),
    (run_module.UsageError("which?"), 2, "urlfast toy: which?\n"),
    (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 1, "urlfast toy: No space left on device: runs/x\n"),
])  # fmt: skip
def test_a_foreseen_error_is_one_line(capsys, error, status, line):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as exit:
        run_module.command("toy", main, [])
    assert exit.value.code == status and capsys.readouterr().err == line


def test_a_bug_shows_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_module.command("toy", lambda argv: 1 / 0, [])
