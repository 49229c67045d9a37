"""What methods share: an encoder and its EMA copy, a learner, acting, storing, saving.

A method composes one and adds its reward and its losses. It decides who trains the encoder. Observations are images, which are augmented
and encoded, or vectors, which are features as they are; actions are numbers, for DrQ, or vectors in -1..1, for DDPG and DrQ-SAC.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from urlfast import Field, SequenceReplay, ema_update_
from urlfast.augment import Augment, to_float
from urlfast.device import Arithmetic, upload
from urlfast.learners.ddpg import DDPG, DDPGConfig, ddpg_networks
from urlfast.learners.drq import DrQ, DrQConfig
from urlfast.learners.drq_sac import DrQSAC, drq_sac_networks
from urlfast.methods import FREEZE, LOAD, RESET, Rule
from urlfast.nets.encoders import Encoder, States, copy_buffers
from urlfast.nets.heads import DuelingQ

LEARNED = ("q", "q_target", "actor", "critic", "critic_target", "log_alpha")  # what learners save, of which each has some
OPTIMIZERS = ("encoder_optimizer", "q_optimizer", "actor_optimizer", "critic_optimizer", "log_alpha_optimizer")


def rules(**own: Rule) -> dict[str, dict[str, Rule]]:
    """APT's rules of transfer, for a method that saves these parts of its own beside the agent's."""
    whole = {"encoder": LOAD, "encoder_target": LOAD, **dict.fromkeys(LEARNED, LOAD), **dict.fromkeys(OPTIMIZERS, RESET), "progress": RESET}
    whole |= own
    return {
        "whole": whole,  # the paper's: encoder and Q, head included, and everything goes on training
        "random-head": whole | dict.fromkeys(LEARNED, RESET),  # the paper's Table 5
        "frozen-encoder": whole | {"encoder_target": FREEZE, "encoder": FREEZE},  # mini_apt's
    }


def skilled(views: list[Tensor], skill: Tensor | None) -> list[Tensor]:
    """Each view's features (B, F) with the skill (B, d) appended; None: as they are."""
    return views if skill is None else [torch.cat([view, skill], -1) for view in views]


def paper_learner(agent: "Agent"):
    """The learner that the config names, with the networks of its paper."""
    c, width, actions = agent.config.learner, agent.encoder.num_features, agent.actions
    random = torch.Generator().manual_seed(agent.seed)  # of acting
    if isinstance(c, DrQConfig):
        return DrQ(c, DuelingQ(width, actions, c.hidden), actions, agent.arithmetic, random)
    make, networks = (DDPG, ddpg_networks) if isinstance(c, DDPGConfig) else (DrQSAC, drq_sac_networks)
    return make(c, *networks(c, width, actions[0], agent.convolutions), actions[0], agent.arithmetic, random, agent.generator)


