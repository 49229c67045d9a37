"""What tests share: devices, instruction sets, the way of an array there and back; and a Ctrl-C that is heard.

A test body runs on every device by `@pytest.mark.parametrize("device", DEVICES)`, and its file once more under every other
instruction set where test_isa.py lists it.
"""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from urlfast import _core

_cuda = torch.cuda.is_available() and _core.build_info()["cuda_usable"]
_reason = "torch sees no CUDA device" if not torch.cuda.is_available() else _core.build_info()["cuda_reason"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not _cuda, reason=_reason))]
# URLFAST_ISA is read once, at load: another instruction set needs another process, which must not do the same again
OTHER_ISAS = [] if os.environ.get("URLFAST_ISA") else [n for n in _core.build_info()["isa_available"] if n != _core.build_info()["isa"]]


def on(device, array):
    """A NumPy array as it is for "cpu"; as a torch tensor on the device otherwise."""
    return array if device == "cpu" else torch.from_numpy(np.ascontiguousarray(array)).to(device)


def to_numpy(array):
    if isinstance(array, _core.DeviceArray):
        array = torch.from_dlpack(array)
    return array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


def rerun_under(isa, *files):
    """Run test files, but for what they say of wrong arguments, in a process whose kernels are those of `isa`; fails with its output."""
    env = {**os.environ, "URLFAST_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not arguments and not slow", *map(str, files)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"under URLFAST_ISA={isa}:\n{done.stdout[-5000:]}{done.stderr[-2000:]}"


@pytest.fixture
def interruptible():
    """A process started with SIGINT ignored, as by a shell in the background, would not hear of it, nor would its own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
