"""APS: active pre-training with successor features. APT's entropy explores, and a skill w names what each episode is to seek.

Liu, Abbeel, "APS: Active Pretraining with Successor Features" (2021). On Atari after VISR, whose learner it builds on (Hansen et al. 2020,
"Fast Task Inference with Variational Intrinsic Successor Features"); on control tasks after the URL benchmark, which its author co-wrote.

    phi(o)            features on the unit sphere of R^d, w a direction in it
    r = r_entropy + phi(o')^T w                               what drives the agent apart, and along its skill
    Q(o, a, w) = psi(o, a, w)^T w                             psi: the features still to come
    phi:  -mean phi(o')^T w                                   each skill's observations are to be told apart from others'

One update, with B transitions and the skills they were collected under:
    a step of the encoder and phi on o_{t+1}
    r_entropy among the B particles phi_net(o_{t+1}), not normalised (on the sphere it could not exceed log 3)
    vector TD (discrete):    psi(o, a, w) -> phi(o') + r_entropy w + gamma psi'(o', a*, w), which w^T makes the scalar one, as |w| = 1;
                             only it gives features that another w may read, so GPI and the regression below rest on it
    scalar TD (continuous):  psi(o, a, w)^T w -> r + gamma min_i psi'_i(o', a', w)^T w, as URLB
Transfer: w* solves phi(o_{t+1})^T w = r_t by least squares; the agent goes on with that skill, and phi stays as it is. On pixels it reads
the encoder as that was pre-trained, for Q goes on training its own, and sums over features that drift would belong to no phi.
"""

import copy
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from urlfast import Field, SequenceReplay
from urlfast.augment import AugmentConfig
from urlfast.device import Captured, Precision, adam, upload
from urlfast.intrinsic import ParticleConfig, ParticleReward
from urlfast.learners.ddpg import DDPG, DDPGConfig
from urlfast.learners.drq import DrQ, DrQConfig
from urlfast.limits import check_limits
from urlfast.methods import FREEZE, RESET, check_parts
from urlfast.methods.agent import Agent, rules, skilled
from urlfast.methods.task import Task, TaskConfig
from urlfast.nets.encoders import DMC_CONV, EncoderConfig
from urlfast.nets.heads import MLP, Actor, Twin


@dataclass(frozen=True)
class APSConfig:
    encoder: EncoderConfig = field(default_factory=EncoderConfig)  # Of images; vectors need none
    skill_dim: int = 5  # d, of phi and of w [VISR; urlb 10]
    skill_steps: int = 0  # agent steps that a skill is held; 0: the whole episode [VISR; urlb 5]
    phi_hidden: int = 512  # width of phi's hidden layers [ours; urlb 1024]
    phi_layers: int = 1  # and how many there are [ours; urlb 2]
    lr: float = 1e-4  # learning rate of Adam, encoder and phi [urlb]
    adam_eps: float = 1e-8  # added to that Adam's denominator [urlb]
    reward: ParticleConfig = field(default_factory=lambda: ParticleConfig(k=12, clip=1e-4))  # The entropy, with values of URLB
    entropy_weight: float = 1.0  # of r_entropy; 0: the skill only, an ablation of the paper
    skill_weight: float = 1.0  # of phi^T w; 0: the entropy only
    learner: Any = field(  # Q and the policy: DrQConfig, with vector TD, or DDPGConfig, with scalar TD
        default_factory=lambda: DrQConfig(tau=0.01, epsilon=0.01, epsilon_decay=0)  # as APT's
    )
    gpi: int = 10  # more skills whose psi acting may follow, where actions are numbers; 0: the skill's own alone [VISR]
    target_views: int = 1  # K of DrQ: views of the next observation, which the target averages
    n_step: int = 1  # steps to the particle, whose reward replaces those of the steps between, as in URLB [ours; urlb 3]
    gamma: float = 0.99  # discount of the reward of each later step
    batch_size: int = 32  # transitions of an update, and the particles of its entropy [as APT's; urlb 1024]
    updates_per_step: float = 2.0  # gradient steps for each agent step [as APT's; urlb 0.5]
    learning_start: int = 1600  # agent steps of uniform actions before the first update [as APT's; urlb 4000]
    replay_capacity: int = 1_000_000  # rows: a step of an environment is one; the oldest make room
    reward_clip: float | None = None  # of the environment's reward, which is stored and not read
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    precision: Precision = "auto"  # of the convolutions and hidden layers; auto: bf16 where the processor has it

    def __post_init__(self):
        check_limits(
            self,
            skill_dim=">= 1",
            skill_steps=">= 0",
            phi_hidden=">= 1",
            phi_layers=">= 1",
            lr="> 0",
            adam_eps="> 0",
            entropy_weight=">= 0",
            skill_weight=">= 0",
            gpi=">= 0",
            target_views=">= 1",
            n_step=">= 1",
            gamma="0..1",
            batch_size=">= 2",
            updates_per_step="> 0",
            learning_start=">= 0",
            replay_capacity=">= 1",
            reward_clip="> 0",
        )
        if not isinstance(self.learner, DrQConfig | DDPGConfig):
            raise ValueError(f"learner: must be DrQ or DDPG, got {type(self.learner).__name__}")
        if not 1 <= self.reward.k <= self.batch_size:
            raise ValueError(f"reward.k: must lie in 1..{self.batch_size}, the particles of a batch, got {self.reward.k}")

    @staticmethod
    def urlb() -> "APSConfig":
        """URLB's, on DDPG, for states and pixels."""
        return APSConfig(
            encoder=EncoderConfig(conv=DMC_CONV, mean=0.5),
            skill_dim=10,
            skill_steps=5,
            phi_hidden=1024,
            phi_layers=2,
            learner=DDPGConfig(),
            n_step=3,
            batch_size=1024,
            updates_per_step=0.5,
            learning_start=4000,
            augment=AugmentConfig(jitter=0.0, jitter_hue=0.0),
        )


