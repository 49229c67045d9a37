"""`python -m bench.scaling`: what acting elsewhere costs an actor, the wire and the learner, and from that 1 to 1024 actors, as Markdown.

R2D2's preset on ms_pacman. CPU seconds of one thread, so that other work on the machine hardly shows; only what Ray does is timed by the
clock, the least of many times, on a cluster of one node in which nothing else runs.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from bench.__main__ import machine
from urlfast import train
from urlfast.actors import AHEAD, BROADCAST_EVERY, Sequences, arrays, connect, spread, tensors
from urlfast.envs import VectorEnv
from urlfast.methods import stored_rows


def cpu(function, times: int) -> float:
    """CPU seconds of a call, the first one aside."""
    function()
    began = time.process_time()
    for _ in range(times):
        function()
    return (time.process_time() - began) / times


def size(value) -> int:
    """Bytes of the arrays in it."""
    if isinstance(value, dict):
        return sum(map(size, value.values()))
    return getattr(value, "nbytes", 0)


def acting(config: train.TrainConfig, name: str, chunks: int) -> tuple[dict, dict, object]:
    """(CPU seconds of a step by what they go into, a chunk, the method) of an actor with config.env.num_envs environments."""
    env = train.DOMAINS["atari"](replace(config.env, workers=1), seed=0)
    method = train.make_method(name, config, env)
    n, fields = env.num_envs, method.make_replay(1, 1).fields
    sequences = Sequences(n, config.method, fields)
    spent = dict.fromkeys(("environments", "choosing actions", "holding rows, priorities"), 0.0)

    def timed(into, function, *args):
        began = time.process_time()  # of all threads: an environment's own as well
        result = function(*args)
        spent[into] += time.process_time() - began
        return result

    step, chunk = env.reset(), {}
    for index in range(-6, chunks):  # the first chunks hold no rows yet
        if index == 0:
            spent = dict.fromkeys(spent, 0.0)
        for _ in range(config.method.period):
            action = timed("choosing actions", method.act, step)
            after = timed("environments", VectorEnv.step, env, action)
            rows = timed("choosing actions", stored_rows, method, env, step, action, after)
            timed("holding rows, priorities", sequences.add, rows, method.agent.q, step)
            step = after
        chunk = timed("holding rows, priorities", sequences.take, method.initial_errors)
    env.close()
    return {into: seconds / (chunks * config.method.period * n) for into, seconds in spent.items()}, chunk, method


def carried(ray, chunk: dict, policy: dict, times: int = 30) -> dict[str, float]:
    """Seconds by the clock, the least of `times`: an answer of that size asked for and read (`asking`: CPU); the policy put, fetched."""

    class Echo:
        def answer(self, box):
            return self.chunk

        def keep(self, chunk):
            self.chunk = {name: np.array(value) if isinstance(value, np.ndarray) else value for name, value in chunk.items()}

        def fetch(self, box):
            began = time.perf_counter()
            tensors(ray.get(box[0]))
            return time.perf_counter() - began

    echo = ray.remote(num_cpus=1)(Echo).remote()
    ray.get(echo.keep.remote(chunk))
    seconds: dict[str, list[float]] = {"answer": [], "asking": [], "put": [], "fetch": []}
    for _ in range(times):
        began, spent = time.perf_counter(), time.process_time()
        ray.get(echo.answer.remote([]))
        seconds["answer"].append(time.perf_counter() - began)
        seconds["asking"].append(time.process_time() - spent)
        began = time.perf_counter()
        reference = ray.put(policy)
        seconds["put"].append(time.perf_counter() - began)
        seconds["fetch"].append(ray.get(echo.fetch.remote([reference])))
    return {name: float(np.median(values)) if name == "asking" else min(values) for name, values in seconds.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description="What acting on a cluster costs.")
    parser.add_argument("--chunks", type=int, default=6, help="of acting that are timed")
    chunks = parser.parse_args(argv).chunks
    torch.set_num_threads(1)
    about = machine()
    print(f"{about['processor']}, {about['isa']}, one thread.\n")

    preset = train.PRESETS["r2d2", "atari"]["paper"]
    methods = [(name, 8) for name in ("r2d2", "ngu") if (name, "atari") in train.PRESETS] + [("r2d2", 1), ("r2d2", 32)]
    told, kept = [], {}
    for name, n in methods:
        config = train.PRESETS[name, "atari"]["paper"]
        config = replace(config, env=replace(config.env, num_envs=n), device="cpu", seed=1)
        costs, chunk, method = acting(config, name, chunks if n < 32 else 2)
        rows = len(chunk["streams"])
        told.append((f"{name}, {n}", *(1e6 * seconds for seconds in costs.values()), 1e6 * sum(costs.values()), size(chunk) / rows))
        kept[name, n] = (sum(costs.values()), chunk, method)
    print("| method, environments | " + " | ".join(costs) + " | sum, µs a step | bytes a row |\n|-|" + "-:|" * (len(costs) + 2))
    for name, *numbers in told:
        print(f"| {name} | " + " | ".join(f"{number:,.0f}" for number in numbers) + " |")

    step, chunk, method = kept["r2d2", 8]
    fields, state = method.make_replay(1, 1).fields, method.state_dict()
    rows, streams = len(chunk["streams"]), chunk["streams"]
    chunk["rows"]["is_first"][:] = np.append(True, streams[1:] != streams[:-1])  # each time, to streams of their own
    replay, order = replay_of(method, 8 * 64), itertools.cycle(range(64))

    def store():
        replay.add(spread(chunk, fields), streams + 8 * next(order))

    for _ in range(640):  # until the ring is full, and all its memory has been touched
        store()
    add = cpu(store, 128) / rows
    policy = {part: arrays(state[part]) for part in method.acting}
    load = cpu(lambda: [method.load_part(part, tensors(values)) for part, values in policy.items()], 10)
    ray = connect("--ray-address", "local", num_cpus=2, include_dashboard=False)
    wire = carried(ray, chunk, policy)
    ray.shutdown()
    row_bytes, policy_bytes = size(chunk) / rows, size(policy)
    print(f"""
