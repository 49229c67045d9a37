"""DDPG with n-step returns and twin critics: the learner of DrQ-v2 and of URLB's baselines.

Lillicrap et al., "Continuous control with deep reinforcement learning" (2015), as in Yarats et al., "Mastering Visual Continuous Control"
(DrQ-v2, 2021), and in Laskin et al., "URLB: Unsupervised Reinforcement Learning Benchmark" (2021).
B batch, F features, A numbers of an action in -1..1. The caller encodes: `online` holds M views of o_t, `target` K pairs of views of
o_{t+m} (online, EMA), each (B, F); the papers have M = K = 1, and no EMA encoder.

    y = r + discount * min_i Q'_i(s', a'),   a' = mu(s') + clip(e, -c, c),  e ~ N(0, sigma^2)
    critic:   sum_i mean (Q_i(s, a) - y)^2                             it alone trains the features
    actor:   -mean min_i Q_i(s, mu(s) + clip(e, -c, c)),  s detached
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
from urlfast.learners.drq import Pairs
from urlfast.limits import check_limits
from urlfast.nets.heads import Actor, TwinQ


@dataclasses.dataclass(frozen=True)
class DDPGConfig:
    """The learner of actor and critic: DDPG, with the values of URLB."""

    hidden: int = 1024  # width of the hidden layers, and of the trunk of states [URLB, DrQ-v2]
    feature_dim: int = 50  # width of the trunk behind convolutions [URLB, DrQ-v2; its humanoid 100]
    lr: float = 1e-4  # learning rate of Adam, actor and critic [URLB, DrQ-v2; its humanoid 8e-5]
    adam_eps: float = 1e-8  # added to Adam's denominator [URLB, DrQ-v2: torch's own]
    tau: float = 0.01  # EMA rate of the target critic, at every update [URLB, DrQ-v2]
    sigma: float = 0.2  # standard deviation of the noise on actions at first [URLB 0.2 throughout; DrQ-v2 1.0]
    sigma_final: float = 0.2  # and at last [URLB 0.2; DrQ-v2 0.1]
    sigma_steps: int = 0  # agent steps from the one to the other, after learning_start [DrQ-v2 100,000, 500,000 or 2,000,000 by difficulty]
    sigma_clip: float = 0.3  # limit of the noise in an update; acting has none [URLB, DrQ-v2]

    def __post_init__(self):
        check_limits(
            self,
            hidden=">= 1",
            feature_dim=">= 1",
            lr="> 0",
            adam_eps="> 0",
            sigma=">= 0",
            sigma_final=">= 0",
            sigma_steps=">= 0",
            sigma_clip="> 0",
        )
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau: must lie in (0, 1], got {self.tau}")


def ddpg_networks(config: DDPGConfig, num_features: int, action_dim: int, convolutions: bool) -> tuple[Actor, TwinQ]:
    """URLB's actor and critic. convolutions: the features are the flat output of convolutions, else states or other small features."""
    trunk, layers = (config.feature_dim, 2) if convolutions else (config.hidden, 1)
    actor = Actor(num_features, action_dim, config.hidden, layers, trunk)
    return actor, TwinQ(num_features, action_dim, config.hidden, layers, trunk, action_in_trunk=not convolutions)


class Batch(Protocol):
    action: Tensor  # (B, A) float32, taken in o_t
    discount: Tensor  # (B,) gamma^m * prod(1 - terminated)


LIMIT = 1 - 1e-6  # of an action's numbers


def noise_scale(config: DDPGConfig, steps: int) -> float:
    """sigma after `steps` agent steps, linear and then constant."""
    done = min(steps / config.sigma_steps, 1.0) if config.sigma_steps else 1.0
    return config.sigma + done * (config.sigma_final - config.sigma)


def bounded(action: Tensor) -> Tensor:
    """Clipped to the limits, the gradient passing as if it were not: at the limit an actor still hears which way to go."""
    return action + (action.clamp(-LIMIT, LIMIT) - action).detach()


def smoothed(mean: Tensor, noise: Tensor, clip: float) -> Tensor:
    """The action of an update: mean + clip(noise, -clip, clip), within the limits."""
    return bounded(mean + noise.clamp(-clip, clip))


def joined(views: Sequence[Tensor]) -> Tensor:
    """(views * B, F); one view is not copied."""
    return views[0] if len(views) == 1 else torch.cat(list(views))


def target_features(target: Pairs) -> tuple[Tensor, Tensor]:
    """All K views as rows: (K * B, F) for the actor, and for the target critic; the same tensor where the encoder has no EMA copy."""
    features = joined([online for online, _ in target])
    same = all(online is ema for online, ema in target)
    return features, features if same else joined([ema for _, ema in target])


