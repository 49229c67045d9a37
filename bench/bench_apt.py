"""APT's update, and the whole loop on a game, beside an equivalent of mini_apt (bench/peers.py), the Atari agent its authors released.

Its network, batch (64 transitions in two views) and updates a step (one), in float32 and, where the processor has it, in bfloat16; the peer
is float32 either way. A call of the loop is four agent steps: acting, the game, storing, and four updates. Ours plays four games at once,
the peer knows one. Floor: the arithmetic of three encoder passes and one backward, at the machine's peak.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from bench.harness import Case, Work
from bench.peers import MiniAPT, MiniReplay
from urlfast.device import has_bf16
from urlfast.envs.atari import AtariConfig, make_atari
from urlfast.methods.apt import APT, APTConfig

CONFIG, GAME, STEPS = APTConfig.mini_apt(), AtariConfig(), 4  # agent steps of a call of the loop


def flops() -> float:
    """Of what an update cannot do without: no pass twice, no gradient that nobody uses."""
    views, side, channels, width = 2 * CONFIG.batch_size, 84, 4, 2 * CONFIG.learner.hidden
    layers = []
    for outputs, kernel, stride in CONFIG.encoder.conv:
        side = (side - kernel) // stride + 1
        layers.append(2 * views * side * side * outputs * channels * kernel**2)
        channels = outputs
    flat = channels * side * side
    hidden, head = 2 * views * flat * width, 2 * views * flat * CONFIG.representation.projection[0]
    encoder = 3 * sum(layers) + sum(layers) + sum(layers[1:])  # o_t, and o_{t+1} by two encoders; weights' and inputs' gradients
    return encoder + 3 * head + 4 * hidden  # Q: of o_t, twice of o_{t+1}, and its weights' gradient


def transitions() -> tuple[list]:
    """Steps of random play in one game: (observation, action, the Step that follows)."""
    rng, rows = np.random.default_rng(0), []
    with make_atari(GAME, num_envs=1, seed=0) as env:
        step = env.reset()
        for _ in range(400):
            action = rng.integers(0, env.num_actions, 1)
            after = env.step(action)
            rows.append((step, action, after))
            step = after
    return (rows,)


def row(step, action, after) -> dict:
    """As urlfast.train stores it."""
    rows = {"observation": step.observation[:, -1:], "action": action, "reward": after.reward, "terminated": after.terminated}
    return rows | {"is_first": step.is_first, "is_last": step.is_last}


def stacks(step) -> torch.Tensor:
    return torch.from_numpy(step.observation[0]).float() / 255


def ours(precision, env):
    method = APT(replace(CONFIG, precision=precision, learning_start=0), env.observation_shape, env.num_actions, seed=0)
    return method, method.make_replay(env.num_envs, 100_000)


def peer(rows, env):
    """With our weights, and the transitions in its replay."""
    torch.manual_seed(0)
    mini, replay = MiniAPT(env.num_actions), MiniReplay(100_000)
    mini.take_weights(ours("fp32", env)[0])
    for step, action, after in rows:
        replay.add(stacks(step), int(action[0]), stacks(after), float(not after.terminated[0]))
    return mini, replay


def update(precision, rows):
    with make_atari(GAME, num_envs=1) as env:
        method, replay = ours(precision, env)
    for step, action, after in rows:
        replay.add(row(step, action, after))
    return lambda: method.update(replay)


def mini_update(rows):
    with make_atari(GAME, num_envs=1) as env:
        mini, replay = peer(rows, env)
    return lambda: mini.update(*replay.sample(CONFIG.batch_size))


def loop(precision, threads, rows):
    env = make_atari(replace(GAME, workers=threads), num_envs=STEPS, seed=0)
    method, replay = ours(precision, env)
    step = env.reset()
    for _ in range(len(rows) // STEPS):
        action = method.agent.learner.uniform(env.num_envs).numpy()
        after = env.step(action)
        replay.add(row(step, action, after))
        step = after

    def call():
        nonlocal step
        action = method.act(step)
        env.send(action)
        for _ in range(STEPS):
            metrics = method.update(replay)
        after = env.recv()
        replay.add(row(step, action, after))
        step = after
        return metrics

    return call


def mini_loop(rows):
    env = make_atari(replace(GAME, workers=1), num_envs=1, seed=0)
    mini, replay = peer(rows, env)
    step = env.reset()
    state = stacks(step)

    def call():
        nonlocal step, state
        for _ in range(STEPS):
            action = mini.act(state, CONFIG.learner.epsilon)
            after = env.step(np.array([action]))
            following = stacks(after)
            if not step.is_last[0]:
                replay.add(state, action, following, float(not after.terminated[0]))
            step, state = after, following
            metrics = mini.update(*replay.sample(CONFIG.batch_size))
        return metrics

    return call


def check(results):
    """Other samples under other crops, so that only sizes can agree; python_tests/test_peers.py compares the values themselves."""
    found = {name: float(metrics["contrastive_loss"]) for name, metrics in results.items()}
    assert np.isfinite(list(found.values())).all() and max(found.values()) < 2 * min(found.values()), f"contrastive_loss: {found}"


def cases(threads):
    found = []
    for precision, target in [("fp32", 2.5), ("bf16", 4.0)]:
        if precision == "bf16" and not has_bf16(torch.device("cpu")):
            continue
        case = partial(Case, "apt", threads=threads, inputs=transitions, check=check, targets={"mini_apt": target})
        found += [
            case(
                shape=f"update, {precision}",
                contestants={"urlfast": partial(update, precision), "mini_apt": mini_update},
                floor=Work(**{precision: flops()}),
            ),
            case(
                shape=f"loop of {STEPS} steps, {precision}",
                contestants={"urlfast": partial(loop, precision, threads), "mini_apt": mini_loop},
                floor=Work(**{precision: STEPS * flops()}),
            ),
        ]
    return found
