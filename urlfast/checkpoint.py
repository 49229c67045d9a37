"""Checkpoints: whole or absent, and refused when they are not what was written.

    RUN/checkpoints/step-000001600/    state.pt        all but the replay: tensors and Python scalars, read with weights_only
                                       replay.json     the replay's own manifest: which segments are this step's
                                       manifest.json   format, step, and the sha256 of the files above, of the segments, and of itself
    RUN/replay/                        append-only segments: each checkpoint adds what is new since the one before

A checkpoint is written under a name that begins with a dot, synced, and renamed: after a kill or a power cut it is there or it is not.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from urlfast import SequenceReplay
from urlfast.run import FULL_DISK, UserError, nearest, sync, sync_folder, versions

FORMAT = 1


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
        """The replay as it was when this was saved; its files must have been verified."""
        assert self.segments is not None
        return SequenceReplay.load(self.folder.parent.parent / "replay", manifest=self.folder / "replay.json", read_only=read_only)


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
    return sorted(Path(run).glob("checkpoints/step-*"), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def read(checkpoint: str | Path, *, replay: bool = False) -> Checkpoint:
    """The checkpoint in a folder, verified before it is loaded; with `replay`, the segments that it needs are verified too.

    Raises Refused, with the name of the file that is not what was written.
    """
    checkpoint = Path(checkpoint)
    manifest = _read_manifest(checkpoint / "manifest.json")
    for name, digest in manifest["files"].items():
        _verify(checkpoint / name, digest)
    segments = None
    if replay:
        segments = manifest["segments"]
        for name, digest in segments.items():
            _verify(checkpoint.parent.parent / "replay" / name, digest)
    try:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise Refused(f"{checkpoint}/state.pt is not a checkpoint of urlfast ({str(error).splitlines()[0]})") from None
    return Checkpoint(checkpoint, manifest["step"], state, segments)


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
    """The checkpoint of that step; for an unknown one, UserError lists those there are."""
    found = {str(step_of(path)): path for path in checkpoints(run)}
    if step.replace("_", "") not in found:
        raise UserError(f"checkpoint: {run} has none of step {step}{nearest(step, ['latest', *found])}")
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
        for path in self.run.glob("checkpoints/.*.tmp"):  # of a process that was killed while it wrote
            shutil.rmtree(path)
        for path in checkpoints(run):
            if loaded is None or step_of(path) > loaded.step:
                aside = path.with_name(f".refused-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                print(f"what was refused is kept as {aside}, until {keep} newer checkpoints are there", flush=True)

    def save(self, step: int, state: dict, replay) -> None:
        """Writes the checkpoint of `step`, then removes those that are too old, and the segments that none of the kept ones needs.

        Raises UserError when the disk is full: what was there before is still there, and nothing half written is.
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
            if error.errno not in FULL_DISK:
                raise
            kept = f"that of step {self.step:,} is whole" if self.step is not None else "there is none yet"
            raise UserError(f"{self.run}: {error.strerror}; the checkpoint of step {step:,} was not written, {kept}") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.step, self._segments = step, segments
        self._prune()

    def _prune(self) -> None:
        kept = checkpoints(self.run)[: self.keep]
        for path in checkpoints(self.run)[self.keep :]:
            doomed = path.with_name(f".{path.name}.tmp")  # half removed, it must not look like a checkpoint
            path.rename(doomed)
            shutil.rmtree(doomed)
        for path in self.run.glob("checkpoints/.refused-step-*"):
            if len(kept) == self.keep and int(path.name.removeprefix(".refused-step-")) < step_of(kept[-1]):
                shutil.rmtree(path)
        needed = {"manifest.json"}
        for path in kept:
            with suppress(Refused):  # damaged since: it needs nothing any more
                needed.update(_read_manifest(path / "manifest.json")["segments"])
        for path in (self.run / "replay").iterdir():
            if path.name not in needed:
                path.unlink()


def _write(path: Path, data) -> str:
    with open(path, "wb") as file:
        file.write(data)
        sync(file)
    return hashlib.sha256(data).hexdigest()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
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
        manifest = json.loads(path.read_bytes())
        own = manifest.pop("sha256")
        if manifest["format"] > FORMAT:
            raise Refused(f"{path} has format {manifest['format']}, of urlfast {manifest['urlfast']}; this one reads up to {FORMAT}")
        if own != _own_digest(manifest):
            raise Refused(f"{path} is not what was written: its checksum differs")
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Refused(f"{path} is not a manifest of urlfast") from None
    return manifest
