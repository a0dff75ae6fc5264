"""Reading a dirty bitmap over NBD, with libnbd.

QEMU serves a dirty bitmap as a metadata context of an export, ``qemu:dirty-bitmap:NAME``, whose
flags have bit 0 set where the bitmap is dirty (QEMU's docs/interop/nbd.txt).  The liberties that
a server may take with a block status request (NBD's doc/proto.md):

- not to know the context, and to say so by negotiating none: an error here, never "clean";
- to answer for less than was asked: QEMU puts at most 1 MiB of extents in a reply;
- to let the last extent reach beyond what was asked;
- to split what could be one extent.
"""

from __future__ import annotations

import contextlib
import os
import socket as sockets
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from errno import EACCES, ECONNREFUSED, ECONNRESET, EINVAL, ENOENT, EPERM, EPIPE
from typing import TYPE_CHECKING

import nbd

from .dirtymap import GRANULARITY_MIN, DirtyMap
from .errors import BitmapBroken, OperationFailed

if TYPE_CHECKING:
    from .plan.steps import Export, Server

DIRTY = 1
"""NBD_STATE_DIRTY of the qemu:dirty-bitmap contexts."""

ALLOCATION = "base:allocation"
"""The metadata context that tells what reads as zeroes."""

REQUEST_MAX = 2**31
"""Bytes asked about at once: below 4 GiB (32-bit lengths) and a multiple of any granularity."""

GRANULARITY_DEFAULT = 64 * 1024
"""QEMU's upper bound for the granularity that it chooses itself."""

APPEAR_TIMEOUT = 10.0
"""Seconds for the socket and the export to appear."""

START_TIMEOUT = 60.0
"""The same of a server whose end would be seen: of one that still starts, however busy the host."""

ANSWER_TIMEOUT = 60.0
"""Seconds for the server to answer a request."""

_FAREWELL = 2.0
_HEARD = 30.0

# ENOENT: no socket, or no such export.  A qemu-nbd that cannot open its image has its socket
# before it finds that out; `check` then tells why.
_NOT_YET = (ENOENT, ECONNREFUSED, ECONNRESET, EPIPE)

# What nbd_poll(3) says of a server that went before libnbd first looked at the connection: it calls
# nbd_aio_notify_read, for which it is too early (generator/states-connect.c, CONNECT.START).
_GONE_AT_ONCE = EINVAL

_PAUSE = 0.005


def unwatched() -> None:
    """The check of a server of which nobody here would see the end."""


def read_dirty_map(
    server: Server,
    export: Export,
    *,
    check: Callable[[], None] = unwatched,
    appear_timeout: float | None = None,
    answer_timeout: float = ANSWER_TIMEOUT,
) -> DirtyMap:
    """The dirty map of an export's bitmap, for a disk as large as the export.

    check -- called between tries to connect; raises if the server can no longer appear
    appear_timeout -- None: START_TIMEOUT with a check, else APPEAR_TIMEOUT

    Raises BitmapBroken if the server does not offer the bitmap, OperationFailed if it cannot be
    reached or does not answer in time.
    """
    try:
        handle = _connect(server, export, check, appear_timeout)
        try:
            size = handle.get_size()
            extents = Extents(_dirty_extents(handle, export, size, answer_timeout))
        finally:
            disconnect(handle)
    except nbd.Error as error:
        raise OperationFailed(
            f"reading the dirty bitmap of disk {export.disk} over NBD failed: {error.string}",
            hint=_hint(server),
        ) from error
    return dirty_map(export.granularity, size, extents)


class Extents:
    """Extents ``(start, length)`` in 16 bytes each, to be gone through again and again."""

    def __init__(self, extents: Iterable[tuple[int, int]]) -> None:
        self._numbers = array("Q")
        for extent in extents:
            self._numbers.extend(extent)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        numbers = iter(self._numbers)
        return zip(numbers, numbers, strict=True)


