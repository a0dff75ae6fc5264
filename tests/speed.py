"""How fast this machine is, for what is said about processor time."""

from __future__ import annotations

import time

USUAL = 0.05
"""Seconds of processor time that an ordinary machine takes for the sum below."""


def slowness() -> float:
    """How many times slower than an ordinary machine this one is just now; at least 1."""
    started = time.process_time()
    sum(number * number for number in range(1_000_000))
    return max(1.0, (time.process_time() - started) / USUAL)
