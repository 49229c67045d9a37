"""APT's update for continuous control, and the loop on walker, beside an equivalent of URLB's ICM-APT (bench/peers.py), with its networks.

States: its batch of 1024, one update for two agent steps. Pixels: 256, because of 1024 the peer's update takes above 10 s. In float32 and,
where the processor has it, in bfloat16; the peer is float32 either way. A call of the loop is two agent steps and an update: ours steps two
environments in other processes, the peer steps one in its own. Each contestant has a process to itself, because ours keeps the memory it
frees, as urlfast.train has it: beside it the peer would find its hundreds of megabytes ready, for which its user waits at each update.
Floor: the products of the update at the machine's peak.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from bench.harness import Case, Work, apart, optional
from bench.peers import URLBAPT, URLBReplay
from urlfast.device import has_bf16, keep_freed_memory
from urlfast.envs.dmc import DMCConfig, make_dmc
from urlfast.methods.apt import APT, APTConfig

CONFIG, TASK, ROWS = APTConfig.urlb(), "walker_walk", 1200
STATES, PIXELS, ACTIONS = (24,), (9, 84, 84), 6  # as walker's are; three pictures in colour
BATCH = {STATES: CONFIG.batch_size, PIXELS: 256}


def flops(shape) -> float:
    """Of what an update cannot do without: no gradient that nobody uses; of twin critics the actor's goes through the lesser alone."""
    encoder, width, H, Z, A = 0, shape[0], CONFIG.learner.hidden, CONFIG.representation.features, ACTIONS
    if len(shape) == 3:
        channels, side, layers = shape[0], shape[1], []
        for outputs, kernel, stride in CONFIG.encoder.conv:
            side = (side - kernel) // stride + 1
            layers.append(side * side * outputs * channels * kernel**2)
            channels = outputs
        encoder, width = 4 * sum(layers) - layers[0], channels * side * side  # o_t, o_{t+n}; weights' and inputs' gradients
    trunk, joined, hidden = (CONFIG.learner.feature_dim, A, H * H) if len(shape) == 3 else (H, 0, 0)
    q = (trunk + joined) * H + hidden + H  # one critic behind the trunk
    policy = trunk * H + hidden + H * A
    critic_trunk = (width + A - joined) * trunk
    icm_trunk = (5 if encoder else 4) * width * Z + width * Z  # both views, their weights' gradients, the images'; the reward's pass
    icm = 3 * ((Z + A) * H + H * Z + 2 * Z * H + H * A)
    target = width * trunk + policy + critic_trunk + 2 * q
    critic = 2 * critic_trunk + 3 * 2 * q
    actor = 2 * width * trunk + 3 * policy + critic_trunk + 2 * q + q + (0 if encoder else A * trunk)
    neighbours = BATCH[shape] * Z / 2
    return 2 * BATCH[shape] * (encoder + icm_trunk + icm + target + critic + actor + neighbours)


def inputs(shape) -> tuple[list]:
    """Rows of one stream: what they show does not matter to an update's time."""
    rng = np.random.default_rng(0)
    frame = (3, *shape[1:]) if len(shape) == 3 else shape
    draw = (lambda: rng.integers(0, 256, frame, np.uint8)) if len(shape) == 3 else (lambda: rng.standard_normal(frame, np.float32))
    return ([(draw(), rng.uniform(-1, 1, ACTIONS).astype(np.float32)) for _ in range(ROWS)],)


def ours(precision, shape, num_envs):
    config = replace(CONFIG, precision=precision, batch_size=BATCH[shape], learning_start=0)
    method = APT(config, shape, (ACTIONS,), seed=0, frame_stack=3 if shape == PIXELS else 1)
    return method, method.make_replay(num_envs, 100_000)


def peer(shape):
    """With our weights."""
    torch.manual_seed(0)
    urlb = URLBAPT(shape, ACTIONS)
    urlb.take_weights(ours("fp32", shape, 1)[0])
    return urlb, URLBReplay(ROWS)


def update(precision, shape, rows):
    keep_freed_memory()
    method, replay = ours(precision, shape, 1)
    for i, (observation, action) in enumerate(rows):
        row = {"observation": observation[None], "action": action[None], "reward": np.zeros(1, np.float32)}
        replay.add(row | {"is_first": np.array([i == 0]), "is_last": np.zeros(1, bool), "terminated": np.zeros(1, bool)})
    return lambda: method.update(replay)


