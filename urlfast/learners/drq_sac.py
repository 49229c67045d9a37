"""DrQ for continuous actions: soft actor-critic, its target and its loss averaged over randomly shifted views.

Kostrikov, Yarats, Fergus, "Image Augmentation Is All You Need" (2020), on Haarnoja et al., "Soft Actor-Critic Algorithms and Applications"
(2018); K and M are DrQ's, and values those of the authors' release. B batch, F features, A numbers of an action in -1..1. The caller shifts
and encodes: `online` holds M views of o_t, `target` K pairs of views of o_{t+m} (online, EMA), each (B, F).

    pi:          a = tanh(u),  u ~ N(mu(s), std(s)^2),   log pi(a|s) = log N(u; mu, std) - sum log(1 - tanh^2 u)
    y = r + discount * mean_k [ min_i Q'_i(s'_k, a'_k) - alpha log pi(a'_k|s'_k) ],   a'_k ~ pi(s'_k)
    critic:      sum_m sum_i mean (Q_i(s_m, a) - y)^2               it alone trains the features
    actor:       mean [ alpha log pi(a|s) - min_i Q_i(s, a) ],      a ~ pi(s), s the first view, detached
    alpha:       alpha * mean [ -log pi(a|s) + A ]                  keeps the entropy at -A
"""

import copy
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from urlfast import ema_update_
from urlfast.device import Arithmetic, adam
from urlfast.learners.ddpg import Batch, q_error, target_features
from urlfast.learners.drq import Pairs
from urlfast.limits import check_limits
from urlfast.nets.heads import Actor, TwinQ


@dataclasses.dataclass(frozen=True)
class DrQSACConfig:
    """The learner of actor, critic and temperature: DrQ on SAC."""

    hidden: int = 1024  # width of the two hidden layers [DrQ]
    feature_dim: int = 50  # width of the trunk behind convolutions; actor and critic have one each [DrQ]
    lr: float = 1e-3  # learning rate of Adam: actor, critic and temperature [DrQ]
    adam_eps: float = 1e-8  # added to Adam's denominator [DrQ: torch's own]
    tau: float = 0.01  # EMA rate of the target critic [DrQ]
    actor_every: int = 2  # updates of the critic for one of actor, temperature and target critic [DrQ]
    temperature: float = 0.1  # alpha at first [DrQ]
    log_std: tuple[float, float] = (-10.0, 2.0)  # bounds of the logarithm of the policy's standard deviation [DrQ]

    def __post_init__(self):
        check_limits(
            self, hidden=">= 1", feature_dim=">= 1", lr="> 0", adam_eps="> 0", actor_every=">= 1", temperature="> 0", log_std=">= -20"
        )
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau: must lie in (0, 1], got {self.tau}")
        if not self.log_std[0] < self.log_std[1] <= 20:
            raise ValueError(f"log_std: must be two numbers that increase, up to 20, got {self.log_std}")


def drq_sac_networks(config: DrQSACConfig, num_features: int, action_dim: int, convolutions: bool) -> tuple[Actor, TwinQ]:
    """DrQ's actor and critic. convolutions: the features are the flat output of convolutions, else there is no trunk before the layers."""
    trunk = config.feature_dim if convolutions else 0
    return (
        Actor(num_features, 2 * action_dim, config.hidden, layers=2, trunk=trunk),
        TwinQ(num_features, action_dim, config.hidden, layers=2, trunk=trunk),
    )


