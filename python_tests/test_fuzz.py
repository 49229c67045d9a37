"""The short form of stress/fuzz.py: some random calls of every native function and method, in processes of their own."""

import os
import subprocess
import sys

FUZZ = os.path.join(os.path.dirname(__file__), os.pardir, "stress", "fuzz.py")


def test_every_call_ends_in_a_result_or_a_clear_error():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, FUZZ, "--calls", "200", "--seed", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
