import copy

import pytest
import torch

from urlfast.nets.encoders import Encoder, EncoderConfig, copy_buffers
from urlfast.nets.heads import MLP, Actor, Dense, DuelingQ, Projection, Tanh, Trunk, Twin, TwinQ, dueling

APT = EncoderConfig(activation="elu", features=15, spectral_norm=True)


def weights(encoder):
    return [layer.weight for layer in [*encoder.conv, *([encoder.linear] if encoder.linear else [])]]


def test_shapes_of_the_papers_networks():
    torch.manual_seed(0)
    images = torch.rand(2, 4, 84, 84)
    assert Encoder(EncoderConfig(), (4, 84, 84))(images).shape == (2, 3136)
    z = Encoder(APT, (4, 84, 84))(images)
    assert z.shape == (2, 15) and z.abs().max() < 1
    assert Projection(15, (128, 64))(z).shape == (2, 64)
    assert [type(layer).__name__ for layer in Projection(15, (128, 64))] == ["Linear", "ELU", "Linear"]


def test_images_that_are_too_small_are_named():
    with pytest.raises(ValueError, match="observation_shape: images of"):
        Encoder(EncoderConfig(), (4, 20, 20))
    with pytest.raises(ValueError, match="observation_shape: must be"):
        Encoder(EncoderConfig(), (4,))


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_spectral_norm_bounds_every_weight(scale):
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(activation="elu", features=15, spectral_norm=True), (4, 84, 84))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale)
        for _ in range(30):  # each a power iteration
            encoder(torch.rand(1, 4, 84, 84))
    for weight in weights(encoder.eval()):
        assert torch.linalg.matrix_norm(weight.detach().flatten(1), 2) == pytest.approx(1, abs=0.03)


def test_spectral_norm_is_of_the_gradient_too():
    """W / sigma(W) does not change with the length of W, so the gradient is orthogonal to W."""
    torch.manual_seed(0)
    encoder = Encoder(APT, (4, 84, 84))
    encoder(torch.rand(3, 4, 84, 84)).square().mean().backward()
    for layer in encoder.conv:
        w = layer.parametrizations.weight.original
        assert (w * w.grad).sum().abs() < 1e-4 * w.norm() * w.grad.norm()


def test_evaluation_mode_changes_nothing_and_copy_buffers_follows():
    torch.manual_seed(0)
    encoder = Encoder(APT, (4, 84, 84))
    target = copy.deepcopy(encoder).eval()
    images = torch.rand(2, 4, 84, 84)
    before = copy.deepcopy(target.state_dict())
    first = target(images)
    assert torch.equal(first, target(images))
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    with torch.no_grad():
        encoder.conv[0].parametrizations.weight.original.normal_()
        encoder(images)
    u, u_target = encoder.conv[0].parametrizations.weight[0].u, target.conv[0].parametrizations.weight[0].u
    assert not torch.equal(u, u_target)
    copy_buffers(target, encoder)
    assert torch.equal(u, u_target) and u is not u_target


def test_features_are_float32_under_autocast_and_near_the_exact_ones():
    torch.manual_seed(0)
    encoder = Encoder(APT, (4, 84, 84)).eval()
    images = torch.rand(8, 4, 84, 84)
    exact = encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        z = encoder(images)
    assert z.dtype == torch.float32
    assert 0 < (z - exact).abs().mean() < 0.1 * exact.std()


def test_dueling_is_v_plus_centred_advantage():
    value, advantage = torch.tensor([[10.0], [-1.0]]), torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    torch.testing.assert_close(dueling(value, advantage), torch.tensor([[8.0, 9.0, 13.0], [-2.0, -2.0, 1.0]]))


def test_dueling_q_is_two_separate_streams():
    torch.manual_seed(0)
    q, features = DuelingQ(6, 3, hidden=5), torch.randn(4, 6)
    W, b = q.hidden.weight, q.hidden.bias
    value = torch.relu(features @ W[:5].T + b[:5]) @ q.value.weight.T + q.value.bias
    advantage = torch.relu(features @ W[5:].T + b[5:]) @ q.advantage.weight.T + q.advantage.bias
    torch.testing.assert_close(q(features), value + advantage - advantage.mean(1, keepdim=True))


