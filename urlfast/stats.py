"""Scores of agents, and what may be concluded from few runs of them.

Aggregates and intervals after Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (2021).
N runs, M tasks; every aggregate reads the last two axes of (..., N, M) and returns the leading ones, so that a bootstrap is one call.
"""

import difflib

import numpy as np

# Random play and a human tester, as DQN Zoo lists them (Mnih et al. 2015 and later).
ATARI_SCORES: dict[str, tuple[float, float]] = {
    "alien": (227.8, 7127.7), "amidar": (5.8, 1719.5), "assault": (222.4, 742.0), "asterix": (210.0, 8503.3),
    "asteroids": (719.1, 47388.7), "atlantis": (12850.0, 29028.1), "bank_heist": (14.2, 753.1), "battle_zone": (2360.0, 37187.5),
    "beam_rider": (363.9, 16926.5), "berzerk": (123.7, 2630.4), "bowling": (23.1, 160.7), "boxing": (0.1, 12.1), "breakout": (1.7, 30.5),
    "centipede": (2090.9, 12017.0), "chopper_command": (811.0, 7387.8), "crazy_climber": (10780.5, 35829.4),
    "defender": (2874.5, 18688.9), "demon_attack": (152.1, 1971.0), "double_dunk": (-18.6, -16.4), "enduro": (0.0, 860.5),
    "fishing_derby": (-91.7, -38.7), "freeway": (0.0, 29.6), "frostbite": (65.2, 4334.7), "gopher": (257.6, 2412.5),
    "gravitar": (173.0, 3351.4), "hero": (1027.0, 30826.4), "ice_hockey": (-11.2, 0.9), "jamesbond": (29.0, 302.8),
    "kangaroo": (52.0, 3035.0), "krull": (1598.0, 2665.5), "kung_fu_master": (258.5, 22736.3), "montezuma_revenge": (0.0, 4753.3),
    "ms_pacman": (307.3, 6951.6), "name_this_game": (2292.3, 8049.0), "phoenix": (761.4, 7242.6), "pitfall": (-229.4, 6463.7),
    "pong": (-20.7, 14.6), "private_eye": (24.9, 69571.3), "qbert": (163.9, 13455.0), "riverraid": (1338.5, 17118.0),
    "road_runner": (11.5, 7845.0), "robotank": (2.2, 11.9), "seaquest": (68.4, 42054.7), "skiing": (-17098.1, -4336.9),
    "solaris": (1236.3, 12326.7), "space_invaders": (148.0, 1668.7), "star_gunner": (664.0, 10250.0), "surround": (-10.0, 6.5),
    "tennis": (-23.8, -8.3), "time_pilot": (3568.0, 5229.2), "tutankham": (11.4, 167.6), "up_n_down": (533.4, 11693.2),
    "venture": (0.0, 1187.5), "video_pinball": (16256.9, 17667.9), "wizard_of_wor": (563.5, 4756.5), "yars_revenge": (3092.9, 54576.9),
    "zaxxon": (32.5, 9173.3),
}  # fmt: skip
ATARI_57 = tuple(ATARI_SCORES)
ATARI_26 = (  # the games of the 100k benchmark
    "alien", "amidar", "assault", "asterix", "bank_heist", "battle_zone", "boxing", "breakout", "chopper_command", "crazy_climber",
    "demon_attack", "freeway", "frostbite", "gopher", "hero", "jamesbond", "kangaroo", "krull", "kung_fu_master", "ms_pacman", "pong",
    "private_eye", "qbert", "road_runner", "seaquest", "up_n_down",
)  # fmt: skip
HARD_6 = ("montezuma_revenge", "pitfall", "private_eye", "venture", "gravitar", "solaris")  # CPT's games of hard exploration
ABLATION_12 = (  # CPT's games of ablations
    "asterix", "bank_heist", "frostbite", "gravitar", "jamesbond", "montezuma_revenge", "ms_pacman", "pong", "private_eye",
    "space_invaders", "tennis", "up_n_down",
)  # fmt: skip
GAME_SETS = {"hard6": HARD_6, "ablation12": ABLATION_12, "atari26": ATARI_26, "atari57": ATARI_57}  # tasks by one name


URLB_EXPERT: dict[str, float] = {  # returns of DDPG after 2M frames of the task, by which URLB divides
    "walker_stand": 984, "walker_walk": 971, "walker_run": 796, "walker_flip": 799,
    "quadruped_walk": 866, "quadruped_run": 888, "quadruped_stand": 920, "quadruped_jump": 888,
    "jaco_reach_top_left": 191, "jaco_reach_top_right": 223, "jaco_reach_bottom_left": 193, "jaco_reach_bottom_right": 203,
}  # fmt: skip


