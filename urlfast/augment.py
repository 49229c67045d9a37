"""Image augmentation per sample, on the device of the images: random shift, intensity, colour jitter.

Shifts work on uint8 and move whole pixels, so they lose nothing. The pass that scales the intensity also brings 0..255 to 0..1.
"""

import dataclasses
import functools

import torch
from torch import Tensor

from urlfast.limits import check_limits


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random views of the images that are learned from."""

    shift: int = 4  # pixels to each side, edges replicated (DrQ)
    intensity: float = 0.05  # grey frames: scale of the brightness noise (Dopamine's DrQ-Atari)
    jitter: float = 0.4  # RGB frames: strength of brightness, contrast and saturation; APT names colour jitter, not its strength
    jitter_hue: float = 0.1  # RGB frames: hue, in turns of the colour circle
    jitter_probability: float = 0.8  # RGB frames: share of samples that are jittered

    def __post_init__(self):
        check_limits(self, shift=">= 0", intensity="0..0.5", jitter="0..1", jitter_hue="0..0.5", jitter_probability="0..1")


def random_shift(
    images: Tensor,
    pad: int,
    *,
    copies: int = 1,
    generator: torch.Generator | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Each image moved by its own whole number of pixels, -pad..pad on each axis, uniformly; the edge is replicated.

    images: (B, C, H, W) of any dtype, on any device.
    Returns (copies * B, C, H, W): `copies` independent shifts, row m * B + b from image b. On a CPU they lie in memory_format.
    """
    B, C, H, W = images.shape
    offset = torch.randint(0, 2 * pad + 1, (2, copies * B), generator=generator, device=images.device)
    if images.device.type == "cpu":  # slices of a padded copy: 12x faster than the gather below on a CPU
        source = padded(images, pad, memory_format).numpy()
        shifted = torch.empty((copies * B, C, H, W), dtype=images.dtype, memory_format=memory_format)
        rows = shifted.numpy()
        for row, (y, x) in enumerate(offset.T.tolist()):
            rows[row] = source[row % B, :, y : y + H, x : x + W]
        return shifted
    y = (torch.arange(H, device=images.device) + offset[0, :, None] - pad).clamp_(0, H - 1)  # (copies * B, H)
    x = (torch.arange(W, device=images.device) + offset[1, :, None] - pad).clamp_(0, W - 1)
    b = torch.arange(B, device=images.device).repeat(copies)
    c = torch.arange(C, device=images.device)
    return images[b[:, None, None, None], c[None, :, None, None], y[:, None, :, None], x[:, None, None, :]]


def padded(images: Tensor, pad: int, memory_format: torch.memory_format) -> Tensor:
    """(B, C, H, W) on the CPU -> (B, C, H + 2 pad, W + 2 pad) in memory_format, the edge replicated."""
    B, C, H, W = images.shape
    out = torch.empty((B, C, H + 2 * pad, W + 2 * pad), dtype=images.dtype, memory_format=memory_format)
    target, source = out.numpy(), images.numpy()
    for c in range(C):  # plane by plane: twice as fast into interleaved channels as one copy of all
        target[:, c, pad : pad + H, pad : pad + W] = source[:, c]
    if pad:
        target[..., pad : pad + H, :pad] = target[..., pad : pad + H, pad : pad + 1]
        target[..., pad : pad + H, -pad:] = target[..., pad : pad + H, -pad - 1 : -pad]
        target[..., :pad, :] = target[..., pad : pad + 1, :]
        target[..., -pad:, :] = target[..., -pad - 1 : -pad, :]
    return out


def intensity_factors(n: int, scale: float, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """(n,) factors 1 + scale * clip(N(0, 1), -2, 2): one for a whole stack of frames, so that motion stays readable."""
    return torch.randn(n, generator=generator, device=device).clamp_(-2, 2).mul_(scale).add_(1)


# RGB <-> YIQ: a hue change is a rotation of the (I, Q) plane, so it is one matrix together with brightness, contrast and saturation.
@functools.cache
def _yiq(device: torch.device) -> tuple[Tensor, Tensor]:
    """The matrix and its inverse, copied to the device once."""
    yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    return yiq.to(device), torch.linalg.inv(yiq).to(device)


def color_jitter(images: Tensor, strength: float, hue: float, probability: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Brightness, contrast, saturation (factors in 1 +- strength) and hue (+- hue turns); one draw for a sample's whole stack of frames.

    images: (B, 3 S, H, W) floating, in 0..1, S stacked RGB frames. Returns the same shape and dtype, clamped to 0..1.
    All four are one affine map of the colours, in a fixed order and clamped once at the end; torchvision shuffles and clamps after each.
    """
    B, channels, H, W = images.shape
    if channels % 3:
        raise ValueError(f"images: must have a multiple of 3 channels (stacked RGB frames), got {tuple(images.shape)}")
    device = images.device
    draw = torch.rand(5, B, generator=generator, device=device)
    applied = (draw[4] < probability).float()
    brightness, contrast, saturation = 1 + applied * strength * (2 * draw[:3] - 1)  # each (B,)
    angle = applied * hue * (2 * draw[3] - 1) * (2 * torch.pi)
    yiq, rgb = _yiq(device)
    # Saturation scales I and Q, hue rotates them, brightness and contrast scale everything; contrast then pulls towards the mean grey.
    turn = torch.zeros(B, 3, 3, device=device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * angle.cos()
    turn[:, 1, 2] = -saturation * angle.sin()
    turn[:, 2, 1] = saturation * angle.sin()
    matrix = (brightness * contrast)[:, None, None] * (rgb @ turn @ yiq)  # (B, 3, 3)
    frames = images.reshape(B, channels // 3, 3, H * W).float()
    grey = torch.einsum("c,bscp->bp", yiq[0], frames).mean(-1) / (channels // 3)  # (B,) mean luminance
    offset = (1 - contrast) * brightness * grey
    mixed = torch.einsum("bij,bsjp->bsip", matrix, frames) + offset[:, None, None, None]
    return mixed.clamp_(0, 1).reshape(images.shape).to(images.dtype)


class Augment:
    """uint8 stacks of frames -> augmented views in the networks' dtype, 0..1. Every draw comes from `generator`."""

    def __init__(self, config: AugmentConfig, frame_channels: int, generator: torch.Generator):
        self.config, self.rgb, self.generator = config, frame_channels == 3, generator

    def __call__(self, images: Tensor, copies: int, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
        """images: (B, C, H, W) uint8. Returns (copies * B, C, H, W): view m of image b in row m * B + b."""
        config = self.config
        shifted = random_shift(images, config.shift, copies=copies, generator=self.generator, memory_format=memory_format)
        if not (config.jitter or config.jitter_hue if self.rgb else config.intensity):
            return to_float(shifted, dtype, memory_format)
        if self.rgb:
            views = to_float(shifted, dtype, memory_format)
            return color_jitter(views, config.jitter, config.jitter_hue, config.jitter_probability, generator=self.generator)
        factors = intensity_factors(len(shifted), config.intensity, generator=self.generator, device=images.device)
        return to_float(shifted, dtype, memory_format, factors)


def to_float(images: Tensor, dtype: torch.dtype, memory_format: torch.memory_format, factors: Tensor | None = None) -> Tensor:
    """uint8 images as dtype in 0..1, each times its factor (B,)."""
    scale = 1 / 255 if factors is None else (factors / 255).to(dtype)[:, None, None, None]
    return images.to(dtype, memory_format=memory_format).mul_(scale)  # 0..255 are exact in bfloat16
