import numpy as np
import pytest
import reference_returns
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from urlfast.losses import huber, n_step_return, nt_xent, peng_q_lambda, rescale, rescale_inverse, retrace


def reference_nt_xent(u, v, temperature):
    p = np.concatenate([u, v]).astype(np.float64)
    p /= np.linalg.norm(p, axis=1, keepdims=True)
    total, hits = 0.0, 0
    for i in range(len(p)):
        positive = (i + len(u)) % len(p)
        others = [j for j in range(len(p)) if j != i]
        similarity = p @ p[i] / temperature
        total += logsumexp(similarity[others]) - similarity[positive]
        hits += max(others, key=lambda j: similarity[j]) == positive
    return total / len(p), hits / len(p)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("shape", [(1, 3), (7, 5), (32, 128)])
def test_nt_xent_matches_reference(shape, temperature):
    rng = np.random.default_rng(0)
    u = rng.normal(3, 1, shape).astype(np.float32)
    v = (u + rng.normal(0, 0.5, shape)).astype(np.float32)
    loss, accuracy = nt_xent(torch.from_numpy(u), torch.from_numpy(v), temperature)
    expected, hits = reference_nt_xent(u, v, temperature)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(accuracy, hits, atol=1e-6)


def test_nt_xent_of_orthogonal_pairs():
    """Of 2B projections, B identical pairs, all else orthogonal: log(exp(1/T) + 2B - 2) - 1/T."""
    loss, accuracy = nt_xent(torch.eye(4), 5 * torch.eye(4), temperature=0.5)  # lengths do not matter
    np.testing.assert_allclose(loss, np.log(np.exp(2) + 6) - 2, rtol=1e-6)
    assert accuracy == 1


def test_nt_xent_ignores_autocast():
    torch.manual_seed(0)
    u, v = torch.randn(2, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = nt_xent(u, v, 0.07)[0]
    assert got == nt_xent(u, v, 0.07)[0]


def test_huber_matches_torch_and_its_gradient_is_bounded():
    error = torch.linspace(-3, 3, 61, requires_grad=True)
    loss = huber(error)
    torch.testing.assert_close(loss, torch.nn.functional.huber_loss(error, torch.zeros(61), reduction="none"))
    loss.sum().backward()
    torch.testing.assert_close(error.grad, error.detach().clamp(-1, 1))
    torch.testing.assert_close(huber(torch.tensor(5.0), delta=2.0), torch.tensor(8.0))


# Returns of sequences ------------------------------------------------------------------------------------------------

SIZES = np.concatenate([np.logspace(-4, 5, 200), [0.0, 1.0]])


def test_rescale_matches_reference():
    x = np.concatenate([SIZES, -SIZES])
    np.testing.assert_allclose(rescale(torch.from_numpy(x)), reference_returns.rescale(x), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(rescale(torch.from_numpy(x).float()), reference_returns.rescale(x), rtol=1e-6)
    np.testing.assert_allclose(rescale(torch.tensor([100.0, -3.0])), [9.14988, -1.003], rtol=1e-5)


def test_rescale_inverse_matches_reference_and_brings_float32_back():
    y = np.concatenate([SIZES, -SIZES])[np.abs(np.concatenate([SIZES, -SIZES])) <= 1e3]
    np.testing.assert_allclose(rescale_inverse(torch.from_numpy(y)), reference_returns.rescale_inverse(y), rtol=1e-7, atol=1e-9)
    x = torch.from_numpy(np.concatenate([SIZES, -SIZES])).float()
    torch.testing.assert_close(rescale_inverse(rescale(x)), x, rtol=1e-6, atol=0)


def tensors(*arrays, dtype=torch.float64):
    return [torch.as_tensor(array, dtype=dtype)[None] for array in arrays]


@pytest.mark.parametrize("trace_lambda, expected", [(0.5, (2.625, 2.5, 2)), (0.0, (3, 4, 2)), (1.0, (1.5, 1, 2))])
def test_peng_by_hand(trace_lambda, expected):
    reward, discount, next_value = tensors([1, 0, 2], [0.5, 0.5, 0], [4, 8, 100])
    got = peng_q_lambda(reward, discount, next_value, torch.ones(1, 3, dtype=torch.bool), trace_lambda)
    np.testing.assert_allclose(got[0], expected)


@pytest.mark.parametrize("greedy, terminated, expected", [
    ((1, 0), (0, 0, 1), (3.475, 4, 2)),
    ((1, 1), (0, 0, 0), (13.85375, 25.85, 52)),
    ((1, 1), (0, 1, 0), (1.575, 0, 52)),  # nothing leaks over the terminal
])  # fmt: skip
def test_retrace_by_hand(greedy, terminated, expected):
    reward, discount, next_value = tensors([1, 0, 2], 0.5 * (1 - np.array(terminated)), [4, 8, 100])
    q, pi, mu = tensors([1e9, 3, 6], [1e9, *greedy], [1e-9, 1, 1])  # of the first row none is read
    got = retrace(reward, discount, next_value, q, pi, mu, torch.ones(1, 3, dtype=torch.bool), 0.95)
    np.testing.assert_allclose(got[0], expected)


def sequences(seed, B, T, terminals):
    """(reward, discount, next_value, q, pi, mu, mask) of sequences that end where they like, some of one transition."""
    rng = np.random.default_rng(seed)
    reward, next_value, q = rng.normal(size=(3, B, T))
    discount = 0.9 * (rng.random((B, T)) >= terminals)
    pi, mu = rng.random((B, T)) < 0.6, rng.uniform(0.01, 1, (B, T))
    mask = np.arange(T) < rng.integers(1, T + 1, B)[:, None]
    return reward, discount, next_value, q, pi.astype(float), mu, mask


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), B=st.integers(1, 4), T=st.integers(1, 40), n=st.integers(1, 45),
    trace_lambda=st.sampled_from([0.0, 0.3, 0.95, 1.0]), terminals=st.sampled_from([0.0, 0.1, 1.0]),
)  # fmt: skip
def test_returns_match_the_reference(seed, B, T, n, trace_lambda, terminals):
    reward, discount, next_value, q, pi, mu, mask = arrays = sequences(seed, B, T, terminals)
    for dtype, rtol, atol in ((torch.float64, 1e-10, 1e-12), (torch.float32, 2e-5, 2e-5)):
        r, d, v, q_, p, m = (torch.from_numpy(a).to(dtype) for a in arrays[:-1])
        exists = torch.from_numpy(mask)
        for got, expected in (
            (n_step_return(r, d, v, exists, n), reference_returns.n_step_return(reward, discount, next_value, mask, n)),
            (
                retrace(r, d, v, q_, p, m, exists, trace_lambda),
                reference_returns.retrace(reward, discount, next_value, q, pi, mu, mask, trace_lambda),
            ),
            (
                peng_q_lambda(r, d, v, exists, trace_lambda),
                reference_returns.peng_q_lambda(reward, discount, next_value, mask, trace_lambda),
            ),
        ):
            assert got.dtype == dtype
            np.testing.assert_allclose(got.numpy()[mask], expected[mask], rtol=rtol, atol=atol)


