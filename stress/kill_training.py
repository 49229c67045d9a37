"""kill -9 while APT trains on Atari, again and again, most often within a checkpoint; each time what is left must be whole.

    python stress/kill_training.py [--kills 100] [--seed 0]

Every process is forked from this one, resumes the run as `urlfast train --resume` does, and is killed: mostly after a checkpoint was begun,
by a random part of the time that one takes, else after a random time. After each kill:

    the newest checkpoint is whole and not older than the one before it; no other is refused
    its steps, as the run and as the method count them, its updates and its replay's rows agree: nothing is lost, nothing is twice
    metrics.jsonl has one valid line after another, but for a torn last one, and those up to the checkpoint before are what they were
    TensorBoard reads the same points (every tenth kill)
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from urlfast import train
from urlfast.checkpoint import checkpoints, read, read_latest
from urlfast.methods.apt import APT
from urlfast.run import Run, read_metrics

UPDATES_PER_STEP, LEARNING_START, ENVS, LOG_EVERY = 0.1, 100, 2, 10
OPTIONS = f"""
    --env.num-envs {ENVS} --env.frame-size 48 --env.workers 1 --device cpu --steps 1000000 --log-every {LOG_EVERY} --checkpoint-every 30
    --keep 2 --batch-size 2 --reward.k 2
    --learner.hidden 16 --encoder.features 4 --representation.projection 8 --updates-per-step {UPDATES_PER_STEP}
    --learning-start {LEARNING_START} --replay-capacity 4000
""".split()
BEGIN = ["apt", "atari", *OPTIONS]


class Ledger(APT):
    """APT that counts the rows it saw, to hold against those of the replay."""

    rows = 0

    def observe(self, rows):
        self.rows += len(rows["action"])
        super().observe(rows)

    def state_dict(self):
        state = super().state_dict()
        state["progress"]["rows"] = self.rows
        return state

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.rows = state["progress"]["rows"]


def begin(argv: list[str]) -> int:
    """`urlfast train ARGV` in a process of its own."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train.METHODS["apt"] = Ledger
        train.main(argv)
    except SystemExit as exit:
        status = exit.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def alive(child: int) -> bool:
    pid, status = os.waitpid(child, os.WNOHANG)
    assert pid == 0, f"the run ended by itself: {os.waitstatus_to_exitcode(status)}"
    return True


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def wait_for(child: int, condition) -> None:
    while alive(child) and not condition():
        time.sleep(0.0005)


def half_written(run: Path) -> list[Path]:
    return list(run.glob("checkpoints/.step-*.tmp"))


def newest(run: Path) -> int:
    return int(max(path.name for path in checkpoints(run)).removeprefix("step-"))


def check(run: Path, before: int, history: list[str]) -> tuple[int, list[str]]:
    """(step of the newest checkpoint, the lines of metrics.jsonl up to it)."""
    refused = []
    checkpoint = read_latest(run, replay=True, say=refused.append)
    assert not refused, refused
    assert checkpoint.step >= before
    for path in checkpoints(run):
        read(path, replay=True)
    state, replay = checkpoint.state, checkpoint.load_replay(read_only=True)
    assert state["steps"] == checkpoint.step == state["method"]["progress"]["steps"]
    assert len(replay) == min(state["method"]["progress"]["rows"], replay.capacity)
    rounds = max(0, state["steps"] - LEARNING_START)
    assert int(UPDATES_PER_STEP * max(0, rounds - ENVS)) <= state["updates"] <= int(UPDATES_PER_STEP * rounds)
    *lines, _torn = (run / "metrics.jsonl").read_text().split("\n") if (run / "metrics.jsonl").exists() else [""]
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps))
    upto = [line for line, step in zip(lines, steps, strict=True) if step <= checkpoint.step]
    assert upto[: len(history)] == history
    assert checkpoint.step == 0 or json.loads(upto[-1])["step"] == checkpoint.step
    assert checkpoint.step == 0 or json.loads(upto[-1])["updates"] == state["updates"]
    assert all(b - a <= LOG_EVERY + ENVS for a, b in zip([0, *steps], steps, strict=False)), steps
    return checkpoint.step, upto


def check_board(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points = [point.step for point in EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload().Scalars("updates")]
    lines = [line["step"] for line in read_metrics(run)]
    assert points == sorted(set(points)), points
    assert set(lines) - set(points) <= {lines[-1]}, "a line was written, and its point not"  # the kill came between the two


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as runs:
        child = begin([*BEGIN, "--runs", runs])
        wait_for(child, lambda: list(Path(runs).glob("*/checkpoints/step-*")))
        (run,) = Path(runs).iterdir()
        step, history, within, redone, saving = 0, [], 0, 0, 0.02
        for count in range(1, arguments.kills + 1):
            if count > 1:
                child = begin(["--resume", str(run)])
            if chance.random() < 0.85:
                skip = chance.randrange(3)  # checkpoints that are let through
                for _ in range(skip):
                    wait_for(child, lambda: half_written(run))
                    began = time.monotonic()
                    wait_for(child, lambda: not half_written(run))
                    saving = 0.9 * saving + 0.1 * (time.monotonic() - began)
                wait_for(child, lambda: half_written(run))
                time.sleep(chance.uniform(0, saving))
            else:
                time.sleep(chance.uniform(0, 3))
            kill(child)
            within += bool(half_written(run))
            reached = max([line["step"] for line in read_metrics(run)], default=0)
            step, history = check(run, step, history)
            redone += reached - step
            if count % 10 == 0:
                check_board(run)
                print(f"{count} kills, {within} of them in a checkpoint: at step {step:,}, {redone:,} steps done again", flush=True)
        child = begin(["--resume", str(run), "--log-every", "10"])
        wait_for(child, lambda: newest(run) > step)
        os.kill(child, signal.SIGINT)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 130, status
        step, history = check(run, step, history)
        check_board(run)
        assert not half_written(run) and not list(Run(run).folder.glob("checkpoints/.refused*"))
        print(f"ok: {arguments.kills} kills, {within} in a checkpoint; step {step:,}, {len(history):,} lines, nothing lost or twice")


if __name__ == "__main__":
    main()
