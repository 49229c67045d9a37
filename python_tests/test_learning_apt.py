"""APT explores a pixel maze without any reward: it sees twice as much of it as random play does in as many steps."""

import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_training import train
from toys import NineRooms

from urlfast.augment import AugmentConfig
from urlfast.intrinsic import ParticleConfig, ParticleReward
from urlfast.learners.drq import DrQConfig
from urlfast.methods.apt import APT, APTConfig, ContrastiveConfig
from urlfast.nets.encoders import EncoderConfig

# Episodes of 40 steps just reach the farthest cell. Of 336 cells seeds 0 to 3 see 119, 133, 155 and 123; random play 56, over twelve seeds.
WIDE = {"room": 6, "limit": 40, "steps": 8000}
CONFIG = APTConfig(
    encoder=EncoderConfig(conv=((16, 8, 4), (32, 4, 2)), activation="elu", features=15, spectral_norm=True),
    representation=ContrastiveConfig((64, 64), temperature=0.2),
    lr=1e-3,
    reward=ParticleConfig(k=12),
    learner=DrQConfig(hidden=128, lr=1e-3, tau=0.05, epsilon=0.2, epsilon_decay=0),  # greedy alone, it stays where reward was high
    n_step=3,
    gamma=0.9,
    batch_size=64,
    updates_per_step=0.25,
    learning_start=400,
    augment=AugmentConfig(shift=1),  # less than a cell of 2 pixels
    precision="fp32",  # the same course, nearly, whatever the processor
)

# A policy that learns noise drifts, and in wide rooms drift alone explores (92 and 94 cells with shuffled rewards). In narrow rooms, and
# with Q at half the rate, it does not: of 156 cells true rewards see 81, 88, 97 and 98, shuffled ones 56, 42, 55 and 28, random play 53.
NARROW = {"room": 4, "limit": 30, "steps": 10_000}
SLOW_Q = replace(CONFIG, learner=replace(CONFIG.learner, lr=5e-4))


class Shuffled(ParticleReward):
    """The same rewards, each given to a particle that did not earn it."""

    def __call__(self, z, *, update=True):
        reward, distance = super().__call__(z, update=update)
        return reward[torch.randperm(len(z))], distance


ABLATIONS = {
    "random neighbour": (replace(CONFIG, reward=replace(CONFIG.reward, neighbours="random")), ParticleReward),
    "fixed encoder": (replace(CONFIG, encoder_learns="never"), ParticleReward),
    "shuffled": (CONFIG, Shuffled),
}


def maze(seed, room, limit):
    return NineRooms(num_envs=8, seed=seed, frame_stack=1, room=room, limit=limit, size=44)


def cells_of_random_play(seed, room, limit, steps):
    env, rng, taken = maze(seed, room, limit), np.random.default_rng(seed), 0
    step = env.reset()
    while taken < steps:
        taken += int((~step.is_last).sum())
        step = env.step(rng.integers(0, env.num_actions, env.num_envs))
    return env.visited.sum()


def cells_of_apt(seed, config, reward, room, limit, steps):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    env = maze(seed, room, limit)
    method = APT(config, env.observation_shape, env.num_actions, seed=seed, frame_stack=1)
    method.reward = reward(config.reward, method.device, method.agent.generator)
    train(method, env, steps)
    return env.visited.sum()


def beside_random_play(world, config=CONFIG, reward=ParticleReward):
    """Cells that APT sees, the mean of four seeds, run two at a time, over those that random play sees in as many steps."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        cells = list(pool.map(functools.partial(cells_of_apt, config=config, reward=reward, **world), range(4)))
    random_play = np.mean([cells_of_random_play(seed, **world) for seed in range(12)])
    print(f"{cells} cells, random play {random_play:.0f}")
    return np.mean(cells) / random_play


def test_apt_sees_twice_as_much_of_a_maze_as_random_play():
    assert beside_random_play(WIDE) >= 2


def test_with_its_rewards_shuffled_it_sees_no_more_than_random_play():
    assert beside_random_play(NARROW, SLOW_Q) > 1.4
    assert beside_random_play(NARROW, SLOW_Q, Shuffled) < 1.1


@pytest.mark.slow
@pytest.mark.parametrize(("config", "reward"), ABLATIONS.values(), ids=ABLATIONS)
def test_the_papers_ablations_see_less(config, reward):
    # a random neighbour 112, 62, 161 and 125, a fixed encoder 88, 123, 93 and 90: less on average, not in every seed
    assert beside_random_play(WIDE, config, reward) < beside_random_play(WIDE)