def test_returns_at_the_ends_of_their_range():
    reward, discount, next_value, q, pi, mu, mask = (torch.from_numpy(a) for a in sequences(3, 5, 12, 0.1))
    whole = torch.ones_like(mask)
    one_step = reward + discount * next_value
    for got in (
        n_step_return(reward, discount, next_value, whole, 1),
        peng_q_lambda(reward, discount, next_value, whole, 0.0),
        retrace(reward, discount, next_value, q, pi, mu, whole, 0.0),
    ):
        torch.testing.assert_close(got, one_step)
    torch.testing.assert_close(  # to the end of the sequence
        n_step_return(reward, discount, next_value, whole, 99), peng_q_lambda(reward, discount, next_value, whole, 1.0)
    )
    none = torch.zeros_like(discount)  # terminal everywhere
    for got in (
        n_step_return(reward, none, next_value, whole, 5),
        peng_q_lambda(reward, none, next_value, whole, 0.9),
        retrace(reward, none, next_value, q, pi, mu, whole, 0.9),
    ):
        torch.testing.assert_close(got, reward)


def test_padding_behind_a_sequence_changes_nothing():
    reward, discount, next_value, q, pi, mu, _ = (torch.from_numpy(a) for a in sequences(4, 3, 7, 0.1))
    short = torch.ones(3, 7, dtype=torch.bool)
    pad = [torch.cat([x, torch.zeros(3, 5, dtype=x.dtype)], 1) for x in (reward, discount, next_value, q, pi, mu)]
    padded = torch.cat([short, torch.zeros(3, 5, dtype=torch.bool)], 1)
    for returns in (
        lambda r, d, v, q, p, m, mask: n_step_return(r, d, v, mask, 5),
        lambda r, d, v, q, p, m, mask: retrace(r, d, v, q, p, m, mask, 0.95),
        lambda r, d, v, q, p, m, mask: peng_q_lambda(r, d, v, mask, 0.95),
    ):
        torch.testing.assert_close(returns(*pad, padded)[:, :7], returns(reward, discount, next_value, q, pi, mu, short))