def gaussian(outputs: Tensor, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """(mu, log std), each (B, A), of an actor's outputs (B, 2 A); the tanh of the second half lies between the bounds."""
    mu, x = outputs.chunk(2, dim=-1)
    low, high = bounds
    return mu, low + 0.5 * (high - low) * (torch.tanh(x) + 1)


def squashed(mu: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """a = tanh(mu + std * noise) (B, A), and log pi(a) (B,); noise ~ N(0, I).

    From u, not from a: tanh rounds to 1 where atanh has no answer. log(1 - tanh^2 u) = 2 (log 2 - u - softplus(-2u)) has no cancellation.
    """
    u = mu + log_std.exp() * noise
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return torch.tanh(u), (log_normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


def sac_target(q_min: Tensor, log_pi: Tensor, alpha: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
    """y = r + discount * mean_k [ min_i Q'_i - alpha log pi ]; (B,).   q_min, log_pi (K * B,)"""
    return reward + discount * (q_min - alpha * log_pi).view(-1, len(reward)).mean(0)  # discount is 0 after a terminal


class DrQSAC:
    """The learner. `actor` (B, F) -> (B, 2 A), mean and spread before tanh; `critic` (B, F), (B, A) -> (2, B)."""

    def __init__(
        self,
        config: DrQSACConfig,
        actor: nn.Module,
        critic: nn.Module,
        action_dim: int,
        arithmetic: Arithmetic,
        generator: torch.Generator,
        update_generator: torch.Generator,
    ):
        """generator: on the CPU, draws the actions. update_generator: on the device, draws those of updates. Their owner saves both."""
        self.config, self.action_dim, self.arithmetic = config, action_dim, arithmetic
        self.generator, self.update_generator = generator, update_generator
        self.actor, self.critic = actor.to(arithmetic.device), critic.to(arithmetic.device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = torch.tensor(math.log(config.temperature), device=arithmetic.device, requires_grad=True)
        self.actor_parameters, self.critic_parameters = list(self.actor.parameters()), list(self.critic.parameters())
        self.actor_optim, self.critic_optim, self.log_alpha_optim = (
            adam(parameters, config.lr, config.adam_eps, arithmetic.device)
            for parameters in (self.actor_parameters, self.critic_parameters, [self.log_alpha])
        )
        self.updates = 0
        self.whole = True  # the coming update is of the actor, the temperature and the target too

    def exploration(self, steps: int) -> float:
        """The `explore` of acting: always the whole policy."""
        return 1.0

    def prepare(self, steps: int) -> bool:
        """Before each update: whether it is whole, as one of `actor_every` is, or of the critic alone."""
        self.whole = self.updates % self.config.actor_every == 0
        self.updates += 1
        return self.whole

    @torch.no_grad()
    def act(self, features: Tensor, state: None = None, explore: float = 0.0) -> tuple[np.ndarray, None]:
        """tanh(mu), or where it explores (> 0) a draw from the policy; float32 (N, A)."""
        mu, log_std = gaussian(self.actor(features).cpu(), self.config.log_std)  # in float32, as DDPG
        if explore > 0:
            mu = mu + log_std.exp() * torch.randn(mu.shape, generator=self.generator)
        return torch.tanh(mu).numpy(), None

    def uniform(self, n: int) -> Tensor:
        return 2 * torch.rand(n, self.action_dim, generator=self.generator) - 1

    def update(self, batch: Batch, reward: Tensor, online: Sequence[Tensor], target: Pairs) -> tuple[dict[str, Tensor], Tensor]:
        """A gradient step of the critic on `reward` (B,): the task's, or a method's; and, where `prepare` said so, of all the rest.

        The gradient of the critic's loss stays on `online`, for whoever encoded it.
        """
        with torch.no_grad(), self.arithmetic.autocast():
            features, features_ema = target_features(target)
            next_action, log_pi = self.draw(features)
            q_min = self.critic_target(features_ema, next_action).amin(0)
            y = sac_target(q_min, log_pi, self.log_alpha.exp(), reward, batch.discount)

        with self.arithmetic.autocast():
            error = q_error(self.critic, online, batch.action, y)
        critic_loss = error.square().mean(-1).sum()
        self.critic_optim.zero_grad()
        critic_loss.backward()
        self.critic_optim.step()
        metrics = {
            "critic_loss": critic_loss.detach(),
            "q_target": y.mean(),
            "entropy": -log_pi.mean(),
            "alpha": self.log_alpha.detach().exp(),
        }

        if self.whole:
            metrics |= self.update_actor(online[0].detach())  # else the actor would bend the encoder to please itself
            ema_update_(list(self.critic_target.parameters()), self.critic_parameters, self.config.tau)
        return metrics, error.detach().abs().mean((0, 1))

    def update_actor(self, features: Tensor) -> dict[str, Tensor]:
        """A step of the actor and of the temperature."""
        with self.arithmetic.autocast():
            action, log_pi = self.draw(features)
            q_min = self.critic(features, action).amin(0)
        alpha = self.log_alpha.exp()
        actor_loss = (alpha.detach() * log_pi - q_min).mean()
        self.actor_optim.zero_grad()
        actor_loss.backward(inputs=self.actor_parameters)  # the critic's weights get no gradient, and none is computed
        self.actor_optim.step()

        alpha_loss = alpha * (self.action_dim - log_pi.detach()).mean()
        self.log_alpha_optim.zero_grad()
        alpha_loss.backward()
        self.log_alpha_optim.step()
        return {"actor_loss": actor_loss.detach()}

    def draw(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """An action of the policy for each row, and its log pi."""
        mu, log_std = gaussian(self.actor(features), self.config.log_std)
        noise = torch.randn(mu.shape, generator=self.update_generator, device=mu.device)
        return squashed(mu, log_std, noise)

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {
            "actor": self.actor,
            "actor_optimizer": self.actor_optim,
            "critic": self.critic,
            "critic_target": self.critic_target,
            "critic_optimizer": self.critic_optim,
            "log_alpha_optimizer": self.log_alpha_optim,
        }

    def state_dict(self) -> dict[str, dict]:
        """By parts; the count of updates, which says when the next whole one is due, goes with log_alpha."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        return state | {"log_alpha": {"log_alpha": self.log_alpha.detach().clone(), "updates": self.updates}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, dict]) -> None:
        """The parts that `state` names."""
        parts = self.parts()
        for name, values in state.items():
            if name == "log_alpha":
                self.log_alpha.copy_(values["log_alpha"])
                self.updates = values["updates"]
            else:
                parts[name].load_state_dict(values)
