"""DMControl's tasks by name, and the rewards that are not the suite's.

A task is called <domain>_<task>. Every one of dm_control's suite is known as it is. Those below take model, initial states, observations
and time limit from a task of the suite, and only pay another reward: URLB's are dense, and follow its code; OURS are sparse. APT names
sparse tasks on walker, cheetah and hopper without defining them, so these are our own, and no published figure can be compared with them.
A reward is paid for every control step, and lies in 0..1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Task:
    base: str  # the suite's task that it is but for the reward
    reward: Callable[..., float]  # of (physics after the step, base's reward for the step)
    floor: float = 1.0  # length of the floor in the suite's; seen in pictures only, for a plane has no edge to fall off


def rise(value: float, full: float, margin: float, at_margin: float = 0.0) -> float:
    """1 from `full` on, `at_margin` at full - margin, linear between and beyond, and never below 0 (dm_control's linear tolerance)."""
    return float(np.clip(1 - (1 - at_margin) * (full - value) / margin, 0, 1))


def zero_below(least: float) -> Callable[..., float]:
    """The base's reward where it is at least `least`, else nothing."""
    return lambda physics, reward: reward if reward >= least else 0.0


def one_from(least: float, dense: Callable[..., float]) -> Callable[..., float]:
    """1 where a dense reward is at least `least`, else 0."""
    return lambda physics, reward: float(dense(physics, reward) >= least)


# URLB's --------------------------------------------------------------------------------------------------------------------------


def spin(physics, direction: int) -> float:
    """Angular momentum about y of all that hangs on the torso: 1 from 5 on, 0 from 0 down. direction -1: the other way round."""
    return rise(direction * physics.named.data.subtree_angmom["torso"][1], full=5, margin=5)


def walker_flip(physics, stand: float) -> float:
    return stand * (5 * spin(physics, 1) + 1) / 6


def cheetah_run_backward(physics, _) -> float:
    return rise(-physics.speed(), full=10, margin=10)


def cheetah_flip(direction: int) -> Callable[..., float]:
    return lambda physics, _: spin(physics, direction)


def hopper_stands(physics) -> bool:
    return 0.6 <= physics.height() <= 2


def hopper_hop_backward(physics, _) -> float:
    return hopper_stands(physics) * rise(-physics.speed(), full=2, margin=1, at_margin=0.5)


def hopper_flip(direction: int) -> Callable[..., float]:
    return lambda physics, _: hopper_stands(physics) * spin(physics, direction)


def quadruped_stand(physics, _=None) -> float:
    """1 upright, 0 upside down."""
    return rise(physics.torso_upright(), full=1, margin=2)


def quadruped_jump(physics, _) -> float:
    """Upright, and the centre of mass as high as 1 m."""
    height = physics.named.data.sensordata["center_of_mass"][2]
    return quadruped_stand(physics) * rise(height, full=1, margin=1, at_margin=0.5)


def quadruped_roll(speed: float) -> Callable[..., float]:
    """Upright, and moving in any direction."""

    def reward(physics, _):
        moving = rise(np.linalg.norm(physics.torso_velocity()), full=speed, margin=speed, at_margin=0.5)
        return quadruped_stand(physics) * moving

    return reward


URLB = {
    "walker_flip": Task("walker_stand", walker_flip),
    "cheetah_run_backward": Task("cheetah_run", cheetah_run_backward, floor=2),
    "cheetah_flip": Task("cheetah_run", cheetah_flip(1), floor=2),
    "cheetah_flip_backward": Task("cheetah_run", cheetah_flip(-1), floor=2),
    "hopper_hop_backward": Task("hopper_hop", hopper_hop_backward, floor=2),
    "hopper_flip": Task("hopper_hop", hopper_flip(1), floor=2),
    "hopper_flip_backward": Task("hopper_hop", hopper_flip(-1), floor=2),
    "quadruped_stand": Task("quadruped_walk", quadruped_stand),
    "quadruped_jump": Task("quadruped_walk", quadruped_jump),
    "quadruped_roll": Task("quadruped_walk", quadruped_roll(0.5)),
    "quadruped_roll_fast": Task("quadruped_walk", quadruped_roll(5.0)),
}
# Where the brick lies that the Jaco arm is to reach, in metres (x, y). But for that place, which it draws, dm_control's reach_duplo is the
# same: it pays 1 within 5 cm. Episodes are of 10 s, 250 control steps.
JACO = {
    "jaco_reach_top_left": (-0.09, 0.09),
    "jaco_reach_top_right": (0.09, 0.09),
    "jaco_reach_bottom_left": (-0.09, -0.09),
    "jaco_reach_bottom_right": (0.09, -0.09),
}


# Ours ----------------------------------------------------------------------------------------------------------------------------


def hopper_jump(physics, _) -> float:
    """1 while the hopper is in the air and upright: torso 0.6 m above foot, foot 0.15 m above floor (centres of mass).

    Not in the first 0.4 s, in which it falls from where the episode puts it.
    """
    foot = physics.named.data.xipos["foot", "z"]
    return float(physics.height() >= 0.6 and foot >= 0.15 and physics.time() >= 0.4)


# Uniformly random actions were paid in 3 of 10 episodes of walker_flip_sparse, for a step or a few, and in none of any other but BY_CHANCE.
OURS = {
    "hopper_jump": Task("hopper_hop", hopper_jump),
    "hopper_hop_sparse": Task("hopper_hop", zero_below(0.25)),
    "hopper_flip_sparse": Task("hopper_hop", one_from(0.5, hopper_flip(1)), floor=2),
    "walker_walk_sparse": Task("walker_walk", zero_below(0.7)),
    "walker_run_sparse": Task("walker_run", zero_below(0.25)),
    "walker_flip_sparse": Task("walker_stand", one_from(0.5, walker_flip)),
    "cheetah_run_sparse": Task("cheetah_run", zero_below(0.25)),
    "cheetah_flip_sparse": Task("cheetah_run", one_from(0.5, cheetah_flip(1)), floor=2),
}
BY_CHANCE = {"cheetah_flip_sparse"}  # a cheetah that thrashes about does spin: random actions are paid for a tenth of the steps
TASKS = URLB | OURS


# Names ---------------------------------------------------------------------------------------------------------------------------


def task_id(task: str) -> str:
    """One spelling for all of a name's: "Walker-Walk" is "walker_walk", and "cup_catch" DrQ's word for "ball_in_cup_catch"."""
    name = re.sub(r"[^a-z0-9]+", "_", task.strip().lower())
    return re.sub("^cup_", "ball_in_cup_", name)


def domain_of(task: str) -> str:
    """The robot of a task; what is learned on one task of a domain fits the others."""
    return re.match("ball_in_cup|point_mass|humanoid_cmu|[a-z0-9]*", task_id(task))[0]


def is_sparse(task: str) -> bool:
    """Whether an episode without reward is one that failed: then a share of episodes that succeed can be reported."""
    name = task_id(task)
    return (name.endswith("_sparse") or name in OURS) and name not in BY_CHANCE
