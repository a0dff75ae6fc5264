"""A process that thaws a guest if ours is killed while the guest's file systems are frozen.

    python -I thawing.py URI UUID SECONDS

It reads from the other end of a pipe: `DONE` when the guest is thawed, or nothing, when the process
that froze it is gone.  It imports nothing of ours, so that it is there at once.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

DONE = b"thawed"

ATTEMPTS = 5

log = logging.getLogger("ckptmgr")


@contextmanager
def guarded(uri: str, uuid: str, timeout: float) -> Iterator[None]:
    """Have the domain thawed if this process ends within the block without leaving it.

    timeout -- seconds that the agent may take to answer
    """
    command = [sys.executable, "-I", __file__, uri, uuid, str(max(1, round(timeout)))]
    try:
        # A session of its own: what is sent to our whole group does not reach it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        log.info("nobody thaws the guest if this process is killed: %s", error)
        yield
        return
    assert process.stdin is not None  # noqa: S101 -- it is a pipe
    try:
        yield
    finally:
        with suppress(OSError):
            process.stdin.write(DONE)
            process.stdin.close()
        threading.Thread(target=process.wait, daemon=True, name="reaper").start()


def main() -> None:
    """Wait, and thaw if that was not done."""
    uri, uuid, seconds = sys.argv[1:]
    if sys.stdin.buffer.read() == DONE:
        return
    import libvirt

    libvirt.registerErrorHandler(lambda *_: None, None)
    for _ in range(ATTEMPTS):
        with suppress(libvirt.libvirtError):
            domain = libvirt.open(uri).lookupByUUIDString(uuid)
            domain.agentSetResponseTimeout(int(seconds))
            domain.fsThaw()
            domain.agentSetResponseTimeout(libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK)
            return
        time.sleep(1)


if __name__ == "__main__":
    main()