# Networks. Their features are those of the observation with the skill appended. ---------------------------------------


class SuccessorTwin(Twin):
    """psi_1 and psi_2 of a continuous action, read by the skill: (B, F + d), (B, A) -> (2, B)."""

    def __init__(self, skill_dim: int, *sizes, **options):
        super().__init__(*sizes, outputs=skill_dim, **options)
        self.skill_dim = skill_dim

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        return (super().forward(features, action) * features[:, -self.skill_dim :]).sum(-1)


class SuccessorQ(nn.Module):
    """psi of every discrete action; called, it is Q: (B, F + d) -> (B, A)."""

    def __init__(self, num_features: int, skill_dim: int, num_actions: int, hidden: int):
        super().__init__()
        self.skill_dim, self.num_actions = skill_dim, num_actions
        self.net = MLP(num_features + skill_dim, hidden, 1, num_actions * skill_dim)

    def psi(self, features: Tensor) -> Tensor:
        """(B, A, d)"""
        return self.net(features).view(len(features), self.num_actions, self.skill_dim)

    def read(self, psi: Tensor, skill: Tensor) -> Tensor:
        """psi^T w, (B, A)."""
        return (psi @ skill[:, :, None]).squeeze(-1)

    def forward(self, features: Tensor) -> Tensor:
        return self.read(self.psi(features), features[:, -self.skill_dim :])


class SuccessorDrQ(DrQ):
    """DrQ whose values are vectors: rewards are (B, d) and every number of psi has a target of its own."""

    gpi = 0

    @torch.no_grad()
    def act(self, features: Tensor, state: None = None, explore: float = 0.0) -> tuple[np.ndarray, None]:
        """Greedy in max_i psi(o, a, z_i)^T w over w itself and `gpi` random skills z_i (VISR's GPI), but uniform with `explore`."""
        q, d = self.q, self.q.skill_dim
        observed, skill = features[:, :-d], features[:, -d:]
        others = random_skills(self.gpi, d, self.generator).to(features.device)  # (gpi, d)
        candidates = torch.cat([skill[None], others[:, None].expand(-1, len(features), -1)])  # (1 + gpi, N, d)
        rows = torch.cat([observed.expand(len(candidates), -1, -1), candidates], -1).flatten(0, 1)
        with self.arithmetic.autocast():
            values = q.read(q.psi(rows), skill.repeat(len(candidates), 1)).view(len(candidates), len(features), -1)
        action = values.amax(0).argmax(-1).cpu()
        if explore > 0:
            at_random = torch.rand(len(action), generator=self.generator) < explore
            action = torch.where(at_random, self.uniform(len(action)), action)
        return action.numpy(), None

    def error(self, batch, reward: Tensor, online, target) -> tuple[Tensor, Tensor]:
        """psi(o, a, w) - y for each view, (M, B, d), and y: vector TD where `reward` is (B, d), else the scalar one of psi^T w."""
        if reward.ndim == 1:
            return super().error(batch, reward, online, target)
        with torch.no_grad(), self.arithmetic.autocast():
            best = self.q(torch.cat([features for features, _ in target])).argmax(-1)  # (K * B,)
            psi = self.q_target.psi(torch.cat([features for _, features in target]))[torch.arange(len(best)), best]
            y = reward + batch.discount[:, None] * psi.view(len(target), len(reward), -1).mean(0)
        with self.arithmetic.autocast():
            psi = self.q.psi(torch.cat(list(online)))[torch.arange(len(online) * len(y)), batch.action.repeat(len(online))]
        return psi.view(len(online), len(y), -1) - y, y


