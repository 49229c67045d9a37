"""One file a method, to be read beside its paper.

The contract, which every method keeps and no base class enforces:

    M(config, observation_shape, actions, *, device, seed, frame_stack)     actions: how many there are, or the shape of a vector in -1..1
    make_replay(num_envs, steps) -> SequenceReplay    act(step, explore=True) -> actions    update(replay) -> metrics
    observe(rows)                           rows about to be stored, to which it may add columns of its own
    took(actions)                           of a method that remembers what it did: the actions executed, where act's were not
    state_dict() / load_state_dict(state)   {part: state}; loading wants exactly the parts that saving gives
    load_part(part, state)   freeze(part)   what a transfer does with one of them
    TRANSFER[rule]           {part: LOAD | FREEZE | RESET} for every part that the method saves

A method whose environments may step on other machines (actors.py) has besides

    agent                    the RecurrentAgent that acts: its q of the last act, and where its environments stand among all (first, of)
    acting, fixed, statistics   parts that act and observe read: those that updates change; that nothing changes; that acting changes
    seen                     int64 array, what act has counted since update told of it; actors add theirs
    initial_errors(batch, q) |errors| (B, T) of sequences as they were acted; batch: their columns, (B, L) and mask (B, L - 1)
"""

from typing import Literal

import numpy as np

Rule = Literal["load", "freeze", "reset"]

LOAD: Rule = "load"  # the task begins with what was pre-trained
FREEZE: Rule = "freeze"  # and keeps it
RESET: Rule = "reset"  # the task begins with its own


def transfer(method, parts: dict[str, dict], table: dict[str, Rule]) -> None:
    """Gives `method` what `table` says of the saved `parts` of another one.

    Raises ValueError for a part that the table does not name, and for one to be loaded whose shapes are not the method's.
    """
    unnamed = [part for part in parts if part not in table]
    if unnamed:
        raise ValueError(f"parts: the transfer table says nothing of {', '.join(unnamed)}; it names {', '.join(table)}")
    for part, state in parts.items():
        if table[part] == RESET:
            continue
        try:
            method.load_part(part, state)
        except RuntimeError as error:  # torch names every tensor that does not fit
            raise ValueError(f"parts: {part} does not fit the task's network: {error}") from None
        if table[part] == FREEZE:
            method.freeze(part)


def stored_rows(method, env, step, action, after) -> dict[str, np.ndarray]:
    """What the replay is to have of one step of all environments: o_t, a_t, what that paid, and the method's own columns."""
    limit = method.config.reward_clip  # of what is learned from; the score stays as it is
    rows = {
        "observation": step.observation[:, -env.frame_shape[0] :],
        "action": action,
        "reward": after.reward if limit is None else np.clip(after.reward, -limit, limit),
        "terminated": after.terminated,
        "is_first": step.is_first,
        "is_last": step.is_last,
    }
    method.observe(rows)
    return rows


def check_parts(state: dict[str, dict], parts: tuple[str, ...]) -> None:
    """Raises ValueError where a state does not hold exactly these parts."""
    if state.keys() != set(parts):
        raise ValueError(f"state: must have the parts {', '.join(sorted(parts))}; got {', '.join(sorted(state))}")


def check_part(part: str, parts: tuple[str, ...]) -> None:
    """Raises ValueError for a part that is none of these."""
    if part not in parts:
        raise ValueError(f"part: must be one of {', '.join(parts)}, got {part!r}")


def load_parts(method, state: dict[str, dict], parts: tuple[str, ...]) -> None:
    """All that `method` saved, part by part. Raises ValueError where one is missing or unknown."""
    check_parts(state, parts)
    for part, values in state.items():
        method.load_part(part, values)
