import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from urlfast.losses import huber, nt_xent


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
