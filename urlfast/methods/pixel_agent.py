"""What methods that choose discrete actions from pixels share: an encoder and its EMA copy, a DrQ learner, acting, storing, saving.

A method composes one and adds its reward and its losses. It decides who trains the encoder.
"""

import numpy as np
import torch
from torch import Tensor

from urlfast import Field, SequenceReplay, ema_update_
from urlfast.augment import Augment, to_float
from urlfast.device import Arithmetic
from urlfast.learners.drq import DrQ
from urlfast.nets.encoders import Encoder, copy_buffers
from urlfast.nets.heads import DuelingQ


def linear_epsilon(steps: int, warm_up: int, decay: int, final: float) -> float:
    """Probability of a uniform action after `steps` agent steps: 1 while it warms up, then linear to `final` over `decay` steps."""
    if steps < warm_up:
        return 1.0
    done = min((steps - warm_up) / decay, 1.0) if decay else 1.0
    return 1.0 + done * (final - 1.0)


class PixelAgent:
    """The part of a method between its config and its losses.

    Of the config it reads encoder, learner, augment, precision, n_step, gamma, replay_capacity, learning_start, epsilon, epsilon_decay.
    """

    def __init__(self, config, observation_shape: tuple[int, ...], num_actions: int, *, device, seed: int, frame_stack: int):
        """observation_shape: (frame_stack * C, H, W) of uint8 images. Raises ValueError for other shapes."""
        if len(observation_shape) != 3 or observation_shape[0] % frame_stack:
            raise ValueError(
                f"observation_shape: must be ({frame_stack} stacked frames * channels, height, width), got {observation_shape}"
            )
        self.config, self.frame_stack, self.seed = config, frame_stack, seed
        self.frame_shape = (observation_shape[0] // frame_stack, *observation_shape[1:])
        self.arithmetic = Arithmetic.choose(device, config.precision)
        self.device = self.arithmetic.device
        self.generator = torch.Generator(self.device).manual_seed(seed)  # of the augmentation
        self.augment = Augment(config.augment, self.frame_shape[0], self.generator)
        self.steps = 0  # actions taken while exploring

        with torch.random.fork_rng(devices=[]):  # the weights depend on the seed alone
            torch.manual_seed(seed)
            self.encoder = self._on_device(Encoder(config.encoder, observation_shape))
            q = DuelingQ(self.encoder.num_features, num_actions, config.learner.hidden)
            self.encoder_target = self.encoder  # tau 1
            if config.learner.tau < 1:
                self.encoder_target = self._on_device(Encoder(config.encoder, observation_shape)).requires_grad_(False)
                self.encoder_target.load_state_dict(self.encoder.state_dict())
        self.learner = DrQ(config.learner, q, num_actions, self.arithmetic, torch.Generator().manual_seed(seed))

    def _on_device(self, encoder: Encoder) -> Encoder:
        return encoder.to(self.device, memory_format=self.arithmetic.memory_format).eval()  # training mode is for gradient passes

    # acting and storing

    def make_replay(self, num_envs: int, steps: int) -> SequenceReplay:
        """A replay of `replay_capacity` rows, of which a run of `steps` agent steps may fill but a part."""
        c = self.config
        return SequenceReplay(
            c.replay_capacity,
            {"observation": Field(self.frame_shape, "uint8"), "action": Field((), "int64")},
            num_streams=num_envs,
            expected_rows=min(c.replay_capacity, steps + steps // 8),  # last observations are rows too
            n_step=c.n_step,
            gamma=c.gamma,
            frame_stack=self.frame_stack,
            seed=self.seed,
        )

    @property
    def epsilon(self) -> float:
        return linear_epsilon(self.steps, self.config.learning_start, self.config.epsilon_decay, self.config.epsilon)

    @torch.no_grad()
    def act(self, step, explore: bool = True) -> np.ndarray:
        """int64 [N]: greedy in Q; where it explores, uniform with probability `epsilon`."""
        epsilon = self.epsilon if explore else 0.0
        if explore:
            self.steps += int(np.count_nonzero(~step.is_last))  # nothing leaves a last observation
        if epsilon == 1:
            return self.learner.uniform(len(step.is_last)).numpy()
        images = torch.from_numpy(np.ascontiguousarray(step.observation)).to(self.device)
        return self.learner.act(self.encode(self.encoder, self.plain(images)), None, epsilon)[0]

    # images to features

    def plain(self, images: Tensor) -> Tensor:
        """uint8 stacks as the encoder reads them, not augmented."""
        return to_float(images, self.arithmetic.dtype, self.arithmetic.memory_format)

    def views(self, images: Tensor, copies: int) -> Tensor:
        """`copies` augmented views of uint8 stacks (B, C, H, W), as (copies * B, C, H, W): view m of image b in row m * B + b."""
        return self.augment(images, copies, self.arithmetic.dtype, self.arithmetic.memory_format)

    def encode(self, encoder: Encoder, views: Tensor) -> Tensor:
        with self.arithmetic.autocast():
            return encoder(views)

    @torch.no_grad()
    def target_views(self, images: Tensor, copies: int) -> tuple[list[Tensor], list[Tensor]]:
        """`copies` views of o_{t+m} under the encoder, and the same views under its EMA copy (the same tensors where there is none)."""
        views = self.views(images, copies)
        online = list(self.encode(self.encoder, views).chunk(copies))
        if self.encoder_target is self.encoder:
            return online, online
        return online, list(self.encode(self.encoder_target, views).chunk(copies))

    def follow(self) -> None:
        """The EMA copy one update on; the learner does the same for its Q."""
        if self.encoder_target is not self.encoder:
            ema_update_(list(self.encoder_target.parameters()), list(self.encoder.parameters()), self.config.learner.tau)
            copy_buffers(self.encoder_target, self.encoder)

    # saving: every part by its name

    def state_dict(self) -> dict[str, dict]:
        progress = {"steps": self.steps, "augment": self.generator.get_state(), "actions": self.learner.generator.get_state()}
        parts = {"encoder": self.encoder.state_dict(), **self.learner.state_dict(), "progress": progress}
        if self.encoder_target is not self.encoder:
            parts["encoder_target"] = self.encoder_target.state_dict()
        return parts

    def load_part(self, part: str, state: dict) -> None:
        if part == "progress":
            self.steps = state["steps"]
            if len(state["augment"]) == len(self.generator.get_state()):  # else of another kind of device: it draws on from the seed
                self.generator.set_state(state["augment"])
            self.learner.generator.set_state(state["actions"])
        elif part == "encoder":
            self.encoder.load_state_dict(state)
        elif part == "encoder_target":
            if self.encoder_target is not self.encoder:  # else the target is the encoder
                self.encoder_target.load_state_dict(state)
        else:
            self.learner.load_state_dict({part: state})
