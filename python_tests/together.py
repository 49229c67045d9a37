"""Threads whose failures are not lost."""

import threading
import time


def together(*works, seconds=0.0):
    """Each work in a thread of its own, at least once, and again until `seconds` have passed or one has failed; what failed is raised."""
    end, failed = time.monotonic() + seconds, []

    def run(work):
        try:
            work()
            while time.monotonic() < end and not failed:
                work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    if failed:
        raise failed[0]
