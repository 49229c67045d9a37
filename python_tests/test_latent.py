import copy
import io

import numpy as np
import pytest
import torch
from conftest import DEVICES, on, to_numpy
from reference_stats import latent_step
from scipy import stats

import urlfast
from urlfast import LatentDynamics


def copies(row):
    return tuple(np.array(to_numpy(x)) for x in row)


def rollout(dynamics, steps, actions=None, device="cpu"):
    """Copies of every row: (T, N, D), (T, N) classes, first, last."""
    rows = [copies(dynamics.reset())]
    n, d = rows[0][0].shape
    zero = on(device, np.zeros((n, d), np.float32))
    rows += [copies(dynamics.step(zero if actions is None else on(device, actions[t]))) for t in range(steps)]
    return tuple(np.stack(column) for column in zip(*rows, strict=True))


def noise_of(seed, rows, n, d):
    """The process's noise for rows 0..rows-1: alpha = beta = 0 shows it bare."""
    return rollout(LatentDynamics(n, d, alpha=0.0, beta=0.0, episode_length=10**9, seed=seed), rows - 1)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n, d", [(1, 1), (3, 5), (8, 32), (5, 7), (70, 129), (33, 512)])
@pytest.mark.parametrize("alpha, beta", [(0.5, 0.95), (0.0, 0.0), (1.0, 0.5), (0.25, 1.0)])
def test_follows_the_equations(device, n, d, alpha, beta):
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (7, n, d)).astype(np.float32)
    z, _, first, last = rollout(
        LatentDynamics(n, d, 4, alpha=alpha, beta=beta, episode_length=3, seed=11, device=device), 7, actions, device
    )
    noise = noise_of(11, 8, n, d)
    drawn = rollout(LatentDynamics(n, d, 4, alpha=1.0, beta=beta, episode_length=3, seed=11), 7, actions)[0]  # at alpha = 1, z_0 is a_0
    expected = None
    for t in range(8):
        opens, closes = t % 4 == 0, t % 4 == 3
        assert (first[t] == opens).all() and (last[t] == closes).all()
        action = drawn[t] if opens else actions[t - 1]
        expected = latent_step(0 if opens else expected, action, noise[t], np.full(n, opens), alpha, beta)
        np.testing.assert_allclose(z[t], expected, rtol=1e-5, atol=2e-6)


