"""dm_control's suite with less around MuJoCo: the same calls of MuJoCo and the same numbers, to the last bit.

A step of plain dm_control spends about as long in Python as in MuJoCo: in names that are looked up anew at each access, in arrays for
single numbers, in the search for warnings, in observations that nobody sees.
"""

from __future__ import annotations

from collections import OrderedDict

import mujoco
import numpy as np
from dm_control.mujoco import index
from dm_control.rl import control
from dm_control.utils import rewards


def quicken() -> None:
    """From here on environments that are loaded in this process are quick in names and rewards."""
    index.FieldIndexer = NamedField
    rewards.tolerance = tolerance


_FieldIndexer, _tolerance, _sigmoids = index.FieldIndexer, rewards.tolerance, rewards._sigmoids


class NamedField(_FieldIndexer):
    """An array of MuJoCo's by names, each expression of which is looked up once."""

    __slots__ = ("_known",)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._known = {}

    def __getitem__(self, key):
        try:
            return self._field[self._known[key]]
        except (KeyError, TypeError):  # TypeError: of a list or a slice, which no dictionary takes as a key
            frozen = _frozen(key)
        try:
            known = self._known.get(frozen)
        except TypeError:  # an array
            return super().__getitem__(key)
        if known is None:
            known = self._known[frozen] = self._convert_key(key)
        return self._field[known]


def _frozen(key):
    """An index as a dictionary's key."""
    if type(key) is tuple:
        return tuple(map(_frozen, key))
    if type(key) is slice:
        return slice, key.start, key.stop, key.step
    return (list, *key) if type(key) is list else key


def tolerance(x, bounds=(0.0, 0.0), margin=0.0, sigmoid="gaussian", value_at_margin=0.1):
    """dm_control's, which for a single number computes on arrays of one."""
    lower, upper = bounds
    if not np.isscalar(x) or not lower <= upper or not margin > 0:
        return _tolerance(x, bounds, margin, sigmoid, value_at_margin)
    if lower <= x <= upper:
        return 1.0
    return float(_sigmoids((lower - x if x < lower else x - upper) / margin, value_at_margin, sigmoid))


class Suite(control.Environment):
    """An environment of the suite whose step comes in parts: of repeated steps only the last is observed, and before a picture none."""

    def advance(self, action: np.ndarray) -> tuple[float, float | None]:
        """A control step. Returns its reward, and the discount where it ended the episode, else None. Raises PhysicsError."""
        task, physics = self._task, self._physics
        task.before_step(action, physics)
        physics.step(self._n_sub_steps)
        task.after_step(physics)
        reward = task.get_reward(physics)
        self._step_count += 1
        discount = 1.0 if self._step_count >= self._step_limit else task.get_termination(physics)
        self._reset_next_step = discount is not None
        return reward, discount

    def observe(self) -> list[np.ndarray]:
        """The parts of an observation, in the order in which dm_control joins them."""
        parts = self._task.get_observation(self._physics)
        return [parts[name] for name in (parts if isinstance(parts, OrderedDict) else sorted(parts))]


def quick_step(physics):
    """physics.step without dm_control's search for warnings, a tenth of a walker's step."""
    model, data, warnings = physics.model.ptr, physics.data.ptr, physics.data.warning.number
    runge_kutta = physics.model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4

    def step(nstep=1):
        before = warnings.tobytes()
        if runge_kutta:
            mujoco.mj_step(model, data, nstep)
        else:  # the first half of the first step was made at the end of the one before
            mujoco.mj_step2(model, data)
            if nstep > 1:
                mujoco.mj_step(model, data, nstep - 1)
        mujoco.mj_step1(model, data)
        if warnings.tobytes() != before:
            raise control.PhysicsError("MuJoCo warned of an invalid state")

    return step