def dirty_map(granularity: int | None, size: int, extents: Iterable[tuple[int, int]]) -> DirtyMap:
    """The map that says exactly `extents`, ``(start, length)`` in bytes, ascending.

    extents -- gone through twice
    granularity -- of the bitmap, as far as known; a finer one is used where the extents show
        that it cannot be right
    """
    bounds = 0
    for start, length in extents:
        bounds |= start
        if start + length < size:
            bounds |= start + length
    if granularity is None or bounds & (granularity - 1):
        lowest = bounds & -bounds if bounds else GRANULARITY_DEFAULT
        granularity = max(GRANULARITY_MIN, min(lowest, GRANULARITY_DEFAULT))
    return DirtyMap.from_extents(granularity, size, extents)


def join(runs: Iterator[tuple[int, int, bool]]) -> Iterator[tuple[int, int]]:
    """The dirty extents, ``(start, length)``, of consecutive ``(start, length, dirty)``."""
    first = last = 0
    for start, length, dirty in runs:
        if not dirty:
            continue
        if start != last:
            if last > first:
                yield first, last - first
            first = start
        last = start + length
    if last > first:
        yield first, last - first


def _hint(server: Server) -> str | None:
    if isinstance(server, str):
        return None
    tls = ", or a certificate on either side is not right (nbd_certificates)" if server.tls else ""
    return f"is {server}, of nbd_address in ckptmgr.toml, reached from here? A firewall{tls}"


def connect(
    server: Server,
    name: str,
    disk: str,
    context: str | None,
    *,
    check: Callable[[], None] = unwatched,
    timeout: float | None = None,
) -> nbd.NBD:
    """A handle on export `name`, of `disk`, with a metadata context, if the server has that.

    context -- None: none, and simple replies
    check -- called between tries; raises if the server can no longer appear
    timeout -- None: START_TIMEOUT with a check, else APPEAR_TIMEOUT

    libvirt's exports appear after its server is up, and qemu-nbd's socket after its start; so a
    missing socket or export is tried again for a while.  Raises nbd.Error, OperationFailed.
    """
    if timeout is None:
        timeout = APPEAR_TIMEOUT if check is unwatched else START_TIMEOUT
    deadline = time.monotonic() + timeout
    while True:
        handle = nbd.NBD()
        handle.set_export_name(name)
        if context is None:
            handle.set_request_structured_replies(False)
        else:
            handle.add_meta_context(context)
        try:
            _negotiate(handle, server, deadline, disk)
        except nbd.Error as error:
            if error.errnum in (EACCES, EPERM):
                raise OperationFailed(
                    f"the socket {server}, to read disk {disk} from, cannot be opened: "
                    f"{error.string}",
                    hint="run as root or as the user that QEMU runs as",
                ) from error
            early = error.errnum == _GONE_AT_ONCE and handle.aio_is_connecting()
            if not (early or error.errnum in _NOT_YET) or time.monotonic() > deadline:
                raise
            check()
            time.sleep(_PAUSE)
            continue
        return handle


def attempt(socket: str, disk: str, check: Callable[[], None]) -> None:
    """Connect to a server's default export, once it is there, and leave again.

    Raises OperationFailed, and whatever `check` does.
    """
    try:
        disconnect(connect(socket, "", disk, ALLOCATION, check=check))
    except nbd.Error as error:
        check()
        raise OperationFailed(
            f"the NBD server of disk {disk} cannot be reached: {error.string}"
        ) from error


def _negotiate(handle: nbd.NBD, server: Server, deadline: float, disk: str) -> None:
    try:
        _begin(handle, server)
        while not handle.aio_is_ready():
            poll(handle, deadline, disk)
    except BaseException:
        _hang_up(handle)
        raise


def _hang_up(handle: nbd.NBD) -> None:
    """End a negotiation, however far it is, and wait until the server has heard that.

    When QEMU is told to stop its server it waits for a client that has not negotiated yet, without
    listening to it (7.2): the whole of QEMU, and with it the guest, would stand still for ever.
    """
    try:
        descriptor = os.dup(handle.aio_get_fd())
    except nbd.Error:
        return  # there is no connection
    with contextlib.suppress(OSError), sockets.socket(fileno=descriptor) as connection:
        connection.settimeout(_HEARD)
        connection.shutdown(sockets.SHUT_WR)
        while connection.recv(4096):
            pass


