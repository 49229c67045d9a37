"""DrQ for discrete actions: Q-learning averaged over randomly shifted views.

Kostrikov, Yarats, Fergus, "Image Augmentation Is All You Need" (2020); equation numbers, K and M are the paper's. Dueling heads, double Q,
n-step returns as in its Atari agent; values of the table from Dopamine's atari_100k re-implementation where the authors released no code.
B batch, F features, A actions. The caller shifts and encodes: `online` holds M views of o_t, `target` K pairs of views of o_{t+m}
(online, EMA), each (B, F).
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from urlfast import ema_update_
from urlfast.device import Arithmetic, adam
from urlfast.limits import check_limits
from urlfast.losses import huber


@dataclasses.dataclass(frozen=True)
class DrQConfig:
    """The learner of Q: DrQ with dueling heads."""

    hidden: int = 512  # width of the hidden layer of each dueling stream [mini_apt; Dopamine shares one layer of 512]
    lr: float = 1e-4  # learning rate of Adam [Dopamine, mini_apt]
    adam_eps: float = 1.5e-4  # added to Adam's denominator: the larger, the gentler where gradients are small [Dopamine]
    tau: float = 1.0  # EMA rate of the target; 1: the target is the online network, as Dopamine's copy after every update
    grad_clip: float = 10.0  # limit of the gradient's norm [mini_apt]
    epsilon: float = 0.1  # probability of a uniform action at last [Dopamine; DrQ(eps) 0.01]
    epsilon_decay: int = 5000  # agent steps from 1 to there, after learning_start [Dopamine]

    def __post_init__(self):
        check_limits(self, hidden=">= 1", lr="> 0", adam_eps="> 0", grad_clip="> 0", epsilon="0..1", epsilon_decay=">= 0")
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau: must lie in (0, 1], got {self.tau}")


class Batch(Protocol):
    action: Tensor  # (B,) int64, taken in o_t
    discount: Tensor  # (B,) gamma^m * prod(1 - terminated)


Pairs = Sequence[tuple[Tensor, Tensor]]


def drq_target(q: nn.Module, q_target: nn.Module, target: Pairs, reward: Tensor, discount: Tensor) -> Tensor:
    """Eq. 1 with the double-Q action: y = r + discount * mean_k Q'(s'_k, argmax_a Q(s'_k, a)); (B,)."""
    values = q(torch.cat([features for features, _ in target]))  # (K * B, A)
    same = q_target is q and all(features is features_ema for features, features_ema in target)  # tau 1: one pass serves both
    values_target = values if same else q_target(torch.cat([features for _, features in target]))
    value = values_target.gather(-1, values.argmax(-1, keepdim=True))
    return reward + discount * value.view(len(target), -1).mean(0)  # discount is 0 after a terminal


def q_error(q: nn.Module, online: Sequence[Tensor], action: Tensor, y: Tensor) -> Tensor:
    """Eq. 3's Q(s_m, a) - y for each view m; (M, B)."""
    values = q(torch.cat(list(online))).gather(-1, action.repeat(len(online))[:, None])
    return values.view(len(online), -1) - y


class DrQ:
    """The learner; `q` is its network, (B, F) -> (B, num_actions)."""

    def __init__(self, config: DrQConfig, q: nn.Module, num_actions: int, arithmetic: Arithmetic, generator: torch.Generator):
        """generator: on the CPU, draws the random actions."""
        self.config, self.num_actions, self.arithmetic, self.generator = config, num_actions, arithmetic, generator
        self.q = q.to(arithmetic.device)
        self.q_target = self.q if config.tau == 1 else copy.deepcopy(self.q).requires_grad_(False)
        self.parameters = list(self.q.parameters())
        self.optim = adam(self.parameters, config.lr, config.adam_eps, arithmetic.device)

    def exploration(self, steps: int) -> float:
        """Probability of a uniform action `steps` agent steps after learning began: from 1 linear to epsilon, and there it stays."""
        c = self.config
        done = min(steps / c.epsilon_decay, 1.0) if c.epsilon_decay else 1.0
        return 1.0 + done * (c.epsilon - 1.0)

    @torch.no_grad()
    def act(self, features: Tensor, state: None = None, explore: float = 0.0) -> tuple[np.ndarray, None]:
        """Greedy in Q, but uniform with probability `explore`; int64 (N,)."""
        with self.arithmetic.autocast():
            action = self.q(features).argmax(-1).cpu()
        if explore > 0:
            at_random = torch.rand(len(action), generator=self.generator) < explore
            action = torch.where(at_random, self.uniform(len(action)), action)
        return action.numpy(), None

    def uniform(self, n: int) -> Tensor:
        return torch.randint(self.num_actions, (n,), generator=self.generator)  # 0 .. A-1: the last action too

    def prepare(self, steps: int) -> bool:
        """Every update is whole, and none depends on the steps."""
        return True

    def update(self, batch: Batch, reward: Tensor, online: Sequence[Tensor], target: Pairs) -> tuple[dict[str, Tensor], Tensor]:
        """One gradient step on `reward` (B,): the task's, or a method's. Its gradient stays on `online`, for whoever encoded it."""
        error, y = self.error(batch, reward, online, target)
        loss = huber(error).mean()
        self.optim.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        self.optim.step()
        if self.q_target is not self.q:
            ema_update_(list(self.q_target.parameters()), self.parameters, self.config.tau)
        metrics = {"q_loss": loss.detach(), "q_target": y.mean(), "grad_norm": grad_norm}  # only the logger waits for them
        return metrics, error.detach().abs().view(len(online), len(reward), -1).mean((0, 2))

    def error(self, batch: Batch, reward: Tensor, online: Sequence[Tensor], target: Pairs) -> tuple[Tensor, Tensor]:
        """Q(s_m, a) - y for each view, (M, B), and y."""
        with torch.no_grad(), self.arithmetic.autocast():
            y = drq_target(self.q, self.q_target, target, reward, batch.discount)
        with self.arithmetic.autocast():
            return q_error(self.q, online, batch.action, y), y

    def state_dict(self) -> dict[str, dict]:
        parts = {"q": self.q.state_dict(), "q_optimizer": self.optim.state_dict()}
        if self.q_target is not self.q:
            parts["q_target"] = self.q_target.state_dict()
        return parts

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """The parts that `state` names."""
        for part, values in state.items():
            if part == "q_target" and self.q_target is self.q:
                continue  # tau 1: the target is the online network
            {"q": self.q, "q_target": self.q_target, "q_optimizer": self.optim}[part].load_state_dict(values)
