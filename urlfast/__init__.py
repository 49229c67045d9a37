"""urlfast: unsupervised pre-training for reinforcement learning on a native core."""

from urlfast.ops import LatentDynamics, RunningNormalizer, __version__, ema_update_, set_num_threads

__all__ = ["LatentDynamics", "RunningNormalizer", "__version__", "ema_update_", "set_num_threads"]
