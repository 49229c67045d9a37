"""Returns of sequences, step by step in float64, as their definitions read."""

import numpy as np


def n_step_return(reward, discount, next_value, mask, n):
    G = np.zeros_like(reward, dtype=np.float64)
    for b, t in np.ndindex(reward.shape):
        weight, m = 1.0, 0
        while m < n and t + m < reward.shape[1] and (m == 0 or mask[b, t + m]):
            G[b, t] += weight * reward[b, t + m]
            weight *= discount[b, t + m]
            m += 1
        G[b, t] += weight * next_value[b, t + m - 1]
    return G


def retrace(reward, discount, next_value, q, pi, mu, mask, trace_lambda):
    G = np.zeros_like(reward, dtype=np.float64)
    for b, t in reversed(list(np.ndindex(reward.shape))):
        following = next_value[b, t]
        if t + 1 < reward.shape[1] and mask[b, t + 1]:
            c = trace_lambda * min(1.0, pi[b, t + 1] / mu[b, t + 1])
            following = following + c * (G[b, t + 1] - q[b, t + 1])
        G[b, t] = reward[b, t] + discount[b, t] * following
    return G


def peng_q_lambda(reward, discount, next_value, mask, trace_lambda):
    G = np.zeros_like(reward, dtype=np.float64)
    for b, t in reversed(list(np.ndindex(reward.shape))):
        following = next_value[b, t]
        if t + 1 < reward.shape[1] and mask[b, t + 1]:
            following = (1 - trace_lambda) * following + trace_lambda * G[b, t + 1]
        G[b, t] = reward[b, t] + discount[b, t] * following
    return G


def rescale(x, eps=1e-3):
    x = np.asarray(x, np.float64)
    return np.sign(x) * (np.sqrt(np.abs(x) + 1) - 1) + eps * x


def rescale_inverse(y, eps=1e-3):
    y = np.asarray(y, np.float64)
    return np.sign(y) * (((np.sqrt(1 + 4 * eps * (np.abs(y) + 1 + eps)) - 1) / (2 * eps)) ** 2 - 1)