def phi_network(config, agent: Agent) -> MLP:
    """(B, F) -> (B, d) float32, not normalised."""
    return MLP(agent.encoder.num_features, config.phi_hidden, config.phi_layers, config.skill_dim)


def random_skills(n: int, d: int, generator: torch.Generator) -> Tensor:
    """Uniform on the unit sphere; (n, d)."""
    return F.normalize(torch.randn(n, d, generator=generator), dim=-1)


def successor_learner(agent: Agent):
    """The learner that the config names, on successor features."""
    c, d, width, actions = agent.config.learner, agent.config.skill_dim, agent.encoder.num_features, agent.actions
    random = torch.Generator().manual_seed(agent.seed)  # of acting
    if isinstance(c, DrQConfig):
        learner = SuccessorDrQ(c, SuccessorQ(width, d, actions, c.hidden), actions, agent.arithmetic, random)
        learner.gpi = agent.config.gpi
        return learner
    trunk, layers = (c.feature_dim, 2) if agent.convolutions else (c.hidden, 1)
    actor = Actor(width + d, actions[0], c.hidden, layers, trunk)
    critic = SuccessorTwin(d, width + d, actions[0], c.hidden, layers, trunk, action_in_trunk=not agent.convolutions)
    return DDPG(c, actor, critic, actions[0], agent.arithmetic, random, agent.generator)


# Skills of running episodes -------------------------------------------------------------------------------------------


class Skills:
    """The skill of each environment: drawn anew when an episode begins, or every `hold` steps; or one that is fixed for all."""

    def __init__(self, dim: int, hold: int, seed: int):
        self.dim, self.hold = dim, hold
        self.generator = torch.Generator().manual_seed(seed)
        self.fixed: Tensor | None = None  # (d,), or (N, d): one for each environment
        self.now = torch.zeros(0, dim)  # (N, d)

    def fix(self, skill) -> None:
        """From here on every environment has this skill (d,), or its own of (N, d), brought to length 1.

        Raises ValueError for another shape, or a zero.
        """
        skill = torch.as_tensor(skill, dtype=torch.float32)
        if skill.ndim not in (1, 2) or skill.shape[-1] != self.dim or not skill.isfinite().all() or not skill.any(-1).all():
            raise ValueError(f"skill: must be {self.dim} finite numbers, not all of them 0, got {skill.tolist()}")
        self.fixed = F.normalize(skill, dim=-1)

    def begin(self, is_first: np.ndarray, length: np.ndarray) -> Tensor:
        """Those of the coming step, (N, d); length: steps of the running episodes."""
        n = len(is_first)
        if self.fixed is not None:
            self.now = self.fixed if self.fixed.ndim == 2 else self.fixed.repeat(n, 1)
            return self.now
        new = is_first | (length % self.hold == 0) if self.hold else is_first
        if len(self.now) != n:
            self.now, new = torch.zeros(n, self.dim), np.ones(n, bool)
        if new.any():
            self.now = torch.where(torch.from_numpy(new)[:, None], random_skills(n, self.dim, self.generator), self.now)
        return self.now

    def rows(self, n: int) -> np.ndarray:
        """The column of what is stored, float32 (n, d)."""
        return (self.now if len(self.now) == n else random_skills(n, self.dim, self.generator)).numpy()


