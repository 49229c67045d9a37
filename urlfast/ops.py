"""The thin Python face of the native core. Needs NumPy alone; torch is looked for only where the caller has it already."""

from __future__ import annotations

import sys

try:
    from urlfast import _core
except ImportError as error:
    raise ImportError(
        f"urlfast's native extension could not be loaded ({error}).\n"
        "It is compiled at installation: from a checkout, run `pip install .`; after an update of Python or a move to another machine,\n"
        "run `pip install --force-reinstall --no-deps urlfast`. When working inside the checkout, mind that `urlfast/` there hides the\n"
        "installed package: run from another folder, or install with `pip install --no-build-isolation -e .`."
    ) from error

__version__: str = _core.__version__
set_num_threads = _core.set_num_threads


def _detached(array):
    """A torch tensor without its gradient history (sharing its memory); anything else as it is."""
    torch = sys.modules.get("torch")
    return array.detach() if torch is not None and isinstance(array, torch.Tensor) and array.requires_grad else array


# knn ------------------------------------------------------------------------------------------------------------------


def knn(queries, keys=None, k=12, *, lengths=None, include_self=True):
    """The k nearest rows of `keys` to each row of `queries`: Euclidean, exact, ascending, ties to the lowest index.

    queries: (B, D), or (S, B, D) for S independent problems; float16, bfloat16, float32 or float64, finite, C-contiguous; NumPy, torch,
        CuPy or JAX, on CPU or CUDA.
    keys: (M, D) or (S, M, D), like queries. None: each batch is its own pool, and a row is its own first neighbour.
    k: 1 <= k <= M.
    lengths: S host integers in 0..M, with keys (S, M, D): problem s sees keys[s, :lengths[s]] alone, and nothing is copied. Any k >= 1 is
        then accepted.
    include_self: False excludes each row from its own neighbours, by index (duplicates of it stay); then k <= B - 1. Not with keys.
    Returns (distances, indices), (B, k) or (S, B, k), in queries' library, on queries' device, without gradient: float64 for float64 and
    float32 otherwise (computed in that precision, from differences, so a large mean costs no digits); int64. Where a problem has fewer
    than k keys, rows end in infinity and -1. Deterministic, whatever the number of threads.
    Raises TypeError (no array, dtype), ValueError (shape, layout, k, lengths, devices; on the CPU also NaN or infinity in rows in use: on
    CUDA NaN propagates instead).
    """
    return _core.knn(_detached(queries), _detached(keys), k, lengths, include_self)


def knn_reward(
    z,
    k=12,
    memory=None,
    *,
    lengths=None,
    reduction="mean",
    exponent=1.0,
    c=1.0,
    include_self=True,
    normalizer=None,
    update_normalizer=True,
):
    """Particle-entropy reward: log(c + mean over the k nearest neighbours of distance ** exponent), for each row of z.

    z: (B, D), or (S, B, D) for S independent batches; float16, bfloat16, float32 or float64, finite, C-contiguous; NumPy, torch, CuPy or
        JAX, on CPU or CUDA.
    k: 1 <= k <= the rows of the pool.
    memory: (M, D) or (S, M, D), like z: the neighbours come from here. None: the batch is its own pool, and a row counts as the first of
        its own k neighbours, at distance 0, as in the released APT and URLB code.
    lengths: S host integers in 0..M, with memory (S, M, D): batch s sees memory[s, :lengths[s]] alone, and nothing is copied. The mean is
        over min(k, length) neighbours; an empty memory gives log(c). Any k >= 1 is then accepted.
    reduction: "mean" over the neighbours, or "kth": the farthest of them alone.
    include_self: False excludes each row from its own neighbours, by index; then k <= B - 1. Not with memory.
    normalizer: a RunningNormalizer of shape () on z's device. The neighbours' distances (with "kth" the k-th ones) first update it, unless
        update_normalizer is False, and are then divided by its scale, clipped if it clips, raised to the exponent and reduced.
    Returns (B,) or (S, B), float64 for float64 and float32 otherwise, in z's library, on z's device; carries no gradient. No B x M matrix
    is ever made. Deterministic, whatever the number of threads.
    Raises TypeError (no array, dtype), ValueError (shape, layout, k, lengths, reduction, exponent <= 0, c <= 0, devices, the
    normalizer's shape; on the CPU also NaN or infinity in rows in use: on CUDA NaN propagates instead).
    Source: APT (Liu, Abbeel 2021), eq. 5 with exponent 1.
    """
    return _core.knn_reward(
        _detached(z), k, _detached(memory), lengths, reduction, exponent, c, include_self, normalizer, update_normalizer
    )


