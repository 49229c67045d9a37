"""What the device decides: the arithmetic of the networks, their memory layout, and whether an update is captured."""

import ctypes
import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Precision = Literal["auto", "fp32", "bf16"]


def has_bf16(device: torch.device) -> bool:
    """True where bfloat16 products are done by the hardware (AVX512-BF16, AMX, Ampere and newer), so that they are faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def keep_freed_memory() -> None:
    """From here on this process keeps the memory it frees, for its next use, instead of handing it back to the system.

    An update frees and asks again for the same tens of megabytes, and each time the system would give fresh pages, one fault at a time.
    For processes whose one purpose is training. Only glibc is asked; elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**30)


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """`array` on the device. On a GPU by way of pinned memory, so that the host waits for nothing; on a CPU it is the array's memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def fetch(tensor: Tensor) -> Tensor:
    """`tensor` on the host. From a GPU it is still on its way, and there when the host has next waited for the stream, as `cpu()` does."""
    return tensor.to("cpu", non_blocking=True)


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Where and how networks compute. Parameters, optimiser state, losses and distances are float32 in every case."""

    device: torch.device
    dtype: torch.dtype  # of convolutions and hidden layers
    memory_format: torch.memory_format

    @staticmethod
    def choose(device: str | torch.device, precision: Precision = "auto") -> "Arithmetic":
        """Raises ValueError for a precision that this device can only emulate."""
        device = torch.device(device)
        if precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision: must be auto, fp32 or bf16, got {precision!r}")
        if precision == "bf16" and not has_bf16(device):
            raise ValueError(f"precision: bf16 needs AVX512-BF16, AMX or a GPU of compute capability 8.0, which {device} has not: use fp32")
        bf16 = precision != "fp32" and has_bf16(device)
        return Arithmetic(device, torch.bfloat16 if bf16 else torch.float32, torch.channels_last)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def adam(parameters: list[Tensor], lr: float, eps: float, device: torch.device, *, weight_decay: float = 0.0) -> torch.optim.Adam:
    """Adam in one kernel for all parameters, its step count on the device so that it can be captured. weight_decay: L2, in the gradient."""
    capturable = device.type == "cuda"
    optim = torch.optim.Adam(parameters, lr=lr, eps=eps, weight_decay=weight_decay, fused=True, capturable=capturable)
    own = {name: value for name, value in optim.param_groups[0].items() if name != "params"}

    def loaded(optim) -> None:
        optim.param_groups[0].update(own)  # a state of another device brings its flag along
        for parameter, values in optim.state.items():
            shapes = {name: tuple(value.shape) for name, value in values.items()}
            if shapes != {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}:
                raise ValueError(f"optimizer: the state of a parameter of shape {list(parameter.shape)} has {shapes}")

    optim.register_load_state_dict_post_hook(loaded)
    return optim


class Captured:
    """An update as a CUDA graph: `function(**tensors) -> {name: tensor}` is launched as one, without Python between its kernels.

    The function must work on the tensors it is given and on state that stays where it is (parameters, optimiser state, generators), and
    must not wait for the device. Its results live in the graph's own memory: they hold until the next call, so read or clone them before.
    On a CPU the function is simply called.
    """

    WARM_UP = 3  # eager calls before the capture: lazy initialisation (cuDNN plans, optimiser state) must not be captured

    def __init__(self, function: Callable[..., dict[str, Tensor]], device: torch.device, generators: tuple[torch.Generator, ...] = ()):
        self.function, self.device, self.generators = function, device, generators
        # Of warm-up and capture alike: autograd adds gradients up on the stream of the first backward pass.
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.reset()

    def reset(self) -> None:
        """Forgets the graph: needed after state was replaced by other tensors, as loading an optimiser's state does."""
        self.calls, self.graph, self.outputs = 0, None, {}
        self.inputs: dict[str, Tensor] = {}  # where the graph reads
        self.staging: list[tuple[dict[str, Tensor], torch.cuda.Event]] = []  # pinned copies, and when the device has read them

    def __call__(self, **arrays: np.ndarray) -> dict[str, Tensor]:
        """One update on these NumPy arrays, which are the caller's again at once."""
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.device.type != "cuda":
            return self.function(**batch)
        with torch.cuda.device(self.device):
            self.upload(batch)
            self.calls += 1
            if self.calls <= self.WARM_UP:
                self.side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.side):
                    outputs = self.function(**self.inputs)
                torch.cuda.current_stream().wait_stream(self.side)
                return outputs
            if self.graph is None:
                self.capture()
            self.graph.replay()
            return self.outputs

    def capture(self) -> None:
        """Records the function; nothing runs."""
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)  # replays advance it, as eager calls would
        # What other threads do meanwhile (a logger that reads a metric, a checkpoint) is not this graph's concern.
        with torch.cuda.graph(graph, stream=self.side, capture_error_mode="thread_local"):
            self.outputs = self.function(**self.inputs)
        self.graph = graph

    def upload(self, batch: dict[str, Tensor]) -> None:
        """Into `inputs`, by way of pinned memory: a copy from pageable memory would wait for all work before it."""
        if not self.inputs:
            self.inputs = {name: torch.empty_like(value, device=self.device) for name, value in batch.items()}
            for _ in range(2):
                self.staging.append(({name: torch.empty_like(value, pin_memory=True) for name, value in batch.items()}, torch.cuda.Event()))
        pinned, read = self.staging[self.calls % 2]
        read.synchronize()  # of the call before the last: it waits only where the host is two updates ahead
        for name, value in batch.items():
            pinned[name].copy_(value)
            self.inputs[name].copy_(pinned[name], non_blocking=True)
        read.record()
