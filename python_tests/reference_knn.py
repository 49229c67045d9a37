"""The nearest neighbours and the particle-entropy reward, slow and obvious, in float64."""

import numpy as np


def knn(queries, keys=None, k=12, include_self=True):
    """(B, D) against (M, D): distances and indices (B, k), ascending, ties to the lowest index."""
    queries = np.asarray(queries, np.float64)
    pool = queries if keys is None else np.asarray(keys, np.float64)
    distance = np.stack([np.sqrt(((q - pool) ** 2).sum(-1)) for q in queries])
    if not include_self:
        np.fill_diagonal(distance, np.inf)
    index = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distance, index, 1), index


def reward(distances, reduction="mean", exponent=1.0, c=1.0, scale=1.0, clip=None):
    """Of one row's distances, ascending; none of them gives log(c)."""
    d = np.asarray(distances, np.float64)
    if d.size == 0:
        return np.log(c)
    d = (d[-1:] if reduction == "kth" else d) / scale
    if clip is not None:
        d = np.maximum(d - clip, 0)
    return np.log(c + (d**exponent).mean())


def knn_reward(z, k=12, memory=None, lengths=None, include_self=True, **how):
    z = np.asarray(z, np.float64)
    if z.ndim == 3:
        lengths = [None] * len(z) if lengths is None else lengths
        rows = [None] * len(z) if memory is None else [m[:n] for m, n in zip(memory, lengths, strict=True)]
        return np.stack([knn_reward(one, k, m, include_self=include_self, **how) for one, m in zip(z, rows, strict=True)])
    distances, _ = knn(z, memory, k, include_self)
    return np.array([reward(d, **how) for d in distances])