def test_the_last_layers_of_dueling_q_stay_in_float32_under_autocast():
    torch.manual_seed(0)
    q, features = DuelingQ(64, 3, hidden=256), torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        got, hidden = q(features), q.hidden(features)
    assert hidden.dtype == torch.bfloat16
    value, advantage = torch.relu(hidden).float().chunk(2, -1)
    want = dueling(value @ q.value.weight.T + q.value.bias, advantage @ q.advantage.weight.T + q.advantage.bias)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def reference_mlp(mlp, x):
    for layer in list(mlp)[:-1]:
        x = torch.relu(x) if isinstance(layer, torch.nn.ReLU) else x @ layer.weight.T + layer.bias
    return x @ mlp[-1].weight.T + mlp[-1].bias


def reference_trunk(trunk, x):
    h = x @ trunk.linear.weight.T + trunk.linear.bias
    h = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return torch.tanh(h * trunk.norm.weight + trunk.norm.bias)


@pytest.mark.parametrize("layers, trunk", [(1, 7), (2, 5), (2, 0)])
def test_actor_and_twin_critic_against_their_formulas(layers, trunk):
    torch.manual_seed(0)
    s, a = torch.randn(4, 6), torch.randn(4, 2)
    actor = Actor(6, 3, 8, layers, trunk)
    h = reference_trunk(actor.trunk, s) if trunk else s
    torch.testing.assert_close(actor(s), reference_mlp(actor.mlp, h))

    behind = TwinQ(6, 2, 8, layers, trunk)
    h = torch.cat([reference_trunk(behind.trunk, s) if trunk else s, a], 1)
    q = torch.stack([reference_mlp(behind.first, h), reference_mlp(behind.second, h)]).squeeze(-1)
    assert q.shape == (2, 4)
    torch.testing.assert_close(behind(s, a), q)

    if trunk:
        within = Twin(6, 2, 8, layers, trunk, action_in_trunk=True, outputs=5)
        h = reference_trunk(within.trunk, torch.cat([s, a], 1))
        psi = torch.stack([reference_mlp(within.first, h), reference_mlp(within.second, h)])
        assert psi.shape == (2, 4, 5)
        torch.testing.assert_close(within(s, a), psi)


def test_the_two_critics_begin_apart_every_matrix_orthogonal_every_bias_zero():
    torch.manual_seed(0)
    q = TwinQ(6, 2, 16, 2, 8)
    assert not torch.equal(q.first[0].weight, q.second[0].weight)
    for layer in [module for module in q.modules() if isinstance(module, Dense)]:
        w = layer.weight.detach()
        gram = w @ w.T if len(w) <= w.shape[1] else w.T @ w
        torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)
        assert not layer.bias.any()
    assert [type(layer).__name__ for layer in MLP(3, 4, 2, 1)] == ["Dense", "ReLU", "Dense", "ReLU", "Dense"]


def test_an_action_cannot_enter_a_trunk_that_is_not_there():
    with pytest.raises(ValueError, match="action_in_trunk"):
        TwinQ(6, 2, 8, 1, action_in_trunk=True)


def test_layers_with_few_weights_stay_in_float32_under_autocast():
    """Those that read observations and those whose outputs are actions or values."""
    torch.manual_seed(0)
    narrow, wide = Dense(30, 1024), Dense(1024, 1024)
    x = torch.randn(4, 30)
    with torch.autocast("cpu", torch.bfloat16):
        h = narrow(x)
        assert h.dtype == torch.float32 and wide(h).dtype == torch.bfloat16
        assert Trunk(30, 1024)(x).dtype == MLP(1024, 1024, 1, 2)(h).dtype == torch.float32
    assert torch.equal(h, narrow(x))


def test_tanh_of_the_trunk_is_tanh():
    x = torch.linspace(-20, 20, 4001, requires_grad=True)
    torch.testing.assert_close(Tanh.apply(x), torch.tanh(x), rtol=0, atol=3e-7)
    gradients = [torch.autograd.grad(function(x).square().sum(), x)[0] for function in (Tanh.apply, torch.tanh)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_flat_features_lie_as_channels_rows_columns_and_are_not_converted():
    encoder = Encoder(EncoderConfig(((4, 3, 2),)), (3, 9, 9)).to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 9, 9).to(memory_format=torch.channels_last)
    features = encoder(images)
    torch.testing.assert_close(features, torch.relu(encoder.conv[0](images)).contiguous().flatten(1))
    weights = torch.randn_like(features)
    (features * weights).sum().backward()
    expected = torch.autograd.grad((torch.relu(encoder.conv[0](images)).contiguous().flatten(1) * weights).sum(), encoder.conv[0].weight)[0]
    torch.testing.assert_close(encoder.conv[0].weight.grad, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(images.bfloat16()).dtype == torch.bfloat16
