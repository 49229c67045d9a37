"""Convolutional encoders of stacked frames, from one description."""

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from urlfast.limits import check_limits

ATARI_CONV = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # of the Nature DQN, as DrQ and APT take it for 84x84 frames
DMC_CONV = ((32, 3, 2), (32, 3, 1), (32, 3, 1), (32, 3, 1))  # of DrQ and DrQ-v2 for 84x84 images of control tasks


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The network from images to features: convolutions without padding."""

    conv: tuple[tuple[int, int, int], ...] = ATARI_CONV  # channels, kernel, stride of each layer, no padding
    mean: float = 0.0  # subtracted from the images, which lie in 0..1 [DrQ-v2, urlb 0.5]
    activation: Literal["relu", "elu"] = "relu"  # after each convolution
    features: int = 0  # width of the linear layer, LayerNorm and tanh behind the convolutions; 0: their flat output is the feature
    spectral_norm: bool = False  # weights divided by their largest singular value

    def __post_init__(self):
        check_limits(self, conv=">= 1", mean="0..1", features=">= 0")


class SpectralNorm(nn.Module):
    """W / sigma(W), as a parametrisation (Miyato et al. 2018); sigma of the weight as an (outputs, rest) matrix, by power iteration.

    One iteration a forward pass in training mode, none in evaluation mode: a target's or an acting pass changes nothing.
    """

    def __init__(self, weight: Tensor, iterations: int = 15):
        super().__init__()
        matrix = weight.detach().flatten(1)
        self.register_buffer("u", F.normalize(torch.randn(matrix.shape[0], device=matrix.device), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(matrix.shape[1], device=matrix.device), dim=0))
        for _ in range(iterations):
            self.iterate(matrix)

    @torch.no_grad()
    def iterate(self, matrix: Tensor) -> None:
        self.v.copy_(F.normalize(matrix.T.mv(self.u), dim=0))
        self.u.copy_(F.normalize(matrix.mv(self.v), dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1)
            if self.training:
                self.iterate(matrix)
            # Clones: the next iteration writes into u and v, which the backward pass of this one still needs.
            return weight / matrix.mv(self.v.clone()).dot(self.u.clone())


class Encoder(nn.Module):
    """f: (B, C, H, W) in 0..1, of any floating dtype -> (B, num_features): float32, but the convolutions' flat output is in their dtype."""

    def __init__(self, config: EncoderConfig, observation_shape: tuple[int, ...]):
        """Raises ValueError where the images are too small for the convolutions."""
        super().__init__()
        if len(observation_shape) != 3:
            raise ValueError(f"observation_shape: must be (channels, height, width), got {tuple(observation_shape)}")
        if not config.conv:
            raise ValueError("conv: must have at least one layer")
        channels, *size = observation_shape
        layers = []
        for outputs, kernel, stride in config.conv:
            layers.append(nn.Conv2d(channels, outputs, kernel, stride))
            size = [(side - kernel) // stride + 1 for side in size]
            if min(size) < 1:
                raise ValueError(
                    f"observation_shape: images of {tuple(observation_shape[1:])} are too small for the convolutions {config.conv}"
                )
            channels = outputs
        self.conv = nn.ModuleList(layers)
        self.mean = config.mean
        self.activation = {"relu": F.relu, "elu": F.elu}[config.activation]
        flat = channels * size[0] * size[1]
        self.linear = nn.Linear(flat, config.features) if config.features else None
        self.norm = nn.LayerNorm(config.features) if config.features else None
        self.num_features = config.features or flat
        for layer in [*self.conv, *([self.linear] if self.linear else [])]:
            nn.init.orthogonal_(layer.weight, gain=2**0.5 if isinstance(layer, nn.Conv2d) else 1.0)
            nn.init.zeros_(layer.bias)
            if config.spectral_norm:
                parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight))

    def forward(self, images: Tensor) -> Tensor:
        return self.after_first(self.conv[0](images - self.mean if self.mean else images))

    def takes_blocks(self, height: int, width: int) -> bool:
        """Whether `of_blocks` can stand for the forward pass on images of this size."""
        layer = self.conv[0]
        return not self.mean and not any(n % BLOCK for n in (height, width, layer.kernel_size[0], layer.stride[0]))

    def of_blocks(self, blocked: Tensor) -> Tensor:
        """The forward pass on images as `blocks` lays them out, (B, H / 4, W / 4, C * 16), and in 0..255."""
        layer = self.conv[0]
        outputs, channels, kernel, _ = layer.weight.shape
        weight = layer.weight.view(outputs, channels, kernel // BLOCK, BLOCK, kernel // BLOCK, BLOCK).permute(0, 1, 3, 5, 2, 4)
        weight = (weight / 255).reshape(outputs, channels * BLOCK**2, kernel // BLOCK, kernel // BLOCK)
        return self.after_first(F.conv2d(blocked.permute(0, 3, 1, 2), weight, layer.bias, layer.stride[0] // BLOCK))

    def after_first(self, h: Tensor) -> Tensor:
        """Of the first convolution's result."""
        h = self.activation(h, inplace=True)
        for layer in self.conv[1:]:
            h = self.activation(layer(h), inplace=True)
        if h.requires_grad and h.is_contiguous(memory_format=torch.channels_last):
            h.register_hook(channels_last)  # flatten's gradient lies otherwise, and an activation's backward is slow on two layouts
        h = h.flatten(1)
        if self.linear is None:
            return h
        with torch.autocast(h.device.type, enabled=False):
            return torch.tanh(self.norm(self.linear(h.float())))


BLOCK = 4  # side of the squares of pixels that `blocks` makes channels of


def blocks(frames: Tensor, depth: int) -> Tensor:
    """Stacks of frames for `Encoder.of_blocks`, (B, L + depth - 1, C, H, W) uint8 -> (B, L, H / 4, W / 4, depth * C * 16) uint8.

    Row t's stack is of the frames t .. t + depth - 1, oldest first, and each square of 4 x 4 pixels lies together, so that a stack is put
    together by copying 16 bytes at a time: 7x faster than stacking pixels as the channels that they are.
    """
    B, n, C, H, W = frames.shape
    squares = frames.reshape(B, n, C, H // BLOCK, BLOCK, W).view(torch.int32)  # four pixels of a line
    squares = squares.permute(0, 1, 3, 5, 2, 4).contiguous().view(torch.complex128).squeeze(-1)  # (B, n, H / 4, W / 4, C)
    return squares.unfold(1, depth, 1).transpose(-2, -1).contiguous().view(torch.uint8).flatten(-2)


def channels_last(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)


class States(nn.Module):
    """Observations that are vectors already: (B, F) -> (B, F)."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, states: Tensor) -> Tensor:
        return states


@torch.no_grad()
def copy_buffers(target: nn.Module, source: nn.Module) -> None:
    """What `ema_update_` of the parameters leaves to the caller: the vectors of the spectral norms."""
    buffers = list(source.buffers())
    if buffers:
        torch._foreach_copy_(list(target.buffers()), buffers)
