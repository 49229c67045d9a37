import copy
import math
import types

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from urlfast.device import Arithmetic, has_bf16
from urlfast.learners.drq_sac import DrQSAC, DrQSACConfig, drq_sac_networks, gaussian, sac_target, squashed

A, F, B = 2, 6, 5


def learner(seed=0, convolutions=False, precision="fp32", **config):
    torch.manual_seed(seed)
    config = DrQSACConfig(**{"hidden": 8, "feature_dim": 4, "lr": 1e-2, **config})
    generators = (torch.Generator().manual_seed(seed + i) for i in range(2))
    return DrQSAC(config, *drq_sac_networks(config, F, A, convolutions), A, Arithmetic.choose("cpu", precision), *generators)


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    return types.SimpleNamespace(action=2 * torch.rand(B, A, generator=g) - 1, discount=0.9 * torch.randint(2, (B,), generator=g))


def views(n, seed, grad=False):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, F, generator=g).requires_grad_(grad) for _ in range(n)]


def pairs(K, seed):
    return list(zip(views(K, seed), views(K, seed + 1), strict=True))


def update(sac, seed=0, M=2, K=2):
    sac.prepare(0)
    reward = torch.randn(B, generator=torch.Generator().manual_seed(seed))
    return sac.update(batch(seed), reward, views(M, 10 + seed, True), pairs(K, 20 + seed))


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def snapshot(module):
    return [p.detach().clone() for p in module.parameters()]


