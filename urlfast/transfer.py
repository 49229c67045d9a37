"""`urlfast transfer RUN`: what a run has pre-trained, on a reward; by default for the 100,000 steps of Atari-100k and URLB.

The rules are the pre-training method's own (its TRANSFER table), by which networks are fine-tuned, and those of CPT, by which its policy
helps a recurrent agent. Replay and optimisers begin anew; which parts are loaded, frozen or reset is printed. The comparison from scratch
is `urlfast train drq atari`, drq-sac, ddpg or r2d2, with the same options.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace

import tyro

from urlfast.checkpoint import read_at, read_latest
from urlfast.learners.ddpg import DDPGConfig
from urlfast.learners.drq import DrQConfig
from urlfast.learners.drq_sac import DrQSACConfig
from urlfast.learners.r2d2 import R2D2Config
from urlfast.methods import FREEZE, LOAD, RESET, transfer
from urlfast.methods.agent import LEARNED
from urlfast.methods.cpt import VARIANTS
from urlfast.run import Run, UsageError, command, nearest
from urlfast.train import DOMAINS, METHODS, PRESETS, TrainConfig, check_fits, load, refusals, start, take, usage

# The method that learns from the reward, by the pre-trained learner.
TASK = {DrQConfig: "drq", DDPGConfig: "ddpg", DrQSACConfig: "drq-sac", R2D2Config: "r2d2"}
SAYS = {
    "whole": "encoder and Q go on learning",
    "random-head": "the encoder goes on learning, Q begins anew",
    "frozen-encoder": "Q goes on learning, the encoder stays as it is",
    "cpt": "a new R2D2 agent, which the policy leads on exploratory flights, and which may choose to follow it for a step",
    "cpt-shared-torso": "the same on the policy's convolutions, which stay as they are",
    "exploitation": "no flights: it may choose to follow the policy for a step",
    "exploration": "flights alone",
    "frozen-torso": "no policy: R2D2 on the convolutions, which stay as they are",
    "fine-tuning": "no policy: all weights are where CPT's R2D2 begins",
    "eps-z-greedy": "nothing but a baseline: R2D2 that repeats each random action for a while",
}
STEPS = {"atari": 100_000, "dmc": 100_000}  # of Atari-100k, and of URLB


@dataclass(frozen=True)
class TransferConfig(TrainConfig):
    task: str = ""  # game, or task of the same domain, to learn; the run's own where empty
    rule: str = ""  # what the task begins with, and what helps to explore
    checkpoint: str = "latest"  # of the pre-trained run: latest, or a step


def rules(method: str, domain: str, pretrained: TrainConfig) -> list[str]:
    """Those of a run, the default first."""
    own = list(getattr(METHODS[method], "TRANSFER", ()))
    if ("cpt-task", domain) not in PRESETS or isinstance(pretrained.method.learner, DDPGConfig | DrQSACConfig):
        return own  # R2D2 takes numbered actions
    more = [rule for rule in VARIANTS if rule != "fine-tuning" or isinstance(pretrained.method.learner, R2D2Config)]
    return more + own if method in ("cpt", "ngu") or not own else own + more


def unknown(rule: str, method: str, domain: str, known: list[str]) -> str:
    """Why `rule` is none of those that a run's pre-training has: it is others', or nobody's."""
    others = dict.fromkeys(name for (name, place), of in PRESETS.items() if any(rule in rules(name, place, one) for one in of.values()))
    if not others:
        return f"unknown {rule!r}{nearest(rule, known)}"
    kind = " with numbered actions" if rule in VARIANTS else ""
    return f"{rule!r} is not for this run of {method} on {domain}, but for those of {', '.join(others)}{kind} (here: {', '.join(known)})"


