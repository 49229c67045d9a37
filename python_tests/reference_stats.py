"""The slow, obvious float64 versions of the normaliser, the latent dynamics and the EMA of parameters."""

import numpy as np


class ReferenceNormalizer:
    """Keeps every value. Two passes over all of them whenever a scale is asked for; URLB's prior is 1e-4 values of mean 0, variance 1."""

    def __init__(self, mode, shape=(), epsilon=1e-8, clip=None, momentum=0.99):
        self.mode, self.epsilon, self.clip, self.momentum = mode, epsilon, clip, momentum
        self.rows = np.empty((0, *shape))
        self.magnitude = np.ones(shape)
        self.shape = shape

    def update(self, x):
        rows = np.asarray(x, np.float64).reshape(-1, *self.shape)
        self.rows = np.concatenate([self.rows, rows])
        self.magnitude = self.momentum * self.magnitude + (1 - self.momentum) * np.abs(rows).mean(0)

    @property
    def scale(self):
        if len(self.rows) == 0:
            return np.ones(self.shape)
        if self.mode == "ema_abs":
            return self.magnitude + self.epsilon
        n, prior = len(self.rows), 1e-4
        mean = self.rows.mean(0)
        if self.mode == "mean":
            return np.abs(mean * n / (n + prior)) + self.epsilon
        var = (prior * 1 + ((self.rows - mean) ** 2).sum(0) + mean**2 * prior * n / (n + prior)) / (n + prior)
        return var + self.epsilon if self.mode == "var" else np.sqrt(var + self.epsilon)

    def normalize(self, x):
        y = np.asarray(x, np.float64) / self.scale
        return y if self.clip is None else np.maximum(y - self.clip, 0)


def urlb_rms(batches):
    """URLB's RMS one batch after another, with the population variance: (M, S)."""
    M, S, n = 0.0, 1.0, 1e-4
    for x in batches:
        x = np.asarray(x, np.float64)
        m, delta = x.size, x.mean() - M
        M += delta * m / (n + m)
        S = (S * n + x.var() * m + delta**2 * n * m / (n + m)) / (n + m)
        n += m
    return M, S


def latent_step(z, action, noise, first, alpha, beta):
    """PALM, section 4.1, in float64: T_com then T_ema."""
    mixed = alpha * np.float64(action) + (1 - alpha) * np.float64(noise)
    return np.where(first[:, None], mixed, beta * np.float64(z) + (1 - beta) * mixed)


def ema(target, source, tau):
    return np.float64(target) + tau * (np.float64(source) - np.float64(target))
