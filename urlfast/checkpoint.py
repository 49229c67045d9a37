"""Checkpoints: whole or absent, and refused when they are not what was written.

    RUN/checkpoints/step-000001600/    state.pt        all but the replay: tensors and Python scalars, read with weights_only
                                       replay.json     the replay's own manifest: which segments are this step's
                                       manifest.json   format, step, and the sha256 of the files above, of the segments, and of itself
    RUN/replay/                        append-only segments: each checkpoint adds what is new since the one before

A checkpoint is written under a name that begins with a dot, synced, and renamed: after a kill or a power cut it is there or it is not.

Checksums find damage. Against a forged one, whose checksums are right, stand the checks of what the files say: nothing of it is executed,
takes more memory than the files have bytes, or leads out of the run's folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import pickletools
import re
import shutil
import struct
import warnings
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from urlfast import SequenceReplay
from urlfast.run import UsageError, UserError, nearest, one_line, open_plain, read_json, sync, sync_folder, versions

FORMAT = 1
CHECKPOINT = re.compile(r"step-[0-9]{9,18}")
SEGMENT = re.compile(r"(rows|state)-[0-9]{6,}-[0-9a-f]{12}\.bin")
DIGEST = re.compile(r"[0-9a-f]{64}")
REBUILD = re.compile(r"torch\._utils _rebuild_tensor_v2|torch \w+Storage|collections OrderedDict")  # all that `plain` needs called
# What torch and our own code raise over values that are not what was saved.
MISFITS = (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, OverflowError, AssertionError, MemoryError)


class Refused(Exception):
    """A checkpoint that is truncated, altered, foreign or of an unknown format; the message names the file."""


@dataclass
class Checkpoint:
    """One verified checkpoint. `segments` is None until the replay's files have been verified too."""

    folder: Path
    step: int
    state: dict
    segments: dict[str, str] | None = None  # name -> sha256

    def load_replay(self, *, read_only: bool = False) -> SequenceReplay:
        """The replay as it was when this was saved; its files must have been verified. Raises UserError where it does not fit in memory."""
        assert self.segments is not None
        with self.fitting("replay.json"):
            saved = read_json(self.folder / "replay.json")
            if {part["file"] for part in [*saved["segments"], saved["state"]]} != self.segments.keys():
                raise ValueError("it names other segments than the manifest")
            return SequenceReplay.load(self.folder.parent.parent / "replay", manifest=self.folder / "replay.json", read_only=read_only)

    @contextmanager
    def fitting(self, file: str = "state.pt"):
        """Loading what this checkpoint holds: what does not fit the run's config is one line, not a traceback."""
        try:
            with warnings.catch_warnings(action="ignore"):  # torch's, of what it then refuses
                yield
        except (*MISFITS, OSError) as error:
            says = error if isinstance(error, (ValueError, RuntimeError, MemoryError, OSError)) else repr(error)
            raise UserError(f"{self.folder / file} does not fit this run: {one_line(says, 300)}") from error


def plain(value):
    """NumPy arrays and scalars as tensors and Python scalars, which weights_only can read back; tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(entry) for entry in value)
    return value


def checkpoints(run: str | Path) -> list[Path]:
    """The checkpoints in a run's folder, newest first; nothing is read."""
    return sorted(filter(_is_named, Path(run).glob("checkpoints/step-*")), key=step_of, reverse=True)


def _is_named(path: Path) -> bool:
    return CHECKPOINT.fullmatch(path.name.removeprefix(".refused-")) is not None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def read(checkpoint: str | Path, *, replay: bool = False) -> Checkpoint:
    """The checkpoint in a folder, verified before it is loaded; with `replay`, the segments that it needs are verified too.

    Raises Refused, with the name of the file that is not what was written.
    """
    checkpoint = Path(checkpoint)
    if checkpoint.is_symlink():
        raise Refused(f"{checkpoint} is a link")
    manifest = _read_manifest(checkpoint / "manifest.json")
    if manifest["step"] != step_of(checkpoint):
        raise Refused(f"{checkpoint} is not that of step {manifest['step']:,}, of which its manifest is")
    for name, digest in manifest["files"].items():
        _verify(checkpoint / name, digest)
    segments = None
    if replay:
        segments = manifest["segments"]
        for name, digest in segments.items():
            _verify(checkpoint.parent.parent / "replay" / name, digest)
    return Checkpoint(checkpoint, manifest["step"], _read_state(checkpoint / "state.pt"), segments)


