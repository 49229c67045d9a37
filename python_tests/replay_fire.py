"""A replay under fire: an adder beside a sampler, kill -9 in a save, updates against integers. test_replay.py runs the short forms,
stress/replay.py the long ones."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback

import numpy as np

from urlfast import Field, SequenceReplay

WINDOWS = {"n_step": 3, "gamma": 0.9, "frame_stack": 4}
SEQUENCES = {"sequence_length": 24, "stride": 5, "frame_stack": 4}


def add_beside_sample(mode, seconds, least=1, n=3, episode=50):
    """Every frame carries its own row number; the ring is small, so that the adder keeps overtaking the sampler.

    Ends after `seconds` and `least` batches, however busy the machine is, but waits no more than another minute for those.
    Returns (batches checked, rows added).
    """
    fields = {"observation": Field((1, 32, 32), "int32"), "id": Field((), "int64")}
    replay = SequenceReplay(n * 60, fields, num_streams=n, priority_exponent=0.5, **mode)
    stop, failures, added, rng = threading.Event(), [], [0], np.random.default_rng(0)

    def adder():
        try:
            frames, t = np.empty((n, 1, 32, 32), np.int32), 0
            stream = np.arange(n, dtype=np.int32)[:, None, None, None]
            while not stop.is_set():
                frames[:] = t * n + stream + 1
                rows = {"observation": frames, "id": np.arange(n) + t * n + 1, "reward": np.full(n, t, np.float32)}
                first, last = np.full(n, t % episode == 0), np.full(n, t % episode == episode - 1)
                replay.add({**rows, "terminated": np.zeros(n, bool), "is_first": first, "is_last": last})
                t += 1
                added[0] = n * t
        except Exception as error:
            failures.append(error)

    thread, interval = threading.Thread(target=adder), sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # Python's lock changes hands often enough for the sampler to check what it got
    thread.start()
    try:
        while not replay.sampleable and not failures:
            time.sleep(0.001)
        end, batches = time.monotonic() + seconds, 0
        while ((now := time.monotonic()) < end or batches < least) and now < end + 60 and not failures:
            batch = replay.sample(64)
            start, s = batch.indices // n, batch.indices % n
            if "n_step" in mode:
                for array, t in ((batch.observation, start), (batch.next_observation, start + batch.steps)):
                    rows = t[:, None] + np.arange(-3, 1)
                    want = np.where(rows >= t[:, None] // episode * episode, rows * n + s[:, None] + 1, 0)
                    np.testing.assert_array_equal(array, np.broadcast_to(want[:, :, None, None], array.shape))
            else:
                rows = start[:, None] + np.arange(-3, 24)
                opened = start[:, None] // episode * episode
                want = np.where((rows >= opened) & (rows < opened + episode), rows * n + s[:, None] + 1, 0)
                got = batch.frames["observation"]
                np.testing.assert_array_equal(got, np.broadcast_to(want[:, :, None, None, None], got.shape))
                np.testing.assert_array_equal(batch.id, want[:, 3:])
            size = 64 if "n_step" in mode else (64, 23)
            replay.update_priorities(batch.indices, rng.random(size, np.float32))
            batches += 1
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not failures, failures
    root, leaves = replay._core.totals()
    assert root == leaves
    return batches, added[0]


def update_against_integers(count, rows=1 << 20, batch=100_000, seed=0):
    """`count` priority updates, with rows added between them; the totals are those of an array of Python's own integers.

    Returns how many were compared.
    """
    replay = SequenceReplay(rows, {"observation": Field((), "uint8")}, num_streams=1, n_step=1, gamma=1.0, priority_exponent=1.0)
    rng, ring = np.random.default_rng(seed), rows + min(64, rows // 256 + 1)
    leaves, highest, head, stale, compared = np.zeros(ring, np.uint64), 1.0, 0, 0, 0
    most = 2**63 // ring

    def weight(p):
        return np.clip(np.floor(p * 2**24 + 0.5), 1, most).astype(np.uint64)

    def add(n):
        nonlocal head
        flags = {"terminated": np.zeros(n, bool), "is_first": np.arange(head, head + n) == 0, "is_last": np.zeros(n, bool)}
        rows_of = {"observation": np.zeros(n, np.uint8), "reward": np.zeros(n, np.float32), **flags}
        replay.add(rows_of, np.zeros(n, np.int64))
        leaves[np.arange(max(0, head - rows), max(0, head + n - rows)) % ring] = 0  # they are gone
        leaves[np.arange(max(head - 1, 0), head + n - 1) % ring] = weight(np.float64(highest))  # the transition to the next row is there
        head += n

    add(rows)
    for done in range(0, count, batch):
        size = min(batch, count - done)
        indices = rng.integers(max(0, head - rows - 500), head - 1, size)
        td = (rng.random(size) * 10.0 ** rng.integers(-9, 12, size)).astype(np.float32)
        replay.update_priorities(indices, td)
        alive = indices >= head - rows
        stale += int((~alive).sum())
        leaves[indices[alive] % ring] = weight(td[alive].astype(np.float64))  # of repeated ones the last counts
        highest = max(highest, float(td[alive].max()))
        if rng.random() < 0.5:
            add(int(rng.integers(1, 200)))
        root, sum_of_leaves = replay._core.totals()
        assert root == sum_of_leaves == int(leaves.sum()), (done, root, sum_of_leaves, int(leaves.sum()))
        assert replay.sampleable == int((leaves > 0).sum()) and replay.stale_updates == stale
        compared += size
    return compared


def _save_until_killed(folder, told, episode=20):
    """Goes on from what `folder` holds, and saves after a few rows each; tells how many rows a finished save has."""
    if os.path.exists(os.path.join(folder, "manifest.json")):
        replay = SequenceReplay.load(folder)
        t = _rows_of(folder)
    else:
        fields = {"observation": Field((1, 32, 32), "int32")}
        replay, t = SequenceReplay(300, fields, num_streams=2, n_step=3, gamma=0.9, frame_stack=2), 0
    while True:
        for _ in range(5):
            frames = np.full((2, 1, 32, 32), t, np.int32)
            flags = {"terminated": np.zeros(2, bool), "is_first": np.full(2, t % episode == 0), "is_last": np.full(2, t % episode == 19)}
            replay.add({"observation": frames, "reward": np.full(2, t, np.float32), **flags})
            t += 1
        replay.save(folder)
        os.write(told, t.to_bytes(8, "little"))


def _rows_of(folder):
    with open(os.path.join(folder, "manifest.json")) as file:
        return json.load(file)["segments"][-1]["end"][0]


def _unfinished(folder):
    """The files of saves that were not finished, by name and time: .manifest.json is always called that."""
    return {(entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(folder) if entry.name.startswith(".")}


def kill_in_saves(folder, kills, seed=0, longest=0.03):
    """Kills a process that does little but save, again and again; each time the last save that was finished must be whole.

    The next process goes on from there, so that the ring wraps. Returns (rows saved in the end, kills that left a save unfinished).
    """
    rng, unfinished, reported = np.random.default_rng(seed), 0, 0
    folder = os.fspath(folder)
    for kill in range(kills):
        before = _unfinished(folder)  # what earlier kills left
        hear, tell = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(hear)
                _save_until_killed(folder, tell)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(tell)
        told = os.read(hear, 8)
        time.sleep(rng.random() * longest)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the saving process ended by itself after kill {kill}"
        while rest := os.read(hear, 8):
            told = rest
        os.close(hear)
        reported = max(reported, int.from_bytes(told, "little"))
        saved = _rows_of(folder)
        assert reported <= saved <= reported + 5, (reported, saved)
        loaded = SequenceReplay.load(folder)
        assert len(loaded) == 2 * min(150, saved)
        batch = loaded.sample(256)
        t = batch.indices // 2
        assert t.max() < saved
        for array, row in ((batch.observation[:, 1:], t), (batch.next_observation[:, 1:], t + batch.steps)):
            np.testing.assert_array_equal(array, np.broadcast_to(row[:, None, None, None], array.shape))
        needed = {"manifest.json", *(s["file"] for s in loaded._saved.segments)}
        states = [name for name in os.listdir(folder) if name.startswith("state-")]
        unfinished += bool(_unfinished(folder) - before)
        if rng.random() < 0.5:
            SequenceReplay.prune(folder)
            left = set(os.listdir(folder)) - needed
            assert len(left) == 1 and left <= set(states)
            SequenceReplay.load(folder)
        reported = saved
    return reported, unfinished


def kill_beside_scratch(folder):
    """A process that is killed with storage="file" leaves nothing: its scratch file has no name from the start."""
    code = """
import sys, time
import numpy as np
from urlfast import Field, SequenceReplay
replay = SequenceReplay(1000, {"observation": Field((1000,), "uint8")}, num_streams=1, n_step=1, gamma=1.0,
                        storage="file", path=sys.argv[1])
print("made", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "made\n"
    with open(f"/proc/{process.pid}/maps") as file:
        mapped = [line for line in file if os.path.realpath(folder) in line]
    assert mapped and all(line.rstrip().endswith("(deleted)") for line in mapped)
    before = os.listdir(folder)
    process.kill()
    process.wait()
    assert before == os.listdir(folder) == []