# normaliser -----------------------------------------------------------------------------------------------------------


class RunningNormalizer(_core.RunningNormalizer):
    """Divides rewards or distances by a running statistic of them. It does not centre.

    mode      divides by                    as in
    "mean"    |M| + epsilon                 URLB's PBE and APS (distances, before the log); APT (rewards)
    "std"     sqrt(S + epsilon)             gymnasium's NormalizeReward, Stable-Baselines3's VecNormalize
    "var"     S + epsilon                   mini_apt and CIC, which divide by the variance
    "ema_abs" A + epsilon                   APV's StreamNorm: A <- momentum * A + (1 - momentum) * mean |x|, 1 at first

    M and S are the mean and the population variance of all values seen, with URLB's prior (M = 0, S = 1, weight 1e-4); URLB itself
    takes the sample variance of each batch. A normalizer that has seen nothing divides by 1.

    shape: () for one statistic over all values, (F,) for one per feature over the leading axes.
    clip: c takes c off after dividing and floors at 0, as URLB's PBE does (its knn_clip); None does neither.
    epsilon >= 0; momentum in [0, 1), used by "ema_abs" alone. device: where the data will be, "cpu" or "cuda[:N]".

    update(x)                 takes x (..., *shape) into the statistic
    normalize(x, out=None)    x divided by it
    normalizer(x, out=None)   both, in this order
    merge(other)              as if this one had seen the other's values too; ValueError for "ema_abs", whose average has an order
    state_dict(), load_state_dict(state)   floats, strings and lists; the statistic, not the arguments above
    scale                     what values are divided by now (NumPy float64)

    x: float16, bfloat16, float32 or float64, C-contiguous, not empty, on `device`; NumPy, torch, CuPy or JAX. Results are float64 for
    float64 and float32 otherwise, in x's library, and carry no gradient; `out` must have that dtype and may be x itself.
    The state is float64. Sums do not depend on the number of threads, nor suffer from a large mean. On the CPU, NaN or infinity in
    update(x) is a ValueError and changes nothing; normalize(x) passes them on. On CUDA nothing waits for the device, the work goes to
    the caller's current stream, and NaN or infinity enters the statistic: check what may hold it.
    Raises TypeError (no array, dtype), ValueError (everything else), naming the argument.
    """

    def __init__(self, mode="mean", *, shape=(), epsilon=1e-8, clip=None, momentum=0.99, device="cpu"):
        super().__init__(mode, (shape,) if isinstance(shape, int) else shape, epsilon, clip, momentum, device)

    def __repr__(self):
        arguments = f"{self.mode!r}, shape={self.shape}, epsilon={self.epsilon}, clip={self.clip}, momentum={self.momentum}"
        return f"RunningNormalizer({arguments}, device={self.device!r})"

    def __reduce__(self):  # for copy.deepcopy and pickle
        return _restored_normalizer, (self.mode, self.shape, self.epsilon, self.clip, self.momentum, self.device, self.state_dict())


def _restored_normalizer(mode, shape, epsilon, clip, momentum, device, state):
    normalizer = RunningNormalizer(mode, shape=shape, epsilon=epsilon, clip=clip, momentum=momentum, device=device)
    normalizer.load_state_dict(state)
    return normalizer


# replay ---------------------------------------------------------------------------------------------------------------


# latent ---------------------------------------------------------------------------------------------------------------