| | |
|-|-:|
| an answer of 8 environments: rows, bytes | {rows:,}, {size(chunk):,} |
| asked for and read, same machine, ms | {1e3 * wire["answer"]:.2f} |
| of that the learner's CPU, ms | {1e3 * wire["asking"]:.2f} |
| into the replay, µs a row | {1e6 * add:.2f} |
| the policy, bytes | {policy_bytes:,} |
| put by the learner, ms | {1e3 * wire["put"]:.1f} |
| read by an actor, same machine, ms | {1e3 * wire["fetch"]:.1f} |
| loaded by an actor, CPU ms | {1e3 * load:.1f} |
""")

    c = preset.method
    each, per_update = 1 / step, 1 / c.updates_per_step
    print(
        "| actors | steps/s | updates/s | rows, MB/s | answers/s | learner's CPU for rows | policy, MB/s | policy's age, updates |\n|"
        + "-:|" * 8
    )
    for n in (1, 4, 16, 64, 256, 1024):
        steps = n * each
        updates, answers = steps / per_update, steps / rows
        cpu_share = steps * add + answers * wire["asking"]
        machines = -(-n // 64)
        age = BROADCAST_EVERY / 2 + AHEAD * rows * step * updates
        print(f"| {n:,} | {steps:,.0f} | {updates:.2f} | {steps * row_bytes / 1e6:,.1f} | {answers:,.1f} | {100 * cpu_share:,.1f} % "
              f"| {machines * policy_bytes * updates / BROADCAST_EVERY / 1e6:,.2f} | {age:,.1f} |")  # fmt: skip


def replay_of(method, streams: int):
    """The method's replay for that many environments, with room for a few hundred rows of each."""
    method.config = replace(method.config, replay_capacity=streams * 400)
    method.agent.config = method.config
    return method.make_replay(streams, streams * 400)


if __name__ == "__main__":
    main()
