import copy

import pytest
import torch

from urlfast.nets.encoders import Encoder, EncoderConfig, copy_buffers
from urlfast.nets.heads import DuelingQ, Projection, dueling

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
    with torch.autocast("cpu", torch.bfloat16):
        assert q(features).dtype == torch.float32
