"""urlfast: unsupervised pre-training for reinforcement learning on a native core."""

from urlfast.ops import Field, SequenceReplay, __version__, set_num_threads

__all__ = ["Field", "SequenceReplay", "__version__", "set_num_threads"]
