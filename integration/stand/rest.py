"""When a daemon has begun with all that it was asked.

What a client asks that is killed lies in the daemon's socket, or with a thread of it that is not
running yet.  On a busy machine another client's questions are answered before that, and then it is
done all the same.
"""

from __future__ import annotations

import time
from pathlib import Path

from .patience import patiently

SECONDS = 60


def await_rest(pid: int) -> None:
    """Wait until every thread of a process sleeps: it has nothing to do, or waits for others.

    Raises TimeoutError.
    """
    deadline = time.monotonic() + patiently(SECONDS)
    before = None
    while (now := _asleep(pid)) is None or now != before:
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} does not come to rest")
        if now is None:
            time.sleep(0.001)
        before = now


def _asleep(pid: int) -> dict[str, list[str]] | None:
    """How often each thread was switched to and from; None if one runs, or could (proc(5)).

    The same twice: none did in between.
    """
    found = {}
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            lines = (thread / "status").read_text().splitlines()
            if not any(line.startswith("State:\tS") for line in lines):
                return None
            found[thread.name] = [line for line in lines if "ctxt_switches:" in line]
    except (FileNotFoundError, ProcessLookupError):  # a thread has ended
        return None
    return found
