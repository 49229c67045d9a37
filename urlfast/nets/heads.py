"""Small heads on features: dueling Q, contrastive projection."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dueling(value: Tensor, advantage: Tensor) -> Tensor:
    """Q = V + A - mean_a A.   value (B, 1), advantage (B, A)"""
    return value + advantage - advantage.mean(-1, keepdim=True)


class DuelingQ(nn.Module):
    """Q(features, .): (B, F) float32 -> (B, A) float32, each stream with a hidden layer of its own.

    The two hidden layers read the same features, so they are one matrix. The last layers stay in float32 under autocast: bfloat16 knows
    values near 10 to 0.06 only, which is more than the gap between two actions.
    """

    def __init__(self, num_features: int, num_actions: int, hidden: int):
        super().__init__()
        self.hidden = nn.Linear(num_features, 2 * hidden)
        self.value = nn.Linear(hidden, 1)
        self.advantage = nn.Linear(hidden, num_actions)
        for layer in (self.hidden, self.value, self.advantage):
            nn.init.orthogonal_(layer.weight, gain=2**0.5 if layer is self.hidden else 1.0)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        h_value, h_advantage = F.relu(self.hidden(features)).float().chunk(2, dim=-1)
        with torch.autocast(features.device.type, enabled=False):
            return dueling(self.value(h_value), self.advantage(h_advantage))


class Projection(nn.Sequential):
    """h: features -> the space of the contrastive loss. widths (w1, ..., P): linear layers with ELU between them."""

    def __init__(self, num_features: int, widths: tuple[int, ...]):
        if not widths:
            raise ValueError("projection: must have at least one layer")
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.ELU(), nn.Linear(num_features, width)]
            num_features = width
        super().__init__(*layers[1:])
