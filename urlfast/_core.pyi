"""
urlfast's native core; use it through the functions of `urlfast`.
"""

from __future__ import annotations

import collections.abc
import typing

import typing_extensions

__all__: list[str] = [
    "DeviceArray",
    "EpisodicMemory",
    "LatentDynamics",
    "Normalizer",
    "ReplayBuffers",
    "RunningNormalizer",
    "SequenceReplay",
    "build_info",
    "crc32c",
    "ema_update_",
    "knn",
    "knn_reward",
    "num_threads",
    "set_num_threads",
]

class DeviceArray:
    """
    An array on a CUDA device, for any library that speaks DLPack.
    """
    def __dlpack__(
        self, *, stream: typing.Any = None, max_version: typing.Any = None, dl_device: typing.Any = None, copy: typing.Any = None
    ) -> typing_extensions.CapsuleType: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    @property
    def __cuda_array_interface__(self) -> dict: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple: ...

class EpisodicMemory:
    def __init__(
        self,
        num_streams: typing.SupportsInt | typing.SupportsIndex,
        capacity: typing.SupportsInt | typing.SupportsIndex,
        dim: typing.SupportsInt | typing.SupportsIndex,
        k: typing.SupportsInt | typing.SupportsIndex,
        device: typing.Any,
    ) -> None: ...
    def lengths(self) -> list[int]:
        """
        Rows held by each stream; on CUDA this waits for the device.
        """
    def load_state_dict(self, state: dict) -> None: ...
    def state_dict(self) -> dict:
        """
        Lengths, and all rows, oldest first (NumPy); on CUDA this waits.
        """
    def step(self, embeddings: typing.Any, reset: typing.Any) -> typing.Any:
        """
        Distances (num_streams, k) to what each stream holds, ascending, ending in infinity where it holds fewer; then appends.
        """
    @property
    def capacity(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def num_streams(self) -> int: ...

class Normalizer:
    """
    What knn_reward needs of a RunningNormalizer.
    """

class RunningNormalizer(Normalizer):
    def __call__(self, x: typing.Any, *, out: typing.Any = None) -> typing.Any:
        """
        update(x), then normalize(x, out=out).
        """
    def __init__(
        self,
        mode: str,
        shape: typing.Any,
        epsilon: typing.SupportsFloat | typing.SupportsIndex,
        clip: typing.SupportsFloat | typing.SupportsIndex | None,
        momentum: typing.SupportsFloat | typing.SupportsIndex,
        device: typing.Any,
    ) -> None: ...
    def load_state_dict(self, state: dict) -> None:
        """
        Continues from a state_dict of the same mode and shape.
        """
    def merge(self, other: typing.Any) -> None:
        """
        Takes what another normalizer of the same mode and shape has seen.
        """
    def normalize(self, x: typing.Any, *, out: typing.Any = None) -> typing.Any:
        """
        x (..., *shape) divided by the statistic, which does not change; into `out` where one is given, which may be x.
        """
    def state_dict(self) -> dict:
        """
        The statistic as floats, strings and lists; on CUDA this waits for the device.
        """
    def update(self, x: typing.Any) -> None:
        """
        Takes the values of x (..., *shape) into the statistic.
        """
    @property
    def clip(self) -> typing.Any: ...
    @property
    def device(self) -> str: ...
    @property
    def epsilon(self) -> float: ...
    @property
    def mode(self) -> str: ...
    @property
    def momentum(self) -> float: ...
    @property
    def scale(self) -> typing.Any:
        """
        What values are divided by now, float64 of shape `shape`; on CUDA this waits for the device.
        """
    @property
    def shape(self) -> tuple: ...

class ReplayBuffers:
    """
    The arrays one batch is written to.
    """
    @property
    def arrays(self) -> dict: ...
    @property
    def batch(self) -> int: ...

class SequenceReplay:
    """
    What urlfast.SequenceReplay stands on.
    """
    @staticmethod
    def stacks(frames: typing.Any, stack: typing.SupportsInt | typing.SupportsIndex) -> DeviceArray: ...
    def __init__(
        self,
        capacity: typing.SupportsInt | typing.SupportsIndex,
        fields: collections.abc.Sequence[
            tuple[str, collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], str, typing.SupportsInt | typing.SupportsIndex]
        ],
        *,
        num_streams: typing.SupportsInt | typing.SupportsIndex,
        sequence_length: typing.SupportsInt | typing.SupportsIndex | None,
        stride: typing.SupportsInt | typing.SupportsIndex,
        burn_in: typing.SupportsInt | typing.SupportsIndex,
        n_step: typing.SupportsInt | typing.SupportsIndex | None,
        gamma: typing.SupportsFloat | typing.SupportsIndex | None,
        frame_stack: typing.SupportsInt | typing.SupportsIndex | None,
        cross_episodes: bool,
        priority_exponent: typing.SupportsFloat | typing.SupportsIndex,
        importance_exponent: typing.SupportsFloat | typing.SupportsIndex,
        eta: typing.SupportsFloat | typing.SupportsIndex,
        storage: str,
        path: str,
        device: typing.Any,
        seed: typing.SupportsInt | typing.SupportsIndex,
        expected_rows: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def add(self, rows: dict, streams: typing.Any) -> None: ...
    def bytes(self) -> int: ...
    def capacity(self) -> int: ...
    def close(self) -> None: ...
    def empty(self, batch: typing.SupportsInt | typing.SupportsIndex) -> ReplayBuffers: ...
    def into(self, batch: typing.SupportsInt | typing.SupportsIndex, arrays: dict) -> ReplayBuffers: ...
    def layout(self, batch: typing.SupportsInt | typing.SupportsIndex) -> list: ...
    def load_rows(
        self,
        path: str,
        begin: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        end: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        size: typing.SupportsInt | typing.SupportsIndex,
        crc: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def load_state(
        self, path: str, size: typing.SupportsInt | typing.SupportsIndex, crc: typing.SupportsInt | typing.SupportsIndex
    ) -> None: ...
    def sample(self, buffers: ReplayBuffers) -> None: ...
    def sampleable(self) -> int: ...
    def save(
        self, rows_path: str, state_path: str, begin: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]
    ) -> tuple: ...
    def size(self) -> int: ...
    def stale_updates(self) -> int: ...
    def totals(self) -> tuple[int, int]: ...
    def update_priorities(self, indices: typing.Any, td: typing.Any, mask: typing.Any) -> None: ...
    @property
    def closed(self) -> bool: ...

class LatentDynamics:
    def __init__(
        self,
        num_envs: typing.SupportsInt | typing.SupportsIndex,
        latent_dim: typing.SupportsInt | typing.SupportsIndex,
        num_classes: typing.SupportsInt | typing.SupportsIndex,
        alpha: typing.SupportsFloat | typing.SupportsIndex,
        beta: typing.SupportsFloat | typing.SupportsIndex,
        episode_length: typing.SupportsInt | typing.SupportsIndex,
        seed: typing.SupportsInt | typing.SupportsIndex,
        device: typing.Any,
    ) -> None: ...
    def load_state_dict(self, state: dict) -> None:
        """
        Continues from a state_dict of the same sizes and seed.
        """
    def reset(self) -> typing.Any:
        """
        Opens an episode in every environment: (z, class, is_first, is_last).
        """
    def state_dict(self) -> dict:
        """
        The process as ints, a list and bytes; on CUDA this waits for the device.
        """
    def step(self, actions: typing.Any) -> typing.Any:
        """
        The next row of every environment: (z, class, is_first, is_last).
        """
    @property
    def device(self) -> str: ...
    @property
    def episode_length(self) -> int: ...
    @property
    def latent_dim(self) -> int: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def num_envs(self) -> int: ...

def build_info() -> dict:
    """
    What was compiled and what this machine can run.
    """

def crc32c(data: bytes) -> int:
    """
    CRC-32C of bytes, as saved replays use it.
    """

def ema_update_(targets: typing.Any, sources: typing.Any, tau: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
def knn(
    queries: typing.Any, keys: typing.Any, k: typing.SupportsInt | typing.SupportsIndex, lengths: typing.Any, include_self: bool
) -> tuple: ...
def knn_reward(
    z: typing.Any,
    k: typing.SupportsInt | typing.SupportsIndex,
    memory: typing.Any,
    lengths: typing.Any,
    reduction: str,
    exponent: typing.SupportsFloat | typing.SupportsIndex,
    c: typing.SupportsFloat | typing.SupportsIndex,
    include_self: bool,
    normalizer: typing.Any,
    update_normalizer: bool,
) -> typing.Any: ...
def num_threads() -> int: ...
def set_num_threads(n: typing.SupportsInt | typing.SupportsIndex) -> None: ...

__version__: str = "0.1.0"
