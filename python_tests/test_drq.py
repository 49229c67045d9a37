import copy
import types

import numpy as np
import pytest
import torch
from torch import nn

from urlfast.device import Arithmetic, adam
from urlfast.learners.drq import DrQ, DrQConfig, drq_target, q_error
from urlfast.losses import huber
from urlfast.nets.heads import DuelingQ

A, F, B = 3, 6, 5


def learner(seed=0, **config):
    torch.manual_seed(seed)
    arithmetic = Arithmetic.choose("cpu", "fp32")
    return DrQ(DrQConfig(**{"hidden": 8, "lr": 1e-2, **config}), DuelingQ(F, A, 8), A, arithmetic, torch.Generator().manual_seed(seed))


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    return types.SimpleNamespace(action=torch.randint(A, (B,), generator=g), discount=0.9 * torch.randint(2, (B,), generator=g))


def views(n, seed, grad=True):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, F, generator=g).requires_grad_(grad) for _ in range(n)]


def table(values):
    """A Q whose rows are given: features are row numbers."""
    return lambda features: values[features.long().squeeze(-1)]


def test_target_is_the_definition():
    """K = 2: the action from the online net on the online features of each view, its value from the target net on the EMA features."""
    online, ema = torch.tensor([[1.0, 9.0, 0.0], [5.0, 0.0, 0.0]]), torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]])
    row = lambda *i: torch.tensor(i)[:, None]  # noqa: E731
    target = [(row(0, 1), row(1, 1)), (row(1, 0), row(0, 0))]  # best actions: view 1: 1, 0; view 2: 0, 1
    y = drq_target(table(online), table(ema), target, torch.tensor([0.5, 0.25]), torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(y, torch.tensor([0.5 + 0.5 * (50 + 10) / 2, 0.25]))  # a terminal's discount is 0: no bootstrap


def test_error_of_each_view_is_its_own():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    online = [torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [1.0]])]
    error = q_error(table(values), online, torch.tensor([2, 0]), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(error, torch.tensor([[2.0, 3.0], [5.0, 3.0]]))


@pytest.mark.parametrize("K, M", [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_one_step_against_plain_autograd(K, M):
    """The loss is the mean over M of the Huber loss against the mean over K targets; its gradient reaches features and weights."""
    got, reference = learner(tau=0.05), learner(tau=0.05)
    with torch.no_grad():  # a target that differs from the online net
        for drq in (got, reference):
            for parameter in drq.q_target.parameters():
                parameter.add_(0.1)
    b, reward = batch(), torch.randn(B, generator=torch.Generator().manual_seed(9))
    online, target = views(M, 1), list(zip(views(K, 2, False), views(K, 3, False), strict=True))

    y = 0
    for features, features_ema in target:
        best = reference.q(features).argmax(-1)
        y = y + (reward + b.discount * reference.q_target(features_ema)[torch.arange(B), best]) / K
    y = y.detach()
    loss = sum(huber(reference.q(view)[torch.arange(B), b.action] - y).mean() for view in online) / M
    expected = torch.autograd.grad(loss, [*reference.parameters, *online])

    metrics, priorities = got.update(b, reward, online, target)
    torch.testing.assert_close(metrics["q_loss"], loss.detach())
    torch.testing.assert_close(metrics["q_target"], y.mean())
    norm = torch.stack([g.norm() for g in expected[: len(got.parameters)]]).norm()
    torch.testing.assert_close(metrics["grad_norm"], norm)
    for view, gradient in zip(online, expected[len(got.parameters) :], strict=True):
        torch.testing.assert_close(view.grad, gradient)
    errors = torch.stack([(reference.q(view)[torch.arange(B), b.action] - y).abs() for view in online]).mean(0)
    torch.testing.assert_close(priorities, errors.detach())
    assert not priorities.requires_grad and not any(value.requires_grad for value in metrics.values())


def test_gradient_norm_is_limited():
    drq = learner(grad_clip=1e-3)
    drq.update(batch(), 100 * torch.ones(B), views(1, 1), list(zip(views(1, 2, False), views(1, 3, False), strict=True)))
    assert torch.stack([p.grad.norm() for p in drq.parameters]).norm() == pytest.approx(1e-3, rel=1e-3)


def test_features_that_ask_for_no_gradient_get_none():
    online = views(2, 1, grad=False)
    learner().update(batch(), torch.ones(B), online, list(zip(views(1, 2, False), views(1, 3, False), strict=True)))
    assert all(view.grad is None for view in online)


def test_target_network_moves_by_tau_and_carries_no_gradient():
    drq = learner(tau=0.25)
    before = [p.clone() for p in drq.q_target.parameters()]
    assert not any(p.requires_grad for p in drq.q_target.parameters())
    drq.update(batch(), torch.ones(B), views(1, 1), list(zip(views(1, 2, False), views(1, 3, False), strict=True)))
    for old, target, online in zip(before, drq.q_target.parameters(), drq.q.parameters(), strict=True):
        torch.testing.assert_close(target, 0.75 * old + 0.25 * online.detach())


def test_tau_1_is_the_online_network():
    drq = learner(tau=1.0)
    assert drq.q_target is drq.q and "q_target" not in drq.state_dict()
    for tau in (0.0, 1.5):
        with pytest.raises(ValueError, match="tau: must lie in"):
            DrQConfig(tau=tau)


def test_acting_is_greedy_or_uniform_over_all_actions():
    drq = learner()
    features = torch.randn(4000, F, generator=torch.Generator().manual_seed(0))
    greedy, state = drq.act(features)
    assert state is None and greedy.dtype == np.int64
    np.testing.assert_array_equal(greedy, drq.q(features).argmax(-1))
    at_random, _ = drq.act(features, explore=1.0)
    counts = np.bincount(at_random, minlength=A)
    assert len(counts) == A and counts.min() > 4000 / A - 150  # the last action too
    mixed, _ = drq.act(features, explore=0.3)
    assert 0.15 < (mixed != greedy).mean() < 0.25  # 0.3 * 2/3


def test_epsilon_falls_linearly():
    np.testing.assert_allclose([learner().exploration(steps) for steps in (0, 2500, 5000, 10**6)], [1, 0.55, 0.1, 0.1])
    assert learner(epsilon=0.01, epsilon_decay=0).exploration(0) == pytest.approx(0.01)


def test_saved_and_loaded_it_goes_on_bit_equal():
    """Update i of both gives the same numbers, also where the second was made with other weights."""
    first = learner(tau=0.1)
    steps = [
        (batch(i), torch.randn(B), views(2, 10 + i, False), list(zip(views(1, 20 + i), views(1, 30 + i), strict=True))) for i in range(6)
    ]
    for step in steps[:3]:
        first.update(*step)
    second = learner(seed=5, tau=0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # an optimiser would share its state
    for step in steps[3:]:
        a, b = first.update(*step), second.update(*step)
        assert a[0]["q_loss"] == b[0]["q_loss"] and torch.equal(a[1], b[1])
    assert all(torch.equal(p, q) for p, q in zip(first.parameters, second.parameters, strict=True))


def test_values_of_a_bandit():
    """One state, three arms: Q becomes their rewards."""
    torch.manual_seed(0)
    drq, rewards = learner(lr=3e-2), torch.tensor([1.0, -0.5, 2.0])
    state = torch.ones(32, F)
    for i in range(200):
        action = torch.randint(A, (32,), generator=torch.Generator().manual_seed(i))
        drq.update(types.SimpleNamespace(action=action, discount=torch.zeros(32)), rewards[action], [state], [(state, state)])
    torch.testing.assert_close(drq.q(state[:1])[0].detach(), rewards, atol=0.05, rtol=0)


def test_a_state_of_another_shape_is_refused_and_brings_no_rate_of_its_own():
    parameter = nn.Parameter(torch.zeros(3))
    optim = adam([parameter], 1e-3, 1e-8, torch.device("cpu"))
    parameter.grad = torch.ones(3)
    optim.step()
    state = optim.state_dict()
    state["param_groups"][0]["lr"] = "fast"
    optim.load_state_dict(state)
    assert optim.param_groups[0]["lr"] == 1e-3
    state["state"][0]["exp_avg"] = torch.zeros(4)
    with pytest.raises(ValueError, match="optimizer"):
        optim.load_state_dict(state)
