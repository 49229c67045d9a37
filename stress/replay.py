"""Replay under fire, the long forms; the short ones are in python_tests/test_replay.py.

python stress/replay.py updates [--count 100000000]    priority updates, their totals held against integers
python stress/replay.py beside [--seconds 600]         one thread adds, one samples; every frame of every batch is checked
python stress/replay.py kills [--count 400]            kill -9 at random moments of saves, over turns of the ring; a dead scratch file
"""

import argparse
import os
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "python_tests"))
import replay_fire as fire


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["updates", "beside", "kills"])
    parser.add_argument("--count", type=int)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    begin = time.monotonic()
    if given.what == "updates":
        print(f"{fire.update_against_integers(given.count or 10**8, seed=given.seed):,} updates: every total exact", end="")
    elif given.what == "beside":
        for name, mode in (("windows", fire.WINDOWS), ("sequences", fire.SEQUENCES)):
            batches, added = fire.add_beside_sample(mode, given.seconds / 2)
            print(f"{name}: {batches:,} batches of 64 checked beside {added:,} rows added", end="; ", flush=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows, unfinished = fire.kill_in_saves(folder, given.count or 400, seed=given.seed)
        with tempfile.TemporaryDirectory() as folder:
            fire.kill_beside_scratch(folder)
        print(f"{given.count or 400} kills, {unfinished} in the middle of a save: each time the last one was whole; {rows} rows", end="")
    print(f" ({time.monotonic() - begin:.0f} s)")


if __name__ == "__main__":
    main()
