"""Rewards that several methods share, built on the native kernels."""

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from urlfast import EpisodicMemory, RunningNormalizer, knn
from urlfast.augment import to_float
from urlfast.device import Arithmetic, adam
from urlfast.limits import check_limits
from urlfast.nets.encoders import Encoder, EncoderConfig
from urlfast.nets.heads import MLP

# APT: how far a particle is from its neighbours in a batch ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ParticleConfig:
    """The particle-entropy reward r = log(c + mean_k d) and its scale."""

    k: int = 16  # neighbours, the particle itself among them as in every release [mini_apt on Atari; urlb takes 12 on DMC]
    neighbours: Literal["mean", "kth", "random", "none"] = "mean"  # mean over the k, or the k-th alone
    # the paper's ablations: random, the distance to a particle drawn at random; none, the same positive reward for all
    c: float = 1.0  # added to the distance before the log, which keeps it finite; 1: no reward is below 0 [APT, eq. 4]
    scale: Literal["distance-mean", "distance-var", "reward-mean", "none"] = "distance-mean"  # running statistic that divides
    # distance-mean, -var: distances over their running mean (URLB's PBE) or variance (mini_apt, CIC), before the log;
    # reward-mean: the reward over its own running mean, after the log, as APT's text says
    clip: float = 0.0  # subtracted from the scaled distances, floored at 0 [urlb 0 or 1e-4, mini_apt 5e-4]

    def __post_init__(self):
        check_limits(self, k=">= 1", c="> 0", clip=">= 0")
        if self.clip and not self.scale.startswith("distance"):
            raise ValueError(f"clip: is taken from scaled distances, so it needs scale distance-mean or distance-var, got {self.scale}")


class ParticleReward:
    """How far each feature is from its nearest neighbours in its batch; the batch is its own pool."""

    def __init__(self, config: ParticleConfig, device: torch.device):
        self.config = config
        mode = {"distance-mean": "mean", "distance-var": "var", "reward-mean": "mean", "none": None}[config.scale]
        self.normalizer = RunningNormalizer(mode, clip=config.clip or None, device=str(device)) if mode else None

    def __call__(self, z: Tensor, *, update: bool = True) -> tuple[Tensor, Tensor]:
        """(reward, distance) of features z (B, d) float32, each (B,) and without gradient; one search gives both.

        distance: what the reward is made of, in the units of z. update: the running statistic takes this batch in first.
        """
        config, z = self.config, z.detach()
        if config.neighbours == "none":
            return torch.ones(len(z), device=z.device), torch.zeros(len(z), device=z.device)
        if config.neighbours == "random":
            others = torch.randint(len(z), (config.k, len(z)), device=z.device)
            distances = torch.stack([torch.linalg.vector_norm(z - z[other], dim=-1) for other in others], -1)
        else:
            distances, _ = knn(z, k=config.k)  # (B, k)
        if config.neighbours == "kth":
            distances = distances[:, -1:].contiguous()  # the statistic sees no other
        scaled = self._divided(distances, update) if config.scale.startswith("distance") else distances
        reward = torch.log(config.c + scaled.mean(-1))
        if config.scale == "reward-mean":
            reward = self._divided(reward, update)
        return reward, distances.mean(-1)

    def _divided(self, x: Tensor, update: bool) -> Tensor:
        return self.normalizer(x) if update else self.normalizer.normalize(x)

    def state_dict(self) -> dict:
        return self.normalizer.state_dict() if self.normalizer else {}

    def load_state_dict(self, state: dict) -> None:
        if self.normalizer:
            self.normalizer.load_state_dict(state)


# NGU: how new an observation is, in its episode and in all of training ------------------------------------------------
#
# Badia et al., "Never Give Up: Learning Directed Exploration Strategies" (2020); equation numbers are the paper's, the values are those
# of its table as later code repeats it. CPT pre-trains on this reward alone.


