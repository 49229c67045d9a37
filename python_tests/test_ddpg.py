import copy
import types

import numpy as np
import pytest
import torch

from urlfast.device import Arithmetic, has_bf16
from urlfast.learners.ddpg import DDPG, LIMIT, DDPGConfig, bounded, ddpg_networks, ddpg_target, noise_scale, q_error, smoothed

A, F, B = 2, 6, 5


def learner(seed=0, convolutions=False, precision="fp32", **config):
    torch.manual_seed(seed)
    config = DDPGConfig(**{"hidden": 8, "feature_dim": 4, "lr": 1e-2, **config})
    generators = (torch.Generator().manual_seed(seed + i) for i in range(2))
    return DDPG(config, *ddpg_networks(config, F, A, convolutions), A, Arithmetic.choose("cpu", precision), *generators)


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    return types.SimpleNamespace(action=2 * torch.rand(B, A, generator=g) - 1, discount=0.9 * torch.randint(2, (B,), generator=g))


def views(n, seed, grad=False):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, F, generator=g).requires_grad_(grad) for _ in range(n)]


def pairs(K, seed):
    return list(zip(views(K, seed), views(K, seed + 1), strict=True))


def changed(before, module):
    return [not torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True)]


def snapshot(module):
    return [p.detach().clone() for p in module.parameters()]


def test_target_is_the_mean_over_views_of_the_smaller_value():
    q_min = torch.tensor([10.0, 20.0, 30.0, 40.0])  # K = 2 views of B = 2
    y = ddpg_target(q_min, torch.tensor([0.5, 0.25]), torch.tensor([0.9, 0.0]))
    torch.testing.assert_close(y, torch.tensor([0.5 + 0.9 * 20, 0.25]))  # a terminal's discount is 0: no bootstrap


