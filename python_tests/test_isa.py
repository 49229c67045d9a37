"""The kernel tests once more under every other instruction set that this processor has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import OTHER_ISAS, rerun_under

REPLAY = [f"test_replay.py::{name}" for name in ("test_long_rows_arrive_whole", "test_priorities_are_eta_max_plus_rest_mean")]
FILES = ["test_normalizer.py", "test_latent.py", "test_ema.py", *REPLAY]


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_kernels_under(isa):
    rerun_under(isa, *(Path(__file__).parent / name for name in FILES))


def test_an_instruction_set_that_is_not_there_is_refused():
    code = "import numpy, urlfast; urlfast.RunningNormalizer()(numpy.ones(3))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "URLFAST_ISA": "avx1024"}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "URLFAST_ISA: must name one of baseline" in done.stderr and "on this processor, got 'avx1024'" in done.stderr
