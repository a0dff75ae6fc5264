"""Medians of calls that run in turns."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")


class Clock:
    """The times that calls took, by what they are called."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def time(self, what: str, call: Callable[[], Value]) -> Value:
        """Run `call` and remember how long it took."""
        start = time.perf_counter()
        value = call()
        self._seconds[what].append(time.perf_counter() - start)
        return value

    def median(self, what: str) -> float:
        """Seconds."""
        return statistics.median(self._seconds[what])


def in_turns(clock: Clock, calls: Mapping[str, Callable[[], object]], rounds: int) -> None:
    """Time each of `calls` once a round; every other round goes backwards."""
    names = list(calls)
    for _ in range(rounds):
        for name in names:
            clock.time(name, calls[name])
        names.reverse()


@dataclass(frozen=True)
class Row:
    """One comparison.

    ours, bare -- medians in seconds; `bare` is None where there is nothing to compare with
    against -- what `bare` is
    aim -- a ratio, or seconds where there is no `bare`; None: told for the record
    """

    what: str
    ours: float
    against: str = ""
    bare: float | None = None
    aim: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times as long ours takes."""
        return None if self.bare is None else self.ours / self.bare
