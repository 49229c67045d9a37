"""What a damaged, foreign or forged run's folder can do to the commands that open it: nothing but one clear line.

    python stress/hostile_run.py [--rounds 2000] [--seed 0] [--only NAME]

Every case damages a fresh copy of one small run and opens it in this process, under a limit of memory and of time. It passes where what was
written is used, or the damaged file is refused by name and the checkpoint before it is used, or the command ends in one line: no traceback,
no hang, nothing outside of the run's folder read or changed (what is read shows in its time of access), nothing executed.
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "python_tests"))

import toy_run
from forged import Call, sign

from urlfast import checkpoint, evaluate, report, train
from urlfast.checkpoint import checkpoints, read_latest
from urlfast.run import read_metrics

STEPS, CANARY = 400, "what-lies-outside"
JUNK = [
    None, True, -1, 0, 3, 10**18, 10**30, -(10**400), 0.5, -2.5, 1e308, float("nan"), float("inf"), "", "a", "../../x",
    "/etc/passwd", "\x1b[31m\n\0é", "<script>alert(1)</script>\"'", "x" * 10_000, [], {}, [None], [[[]]], [1e308] * 3,
    {"a": {"b": []}}, ["a", 1], {"": ""},
]  # fmt: skip


class Toy(toy_run.Toy):
    """One with an intrinsic reward, so that a report has its particles."""

    device = "cpu"

    def intrinsic_reward(self, observation):
        z = observation.float().flatten(1)[:, 60:64] / 255 + self.weight.detach()[0]
        return z.sum(1), z


class Executed(Exception):
    pass


def executed(*_):
    raise Executed("a file was executed")


# Ways to damage a file -----------------------------------------------------------------------------------------------


def foreign(path: Path, kind: str, outside: Path) -> None:
    """Something else where `path` was, or the way to it from elsewhere."""
    if kind == "own link":  # all is right with it but where it lies
        path.symlink_to(path.rename(outside / "own"))
        return
    checkpoint._remove(path)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
        (path / "a").write_text("b")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name[:100])
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "nowhere":
        path.symlink_to(outside / "new")
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "link":
        path.symlink_to(outside / "file")
    elif kind == "link to a folder":
        path.symlink_to(outside / "folder")
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", b"b")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Call(executed, ())))
    elif kind == "png":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))
    elif kind == "deep":
        path.write_bytes(b"[" * 1_000_000)
    elif kind == "deep object":
        path.write_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
    elif kind == "torch":
        torch.save({"someone": "else's"}, buffer := io.BytesIO())
        path.write_bytes(buffer.getvalue())
    elif kind == "bytes":
        path.write_bytes(bytes(range(256)) * 10)
    else:
        raise ValueError(kind)


FOREIGN = ["empty", "folder", "fifo", "socket", "loop", "nowhere", "zero", "link", "link to a folder", "zip", "pickle", "png", "deep",
           "deep object", "torch", "bytes", "own link"]  # fmt: skip


def leaves(value, path=()):
    """Paths of all entries of nested dicts and lists, inner ones too."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from leaves(entry, (*path, key))


def put(value, path, new):
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def get(value, path):
    for key in path:
        value = value[key]
    return value


# What opens a run ----------------------------------------------------------------------------------------------------


def resume(folder: Path):
    train.main(["--resume", str(folder)])


def make_report(folder: Path):
    report.main([str(folder)])
    page = (folder / "report.html").read_text()
    assert "<script" not in page and CANARY not in page


def make_evaluation(folder: Path):
    evaluate.main([str(folder), "--episodes", "2", "--no-video"])


COMMANDS = {"resume": resume, "report": make_report, "evaluate": make_evaluation}


class TooLong(BaseException):  # whatever it interrupts, no handler of a command's takes it for an error of its own
    pass


def run_command(name: str, folder: Path) -> str:
    """'ok' or the one line that the command ended in; anything else is raised."""
    out, error = io.TextIOWrapper(io.BytesIO()), io.StringIO()

    def late(*_):
        raise TooLong

    signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            COMMANDS[name](folder)
    except SystemExit as exit:
        status = exit.code or 0
    finally:
        signal.alarm(0)
    said = error.getvalue()
    if status in (0, 130):
        return "ok"
    if status == 2 and not said.startswith("urlfast "):
        assert "Traceback" not in said
        return "refused by the parser of options"
    lines = [line for line in said.splitlines() if not line.startswith("refused: ")]
    assert len(lines) == 1 and lines[0].startswith("urlfast ") and len(lines[0]) < 1500, said[:3000]
    return lines[0]


