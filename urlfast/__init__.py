"""urlfast: unsupervised pre-training for reinforcement learning on a native core."""

from urlfast.ops import __version__, knn, knn_reward, set_num_threads

__all__ = ["__version__", "knn", "knn_reward", "set_num_threads"]