def test_the_action_of_a_last_row_is_ignored_and_alpha_0_ignores_all():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, (2, 6, 4, 8)).astype(np.float32)
    b[[0, 1, 3, 4]] = a[[0, 1, 3, 4]]  # they differ after rows 2 and 5, the last ones
    make = lambda alpha: LatentDynamics(4, 8, alpha=alpha, episode_length=2, seed=3)  # noqa: E731
    for x, y in zip(rollout(make(0.5), 6, a), rollout(make(0.5), 6, b), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(rollout(make(0.0), 6, a)[0], rollout(make(0.0), 6, -a)[0])


@pytest.mark.parametrize("n, d", [(64, 512), (2000, 33)])
def test_draws_depend_on_neither_threads_nor_the_other_sizes(n, d):
    threads = urlfast._core.num_threads()
    results = []
    for count in (1, 2, 3):
        urlfast.set_num_threads(count)
        results.append(rollout(LatentDynamics(n, d, 5, episode_length=2, seed=9), 4))
    urlfast.set_num_threads(threads)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(x, y)
    fewer = rollout(LatentDynamics(n // 2, d, 5, episode_length=2, seed=9), 4)
    np.testing.assert_allclose(fewer[0], results[0][0][:, : n // 2], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(fewer[1], results[0][1][:, : n // 2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("n, d", [(7, 5), (64, 512)])
def test_cuda_draws_what_the_cpu_draws(n, d):
    for x, y in zip(
        *(rollout(LatentDynamics(n, d, 9, episode_length=3, seed=5, device=at), 8, device=at) for at in ("cpu", "cuda")), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6)


def test_noise_is_standard_normal_and_independent():
    x = noise_of(seed=1, rows=50, n=40, d=250).astype(np.float64)  # 500,000 values
    n = x.size
    flat = x.ravel()
    for moment, expected, deviation in (
        (flat.mean(), 0, 1),
        ((flat**2).mean(), 1, 2),
        ((flat**3).mean(), 0, 15),
        ((flat**4).mean(), 3, 96),
    ):
        assert abs(moment - expected) < 4.5 * np.sqrt(deviation / n)
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    assert 4 < np.abs(flat).max() < 6.7
    for a, b in ((x[1:], x[:-1]), (x[:, 1:], x[:, :-1]), *((x[..., k:], x[..., :-k]) for k in (1, 2, 3, 4, 8))):
        assert abs((a * b).mean()) < 4.5 / np.sqrt(a.size)  # steps, environments, neighbours in the groups of four
        assert abs(((a**2 - 1) * (b**2 - 1)).mean()) < 4.5 * 2 / np.sqrt(
            a.size
        )  # Box-Muller's radius is shared by a pair, its square is not
    tails = [(flat < q).sum() for q in stats.norm.ppf([1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999])]
    assert stats.chisquare(np.diff([0, *tails, n]), n * np.diff([0, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 1])).pvalue > 1e-3


def test_seeds_differ():
    a, b = noise_of(1, 2, 16, 512), noise_of(2, 2, 16, 512)
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4.5 / np.sqrt(a.size)


@pytest.mark.parametrize("alpha, beta", [(0.5, 0.5), (0.5, 0.95), (0.25, 0.75), (0.0, 0.0)])
def test_the_process_is_stationary_with_the_variance_of_the_closed_form(alpha, beta):
    z = rollout(LatentDynamics(64, 128, alpha=alpha, beta=beta, episode_length=10**6, seed=4), 400)[0].astype(np.float64)
    z = z[200:]  # beta^200 < 4e-5: the start is forgotten
    expected = (1 - alpha) ** 2 * (1 - beta) / (1 + beta)
    independent = z.size * (1 - beta) / (1 + beta)
    assert abs(z.mean()) < 5 * np.sqrt(expected / independent)
    np.testing.assert_allclose((z**2).mean(), expected, rtol=6 * np.sqrt(2 / independent))
    correlation = (z[1:] * z[:-1]).mean() / (z**2).mean()
    np.testing.assert_allclose(correlation, beta, atol=0.01)


def test_the_first_action_is_uniform():
    a = rollout(LatentDynamics(2000, 50, alpha=1.0, episode_length=1, seed=0), 0)[0].ravel()
    assert a.min() >= -1 and a.max() < 1
    assert stats.kstest(a, stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_classes_are_uniform_fixed_within_an_episode_and_new_in_the_next():
    _, c, first, _ = rollout(LatentDynamics(3000, 2, 10, episode_length=4, seed=2), 24)
    assert c.dtype == np.int64 and c.min() == 0 and c.max() == 9
    changed = c[1:] != c[:-1]
    assert not changed[~first[1:]].any()
    assert abs(changed[first[1:]].mean() - 0.9) < 4.5 * np.sqrt(0.09 / changed[first[1:]].size)
    drawn = c[first]
    assert stats.chisquare(np.bincount(drawn, minlength=10)).pvalue > 1e-3
    assert (rollout(LatentDynamics(5, 2, seed=2), 3)[1] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_reset_opens_an_episode_anew(device):
    dynamics = LatentDynamics(4, 16, 3, episode_length=5, seed=7, device=device)
    before = copies(dynamics.reset())
    dynamics.step(on(device, np.zeros((4, 16), np.float32)))
    after = copies(dynamics.reset())
    assert after[2].all() and not after[3].any() and not (before[0] == after[0]).any()


@pytest.mark.parametrize("device", DEVICES)
def test_state_passes_a_safe_load_and_continues(device):
    make = lambda: LatentDynamics(6, 9, 5, episode_length=4, seed=7, device=device)  # noqa: E731
    dynamics, again = make(), make()
    zero = on(device, np.zeros((6, 9), np.float32))
    dynamics.reset()
    for _ in range(3):
        dynamics.step(zero)
    file = io.BytesIO()
    torch.save(dynamics.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    clone = copy.deepcopy(dynamics)
    for _ in range(6):
        row = copies(dynamics.step(zero))
        for other in (again, clone):
            for x, y in zip(copies(other.step(zero)), row, strict=True):
                np.testing.assert_array_equal(x, y)


def test_arrays_are_in_the_callers_library_and_reused():
    dynamics = LatentDynamics(3, 4, episode_length=2)
    z, c, first, last = dynamics.reset()
    assert isinstance(z, np.ndarray) and not z.flags.writeable and c.dtype == np.int64 and first.dtype == last.dtype == bool
    row = dynamics.step(torch.zeros(3, 4, requires_grad=True))
    assert all(isinstance(x, torch.Tensor) for x in row) and row[0].dtype == torch.float32 and row[2].dtype == torch.bool
    np.testing.assert_array_equal(row[0].numpy(), z)  # one memory
    again = dynamics.step(torch.zeros(3, 4))
    assert again[0] is row[0]
    assert isinstance(LatentDynamics(3, 4, device=torch.device("cpu")).reset()[0], torch.Tensor)
    del dynamics
    assert np.isfinite(z).all()  # the arrays keep the memory


def step(actions):
    dynamics = LatentDynamics(3, 4)
    dynamics.reset()
    dynamics.step(actions)


def damaged(**change):
    dynamics = LatentDynamics(3, 4, 2)
    dynamics.load_state_dict({**dynamics.state_dict(), **change})


ERRORS = [
    (ValueError, r"num_envs: must lie in 1\.\.2\^31, got 0", lambda: LatentDynamics(0, 4)),
    (ValueError, "latent_dim", lambda: LatentDynamics(4, -1)),
    (ValueError, r"num_envs: times latent_dim must be at most 2\^36", lambda: LatentDynamics(1 << 30, 1 << 30)),
    (ValueError, "num_classes: must lie in 1", lambda: LatentDynamics(4, 4, 0)),
    (ValueError, r"alpha: must lie in \[0, 1\], got 1.5", lambda: LatentDynamics(4, 4, alpha=1.5)),
    (ValueError, "alpha", lambda: LatentDynamics(4, 4, alpha=float("nan"))),
    (ValueError, r"beta: must lie in \[0, 1\], got -0.1", lambda: LatentDynamics(4, 4, beta=-0.1)),
    (ValueError, "episode_length: must be at least 1, got 0", lambda: LatentDynamics(4, 4, episode_length=0)),
    (ValueError, "seed: must lie in 0", lambda: LatentDynamics(4, 4, seed=-1)),
    (ValueError, "seed: must lie in 0", lambda: LatentDynamics(4, 4, seed=1 << 64)),
    (ValueError, "device: must be 'cpu'", lambda: LatentDynamics(4, 4, device="gpu")),
    (TypeError, "actions: must be an array", lambda: step([[0.0] * 4] * 3)),
    (TypeError, "actions: must have dtype float32, got float64", lambda: step(np.zeros((3, 4)))),
    (ValueError, r"actions: must have shape \(num_envs, latent_dim\) = \(3, 4\), got \(4, 3\)", lambda: step(np.zeros((4, 3), np.float32))),
    (ValueError, "actions: must be C-contiguous", lambda: step(np.zeros((4, 3), np.float32).T)),
    (RuntimeError, r"call reset\(\) before step\(\)", lambda: LatentDynamics(3, 4).step(np.zeros((3, 4), np.float32))),
    (ValueError, "state: has no 'num_envs'", lambda: LatentDynamics(3, 4).load_state_dict({})),
    (ValueError, r"state: was saved with \(num_envs, latent_dim\) = \(3, 5\)", lambda: damaged(latent_dim=5)),
    (ValueError, "state: was saved with seed 1", lambda: damaged(seed=1)),
    (ValueError, "state: 't' must lie in 0..100", lambda: damaged(t=101)),
    (ValueError, "state: is damaged", lambda: damaged(z=b"")),
    (ValueError, "state: has class 2, these dynamics have 2", lambda: damaged(classes=[0, 1, 2])),
    (ValueError, "state: 'rows' has the wrong type", lambda: damaged(rows="many")),
]


@pytest.mark.arguments
@pytest.mark.parametrize("kind, message, call", ERRORS, ids=[f"{i}-{m.split(':')[0]}" for i, (_, m, _) in enumerate(ERRORS)])
def test_errors_name_the_argument(kind, message, call):
    with pytest.raises(kind, match=message):
        call()
