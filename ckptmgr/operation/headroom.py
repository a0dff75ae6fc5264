"""The room that QEMU has for what the guest overwrites while its disks are read."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import OperationFailed

RESERVE = 128 << 20
"""Bytes that must stay free where QEMU keeps what the guest overwrites: without room there, it
would fail the guest's own write."""

_INTERVAL = 0.25
"""Seconds between two looks."""


@dataclass
class Headroom:
    """Looked at while the disks of a domain are read.

    domain -- its name
    folder -- where QEMU keeps what the guest overwrites
    disks -- bytes of the disks that are read, as far as known: no more can be overwritten
    """

    domain: str
    folder: Path
    disks: int
    _looked: float = 0.0

    def look(self) -> None:
        """Raises OperationFailed before there is no room left; costs nothing if asked often."""
        now = time.monotonic()
        if now - self._looked < _INTERVAL:
            return
        self._looked = now
        try:
            found = os.statvfs(self.folder)
        except OSError:
            return  # the domain ended; the reading will say so
        reserve = min(RESERVE, self.disks or RESERVE)
        if found.f_bavail * found.f_frsize < reserve:
            raise OperationFailed(
                f"{self.folder}, where QEMU keeps what the guest overwrites while domain "
                f"{self.domain!r} is backed up, has less than {max(1, reserve >> 20)} MiB left",
                hint="free some space there, or set socket_directory in ckptmgr.toml",
            )
