"""APT explores a pixel maze without any reward: it sees more of it than random play does in as many steps."""

import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from toy_training import train
from toys import NineRooms

from urlfast.augment import AugmentConfig
from urlfast.intrinsic import ParticleConfig, ParticleReward
from urlfast.learners.drq import DrQConfig
from urlfast.methods.apt import APT, APTConfig, ContrastiveConfig
from urlfast.nets.encoders import EncoderConfig

STEPS = 8000  # of four environments together
# Cells of 336: seeds 0 to 5 see 139, 130, 164, 177, 178, 152, and seeds 0 to 3 with shuffled rewards 110, 47, 125, 137; random play sees 84
# (72 to 96 over twelve seeds).
CONFIG = APTConfig(
    encoder=EncoderConfig(conv=((16, 8, 4), (32, 4, 2)), activation="elu", features=15, spectral_norm=True),
    representation=ContrastiveConfig((64, 64), temperature=0.2),
    lr=1e-3,
    reward=ParticleConfig(k=12),
    learner=DrQConfig(hidden=128, lr=1e-3, tau=0.05, epsilon=0.3, epsilon_decay=0),  # greedy alone, it stays where reward was high
    gamma=0.9,
    batch_size=64,
    updates_per_step=0.5,
    learning_start=400,
    augment=AugmentConfig(shift=1),  # less than a cell of 2 pixels
    precision="fp32",  # the same course, nearly, whatever the processor
)


class Shuffled(ParticleReward):
    """The same rewards, each given to a particle that did not earn it."""

    def __call__(self, z, *, update=True):
        reward, distance = super().__call__(z, update=update)
        return reward[torch.randperm(len(z))], distance


def maze(seed):
    return NineRooms(num_envs=4, seed=seed, frame_stack=1, limit=60, size=44)


def cells_of_random_play(seed):
    env, rng, taken = maze(seed), np.random.default_rng(seed), 0
    step = env.reset()
    while taken < STEPS:
        taken += int((~step.is_last).sum())
        step = env.step(rng.integers(0, env.num_actions, env.num_envs))
    return env.visited.sum()


def cells_of_apt(seed, reward):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    env = maze(seed)
    method = APT(CONFIG, env.observation_shape, env.num_actions, seed=seed, frame_stack=1)
    method.reward = reward(CONFIG.reward, method.device)
    train(method, env, STEPS)
    return env.visited.sum()


def cells_of(reward, seeds):
    """Cells that APT with this reward sees, a run for each seed, two at a time."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        cells = list(pool.map(cells_of_apt, seeds, [reward] * len(seeds)))
    print(f"{reward.__name__}: {cells} cells")
    return np.mean(cells)


@functools.cache
def threshold():
    return 1.5 * np.mean([cells_of_random_play(seed) for seed in range(12)])


def test_apt_sees_more_of_a_maze_than_random_play():
    assert cells_of(ParticleReward, range(4)) >= threshold()


def test_with_its_rewards_shuffled_it_does_not():
    assert cells_of(Shuffled, (0, 1)) < threshold()
