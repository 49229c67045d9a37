"""The environment's own reward: a learner from scratch (`urlfast train drq|drq-sac|ddpg`), or going on from what was pre-trained.

The loss of Q trains the encoder, unless a transfer froze it. `TaskConfig()` is DrQ on Atari (Kostrikov, Yarats, Fergus 2020) with the
values of Dopamine's atari_100k re-implementation, since the authors released no Atari code; `TaskConfig.sac()` is their agent for
continuous control, `TaskConfig.ddpg()` the one of DrQ-v2 and the URL benchmark.
"""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from urlfast import SequenceReplay
from urlfast.augment import AugmentConfig
from urlfast.device import Captured, Precision, adam
from urlfast.learners.ddpg import DDPGConfig
from urlfast.learners.drq import DrQConfig
from urlfast.learners.drq_sac import DrQSACConfig
from urlfast.limits import check_limits
from urlfast.methods import check_part, load_parts
from urlfast.methods.agent import Agent, rules, skilled
from urlfast.nets.encoders import DMC_CONV, EncoderConfig


@dataclass(frozen=True)
class TaskConfig:
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    learner: Any = field(default_factory=DrQConfig)  # Q and the policy: DrQConfig, DDPGConfig or DrQSACConfig
    online_views: int = 1  # M of DrQ: views of o_t in an update [DrQ-Atari]
    target_views: int = 1  # K of DrQ: views of o_{t+m}, which the target averages [DrQ-Atari]
    n_step: int = 10  # rewards that a target sums before Q takes over [Dopamine]
    gamma: float = 0.99  # discount of the reward of each later step [Dopamine]
    batch_size: int = 32  # transitions of an update [Dopamine]
    updates_per_step: float = 1.0  # gradient steps for each agent step [Dopamine]
    learning_start: int = 1600  # agent steps of uniform actions before the first update [Dopamine]
    replay_capacity: int = 1_000_000  # rows: a step of an environment is one; 100,000 steps never fill it [Dopamine]
    reward_clip: float | None = 1.0  # rewards are learned from within -1..1 [Dopamine]
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    precision: Precision = "auto"  # of the convolutions and hidden layers; auto: bf16 where the processor has it

    def __post_init__(self):
        check_limits(
            self,
            online_views=">= 1",
            target_views=">= 1",
            n_step=">= 1",
            gamma="0..1",
            batch_size=">= 1",
            updates_per_step="> 0",
            learning_start=">= 0",
            replay_capacity=">= 1",
            reward_clip="> 0",
        )

    @staticmethod
    def sac() -> "TaskConfig":
        """DrQ on SAC, from pixels or states."""
        return TaskConfig(
            encoder=EncoderConfig(conv=DMC_CONV),
            learner=DrQSACConfig(),
            online_views=2,
            target_views=2,
            n_step=1,
            batch_size=512,
            learning_start=1000,
            replay_capacity=100_000,
            reward_clip=None,
            augment=AugmentConfig(jitter=0.0, jitter_hue=0.0),
        )

    @staticmethod
    def ddpg() -> "TaskConfig":
        """URLB's DDPG, from states or pixels; DrQ-v2 is it with batches of 256 and its noise falling from 1 to 0.1."""
        return TaskConfig(
            encoder=EncoderConfig(conv=DMC_CONV, mean=0.5),
            learner=DDPGConfig(),
            n_step=3,
            batch_size=1024,
            updates_per_step=0.5,
            learning_start=4000,
            reward_clip=None,
            augment=AugmentConfig(jitter=0.0, jitter_hue=0.0),
        )

    def after(self, pretrained) -> "TaskConfig":
        """This config on the networks of a pre-trained method's config: its encoder, its learner's widths and rate of the target."""
        same = {name: getattr(pretrained.learner, name) for name in ("hidden", "feature_dim", "tau") if hasattr(self.learner, name)}
        return replace(self, encoder=pretrained.encoder, learner=replace(self.learner, **same))