def _read_state(path: Path) -> dict:
    try:
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(state, set())
        if not isinstance(state, dict):
            raise ValueError(f"a {type(state).__name__}")
        return state
    except (*MISFITS, pickle.UnpicklingError, EOFError, OSError, struct.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise Refused(f"{path} is not a checkpoint of urlfast ({one_line(error, 200)})") from None


def _check_archive(path: Path) -> None:
    """Raises ValueError where torch.load would take more memory than the file has bytes."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("compressed")
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                for code, argument, _ in pickletools.genops(archive.read(name)):
                    if code.name in ("GLOBAL", "STACK_GLOBAL", "INST") and not REBUILD.fullmatch(str(argument)):
                        raise ValueError(f"it would call {argument}")


def _check_tensors(value, seen: set[int]) -> None:
    """Raises ValueError for a tensor that says it is larger than what is stored of it."""
    if isinstance(value, torch.Tensor):
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"a tensor of shape {list(value.shape)} has {value.untyped_storage().nbytes():,} bytes")
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        for entry in value.values() if isinstance(value, dict) else value:
            _check_tensors(entry, seen)


def read_latest(run: str | Path, *, replay: bool = False, say=print) -> Checkpoint:
    """The newest checkpoint of a run that is what was written; what is refused before it is said.

    Raises UserError where there is none.
    """
    for checkpoint in checkpoints(run):
        try:
            return read(checkpoint, replay=replay)
        except Refused as error:
            say(f"refused: {error}; trying the checkpoint before it")
    raise UserError(f"{run} has no checkpoint that can be read")


def read_at(run: str | Path, step: str) -> Checkpoint:
    """The checkpoint of that step; for an unknown one, UsageError lists those there are."""
    found = {str(step_of(path)): path for path in checkpoints(run)}
    if step.replace("_", "") not in found:
        raise UsageError(f"checkpoint: {run} has none of step {step}{nearest(step, ['latest', *found])}")
    try:
        return read(found[step.replace("_", "")])
    except Refused as error:
        raise UserError(f"refused: {error}") from None


class Checkpoints:
    """Writes the checkpoints of a run that this process has locked, and keeps the newest `keep`.

    loaded: the checkpoint that the run goes on from. Newer ones, which were refused, are set aside under a name that begins with a dot,
    and go when as many newer ones have been written as are kept.
    """

    def __init__(self, run: str | Path, keep: int, loaded: Checkpoint | None = None):
        self.run = Path(run)
        self.keep = keep
        self.step = loaded.step if loaded else None  # of the newest one
        self._segments = dict(loaded.segments or {}) if loaded else {}
        for path in self.run.glob("checkpoints/.step-*.tmp"):  # of a process that was killed while it wrote
            _remove(path)
        for path in checkpoints(run):
            if loaded is None or step_of(path) > loaded.step:
                aside = path.with_name(f".refused-{path.name}")
                _remove(aside)
                path.rename(aside)
                print(f"what was refused is kept as {aside}, until {keep} newer checkpoints are there", flush=True)

    def save(self, step: int, state: dict, replay) -> None:
        """Writes the checkpoint of `step`, then removes those that are too old, and the segments that none of the kept ones needs.

        Raises UserError when it cannot be written, the disk being full: what was there before is still there, and nothing half written is.
        """
        final = self.run / "checkpoints" / f"step-{step:09d}"
        temporary = final.with_name(f".{final.name}.tmp")
        try:
            temporary.mkdir()
            buffer = io.BytesIO()
            torch.save(plain(state), buffer)
            files = {"state.pt": _write(temporary / "state.pt", buffer.getbuffer())}
            names = replay.save(self.run / "replay")
            files["replay.json"] = _write(temporary / "replay.json", (self.run / "replay" / "manifest.json").read_bytes())
            segments = {name: self._segments.get(name) or _digest(self.run / "replay" / name) for name in names}
            body = {"format": FORMAT, "urlfast": versions().get("urlfast"), "step": step, "files": files, "segments": segments}
            _write(temporary / "manifest.json", json.dumps({**body, "sha256": _own_digest(body)}, indent=1).encode())
            sync_folder(temporary)
            temporary.rename(final)
            sync_folder(final.parent)
        except OSError as error:
            kept = f"that of step {self.step:,} is whole" if self.step is not None else "there is none yet"
            raise UserError(f"{self.run}: {error.strerror or error}; the checkpoint of step {step:,} was not written, {kept}") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.step, self._segments = step, segments
        self._prune()

    def _prune(self) -> None:
        kept = checkpoints(self.run)[: self.keep]
        for path in checkpoints(self.run)[self.keep :]:
            doomed = path.with_name(f".{path.name}.tmp")  # half removed, it must not look like a checkpoint
            path.rename(doomed)
            _remove(doomed)
        for path in filter(_is_named, self.run.glob("checkpoints/.refused-step-*")):
            if len(kept) == self.keep and step_of(path) < step_of(kept[-1]):
                _remove(path)
        needed = set()
        for path in kept:
            with suppress(Refused):  # damaged since: it needs nothing any more
                needed.update(_read_manifest(path / "manifest.json")["segments"])
        for path in (self.run / "replay").iterdir():
            if SEGMENT.fullmatch(path.name.removeprefix(".")) and path.name not in needed:
                _remove(path)


def _remove(path: Path) -> None:
    """Whatever is there, itself and not what it links to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write(path: Path, data) -> str:
    with open(path, "wb") as file:
        file.write(data)
        sync(file)
    return hashlib.sha256(data).hexdigest()


def _digest(path: Path) -> str:
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _verify(path: Path, digest: str) -> None:
    try:
        found = _digest(path)
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror})") from None
    if found != digest:
        raise Refused(f"{path} is not what was written: {os.path.getsize(path):,} bytes whose checksum differs")


def _read_manifest(path: Path) -> dict:
    try:
        manifest = read_json(path)
        own, form = manifest.pop("sha256"), manifest["format"]
        if type(form) is int and form > FORMAT:
            raise Refused(f"{path} has format {form}, of urlfast {manifest['urlfast']!r}; this one reads up to {FORMAT}")
        if own != _own_digest(manifest):
            raise Refused(f"{path} is not what was written: its checksum differs")
        files, segments = manifest["files"], manifest["segments"]
        named = files.keys() == {"state.pt", "replay.json"} and all(map(SEGMENT.fullmatch, segments))
        if (
            form != FORMAT
            or not named
            or not all(map(DIGEST.fullmatch, [*files.values(), *segments.values()]))
            or type(manifest["step"]) is not int
        ):
            raise ValueError
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Refused(f"{path} is not a manifest of urlfast") from None
    return manifest
