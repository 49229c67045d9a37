"""Checkpoints under damage: whatever happens to the newest, the run goes on from one that is whole."""

import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import toy_run
from forged import Call, sign

from urlfast import checkpoint, evaluate, report, train
from urlfast.checkpoint import Refused, checkpoints, plain, read, read_latest
from urlfast.run import Run, UserError, read_metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 200 steps, whose ring of 100 rows has wrapped; checkpoints of steps 120, 160 and 200 are kept."""
    return toy_run.new(tmp_path_factory.mktemp("runs"), "--replay-capacity", "100")


@pytest.fixture
def run(finished, tmp_path):
    return Run(shutil.copytree(finished.folder, tmp_path / finished.name))


def test_a_state_comes_back_from_a_load_that_executes_nothing(tmp_path):
    generator = np.random.default_rng(7)
    state = {"array": np.arange(3), "scalar": np.float32(0.5), "rng": generator.bit_generator.state, "list": [(1, "x", None, True)]}
    torch.save(plain(state), tmp_path / "state.pt")
    back = torch.load(tmp_path / "state.pt", weights_only=True)
    assert back["array"].tolist() == [0, 1, 2] and back["scalar"] == 0.5 and back["list"] == [(1, "x", None, True)]
    again = np.random.default_rng()
    again.bit_generator.state = back["rng"]
    assert again.random() == generator.random()


def test_the_newest_are_kept_and_no_segment_more_than_they_need(finished):
    assert [checkpoint.step_of(path) for path in checkpoints(finished.folder)] == [200, 160, 120]
    needed = set().union(*(read(path, replay=True).segments for path in checkpoints(finished.folder)))
    held = {path.name for path in (finished.folder / "replay").iterdir()} - {"manifest.json"}
    assert held == needed
    assert not list(finished.folder.glob("**/.*.tmp"))


def test_an_older_checkpoint_holds_its_own_rows_after_the_ring_has_wrapped(finished, tmp_path):
    oldest = read(checkpoints(finished.folder)[-1], replay=True).load_replay()
    alone = toy_run.new(tmp_path, "--replay-capacity", "100", "--steps", "122")
    then = read(checkpoints(alone.folder)[1], replay=True).load_replay()
    assert len(oldest) == len(then)
    for _ in range(5):
        mine, theirs = oldest.sample(16), then.sample(16)
        np.testing.assert_array_equal(mine.observation, theirs.observation)
        np.testing.assert_array_equal(mine.action, theirs.action)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def replace_by_foreign(path):
    torch.save({"someone": "else's"}, path)


def remove(path):
    path.unlink()


def replace_by_fifo(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_endless_link(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def replace_by_own_link(path):
    """To what was there: a link may lead out of the folder."""
    path.symlink_to(path.rename(path.with_name("elsewhere")))


DAMAGES = [truncate, flip, replace_by_foreign, remove, replace_by_fifo, replace_by_folder, replace_by_endless_link, replace_by_own_link]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("victim", ["state.pt", "manifest.json", "replay.json", "segment"])
def test_what_is_not_what_was_written_is_refused_by_name_and_the_one_before_it_used(run, victim, damage):
    newest, before, *_ = checkpoints(run.folder)
    path = newest / victim
    if victim == "segment":
        only = set(read(newest, replay=True).segments) - set(read(before, replay=True).segments)
        path = run.folder / "replay" / min(only)
    damage(path)
    with pytest.raises(Refused, match=str(path)):
        read(newest, replay=True)
    said = []
    assert read_latest(run.folder, replay=True, say=said.append).step == 160
    assert len(said) == 1 and str(path) in said[0]


def test_bytes_flipped_and_cut_anywhere_are_refused(run):
    newest, before, *_ = checkpoints(run.folder)
    only = sorted(set(read(newest, replay=True).segments) - set(read(before, replay=True).segments))
    chance, manifest = random.Random(0), json.loads((newest / "manifest.json").read_text())
    for path in [newest / "state.pt", newest / "manifest.json", newest / "replay.json", *(run.folder / "replay" / name for name in only)]:
        data = path.read_bytes()
        for at in chance.sample(range(len(data)), 12):
            flipped = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
            for changed in (flipped, data[:at], data + data[: at + 1]):
                path.write_bytes(changed)
                found = read_latest(run.folder, replay=True, say=lambda text: None)
                assert found.step == 160 or (path == newest / "manifest.json" and json.loads(changed) == manifest)  # one blank for another
        path.write_bytes(data)


@pytest.mark.parametrize("kind", ["file", "link", "fifo"])
def test_something_else_with_a_checkpoints_name_is_refused_and_set_aside(run, tmp_path, kind):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    for name in ("step-000000999", ".step-000000998.tmp"):
        path = run.folder / "checkpoints" / name
        {"file": path.touch, "link": lambda: path.symlink_to(tmp_path / "precious"), "fifo": lambda: os.mkfifo(path)}[kind]()  # noqa: B023
    for name in ("step-x", "step-1", ".refused-step-x"):
        (run.folder / "checkpoints" / name).touch()
    (run.folder / "replay" / "notes.txt").touch()
    assert train.run_train(["--resume", str(run.folder), "--steps", "400"]) == 0
    assert read_latest(run.folder, replay=True, say=pytest.fail).step == 400
    left = {path.name for path in (run.folder / "checkpoints").iterdir() if path.name not in [p.name for p in checkpoints(run.folder)]}
    assert left == {"step-x", "step-1", ".refused-step-x", ".refused-step-000000999"}
    assert (run.folder / "replay" / "notes.txt").exists() and (tmp_path / "precious" / "file").exists()


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(run, capsys):
    flip(checkpoints(run.folder)[0] / "state.pt")
    assert train.run_train(["--resume", str(run.folder)]) == 0
    aside = run.folder / "checkpoints" / ".refused-step-000000200"
    out = capsys.readouterr().out
    assert "refused: " in out and f"kept as {aside}, until 3 newer" in out and aside.is_dir()
    final = read_latest(run.folder, replay=True)
    assert (final.step, final.state["updates"]) == (200, 135)
    steps = [line["step"] for line in read_metrics(run.folder)]
    assert steps == sorted(set(steps)) and steps[-1] == 200
    assert train.run_train(["--resume", str(run.folder), "--steps", "320"]) == 0
    assert not aside.exists()


EXECUTE = Call(print, ("a checkpoint was executed",))


def test_a_forged_checkpoint_is_not_executed(run, capsys):
    """Even one whose checksums are right."""
    newest = checkpoints(run.folder)[0]
    state = torch.load(newest / "state.pt", weights_only=True)
    for call in (EXECUTE, Call(bytearray, (10**13,)), Call(torch.Tensor, (10**13,)), torch.zeros(1).expand(10**13)):
        torch.save({**state, "more": call}, newest / "state.pt")
        sign(newest)
        with pytest.raises(Refused, match=r"state\.pt is not a checkpoint"):
            read(newest)
    for content in (pickle.dumps(EXECUTE, protocol=2), pickle.dumps(state["method"]["rows"])):
        (newest / "state.pt").write_bytes(content)
        sign(newest)
        with pytest.raises(Refused, match=r"state\.pt is not a checkpoint"):
            read(newest)
    assert "executed" not in capsys.readouterr().out


def test_a_forged_checkpoint_cannot_grow_in_memory(run):
    newest = checkpoints(run.folder)[0]
    with zipfile.ZipFile(newest / "state.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(newest / "state.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    sign(newest)
    with pytest.raises(Refused, match=r"state\.pt is not a checkpoint of urlfast \(compressed"):
        read(newest)


@pytest.mark.parametrize("changes", [
    {"files": {"../../config.json": "0" * 64}}, {"segments": {"../config.json": "0" * 64}}, {"segments": {"/etc/passwd": "0" * 64}},
    {"segments": []}, {"files": {"state.pt": 3}}, {"step": 10**30}, {"step": "200"}, {"step": -1}, {"step": 160}, {"format": "1"},
    {"format": 10**30},
])  # fmt: skip
def test_a_forged_manifest_is_refused(run, changes):
    newest = checkpoints(run.folder)[0]
    sign(newest, **changes)
    with pytest.raises(Refused, match=str(newest)):
        read(newest, replay=True)


@pytest.mark.parametrize("change, says", [
    (lambda replay: replay["options"].update(capacity=10**14), "replay.json does not fit"),
    (lambda replay: replay["options"].update(num_streams=1), "replay.json does not fit"),
    (lambda replay: replay["fields"].update(more=[[], "float32", 1]), "replay.json does not fit"),
    (lambda replay: replay["state"].update(file="state-000009-0123456789ab.bin"), "names other segments"),
])  # fmt: skip
def test_a_forged_replay_is_one_line(run, change, says):
    newest = checkpoints(run.folder)[0]
    replay = json.loads((newest / "replay.json").read_text())
    change(replay)
    sign(newest)
    read(newest, replay=True).load_replay()  # what was only signed anew is read
    (newest / "replay.json").write_text(json.dumps(replay))
    sign(newest)
    with pytest.raises(UserError, match=says) as error:
        train.run_train(["--resume", str(run.folder)])
    assert "checksum" not in str(error.value)


@pytest.mark.parametrize("entry, value", [
    (("steps",), 10**30), (("steps",), -1), (("updates",), "x"), (("seconds",), float("nan")), (("rng",), torch.zeros(3)),
    (("method",), None),
    (("method", "weight"), torch.zeros(3)), (("method", "optim"), {}), (("method", "random"), 5),
])  # fmt: skip
def test_a_forged_state_is_one_line(run, entry, value):
    newest = checkpoints(run.folder)[0]
    state = torch.load(newest / "state.pt", weights_only=True)
    inner = state if len(entry) == 1 else state[entry[0]]
    inner[entry[-1]] = value
    torch.save(state, newest / "state.pt")
    sign(newest)
    with pytest.raises(UserError, match=r"state\.pt does not fit this run"):
        train.run_train(["--resume", str(run.folder)])


def test_a_later_format_is_refused(run):
    newest = checkpoints(run.folder)[0]
    body = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps(body | {"format": 2}))
    with pytest.raises(Refused, match="format 2"):
        read(newest)


@pytest.mark.parametrize("point", ["state.pt", "replay.json", "manifest.json", "rename"])
def test_kill_during_a_checkpoint(tmp_path, point):
    """The third checkpoint (of step 80) is cut short at each of its steps; the second one is used."""
    murder = f"""