class Task:
    TRANSFER = rules()  # to another task
    parts = tuple(TRANSFER["whole"])
    columns = ("observation", "next_observation", "action", "reward", "discount")  # of a batch, that an update reads

    def __init__(self, config: TaskConfig, observation_shape, actions, *, device="cpu", seed: int = 0, frame_stack: int = 4, **given):
        """observation_shape: (frame_stack * channels, height, width) of uint8 images, or (frame_stack * features,) of float32 vectors.

        actions: how many there are, or the shape (A,) of a vector in -1..1. given: to the Agent.
        """
        self.config = config
        self.agent = Agent(config, tuple(observation_shape), actions, device=device, seed=seed, frame_stack=frame_stack, **given)
        self.device = self.agent.device
        self.trained = list(self.agent.encoder.parameters())
        self.optim = adam(self.trained, config.learner.lr, config.learner.adam_eps, self.device) if self.trained else None
        self.frozen = not self.trained  # the encoder
        self.captured = {whole: Captured(self.gradient_step, self.device, (self.agent.generator,)) for whole in (True, False)}

    def make_replay(self, num_envs: int, steps: int) -> SequenceReplay:
        return self.agent.make_replay(num_envs, steps)

    def act(self, step, explore: bool = True) -> np.ndarray:
        return self.agent.act(step, explore)

    def observe(self, rows: dict[str, np.ndarray]) -> None:
        """Nothing is kept of an episode."""

    def update(self, replay: SequenceReplay) -> dict[str, Tensor]:
        """One gradient step on a batch of the replay. On a GPU the metrics hold until the next call."""
        b = replay.sample(self.config.batch_size)
        metrics = self.captured[self.agent.prepare()](**{name: getattr(b, name) for name in self.columns})
        return metrics | {"exploration": torch.tensor(self.agent.exploration)}

    def gradient_step(
        self, observation: Tensor, next_observation: Tensor, action: Tensor, reward: Tensor, discount: Tensor, skill: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The learner on observations (B, ...); reward is the n-step return, discount gamma^m * prod(1 - terminated).

        skill: (B, d), appended to the features (APS).
        """
        c, agent = self.config, self.agent
        z, z_target = agent.target_views(next_observation, c.target_views)
        learns = not self.frozen
        agent.encoder.train(learns)
        with torch.set_grad_enabled(learns):
            features = agent.encode(agent.encoder, agent.views(observation, c.online_views))  # (M * B, F)
        agent.encoder.eval()
        online = [view.detach().requires_grad_(learns) for view in features.chunk(c.online_views)]
        batch = SimpleNamespace(action=action, discount=discount)
        pairs = list(zip(skilled(z, skill), skilled(z_target, skill), strict=True))
        metrics, _ = agent.learner.update(batch, reward, skilled(online, skill), pairs)
        if learns:
            self.optim.zero_grad()
            features.backward(torch.cat([view.grad for view in online]))
            # The limit holds for encoder and head each on its own: the head has stepped before the encoder's gradient is known.
            if isinstance(c.learner, DrQConfig):
                metrics["encoder_grad_norm"] = nn.utils.clip_grad_norm_(self.trained, c.learner.grad_clip)
            self.optim.step()
            agent.follow()
        return metrics

    def state_dict(self) -> dict[str, dict]:
        state = self.agent.state_dict()
        if self.optim:
            state["encoder_optimizer"] = self.optim.state_dict()
        state["progress"]["frozen"] = self.frozen
        return state

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Raises ValueError where a part is missing or unknown."""
        load_parts(self, state, tuple(self.state_dict()))
        self.frozen = state["progress"]["frozen"]

    def load_part(self, part: str, state: dict) -> None:
        """One part, of this or of a pre-trained method. Raises ValueError for a part that a task does not have."""
        check_part(part, self.parts)
        if part == "encoder_optimizer":
            if self.optim:
                self.optim.load_state_dict(state)
        else:
            self.agent.load_part(part, state)
        for captured in self.captured.values():
            captured.reset()

    def freeze(self, part: str) -> None:
        """The encoder, with its EMA copy, stays as it is from here on."""
        if part not in ("encoder", "encoder_target"):
            raise ValueError(f"part: only the encoder can be frozen, got {part!r}")
        self.frozen = True
        for captured in self.captured.values():
            captured.reset()