class Agent:
    """The part of a method between its config and its losses.

    Of the config it reads encoder, learner, augment, precision, n_step, gamma, replay_capacity, learning_start.
    """

    def __init__(
        self,
        config,
        observation_shape: tuple[int, ...],
        actions: int | tuple[int, ...],
        *,
        device,
        seed: int,
        frame_stack: int,
        make_learner: Callable | None = None,
    ):
        """observation_shape: (frame_stack * C, H, W) of uint8 images, or (frame_stack * D,) of float32 vectors.

        actions: how many there are to choose from, or the shape (A,) of a vector in -1..1.
        make_learner: of this agent, for networks of a method's own; None: those of the learner's paper.
        Raises ValueError for other shapes, and for a learner that cannot take such actions.
        """
        if len(observation_shape) not in (1, 3) or observation_shape[0] % frame_stack:
            raise ValueError(
                f"observation_shape: must be ({frame_stack} stacked frames * channels, height, width) or ({frame_stack} * features,), "
                f"got {observation_shape}"
            )
        discrete = isinstance(config.learner, DrQConfig)
        if discrete != isinstance(actions, int):
            takes, given = ("numbered actions", "vectors") if discrete else ("vectors", "numbers")
            raise ValueError(f"learner: {type(config.learner).__name__} takes {takes}, and this environment's actions are {given}")
        self.config, self.frame_stack, self.seed, self.actions = config, frame_stack, seed, actions
        self.pixels = len(observation_shape) == 3
        self.convolutions = self.pixels and not config.encoder.features  # features are the flat output of convolutions
        self.frame_shape = (observation_shape[0] // frame_stack, *observation_shape[1:])
        self.arithmetic = Arithmetic.choose(device, config.precision)
        self.device = self.arithmetic.device
        self.generator = torch.Generator(self.device).manual_seed(seed)  # of what an update draws: augmentations, noise on actions
        self.augment = Augment(config.augment, self.frame_shape[0], self.generator) if self.pixels else None
        self.steps = 0  # actions taken while exploring
        self.whole = True  # what prepare said last

        with torch.random.fork_rng(devices=[]):  # the weights depend on the seed alone
            torch.manual_seed(seed)
            self.encoder = self._make_encoder(observation_shape)
            self.learner = (make_learner or paper_learner)(self)
            self.encoder_target = self.encoder  # the learner's target reads the online encoder, as of DDPG and of DrQ with tau 1
            if self.pixels and not isinstance(config.learner, DDPGConfig) and config.learner.tau < 1:
                self.encoder_target = self._make_encoder(observation_shape).requires_grad_(False)
                self.encoder_target.load_state_dict(self.encoder.state_dict())

    def _make_encoder(self, observation_shape) -> nn.Module:
        if not self.pixels:
            return States(*observation_shape)
        encoder = Encoder(self.config.encoder, observation_shape)
        return encoder.to(self.device, memory_format=self.arithmetic.memory_format).eval()  # training mode is for gradient passes

    def prepare(self) -> bool:
        """Before each update: whether it is of all that the learner has, or of a part (DrQ-SAC's every second). One is captured apart."""
        self.whole = self.learner.prepare(max(0, self.steps - self.config.learning_start))
        return self.whole

    # acting and storing

    def make_replay(self, num_envs: int, steps: int, **columns: Field) -> SequenceReplay:
        """A replay of `replay_capacity` rows, of which a run of `steps` agent steps may fill but a part. columns: a method's own."""
        c = self.config
        observation = Field(self.frame_shape, "uint8" if self.pixels else "float32")
        action = Field((), "int64") if isinstance(self.actions, int) else Field(self.actions, "float32")
        return SequenceReplay(
            c.replay_capacity,
            {"observation": observation, "action": action, **columns},
            num_streams=num_envs,
            expected_rows=min(c.replay_capacity, steps + steps // 8),  # last observations are rows too
            n_step=c.n_step,
            gamma=c.gamma,
            frame_stack=self.frame_stack,
            seed=self.seed,
        )

    @property
    def exploration(self) -> float:
        """As the learner's act takes it: a probability, or a standard deviation."""
        return self.learner.exploration(max(0, self.steps - self.config.learning_start))

    @torch.no_grad()
    def act(self, step, explore: bool = True, skill: Tensor | None = None, warm_up: bool = True) -> np.ndarray:
        """int64 [N], or float32 [N, A]: the policy's; where it explores, uniform until `learning_start`, unless there is no warm_up.

        skill: (N, d) float32, appended to the features.
        """
        exploration, warming_up = self.exploration if explore else 0.0, warm_up and explore and self.steps < self.config.learning_start
        if explore:
            self.steps += int(np.count_nonzero(~step.is_last))  # nothing leaves a last observation
        if warming_up:
            return self.learner.uniform(len(step.is_last)).numpy()
        features = self.encode(self.encoder, self.plain(upload(step.observation, self.device))).float()  # actors act in float32
        if skill is not None:
            features = torch.cat([features, skill.to(self.device)], -1)
        return self.learner.act(features, None, exploration)[0]

    # observations to features

    def plain(self, observation: Tensor) -> Tensor:
        """Observations as the encoder reads them, not augmented: images in 0..1, or vectors as they are."""
        if not self.pixels:
            return observation
        return to_float(observation, self.arithmetic.dtype, self.arithmetic.memory_format)

    def views(self, observation: Tensor, copies: int) -> Tensor:
        """`copies` augmented views of (B, ...) observations, as (copies * B, ...): view m of observation b in row m * B + b.

        Vectors are not augmented: their views are equal.
        """
        if not self.pixels:
            return observation.repeat(copies, 1) if copies > 1 else observation
        return self.augment(observation, copies, self.arithmetic.dtype, self.arithmetic.memory_format)

    def encode(self, encoder: nn.Module, views: Tensor) -> Tensor:
        with self.arithmetic.autocast():
            return encoder(views)

    @torch.no_grad()
    def target_views(self, observation: Tensor, copies: int) -> tuple[list[Tensor], list[Tensor]]:
        """`copies` views of o_{t+m} under the encoder, and the same views under its EMA copy (the same tensors where there is none)."""
        views = self.views(observation, copies)
        online = list(self.encode(self.encoder, views).chunk(copies))
        if self.encoder_target is self.encoder:
            return online, online
        return online, list(self.encode(self.encoder_target, views).chunk(copies))

    def follow(self) -> None:
        """The EMA copy one update on, when the learner does the same for its Q."""
        if self.encoder_target is not self.encoder and self.whole:
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
