"""`urlfast transfer RUN`: fine-tune what a run has pre-trained on a reward, by default for the 100,000 steps of Atari-100k and URLB.

The rules are the pre-training method's own (its TRANSFER table). Replay and optimisers begin anew; which parts are loaded, frozen or reset
is printed. The comparison from scratch is `urlfast train drq atari`, drq-sac or ddpg, with the same options.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import Literal

import tyro

from urlfast.checkpoint import read_at, read_latest
from urlfast.envs.dmc_tasks import domain_of
from urlfast.learners.ddpg import DDPGConfig
from urlfast.learners.drq import DrQConfig
from urlfast.learners.drq_sac import DrQSACConfig
from urlfast.learners.r2d2 import R2D2Config
from urlfast.methods import FREEZE, LOAD, RESET, transfer
from urlfast.methods.agent import LEARNED
from urlfast.run import Run, UsageError, UserError, command
from urlfast.train import DOMAINS, METHODS, PRESETS, TrainConfig, load, refusals, start, usage

# The method that learns from the reward, by the pre-trained learner.
TASK = {DrQConfig: "drq", DDPGConfig: "ddpg", DrQSACConfig: "drq-sac", R2D2Config: "r2d2"}
STEPS = {"atari": 100_000, "dmc": 100_000}  # of Atari-100k, and of URLB


@dataclass(frozen=True)
class TransferConfig(TrainConfig):
    task: str = ""  # game, or task of the same domain, to fine-tune on; the run's own where empty
    rule: Literal["whole", "random-head", "frozen-encoder"] = "whole"  # what of the pre-trained network the task begins with
    checkpoint: str = "latest"  # of the pre-trained run: latest, or a step


def run_transfer(argv: list[str]) -> int:
    if argv and not argv[0].startswith("-"):
        run = Run.find(argv[0])
    elif {"-h", "--help"} & set(argv):
        print("usage: urlfast transfer RUN [--task TASK] [--rule whole|random-head|frozen-encoder] [options]\n")
        print("`urlfast transfer RUN --help` lists every option with its default for that run.")
        return 0
    else:
        raise UsageError("which run? urlfast transfer RUN [--task TASK] [--rule RULE]")
    method, domain, pretrained = load(run.config)
    task = "aps-task" if method == "aps" else TASK[type(pretrained.method.learner)]
    presets = PRESETS[task, domain]
    preset = run.config.get("preset") if run.config.get("preset") in presets else next(iter(presets))
    default = presets[preset]
    default = replace(default, method=default.method.after(pretrained.method), env=replace(pretrained.env, num_envs=default.env.num_envs))
    default = replace(default, steps=STEPS.get(domain, default.steps), seed=pretrained.seed, runs=str(run.folder.parent))
    options = {field.name: getattr(default, field.name) for field in fields(TrainConfig)}
    prog, description = f"urlfast transfer {argv[0]}", "Fine-tunes a pre-trained run on its game's reward, in a run of its own."
    with usage():
        wanted = tyro.cli(TransferConfig, default=TransferConfig(**options), args=argv[1:], prog=prog, description=description)
    config = TrainConfig(**{name: getattr(wanted, name) for name in options})
    if wanted.task:
        config = replace(config, env=config.env.playing(wanted.task))

    checkpoint = read_latest(run.folder) if wanted.checkpoint == "latest" else read_at(run.folder, wanted.checkpoint)
    with checkpoint.fitting():
        parts, table = dict(checkpoint.state["method"]), METHODS[method].TRANSFER[wanted.rule]
    check_fits(domain, pretrained.env, config.env, table)
    print(f"from {run.folder}, {method} at step {checkpoint.step:,}, rule {wanted.rule}:")
    for part in parts:
        print(f"  {part:18} {WORDS[table.get(part, RESET)] if part in METHODS[task].parts else 'not used'}", flush=True)

    def prepare(agent):
        with checkpoint.fitting():
            transfer(agent, parts, table)

    return start(
        task,
        domain,
        preset,
        config,
        name=f"{method}-transfer-{wanted.rule}-{domain}",
        prepare=prepare,
        transfer={"run": str(run.folder), "method": method, "step": checkpoint.step, "rule": wanted.rule},
    )


def check_fits(domain: str, before, after, table: dict) -> None:
    """Raises UserError where what is loaded was made for another domain of DMControl, for other observations, or for other actions."""
    worlds = []
    for config in (before, after):
        with refusals(), closing(DOMAINS[domain](config, num_envs=1)) as env:
            worlds.append((env.observation_shape, env.actions))
    (shape, actions), (other_shape, other_actions) = worlds
    if domain == "dmc" and domain_of(before.name) != domain_of(after.name):  # whose shapes may agree, as those of all pictures do
        raise UserError(
            f"{after.name} is no task of {domain_of(before.name)}, which the run knows: a transfer stays among the tasks of one domain"
        )
    if shape != other_shape:
        raise UserError(
            f"{after.name} shows observations of shape {other_shape}, the run's {before.name} {shape}: a transfer keeps what an agent sees"
        )
    if actions != other_actions and any(table[part] != RESET for part in LEARNED):
        hint = ", or pre-train with --env.full-action-set" if domain == "atari" else ""
        raise UserError(f"{after.name} has {other_actions} actions, the run's {before.name} {actions}: use --rule random-head{hint}")


WORDS = {LOAD: "loaded", FREEZE: "loaded and frozen", RESET: "begins anew"}


def main(argv: Sequence[str] | None = None) -> None:
    """`urlfast transfer`."""
    command("transfer", run_transfer, argv)


if __name__ == "__main__":
    main()