def urlb_update(shape, rows):
    urlb, replay = peer(shape)
    stack, n = (3 if shape == PIXELS else 1), CONFIG.n_step
    discount = np.full(1, CONFIG.gamma**n, np.float32)
    for i in range(stack, len(rows) - n):
        seen, later = (np.concatenate([rows[j][0] for j in range(end - stack + 1, end + 1)]) for end in (i, i + n))
        replay.add(seen, rows[i][1], later, discount)
    return lambda: urlb.update(*replay.sample(BATCH[shape]))


def loop(precision, threads):
    keep_freed_memory()
    env = make_dmc(DMCConfig(task=TASK, num_envs=2, workers=threads))
    method, replay = ours(precision, STATES, env.num_envs)
    step = env.reset()

    def send(action):
        env.send(action)
        return action

    def receive(action):
        nonlocal step
        after = env.recv()
        rows = {"observation": step.observation, "action": action, "reward": after.reward, "terminated": after.terminated}
        replay.add(rows | {"is_first": step.is_first, "is_last": step.is_last})
        step = after

    for _ in range(ROWS // 2):
        receive(send(method.agent.learner.uniform(env.num_envs).numpy()))

    def call():
        action = send(method.act(step))
        metrics = method.update(replay)
        receive(action)
        return metrics

    return call


def urlb_loop():
    from dm_control import suite  # no earlier: it chooses what to draw with when it is imported

    env = suite.load(*TASK.split("_"), environment_kwargs={"flat_observation": True})
    urlb, replay = peer(STATES)
    n, window, random = CONFIG.n_step, [], np.random.default_rng(0)
    discount = np.full(1, CONFIG.gamma**n, np.float32)

    def shown(now):
        return now.observation["observations"].astype(np.float32)

    def advance(now, action):
        """The next time step; the transition that began n steps before is stored. An episode's end begins another."""
        if now.last():
            window.clear()
            return env.reset()
        after = env.step(action)
        window.append((shown(now), action))
        if len(window) == n:
            replay.add(*window.pop(0), shown(after), discount)
        return after

    now = env.reset()
    for _ in range(ROWS):
        now = advance(now, random.uniform(-1, 1, ACTIONS).astype(np.float32))

    def call():
        nonlocal now
        for _ in range(2):
            now = advance(now, urlb.act(torch.from_numpy(shown(now))).numpy())
        return urlb.update(*replay.sample(CONFIG.batch_size))

    return call


def check(results):
    """Other samples and noise, so that only sizes can agree; python_tests/test_peers.py compares the values themselves."""
    for name in ("forward_error", "inverse_error"):
        found = {who: metrics[name] for who, metrics in results.items()}
        assert np.isfinite(list(found.values())).all() and max(found.values()) < 1.3 * min(found.values()), f"{name}: {found}"


def cases(threads):
    found = []
    for precision, states, pixels in [("fp32", 4.0, None), ("bf16", 8.0, 3.0)]:
        if precision == "bf16" and not has_bf16(torch.device("cpu")):
            continue
        case = partial(Case, "apt_dmc", threads=threads, check=check, processes=True)
        for name, shape, target in [("states", STATES, states), ("pixels", PIXELS, pixels)]:
            contestants = {"urlfast": partial(update, precision, shape), "URLB": partial(urlb_update, shape)}
            found.append(
                case(
                    shape=f"{name}, update of {BATCH[shape]}, {precision}",
                    inputs=partial(inputs, shape),
                    contestants={who: apart(make, threads) for who, make in contestants.items()},
                    floor=Work(**{precision: flops(shape)}),
                    targets={"URLB": target} if target else {},
                )
            )
        if optional("dm_control"):
            contestants = {"urlfast": partial(loop, precision, threads), "URLB": urlb_loop}
            found.append(
                case(
                    shape=f"states, loop of 2 steps, {precision}",
                    inputs=tuple,
                    contestants={who: apart(make, threads) for who, make in contestants.items()},
                    floor=Work(**{precision: flops(STATES)}),
                    targets={"URLB": states},
                )
            )
    return found