class Cases:
    """Runs cases on fresh copies of a run, and keeps what went wrong."""

    def __init__(self, run: Path, place: Path):
        self.run, self.place, self.outside = run, place, place / "outside"
        self.done, self.failures, self.seen = Counter(), [], Counter()
        (self.outside / "folder").mkdir(parents=True)
        for path in (
            self.outside / "file",
            self.outside / "folder" / "rows-000001-0123456789ab.bin",
            self.outside / "folder" / ".step-1.tmp",
        ):
            path.write_text(CANARY)
        self.before = self._outside()
        (self.outside / "file").read_bytes()
        if self._read(self.before) != [self.outside / "file"]:
            sys.exit(f"{place}: must lie where the time of access is kept, and this file system is mounted without")

    def _outside(self):
        """What lies there; from now on `_read` names what of it was read."""
        content = {path: path.read_bytes() if path.is_file() else None for path in sorted(self.outside.rglob("*"))}
        for path in content:
            os.utime(path, ns=(0, path.stat().st_mtime_ns), follow_symlinks=False)
        return content

    def _read(self, content):
        return [path for path in content if path.lstat().st_atime_ns]

    def _tidy(self):
        for path in self.outside.rglob("*"):
            if path not in self.before:
                checkpoint._remove(path)
        for path, content in self.before.items():
            if content is not None:
                path.write_bytes(content)

    @contextlib.contextmanager
    def copy(self):
        folder = self.place / self.run.name
        shutil.copytree(self.run, folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)
            for path in self.place.glob(".*"):
                checkpoint._remove(path)

    def case(self, kind: str, what, damage, check) -> None:
        self.done[kind] += 1
        try:
            with self.copy() as folder:
                damage(folder)
                before = self._outside()
                says = check(folder)
                self.seen[kind, says.replace(str(self.place), "")[:60] if says else ""] += 1
                assert not self._read(before), f"read outside of the run: {self._read(before)}"
            assert self._outside() == before, "something outside was changed"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.failures.append((kind, what))
            print(f"FAILED {kind}: {str(what)[:200]}\n{traceback.format_exc()[-1800:]}", flush=True)
        finally:
            self._tidy()


def read_back(folder: Path, path: Path, honest: dict) -> str:
    """The checkpoint before the damaged one is used, and the damaged file named; only a manifest's white space may become another."""
    said = []
    found = read_latest(folder, replay=True, say=said.append)
    if found.step == honest["step"]:
        assert path.name == "manifest.json" and not path.is_symlink() and json.loads(path.read_bytes()) == honest["manifest"]
        assert not said and found.segments == honest["segments"] and found.state.keys() == honest["state"].keys()
        return "the same"
    assert found.step == honest["before"] and len(said) == 1 and str(path) in said[0], (found.step, said)
    return "refused"


# The cases -----------------------------------------------------------------------------------------------------------


def victims(folder: Path) -> dict[str, Path]:
    newest, before, *_ = checkpoints(folder)
    names = set(checkpoint._read_manifest(newest / "manifest.json")["segments"])
    only = sorted(names - set(checkpoint._read_manifest(before / "manifest.json")["segments"]))
    files = {name: newest / name for name in ("state.pt", "manifest.json", "replay.json")}
    return files | {name.partition("-")[0]: folder / "replay" / name for name in only}


