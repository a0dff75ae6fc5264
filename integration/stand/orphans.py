"""Reaping of machines at once when they end.

A QEMU that libvirt starts becomes a child of init.  Some inits (of containers and of micro VMs)
reap only every second or two, and libvirt waits for that long whenever it ends a machine.  So
this process adopts the orphans and reaps them itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import threading
from pathlib import Path
from types import FrameType

PR_SET_CHILD_SUBREAPER = 36

AGAIN = 1.0
"""Seconds after which to look without having been told to."""


def adopt() -> None:
    """Adopt orphaned descendants from now on and reap every QEMU among them.

    Call once, from the main thread.  Children that this process started itself, in its own
    session, are left to whoever waits for them.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # libvirt's calls block the main thread, where Python's own handlers run; this does not
    signal.signal(signal.SIGCHLD, _noticed)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_reap, args=(reader,), name="orphans", daemon=True).start()


def _noticed(number: int, frame: FrameType | None) -> None:
    """A handler has to be there for the wake-up to be written."""


def _reap(reader: int) -> None:
    me, session = os.getpid(), os.getsid(0)
    while True:
        # a list of children that changes while it is read may lack one: so, look again
        if select.select([reader], [], [], AGAIN)[0]:
            os.read(reader, 4096)
        for pid in _children():
            with contextlib.suppress(OSError, ValueError):
                head, _, tail = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
                name = head.partition(" (")[2]
                state, parent, _, its_session = tail.split()[:4]
                if (
                    (state, int(parent)) == ("Z", me)
                    and int(its_session) != session
                    and name.startswith("qemu-system")
                ):
                    os.waitpid(pid, os.WNOHANG)


def _children() -> list[int]:
    """Process ids of our children, or of all processes where the kernel does not list them."""
    found: list[int] = []
    for thread in Path("/proc/self/task").iterdir():
        try:
            found += map(int, (thread / "children").read_text().split())
        except FileNotFoundError:
            if thread.exists():
                return [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()]
        except ProcessLookupError:  # a thread that has just ended
            continue
    return found
