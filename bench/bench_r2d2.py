"""R2D2's update, from sampling to the priorities that it writes back, beside an equivalent of deep_rl_zoo's learner (bench/peers.py).

The preset's network (LSTM 512, stacks of 4 frames) on B 16 x T 80, without burn-in, and on its own B 64 x T 120, of which 40 rows are
burnt in; in float32 and, where the processor has it, in bfloat16. The peer is float32 either way. Each contestant has a process to itself,
because ours keeps the memory that it frees, as urlfast.train has it. Floor: the products of the update at the machine's peak.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from bench.harness import Case, Work, apart
from bench.peers import ZooR2D2, ZooReplay
from urlfast.device import has_bf16, keep_freed_memory
from urlfast.learners.r2d2 import R2D2Config
from urlfast.methods.recurrent import RecurrentConfig, RecurrentTask

ACTIONS, STACK, SIDE, SEQUENCES = 18, 4, 84, 40


def config(batch: int, burn_in: int, precision: str = "fp32") -> RecurrentConfig:
    return replace(RecurrentConfig(batch_size=batch, precision=precision), learner=R2D2Config(burn_in=burn_in))


def flops(batch: int, burn_in: int) -> float:
    """Of what an update cannot do without: forward passes of both networks over all rows, one backward over those that are learned from."""
    c = config(batch, burn_in)
    side, channels, layers = SIDE, STACK, []
    for outputs, kernel, stride in c.encoder.conv:
        side = (side - kernel) // stride + 1
        layers.append(side * side * outputs * channels * kernel**2)
        channels = outputs
    q = c.learner
    lstm = 4 * q.lstm * (q.torso + 1 + ACTIONS + q.lstm)
    encoded = sum(layers) + channels * side * side * q.torso + lstm  # of a row
    head = 2 * q.lstm * q.hidden + q.hidden * (1 + ACTIONS)
    rows, learned = c.sequence_length, c.trace_length
    passes = 2 * rows * encoded + 2 * learned * (encoded - layers[0] // 2) + 4 * learned * head
    return 2 * batch * passes


def frames(burn_in: int) -> tuple[np.ndarray]:
    rng = np.random.default_rng(0)
    return (rng.integers(0, 256, (SEQUENCES * RecurrentConfig().period + burn_in + 100, 1, SIDE, SIDE), np.uint8),)


def rows_of(images: np.ndarray) -> dict[str, np.ndarray]:
    """Of one stream: actions, rewards and states beside the images."""
    rng, n = np.random.default_rng(1), len(images)
    return {"action": rng.integers(0, ACTIONS, n), "reward": rng.normal(size=n).astype(np.float32)}


def update(batch, burn_in, precision, images):
    keep_freed_memory()
    method = RecurrentTask(config(batch, burn_in, precision), (STACK, SIDE, SIDE), ACTIONS, seed=0, frame_stack=STACK)
    replay, rows, no = method.make_replay(1, len(images)), rows_of(images), np.zeros(1, bool)
    for t in range(len(images)):
        row = {"observation": images[t : t + 1], "action": rows["action"][t : t + 1], "reward": rows["reward"][t : t + 1]}
        row |= {"terminated": no, "is_first": np.array([t == 0]), "is_last": no}
        method.observe(row)
        replay.add(row)
    return lambda: method.update(replay)


def zoo_update(batch, burn_in, images):
    """With our weights, and the sequences that ours draws from."""
    c = config(batch, burn_in)
    torch.manual_seed(0)
    zoo, replay = ZooR2D2(ACTIONS), ZooReplay(c.priority_exponent)
    zoo.burn_in = burn_in
    zoo.take_weights(RecurrentTask(c, (STACK, SIDE, SIDE), ACTIONS, seed=0, frame_stack=STACK))
    rows, zeros = rows_of(images), np.zeros((1, c.learner.lstm), np.float32)
    for begin in range(0, len(images) - c.sequence_length + 1, c.period):
        seen = slice(begin, begin + c.sequence_length)
        stacks = [np.concatenate([images[max(t - i, 0)] * (t >= i) for i in reversed(range(STACK))]) for t in range(seen.start, seen.stop)]
        sequence = {"observation": np.stack(stacks), "action": rows["action"][seen]}
        before = np.arange(seen.start, seen.stop) - 1
        first = before < seen.start  # as of ours, whose rows nobody acted on
        sequence["last_action"] = np.where(first, -1, rows["action"][before])
        sequence["reward"] = np.where(first, 0, rows["reward"][before]).astype(np.float32)
        sequence |= {"done": np.zeros(c.sequence_length, bool), "h": zeros, "c": zeros}
        replay.add(sequence)

    def call():
        indices, drawn = replay.sample(batch)
        metrics, priorities = zoo.update(drawn)
        replay.update_priorities(indices, priorities)
        return metrics

    return call


def check(results):
    """Other samples, so that only sizes can agree; python_tests/test_peers.py compares the values themselves."""
    found = {who: metrics["q_loss"] for who, metrics in results.items()}
    assert np.isfinite(list(found.values())).all() and max(found.values()) < 1.5 * min(found.values()), f"q_loss: {found}"


def cases(threads):
    found = []
    for batch, burn_in, bf16 in [(16, 0, 2.0), (64, 40, 1.6)]:
        for precision, target in [("fp32", 1.0), ("bf16", bf16)]:
            if precision == "bf16" and not has_bf16(torch.device("cpu")):
                continue
            contestants = {"urlfast": partial(update, batch, burn_in, precision), "deep_rl_zoo": partial(zoo_update, batch, burn_in)}
            found.append(
                Case(
                    "r2d2",
                    f"B {batch} x T {burn_in + RecurrentConfig().trace_length}, {precision}",
                    threads,
                    inputs=partial(frames, burn_in),
                    contestants={who: apart(make, threads) for who, make in contestants.items()},
                    check=check,
                    floor=Work(**{precision: flops(batch, burn_in)}),
                    targets={"deep_rl_zoo": target},
                    processes=True,
                )
            )
    return found