class APS:
    TRANSFER = rules(phi=FREEZE, normalizer=RESET)

    def __init__(self, config: APSConfig, observation_shape, actions, *, device="cpu", seed: int = 0, frame_stack: int = 4):
        """observation_shape: (frame_stack * channels, height, width) of uint8 images, or (frame_stack * features,) of float32 vectors.

        actions: how many there are, or the shape (A,) of a vector in -1..1.
        Raises ValueError for what the learner cannot take.
        """
        self.config = config
        given = dict(device=device, seed=seed, frame_stack=frame_stack, make_learner=successor_learner)
        self.agent = Agent(config, tuple(observation_shape), actions, **given)
        self.device = self.agent.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.phi = phi_network(config, self.agent).to(self.device)
        self.optim = adam([*self.agent.encoder.parameters(), *self.phi.parameters()], config.lr, config.adam_eps, self.device)
        self.reward = ParticleReward(config.reward, self.device, self.agent.generator)
        self.skills = Skills(config.skill_dim, config.skill_steps, seed)
        self.quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], device=self.device)
        self.captured = {whole: Captured(self.gradient_step, self.device, (self.agent.generator,)) for whole in (True, False)}

    def make_replay(self, num_envs: int, steps: int) -> SequenceReplay:
        return self.agent.make_replay(num_envs, steps, skill=Field((self.config.skill_dim,), "float32"))

    def act(self, step, explore: bool = True) -> np.ndarray:
        return self.agent.act(step, explore, self.skills.begin(step.is_first, step.length))

    def observe(self, rows: dict[str, np.ndarray]) -> None:
        rows["skill"] = self.skills.rows(len(rows["is_first"]))

    def update(self, replay: SequenceReplay) -> dict[str, Tensor]:
        """One gradient step on a batch of the replay. On a GPU the metrics hold until the next call."""
        b = replay.sample(self.config.batch_size)
        names = ("observation", "next_observation", "action", "discount", "skill")
        metrics = self.captured[self.agent.prepare()](**{name: getattr(b, name) for name in names})
        return metrics | {"exploration": torch.tensor(self.agent.exploration)}

    def gradient_step(
        self, observation: Tensor, next_observation: Tensor, action: Tensor, discount: Tensor, skill: Tensor
    ) -> dict[str, Tensor]:
        """The update of the docstring above, on observations (B, ...) and skills (B, d); discount is gamma^m * prod(1 - terminated)."""
        c, agent = self.config, self.agent

        # phi, and with it the encoder. As in URLB's release, Q reads these features, one step of the encoder old.
        views = agent.views(next_observation, c.target_views)
        agent.encoder.train()
        following = agent.encode(agent.encoder, views)  # (K * B, F)
        agent.encoder.eval()
        with agent.arithmetic.autocast():
            phi = F.normalize(self.phi(following), dim=-1)
        phi_loss = -(phi * skill.repeat(c.target_views, 1)).sum(-1).mean()
        self.optim.zero_grad()
        phi_loss.backward()
        self.optim.step()

        # Rewards, of the first view.
        z = list(following.detach().chunk(c.target_views))
        with torch.no_grad(), agent.arithmetic.autocast():
            particles = self.phi(z[0])
        entropy, distance = self.reward(particles)
        direction = F.normalize(particles, dim=-1)
        skill_reward = (direction * skill).sum(-1)
        total = c.entropy_weight * entropy + c.skill_weight * skill_reward
        if isinstance(agent.actions, int):  # vector TD
            reward = c.skill_weight * direction + c.entropy_weight * entropy[:, None] * skill
        else:
            reward = total

        # Q: no features ask for a gradient, because the encoder learns from phi alone.
        with torch.no_grad():
            online = [agent.encode(agent.encoder, agent.views(observation, 1))]
            z_target = z if agent.encoder_target is agent.encoder else list(agent.encode(agent.encoder_target, views).chunk(c.target_views))
        pairs = list(zip(skilled(z, skill), skilled(z_target, skill), strict=True))
        learned, _ = agent.learner.update(SimpleNamespace(action=action, discount=discount), reward, skilled(online, skill), pairs)
        agent.follow()
        return learned | {
            "phi_loss": phi_loss.detach(),
            "intrinsic_reward": total.mean(),
            "entropy_reward": entropy.mean(),
            "skill_reward": skill_reward.mean(),
            "knn_distance": distance.mean(),
            "intrinsic_reward_quantiles": torch.quantile(total, self.quantiles),
        }

    @torch.no_grad()
    def intrinsic_reward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """(entropy reward (B,), particles (B, d)) of observations (B, ...), not augmented; the running statistic stays as it is."""
        with self.agent.arithmetic.autocast():
            particles = self.phi(self.agent.encode(self.agent.encoder, self.agent.plain(observation.to(self.device))))
        entropy, _ = self.reward(particles, update=False)
        return entropy, particles

    def state_dict(self) -> dict[str, dict]:
        state = self.agent.state_dict() | {
            "encoder_optimizer": self.optim.state_dict(),
            "phi": self.phi.state_dict(),
            "normalizer": self.reward.state_dict(),
        }
        state["progress"]["skills"] = self.skills.generator.get_state()
        return state

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Raises ValueError where a part is missing or unknown."""
        check_parts(state, tuple(self.state_dict()))
        own = {"encoder_optimizer": self.optim, "phi": self.phi, "normalizer": self.reward}
        for part, values in state.items():
            own[part].load_state_dict(values) if part in own else self.agent.load_part(part, values)
        self.skills.generator.set_state(state["progress"]["skills"])
        for captured in self.captured.values():
            captured.reset()


# Transfer: which skill is the task? -----------------------------------------------------------------------------------


class Regression:
    """w* of phi^T w = r over all that was seen, from its sums: nothing grows, and nothing waits for the device before a solution."""

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.gram = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # sum of phi phi^T
        self.moment = torch.zeros(dim, dtype=torch.float64, device=device)  # sum of phi r
        self.count = 0

    def add(self, phi: Tensor, reward: Tensor) -> None:
        """phi (n, d) of the observations that were reached, reward (n,) that reaching them paid."""
        phi = phi.double()
        self.gram += phi.T @ phi
        self.moment += phi.T @ reward.to(phi)
        self.count += len(phi)

    def solve(self, ridge: float = 1e-3) -> Tensor | None:
        """(d,) of length 1, on the CPU; None while no reward was seen. ridge: of the Gram matrix's mean diagonal."""
        gram, moment = self.gram.cpu(), self.moment.cpu()
        if not moment.any():
            return None
        w = torch.linalg.solve(gram + ridge * gram.diag().mean() * torch.eye(len(gram), dtype=torch.float64), moment)
        return (w / w.norm()).float()

    def release(self) -> Tensor | None:
        """What URLB's call of lstsq, with its arguments exchanged, comes to: the direction of sum phi r, blind to how phi is spread."""
        moment = self.moment.cpu()
        return (moment / moment.norm()).float() if moment.any() else None


