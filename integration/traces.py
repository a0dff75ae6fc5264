"""What a run has not cleared away: processes, and the mounts that they keep."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def naming(folder: Path) -> list[int]:
    """Processes whose command line names a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.fsencode(folder) in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def holding(mounts: Path) -> list[int]:
    """Processes in a mount namespace that is not ours: as long as there is one, its mounts are.

    mounts -- where /proc/PID/ns/mnt points to
    """
    if mounts == Path("/proc/self/ns/mnt").readlink():
        return []
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "ns/mnt").readlink() == mounts:
                found.append(int(process.name))
    return found
