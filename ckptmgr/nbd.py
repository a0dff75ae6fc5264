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
import time
from collections.abc import Callable, Iterator
from errno import EACCES, ECONNREFUSED, ECONNRESET, ENOENT, EPERM, EPIPE

import nbd

from .dirtymap import GRANULARITY_MIN, DirtyMap
from .errors import BitmapBroken, OperationFailed
from .plan.steps import Export, Server

DIRTY = 1
"""NBD_STATE_DIRTY of the qemu:dirty-bitmap contexts."""

REQUEST_MAX = 2**31
"""Bytes asked about at once: below 4 GiB (32-bit lengths) and a multiple of any granularity."""

GRANULARITY_DEFAULT = 64 * 1024
"""QEMU's upper bound for the granularity that it chooses itself."""

APPEAR_TIMEOUT = 10.0
"""Seconds for the socket and the export to appear."""

ANSWER_TIMEOUT = 60.0
"""Seconds for the server to answer a request."""

# ENOENT: no socket, or no such export.  A qemu-nbd that cannot open its image has its socket
# before it finds that out; `check` then tells why.
_NOT_YET = (ENOENT, ECONNREFUSED, ECONNRESET, EPIPE)

_PAUSE = 0.005


def read_dirty_map(
    server: Server,
    export: Export,
    *,
    check: Callable[[], None] = lambda: None,
    appear_timeout: float = APPEAR_TIMEOUT,
    answer_timeout: float = ANSWER_TIMEOUT,
) -> DirtyMap:
    """The dirty map of an export's bitmap, for a disk as large as the export.

    check -- called between tries to connect; raises if the server can no longer appear

    Raises BitmapBroken if the server does not offer the bitmap, OperationFailed if it cannot be
    reached or does not answer in time.
    """
    try:
        handle = _connect(server, export, check, appear_timeout)
        try:
            size = handle.get_size()
            extents = list(_dirty_extents(handle, export, size, answer_timeout))
        finally:
            _disconnect(handle)
    except nbd.Error as error:
        raise OperationFailed(
            f"reading the dirty bitmap of disk {export.disk} over NBD failed: {error.string}",
            hint=_hint(server),
        ) from error
    return dirty_map(export.granularity, size, extents)


def dirty_map(granularity: int | None, size: int, extents: list[tuple[int, int]]) -> DirtyMap:
    """The map that says exactly `extents`, ``(start, length)`` in bytes, ascending.

    granularity -- of the bitmap, as far as known; a finer one is used where the extents show
        that it cannot be right
    """
    ends = [start + length for start, length in extents]
    bounds = 0
    for start, _ in extents:
        bounds |= start
    for end in ends:
        bounds |= end if end < size else 0
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


def _connect(server: Server, export: Export, check: Callable[[], None], timeout: float) -> nbd.NBD:
    """A handle on which the bitmap's context is negotiated.

    libvirt's exports appear after its server is up, and qemu-nbd's socket after its start; so a
    missing socket or export is tried again for a while.
    """
    deadline = time.monotonic() + timeout
    while True:
        handle = nbd.NBD()
        handle.set_export_name(export.name)
        handle.add_meta_context(export.context)
        try:
            _begin(handle, server)
            while not handle.aio_is_ready():
                _poll(handle, deadline, export)
        except nbd.Error as error:
            if error.errnum in (EACCES, EPERM):
                raise OperationFailed(
                    f"the socket {server}, to read the dirty bitmap of disk {export.disk} from, "
                    f"cannot be opened: {error.string}",
                    hint="run as root or as the user that QEMU runs as",
                ) from error
            if error.errnum not in _NOT_YET or time.monotonic() > deadline:
                raise
            check()
            time.sleep(_PAUSE)
            continue
        if not handle.can_meta_context(export.context):
            _disconnect(handle)
            raise BitmapBroken(
                f"the bitmap {export.bitmap!r} of disk {export.disk} is not offered over NBD",
                disk=export.disk,
            )
        return handle


def _disconnect(handle: nbd.NBD) -> None:
    # The server may have gone; what was asked of it has been answered, or has failed by itself.
    with contextlib.suppress(nbd.Error):
        handle.shutdown()


def _poll(handle: nbd.NBD, deadline: float, export: Export) -> None:
    left = deadline - time.monotonic()
    if left <= 0 or handle.poll(max(1, int(left * 1000))) == 0:
        raise OperationFailed(
            f"the NBD server for disk {export.disk} did not answer in time",
            hint="is the domain's QEMU stopped or its host overloaded?",
        )


def _dirty_extents(
    handle: nbd.NBD, export: Export, size: int, timeout: float
) -> Iterator[tuple[int, int]]:
    return join(_runs(handle, export, size, timeout))


def _runs(
    handle: nbd.NBD, export: Export, size: int, timeout: float
) -> Iterator[tuple[int, int, bool]]:
    """``(start, length, dirty)`` from 0 to `size`, without gaps."""
    position = 0
    while position < size:
        received: list[tuple[int, list[int]]] = []

        def extent(
            context: str,
            offset: int,
            entries: list[int],
            _error: object,
            received: list[tuple[int, list[int]]] = received,
        ) -> int:
            if context == export.context:
                received.append((offset, list(entries)))
            return 0

        deadline = time.monotonic() + timeout
        cookie = handle.aio_block_status(min(size - position, REQUEST_MAX), position, extent)
        while not handle.aio_command_completed(cookie):
            _poll(handle, deadline, export)
        asked = position
        for offset, entries in received:
            if offset != position:
                raise _nonsense(export, f"it speaks of {offset} in place of {position}")
            for length, flags in zip(entries[::2], entries[1::2], strict=True):
                length = min(length, size - position)
                yield position, length, bool(flags & DIRTY)
                position += length
        if position == asked:
            raise _nonsense(export, f"it says nothing from {position} on")


def _nonsense(export: Export, what: str) -> OperationFailed:
    return OperationFailed(
        f"the NBD server's answer about the dirty bitmap of disk {export.disk} is wrong: {what}"
    )
