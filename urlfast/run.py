"""A run's folder: what a run writes, who may write there, and what a person sees meanwhile.

runs/apt-atari-ms_pacman-s1-20260131-140503/
    config.json             the command, every option, the versions
    metrics.jsonl events.*  one line, and TensorBoard's points, every `log_every` steps
    checkpoints/ replay/    see checkpoint.py
    results.json videos/    what `urlfast evaluate` measured and saw
    report.html             what `urlfast report` made of it
    .lock .evaluate.lock    held while a command trains, or evaluates, the run; a report needs neither
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import io
import json
import math
import os
import re
import reprlib
import stat
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from urlfast import __version__
from urlfast.ops import sync_folder

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
JSON_BYTES, JSON_DEPTH = 64_000_000, 32  # more than any file of a run has


class UserError(Exception):
    """Foreseen: a command prints it as one line. Anything else is a bug and shows its traceback."""


class UsageError(UserError):
    """What was typed is wrong: an unknown option or name, a value out of range, a path that is no run. Its exit status is 2, others' 1."""


def command(name: str, main: Callable[[list[str]], int | None], argv: Sequence[str] | None) -> None:
    """Runs `urlfast <name>`: a foreseen error is one line and exit status 1 (2 for what was typed), and a bug shows its traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a name may hold what the terminal's encoding lacks
    try:
        status = main(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"urlfast {name}: {one_line(error)}", file=sys.stderr)
        status = 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
    except OSError as error:
        if error.errno not in FULL_DISK and error.filename is None:
            raise
        print(one_line(f"urlfast {name}: {error.strerror}: {error.filename or 'while writing'}"), file=sys.stderr)
        status = 1
    except KeyboardInterrupt:  # where no checkpoint is due
        status = 130
    sys.exit(status)


def one_line(text, limit: int = 1000) -> str:
    """`text` in one line of at most `limit` characters: without line breaks, or anything else that a terminal would act on."""
    text = " ".join(str(text).split())
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-limit // 2 + 3 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """How an error about an unknown name goes on, right behind it: the likely one, then all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (f", did you mean {close[0]!r}?" if close else "") + f" (known: {', '.join(known)})"


# Files ---------------------------------------------------------------------------------------------------------------


def open_plain(path: Path, mode: str = "rb", **options):
    """`open` for the files of a run: OSError for a link, which may lead out of its folder, and for what may wait or never end."""

    def opener(name, flags):
        try:
            descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            says = "is a link" if error.errno == errno.ELOOP else error.strerror
            raise OSError(error.errno, says, str(path)) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "is not a plain file", str(path))
        return descriptor

    return open(path, mode, opener=opener, **options)


@contextmanager
def replacing(path: Path):
    """A text file that becomes `path`, whole or not at all: a temporary name, synced, renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            yield file
            sync(file)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """Writes `path` whole or not at all."""
    with replacing(path) as file:
        json.dump(value, file, indent=1)
        file.write("\n")


def read_json(path: Path):
    """What a file of a run holds. OSError where it cannot be read, ValueError where it is no JSON, or larger or deeper than a run's."""
    with open_plain(path) as file:
        data = file.read(JSON_BYTES + 1)
    if len(data) > JSON_BYTES:
        raise ValueError(f"larger than {human_bytes(JSON_BYTES)}")
    try:
        value = json.loads(data)
        if _depth(value) <= JSON_DEPTH:
            return value
    except RecursionError:
        pass
    raise ValueError("nested too deeply")


def _depth(value) -> int:
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, entries), default=0)


def sync(file) -> None:
    """What was written to `file` survives a power cut."""
    file.flush()
    os.fsync(file.fileno())


def check_writable(runs: str | Path) -> None:
    """Makes the folder in which runs make their own. Raises UserError where that, or writing there, is not possible."""
    try:
        str(runs).encode()  # as the native core takes a path
        Path(runs).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=runs, prefix="."):
            pass
    except UnicodeEncodeError:
        raise UserError(f"--runs: must be UTF-8, got {str(runs)!r}") from None
    except (OSError, RecursionError) as error:  # pathlib makes one of a thousand folders within each other by recursion
        raise UserError(f"--runs: cannot write to {runs}: {getattr(error, 'strerror', 'too many folders')}") from None


