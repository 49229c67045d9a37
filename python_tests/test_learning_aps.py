"""APS on a grid: it sees more of it for its entropy, and the rewards of a task that it never trained on name the skill that earns them.

What least squares, which asks how phi is spread, adds to URLB's call, which does not (`Regression`). Returns, as shares of the best that is
possible, for seeds 0 to 2, of least squares, URLB's call, a random skill:

- Under the skills that trained it, phi is nearly white: it follows w, and w is uniform. Both calls then all but agree, and goals of 3 x 3
  cells are reached alike: 0.68 0.70 0.04, 0.44 0.56 0.07, 0.67 0.55 0.05.
- Where phi is not white, because most of what was seen comes of one other skill, least squares finds a task that is linear in phi exactly,
  and URLB's call leans to that other skill: 0.79 0.48 0.02, 0.73 0.52 -0.08, 0.78 0.48 0.07. Goals that pay by nearness, so everywhere, are
  ordered in the same way: 0.27 0.19 0.14, 0.28 0.18 0.17, 0.33 0.18 0.15.
- Goals that pay in their own cells alone are ordered the other way: 0.19 0.25 0.04, 0.16 0.29 0.07, 0.19 0.35 0.05. Their sum phi r is
  the mean phi of those cells, and on a sphere no skill makes them stand out more, whatever else was seen; least squares has to fit all the
  zeros elsewhere too. So nothing is asserted of the two calls on such goals.
"""

import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from toy_training import train
from toys import Grid

from urlfast.intrinsic import ParticleConfig
from urlfast.learners.drq import DrQConfig
from urlfast.methods.aps import APS, APSConfig, Regression, random_skills

STEPS, SEEDS, TASKS = 20_000, (0, 1, 2), 100
CONFIG = APSConfig(
    skill_dim=10,
    phi_hidden=64,
    lr=1e-3,
    reward=ParticleConfig(k=12, clip=1e-4),
    learner=DrQConfig(hidden=128, lr=1e-3, tau=0.05, epsilon=0.1, epsilon_decay=0),
    gamma=0.95,
    batch_size=256,
    updates_per_step=0.25,
    learning_start=500,
    precision="fp32",  # the same course, nearly, whatever the processor
)


def grid(num_envs, worth=None):
    return Grid(num_envs, side=13, limit=40, worth=worth)


