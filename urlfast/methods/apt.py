"""APT: unsupervised active pre-training by particle entropy in a learned space.

Liu, Abbeel, "Behavior From the Void: Unsupervised Active Pre-Training" (2021); equation numbers are the paper's. No release holds the
paper's whole network: the defaults follow the paper and, where it is silent, the source named beside each value. `APTConfig.mini_apt()` is
the authors' released Atari agent, `APTConfig.urlb()` their later agent for continuous control in the URL benchmark; both say what differs.

One update, with B transitions and features of width d:
    two views of o_t -> encoder f, projection h -> NT-Xent -> a step of f and h          nothing else trains the encoder
    z = f(view of o_{t+1}) -> r = log(c + mean distance to the k nearest in the batch)   never stored: it follows the encoder
    the learner on (o_t, a_t, r, o_{t+1}), its features detached
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from urlfast import SequenceReplay
from urlfast.augment import AugmentConfig
from urlfast.device import Captured, Precision, adam
from urlfast.intrinsic import ParticleConfig, ParticleReward
from urlfast.learners.ddpg import DDPGConfig
from urlfast.learners.drq import DrQConfig
from urlfast.learners.drq_sac import DrQSACConfig
from urlfast.limits import check_limits
from urlfast.losses import nt_xent
from urlfast.methods import RESET, check_parts
from urlfast.methods.agent import Agent, rules
from urlfast.nets.encoders import DMC_CONV, EncoderConfig
from urlfast.nets.heads import MLP, Projection, Trunk

PAPER_ENCODER = EncoderConfig(activation="elu", features=15, spectral_norm=True)  # the paper's changes, on DrQ-Atari's convolutions


# The space in which particles lie, and what trains it -----------------------------------------------------------------


@dataclass(frozen=True)
class ContrastiveConfig:
    """Two views of an image are to be recognised as one (SimCLR), in a projection of the encoder's features."""

    projection: tuple[int, ...] = (128, 128)  # widths of h, ELU between them [ours; mini_apt one layer of 256]
    temperature: float = 0.07  # of NT-Xent [mini_apt; the paper prints none]

    def __post_init__(self):
        check_limits(self, projection=">= 1", temperature="> 0")


