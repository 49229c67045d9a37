"""The training loop without a run around it, for methods that learn on the toy worlds."""

import numpy as np


def train(method, env, steps, stored_action=lambda action, previous: action):
    """Trains for `steps` agent steps over all environments, as urlfast.train does. stored_action: what a broken loop would store."""
    replay = method.make_replay(env.num_envs, steps)
    taken = updates = 0
    step, previous = env.reset(), np.zeros(env.num_envs, np.int64)
    while taken < steps:
        action = method.act(step)
        after = env.step(action)
        rows = {
            "observation": step.observation[:, -env.frame_shape[0] :],
            "action": stored_action(action, previous),
            "reward": after.reward,
            "terminated": after.terminated,
            "is_first": step.is_first,
            "is_last": step.is_last,
        }
        method.observe(rows)
        replay.add(rows)
        taken += int((~step.is_last).sum())
        step, previous = after, action
        while updates < method.config.updates_per_step * (taken - method.config.learning_start):
            metrics = method.update(replay)
            updates += 1
    return metrics


def mean_return(method, env, episodes):
    """Of the greedy policy, each environment playing an equal share."""
    step, returns = env.reset(), []
    while len(returns) < episodes:
        step = env.step(method.act(step, explore=False))
        returns += step.score[step.is_last].tolist()
    return np.mean(returns[:episodes])
