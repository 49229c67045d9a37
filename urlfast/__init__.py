"""urlfast: unsupervised pre-training for reinforcement learning on a native core."""

from urlfast.ops import RunningNormalizer, __version__, set_num_threads

__all__ = ["RunningNormalizer", "__version__", "set_num_threads"]
