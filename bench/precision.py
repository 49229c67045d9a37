"""`python -m bench.precision`: is learning as good in bfloat16 as in float32? Two tasks, three seeds, each in both.

    catch   DrQ on the pixel toy of python_tests/toys.py: the greedy policy's return, whose best is 1
    apt     APT's paper preset on Ms. Pac-Man, with fewer and earlier updates: its losses and rewards

Every run is a process of its own on one thread, and leaves a file in --runs; those that are there are not made again, so a stopped command
goes on where it was. At the end bench/results/precision-<date>.json holds all curves and docs/precision.png shows them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SEEDS, PRECISIONS, TASKS = (0, 1, 2), ("fp32", "bf16"), ("catch", "apt")
CURVES = {  # task: {metric: what its axis says}
    "catch": {"return": "Catch: return of the greedy policy"},
    "apt": {
        "contrastive_accuracy": "Ms. Pac-Man: contrastive accuracy",
        "intrinsic_reward": "Ms. Pac-Man: intrinsic reward",
        "q_loss": "Ms. Pac-Man: loss of Q",
    },
}


# One run -----------------------------------------------------------------------------------------------------------------------


def watch(method, every: int, look: Callable[[list[dict]], dict]) -> list[dict]:
    """The list that fills as the method updates: after `every` updates what `look` makes of their metrics, beside the steps taken."""
    update, window, points = method.update, [], []

    def watched(replay):
        window.append(update(replay))
        if len(window) == every:
            points.append({"step": method.agent.steps, **look(window)})
            window.clear()
        return points

    method.update = watched
    return points


def catch(precision: str, seed: int) -> list[dict]:
    from test_learning_drq import CONFIG
    from toy_training import mean_return, train
    from toys import Catch

    from urlfast.methods.task import Task

    method = Task(replace(CONFIG, precision=precision), (1, *Catch.frame_shape[1:]), 3, seed=seed, frame_stack=1)
    points = watch(method, 100, lambda _: {"return": float(mean_return(method, Catch(num_envs=50, seed=1000 + seed, frame_stack=1), 100))})
    train(method, Catch(num_envs=4, seed=seed, frame_stack=1), 3000)
    return points


def apt(precision: str, seed: int) -> list[dict]:
    from toy_training import train

    from urlfast.envs.atari import AtariConfig, make_atari
    from urlfast.methods.apt import APT, APTConfig

    config = replace(APTConfig(), precision=precision, learning_start=400, updates_per_step=0.75)
    with make_atari(AtariConfig(), seed=seed) as env:
        method = APT(config, env.observation_shape, env.num_actions, seed=seed, frame_stack=env.frame_stack)
        mean = lambda window, name: float(np.mean([float(metrics[name]) for metrics in window]))  # noqa: E731
        points = watch(method, 75, lambda window: {name: mean(window, name) for name in CURVES["apt"]})
        train(method, env, 3000)
    return points


def one(task: str, precision: str, seed: int, path: Path) -> None:
    """Makes the run and writes its file, whole or not at all."""
    import torch

    from urlfast import set_num_threads
    from urlfast.device import keep_freed_memory

    sys.path.append(str(ROOT / "python_tests"))
    torch.set_num_threads(1)
    set_num_threads(1)
    keep_freed_memory()
    points = {"catch": catch, "apt": apt}[task](precision, seed)
    run = {"task": task, "precision": precision, "seed": seed, "cpu_seconds": round(time.process_time(), 1)}
    run |= {name: [round(point[name], 5) for point in points] for name in points[0]}
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(run))
    partial.rename(path)


# All of them -------------------------------------------------------------------------------------------------------------------


def summary(runs: list[dict]) -> dict:
    """{metric: {precision: the seeds' means over the last third of a curve, "difference": of their means, "error": its standard error}}."""
    found = {}
    for task, metrics in CURVES.items():
        for metric in metrics:
            last = {
                precision: [float(np.mean(run[metric][-(len(run[metric]) // 3) :])) for run in runs if key(run)[:2] == (task, precision)]
                for precision in PRECISIONS
            }
            fp32, bf16 = (np.array(last[precision]) for precision in PRECISIONS)
            error = np.sqrt(sum(x.var(ddof=1) / len(x) for x in (fp32, bf16)))
            found[metric] = {**last, "difference": float(bf16.mean() - fp32.mean()), "error": float(error)}
    return found


def key(run: dict) -> tuple[str, str, int]:
    return run["task"], run["precision"], run["seed"]


def draw(runs: list[dict], path: Path) -> None:
    """A panel for each metric: every seed thin, their mean thick."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(task, metric, title) for task, metrics in CURVES.items() for metric, title in metrics.items()]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), layout="constrained")
    for axis, (task, metric, title) in zip(axes, panels, strict=True):
        for precision, colour in zip(PRECISIONS, ("#0b6e99", "#d9730d"), strict=True):
            curves = [run for run in runs if key(run)[:2] == (task, precision)]
            for run in curves:
                axis.plot(run["step"], run[metric], color=colour, alpha=0.35, linewidth=0.8)
            axis.plot(curves[0]["step"], np.mean([run[metric] for run in curves], 0), color=colour, linewidth=2, label=precision)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("agent steps")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__.partition(":")[2].partition("\n\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "precision", metavar="FOLDER", help="of the runs' files")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--one", nargs=3, metavar=("TASK", "PRECISION", "SEED"), help="this run alone, in this process")
    options = parser.parse_args(argv)
    file = lambda task, precision, seed: options.runs / f"{task}-{precision}-{seed}.json"  # noqa: E731
    options.runs.mkdir(parents=True, exist_ok=True)
    if options.one:
        task, precision, seed = options.one
        one(task, precision, int(seed), file(*options.one))
        return 0

    wanted = [(task, precision, seed) for seed, task, precision in product(SEEDS, TASKS, PRECISIONS)]

    def make(run):
        command = [sys.executable, "-m", "bench.precision", "--runs", str(options.runs), "--one", *map(str, run)]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode

    with ThreadPoolExecutor(options.jobs) as pool:
        failed = [run for run, code in pool.map(lambda run: (run, make(run)), [run for run in wanted if not file(*run).exists()]) if code]
    if failed:
        print(f"bench.precision: failed: {failed}", file=sys.stderr)
        return 1
    runs = [json.loads(file(*run).read_text()) for run in wanted]
    from bench.__main__ import machine, write

    found = {**machine(), "date": time.strftime("%Y-%m-%d", time.gmtime()), "command": "python -m bench.precision"}
    found |= {"last third": summary(runs), "runs": runs}
    write(ROOT / "bench" / "results" / f"precision-{found['date']}.json", found)
    draw(runs, ROOT / "docs" / "precision.png")
    for metric, values in found["last third"].items():
        means = "  ".join(f"{precision} {np.mean(values[precision]):.4f}" for precision in PRECISIONS)
        print(f"{metric:22} {means}  difference {values['difference']:+.4f}, standard error {values['error']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