def _begin(handle: nbd.NBD, server: Server) -> None:
    if isinstance(server, str):
        handle.aio_connect_unix(server)
        return
    if server.tls:
        # never without, whatever the server says
        handle.set_tls(nbd.TLS_REQUIRE)
        if server.certificates is not None:
            handle.set_tls_certificates(server.certificates)
    handle.aio_connect_tcp(server.host, str(server.port))


def _connect(
    server: Server, export: Export, check: Callable[[], None], timeout: float | None
) -> nbd.NBD:
    """A handle on which the bitmap's context is negotiated."""
    handle = connect(server, export.name, export.disk, export.context, check=check, timeout=timeout)
    if not handle.can_meta_context(export.context):
        disconnect(handle)
        raise BitmapBroken(
            f"the bitmap {export.bitmap!r} of disk {export.disk} is not offered over NBD",
            disk=export.disk,
        )
    return handle


def disconnect(handle: nbd.NBD) -> None:
    """Say good-bye to a server, and wait a little for it to hear that."""
    # It may have gone; what was asked of it has been answered, or has failed by itself.  One that
    # waits for its storage hears nothing, and nbd_shutdown(3) would wait with it, for ever.
    deadline = time.monotonic() + _FAREWELL
    with contextlib.suppress(nbd.Error):
        handle.aio_disconnect(0)
        while not (handle.aio_is_closed() or handle.aio_is_dead()):
            left = deadline - time.monotonic()
            if left <= 0 or handle.poll(max(1, int(left * 1000))) == 0:
                return


def poll(handle: nbd.NBD, deadline: float, disk: str) -> None:
    """Let the connection go on.  Raises OperationFailed after `deadline`."""
    left = deadline - time.monotonic()
    if left <= 0 or handle.poll(max(1, int(left * 1000))) == 0:
        raise OperationFailed(
            f"the NBD server for disk {disk} did not answer in time",
            hint="is the domain's QEMU stopped or its host overloaded?",
        )


def _dirty_extents(
    handle: nbd.NBD, export: Export, size: int, timeout: float
) -> Iterator[tuple[int, int]]:
    runs = status(handle, export.context, export.disk, 0, size, timeout=timeout)
    return join((start, length, bool(flags & DIRTY)) for start, length, flags in runs)


def status(
    handle: nbd.NBD,
    context: str,
    disk: str,
    position: int,
    end: int,
    *,
    timeout: float = ANSWER_TIMEOUT,
) -> Iterator[tuple[int, int, int]]:
    """``(start, length, flags)`` of a metadata context from `position` to `end`, without gaps.

    Raises nbd.Error, OperationFailed.
    """
    while position < end:
        received: list[tuple[int, list[int]]] = []

        def extent(
            told: str,
            offset: int,
            entries: list[int],
            _error: object,
            received: list[tuple[int, list[int]]] = received,
        ) -> int:
            if told == context:
                received.append((offset, list(entries)))
            return 0

        deadline = time.monotonic() + timeout
        cookie = handle.aio_block_status(min(end - position, REQUEST_MAX), position, extent)
        while not handle.aio_command_completed(cookie):
            poll(handle, deadline, disk)
        asked = position
        for offset, entries in received:
            if offset != position:
                raise _nonsense(context, disk, f"it speaks of {offset} in place of {position}")
            for length, flags in zip(entries[::2], entries[1::2], strict=True):
                length = min(length, end - position)
                yield position, length, flags
                position += length
        if position == asked:
            raise _nonsense(context, disk, f"it says nothing from {position} on")


def _nonsense(context: str, disk: str, what: str) -> OperationFailed:
    return OperationFailed(
        f"the NBD server's answer about {context} of disk {disk} is wrong: {what}"
    )