import os, signal, toy_run
from pathlib import Path
from urlfast import checkpoint, train
write, rename, calls = checkpoint._write, Path.rename, []
def dying(path, *rest):
    if path.name == {point!r} or {point!r} == "rename" and rest and ".tmp" in path.name:
        calls.append(path)
        if len(calls) == 3:
            if {point!r} != "rename":
                path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    return (rename if rest and isinstance(rest[0], Path) else write)(path, *rest)
checkpoint._write, Path.rename = dying, dying
train.main(["toy", "corridor", "--runs", {str(tmp_path)!r}])
"""
    killed = subprocess.run([sys.executable, "-c", murder], env=toy_run.environment(), capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    (folder,) = tmp_path.iterdir()
    assert [checkpoint.step_of(path) for path in checkpoints(folder)] == [40, 0]
    assert train.run_train(["--resume", str(folder)]) == 0
    assert read_latest(folder, replay=True).state["updates"] == 135
    assert not list(folder.glob("**/.*.tmp"))


@pytest.fixture
def small_disk(tmp_path, request):
    """A disk of 100 kB. Who may not mount one runs the test once more as the root of a namespace of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode:
        own = ["unshare", "-Urm"]
        if os.geteuid() == 0 or shutil.which("unshare") is None or subprocess.run([*own, "true"], capture_output=True).returncode:
            pytest.skip(f"mounting a small disk: {done.stderr.strip()}")
        again = [*own, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{request.node.name}"]
        done = subprocess.run(again, env=toy_run.environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]
        pytest.skip("passed in a namespace of its own")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_one_line_and_nothing_written_before_is_lost(small_disk):
    full = subprocess.run(
        [*toy_run.COMMAND, "toy", "corridor", "--steps", "1500", "--runs", str(small_disk)],
        env=toy_run.environment(),
        capture_output=True,
        text=True,
    )
    assert full.returncode == 1
    assert "No space left" in full.stderr and len(full.stderr.splitlines()) == 1, full.stderr
    (folder,) = small_disk.iterdir()
    assert not list(folder.glob("**/.*.tmp"))
    for path in checkpoints(folder):
        read(path, replay=True)
    reached = read_latest(folder, replay=True).step
    assert 0 < reached < 1500
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert train.run_train(["--resume", str(folder)]) == 0
    assert read_latest(folder, replay=True).step == 1500
    steps = [line["step"] for line in read_metrics(folder)]
    assert steps == list(range(10, 1501, 10))


def test_a_disk_that_is_full_before_a_log_line_a_video_a_result_or_a_report(small_disk, finished, monkeypatch, capsys):
    """Each says so in one line and leaves what was there; with room again, each succeeds."""
    monkeypatch.setattr(report, "load_particles", lambda run: None)
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    folder = shutil.copytree(finished.folder, small_disk / finished.name)
    commands = [
        (train, ["--resume", str(folder), "--steps", "240"]),
        (evaluate, [str(folder), "--episodes", "2"]),
        (evaluate, [str(folder), "--episodes", "2", "--no-video"]),
        (report, [str(folder)]),
    ]
    with open(small_disk / "filler", "wb", buffering=0) as filler:
        with pytest.raises(OSError):
            while True:
                filler.write(bytes(4096))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "config.json"}
    for module, arguments in commands:
        with pytest.raises(SystemExit) as exit:
            module.main(arguments)
        error = capsys.readouterr().err
        assert exit.value.code == 1 and "No space left" in error and len(error.splitlines()) == 1, error
        assert all(path.read_bytes() == content for path, content in before.items())
    (small_disk / "filler").unlink()
    for module, arguments in commands:
        with pytest.raises(SystemExit) as exit:
            module.main(arguments)
        assert not exit.value.code, capsys.readouterr().err
    assert read_latest(folder, replay=True, say=pytest.fail).step == 240
    steps = [line["step"] for line in read_metrics(folder)]
    assert steps == list(range(10, 241, 10))
    assert (folder / "report.html").exists() and list(folder.glob("videos/*.mp4")) and (folder / "results.json").exists()


def test_a_limit_on_file_size_is_one_line_too(tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))  # noqa: E731
    command = [*toy_run.COMMAND, "toy", "corridor", "--steps", "1500", "--runs", str(tmp_path)]
    full = subprocess.run(command, env=toy_run.environment(), capture_output=True, text=True, preexec_fn=limit)
    assert full.returncode == 1
    assert "File too large" in full.stderr and len(full.stderr.splitlines()) == 1, full.stderr
    (folder,) = tmp_path.iterdir()
    assert train.run_train(["--resume", str(folder)]) == 0
