"""Rewards that several methods share, built on the native kernels."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from urlfast import RunningNormalizer, knn
from urlfast.limits import check_limits


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

    def __init__(self, config: ParticleConfig, device: torch.device, generator: torch.Generator | None = None):
        """generator: on the device, draws the neighbours that are random; None: torch's own."""
        self.config, self.generator = config, generator
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
            others = torch.randint(len(z), (config.k, len(z)), device=z.device, generator=self.generator)
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
