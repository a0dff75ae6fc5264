"""Where the folders of test runs are: in memory, where this machine has the room."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

MEMORY = Path("/dev/shm")
ROOM = 4 << 30
"""Bytes that have to be free, in the file system and in the machine's memory."""


def scratch() -> Path:
    """The folder for workspaces: a file system in memory, or else the temporary directory.

    Half of what tests on a disk wait for is its flushes, and nothing that they prove is about the
    disk.  The environment variable TMPDIR decides without a look at the memory.
    """
    chosen = Path(tempfile.gettempdir())
    if "TMPDIR" in os.environ or not os.access(MEMORY, os.R_OK | os.W_OK | os.X_OK):
        return chosen
    system = os.statvfs(MEMORY)
    if system.f_flag & os.ST_NOEXEC or system.f_bavail * system.f_frsize < ROOM:
        return chosen
    return MEMORY if _available() >= ROOM else chosen


def _available() -> int:
    """Bytes of memory that new processes can have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return int(found["MemAvailable"].split()[0]) << 10