def pretrained(seed, config):
    """APS, and how many of the 169 cells it saw."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    env = grid(16)
    method = APS(config, env.observation_shape, env.num_actions, seed=seed, frame_stack=1)
    train(method, env, STEPS)
    return method, env.visited.sum()


def play(method, worth, episodes=1, skills=None, explore=False):
    """Cells that environments of this worth (T, 13, 13) reach, (T, episodes * 40), and the scores (T,) of their last episode.

    skills: (T, d); None: random ones.
    """
    env = grid(len(worth), worth)
    method.skills.fixed, method.skills.now = None, torch.zeros(0, method.skills.dim)
    if skills is not None:
        method.skills.fix(skills)
    step, cells = env.reset(), []
    while len(cells) < episodes * env.limit:
        step = env.step(method.act(step, explore=explore))
        if not step.is_first.any():
            cells.append(env.cells(step.observation))
    return np.stack(cells, 1), step.score


def best_return(worth):
    """Of an episode, (T,)."""
    value = np.zeros_like(worth)
    for _ in range(grid(1).limit):
        padded = np.pad(worth + value, ((0, 0), (1, 1), (1, 1)), mode="edge")
        value = np.max([padded[:, 1 + i : 14 + i, 1 + j : 14 + j] for i, j in Grid.moves], 0)
    return value[:, 0, 0]


def zero_shot(method, seed):
    """For two kinds of data and the tasks on them: returns over the best possible ones, of skills that were inferred in several ways."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        phi = F.normalize(method.phi(torch.from_numpy(grid(1).observations())), dim=-1)  # (169, d)
    at_random, others, planted = random_skills(3 * TASKS, method.skills.dim, torch.Generator().manual_seed(seed)).chunk(3)
    nothing = np.zeros((TASKS, 13, 13))

    def inferred(cells, rewards, call):
        skills = at_random.clone()
        for t in range(TASKS):
            regression = Regression(method.skills.dim)
            regression.add(phi[cells[t]], torch.from_numpy(rewards[t]))
            found = call(regression)
            skills[t] = at_random[t] if found is None else found  # no reward was seen
        return skills

    def share(worth, skills):
        return play(method, worth, skills=skills)[1].sum() / best_return(worth).sum()

    def shares(worth, cells):
        rewards = np.take_along_axis(worth.reshape(TASKS, -1), cells, 1)
        least_squares = inferred(cells, rewards, Regression.solve)
        skills = {
            "regressed": least_squares,
            "urlb": inferred(cells, rewards, Regression.release),
            "random": at_random,
            "shuffled": inferred(cells, rng.permuted(rewards, axis=1), Regression.solve),
            "flipped": -least_squares,
        }
        return {name: share(worth, w) for name, w in skills.items()}

    row, column = np.mgrid[:13, :13]
    row_of, column_of = rng.integers(0, 13, (2, TASKS, 1, 1))
    square = (np.maximum(abs(row - row_of), abs(column - column_of)) <= 1).astype(float)
    near = np.exp(-(abs(row - row_of) + abs(column - column_of)) / 3)
    linear = (planted @ phi.T).double().numpy().reshape(TASKS, 13, 13)

    by_skills, _ = play(method, nothing, 3, explore=True)
    by_skills = np.tile(by_skills.ravel(), (TASKS, 1))  # what all saw: 4,800 steps
    by_one = np.concatenate([play(method, nothing, 20, others, explore=True)[0], play(method, nothing, 2, explore=True)[0]], 1)  # 880
    return {
        "goals, seen by random skills": shares(square, by_skills),
        "goals, seen by one skill": shares(square, by_one),
        "nearness, seen by one skill": shares(near, by_one),
        "planted, seen by one skill": shares(linear, by_one) | {"planted": share(linear, planted)},
    }


def run(seed, entropy_weight):
    method, cells = pretrained(seed, replace(CONFIG, entropy_weight=entropy_weight))
    return cells, zero_shot(method, seed) if entropy_weight else None


@functools.cache
def runs(entropy_weight=1.0):
    """Cells and shares of each seed, two at a time."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        cells, tables = zip(*pool.map(run, SEEDS, [entropy_weight] * len(SEEDS)), strict=True)
    print(f"entropy_weight {entropy_weight}: {cells} cells")
    for table in tables:
        for name, row in (table or {}).items():
            print(f"{name:30s}", "  ".join(f"{how} {x:.2f}" for how, x in row.items()))
    return cells, tables


def mean_shares(name):
    tables = runs()[1]
    return {how: np.mean([table[name][how] for table in tables]) for how in tables[0][name]}


def test_rewards_name_the_skill_that_reaches_a_goal():
    """Without any training on it; rewards that were shuffled, or taken backwards, name none."""
    share = mean_shares("goals, seen by random skills")
    assert min(share["regressed"], share["urlb"]) > 0.4
    assert max(share["random"], share["shuffled"], share["flipped"]) < 0.15


def test_least_squares_then_urlbs_call_then_a_random_skill():
    share = mean_shares("planted, seen by one skill")
    assert share["regressed"] > 0.95 * share["planted"] and share["regressed"] > 1.3 * share["urlb"]
    assert share["urlb"] > 0.3 and max(share["random"], share["shuffled"], share["flipped"]) < 0.2
    share = mean_shares("nearness, seen by one skill")
    assert share["regressed"] > 1.2 * share["urlb"] and share["urlb"] > share["random"]


def test_without_the_entropy_it_sees_less_of_the_grid():
    assert np.mean(runs()[0]) > 1.25 * np.mean(runs(entropy_weight=0.0)[0])