class Contrastive(nn.Module):
    """Eq. 6, as NT-Xent. Particles lie in the encoder's own space."""

    def __init__(self, config: ContrastiveConfig, num_features: int, actions: int | tuple[int, ...]):
        super().__init__()
        self.temperature = config.temperature
        self.projection = Projection(num_features, config.projection)

    def forward(self, features: Tensor, action: Tensor, following: list[Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """features: (2 * B, F), two views of o_t. Returns the loss and what is logged of it."""
        loss, accuracy = nt_xent(*self.projection(features).chunk(2), self.temperature)
        return loss, {"contrastive_loss": loss.detach(), "contrastive_accuracy": accuracy}

    def particles(self, features: Tensor) -> Tensor:
        return features


@dataclass(frozen=True)
class ICMConfig:
    """Actions are to be read off two observations, and the second predicted from the first (URLB's ICM with a trunk)."""

    features: int = 512  # width of the trunk, in which particles lie [urlb]
    hidden: int = 1024  # width of the hidden layer of both predictors [urlb]

    def __post_init__(self):
        check_limits(self, features=">= 1", hidden=">= 1")


class ICM(nn.Module):
    """Pathak et al. (2017), whose inverse and forward model share a trunk; errors are Euclidean norms, not squared, as in URLB.

    Where actions are numbers, they are one-hot, and the inverse model's error is the cross entropy.
    """

    def __init__(self, config: ICMConfig, num_features: int, actions: int | tuple[int, ...]):
        super().__init__()
        width, self.numbered = config.features, isinstance(actions, int)
        self.action_dim = actions if self.numbered else actions[0]
        self.trunk = Trunk(num_features, width)
        self.forward_model = MLP(width + self.action_dim, config.hidden, 1, width)
        self.inverse_model = MLP(2 * width, config.hidden, 1, self.action_dim)

    def forward(self, features: Tensor, action: Tensor, following: list[Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """features: (M * B, F), of which the first view is used; following: views of o_{t+m}, likewise. The loss, and what is logged."""
        h, h_next = self.trunk(features[: len(action)]), self.trunk(following[0])  # not as one: the second asks for no gradient
        done = F.one_hot(action, self.action_dim).float() if self.numbered else action
        forward_error = torch.linalg.vector_norm(h_next - self.forward_model(torch.cat([h, done], -1)), dim=-1).mean()
        read_off = self.inverse_model(torch.cat([h, h_next], -1))
        if self.numbered:
            inverse_error = F.cross_entropy(read_off, action)
        else:
            inverse_error = torch.linalg.vector_norm(done - torch.tanh(read_off), dim=-1).mean()
        return forward_error + inverse_error, {"forward_error": forward_error.detach(), "inverse_error": inverse_error.detach()}

    def particles(self, features: Tensor) -> Tensor:
        return self.trunk(features)


# Config ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class APTConfig:
    encoder: EncoderConfig = field(default_factory=lambda: PAPER_ENCODER)  # Of images; vectors need none
    representation: Any = field(default_factory=ContrastiveConfig)  # Where particles lie, and what is learned for it
    encoder_learns: Literal["representation", "q", "never"] = "representation"  # from what; q: the paper's "w/o CL", never: its "fixed"
    lr: float = 1e-4  # learning rate of Adam, encoder and representation [mini_apt, urlb]
    adam_eps: float = 1e-8  # added to that Adam's denominator [mini_apt, urlb]
    reward: ParticleConfig = field(default_factory=ParticleConfig)
    pool: Literal["batch", "views"] = "batch"  # neighbours among one view of each image, or among all K [released code; mini_apt views]
    learner: Any = field(  # Q and the policy: DrQConfig, DDPGConfig or DrQSACConfig
        default_factory=lambda: DrQConfig(tau=0.01, epsilon=0.01, epsilon_decay=0)  # tau as mini_apt's, at every update; epsilon ours
    )
    online_views: int = 1  # M of DrQ: views of o_t in an update of Q, of the 2 of the contrastive loss [DrQ-Atari; mini_apt 2]
    target_views: int = 1  # K of DrQ: views of the next observation, which the target averages [DrQ-Atari; mini_apt 2]
    n_step: int = 1  # steps to the particle, whose reward replaces those of the steps between, as in URLB [ours; urlb 3, mini_apt 20]
    gamma: float = 0.99  # discount of the reward of each later step [mini_apt, DrQ]
    batch_size: int = 32  # transitions of an update, and the particles of its reward [DrQ-Atari; mini_apt 64, urlb 1024]
    updates_per_step: float = 2.0  # gradient steps for each agent step [paper; mini_apt 1, urlb 0.5]
    learning_start: int = 1600  # agent steps of uniform actions before the first update [mini_apt, DrQ-Atari; urlb 4000]
    replay_capacity: int = 1_000_000  # rows: a step of an environment is one; the oldest make room [mini_apt, urlb]
    reward_clip: float | None = None  # of the environment's reward, which is stored and not read
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    precision: Precision = "auto"  # of the convolutions and hidden layers; auto: bf16 where the processor has it

    def __post_init__(self):
        check_limits(
            self,
            lr="> 0",
            adam_eps="> 0",
            target_views=">= 1",
            n_step=">= 1",
            gamma="0..1",
            batch_size=">= 2",  # the contrastive loss needs a negative
            updates_per_step="> 0",
            learning_start=">= 0",
            replay_capacity=">= 1",
            reward_clip="> 0",
        )
        if self.online_views not in (1, 2):
            raise ValueError(f"online_views: must be 1 or 2, got {self.online_views}")
        particles = self.batch_size * (self.target_views if self.pool == "views" else 1)
        if not 1 <= self.reward.k <= particles:
            raise ValueError(f"reward.k: must lie in 1..{particles}, the particles of a batch, got {self.reward.k}")

    @staticmethod
    def mini_apt() -> "APTConfig":
        """The released Atari agent: neighbours and Q on the convolutions' 3136 outputs, the k-th neighbour alone, both views as pool.

        Mended: the last action is explored, each sample has its own crop, the target moves at every update and not every 8,000.
        As everywhere here: Huber in place of the squared error, the mean over views in place of their sum, and the reward of the next
        particle alone (the release: of the 20th, with a bootstrap that is discounted once).
        """
        return APTConfig(
            encoder=EncoderConfig(),
            representation=ContrastiveConfig(projection=(256,)),
            reward=ParticleConfig(k=16, neighbours="kth", scale="distance-var", clip=5e-4),
            pool="views",
            learner=DrQConfig(tau=0.01, adam_eps=1e-8, epsilon=0.001, epsilon_decay=0),
            online_views=2,
            target_views=2,
            batch_size=64,
            updates_per_step=1.0,
            augment=AugmentConfig(intensity=0.0),  # shift alone
        )

    @staticmethod
    def dmc() -> "APTConfig":
        """The paper's agent for continuous control from pixels: DrQ on SAC, and the encoder of 15 features on DrQ's convolutions."""
        return APTConfig(
            encoder=EncoderConfig(conv=DMC_CONV, activation="elu", features=15, spectral_norm=True),
            lr=1e-3,  # [drq]
            reward=ParticleConfig(k=12),  # [urlb]
            learner=DrQSACConfig(),
            online_views=2,
            target_views=2,
            batch_size=512,
            learning_start=1000,
            replay_capacity=100_000,
        )

    @staticmethod
    def urlb() -> "APTConfig":
        """ICM-APT of the URL benchmark, on DDPG, for states and pixels.

        The release rewards the particle of o_t, here it is that of the next observation, as the paper says and everywhere in urlfast.
        Its pixels are shifted alone, as here, and lie in -0.5..0.5.
        """
        return APTConfig(
            encoder=EncoderConfig(conv=DMC_CONV, mean=0.5),
            representation=ICMConfig(),
            reward=ParticleConfig(k=12, scale="none"),
            learner=DDPGConfig(),
            n_step=3,
            batch_size=1024,
            updates_per_step=0.5,
            learning_start=4000,
            augment=AugmentConfig(jitter=0.0, jitter_hue=0.0),
        )


class APT:
    TRANSFER = rules(representation=RESET, normalizer=RESET)

    def __init__(self, config: APTConfig, observation_shape, actions, *, device="cpu", seed: int = 0, frame_stack: int = 4):
        """observation_shape: (frame_stack * channels, height, width) of uint8 images, or (frame_stack * features,) of float32 vectors.

        actions: how many there are, or the shape (A,) of a vector in -1..1.
        Raises ValueError for what a representation or a learner cannot take.
        """
        self.config = config
        self.agent = Agent(config, tuple(observation_shape), actions, device=device, seed=seed, frame_stack=frame_stack)
        self.device = self.agent.device
        self.contrastive = isinstance(config.representation, ContrastiveConfig)
        if self.contrastive and not self.agent.pixels:
            raise ValueError("representation: the contrastive loss compares views of images, and these observations are vectors: take ICM")
        if config.encoder_learns == "q" and not self.agent.pixels:
            raise ValueError("encoder_learns: vectors have no encoder that could learn from q: take representation or never")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            make = Contrastive if self.contrastive else ICM
            self.representation = make(config.representation, self.agent.encoder.num_features, actions).to(self.device)
        self.encoder_parameters = list(self.agent.encoder.parameters())
        self.optim = adam([*self.encoder_parameters, *self.representation.parameters()], config.lr, config.adam_eps, self.device)
        self.reward = ParticleReward(config.reward, self.device, self.agent.generator)
        self.quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], device=self.device)
        self.captured = {whole: Captured(self.gradient_step, self.device, (self.agent.generator,)) for whole in (True, False)}

    def make_replay(self, num_envs: int, steps: int) -> SequenceReplay:
        return self.agent.make_replay(num_envs, steps)

    def act(self, step, explore: bool = True) -> np.ndarray:
        return self.agent.act(step, explore)

    def observe(self, rows: dict[str, np.ndarray]) -> None:
        """The reward needs a batch alone: nothing is kept of an episode."""

    def update(self, replay: SequenceReplay) -> dict[str, Tensor]:
        """One gradient step on a batch of the replay. On a GPU the metrics hold until the next call."""
        batch = replay.sample(self.config.batch_size)
        metrics = self.captured[self.agent.prepare()](
            observation=batch.observation, next_observation=batch.next_observation, action=batch.action, discount=batch.discount
        )
        return metrics | {"exploration": torch.tensor(self.agent.exploration)}

    def gradient_step(self, observation: Tensor, next_observation: Tensor, action: Tensor, discount: Tensor) -> dict[str, Tensor]:
        """The update of the docstring above, on observations (B, ...); discount is gamma^m * prod(1 - terminated)."""
        c, agent = self.config, self.agent

        # Representation. The same pass serves Q, whose features are therefore one step of the encoder old.
        agent.encoder.train()
        with torch.set_grad_enabled(c.encoder_learns != "never"):
            features = agent.encode(agent.encoder, agent.views(observation, 2 if self.contrastive else c.online_views))  # (views * B, F)
        agent.encoder.eval()
        z, z_target, metrics = None, None, {}
        if not self.contrastive:  # ICM reads the next observation too; as in the release its features are not computed anew after the step
            z, z_target = agent.target_views(next_observation, c.target_views)
        if c.encoder_learns == "representation":
            with agent.arithmetic.autocast():
                loss, metrics = self.representation(features, action, z)
            self.optim.zero_grad()
            loss.backward()
            self.optim.step()

        # Reward: eq. 5 on the next observation, under the new encoder.
        if z is None:
            z, z_target = agent.target_views(next_observation, c.target_views)  # K of (B, F)
        pool = torch.cat(z) if c.pool == "views" else z[0]
        particles, distance = self.reward(self.particles(pool))
        reward = particles.view(-1, len(action)).mean(0)  # y averages over the views, and so over their rewards

        # Q: in the method no view asks for a gradient, because the encoder learns from its own loss alone.
        asks = c.encoder_learns == "q"
        online = [view.detach().requires_grad_(asks) for view in features.split(len(action))[: c.online_views]]
        batch = SimpleNamespace(action=action, discount=discount)
        learned, _ = agent.learner.update(batch, reward, online, list(zip(z, z_target, strict=True)))
        if asks:
            self.optim.zero_grad()
            features[: c.online_views * len(action)].backward(torch.cat([view.grad for view in online]))
            self.optim.step()
        agent.follow()
        return {
            **learned,
            **metrics,
            "intrinsic_reward": particles.mean(),
            "knn_distance": distance.mean(),
            "intrinsic_reward_quantiles": torch.quantile(particles, self.quantiles),
        }

    @torch.no_grad()
    def particles(self, features: Tensor) -> Tensor:
        with self.agent.arithmetic.autocast():
            return self.representation.particles(features).float()  # distances are float32's

    @torch.no_grad()
    def intrinsic_reward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """(reward (B,), particles (B, d)) of a pool of observations (B, ...), not augmented; the running statistic stays as it is."""
        z = self.particles(self.agent.encode(self.agent.encoder, self.agent.plain(observation.to(self.device))))
        reward, _ = self.reward(z, update=False)
        return reward, z

    def state_dict(self) -> dict[str, dict]:
        return self.agent.state_dict() | {
            "encoder_optimizer": self.optim.state_dict(),
            "representation": self.representation.state_dict(),
            "normalizer": self.reward.state_dict(),
        }

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Raises ValueError where a part is missing or unknown."""
        check_parts(state, tuple(self.state_dict()))
        own = {"encoder_optimizer": self.optim, "representation": self.representation, "normalizer": self.reward}
        for part, values in state.items():
            own[part].load_state_dict(values) if part in own else self.agent.load_part(part, values)
        for captured in self.captured.values():
            captured.reset()
