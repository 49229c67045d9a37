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


def knn_reward(z, k=12, memory=None, *, lengths=None, reduction="mean", exponent=1.0, c=1.0, include_self=True):
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
    Returns (B,) or (S, B), float64 for float64 and float32 otherwise, in z's library, on z's device; carries no gradient. No B x M matrix
    is ever made. Deterministic, whatever the number of threads.
    Raises TypeError (no array, dtype), ValueError (shape, layout, k, lengths, reduction, exponent <= 0, c <= 0, devices; on the CPU also
    NaN or infinity in rows in use: on CUDA NaN propagates instead).
    Source: APT (Liu, Abbeel 2021), eq. 5 with exponent 1.
    """
    return _core.knn_reward(_detached(z), k, _detached(memory), lengths, reduction, exponent, c, include_self)


# normaliser -----------------------------------------------------------------------------------------------------------


# replay ---------------------------------------------------------------------------------------------------------------


# latent ---------------------------------------------------------------------------------------------------------------
