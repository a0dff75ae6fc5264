"""A process whose first thread has ended and another has not: so is, for a while, who is killed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from integration.stand.patience import patiently

_PROGRAM = """
import ctypes, os, sys, threading
opened = [os.open(path, os.O_RDWR) for path in sys.argv[1:]]
threading.Thread(target=sys.stdin.read).start()
ctypes.CDLL(None).pthread_exit(None)
"""


@contextlib.contextmanager
def without_first_thread(*opened: Path) -> Iterator[int]:
    """Such a process, its id; it has files open for writing, and ends with the block."""
    command = [sys.executable, "-c", _PROGRAM, *opened]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        stat = Path(f"/proc/{process.pid}/stat")
        deadline = time.monotonic() + patiently(20)
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline, "its first thread goes on"
            time.sleep(0.02)
        yield process.pid
