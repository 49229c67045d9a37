"""Methods whose agent remembers: what R2D2, NGU and CPT share, and R2D2 on the environment's own reward (`urlfast train r2d2`).

Kapturowski et al., "Recurrent Experience Replay in Distributed Reinforcement Learning" (R2D2, 2019), here in one process: N environments
act with one network, the i-th with its own probability of a random action, in place of the paper's 256 actors. Their rows go to one
replay of overlapping sequences, drawn by priority. Rewards are not clipped: h takes care of their scale.

What the network reads with o_t is a_{t-1} and r_{t-1}, as the row before has them. A row keeps its LSTM's state before o_t where a sequence
may begin, and then also what the row before had; the rest of a sequence tells by itself.

    row            o_t   a_t   r_t   mu_t = probability of a_t       [state before o_t, a_{t-1}, r_{t-1}: every `period` rows]
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from urlfast import Field, SequenceReplay
from urlfast.augment import to_float
from urlfast.device import Arithmetic, Captured, Precision, fetch, upload
from urlfast.learners.r2d2 import R2D2, Acted, R2D2Config, RecurrentQ, epsilons
from urlfast.limits import check_limits
from urlfast.methods import check_part, load_parts
from urlfast.methods.agent import rules
from urlfast.nets.encoders import Encoder, EncoderConfig, States, blocks


@dataclass(frozen=True)
class RecurrentConfig:
    encoder: EncoderConfig = field(default_factory=EncoderConfig)  # Of images; vectors need none
    learner: R2D2Config = field(default_factory=R2D2Config)
    trace_length: int = 80  # steps of a sequence that are learned from [R2D2; CPT 160]
    period: int = 40  # steps from one sequence's start to the next one's; the rest of them overlap [R2D2; CPT 80]
    priority_exponent: float = 0.9  # a sequence is drawn in proportion to its priority to this power [R2D2; CPT 1]
    priority_eta: float = 0.9  # of a priority: eta * the largest error of a sequence + (1 - eta) * the mean [R2D2]
    importance_exponent: float = 0.0  # of the weights that make up for it [R2D2 none; seed_rl, acme 0.6]
    batch_size: int = 64  # sequences of an update [R2D2]
    replay_ratio: float = 1.5  # how often a step is learned from [seed_rl's reading of R2D2]
    learning_start: int = 200_000  # agent steps before the first update [seed_rl: 5000 sequences]
    replay_capacity: int = 4_000_000  # rows: a step of an environment is one; the oldest make room [R2D2]
    precision: Precision = "auto"  # of the convolutions, the LSTM and hidden layers; auto: bf16 where the processor has it

    reward_clip: ClassVar[None] = None  # learned from as it is

    def __post_init__(self):
        check_limits(
            self,
            trace_length=">= 1",
            period=">= 2",
            priority_exponent="0..1",
            priority_eta="0..1",
            importance_exponent="0..1",
            batch_size=">= 1",
            replay_ratio="> 0",
            learning_start=">= 0",
            replay_capacity=">= 1",
        )
        if self.trace_length % self.period:
            raise ValueError(f"period: must divide trace_length ({self.trace_length}), or steps would be learned from unequally often, "
                             f"got {self.period}")  # fmt: skip

    @property
    def sequence_length(self) -> int:
        """Rows of a sequence in the replay: burnt in, learned from, and one to bootstrap from."""
        return self.learner.burn_in + self.trace_length + 1

    @property
    def updates_per_step(self) -> float:
        return self.replay_ratio / (self.batch_size * self.trace_length)

    @staticmethod
    def small() -> "RecurrentConfig":
        """The same for a run of few million steps, on few environments."""
        return RecurrentConfig(batch_size=32, learning_start=80_000, replay_capacity=1_000_000)

    @staticmethod
    def toy() -> "RecurrentConfig":
        """For small environments and short episodes, which a burn-in would leave nothing of to learn from."""
        learner = R2D2Config(torso=128, lstm=128, hidden=128, lr=1e-3, burn_in=0, target_period=100)
        return RecurrentConfig(learner=learner, trace_length=20, period=10, batch_size=32, replay_ratio=8.0, learning_start=1000,
                               replay_capacity=100_000)  # fmt: skip

    def after(self, pretrained) -> "RecurrentConfig":
        """This config on the networks of a pre-trained method's config."""
        same = {name: getattr(pretrained.learner, name) for name in ("torso", "lstm", "hidden")}
        return replace(self, encoder=pretrained.encoder, learner=replace(self.learner, **same))


# Observations to features --------------------------------------------------------------------------------------------


def stacked(frames: Tensor, depth: int) -> Tensor:
    """(B, L + depth - 1, C, ...) -> (B, L, depth * C, ...): each row's newest frame with those before it, oldest first. A view if C = 1."""
    B, length, C, *rest = frames.shape
    windows = frames.unfold(1, depth, 1).movedim(-1, 2)  # (B, L, depth, C, ...)
    return windows.reshape(B, length - depth + 1, depth * C, *rest)


