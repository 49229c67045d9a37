"""`python -m bench.profile_apt`: where the CPU time of APT's loop on a game goes, as the Markdown table of docs/profile.md.

The loop of bench_apt.py on one thread, four agent steps a call. Clocks of the thread's CPU time stand around our functions, and in calls of
their own around each operator between those; medians over the calls.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import statistics
import time
from collections.abc import Sequence
from functools import wraps

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import urlfast.augment
import urlfast.intrinsic
import urlfast.learners.drq
import urlfast.methods.agent
from bench import bench_apt
from bench.__main__ import machine
from bench.harness import equal_threads
from urlfast.device import keep_freed_memory
from urlfast.methods.apt import APTConfig

REGIONS = {  # what runs inside belongs to the group, whatever it is
    "the game": [(urlfast.envs.VectorEnv, "send"), (urlfast.envs.VectorEnv, "recv")],
    "acting": [(urlfast.methods.agent.Agent, "act")],
    "replay": [(urlfast.SequenceReplay, "sample"), (urlfast.SequenceReplay, "add")],
    "augmentation": [(urlfast.augment.Augment, "__call__")],
    "neighbours and reward": [(urlfast.intrinsic.ParticleReward, "__call__")],
    "Adam, clipping, EMA copies": [
        (torch.optim.Adam, "step"),
        (torch.nn.utils, "clip_grad_norm_"),
        (urlfast.methods.agent, "ema_update_"),
        (urlfast.learners.drq, "ema_update_"),
    ],
}
OPERATORS = {  # group: the first words of its operators' names, the longer before the shorter
    "convolutions, backward": ("convolution_backward",),
    "convolutions, forward": ("convolution",),
    "linear layers": ("addmm", "mm"),
    "activations": ("relu", "elu", "threshold_backward", "tanh"),
    "copies, casts and layout": ("copy", "_to_copy", "cat", "clone", "empty", "new_empty", "fill", "zero"),
}
REST = "losses, small operators and Python"


class Clocks(TorchDispatchMode):
    """CPU seconds by group: of the regions as they are called; of the operators outside them while the mode is entered."""

    def __init__(self):
        super().__init__()
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.inside = False
        for group, functions in REGIONS.items():
            for owner, name in functions:
                setattr(owner, name, self.region(group, getattr(owner, name)))

    def region(self, group: str, function):
        @wraps(function)
        def call(*args, **kwargs):
            if self.inside:
                return function(*args, **kwargs)
            self.inside, start = True, time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[group] += time.thread_time() - start
                self.inside = False

        return call

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        start = time.thread_time()
        try:
            return operator(*args, **(kwargs or {}))
        finally:
            name = operator.name().removeprefix("aten::")
            group = next((group for group, names in OPERATORS.items() if name.startswith(names)), REST)
            if not self.inside:
                self.seconds[group] += time.thread_time() - start


def profiled(call, clocks: Clocks, calls: int) -> dict[str, float]:
    """{group: median CPU milliseconds of a call}, and "whole"."""
    for _ in range(2):
        call()
    taken = collections.defaultdict(list)
    for operators in [False, True] * calls:
        clocks.seconds.clear()
        start = time.thread_time()
        with clocks if operators else contextlib.nullcontext():
            call()
        if not operators:
            taken["whole"].append(time.thread_time() - start)
        for group in OPERATORS if operators else REGIONS:
            taken[group].append(clocks.seconds[group])
    found = {group: 1e3 * statistics.median(times) for group, times in taken.items()}
    return found | {REST: 2 * found["whole"] - sum(found.values())}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile_apt", description=__doc__)
    parser.add_argument("--calls", type=int, default=8, metavar="N", help="calls of the loop, of four agent steps each")
    options = parser.parse_args(argv)
    presets = {"mini_apt": APTConfig.mini_apt(), "paper": APTConfig()}
    columns = {}
    keep_freed_memory()  # as urlfast.train does
    clocks = Clocks()
    with equal_threads(1):
        (rows,) = bench_apt.transitions()
        for preset, precision in [("mini_apt", "fp32"), ("mini_apt", "bf16"), ("paper", "fp32"), ("paper", "bf16")]:
            bench_apt.CONFIG = presets[preset]
            columns[f"{preset}, {precision}"] = profiled(bench_apt.loop(precision, 1, rows), clocks, options.calls)
    groups = sorted([*OPERATORS, *REGIONS], key=lambda group: -columns["mini_apt, bf16"][group])
    about = machine()
    where = f"{about['processor']}, {about['isa']}, {about['cores']} cores, load {about['load']:.1f}"
    print(f"CPU time on {bench_apt.GAME.game}, one thread; {where}.")
    print("`python -m bench.profile_apt`: four agent steps with an update each; percent of the whole.\n")
    print("| | " + " | ".join(columns) + " |\n|-|" + "-:|" * len(columns))
    for group in [*groups, REST]:
        print(f"| {group} | " + " | ".join(f"{100 * found[group] / found['whole']:.1f}" for found in columns.values()) + " |")
    print("| whole, ms | " + " | ".join(f"{found['whole']:.0f}" for found in columns.values()) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
