"""urlfast: unsupervised pre-training for reinforcement learning on a native core."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)  # inside a checkout, the Python files are the checkout's and the extension is the installed one

from urlfast.ops import (
    Batch,
    EpisodicMemory,
    Field,
    LatentDynamics,
    RunningNormalizer,
    SequenceReplay,
    __version__,
    ema_update_,
    get_num_threads,
    knn,
    knn_reward,
    set_num_threads,
)

__all__ = [
    "Batch",
    "EpisodicMemory",
    "Field",
    "LatentDynamics",
    "RunningNormalizer",
    "SequenceReplay",
    "__version__",
    "ema_update_",
    "get_num_threads",
    "knn",
    "knn_reward",
    "set_num_threads",
]