# The agent -----------------------------------------------------------------------------------------------------------


class RecurrentAgent:
    """The part of a method between its config and its losses: encoder and learner, acting with a memory, sequences, saving.

    Of the config it reads what a RecurrentConfig has.
    """

    def __init__(
        self,
        config,
        observation_shape: tuple[int, ...],
        num_actions: int,
        *,
        device,
        seed: int,
        frame_stack: int,
        num_outputs: int | None = None,
    ):
        """observation_shape: (frame_stack * C, H, W) of uint8 images, or (frame_stack * D,) of float32 vectors.

        num_outputs: choices of Q, where they are more than the primitive actions. Raises ValueError for other shapes, and other actions.
        """
        if len(observation_shape) not in (1, 3) or observation_shape[0] % frame_stack:
            raise ValueError(
                f"observation_shape: must be ({frame_stack} stacked frames * channels, height, width) or ({frame_stack} * features,), "
                f"got {observation_shape}"
            )
        if not isinstance(num_actions, int):
            raise ValueError("learner: R2D2 takes numbered actions, and this environment's actions are vectors")
        self.config, self.frame_stack, self.seed, self.num_actions = config, frame_stack, seed, num_actions
        self.pixels = len(observation_shape) == 3
        self.frame_shape = (observation_shape[0] // frame_stack, *observation_shape[1:])
        self.arithmetic = Arithmetic.choose(device, config.precision)
        self.device = self.arithmetic.device
        self.steps = 0  # actions taken while exploring
        self.frozen = False  # the encoder
        with torch.random.fork_rng(devices=[]):  # the weights depend on the seed alone
            torch.manual_seed(seed)
            if self.pixels:
                encoder = Encoder(config.encoder, observation_shape).to(self.device, memory_format=self.arithmetic.memory_format)
            else:
                encoder = States(*observation_shape)
            self.blocked = self.pixels and encoder.takes_blocks(*self.frame_shape[1:])
            q = RecurrentQ(config.learner, encoder.num_features, num_actions, num_outputs)
        random = torch.Generator().manual_seed(seed)  # of acting
        self.learner = R2D2(config.learner, encoder, q, self.arithmetic, random)
        # Of the running episodes: the state before the next observation, and the primitive action taken last.
        self.state, self.previous_action = q.start(0, self.device), np.zeros(0, np.int64)
        self.columns: dict[str, np.ndarray] = {}  # of the rows that act saw last
        self.q = torch.zeros(0)  # (N, num_outputs), as act saw it last
        self.first, self.of = 0, None  # where the environments stand among all that act for this learner, and how many those are
        self.unsettled: Callable[[], None] | None = None  # priorities on their way from the device

    # acting and storing

    def act(self, step, explore: bool = True, observation: Tensor | None = None, previous_reward: Tensor | None = None) -> Acted:
        """What the learner chooses for N environments, their memory one step on.

        observation, previous_reward: the step's on the device, where they are there already, and what counts as its reward, (N,) float32.
        Where a choice is no primitive action, tell `took` which ones followed from it.
        """
        n = len(step.is_first)
        if len(self.state) != n:
            self.state, self.previous_action = self.learner.q.start(n, self.device), np.full(n, -1)
        if observation is None:
            observation = upload(step.observation, self.device)
        if previous_reward is None:
            previous_reward = upload(step.reward, self.device)
        first, action = upload(step.is_first, self.device), np.where(step.is_first, -1, self.previous_action)
        features = self.encode(self.learner.encoder, observation)
        reward, before = torch.where(first, 0, previous_reward), torch.where(first[:, None, None], 0, self.state)
        stored = {"state": fetch(before), "previous_reward": fetch(reward)}  # there when `act` has waited for its Q, once a step
        epsilon = epsilons(self.config.learner, self.of or n)[self.first : self.first + n] if explore else 0.0
        acted = self.learner.act(features.float(), upload(action, self.device), reward, before, epsilon)
        self.columns = {name: column.numpy() for name, column in stored.items()} | {"previous_action": action, "mu": acted.mu}
        self.state, self.previous_action, self.q = acted.state, acted.choice, acted.q
        if explore:
            self.steps += int(np.count_nonzero(~step.is_last))  # nothing leaves a last observation
        return acted

    def took(self, actions: np.ndarray) -> None:
        """The primitive actions that were executed, int64 (N,), where they are not what `act` returned."""
        self.previous_action = actions

    def observe(self, rows: dict[str, np.ndarray]) -> None:
        """Adds the columns of the rows that act saw last; of rows that it never saw, those of an episode's beginning."""
        n = len(rows["is_first"])
        if len(self.columns.get("mu", ())) != n:
            start = self.learner.q.start(n, torch.device("cpu")).numpy()
            none, one = np.zeros(n, np.float32), np.ones(n, np.float32)
            rows |= {"state": start, "previous_action": np.full(n, -1), "previous_reward": none, "mu": one}
        else:
            rows |= self.columns

    def make_replay(self, num_envs: int, steps: int, **columns: Field) -> SequenceReplay:
        """A replay of `replay_capacity` rows, of which a run of `steps` agent steps may fill but a part. columns: a method's own."""
        c, every = self.config, self.config.period
        fields = {
            "observation": Field(self.frame_shape, "uint8" if self.pixels else "float32"),
            "action": Field((), "int64"),
            "mu": Field(),
            "state": Field((2, c.learner.lstm), every=every),
            "previous_action": Field((), "int64", every=every),
            "previous_reward": Field((), every=every),
        }
        return SequenceReplay(
            c.replay_capacity,
            fields | columns,
            num_streams=num_envs,
            expected_rows=min(c.replay_capacity, steps + steps // 8),  # last observations are rows too
            sequence_length=c.sequence_length,
            stride=every,
            burn_in=c.learner.burn_in,
            frame_stack=self.frame_stack,
            priority_exponent=c.priority_exponent,
            importance_exponent=c.importance_exponent,
            eta=c.priority_eta,
            seed=self.seed,
        )

    # sequences

    def sample(self, replay: SequenceReplay, *columns: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(indices, what an update reads by name): `frames` (B, L + frame_stack - 1, ...) and the fields of a learner's Batch.

        columns: a method's own. Settles the priorities of the update before.
        """
        self.settle()
        if not replay.sampleable:
            raise ValueError(
                f"burn_in: no episode has had a step to learn from after {self.config.learner.burn_in} rows yet; take a shorter one"
            )
        b = replay.sample(self.config.batch_size)
        names = ("action", "reward", "terminated", "mask", "state", "previous_action", "previous_reward", "mu", *columns)
        arrays = {"frames": b.frames.get("observation", b.observation)} | {name: b[name] for name in names}
        if self.config.importance_exponent:
            arrays["weight"] = b.weight
        return b.indices.copy(), arrays

    def encode(self, encoder: nn.Module, observation: Tensor) -> Tensor:
        """Stacked observations (B, ...) as they are -> (B, F)."""
        if self.pixels:
            observation = to_float(observation, self.arithmetic.dtype, self.arithmetic.memory_format)
        with self.arithmetic.autocast():
            return encoder(observation)

    def rows(self, frames: Tensor) -> Tensor:
        """(B, L + frame_stack - 1, ...) -> (B, L, ...), each row's stack as `encode_rows` reads it: images in the encoder's dtype."""
        if not self.pixels:
            return stacked(frames, self.frame_stack)
        if self.blocked:
            return blocks(frames, self.frame_stack).to(self.arithmetic.dtype)  # 0..255 are exact in bfloat16
        rows = stacked(frames, self.frame_stack)
        return to_float(rows.flatten(0, 1), self.arithmetic.dtype, self.arithmetic.memory_format).unflatten(0, rows.shape[:2])

    def encode_rows(self, encoder: nn.Module, rows: Tensor) -> Tensor:
        """(B, L, ...) as `rows` gives them -> (B, L, F)."""
        with self.arithmetic.autocast():
            features = (encoder.of_blocks if self.blocked else encoder)(rows.flatten(0, 1))
        return features.unflatten(0, rows.shape[:2])

    def features(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Of all rows under the encoder, with gradient after the burn-in, and under the target encoder: (B, L, F) each."""
        rows, b = self.rows(frames), self.config.learner.burn_in
        with torch.no_grad():
            target = self.encode_rows(self.learner.encoder_target, rows)
            burnt_in = [self.encode_rows(self.learner.encoder, rows[:, :b])] if b else []
        learned = self.encode_rows(self.learner.encoder, rows[:, b:])
        return torch.cat([*burnt_in, learned], 1) if b else learned, target

    def update(self, batch: SimpleNamespace, reward: Tensor) -> dict[str, Tensor]:
        """The learner's gradient step on `reward` (B, L) and sequences as `sample` gives them; "priorities" are among the metrics."""
        metrics, priorities = self.learner.update(batch, reward, *self.features(batch.frames))
        return metrics | {"priorities": priorities}

    def initial_errors(self, batch: SimpleNamespace, reward: Tensor, q: Tensor) -> Tensor:
        """|q_t - y_t| of sequences as they were acted, (B, T): `q` (B, L, num_outputs) of acting stands for both networks."""
        b = self.config.learner.burn_in
        q, mask, choice = q[:, b:], batch.mask[:, b:], (batch.action if batch.choice is None else batch.choice)[:, b:]
        y = self.learner.returns(q, q, choice, reward[:, b:], batch.terminated[:, b:], batch.mu[:, b:], mask)
        return torch.where(mask, q[:, :-1].gather(-1, choice[:, :-1, None]).squeeze(-1) - y, 0.0).abs()

    def after_update(self, replay: SequenceReplay, indices: np.ndarray, priorities: Tensor) -> None:
        """What a captured update leaves to do: the target network follows, and the replay hears of the priorities.

        From a GPU they come with the next update, so that nothing waits for the device.
        """
        self.learner.follow()
        if priorities.device.type == "cpu":
            replay.update_priorities(indices, priorities.numpy())
            return
        copied, done = torch.empty(priorities.shape, pin_memory=True), torch.cuda.Event()
        copied.copy_(priorities, non_blocking=True)
        done.record()

        def settle():
            done.synchronize()
            replay.update_priorities(indices, copied.numpy())

        self.unsettled = settle

    def settle(self) -> None:
        """The replay has all priorities after this."""
        if self.unsettled:
            self.unsettled()
            self.unsettled = None

    # saving: every part by its name

    def state_dict(self) -> dict[str, dict]:
        self.settle()
        progress = {"steps": self.steps, "updates": self.learner.updates, "actions": self.learner.generator.get_state()}
        progress["frozen"] = self.frozen
        return self.learner.state_dict() | {"progress": progress}

    def load_part(self, part: str, state: dict) -> None:
        if part == "progress":
            self.steps, self.learner.updates = state["steps"], state["updates"]
            self.learner.generator.set_state(state["actions"])
            if state["frozen"]:
                self.freeze("encoder")
        else:
            self.learner.load_state_dict({part: state})

    def freeze(self, part: str) -> None:
        """The encoder, with its target copy, stays as it is from here on."""
        if part not in ("encoder", "encoder_target"):
            raise ValueError(f"part: only the encoder can be frozen, got {part!r}")
        self.frozen = True
        self.learner.encoder.requires_grad_(False).eval()  # a spectral norm stays as it is, too
        self.learner.encoder_target.eval()


# The environment's own reward ----------------------------------------------------------------------------------------


class RecurrentTask:
    TRANSFER = rules()  # to another task
    parts = ("encoder", "encoder_target", "q", "q_target", "q_optimizer", "progress")
    columns: tuple[str, ...] = ()  # of a batch that an update reads, beside those of every recurrent agent
    acting, fixed, statistics = ("encoder", "q"), (), ()
    seen = np.zeros(0, np.int64)  # nothing is counted

    def __init__(self, config: RecurrentConfig, observation_shape, actions, *, device="cpu", seed: int = 0, frame_stack: int = 4, **given):
        """observation_shape: (frame_stack * channels, height, width) of uint8 images, or (frame_stack * features,) of float32 vectors.

        given: to the RecurrentAgent.
        """
        self.config = config
        self.agent = RecurrentAgent(config, tuple(observation_shape), actions, device=device, seed=seed, frame_stack=frame_stack, **given)
        self.device = self.agent.device
        self.captured = Captured(self.gradient_step, self.device)

    def make_replay(self, num_envs: int, steps: int) -> SequenceReplay:
        return self.agent.make_replay(num_envs, steps)

    def act(self, step, explore: bool = True) -> np.ndarray:
        return self.agent.act(step, explore).choice

    def took(self, actions: np.ndarray) -> None:
        self.agent.took(actions)

    def observe(self, rows: dict[str, np.ndarray]) -> None:
        self.agent.observe(rows)

    def update(self, replay: SequenceReplay) -> dict[str, Tensor]:
        """One gradient step on a batch of the replay. On a GPU the metrics hold until the next call."""
        indices, arrays = self.agent.sample(replay, *self.columns)
        metrics = dict(self.captured(**arrays))
        self.agent.after_update(replay, indices, metrics.pop("priorities"))
        return metrics

    def gradient_step(self, **arrays: Tensor) -> dict[str, Tensor]:
        batch = SimpleNamespace(**{"choice": None, "weight": None, **arrays})
        return self.agent.update(batch, batch.reward)

    def initial_errors(self, batch: SimpleNamespace, q: Tensor) -> Tensor:
        return self.agent.initial_errors(batch, batch.reward, q)

    def state_dict(self) -> dict[str, dict]:
        return self.agent.state_dict()

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Raises ValueError where a part is missing or unknown."""
        load_parts(self, state, self.parts)

    def load_part(self, part: str, state: dict) -> None:
        """One part, of this or of a pre-trained method. Raises ValueError for a part that a task does not have."""
        check_part(part, self.parts)
        self.agent.load_part(part, state)
        self.captured.reset()

    def freeze(self, part: str) -> None:
        self.agent.freeze(part)
        self.captured.reset()