@dataclasses.dataclass(frozen=True)
class NoveltyConfig:
    """NGU's reward, and the networks that it is made of."""

    reward: Literal["ngu", "constant"] = "ngu"  # constant: 1 for every step, whatever is seen (CPT's baseline that stays alive)
    embedding: int = 32  # width of the embedding f, in which episodic novelty is measured [NGU]
    k: int = 10  # neighbours among the episode's earlier embeddings [NGU]
    capacity: int = 30_000  # embeddings in an environment's memory, then the newest replaces the oldest [NGU; half an hour has 27,000]
    cluster_distance: float = 0.008  # xi: a squared distance, in units of the running mean, up to which two embeddings are one [NGU]
    kernel_epsilon: float = 1e-4  # of the inverse kernel [NGU's code; its appendix also prints 1e-3]
    pseudo_count: float = 1e-3  # c: keeps the reward finite where nothing is near [NGU]
    max_similarity: float = 8.0  # s_m: the similarity above which the reward is 0 (out of reach where k is below 64) [NGU]
    max_modulator: float = 5.0  # L: how much lifelong novelty may multiply the episodic one, which it never lowers [NGU]
    hidden: int = 128  # width of the inverse model's hidden layer [NGU]
    rnd_features: int = 128  # outputs of the two networks of RND [NGU]
    rnd_clip: float = 5.0  # limit of RND's normalised inputs [RND]
    frames: int = 5  # of each sampled sequence, its last: from them f and RND learn [CPT, J.1]
    lr: float = 5e-4  # learning rate of Adam for f and for RND [NGU]
    adam_eps: float = 1e-4  # added to that Adam's denominator [NGU]
    weight_decay: float = 1e-5  # L2 weight on f and the inverse model [NGU]

    def __post_init__(self):
        limits = dict.fromkeys(("embedding", "k", "hidden", "rnd_features", "frames"), ">= 1")
        limits |= dict.fromkeys(("kernel_epsilon", "pseudo_count", "max_similarity", "rnd_clip", "lr", "adam_eps"), "> 0")
        check_limits(self, **limits, cluster_distance=">= 0", max_modulator=">= 1", weight_decay=">= 0")
        if self.capacity < self.k:
            raise ValueError(f"capacity: must be at least {self.k}, the neighbours k, or no reward is ever paid; got {self.capacity}")


def kernel_pseudo_count(squared: Tensor, mean_squared: Tensor | float, config: NoveltyConfig) -> Tensor:
    """Episodic novelty (N,) from squared distances (N, k) to the nearest in memory, which are infinite where it holds fewer than k.

    Eq. 2 and 3: s = sqrt(sum_i eps / (max(d_i^2 / d_m^2 - xi, 0) + eps)) + c, and the reward is 1 / s; 0 where s > s_m, and where the
    memory holds fewer than k.
    """
    c = config
    apart = (squared / (mean_squared + 1e-8) - c.cluster_distance).clamp(min=0)  # d_m^2 is 0 where a single state was seen
    similarity = (c.kernel_epsilon / (apart + c.kernel_epsilon)).sum(-1).sqrt() + c.pseudo_count
    paid = squared[:, -1].isfinite() & (similarity <= c.max_similarity)
    return torch.where(paid, 1 / similarity, 0.0)


def modulated(episodic: Tensor, alpha: Tensor, config: NoveltyConfig) -> Tensor:
    """Eq. 1: r = r_episodic * min(max(alpha, 1), L)."""
    return episodic * alpha.clamp(1.0, config.max_modulator)


class Moments:
    """Mean and population variance of all values seen, each of `shape`; float64, on their device, which is never waited for."""

    def __init__(self, shape: tuple[int, ...], device: torch.device):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean, self.squares = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))  # squares: of deviations

    def update(self, values: Tensor, counted: Tensor | None = None) -> None:
        """Takes in values (N, *shape). counted: (N,) bool, those that count; None: all."""
        # Summed from the mean so far, so that a large mean costs no digits; of pixels in float32, whose sums of 0..255 are whole at first.
        dtype = torch.float32 if values.dtype == torch.uint8 else torch.float64
        apart = values - self.mean.to(dtype)
        if counted is not None:
            apart *= counted.view(-1, *[1] * self.mean.dim())
        first, second = apart.sum(0).double(), apart.square_().sum(0).double()
        self.count += len(values) if counted is None else counted.sum()
        moved = first / self.count.clamp(min=1)
        self.mean += moved
        self.squares += second - first * moved

    @property
    def std(self) -> Tensor:
        return (self.squares / self.count.clamp(min=1)).sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """In place. Raises ValueError where the state is of another shape."""
        for name, value in vars(self).items():
            if state[name].shape != value.shape:
                raise ValueError(f"moments: {name} must have shape {tuple(value.shape)}, got {tuple(state[name].shape)}")
            value.copy_(state[name])


