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


class LatentDynamics(_core.LatentDynamics):
    """PALM's environment in the latent space of a generator G: actions and noise are mixed, and smoothed over time.

        z'  = alpha * a_t + (1 - alpha) * noise          noise ~ N(0, I), fresh in every row
        z_0 = z'                                         with an action drawn uniformly from [-1, 1): none was chosen yet
        z_t = beta * z_{t-1} + (1 - beta) * z'
        class: uniform over num_classes, drawn at an episode's first row and fixed until its last

    num_envs, latent_dim, num_classes >= 1 (num_classes=1 for a generator without classes); alpha, beta in [0, 1].
    episode_length: steps, so an episode has episode_length + 1 rows. All environments open and close theirs together.
    seed: 0..2^64-1. Draws are counted, not carried: they depend on the seed, the row, the environment and the coordinate, neither
    on threads nor on the device, where the values agree to rounding.
    device: "cpu", "cuda[:N]" or a torch.device; the latter makes reset() return torch tensors from the start.

    reset() and step(actions) return (z, class, is_first, is_last): float32 (num_envs, latent_dim), int64 and two bool (num_envs,).
    After a row with is_last the next step ignores its actions and shows an episode's first row (is_first), as everywhere in urlfast.
    The arrays are the state itself: they stay valid until the next reset, step or load_state_dict, which overwrite them, and must not
    be written to (NumPy's are read-only). They come in the library of the last actions: torch tensors, CuPy arrays, otherwise NumPy
    arrays on the CPU and DLPack exporters on CUDA.
    actions: float32 (num_envs, latent_dim), C-contiguous, on `device`; taken as they are, NaN included.
    One kernel does a step; on CUDA it goes to the caller's current stream and nothing waits for it. reset draws anew; it does not go
    back to the seed's first episode.
    state_dict(), load_state_dict(state): ints, a list and bytes, for dynamics of the same sizes and seed.
    Raises TypeError and ValueError, naming the argument, and RuntimeError for a step before the first reset.
    """

    def __init__(self, num_envs, latent_dim, num_classes=1, *, alpha=0.5, beta=0.95, episode_length=100, seed=0, device="cpu"):
        super().__init__(num_envs, latent_dim, num_classes, alpha, beta, episode_length, seed, device)
        self._arguments = (num_envs, latent_dim, num_classes, alpha, beta, episode_length, seed, device)

    def __reduce__(self):  # for copy.deepcopy and pickle
        return _restored_dynamics, (self._arguments, self.state_dict())


def _restored_dynamics(arguments, state):
    *sizes, alpha, beta, episode_length, seed, device = arguments
    dynamics = LatentDynamics(*sizes, alpha=alpha, beta=beta, episode_length=episode_length, seed=seed, device=device)
    dynamics.load_state_dict(state)
    return dynamics


def ema_update_(targets, sources, tau):
    """targets[i] += tau * (sources[i] - targets[i]) for every i, in place, in one pass over all of them.

    targets, sources: lists or other iterables of arrays, as many, such as `module.parameters()`; requires_grad does not matter. Pairs
    agree in shape, dtype (float16, bfloat16, float32, float64), device and memory layout, which is any dense one: channels_last is,
    a slice is not. Empty lists are allowed and do nothing. Targets must not share memory with each other.
    tau: in [0, 1]; 1 copies the sources. Integer buffers, BatchNorm's counters among them, are the caller's to copy.
    Everything is checked before anything is written; TypeError and ValueError name the array as targets[i] or sources[i].
    On CUDA the work goes to the caller's current stream, a launch per hundred tensors, and nothing waits for it.
    """
    _core.ema_update_(targets, sources, tau)