@dataclass(frozen=True)
class APSTaskConfig(TaskConfig):
    skill_dim: int = 5  # d, as pre-trained
    skill_steps: int = 0  # agent steps that a random skill is held, until the task's is known; 0: the episode
    phi_hidden: int = 512  # width of phi's hidden layers, as pre-trained
    phi_layers: int = 1  # and how many there are, as pre-trained
    gpi: int = 10  # more skills whose psi acting may follow
    infer_at: int = 4096  # agent steps with random skills before the task's is inferred [urlb]
    infer_every: int = 10_000  # and inferred anew [ours; urlb every 5]
    regression: Literal["least-squares", "urlb"] = "least-squares"  # urlb: its call's direction, for comparison

    def __post_init__(self):
        super().__post_init__()
        check_limits(
            self,
            skill_dim=">= 1",
            skill_steps=">= 0",
            phi_hidden=">= 1",
            phi_layers=">= 1",
            gpi=">= 0",
            infer_at=">= 1",
            infer_every=">= 1",
        )

    @staticmethod
    def on(task: TaskConfig) -> "APSTaskConfig":
        """With the values of a task's config; the first steps are the skills', and updates begin with the inference."""
        values = {f: getattr(task, f) for f in TaskConfig.__dataclass_fields__}
        return APSTaskConfig(**(values | {"learning_start": 4096}))

    def after(self, pretrained: APSConfig) -> "APSTaskConfig":
        same = ("skill_dim", "skill_steps", "gpi", "phi_hidden", "phi_layers")
        return replace(super().after(pretrained), **{name: getattr(pretrained, name) for name in same})


