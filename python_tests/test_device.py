"""Memory that is freed and wanted again, and the arithmetic that a device is given."""

import ctypes
import subprocess
import sys

import pytest
import torch

from urlfast import device
from urlfast.device import Arithmetic

FAULTS = """
import resource, sys
import numpy as np
from urlfast.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(8_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_kept():
    """64 MB twenty times: pages are asked for anew each time, and with `keep` no more after the first."""
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS, word], capture_output=True, text=True, check=True).stdout)
        for word in ("keep", "")
    )
    assert kept < 20 <= given_back


def test_bfloat16_is_used_where_it_is_not_emulated(monkeypatch):
    for has, auto in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(device, "has_bf16", lambda _, has=has: has)
        assert Arithmetic.choose("cpu").dtype == auto
        assert Arithmetic.choose("cpu", "fp32").dtype == torch.float32
        if has:
            assert Arithmetic.choose("cpu", "bf16").dtype == torch.bfloat16
        else:
            with pytest.raises(ValueError, match=r"^precision: bf16 needs .* which cpu has not: use fp32$"):
                Arithmetic.choose("cpu", "bf16")
    with pytest.raises(ValueError, match=r"^precision: must be auto, fp32 or bf16, got 'half'$"):
        Arithmetic.choose("cpu", "half")
