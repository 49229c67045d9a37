import numpy as np
import pytest
import torch
from conftest import DEVICES

from urlfast.augment import Augment, AugmentConfig, color_jitter, intensity_factors, random_shift, to_float


def generator(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def crops(image, pad):
    """{(y, x): crop} of every offset, by the definition."""
    H, W = image.shape[-2:]
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="edge")
    return {(y, x): padded[:, y : y + H, x : x + W] for y in range(2 * pad + 1) for x in range(2 * pad + 1)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pad", [0, 1, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_shift_is_a_whole_crop_of_its_own_image(device, pad, layout):
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 11, 17), np.uint8)
    shifted = random_shift(torch.from_numpy(images).to(device), pad, copies=2, generator=generator(1, device), memory_format=layout)
    assert device != "cpu" or shifted.is_contiguous(memory_format=layout)
    shifted = shifted.cpu().numpy()
    assert shifted.shape == (40, 3, 11, 17) and shifted.dtype == np.uint8
    found = []
    for row, image in enumerate(shifted):
        offsets = [offset for offset, crop in crops(images[row % 20], pad).items() if np.array_equal(crop, image)]
        assert len(offsets) == 1
        found += offsets
    assert pad == 0 or (len(set(found[:20])) > 3 and found[:20] != found[20:])  # offsets differ within a batch, and between copies


@pytest.mark.parametrize("device", DEVICES)
def test_offsets_are_uniform_and_seeded(device):
    ramp = torch.arange(20, dtype=torch.uint8, device=device).repeat(20, 1)
    images = torch.stack([ramp, ramp.T]).expand(10_000, 2, 20, 20)  # channel 0 shows x, channel 1 shows y
    shifted = random_shift(images, 4, generator=generator(0, device))
    for channel in (0, 1):
        offset = shifted[:, channel, 10, 10].cpu().numpy().astype(int) - 6
        assert set(offset) == set(range(9))
        assert abs(offset.mean() - 4) < 0.1
    assert torch.equal(shifted, random_shift(images, 4, generator=generator(0, device)))
    assert not torch.equal(shifted, random_shift(images, 4, generator=generator(1, device)))


def test_intensity_is_one_bounded_factor_for_a_stack():
    factors = intensity_factors(10_000, 0.05, generator=generator(0))
    assert abs(factors.mean() - 1) < 0.002 and factors.min() >= 0.9 and factors.max() <= 1.1
    assert 0.02 < (factors <= 0.9).float().mean() < 0.03  # P(N < -2), clipped there
    images = torch.full((2, 4, 3, 3), 255, dtype=torch.uint8)
    views = to_float(images, torch.float32, torch.channels_last, factors[:2])
    torch.testing.assert_close(views, factors[:2, None, None, None].expand_as(views))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_float_reaches_0_to_1(dtype):
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    got = to_float(images, dtype, torch.contiguous_format)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), images.float() / 255, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=0)