class NoveltyReward:
    """NGU's reward of many environments at once, and what its networks learn.

        embedding f         o -> R^32, trained to tell the action between two observations; its memory is an episode's
        RND                 how badly a trained network predicts a random one at o: what was seen often is predicted well
        reward of o         1 / sqrt(how often f(o) was there in this episode) * how new o is in training, 1..5

    It is paid to the action that led to o. The literal order of NGU's actor pays it to the action taken in o, and never for an episode's
    last observation. Frozen, it serves a policy that was trained on it: call it with learning=False, and never `learn`.
    """

    PARTS = ("embedding", "embedding_optimizer", "rnd", "rnd_optimizer", "moments")

    def __init__(self, config: NoveltyConfig, encoder: EncoderConfig, observation_shape, num_actions: int, arithmetic: Arithmetic):
        """encoder: of images (C, H, W) uint8, whose convolutions all three networks have; vectors (F,) get a hidden layer instead.

        Weights are drawn from torch's global generator. Raises ValueError for actions that are vectors: f tells numbered ones apart.
        """
        if not isinstance(num_actions, int):
            raise ValueError("actions: NGU's embedding learns to tell numbered actions apart, and this environment's are vectors")
        self.config, self.arithmetic, self.pixels, device = config, arithmetic, len(observation_shape) == 3, arithmetic.device

        def network(outputs: int) -> nn.Module:
            first = Encoder(encoder, observation_shape) if self.pixels else nn.Identity()
            width = first.num_features if self.pixels else observation_shape[0]
            made = nn.Sequential(first, MLP(width, config.hidden, 0 if self.pixels else 1, outputs))
            return made.to(device, memory_format=arithmetic.memory_format) if self.pixels else made.to(device)

        self.embedding = nn.ModuleDict(
            {
                "f": nn.Sequential(network(config.embedding), nn.ReLU()),
                "inverse": MLP(2 * config.embedding, config.hidden, 1, num_actions).to(device),
            }
        )
        self.rnd = nn.ModuleDict({"target": network(config.rnd_features).requires_grad_(False), "predictor": network(config.rnd_features)})
        c = config
        self.embedding_optimizer = adam(list(self.embedding.parameters()), c.lr, c.adam_eps, device, weight_decay=c.weight_decay)
        self.rnd_optimizer = adam(list(self.rnd["predictor"].parameters()), c.lr, c.adam_eps, device)
        self.moments = {  # of the squared distances (their mean is d_m^2), of RND's inputs and of its errors
            name: Moments(shape, device) for name, shape in (("distance", ()), ("input", tuple(observation_shape)), ("error", ()))
        }
        self.memory: EpisodicMemory | None = None  # of as many environments as are asked about

    @torch.no_grad()
    def __call__(self, observation: Tensor, is_first: Tensor, *, learning: bool = True) -> Tensor:
        """What the action that led to each environment's new observation is paid, (N,) float32: to be asked once a step.

        observation: (N, *observation_shape). is_first: (N,) bool, where an episode begins: its memory is emptied, and nothing is paid.
        The memories are those of the N environments of the call before. d_m^2 takes the k squared distances in before it divides, and
        outlasts the episodes, as it does NGU's; here all environments share it.
        learning: False leaves RND's statistics as they are. d_m^2 goes on.
        """
        c = self.config
        if c.reward == "constant":
            return (~is_first).float()
        if self.memory is None or self.memory.num_streams != len(observation):
            device = str(self.arithmetic.device)
            self.memory = EpisodicMemory(len(observation), c.capacity, c.embedding, k=c.k, device=device)
            is_first = torch.ones_like(is_first)
        if learning:
            self.moments["input"].update(observation)
        if self.pixels:  # once for all three networks
            observation = observation.contiguous(memory_format=self.arithmetic.memory_format)
        squared = self.memory.step(self.embed(observation), is_first).double().square()  # (N, k)
        full = squared[:, -1:].isfinite()
        distance, error = self.moments["distance"], self.moments["error"]
        distance.update(squared.where(full, 0.0).flatten(), full.expand_as(squared).flatten())
        wrong = self.rnd_error(observation)
        if learning:
            error.update(wrong)
        alpha = 1 + (wrong - error.mean) / (error.std + 1e-8)
        return modulated(kernel_pseudo_count(squared, distance.mean, c), alpha, c).float()

    def embed(self, observation: Tensor) -> Tensor:
        """f: (N, *observation_shape) -> (N, embedding) float32."""
        images = to_float(observation, torch.float32, self.arithmetic.memory_format) if self.pixels else observation
        return self.embedding["f"](images)

    def rnd_error(self, observation: Tensor) -> Tensor:
        """Mean squared error of RND's predictor, (N,) float32."""
        moments, clip = self.moments["input"], self.config.rnd_clip
        layout = {"memory_format": self.arithmetic.memory_format} if self.pixels else {}
        mean, scale = (m.float()[None].contiguous(**layout) for m in (moments.mean, 1 / (moments.std + 1e-8)))
        normalised = observation.to(torch.float32, copy=True, **layout).sub_(mean).mul_(scale).clamp_(-clip, clip)
        with torch.no_grad():
            target = self.rnd["target"](normalised)
        return (self.rnd["predictor"](normalised) - target).square().mean(-1)

    def learn(self, observation: Tensor, action: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """A gradient step of f and one of RND, each on the last `frames` of sequences that fill from their start.

        observation: (B, T + 1, *observation_shape). action: (B, T) int64. mask: (B, T) bool, the transitions that exist.
        """
        c = self.config
        if c.reward == "constant":
            return {}
        # Of n transitions and 5 frames:   o_{n-5}  o_{n-4}  ..  o_{n-1}  o_n
        #                                      a_{n-5}  ..            a_{n-1}       five pairs for f; RND reads the last five
        first = mask.sum(1, keepdim=True) - c.frames  # below 0 in a sequence of fewer
        at = first + torch.arange(c.frames + 1, device=mask.device)  # (B, frames + 1)
        exists = at[:, :-1] >= 0
        at, row = at.clamp(min=0), torch.arange(len(mask), device=mask.device)[:, None]
        o, a = observation[row, at], action[row, at[:, :-1]]

        def mean(loss: Tensor) -> Tensor:
            return (loss * exists).sum() / exists.sum().clamp(min=1)

        with self.arithmetic.autocast():
            z = self.embed(o.flatten(0, 1)).view(len(o), c.frames + 1, -1)
            logits = self.embedding["inverse"](torch.cat([z[:, :-1], z[:, 1:]], -1))
            wrong = self.rnd_error(o[:, 1:].flatten(0, 1)).view(exists.shape)
        inverse_loss, rnd_loss = mean(F.cross_entropy(logits.transpose(1, 2), a, reduction="none")), mean(wrong)
        for optimizer, loss in ((self.embedding_optimizer, inverse_loss), (self.rnd_optimizer, rnd_loss)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        told = mean((logits.argmax(-1) == a).float())
        return {"inverse_loss": inverse_loss.detach(), "inverse_accuracy": told, "rnd_loss": rnd_loss.detach()}

    def state_dict(self) -> dict[str, dict]:
        """{part: state}. Running episodes are not among them: they begin anew, and so do their memories."""
        state = {part: getattr(self, part).state_dict() for part in self.PARTS if part != "moments"}
        return state | {"moments": {name: moments.state_dict() for name, moments in self.moments.items()}}

    def load_part(self, part: str, state: dict) -> None:
        if part == "moments":
            for name, moments in self.moments.items():
                moments.load_state_dict(state[name])
        else:
            getattr(self, part).load_state_dict(state)
