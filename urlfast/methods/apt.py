"""APT: unsupervised active pre-training by particle entropy in a contrastive space.

Liu, Abbeel, "Behavior From the Void: Unsupervised Active Pre-Training" (2021); equation numbers are the paper's. No release holds the
paper's whole network: the defaults follow the paper and, where it is silent, the source named beside each value. `APTConfig.mini_apt()` is
the network, batch and reward of the authors' released Atari agent, and says what differs.

One update, with B transitions and features of width d:
    two views of o_t -> encoder f, projection h -> NT-Xent -> a step of f and h          nothing else trains the encoder
    z = f(view of o_{t+1}) -> r = log(c + mean distance to the k nearest in the batch)   never stored: it follows the encoder
    DrQ on (o_t, a_t, r, o_{t+1}), its features detached
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from urlfast import SequenceReplay
from urlfast.augment import AugmentConfig
from urlfast.device import Captured, Precision, adam
from urlfast.intrinsic import ParticleConfig, ParticleReward
from urlfast.learners.drq import DrQConfig
from urlfast.limits import check_limits
from urlfast.losses import nt_xent
from urlfast.methods import FREEZE, LOAD, RESET, check_parts
from urlfast.methods.pixel_agent import PixelAgent
from urlfast.nets.encoders import EncoderConfig
from urlfast.nets.heads import Projection

PAPER_ENCODER = EncoderConfig(activation="elu", features=15, spectral_norm=True)  # the paper's changes, on DrQ-Atari's convolutions


@dataclass(frozen=True)
class APTConfig:
    encoder: EncoderConfig = field(default_factory=lambda: PAPER_ENCODER)
    projection: tuple[int, ...] = (128, 128)  # widths of h, ELU between them [ours; mini_apt one layer of 256]
    temperature: float = 0.07  # of the contrastive loss NT-Xent [mini_apt; the paper prints none]
    lr: float = 1e-4  # learning rate of Adam, encoder and projection [mini_apt]
    adam_eps: float = 1e-8  # added to that Adam's denominator [mini_apt]
    reward: ParticleConfig = field(default_factory=ParticleConfig)
    pool: Literal["batch", "views"] = "batch"  # neighbours among one view of each image, or among all K [released code; mini_apt views]
    learner: DrQConfig = field(
        default_factory=lambda: DrQConfig(tau=0.01)
    )  # DrQ, which learns Q; tau as mini_apt's, though at every update
    online_views: int = 1  # M of DrQ: views of o_t in an update of Q, of the 2 of the contrastive loss [DrQ-Atari; mini_apt 2]
    target_views: int = 1  # K of DrQ: views of the next observation, which the target averages [DrQ-Atari; mini_apt 2]
    n_step: int = 1  # steps to the particle, whose reward stands for the whole return, as URLB's [ours; mini_apt 20]
    gamma: float = 0.99  # discount of the reward of each later step [mini_apt, DrQ]
    batch_size: int = 32  # transitions of an update, and the particles of its reward [DrQ-Atari; mini_apt 64]
    updates_per_step: float = 2.0  # gradient steps for each agent step [paper; mini_apt 1]
    learning_start: int = 1600  # agent steps of uniform actions before the first update [mini_apt, DrQ-Atari]
    replay_capacity: int = 1_000_000  # rows: a step of an environment is one; the oldest make room [mini_apt]
    epsilon: float = 0.01  # probability of a uniform action at last [ours; mini_apt 0.001]
    epsilon_decay: int = 0  # steps from 1 to there, after learning_start [mini_apt]
    reward_clip: float | None = None  # of the game's reward, which is stored and not read
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    precision: Precision = "auto"  # of the convolutions and hidden layers; auto: bf16 where the processor has it

    def __post_init__(self):
        check_limits(
            self,
            projection=">= 1",
            temperature="> 0",
            lr="> 0",
            adam_eps="> 0",
            target_views=">= 1",
            n_step=">= 1",
            gamma="0..1",
            batch_size=">= 2",  # the contrastive loss needs a negative
            updates_per_step="> 0",
            learning_start=">= 0",
            replay_capacity=">= 1",
            epsilon="0..1",
            epsilon_decay=">= 0",
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
            projection=(256,),
            reward=ParticleConfig(k=16, neighbours="kth", scale="distance-var", clip=5e-4),
            pool="views",
            learner=DrQConfig(tau=0.01, adam_eps=1e-8),
            online_views=2,
            target_views=2,
            batch_size=64,
            updates_per_step=1.0,
            epsilon=0.001,
            augment=AugmentConfig(intensity=0.0),  # shift alone
        )


TRANSFER = {
    "whole": {  # the paper's: encoder and Q, head included, and everything goes on training
        "encoder": LOAD,
        "encoder_target": LOAD,
        "encoder_optimizer": RESET,
        "projection": RESET,
        "q": LOAD,
        "q_target": LOAD,
        "q_optimizer": RESET,
        "normalizer": RESET,
        "progress": RESET,
    }
}
TRANSFER["random-head"] = TRANSFER["whole"] | {"q": RESET, "q_target": RESET}  # the paper's Table 5
TRANSFER["frozen-encoder"] = TRANSFER["whole"] | {"encoder_target": FREEZE, "encoder": FREEZE}  # mini_apt's


class APT:
    TRANSFER = TRANSFER
    parts = tuple(TRANSFER["whole"])

    def __init__(self, config: APTConfig, observation_shape, num_actions: int, *, device="cpu", seed: int = 0, frame_stack: int = 4):
        """observation_shape: (frame_stack * channels, height, width) of uint8 images."""
        self.config = config
        self.agent = PixelAgent(config, tuple(observation_shape), num_actions, device=device, seed=seed, frame_stack=frame_stack)
        self.device = self.agent.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projection = Projection(self.agent.encoder.num_features, config.projection).to(self.device)
        trained = [*self.agent.encoder.parameters(), *self.projection.parameters()]
        self.optim = adam(trained, config.lr, config.adam_eps, self.device)
        self.reward = ParticleReward(config.reward, self.device)
        self.quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], device=self.device)
        self.captured = Captured(self.gradient_step, self.device, (self.agent.generator,))

    def make_replay(self, num_envs: int, steps: int) -> SequenceReplay:
        return self.agent.make_replay(num_envs, steps)

    def act(self, step, explore: bool = True) -> np.ndarray:
        return self.agent.act(step, explore)

    def observe(self, rows: dict[str, np.ndarray]) -> None:
        """The reward needs a batch alone: nothing is kept of an episode."""

    def update(self, replay: SequenceReplay) -> dict[str, Tensor]:
        """One gradient step on a batch of the replay. On a GPU the metrics hold until the next call."""
        batch = replay.sample(self.config.batch_size)
        metrics = self.captured(
            observation=batch.observation, next_observation=batch.next_observation, action=batch.action, discount=batch.discount
        )
        return metrics | {"epsilon": torch.tensor(self.agent.epsilon)}

    def gradient_step(self, observation: Tensor, next_observation: Tensor, action: Tensor, discount: Tensor) -> dict[str, Tensor]:
        """The update of the docstring above, on uint8 stacks (B, C, H, W); discount is gamma^m * prod(1 - terminated)."""
        c, agent = self.config, self.agent

        # Representation: eq. 6, as NT-Xent. The same pass serves Q, whose features are therefore one contrastive step old.
        agent.encoder.train()
        features = agent.encode(agent.encoder, agent.views(observation, 2))  # (2 * B, d)
        agent.encoder.eval()
        contrastive_loss, accuracy = nt_xent(*self.projection(features).chunk(2), c.temperature)
        self.optim.zero_grad()
        contrastive_loss.backward()
        self.optim.step()

        # Reward: eq. 5 on the next observation, under the new encoder.
        z, z_target = agent.target_views(next_observation, c.target_views)  # K of (B, d)
        pool = torch.cat(z) if c.pool == "views" else z[0]
        particles, distance = self.reward(pool)
        reward = particles.view(-1, len(action)).mean(0)  # y averages over the views, and so over their rewards

        # Q: no view asks for a gradient, because the encoder learns from the contrastive loss alone.
        online = features.detach().chunk(2)[: c.online_views]
        batch = SimpleNamespace(action=action, discount=discount)
        metrics, _ = agent.learner.update(batch, reward, online, list(zip(z, z_target, strict=True)))
        agent.follow()
        return metrics | {
            "contrastive_loss": contrastive_loss.detach(),
            "contrastive_accuracy": accuracy,
            "intrinsic_reward": particles.mean(),
            "knn_distance": distance.mean(),
            "intrinsic_reward_quantiles": torch.quantile(particles, self.quantiles),
        }

    @torch.no_grad()
    def intrinsic_reward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """(reward (B,), features (B, d)) of a pool of uint8 stacks (B, C, H, W), not augmented; the running statistic stays as it is."""
        z = self.agent.encode(self.agent.encoder, self.agent.plain(observation.to(self.device)))
        reward, _ = self.reward(z, update=False)
        return reward, z

    def state_dict(self) -> dict[str, dict]:
        return self.agent.state_dict() | {
            "encoder_optimizer": self.optim.state_dict(),
            "projection": self.projection.state_dict(),
            "normalizer": self.reward.state_dict(),
        }

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Raises ValueError where a part is missing or unknown."""
        check_parts(state, tuple(self.state_dict()))
        own = {"encoder_optimizer": self.optim, "projection": self.projection, "normalizer": self.reward}
        for part, values in state.items():
            own[part].load_state_dict(values) if part in own else self.agent.load_part(part, values)
        self.captured.reset()