def run_transfer(argv: list[str]) -> int:
    if argv and not argv[0].startswith("-"):
        run = Run.find(argv[0])
    elif {"-h", "--help"} & set(argv):
        print("usage: urlfast transfer RUN [--task TASK] [--rule RULE] [--preset NAME] [options]\n")
        print("`urlfast transfer RUN --help` lists the rules, and every option with its default, for that run.")
        return 0
    else:
        raise UsageError("which run? urlfast transfer RUN [--task TASK] [--rule RULE]")
    method, domain, pretrained = load(run.config)
    pretrained = replace(pretrained, runs=str(run.folder.parent))
    task, preset, wanted = plan(method, domain, run.config.get("preset"), pretrained, argv[1:], f"urlfast transfer {argv[0]}")
    config = TrainConfig(**{field.name: getattr(wanted, field.name) for field in fields(TrainConfig)})
    rule, variant = wanted.rule, VARIANTS.get(wanted.rule)

    checkpoint = read_latest(run.folder) if wanted.checkpoint == "latest" else read_at(run.folder, wanted.checkpoint)
    follows = variant is not None and config.method.follows
    with checkpoint.fitting():
        parts = dict(checkpoint.state["method"])
        if variant:
            parts, table = with_policy(parts, run.config, follows), variant.table(parts) | {"pretrained": FREEZE}
        else:
            table = METHODS[method].TRANSFER[rule]
    keeps_actions = follows or any(table.get(part, RESET) != RESET for part in LEARNED)
    instead = f"use --rule {'frozen-torso' if variant else 'random-head'}"
    instead += ", or pre-train with --env.full-action-set" if domain == "atari" else ""
    with refusals(), closing(DOMAINS[domain](config.env, num_envs=1)) as env:
        check_fits(domain, pretrained.env, config.env, env, instead if keeps_actions else "")
    print(f"from {run.folder}, {method} at step {checkpoint.step:,}, rule {rule}:")
    for part in parts:
        print(f"  {part:20} {WORDS[table.get(part, RESET)] if part in METHODS[task].parts else 'not used'}", flush=True)

    def prepare(agent):
        with checkpoint.fitting():
            transfer(agent, parts, table)

    return start(
        task,
        domain,
        preset,
        config,
        name=f"{method}-transfer-{rule}-{domain}",
        prepare=prepare,
        transfer={"run": str(run.folder), "method": method, "step": checkpoint.step, "rule": rule},
    )


def plan(method: str, domain: str, preset: str | None, pretrained: TrainConfig, argv: list[str], prog: str) -> tuple:
    """(method, preset, TransferConfig) of what learns a task after such a run by the options `argv`; its environment plays the task.

    Raises UsageError for options that do not fit that run.
    """
    known, argv = rules(method, domain, pretrained), list(argv)
    if not known:
        raise UsageError(f"from a run of {method} on {domain} no rule leads on")
    rule, chosen = take(argv, "--rule") or known[0], take(argv, "--preset")
    if rule not in known:
        raise UsageError(f"--rule: {unknown(rule, method, domain, known)}")
    variant = VARIANTS.get(rule)
    task = "cpt-task" if variant else "aps-task" if method == "aps" else TASK[type(pretrained.method.learner)]
    presets = PRESETS[task, domain]
    if chosen is None:
        same = preset if not variant or isinstance(pretrained.method.learner, R2D2Config) else None
        chosen = same if same in presets else next(iter(presets))
    if chosen not in presets:
        raise UsageError(f"--preset: unknown {chosen!r}{nearest(chosen, presets)}")
    default = inherited(presets[chosen], domain, pretrained, variant)
    default = replace(default, seed=pretrained.seed, runs=pretrained.runs)
    options = {field.name: getattr(default, field.name) for field in fields(TrainConfig)}
    says = [f"  {name:18}{SAYS.get(name, '')}" for name in known]
    description = "\n".join(["Learns a task with what a run has pre-trained. --rule:", *says])
    with usage():
        wanted = tyro.cli(TransferConfig, default=TransferConfig(**options, rule=rule), args=argv, prog=prog, description=description)
    with refusals():
        return task, chosen, replace(wanted, env=wanted.env.playing(wanted.task)) if wanted.task else wanted


def inherited(default: TrainConfig, domain: str, pretrained: TrainConfig, variant) -> TrainConfig:
    """A preset of the task, on the networks and in the world of the pre-trained run."""
    env = replace(pretrained.env, num_envs=default.env.num_envs)
    if variant:
        if hasattr(env, "life_loss_terminal"):
            env = replace(env, life_loss_terminal=default.env.life_loss_terminal)
        return replace(default, method=default.method.after(pretrained.method, variant), env=env)
    steps = default.steps if isinstance(pretrained.method.learner, R2D2Config) else STEPS.get(domain, default.steps)
    return replace(default, method=default.method.after(pretrained.method), env=env, steps=steps)


def with_policy(parts: dict[str, dict], config: dict, follows: bool) -> dict[str, dict]:
    """The saved parts, as CPT's rules read them: target networks begin equal to the others, and the policy is one more part."""
    equal = {f"{name}_target": parts[name] for name in ("encoder", "q") if name in parts}
    made_by = {name: config[name] for name in ("method", "domain", "preset", "config") if name in config}
    return parts | equal | ({"pretrained": {"run": made_by, "parts": parts}} if follows else {})


WORDS = {LOAD: "loaded", FREEZE: "loaded and frozen", RESET: "begins anew"}


def main(argv: Sequence[str] | None = None) -> None:
    """`urlfast transfer`."""
    command("transfer", run_transfer, argv)


if __name__ == "__main__":
    main()
