import numpy as np
import pytest
from scipy.stats import mannwhitneyu, trim_mean

from urlfast import papers, stats

APT = papers.SCORES["apt"][1]


def apt_scores():
    return np.array([[stats.human_normalised_score(game, APT[game]) for game in stats.ATARI_26]])


def test_published_column_gives_the_recomputed_aggregates():
    assert set(APT) == set(stats.ATARI_26) and len(stats.ATARI_57) == 57
    scores = apt_scores()
    assert stats.mean(scores) == pytest.approx(0.6663, abs=5e-5)
    assert stats.median(scores) == pytest.approx(0.4751, abs=5e-5)
    assert stats.human_level(scores) == 8
    assert stats.human_level(scores, 0.75) == 9
    assert stats.above_random(scores) == 24  # asterix and chopper_command stay below random play
    scores = np.array([[stats.human_normalised_score(game, papers.SCORES["aps"][1][game]) for game in stats.ATARI_26]])
    assert stats.mean(scores) == pytest.approx(1.0025, abs=5e-5) and stats.median(scores) == pytest.approx(0.6547, abs=5e-5)
    assert stats.human_level(scores) == 7


def test_every_game_of_the_table_is_a_rom():
    roms = pytest.importorskip("ale_py.roms")
    assert set(stats.ATARI_57) <= set(roms.get_all_rom_ids())


def test_normalised_score_keeps_the_shape_and_names_near_games():
    assert stats.human_normalised_score("pong", -20.7) == 0 and stats.human_normalised_score("pong", 14.6) == 1
    assert stats.human_normalised_score("pong", [-20.7, 14.6]).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"game: no published human score for 'mspacman'.*ms_pacman"):
        stats.human_normalised_score("mspacman", 1)


@pytest.mark.parametrize("shape", [(3, 5), (5, 26), (1, 7), (1, 1), (4, 4)])
def test_iqm_is_the_trimmed_mean(shape):
    x = np.random.default_rng(0).normal(size=shape)
    assert stats.iqm(x) == pytest.approx(trim_mean(x.ravel(), 0.25), abs=1e-12)
    assert stats.iqm(np.arange(16.0).reshape(4, 4)) == 7.5


def test_median_is_over_task_means():
    x = np.array([[0.0, 1, 10], [0, 3, 20]])  # means 0, 2, 15; the median of all runs would be 2 too but for the last column
    assert stats.median(x) == 2
    assert stats.median(np.array([[0.0, 0], [0, 100]])) == 25  # all runs: 0


def test_gap_and_caps():
    assert stats.optimality_gap(np.full((3, 4), 2.0)) == 0
    assert stats.optimality_gap(np.full((3, 4), 0.5)) == 0.5
    assert stats.optimality_gap(np.array([[0.0], [3.0]])) == 0.5  # capped run by run ...
    assert stats.capped_mean(np.array([[0.0], [3.0]])) == 1.0  # ... and here task by task


def test_probability_of_improvement_is_mann_whitney():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 6, (4, 3)).astype(float), rng.integers(0, 6, (7, 3)).astype(float)  # ties on purpose
    want = np.mean([mannwhitneyu(x[:, m], y[:, m]).statistic / (4 * 7) for m in range(3)])
    assert stats.probability_of_improvement(x, y) == pytest.approx(want, abs=1e-12)
    assert stats.probability_of_improvement(x, x) == 0.5
    assert stats.probability_of_improvement(x + 10, y) == 1
    with pytest.raises(ValueError, match="y: must have the tasks of x, 3, got 2"):
        stats.probability_of_improvement(x, y[:, :2])


def test_profile_counts_runs_strictly_above():
    x = np.array([[0.0, 1.0], [2.0, 3.0]])
    np.testing.assert_array_equal(stats.performance_profile(x, [-1, 0, 1.5, 3]), [1, 0.75, 0.5, 0])


def test_aggregates_map_over_leading_axes():
    x = np.random.default_rng(2).normal(size=(6, 3, 5))
    for aggregate in (stats.mean, stats.median, stats.iqm, stats.optimality_gap, stats.capped_mean, stats.human_level, stats.above_random):
        np.testing.assert_allclose(aggregate(x), [aggregate(one) for one in x])
    np.testing.assert_allclose(stats.performance_profile(x, [0, 1])[4], stats.performance_profile(x[4], [0, 1]))


def test_bootstrap_repeats_with_its_seed_and_leaves_numpy_alone():
    x = np.random.default_rng(3).normal(size=(5, 4))
    before = np.random.get_state()[1].tolist()  # noqa: NPY002 (the global generator is what must not move)
    first = stats.bootstrap_interval(stats.iqm, x, repeats=500, seed=7)
    assert first == stats.bootstrap_interval(stats.iqm, x, repeats=500, seed=7)
    assert first != stats.bootstrap_interval(stats.iqm, x, repeats=500, seed=8)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert first[0] < stats.iqm(x) < first[1]
    low, high = stats.bootstrap_interval(stats.iqm, np.full((3, 4), 0.25), repeats=50)
    assert low == high == 0.25


def test_bootstrap_is_stratified_and_tasks_draw_on_their_own():
    # Tasks differ widely and runs do not: drawing across tasks would spread the mean.
    assert np.ptp(stats.bootstrap_interval(stats.mean, np.tile([0.0, 100.0], (5, 1)), repeats=200)) == 0
    # Opposed columns: with one row index for all tasks every replicate of the mean would be exactly 0.
    low, high = stats.bootstrap_interval(stats.mean, np.array([[1.0, -1.0], [-1.0, 1.0], [0.5, -0.5]]), repeats=500)
    assert low < -0.2 and high > 0.2


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(4)
    hits = 0
    for trial in range(200):
        low, high = stats.bootstrap_interval(stats.mean, rng.normal(size=(10, 5)), repeats=300, seed=trial)
        hits += low <= 0 <= high
    assert 170 <= hits <= 198  # 95 %, a little less for 10 runs


def test_bootstrap_of_a_pair_and_of_a_profile():
    rng = np.random.default_rng(5)
    x, y = rng.normal(1, 1, (6, 3)), rng.normal(0, 1, (4, 3))
    low, high = stats.bootstrap_interval(stats.probability_of_improvement, x, y, repeats=300)
    assert 0 <= low < stats.probability_of_improvement(x, y) < high <= 1
    low, high = stats.bootstrap_interval(lambda s: stats.performance_profile(s, [0, 1, 2]), x, repeats=300)
    assert low.shape == high.shape == (3,) and (low <= high).all()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"scores: must be \(runs, tasks\)"):
        stats.iqm(np.zeros(3))
    with pytest.raises(ValueError, match="scores: has NaN"):
        stats.mean(np.array([[np.nan]]))
    with pytest.raises(ValueError, match="scores: must be one or more"):
        stats.bootstrap_interval(stats.mean, np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="confidence: must lie"):
        stats.bootstrap_interval(stats.mean, np.zeros((2, 3)), confidence=95)
    with pytest.raises(ValueError, match="repeats: must be"):
        stats.bootstrap_interval(stats.mean, np.zeros((2, 3)), repeats=0)
