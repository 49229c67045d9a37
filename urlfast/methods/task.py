"""The environment's own reward: DrQ on Atari from scratch (`urlfast train drq atari`), or going on from a pre-trained encoder and Q.

Kostrikov, Yarats, Fergus (2020), with the values of Dopamine's atari_100k re-implementation: the authors released no Atari code. The DrQ
loss trains the encoder, unless a transfer froze it.
"""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from urlfast import SequenceReplay
from urlfast.augment import AugmentConfig
from urlfast.device import Captured, Precision, adam
from urlfast.learners.drq import DrQConfig
from urlfast.limits import check_limits
from urlfast.methods import FREEZE, LOAD, RESET, check_parts
from urlfast.methods.pixel_agent import PixelAgent
from urlfast.nets.encoders import EncoderConfig


@dataclass(frozen=True)
class TaskConfig:
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    learner: DrQConfig = field(default_factory=DrQConfig)
    online_views: int = 1  # M of DrQ: views of o_t in an update [DrQ-Atari]
    target_views: int = 1  # K of DrQ: views of o_{t+m}, which the target averages [DrQ-Atari]
    n_step: int = 10  # rewards that a target sums before Q takes over [Dopamine]
    gamma: float = 0.99  # discount of the reward of each later step [Dopamine]
    batch_size: int = 32  # transitions of an update [Dopamine]
    updates_per_step: float = 1.0  # gradient steps for each agent step [Dopamine]
    learning_start: int = 1600  # agent steps of uniform actions before the first update [Dopamine]
    replay_capacity: int = 1_000_000  # rows: a step of an environment is one; 100,000 steps never fill it [Dopamine]
    epsilon: float = 0.1  # probability of a uniform action at last [Dopamine; DrQ(eps) 0.01]
    epsilon_decay: int = 5000  # steps from 1 to there, after learning_start [Dopamine]
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
            epsilon="0..1",
            epsilon_decay=">= 0",
            reward_clip="> 0",
        )

    def after(self, pretrained) -> "TaskConfig":
        """This config on the network of a pre-trained method's config: its encoder, the width of its Q, and its rate of the target."""
        learner = replace(self.learner, hidden=pretrained.learner.hidden, tau=pretrained.learner.tau)
        return replace(self, encoder=pretrained.encoder, learner=learner)


TRANSFER = {  # to another task
    "whole": {
        "encoder": LOAD,
        "encoder_target": LOAD,
        "encoder_optimizer": RESET,
        "q": LOAD,
        "q_target": LOAD,
        "q_optimizer": RESET,
        "progress": RESET,
    }
}
TRANSFER["random-head"] = TRANSFER["whole"] | {"q": RESET, "q_target": RESET}
TRANSFER["frozen-encoder"] = TRANSFER["whole"] | {"encoder_target": FREEZE, "encoder": FREEZE}


class Task:
    TRANSFER = TRANSFER
    parts = tuple(TRANSFER["whole"])

    def __init__(self, config: TaskConfig, observation_shape, num_actions: int, *, device="cpu", seed: int = 0, frame_stack: int = 4):
        """observation_shape: (frame_stack * channels, height, width) of uint8 images."""
        self.config = config
        self.agent = PixelAgent(config, tuple(observation_shape), num_actions, device=device, seed=seed, frame_stack=frame_stack)
        self.device = self.agent.device
        self.trained = list(self.agent.encoder.parameters())
        self.optim = adam(self.trained, config.learner.lr, config.learner.adam_eps, self.device)
        self.frozen = False  # the encoder
        self.captured = Captured(self.gradient_step, self.device, (self.agent.generator,))

    def make_replay(self, num_envs: int, steps: int) -> SequenceReplay:
        return self.agent.make_replay(num_envs, steps)

    def act(self, step, explore: bool = True) -> np.ndarray:
        return self.agent.act(step, explore)

    def observe(self, rows: dict[str, np.ndarray]) -> None:
        """Nothing is kept of an episode."""

    def update(self, replay: SequenceReplay) -> dict[str, Tensor]:
        """One gradient step on a batch of the replay. On a GPU the metrics hold until the next call."""
        b = replay.sample(self.config.batch_size)
        metrics = self.captured(
            observation=b.observation, next_observation=b.next_observation, action=b.action, reward=b.reward, discount=b.discount
        )
        return metrics | {"epsilon": torch.tensor(self.agent.epsilon)}

    def gradient_step(
        self, observation: Tensor, next_observation: Tensor, action: Tensor, reward: Tensor, discount: Tensor
    ) -> dict[str, Tensor]:
        """DrQ on uint8 stacks (B, C, H, W); reward is the n-step return, discount gamma^m * prod(1 - terminated)."""
        c, agent = self.config, self.agent
        z, z_target = agent.target_views(next_observation, c.target_views)
        learns = not self.frozen
        agent.encoder.train(learns)
        with torch.set_grad_enabled(learns):
            features = agent.encode(agent.encoder, agent.views(observation, c.online_views))  # (M * B, F)
        agent.encoder.eval()
        online = [view.detach().requires_grad_(learns) for view in features.chunk(c.online_views)]
        batch = SimpleNamespace(action=action, discount=discount)
        metrics, _ = agent.learner.update(batch, reward, online, list(zip(z, z_target, strict=True)))
        if learns:
            self.optim.zero_grad()
            features.backward(torch.cat([view.grad for view in online]))
            # The limit holds for encoder and head each on its own: the head has stepped before the encoder's gradient is known.
            metrics["encoder_grad_norm"] = nn.utils.clip_grad_norm_(self.trained, c.learner.grad_clip)
            self.optim.step()
            agent.follow()
        return metrics

    def state_dict(self) -> dict[str, dict]:
        state = self.agent.state_dict() | {"encoder_optimizer": self.optim.state_dict()}
        state["progress"]["frozen"] = self.frozen
        return state

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Raises ValueError where a part is missing or unknown."""
        check_parts(state, tuple(self.state_dict()))
        for part, values in state.items():
            self.load_part(part, values)
        self.frozen = state["progress"]["frozen"]

    def load_part(self, part: str, state: dict) -> None:
        """One part, of this or of a pre-trained method. Raises ValueError for a part that a task does not have."""
        if part not in self.parts:
            raise ValueError(f"part: must be one of {', '.join(self.parts)}, got {part!r}")
        if part == "encoder_optimizer":
            self.optim.load_state_dict(state)
        else:
            self.agent.load_part(part, state)
        self.captured.reset()

    def freeze(self, part: str) -> None:
        """The encoder, with its EMA copy, stays as it is from here on."""
        if part not in ("encoder", "encoder_target"):
            raise ValueError(f"part: only the encoder can be frozen, got {part!r}")
        self.frozen = True
        self.captured.reset()
