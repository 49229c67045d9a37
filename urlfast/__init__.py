"""urlfast: unsupervised pre-training for reinforcement learning on a native core."""

from urlfast.ops import RunningNormalizer, __version__, knn, knn_reward, set_num_threads

__all__ = ["RunningNormalizer", "__version__", "knn", "knn_reward", "set_num_threads"]