def human_bytes(count: float) -> str:
    """1536 -> '1.5 kB'; powers of 1000, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def human_time(seconds: float) -> str:
    """95 -> '1 min 35 s'; two units at most."""
    seconds = round(seconds)
    for unit, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            rest = seconds % size // part
            return f"{seconds // size} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{seconds} s"


# Configs -------------------------------------------------------------------------------------------------------------


def from_dict(default, values: dict):
    """`default`, a dataclass, with its fields replaced by those of `asdict` read back from JSON. Raises UserError for what does not fit."""
    known = get_type_hints(type(default))
    new = {}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"config.json: unknown option {name!r} of {type(default).__name__}{nearest(name, known)}")
        before = getattr(default, name)
        if is_dataclass(before) and isinstance(value, dict):
            new[name] = from_dict(before, value)
            continue
        try:
            new[name] = _like(type(before) if is_dataclass(before) else known[name], value)
        except TypeError as error:
            raise UserError(f"config.json: {name}: {error}, got {reprlib.repr(value)}") from None
    try:
        return replace(default, **new)
    except ValueError as error:
        raise UserError(f"config.json: {error}") from None


def _like(kind, value):
    """`value`, as JSON holds it, as an option of the type `kind`; raises TypeError where it is of another."""
    origin, kinds = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for alternative in kinds:
            try:
                return _like(alternative, value)
            except TypeError:
                continue
    elif origin is Literal:
        if isinstance(value, str) and value in kinds:
            return value
    elif origin is tuple:
        if isinstance(value, list) and (kinds[-1] is Ellipsis or len(kinds) == len(value)):
            return tuple(_like(kinds[0] if kinds[-1] is Ellipsis else kinds[i], entry) for i, entry in enumerate(value))
    elif kind is float:
        if type(value) in (int, float) and abs(value) < 1e308:  # neither NaN nor infinity
            return value
    elif type(value) is kind and (kind is not int or abs(value) < 2**63):
        return value
    says = f"one of {', '.join(kinds)}" if origin is Literal else getattr(kind, "__name__", kind) if origin is None else kind
    raise TypeError(f"must be {says}")


def flat(config, prefix: str = "") -> dict:
    """{option: value} of a dataclass, nested fields as `env.game`; `method` is flattened, as it is on the command line."""
    options = {}
    for field in fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name.replace("_", "-")
        if is_dataclass(value):
            options |= flat(value, prefix if field.name == "method" else f"{name}.")
        else:
            options[name] = value
    return options


def unsaid(config, values: dict) -> dict:
    """{option: value} of those of `config` that `values`, as config.json holds them, does not name, for an older urlfast had none such."""

    def names(values: dict, prefix: str = ""):
        for name, value in values.items():
            name = prefix + name.replace("_", "-")
            if isinstance(value, dict):
                yield from names(value, prefix if name == "method" else f"{name}.")
            else:
                yield name

    said = set(names(values))
    return {option: value for option, value in flat(config).items() if option not in said}


def versions() -> dict[str, str]:
    """Of urlfast and of what decides its results; only those installed."""
    found = {"urlfast": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("torch", "numpy", "gymnasium", "ale-py", "dm-control", "mujoco"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# The folder ----------------------------------------------------------------------------------------------------------


class Run:
    """One run's folder. Reading needs nothing; what writes the same files does so `with run.locked(file):`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.name = self.folder.name

    @staticmethod
    def create(runs: str | Path, label: str, config: dict) -> Run:
        """Makes `runs/<label>-<time>`; `config` holds whatever a resume or a reader needs, as JSON."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for count in range(1, 1000):
            folder = Path(runs) / (f"{label}-{stamp}" if count == 1 else f"{label}-{stamp}-{count}")
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:  # two runs in one second
                continue
        for name in ("checkpoints", "replay", "videos"):
            (folder / name).mkdir()
        write_json(folder / "config.json", {**config, "versions": versions(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        return Run(folder)

    @staticmethod
    def find(name: str | Path, runs: str | Path = "runs") -> Run:
        """The run at a path, or of that name under `runs`."""
        for folder in (Path(name), Path(runs) / name):
            if _is_run(folder):
                return Run(folder.resolve() if folder.name in ("", ".", "..") else folder)._check_folders()
        known = [folder.parent.name for folder in Path(runs).glob("*/config.json")]
        near = difflib.get_close_matches(Path(name).name, known, n=5, cutoff=0)  # of what may be hundreds
        reason = f"; the nearest: {', '.join(near)}" if near else f" (no run under {Path(runs).resolve()})"
        raise UsageError(f"no run {reprlib.repr(str(name))}: neither a run's folder nor a name under {runs}/{reason}")

    def _check_folders(self) -> Run:
        """What is written to and cleared, and shown, lies in the run's own folder."""
        for name in ("checkpoints", "replay", "videos"):
            path = self.folder / name
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                raise UserError(f"{path} is not a folder" + (" but a link" if path.is_symlink() else ""))
        return self

    @property
    def config(self) -> dict:
        try:
            config = read_json(self.folder / "config.json")
            options, source = config["config"], config.get("transfer")
            known = isinstance(config["method"], str) and isinstance(config["domain"], str)
            known = known and isinstance(options["method"], dict) and isinstance(options["env"], dict)
            known = known and isinstance(config.get("preset", ""), str)
            if source is not None:
                known = known and all(isinstance(source[key], str) for key in ("run", "method", "rule")) and type(source["step"]) is int
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            known = False
        if not known:
            raise UsageError(f"{self.folder}/config.json is not a run of urlfast")
        return config

    @contextmanager
    def locked(self, file: str = ".lock"):
        """Holds the run, by the lock of one kind of command.

        A run in use is refused; one whose process was killed is free, since the kernel drops its lock.
        """
        try:
            lock = open_plain(self.folder / file, "a+b", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {file}: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read(64).decode(errors="replace").strip() or "unknown"
                raise UserError(f"{self.folder} is in use by process {holder}") from None
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n".encode())
            _held.add(lock.fileno())
            try:
                yield self
            finally:
                _held.discard(lock.fileno())


def _is_run(folder: Path) -> bool:
    try:
        return (folder / "config.json").is_file()
    except OSError:  # a name that is too long for a file's
        return False


_held: set[int] = set()  # descriptors of the locks that this process holds


def _drop_locks_in_child():
    """A forked worker shares its parent's locks, and would keep them after the parent was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_drop_locks_in_child)


# A sweep's folder: sweep.json, and ROW/TASK-s1/RUN ------------------------------------------------------------------


def slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text).strip("._") or "_"


def saved(run: Path) -> bool:
    return any(run.glob("checkpoints/step-*"))


def newest_run(folder: Path) -> Path | None:
    """In a job's folder. A training that was killed before it saved anything is begun anew, beside what it left."""
    found = [path.parent for path in folder.glob("*/config.json")]
    return max(found, key=lambda run: (saved(run), run.stat().st_mtime), default=None)


def runs_of(folder: str | Path) -> dict[Path, str]:
    """{run: its row} of a sweep's folder, in the order of the list. Raises UsageError where it is none."""
    try:
        rows = [row["name"] for row in read_json(Path(folder) / "sweep.json")["rows"]]
        places = [(row, place) for row in rows for place in sorted((Path(folder) / slug(row)).glob("*/"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder}/sweep.json is not a sweep's: {error}") from None
    return {run: row for row, place in places if (run := newest_run(place))}


# What a run says -----------------------------------------------------------------------------------------------------


class Metrics:
    """metrics.jsonl and TensorBoard's events of a run, from `step` on: what they hold of later steps will be done again, and goes."""

    def __init__(self, folder: Path, step: int):
        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in read_metrics(folder) if line["step"] <= step]
            with replacing(path) as file:
                file.writelines(json.dumps(line) + "\n" for line in kept)
        self._lines = open_plain(path, "a", buffering=1)
        self._events = Events(folder, step)

    def log(self, line: dict) -> None:
        """One object a line: numbers, or short lists of numbers."""
        self._lines.write(json.dumps(line) + "\n")
        self._events.log(line)

    def sync(self) -> None:
        """Lines logged so far survive a power cut, so that a checkpoint never knows of more than they do."""
        sync(self._lines)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._lines.close()
        self._events.close()


class WholeWrites(io.FileIO):
    """An unbuffered file that writes all, or raises: where a disk fills up, FileIO writes a part and says so to who asks."""

    def write(self, data) -> int:
        view = memoryview(data)
        while len(view):
            view = view[super().write(view) :]
        return len(data)


class Events:
    """TensorBoard's file of points, written at once: its own writer has a thread, which a full disk kills with a traceback."""

    def __init__(self, folder: Path, step: int):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._proto = event_pb2
        # Unbuffered, so that nothing is left to fail in close(). Read in the order of the names, whose time therefore comes first.
        self._file = WholeWrites(folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}", "x")
        self._writer = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if step:  # readers drop the points from here on that earlier files hold
            self._write(step=step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def log(self, line: dict) -> None:
        event = self._proto.Event(wall_time=time.time(), step=line["step"])
        for name, value in line.items():
            if isinstance(value, list):
                for index, number in enumerate(value):
                    event.summary.value.add(tag=f"{name}/{index}", simple_value=number)
            elif name != "step":
                event.summary.value.add(tag=name, simple_value=value)
        self._writer.write(event.SerializeToString())

    def _write(self, **fields) -> None:
        self._writer.write(self._proto.Event(wall_time=time.time(), **fields).SerializeToString())

    def close(self) -> None:
        self._file.close()


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; one torn by a kill, or damaged, is left out. Raises UserError where it cannot be read."""
    path = Path(folder) / "metrics.jsonl"
    try:
        with open_plain(path) as file:
            lines = map(_metrics_line, file)
            return [line for line in lines if line is not None]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _metrics_line(text: bytes) -> dict | None:
    """What of a line is numbers, or short lists of numbers; None where it has no step."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int or not 0 <= line["step"] < 2**63:
        return None
    return {name: value for name, value in line.items() if all(map(_is_number, value if isinstance(value, list) else [value]))}


def _is_number(value) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


class Progress:
    """One line: how far, rate, time left, the numbers that matter. Live on a terminal; else printed now and then, with a logged line."""

    SHOWN = ("score", "q_loss", "critic_loss", "contrastive_accuracy", "inverse_error", "intrinsic_reward", "knn_distance", "exploration")
    PRINT_EVERY = 10.0  # seconds

    def __init__(self, total: int, learning_start: int = -1, stream=None, *, of: str = "step"):
        """learning_start: steps that cost nearly nothing, from whose rate no time left follows. of: what is counted, if not steps."""
        self.total, self.learning_start, self._of = total, learning_start, of
        self._stream = stream or sys.stdout
        self._live = None
        self._line: dict = {}
        self._marks: deque = deque(maxlen=120)  # (time, steps) of the last minute, which the rate is of
        self._shown_at = -math.inf

    def __enter__(self):
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self._stream), auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_):
        if self._live:
            self._live.stop()

    def tick(self, steps: int) -> None:
        """Where the run is now; cheap enough for every step."""
        now = time.monotonic()
        if self._live and now > self._shown_at + 0.5:
            if self._marks and self._marks[-1][1] <= self.learning_start:  # as fast as no later one
                self._marks.clear()
            self._marks.append((now, steps))
            (began, first), self._shown_at = self._marks[0], now
            self._show(steps, (steps - first) / (now - began) if steps > first else 0.0)

    def log(self, line: dict) -> None:
        """A line was logged: these numbers are shown from now on."""
        self._line |= {name: line[name] for name in self.SHOWN if name in line}
        now, over = time.monotonic(), line["step"] >= self.total
        if over or (not self._live and now > self._shown_at + self.PRINT_EVERY):
            self._shown_at = now
            self._show(line["step"], line["steps_per_second"])

    def _show(self, steps: int, rate: float) -> None:
        left = max(self.total - steps, 0)  # the environments' last step together may go past
        if steps <= self.learning_start:
            says = f"learning begins at {self.learning_start:,}"
        else:
            says = f"{human_time(left / rate)} left" if rate > 0 else ""
        text = f"{self._of} {steps:,} of {self.total:,} ({min(steps / self.total, 1):.1%})  {rate:.3g}/s  {says}"
        for name, value in self._line.items():
            text += f"  {name.replace('_', ' ')} {value:.4g}"
        if self._live:
            from rich.text import Text

            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            print(text, file=self._stream, flush=True)
