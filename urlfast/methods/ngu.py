"""NGU: a recurrent agent that seeks what it has not seen in this episode, and rarely in all others (`urlfast train ngu`).

Badia et al., "Never Give Up: Learning Directed Exploration Strategies" (2020), as CPT pre-trains with it (`urlfast train cpt`; Campos et
al., "Coverage as a Principle for Discovering Transferable Behavior in Reinforcement Learning", 2021): one policy, one discount, and no
reward but NGU's. NGU's family of 32 policies, which mix it with the game's reward, is not here. One vector step, and one update:

    act       n_t = novelty of o_t, which paid a_{t-1}; memories append o_t      NoveltyReward, once for each observation
              a_t ~ epsilon-greedy in Q(o_t, a_{t-1}, n_t, memory)               never the game's reward, unless it is weighed in
    observe   rows get the column `novelty`, and lose the game's reward
    update    r_t = n_{t+1};  Q learns r by Retrace on sequences (R2D2); f and RND learn from the last five frames of each

    row       o_t   n_t   a_t         n_t hangs on its episode's memory, so it is stored, and never computed anew
    reward          r_t = n_{t+1}     also of the last action, whose observation is a row of its own
"""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from urlfast import Field, SequenceReplay
from urlfast.device import Captured, fetch, upload
from urlfast.intrinsic import NoveltyConfig, NoveltyReward
from urlfast.learners.r2d2 import R2D2Config
from urlfast.limits import check_limits
from urlfast.methods import RESET, check_part, load_parts
from urlfast.methods.agent import rules
from urlfast.methods.recurrent import RecurrentAgent, RecurrentConfig, stacked

LEARNER = R2D2Config(adam_eps=1e-4, target="retrace", gamma=0.99, target_period=1500)  # NGU's, with the discount of its most curious policy


@dataclass(frozen=True)
class NGUConfig(RecurrentConfig):
    novelty: NoveltyConfig = field(default_factory=NoveltyConfig)  # The reward
    extrinsic_weight: float = 0.0  # of the environment's reward beside it; 0: it is not even stored [CPT]
    learner: R2D2Config = field(default_factory=lambda: LEARNER)
    learning_start: int = 250_000  # agent steps before the first update [NGU: 6250 sequences]
    replay_capacity: int = 5_000_000  # rows: a step of an environment is one; the oldest make room [NGU]

    def __post_init__(self):
        super().__post_init__()
        check_limits(self, extrinsic_weight=">= 0")

    @staticmethod
    def cpt() -> "NGUConfig":
        """CPT's first stage: sequences twice as long, without burn-in, and drawn in proportion to their priority, as Agent57's."""
        learner = replace(LEARNER, burn_in=0)
        return NGUConfig(learner=learner, trace_length=160, period=80, priority_exponent=1.0, learning_start=500_000)

    def small(self) -> "NGUConfig":
        """The same for a run of few million steps, on few environments."""
        return replace(self, batch_size=32, learning_start=80_000, replay_capacity=1_000_000)

    @staticmethod
    def toy() -> "NGUConfig":
        """For small environments and short episodes."""
        toy = RecurrentConfig.toy()
        learner = replace(toy.learner, adam_eps=1e-4, target="retrace", gamma=0.99)
        same = {name: getattr(toy, name) for name in ("trace_length", "period", "batch_size", "replay_ratio", "replay_capacity")}
        return NGUConfig(learner=learner, learning_start=toy.learning_start, **same)


