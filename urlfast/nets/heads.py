"""Small heads on features: dueling Q, actor and twin critic of continuous control, contrastive projection."""

import itertools

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


class Dense(nn.Linear):
    """A linear layer, orthogonal and without bias at first, that stays in float32 under autocast where it has few weights.

    Those layers cost next to nothing and are where rounding hurts: they read observations, or their outputs are actions and values.
    """

    FEW = 2**18  # 256 inputs of a layer 1024 wide. The trunk on 39200 features has more, and halves its time in bfloat16.

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.numel() >= self.FEW:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Tanh(torch.autograd.Function):
    """tanh as 2 sigmoid(2x) - 1, which differs in rounding: torch's own takes three to four times as long on a CPU."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = (x + x).sigmoid_().mul_(2).sub_(1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return torch.ops.aten.tanh_backward(gradient, *ctx.saved_tensors)


class Trunk(nn.Module):
    """Linear, LayerNorm, tanh: features of any number and scale -> (B, width) float32 in -1..1."""

    def __init__(self, num_features: int, width: int):
        super().__init__()
        self.linear, self.norm = Dense(num_features, width), nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        h = self.norm(self.linear(features).float())
        return Tanh.apply(h) if h.device.type == "cpu" else torch.tanh(h)


class MLP(nn.Sequential):
    """`layers` hidden layers with ReLU, then a linear one: (B, num_inputs) -> (B, outputs) float32."""

    def __init__(self, num_inputs: int, hidden: int, layers: int, outputs: int):
        widths = [num_inputs] + [hidden] * layers
        modules: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            modules += [Dense(before, after), nn.ReLU(inplace=True)]
        super().__init__(*modules, Dense(widths[-1], outputs))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class Actor(nn.Module):
    """What a policy is made of, for each action or two of them: (B, F) -> (B, outputs) float32, unbounded."""

    def __init__(self, num_features: int, outputs: int, hidden: int, layers: int, trunk: int = 0):
        """trunk: width of the trunk before the hidden layers; 0: they read the features."""
        super().__init__()
        self.trunk = Trunk(num_features, trunk) if trunk else nn.Identity()
        self.mlp = MLP(trunk or num_features, hidden, layers, outputs)

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp(self.trunk(features))


class Twin(nn.Module):
    """Two networks of (features, action) on one trunk: (B, F), (B, A) -> (2, B, outputs) float32.

    Each has its own matrices: one matrix for both, or a batched product, was not faster on a CPU (batch and hidden 1024, either precision).
    """

    def __init__(
        self,
        num_features: int,
        action_dim: int,
        hidden: int,
        layers: int,
        trunk: int = 0,
        action_in_trunk: bool = False,
        outputs: int = 1,
    ):
        """trunk: as of an Actor. action_in_trunk: the action enters the trunk beside the features, else it joins behind it."""
        super().__init__()
        if action_in_trunk and not trunk:
            raise ValueError("action_in_trunk: there is no trunk, got trunk=0")
        self.action_in_trunk = action_in_trunk
        self.trunk = Trunk(num_features + action_in_trunk * action_dim, trunk) if trunk else nn.Identity()
        num_inputs = (trunk or num_features) + (not action_in_trunk) * action_dim
        self.first, self.second = (MLP(num_inputs, hidden, layers, outputs) for _ in range(2))

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        if self.action_in_trunk:
            h = self.trunk(torch.cat([features, action], -1))
        else:
            h = torch.cat([self.trunk(features), action], -1)
        return torch.stack([self.first(h), self.second(h)])


class TwinQ(Twin):
    """Q1 and Q2: (B, F), (B, A) -> (2, B) float32. A critic with other values of its own keeps this face."""

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        return super().forward(features, action).squeeze(-1)
