"""Freezing a guest's file systems for an instant, through the guest agent.

libvirt's own QUIESCE flag for checkpoints is refused by its QEMU driver in every version, so
freeze and thaw are ours.  A guest left frozen is the worst that can come of it: every way out
thaws, and a guest that stays frozen for too long is thawed behind our own back.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import CkptmgrError, GuestAgentFailed

log = logging.getLogger("ckptmgr")

THAW_ATTEMPTS = 3


@contextmanager
def frozen(
    freeze: Callable[[], object],
    thaw: Callable[[], object],
    *,
    domain: str,
    timeout: float,
    thaw_attempts: int = THAW_ATTEMPTS,
) -> Iterator[None]:
    """Freeze, run the block, thaw.

    freeze, thaw -- do it, within a deadline of their own; raise a CkptmgrError if they cannot
    timeout -- seconds that the block may take; then the guest is thawed while the block still
        runs, and GuestAgentFailed is raised when it ends, for what it made is not quiescent

    Raises GuestAgentFailed if freezing or thawing fails.  An exception of the block, or of the
    freeze, always comes out; a thaw that fails as well is a note on it and an error in the log.
    """
    guard = _Guard(thaw, domain, thaw_attempts)
    timer = threading.Timer(timeout, guard.expire)
    timer.daemon = True
    try:
        # A freeze that fails may have frozen some file systems, and one that timed out may
        # still happen in the guest: thaw after those, too.
        try:
            freeze()
        except CkptmgrError as error:
            raise GuestAgentFailed(
                f"the file systems of domain {domain!r} were not frozen: {error}",
                hint="see that qemu-guest-agent runs in the guest, or leave --quiesce out",
            ) from error
        timer.start()
        yield
    except BaseException as error:
        timer.cancel()
        failure = guard.thaw_once()
        if failure is not None:
            error.add_note(str(failure))
            log.error("%s", failure)  # noqa: TRY400 -- for people: no traceback
        raise
    timer.cancel()
    failure = guard.thaw_once()
    if failure is not None:
        raise failure
    if guard.expired:
        raise GuestAgentFailed(
            f"the file systems of domain {domain!r} were thawed after {timeout:g} s, before the "
            "checkpoint was there; it is not quiescent",
            hint="delete it and try again when the host is less busy, or allow more time",
        )


class _Guard:
    """Thaws once, from whichever thread comes first; the other waits for it."""

    def __init__(self, thaw: Callable[[], object], domain: str, attempts: int) -> None:
        self.expired = False
        self._thaw = thaw
        self._domain = domain
        self._attempts = attempts
        self._lock = threading.Lock()
        self._done = False
        self._failure: GuestAgentFailed | None = None

    def expire(self) -> None:
        with self._lock:
            if not self._done:
                self.expired = True
                self._run()

    def thaw_once(self) -> GuestAgentFailed | None:
        with self._lock:
            if not self._done or self._failure is not None:
                self._run()
            return self._failure

    def _run(self) -> None:
        for _ in range(self._attempts):
            try:
                self._thaw()
            except CkptmgrError as error:
                self._failure = GuestAgentFailed(
                    f"the file systems of domain {self._domain!r} may still be frozen: {error}",
                    hint=f"thaw them: virsh domfsthaw {self._domain!r}",
                )
            else:
                self._failure = None
                break
        self._done = True
