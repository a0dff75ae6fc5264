"""A limit on what is read in a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .block import BLOCK

REQUEST = 16
"""Blocks of a request at most: 1 MiB, with which a connection is fastest."""

_SHARE = 0.5
"""Seconds: no more than the limit gives in so long is asked for at once (but a block), or made up
for after the server was slow."""


@dataclass
class Rate:
    """Bytes per second, of all disks together; None: no limit.

    What is read is paid for beforehand, from the first request on: after ``t`` seconds no more than
    ``limit * t`` bytes have been asked for, however few they are.
    """

    limit: int | None
    clock: Callable[[], float] = time.monotonic
    _paid: float | None = field(default=None, init=False)  # the time that all requests have used up

    @property
    def request(self) -> int:
        """Blocks of a request at most."""
        if self.limit is None:
            return REQUEST
        return max(1, min(REQUEST, int(self.limit * _SHARE) // BLOCK))

    def wait(self, length: int) -> float:
        """Seconds to wait before `length` bytes may be asked for."""
        if self.limit is None:
            return 0.0
        now = self.clock()
        begun = now if self._paid is None else max(self._paid, now - _SHARE)
        self._paid = begun + length / self.limit
        return max(0.0, self._paid - now)


UNLIMITED = Rate(None)
"""As fast as it goes."""