class NGU:
    """Pre-trained, it is a policy beside another learner: `act(step, explore=False)` at every step, then `took`, and never `update`."""

    TRANSFER = rules(**dict.fromkeys(NoveltyReward.PARTS, RESET))  # to the environment's reward, with R2D2
    parts = ("encoder", "encoder_target", "q", "q_target", "q_optimizer", "progress", *NoveltyReward.PARTS)
    acting, fixed, statistics = ("encoder", "q", "embedding", "rnd"), (), ("moments",)
    seen = np.zeros(0, np.int64)  # nothing is counted

    def __init__(self, config: NGUConfig, observation_shape, actions, *, device="cpu", seed: int = 0, frame_stack: int = 4):
        """observation_shape: (frame_stack * channels, height, width) of uint8 images, or (frame_stack * features,) of float32 vectors.

        actions: how many there are. Raises ValueError for vectors.
        """
        self.config, shape = config, tuple(observation_shape)
        self.agent = RecurrentAgent(config, shape, actions, device=device, seed=seed, frame_stack=frame_stack)
        self.device = self.agent.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]))  # not the agent's: its weights have these shapes
            self.novelty = NoveltyReward(config.novelty, config.encoder, shape, actions, self.agent.arithmetic)
        self.paid = np.zeros(0, np.float32)  # novelty of the observations that act saw last
        self.quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], device=self.device)
        self.captured = Captured(self.gradient_step, self.device)

    def make_replay(self, num_envs: int, steps: int) -> SequenceReplay:
        return self.agent.make_replay(num_envs, steps, novelty=Field())

    def act(self, step, explore: bool = True) -> np.ndarray:
        """int64 (N,), for the N environments of the call before. Not explored, it is greedy, and RND's statistics stay as they are."""
        observation, first = upload(step.observation, self.device), upload(step.is_first, self.device)
        reward = self.novelty(observation, first, learning=explore)
        paid = fetch(reward)
        if self.config.extrinsic_weight:
            reward = reward + self.config.extrinsic_weight * upload(step.reward, self.device)
        choice = self.agent.act(step, explore, observation, reward).choice
        self.paid = paid.numpy()  # there since `act` has waited
        return choice

    def took(self, actions: np.ndarray) -> None:
        """The actions that were executed, int64 (N,), where they are not what `act` returned."""
        self.agent.took(actions)

    def observe(self, rows: dict[str, np.ndarray]) -> None:
        """Adds the columns of the rows that act saw last; what the environment paid is left out, unless it has a weight."""
        self.agent.observe(rows)
        n = len(rows["is_first"])
        rows["novelty"] = self.paid if len(self.paid) == n else np.zeros(n, np.float32)
        if not self.config.extrinsic_weight:
            rows["reward"] = np.zeros(n, np.float32)

    def update(self, replay: SequenceReplay) -> dict[str, Tensor]:
        """One gradient step of everything on a batch of the replay. On a GPU the metrics hold until the next call."""
        indices, arrays = self.agent.sample(replay, "novelty")
        metrics = dict(self.captured(**arrays))
        self.agent.after_update(replay, indices, metrics.pop("priorities"))
        return metrics

    def gradient_step(self, **arrays: Tensor) -> dict[str, Tensor]:
        """The update of the docstring above, on sequences (B, L, ...)."""
        batch = SimpleNamespace(**{"choice": None, "weight": None, **arrays})
        reward = self.reward(batch)
        metrics = self.agent.update(batch, reward)
        metrics |= self.novelty.learn(stacked(batch.frames, self.agent.frame_stack), batch.action[:, :-1], batch.mask)
        paid = torch.where(batch.mask, reward[:, :-1], torch.nan)
        metrics["intrinsic_reward"] = paid.nanmean()
        metrics["intrinsic_reward_quantiles"] = torch.nanquantile(paid, self.quantiles)
        return metrics

    def reward(self, batch: SimpleNamespace) -> Tensor:
        """What Q learns of rows (B, L), the last one's aside."""
        reward = torch.cat([batch.novelty[:, 1:], torch.zeros_like(batch.novelty[:, :1])], 1)
        return reward + self.config.extrinsic_weight * batch.reward if self.config.extrinsic_weight else reward

    def initial_errors(self, batch: SimpleNamespace, q: Tensor) -> Tensor:
        return self.agent.initial_errors(batch, self.reward(batch), q)

    def state_dict(self) -> dict[str, dict]:
        return self.agent.state_dict() | self.novelty.state_dict()

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Raises ValueError where a part is missing or unknown."""
        load_parts(self, state, self.parts)

    def load_part(self, part: str, state: dict) -> None:
        """One part, of this or of another run. Raises ValueError for a part that is none."""
        check_part(part, self.parts)
        (self.novelty if part in NoveltyReward.PARTS else self.agent).load_part(part, state)
        if part not in self.statistics:  # which are loaded in place
            self.captured.reset()