def test_color_jitter_leaves_images_alone_with_probability_0_and_keeps_grey_grey():
    images = torch.rand(6, 9, 5, 5, generator=generator(0))
    torch.testing.assert_close(color_jitter(images, 0.4, 0.1, 0.0, generator=generator(1)), images, rtol=1e-3, atol=1e-3)
    grey = 0.4 + 0.2 * torch.rand(6, 3, 1, 5, 5, generator=generator(0)).expand(6, 3, 3, 5, 5)
    out = color_jitter(grey.reshape(6, 9, 5, 5), 0.4, 0.1, 1.0, generator=generator(1)).view(6, 3, 3, 5, 5)
    torch.testing.assert_close(out[:, :, 0], out[:, :, 1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out[:, :, 0], out[:, :, 2], rtol=1e-3, atol=1e-3)
    assert (out - grey).abs().amax((1, 2, 3, 4)).min() > 1e-3  # but brighter or darker, each by its own amount


def test_color_jitter_moves_samples_apart_and_a_stack_together():
    frame = torch.rand(1, 3, 6, 6, generator=generator(0)) / 2 + 0.25
    images = frame.repeat(40, 3, 1, 1)  # stacks of three equal frames
    out = color_jitter(images, 0.4, 0.1, 0.8, generator=generator(3)).view(40, 3, 3, 6, 6)
    torch.testing.assert_close(out[:, 0], out[:, 2])
    moved = (out[:, 0] - frame).abs().amax((1, 2, 3)) > 1e-2
    assert 0.6 < moved.float().mean() < 0.95
    assert out.min() >= 0 and out.max() <= 1
    with pytest.raises(ValueError, match="multiple of 3"):
        color_jitter(torch.rand(2, 4, 5, 5), 0.4, 0.1, 0.8)


def jittered(frames, brightness, contrast, saturation, turns):
    """One operation after the other on (S, 3, H, W), in float64; clamped at the end alone."""

    def luminance(rgb):
        return (0.299 * rgb[:, 0] + 0.587 * rgb[:, 1] + 0.114 * rgb[:, 2])[:, None]

    x = np.float64(frames) * brightness
    x = contrast * x + (1 - contrast) * luminance(x).mean()
    x = saturation * x + (1 - saturation) * luminance(x)
    y = luminance(x)[:, 0]  # hue turns the other two of Y, I and Q
    i, q = (a * x[:, 0] + b * x[:, 1] + c * x[:, 2] for a, b, c in ((0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)))
    cos, sin = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    i, q = cos * i - sin * q, sin * i + cos * q
    rgb = [y + 0.956 * i + 0.619 * q, y - 0.272 * i - 0.647 * q, y - 1.106 * i + 1.703 * q]  # the same standard's way back
    return np.clip(np.stack(rgb, 1), 0, 1)


def expected_jitter(images, config, generator):
    """(B, 3 S, H, W) in 0..1: every sample by what color_jitter draws for it."""
    draw = torch.rand(5, len(images), generator=generator).numpy().astype(np.float64)
    out = []
    for image, (brightness, contrast, saturation, hue, chance) in zip(images, draw.T, strict=True):
        frames = image.reshape(-1, 3, *image.shape[1:])
        factors = (1 + config.jitter * (2 * u - 1) for u in (brightness, contrast, saturation))
        moved = jittered(frames, *factors, config.jitter_hue * (2 * hue - 1)) if chance < config.jitter_probability else frames
        out.append(moved.reshape(image.shape))
    return np.stack(out)


def test_color_jitter_is_four_operations_one_after_the_other():
    config, images = AugmentConfig(), torch.rand(30, 6, 5, 4, generator=generator(0))
    got = color_jitter(images, config.jitter, config.jitter_hue, config.jitter_probability, generator=generator(2))
    want = expected_jitter(images.numpy(), config, generator(2))
    np.testing.assert_allclose(got.numpy(), want, atol=2e-3)  # three digits of the standard's way back
    assert (np.abs(want - images.numpy()).max((1, 2, 3)) > 0.05).sum() > 15


def test_an_rgb_view_is_shifted_and_then_jittered():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 6, 12, 12), np.uint8))
    config, draws = AugmentConfig(), generator(4)
    shifted = random_shift(images, config.shift, copies=2, generator=draws).numpy() / 255
    views = Augment(config, 3, generator(4))(images, 2, torch.float32, torch.contiguous_format)
    np.testing.assert_allclose(views.numpy(), expected_jitter(shifted, config, draws), atol=2e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_views_follow_the_generator(channels):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 2 * channels, 12, 12), np.uint8))
    call = lambda seed: Augment(AugmentConfig(), channels, generator(seed))(images, 2, torch.float32, torch.channels_last)  # noqa: E731
    views = call(0)
    assert views.shape == (10, 2 * channels, 12, 12) and views.dtype == torch.float32
    assert torch.equal(views, call(0)) and not torch.equal(views, call(1)) and not torch.equal(views[:5], views[5:])