class APSTask:
    """The environment's reward, on what APS has pre-trained: with random skills first, then with the one that explains the rewards seen."""

    parts = (*Task.parts, "phi", "phi_encoder", "regression")

    def __init__(self, config: APSTaskConfig, observation_shape, actions, *, device="cpu", seed: int = 0, frame_stack: int = 4):
        self.config = config
        self.task = Task(
            config, observation_shape, actions, device=device, seed=seed, frame_stack=frame_stack, make_learner=successor_learner
        )
        self.task.columns = (*Task.columns, "skill")
        self.agent = self.task.agent
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.phi = phi_network(config, self.agent).to(self.agent.device)
        self.phi_encoder = copy.deepcopy(self.agent.encoder).requires_grad_(False)  # as it was when phi was trained
        self.skills = Skills(config.skill_dim, config.skill_steps, seed)
        self.regression = Regression(config.skill_dim, self.agent.device)
        self.due = config.infer_at
        self.pending: tuple[np.ndarray, np.ndarray] | None = None  # rewards of the last rows, and which of them count

    def make_replay(self, num_envs: int, steps: int) -> SequenceReplay:
        return self.agent.make_replay(num_envs, steps, skill=Field((self.config.skill_dim,), "float32"))

    def act(self, step, explore: bool = True) -> np.ndarray:
        if explore:
            self.learn_task(step)
        return self.agent.act(step, explore, self.skills.begin(step.is_first, step.length), warm_up=False)

    @torch.no_grad()
    def learn_task(self, step) -> None:
        """Takes in what the last actions were paid for reaching `step`; and infers the skill anew where that is due."""
        if self.pending is not None:
            reward, left = self.pending
            counts = left & ~step.is_first
            if counts.any():
                seen = upload(step.observation[counts], self.agent.device)
                phi = F.normalize(self.phi(self.agent.encode(self.phi_encoder, self.agent.plain(seen)).float()), dim=-1)
                self.regression.add(phi, torch.from_numpy(reward[counts]))
            self.pending = None
        if self.agent.steps >= self.due:
            self.due += self.config.infer_every
            solved = self.regression.solve() if self.config.regression == "least-squares" else self.regression.release()
            if solved is None:
                found = f"no reward was seen yet: random skills go on, until step {self.due:,} at least"
            else:
                self.skills.fix(solved)
                found = f"the task's skill is {', '.join(f'{x:.2f}' for x in solved.tolist())}"
            print(f"step {self.agent.steps:,}: {found}", flush=True)

    def observe(self, rows: dict[str, np.ndarray]) -> None:
        rows["skill"] = self.skills.rows(len(rows["is_first"]))
        self.pending = rows["reward"].astype(np.float64), ~rows["is_last"]

    def update(self, replay: SequenceReplay) -> dict[str, Tensor]:
        return self.task.update(replay)

    def state_dict(self) -> dict[str, dict]:
        r = self.regression
        state = self.task.state_dict() | {"phi": self.phi.state_dict()}
        if self.agent.pixels:
            state["phi_encoder"] = self.phi_encoder.state_dict()
        state["regression"] = {"gram": r.gram, "moment": r.moment, "count": r.count, "due": self.due, "skill": self.skills.fixed}
        state["progress"]["skills"] = self.skills.generator.get_state()
        return state

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Raises ValueError where a part is missing or unknown."""
        check_parts(state, tuple(self.state_dict()))
        self.task.load_state_dict({part: values for part, values in state.items() if part in Task.parts})
        self.phi.load_state_dict(state["phi"])
        self.phi_encoder.load_state_dict(state.get("phi_encoder", {}))
        self.skills.generator.set_state(state["progress"]["skills"])
        r, saved = self.regression, state["regression"]
        r.gram, r.moment = (saved[name].to(self.agent.device, copy=True) for name in ("gram", "moment"))
        r.count, self.due = saved["count"], saved["due"]
        if saved["skill"] is not None:
            self.skills.fix(saved["skill"])

    def load_part(self, part: str, state: dict) -> None:
        """One part, of this or of a pre-trained method. Raises ValueError for a part that a task does not have."""
        if part == "phi":
            self.phi.load_state_dict(state)
            return
        self.task.load_part(part, state)
        if part == "encoder":
            self.phi_encoder.load_state_dict(state)

    def freeze(self, part: str) -> None:
        if part != "phi":  # which nothing here trains
            self.task.freeze(part)