def human_normalised_score(game, score):
    """(score - random) / (human - random): 0 is random play, 1 the human tester; a float or an array like `score`.

    game: a ROM id of ATARI_57 ("ms_pacman"). Raises ValueError, with the nearest names, for a game without published scores.
    """
    if game not in ATARI_SCORES:
        near = difflib.get_close_matches(str(game), ATARI_57, n=3)
        raise ValueError(f"game: no published human score for {game!r}" + (f"; near names: {', '.join(near)}" if near else ""))
    random, human = ATARI_SCORES[game]
    return (np.asarray(score, np.float64)[()] - random) / (human - random)


def mean(scores):
    """Mean over runs and tasks of (..., N, M)."""
    return _scores(scores).mean((-2, -1))


def median(scores):
    """Median over tasks of the per-task means of (..., N, M): not the median of all runs."""
    return np.median(_scores(scores).mean(-2), -1)


def iqm(scores):
    """Interquartile mean: of all N*M values, the lowest and the highest floor(N*M / 4) are dropped and the rest averaged."""
    x = _scores(scores)
    x = np.sort(x.reshape(*x.shape[:-2], -1), -1)
    cut = x.shape[-1] // 4
    return x[..., cut : x.shape[-1] - cut].mean(-1)


def optimality_gap(scores, target=1.0):
    """target - mean(min(score, target)): how far the runs stay below `target`; lower is better, 0 is the best."""
    return target - np.minimum(_scores(scores), target).mean((-2, -1))


def capped_mean(scores, cap=1.0):
    """Mean over tasks of min(per-task mean, cap): no single game can carry it."""
    return np.minimum(_scores(scores).mean(-2), cap).mean(-1)


def human_level(scores, threshold=1.0):
    """Number of tasks whose mean over runs reaches `threshold`. APT and PALM count at 1.0, Mnih et al. (2015) and CPT at 0.75."""
    return (_scores(scores).mean(-2) >= threshold).sum(-1)


def above_random(scores):
    """Number of tasks whose mean over runs is above 0, where a human-normalised score has random play."""
    return (_scores(scores).mean(-2) > 0).sum(-1)


def probability_of_improvement(x, y):
    """P(X > Y): over tasks, the mean chance that a random run of x (..., N, M) beats one of y (..., N', M); a tie counts half."""
    x, y = _scores(x, "x"), _scores(y, "y")
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"y: must have the tasks of x, {x.shape[-1]}, got {y.shape[-1]}")
    x, y = x[..., :, None, :], y[..., None, :, :]
    return ((x > y) + 0.5 * (x == y)).mean((-3, -2, -1))


def performance_profile(scores, thresholds):
    """Fraction of all runs above each threshold, (..., T): the run-score distribution."""
    x = _scores(scores)
    x = np.sort(x.reshape(*x.shape[:-2], -1), -1)
    thresholds = np.asarray(thresholds, np.float64)
    return (x[..., None, :] > thresholds[:, None]).mean(-1)


def bootstrap_interval(statistic, *scores, confidence=0.95, repeats=50_000, seed=0):
    """Percentile interval of `statistic(*scores)` under the stratified bootstrap; returns (low, high), each shaped like the statistic.

    Every task draws its own N runs with replacement, independently of the other tasks and of the other arguments.
    scores: one or more (N, M). With N = 1 nothing can vary and the interval has no width: show none below N = 3.
    seed: the same seed gives the same interval. Raises ValueError (shape, NaN, confidence outside (0, 1), repeats < 1).
    """
    scores = [_scores(x) for x in scores]
    if not scores or any(x.ndim != 2 for x in scores):
        raise ValueError(f"scores: must be one or more (runs, tasks) arrays, got shapes {[x.shape for x in scores]}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: must lie between 0 and 1, got {confidence}")
    if repeats < 1:
        raise ValueError(f"repeats: must be at least 1, got {repeats}")
    rng = np.random.default_rng(seed)
    chunk = max(1, 2**20 // max(x.size for x in scores))  # a few MB at a time
    values = []
    for start in range(0, repeats, chunk):
        count = min(chunk, repeats - start)
        drawn = [np.take_along_axis(x[None], rng.integers(len(x), size=(count, *x.shape)), axis=1) for x in scores]
        values.append(np.asarray(statistic(*drawn)))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.concatenate(values), [tail, 100 - tail], axis=0)
    return low, high


def _scores(x, name="scores"):
    x = np.asarray(x, np.float64)
    if x.ndim < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"{name}: must be (runs, tasks) and not empty, got shape {x.shape}")
    if np.isnan(x).any():
        raise ValueError(f"{name}: has NaN; a missing run cannot be averaged away")
    return x