def damaged(cases: Cases, chance: random.Random, rounds: int) -> None:
    newest, before, *_ = checkpoints(cases.run)
    honest = checkpoint.read(newest, replay=True)
    honest = {"step": honest.step, "segments": honest.segments, "state": honest.state, "before": checkpoint.step_of(before)}
    honest["manifest"] = json.loads((newest / "manifest.json").read_bytes())
    with cases.copy() as folder:  # one copy for all: only a file changes
        for name, path in victims(folder).items():
            data = path.read_bytes()
            flips = range(len(data)) if len(data) <= rounds * 2 else sorted(chance.sample(range(len(data)), rounds))
            cuts = (
                range(len(data))
                if len(data) <= rounds
                else sorted({*range(64), *chance.sample(range(len(data)), rounds // 4), len(data) - 1})
            )
            for kind, points in (("flip", flips), ("cut", cuts), ("append", [1, 4096])):
                for at in points:
                    changed = bytearray(data)
                    if kind == "flip":
                        changed[at] ^= 1 << chance.randrange(8)
                    changed = changed[:at] if kind == "cut" else changed + bytes(at) if kind == "append" else changed
                    path.write_bytes(changed)
                    cases.done[f"{kind} {name}"] += 1
                    try:
                        cases.seen[f"{kind} {name}", read_back(folder, path, honest)] += 1
                    except Exception:
                        cases.failures.append((kind, name, at))
                        print(f"FAILED {kind} {name} at {at}\n{traceback.format_exc()[-1500:]}", flush=True)
            path.write_bytes(data)
    for name, path in victims(cases.run).items():
        for kind in FOREIGN:
            relative = path.relative_to(cases.run)
            cases.case(
                f"foreign {name}",
                kind,
                lambda folder, kind=kind, relative=relative: foreign(folder / relative, kind, cases.outside),
                lambda folder, relative=relative: read_back(folder, folder / relative, honest),
            )


def foreign_files(cases: Cases) -> None:
    """Something else in place of every file and folder of the run, and everything opens it."""
    names = [
        *(str(path.relative_to(cases.run)) for path in cases.run.rglob("*")),
        ".lock",
        ".evaluate.lock",
        "results.json",
        ".metrics.jsonl",
    ]
    names += ["videos/a.mp4", "report.html", "replay/x", "replay/.rows-1.bin"]
    names += [f"checkpoints/{name}" for name in (".step-000000999.tmp", "step-000000999", "step-x", "step-" + "9" * 18)]
    names += [f"checkpoints/.refused-step-{name}" for name in ("x", "000000001")]
    for name in sorted(set(names)):
        for kind in FOREIGN:
            if kind == "own link" and not (cases.run / name).exists():
                continue
            for command in COMMANDS:

                def damage(folder, name=name, kind=kind):
                    foreign(folder / name, kind, cases.outside)

                cases.case(f"foreign, {command}", (name, kind), damage, lambda folder, command=command: run_command(command, folder))


def forged_json(cases: Cases, chance: random.Random, rounds: int, file: str) -> None:
    """Other values in a JSON file; a checkpoint's is signed anew."""
    newest = checkpoints(cases.run)[0].relative_to(cases.run)
    path = Path(file) if file in ("config.json", "results.json", "metrics.jsonl") else newest / file
    text = (cases.run / path).read_text()
    lines = text.splitlines() if file == "metrics.jsonl" else [text]
    everything = [(i, at, new) for i, line in enumerate(lines[:2]) for at in [*leaves(json.loads(line)), ("more",)] for new in JUNK]
    for i, at, new in everything if len(everything) <= rounds else chance.sample(everything, rounds):

        def damage(folder, i=i, at=at, new=new):
            value = json.loads(lines[i])
            put(value, at, new)
            dumped = [*lines[:i], json.dumps(value), *lines[i + 1 :]]
            (folder / path).write_text("\n".join(dumped) + "\n")
            if path.parent == newest:
                sign(folder / newest)

        command = chance.choice([*COMMANDS, "resume" if file == "config.json" else "report"])
        cases.case(f"forged {file}, {command}", (at, repr(new)[:60]), damage, lambda folder, command=command: run_command(command, folder))


def forged_states(cases: Cases, chance: random.Random, rounds: int) -> None:
    """Other values in a state, with the right checksums."""
    newest = checkpoints(cases.run)[0].relative_to(cases.run)
    state = torch.load(cases.run / newest / "state.pt", weights_only=True)
    tensors = [
        torch.zeros(0),
        torch.zeros(3, 3),
        torch.full((2,), float("nan")),
        torch.zeros(1, dtype=torch.int8),
        torch.zeros(1).expand(10**10),
    ]
    everything = [(at, new) for at in [*leaves(state), ("more",)] for new in [*JUNK, *tensors]]
    for at, new in everything if len(everything) <= rounds else chance.sample(everything, rounds):

        def damage(folder, at=at, new=new):
            value = torch.load(folder / newest / "state.pt", weights_only=True)
            put(value, at, new)
            torch.save(value, folder / newest / "state.pt")
            sign(folder / newest)

        command = chance.choice(list(COMMANDS))
        cases.case(f"forged state, {command}", (at, repr(new)[:60]), damage, lambda folder, command=command: run_command(command, folder))

    for name, payload in {
        "a function": Call(executed, ()),
        "a huge bytearray": Call(bytearray, (10**12,)),
        "a huge tensor": Call(torch.Tensor, (10**12,)),
        "a system call": Call(os.system, (f"touch {cases.outside}/executed",)),
    }.items():
        for entry in ("more", "method", "rng"):

            def damage(folder, entry=entry, payload=payload):
                torch.save({**state, entry: payload}, folder / newest / "state.pt")
                sign(folder / newest)

            for command in COMMANDS:
                cases.case(f"payload, {command}", (name, entry), damage, lambda folder, command=command: run_command(command, folder))


def spelled(cases: Cases) -> None:
    """Command lines that nobody meant."""
    words = ["", " ", "é", "日本語", "a" * 5000, "x/" * 2000, "../..", "/", "-", "--", "\x1b[31m", "a\nb", "\udc80", "~",
             "/dev/null", "١", "1e3", "1_0", "nan", "inf", "-0", "9" * 30, "0x10", "true", "None", "[]", "{}", "*"]  # fmt: skip
    options = ["--steps", "--seed", "--env.game", "--env.num-envs", "--lr", "--runs", "--preset", "--keep", "--device", "--resume",
               "--batch-size", "--replay-capacity", "--learning-start", "--checkpoint-every", "--log-every"]  # fmt: skip
    lines = [["toy", "corridor", "--runs", "RUNS", option, word] for option in options for word in words]
    lines += [["toy", "corridor", "--runs", "RUNS", f"{option}={word}"] for option in options for word in words[:8]]
    lines += [[word, *rest] for word in words for rest in ([], ["corridor"])] + [["toy", word, "--runs", "RUNS"] for word in words]
    others = [[command, word] for command in ("evaluate", "report") for word in words]
    others += [["report", "RUN", "--out", word] for word in words if word not in ("--", "-", "/dev/null")]
    for option in ("--episodes", "--epsilon", "--num-envs", "--checkpoint", "--seed"):
        others += [["evaluate", "RUN", "--no-video", option, word] for word in words]
    for line in [["train", *line] for line in lines] + others:

        def check(folder, line=line):
            argv = [str(folder) if word == "RUN" else str(folder / "runs") if word == "RUNS" else word for word in line[1:]]
            COMMANDS["line"] = lambda _: {"train": train, "evaluate": evaluate, "report": report}[line[0]].main(argv)
            with contextlib.chdir(folder):
                try:
                    return run_command("line", folder)
                finally:
                    del COMMANDS["line"]

        cases.case(f"a command line of {line[0]}", line, lambda folder: None, check)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2000, help="cases of each random kind, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["damaged", "foreign", "json", "state", "lines"])
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    torch.set_num_threads(1)
    os.environ["TOY_SIGNAL"] = "3:SIGINT"  # a run that goes on is stopped at its third step
    train.METHODS["toy"] = Toy
    train.seconds_per_update = lambda *_: 0.001
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        (place / "runs").mkdir()
        del os.environ["TOY_SIGNAL"]
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
            run = toy_run.new(place / "runs", "--steps", str(STEPS), "--log-every", "50").folder
            evaluate.evaluate(evaluate.EvaluateConfig((str(run),), episodes=3))
        os.environ["TOY_SIGNAL"] = "3:SIGINT"
        assert read_metrics(run)[-1]["step"] == STEPS
        (place / "copies").mkdir()
        cases = Cases(run, place / "copies")
        wanted = lambda name: arguments.only in (None, name)  # noqa: E731
        if wanted("damaged"):
            damaged(cases, chance, arguments.rounds)
        if wanted("foreign"):
            foreign_files(cases)
        for file in ("config.json", "results.json", "metrics.jsonl", "manifest.json", "replay.json") if wanted("json") else ():
            forged_json(cases, chance, arguments.rounds // 4, file)
        if wanted("state"):
            forged_states(cases, chance, arguments.rounds // 4)
        if wanted("lines"):
            spelled(cases)
    for kind, count in cases.done.items():
        ends = Counter({says: n for (of, says), n in cases.seen.items() if of == kind})
        print(f"{count:6,} {kind}: " + ", ".join(f"{n:,} {says or 'ok'!r}" for says, n in ends.most_common(4)))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{sum(cases.done.values()):,} cases, {len(cases.failures)} failures; at most {most:.2f} GB")
    sys.exit(bool(cases.failures))


if __name__ == "__main__":
    main()
