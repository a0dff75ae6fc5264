"""Killing a QEMU so that libvirt finds it gone, and not about to go.

Where there still is a process when libvirt comes to end a machine, it sends a signal and looks
again after 0.2 s (7.0 to 11.3); and it comes as soon as it sees the end of the monitor's socket,
which is a moment before the process can be reaped.  So the socket's other end is kept until then.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from .patience import patiently
from .workspace import birth

PIDFD_GETFD = 438
"""Number of the system call; it is the same on all processors that are not older than it."""

ENDED = 60.0
"""Seconds in which a process that was killed ends."""

REAPED = 1.0
"""Seconds in which whoever is the parent reaps it then; if it does not, libvirt waits."""


def kill(pid: int) -> None:
    """``kill -9``; returns when that process has ended, and as a rule when it was reaped.

    Raises ProcessLookupError if there was none, TimeoutError.
    """
    born = birth(pid)
    with contextlib.ExitStack() as kept:
        for each in _sockets(pid):
            kept.callback(os.close, each)
        os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:  # reaped already, or not by us
            deadline = time.monotonic() + patiently(ENDED)
            while born is not None and birth(pid) == born:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"process {pid} was killed, and goes on") from None
                time.sleep(0.002)
            deadline = time.monotonic() + REAPED
            while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
                time.sleep(0.002)


def _sockets(pid: int) -> Iterator[int]:
    """Our own descriptors of a process's sockets, as far as we may have them."""
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(PermissionError):
        process = os.pidfd_open(pid)
        try:
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if str(link.readlink()).startswith("socket:"):
                        found = libc.syscall(PIDFD_GETFD, process, int(link.name), 0)
                        if found >= 0:
                            yield found
        finally:
            os.close(process)