def test_error_of_each_critic_and_view_is_its_own():
    critic = lambda s, a: torch.stack([s[:, 0] + a[:, 0], 10 * s[:, 0] + a[:, 0]])  # noqa: E731
    online = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])]
    error = q_error(critic, online, torch.tensor([[0.5], [0.25]]), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(error, torch.tensor([[[0.5, 0.25], [2.5, 2.25]], [[9.5, 18.25], [29.5, 38.25]]]))


def test_noise_is_clipped_the_action_bounded_and_the_gradient_passes():
    mean = torch.tensor([0.0, 0.0, 0.9, -0.9], requires_grad=True)
    action = smoothed(mean, torch.tensor([5.0, -0.1, 0.25, -5.0]), 0.3)
    np.testing.assert_allclose(action.detach(), [0.3, -0.1, LIMIT, -LIMIT], atol=2e-7)
    assert action.abs().max() < 1
    action.sum().backward()
    assert mean.grad.tolist() == [1, 1, 1, 1]
    assert bounded(torch.tensor([1e9])).abs() <= 1


@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("K, M", [(1, 1), (2, 1), (3, 2)])
def test_one_step_against_plain_autograd(convolutions, K, M):
    """Without noise: the critic's loss and gradient, then the actor's on the critic that has made its step."""
    got, reference = (learner(convolutions=convolutions, sigma=0.0, sigma_final=0.0) for _ in range(2))
    with torch.no_grad():  # a target that differs from the critic
        for ddpg in (got, reference):
            for parameter in ddpg.critic_target.parameters():
                parameter.add_(0.1)
    b, reward = batch(), torch.randn(B, generator=torch.Generator().manual_seed(9))
    online, target = views(M, 1, True), pairs(K, 2)

    y = 0
    for features, features_ema in target:
        value = reference.critic_target(features_ema, torch.tanh(reference.actor(features)))
        y = y + (reward + b.discount * torch.minimum(value[0], value[1])) / K
    y = y.detach()
    values = [reference.critic(view, b.action) for view in online]
    loss = sum((q[i] - y).square().mean() for q in values for i in range(2)) / M
    expected = torch.autograd.grad(loss, [*reference.critic_parameters, *online])

    metrics, priorities = got.update(b, reward, online, target)
    torch.testing.assert_close(metrics["critic_loss"], loss.detach())
    torch.testing.assert_close(metrics["q_target"], y.mean())
    for parameter, view_or_weight in zip([*got.critic_parameters, *online], expected, strict=True):
        torch.testing.assert_close(parameter.grad, view_or_weight, atol=1e-6, rtol=1e-5)
    errors = torch.stack([(q - y).abs() for q in values]).mean((0, 1))
    torch.testing.assert_close(priorities, errors.detach())
    assert not priorities.requires_grad and not any(value.requires_grad for value in metrics.values())

    actor_loss = -got.critic(online[0], torch.tanh(reference.actor(online[0]))).amin(0).mean()  # got.critic: after its step
    torch.testing.assert_close(metrics["actor_loss"], actor_loss.detach())
    for parameter, gradient in zip(got.actor_parameters, torch.autograd.grad(actor_loss, reference.actor_parameters), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-5)


def test_features_that_ask_for_no_gradient_get_none():
    ddpg, online = learner(), views(2, 1)
    before = snapshot(ddpg.actor)
    ddpg.update(batch(), torch.ones(B), online, pairs(1, 2))
    assert all(view.grad is None for view in online) and any(changed(before, ddpg.actor))


def test_target_critic_moves_by_tau_and_carries_no_gradient():
    ddpg = learner(tau=0.25)
    before = snapshot(ddpg.critic_target)
    assert not any(p.requires_grad for p in ddpg.critic_target.parameters())
    ddpg.update(batch(), torch.ones(B), views(1, 1, True), pairs(1, 2))
    for old, target, online in zip(before, ddpg.critic_target.parameters(), ddpg.critic.parameters(), strict=True):
        torch.testing.assert_close(target, 0.75 * old + 0.25 * online.detach())


def test_a_critic_of_a_methods_own_is_learned_from():
    """APS: psi(s, a) . w with w the last entries of the features."""

    class Successor(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.psi = torch.nn.Parameter(torch.ones(2, 1, 3))

        def forward(self, features, action):
            return (self.psi * features[:, -3:]).sum(-1) - action.square().sum(-1)

    torch.manual_seed(0)
    actor, _ = ddpg_networks(DDPGConfig(hidden=8), F, A, False)
    ddpg = DDPG(DDPGConfig(), actor, Successor(), A, Arithmetic.choose("cpu", "fp32"), torch.Generator(), torch.Generator())
    _, priorities = ddpg.update(batch(), torch.ones(B), views(1, 1, True), pairs(2, 2))
    assert priorities.shape == (B,) and (ddpg.critic.psi != 1).any() and (ddpg.critic_target.psi != 1).any()


def test_noise_follows_its_schedule():
    v2 = DDPGConfig(sigma=1.0, sigma_final=0.1, sigma_steps=1000)
    np.testing.assert_allclose([noise_scale(v2, steps) for steps in (0, 500, 1000, 10**6)], [1, 0.55, 0.1, 0.1])
    assert noise_scale(DDPGConfig(), 0) == noise_scale(DDPGConfig(), 10**6) == 0.2

    ddpg = learner(sigma=1.0, sigma_final=0.1, sigma_steps=1000, sigma_clip=100.0)
    mean, where = torch.zeros(20_000, 1), ddpg.sigma.data_ptr()
    for steps, sigma in ((0, 1.0), (900, 0.19)):
        assert ddpg.prepare(steps) and ddpg.exploration(steps) == pytest.approx(sigma)
        noise = ddpg.noisy(mean)
        inside = noise.abs() < 0.9  # the rest is clipped to the limits
        share = torch.erf(torch.tensor(0.9 / sigma / 2**0.5))
        assert inside.float().mean() == pytest.approx(share.item(), abs=0.02)
    assert ddpg.sigma.data_ptr() == where  # a captured update reads it there
    ddpg.set_noise(0.0)
    assert ddpg.noisy(mean).abs().max() == 0
    tight = learner(sigma=5.0, sigma_clip=0.3)
    assert tight.noisy(mean).abs().max() == pytest.approx(0.3)


def test_acting_is_the_mean_or_noise_around_it():
    ddpg = learner(sigma_clip=0.01)
    features = torch.randn(4000, F, generator=torch.Generator().manual_seed(0))
    mean, state = ddpg.act(features)
    assert state is None and mean.dtype == np.float32 and mean.shape == (4000, A)
    np.testing.assert_allclose(mean, torch.tanh(ddpg.actor(features)).detach(), atol=1e-6)
    for explore in (0.1, 0.2):
        noise = (ddpg.act(features, explore=explore)[0] - mean)[np.abs(mean) < 0.3]
        assert noise.std() == pytest.approx(explore, abs=0.005)  # not clipped as in an update
    assert np.abs(ddpg.act(100 * features, explore=5.0)[0]).max() <= LIMIT
    uniform = ddpg.uniform(4000)
    assert uniform.shape == (4000, A) and uniform.dtype == torch.float32
    assert -1 <= uniform.min() < -0.99 and 0.99 < uniform.max() <= 1 and abs(uniform.mean()) < 0.05


@pytest.mark.parametrize("convolutions", [False, True])
def test_saved_and_loaded_it_goes_on_bit_equal(convolutions):
    """Update i of both gives the same numbers, also where the second was made with other weights; the generator is its owner's to save."""
    first = learner(convolutions=convolutions)
    steps = [(batch(i), torch.randn(B), views(2, 10 + i), pairs(2, 20 + i)) for i in range(6)]
    for step in steps[:3]:
        first.update(*step)
    second = learner(seed=5, convolutions=convolutions)
    state = copy.deepcopy(first.state_dict())
    assert list(state) == ["actor", "actor_optimizer", "critic", "critic_target", "critic_optimizer"]
    second.load_state_dict(state)
    second.update_generator.set_state(first.update_generator.get_state())
    for step in steps[3:]:
        a, b = first.update(*step), second.update(*step)
        assert a[0]["critic_loss"] == b[0]["critic_loss"] and a[0]["actor_loss"] == b[0]["actor_loss"] and torch.equal(a[1], b[1])
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_part_can_be_loaded_alone():
    first, second = learner(), learner(seed=1)
    critic = snapshot(second.critic)
    second.load_state_dict({"actor": first.actor.state_dict()})
    assert not any(changed(first.actor.parameters(), second.actor)) and not any(changed(critic, second.critic))


@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="the processor has no bfloat16 products")
@pytest.mark.parametrize("convolutions", [False, True])
def test_bf16_is_near_float32_and_values_stay_float32(convolutions):
    """512 wide: hidden layers of that size are in bfloat16."""
    exact, fast = (
        learner(convolutions=convolutions, precision=p, hidden=512, sigma=0.0, sigma_final=0.0, lr=1e-4) for p in ("fp32", "bf16")
    )
    reward = torch.linspace(-1, 1, B)
    a, b = (ddpg.update(batch(), reward, views(1, 1, True), pairs(1, 2)) for ddpg in (exact, fast))
    assert b[1].dtype == torch.float32 and all(value.dtype == torch.float32 for value in b[0].values())
    assert not torch.equal(a[1], b[1])
    torch.testing.assert_close(a[1], b[1], atol=0.02, rtol=0.02)


BAD = {"hidden": 0, "feature_dim": 0, "lr": 0.0, "adam_eps": 0.0, "tau": 0.0, "sigma": -0.1, "sigma_final": float("nan")}


@pytest.mark.parametrize("name, value", [*BAD.items(), ("tau", 1.5), ("sigma_steps", -1), ("sigma_clip", 0.0)])
def test_what_is_no_config_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}: must"):
        DDPGConfig(**{name: value})