def ddpg_target(q_min: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
    """y = r + discount * mean_k min_i Q'_i(s'_k, a'_k); (B,).   q_min (K * B,)"""
    return reward + discount * q_min.view(-1, len(reward)).mean(0)  # discount is 0 after a terminal


def q_error(critic: nn.Module, online: Sequence[Tensor], action: Tensor, y: Tensor) -> Tensor:
    """Q_i(s_m, a) - y for both critics and each view; (2, M, B)."""
    values = critic(joined(online), action.repeat(len(online), 1))
    return values.view(2, len(online), -1) - y


class DDPG:
    """The learner. `actor` (B, F) -> (B, A), whose tanh is the mean action; `critic` (B, F), (B, A) -> (2, B)."""

    def __init__(
        self,
        config: DDPGConfig,
        actor: nn.Module,
        critic: nn.Module,
        action_dim: int,
        arithmetic: Arithmetic,
        generator: torch.Generator,
        update_generator: torch.Generator,
    ):
        """generator: on the CPU, draws the actions. update_generator: on the device, draws the noise of updates. Their owner saves both."""
        self.config, self.action_dim, self.arithmetic = config, action_dim, arithmetic
        self.generator, self.update_generator = generator, update_generator
        self.actor, self.critic = actor.to(arithmetic.device), critic.to(arithmetic.device)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_parameters, self.critic_parameters = list(self.actor.parameters()), list(self.critic.parameters())
        self.actor_optim = adam(self.actor_parameters, config.lr, config.adam_eps, arithmetic.device)
        self.critic_optim = adam(self.critic_parameters, config.lr, config.adam_eps, arithmetic.device)
        self.sigma = torch.tensor(noise_scale(config, 0), device=arithmetic.device)  # on the device: a captured update reads it anew

    def exploration(self, steps: int) -> float:
        """The standard deviation of the noise on actions, `steps` agent steps after learning began."""
        return noise_scale(self.config, steps)

    def prepare(self, steps: int) -> bool:
        """Before each update: the noise as after `steps` agent steps. Every update is whole."""
        self.set_noise(noise_scale(self.config, steps))
        return True

    def set_noise(self, sigma: float) -> None:
        self.sigma.fill_(sigma)

    @torch.no_grad()
    def act(self, features: Tensor, state: None = None, explore: float = 0.0) -> tuple[np.ndarray, None]:
        """The mean action, with noise of standard deviation `explore`; float32 (N, A)."""
        action = torch.tanh(self.actor(features)).cpu()  # in float32: for few rows, converting the weights takes longer than it saves
        if explore > 0:
            action = action + explore * torch.randn(action.shape, generator=self.generator)
        return action.clamp(-LIMIT, LIMIT).numpy(), None

    def uniform(self, n: int) -> Tensor:
        return 2 * torch.rand(n, self.action_dim, generator=self.generator) - 1

    def update(self, batch: Batch, reward: Tensor, online: Sequence[Tensor], target: Pairs) -> tuple[dict[str, Tensor], Tensor]:
        """A gradient step of the critic, then of the actor, on `reward` (B,): the task's, or a method's.

        The gradient of the critic's loss stays on `online`, for whoever encoded it.
        """
        with torch.no_grad(), self.arithmetic.autocast():
            features, features_ema = target_features(target)
            next_action = self.noisy(torch.tanh(self.actor(features)))
            y = ddpg_target(self.critic_target(features_ema, next_action).amin(0), reward, batch.discount)

        with self.arithmetic.autocast():
            error = q_error(self.critic, online, batch.action, y)
        critic_loss = error.square().mean((1, 2)).sum()
        self.critic_optim.zero_grad()
        critic_loss.backward()
        self.critic_optim.step()

        features = online[0].detach()  # else the actor would bend the encoder to please itself
        with self.arithmetic.autocast():
            mean = torch.tanh(self.actor(features))
            actor_loss = -self.critic(features, self.noisy(mean)).amin(0).mean()
        self.actor_optim.zero_grad()
        actor_loss.backward(inputs=self.actor_parameters)  # the critic's weights get no gradient, and none is computed
        self.actor_optim.step()

        ema_update_(list(self.critic_target.parameters()), self.critic_parameters, self.config.tau)
        metrics = {
            "critic_loss": critic_loss.detach(),
            "actor_loss": actor_loss.detach(),
            "q_target": y.mean(),
            "saturation": (mean.detach().abs() > 0.99).float().mean(),  # an actor stuck at its limits has stopped learning
        }
        return metrics, error.detach().abs().mean((0, 1))

    def noisy(self, mean: Tensor) -> Tensor:
        noise = self.sigma * torch.randn(mean.shape, generator=self.update_generator, device=mean.device)
        return smoothed(mean, noise, self.config.sigma_clip)

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {
            "actor": self.actor,
            "actor_optimizer": self.actor_optim,
            "critic": self.critic,
            "critic_target": self.critic_target,
            "critic_optimizer": self.critic_optim,
        }

    def state_dict(self) -> dict[str, dict]:
        return {name: part.state_dict() for name, part in self.parts().items()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """The parts that `state` names."""
        parts = self.parts()
        for name, values in state.items():
            parts[name].load_state_dict(values)