def test_squashed_log_pi_is_that_of_the_distribution():
    """Against torch's tanh of a normal, in float64, and its gradients."""
    g = torch.Generator().manual_seed(0)
    mu, log_std, noise = (torch.randn(50, A, generator=g, dtype=torch.float64) for _ in range(3))
    mu.requires_grad_(), log_std.requires_grad_()
    a, log_pi = squashed(mu, log_std, noise)
    u = mu + log_std.exp() * noise
    expected = Independent(TransformedDistribution(Normal(mu, log_std.exp()), TanhTransform(cache_size=1)), 1)
    torch.testing.assert_close(a, torch.tanh(u))
    reference = expected.log_prob(torch.tanh(u))
    torch.testing.assert_close(log_pi, reference, rtol=1e-6, atol=1e-6)
    for got, want in zip(
        torch.autograd.grad(log_pi.sum(), (mu, log_std)), torch.autograd.grad(reference.sum(), (mu, log_std)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("u", [-30.0, -9.0, 0.0, 9.0, 30.0])
def test_log_pi_stays_exact_where_tanh_is_1(u):
    """log(1 - tanh^2 u) = -2 log cosh u; in float32, tanh(9.1) is 1."""
    mu = torch.full((1, 1), u, requires_grad=True)
    a, log_pi = squashed(mu, torch.zeros(1, 1), torch.zeros(1, 1))
    log_cosh = abs(u) + math.log1p(math.exp(-2 * abs(u))) - math.log(2)
    assert log_pi.item() == pytest.approx(2 * log_cosh - 0.5 * math.log(2 * math.pi), rel=1e-6, abs=1e-6)
    log_pi.backward()
    assert abs(a.item()) <= 1 and mu.grad.item() == pytest.approx(2 * math.tanh(u), abs=1e-6)


def test_spread_lies_between_its_bounds():
    outputs = torch.tensor([[1.0, 2.0, -1e9, 1e9], [1.0, 2.0, 0.0, 0.0]])
    mu, log_std = gaussian(outputs, (-10.0, 2.0))
    torch.testing.assert_close(mu, outputs[:, :2])
    torch.testing.assert_close(log_std, torch.tensor([[-10.0, 2.0], [-4.0, -4.0]]))


def test_target_averages_values_and_entropies_over_the_views():
    q_min, log_pi = torch.tensor([10.0, 20.0, 30.0, 40.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])  # K = 2 views of B = 2
    y = sac_target(q_min, log_pi, torch.tensor(0.5), torch.tensor([0.5, 0.25]), torch.tensor([0.9, 0.0]))
    torch.testing.assert_close(y, torch.tensor([0.5 + 0.9 * (20 - 0.5 * 2), 0.25]))  # a terminal's discount is 0


def drawn(reference, generator, features):
    """An action and log pi of the reference's actor, with the generator's next noise."""
    outputs = reference.actor(features)
    mu, std = outputs[:, :A], (-10 + 6 * (torch.tanh(outputs[:, A:]) + 1)).exp()
    u = mu + std * torch.randn(mu.shape, generator=generator)
    a = torch.tanh(u)
    return a, (Normal(mu, std).log_prob(u) - torch.log1p(-a.square())).sum(1)


@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("K, M", [(1, 1), (2, 2), (3, 1)])
def test_one_whole_step_against_plain_autograd(convolutions, K, M):
    """Critic, then actor and temperature, on the actions of the same generator."""
    got, reference = (learner(convolutions=convolutions, temperature=0.3) for _ in range(2))
    with torch.no_grad():  # a target that differs from the critic
        for sac in (got, reference):
            for parameter in sac.critic_target.parameters():
                parameter.add_(0.1)
    b, reward = batch(), torch.randn(B, generator=torch.Generator().manual_seed(9))
    online, target = views(M, 1, True), pairs(K, 2)
    generator = reference.update_generator

    action, log_pi = drawn(reference, generator, torch.cat([features for features, _ in target]))
    y = 0
    for k, (_, features_ema) in enumerate(target):
        rows = slice(k * B, (k + 1) * B)
        y = y + (reward + b.discount * (reference.critic_target(features_ema, action[rows]).amin(0) - 0.3 * log_pi[rows])) / K
    y = y.detach()
    values = [reference.critic(view, b.action) for view in online]
    loss = sum((q[i] - y).square().mean() for q in values for i in range(2))  # the sum over views, as the release
    expected = torch.autograd.grad(loss, [*reference.critic_parameters, *online])

    assert got.prepare(0)
    metrics, priorities = got.update(b, reward, online, target)
    torch.testing.assert_close(metrics["critic_loss"], loss.detach())
    torch.testing.assert_close(metrics["q_target"], y.mean())
    for parameter, gradient in zip([*got.critic_parameters, *online], expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(priorities, torch.stack([(q - y).abs() for q in values]).mean((0, 1)).detach())
    assert not priorities.requires_grad and not any(value.requires_grad for value in metrics.values())

    action, log_pi = drawn(reference, generator, online[0].detach())
    actor_loss = (0.3 * log_pi - got.critic(online[0].detach(), action).amin(0)).mean()  # got.critic: after its step
    torch.testing.assert_close(metrics["actor_loss"], actor_loss.detach())
    for parameter, gradient in zip(got.actor_parameters, torch.autograd.grad(actor_loss, reference.actor_parameters), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
    # d/d log_alpha of alpha * mean(-log pi - H), with H = -A
    torch.testing.assert_close(got.log_alpha.grad, 0.3 * (-log_pi.detach() + A).mean())


@pytest.mark.parametrize("bias, grows", [(-20.0, True), (0.8, False)])
def test_temperature_grows_where_the_entropy_is_too_low(bias, grows):
    sac = learner()
    with torch.no_grad():
        sac.actor.mlp[-1].bias[A:] = bias  # of the spread: std e^-10, and 1, near which the entropy is largest
    before = sac.log_alpha.item()
    update(sac)
    assert (sac.log_alpha.item() > before) == grows


def test_actor_temperature_and_target_move_at_every_second_update():
    sac, whole = learner(tau=0.25), []
    for i in range(4):
        actor, critic, target, alpha = snapshot(sac.actor), snapshot(sac.critic), snapshot(sac.critic_target), sac.log_alpha.item()
        metrics, _ = update(sac, i)
        whole.append(sac.whole)
        assert not same(critic, sac.critic.parameters())
        assert ("actor_loss" in metrics) == sac.whole
        assert [same(actor, sac.actor.parameters()), same(target, sac.critic_target.parameters()), alpha == sac.log_alpha.item()] == [
            not sac.whole
        ] * 3
        if sac.whole:
            for old, new, online in zip(target, sac.critic_target.parameters(), sac.critic.parameters(), strict=True):
                torch.testing.assert_close(new, 0.75 * old + 0.25 * online.detach())
    assert whole == [True, False, True, False]
    assert not any(p.requires_grad for p in sac.critic_target.parameters())
    assert [learner(actor_every=1).prepare(0) for _ in range(3)] == [True] * 3


def test_features_that_ask_for_no_gradient_get_none():
    sac, online = learner(), views(2, 1)
    sac.prepare(0)
    sac.update(batch(), torch.ones(B), online, pairs(2, 2))
    assert all(view.grad is None for view in online)


def test_acting_is_the_mean_or_a_draw_of_the_policy():
    sac = learner()
    features = torch.randn(4000, F, generator=torch.Generator().manual_seed(0))
    mu, log_std = gaussian(sac.actor(features).detach(), sac.config.log_std)
    mean, state = sac.act(features)
    assert state is None and mean.dtype == np.float32 and mean.shape == (4000, A)
    np.testing.assert_allclose(mean, torch.tanh(mu), atol=1e-6)
    drawn, _ = sac.act(features, explore=sac.exploration(0))
    noise = (np.arctanh(drawn.astype(np.float64)) - mu.numpy()) / log_std.exp().numpy()
    assert abs(noise.mean()) < 0.05 and noise.std() == pytest.approx(1, abs=0.05)
    uniform = sac.uniform(4000)
    assert uniform.shape == (4000, A) and -1 <= uniform.min() < -0.99 and 0.99 < uniform.max() <= 1


@pytest.mark.parametrize("after", [2, 3])
def test_saved_and_loaded_it_goes_on_bit_equal(after):
    """Also from the middle of a pair of updates: which of them is whole is part of the state."""
    first, second = learner(), learner(seed=5)
    for i in range(after):
        update(first, i)
    state = copy.deepcopy(first.state_dict())
    assert set(state) == {"actor", "actor_optimizer", "critic", "critic_target", "critic_optimizer", "log_alpha", "log_alpha_optimizer"}
    second.load_state_dict(state)
    second.update_generator.set_state(first.update_generator.get_state())
    for i in range(after, after + 3):
        a, b = update(first, i), update(second, i)
        assert first.whole == second.whole and a[0] == b[0] and torch.equal(a[1], b[1])
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="the processor has no bfloat16 products")
@pytest.mark.parametrize("convolutions", [False, True])
def test_bf16_is_near_float32_and_values_stay_float32(convolutions):
    exact, fast = (learner(convolutions=convolutions, precision=p, hidden=512, lr=1e-4) for p in ("fp32", "bf16"))
    a, b = update(exact), update(fast)
    assert b[1].dtype == torch.float32 and all(value.dtype == torch.float32 for value in b[0].values())
    assert not torch.equal(a[1], b[1])
    torch.testing.assert_close(a[1], b[1], atol=0.05, rtol=0.05)


BAD = {"hidden": 0, "feature_dim": 0, "lr": 0.0, "adam_eps": 0.0, "tau": 0.0, "actor_every": 0, "temperature": 0.0, "log_std": (2.0, -10.0)}


@pytest.mark.parametrize("name, value", [*BAD.items(), ("tau", 1.5), ("log_std", (-1000.0, 2.0)), ("log_std", (-10.0, 1000.0))])
def test_what_is_no_config_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}: must"):
        DrQSACConfig(**{name: value})
