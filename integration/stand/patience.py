"""How much longer than on an ordinary machine to wait for something before giving it up."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time

USUAL = 0.03
"""Seconds in which an ordinary machine starts and ends a Python."""

LIMITS = (1.0, 20.0)


@functools.cache
def factor() -> float:
    """1 on an ordinary machine, more on one that is emulated; measured at the first call.

    The environment variable CKPTMGR_TEST_PATIENCE decides without a measurement.
    """
    chosen = os.environ.get("CKPTMGR_TEST_PATIENCE")
    return min(max(measured(), LIMITS[0]), LIMITS[1]) if chosen is None else float(chosen)


def measured() -> float:
    """How slow this machine is now, whatever was measured before; without limits."""
    begun = time.monotonic()
    command = [sys.executable, "-I", "-S", "-c", "pass"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return (time.monotonic() - begun) / USUAL


def patiently(seconds: float) -> float:
    """What `seconds` of an ordinary machine are on this one."""
    return seconds * factor()


if __name__ == "__main__":
    sys.stdout.write(f"{factor():.1f}\n")
