"""libvirt's errors become ours, in one place.

The numbers are those of libvirt's ``virterror.h`` and never change; older bindings lack some of
the names.
"""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import (
    BitmapBroken,
    Busy,
    CheckpointExists,
    CkptmgrError,
    ConnectionFailed,
    GuestAgentFailed,
    InvalidDocument,
    NoCheckpoint,
    NoDomain,
    OperationFailed,
    ReadOnlyConnection,
    Unsupported,
)
from .binding import libvirt

# virErrorNumber
INTERNAL_ERROR = 1
OPERATION_FAILED = 9
SYSTEM_ERROR = 38
OPERATION_INVALID = 55
NO_DOMAIN_METADATA = 80

CLASSES: dict[int, type[CkptmgrError]] = {
    3: Unsupported,  # NO_SUPPORT
    5: ConnectionFailed,  # NO_CONNECT
    6: ConnectionFailed,  # INVALID_CONN
    27: InvalidDocument,  # XML_ERROR
    29: ReadOnlyConnection,  # OPERATION_DENIED
    35: InvalidDocument,  # XML_DETAIL
    39: ConnectionFailed,  # RPC
    42: NoDomain,  # NO_DOMAIN
    45: ConnectionFailed,  # AUTH_FAILED
    67: Unsupported,  # CONFIG_UNSUPPORTED
    68: Busy,  # OPERATION_TIMEOUT: the job lock was not free for 30 s
    79: ConnectionFailed,  # AUTH_CANCELLED
    83: Busy,  # BLOCK_COPY_ACTIVE
    84: Unsupported,  # OPERATION_UNSUPPORTED
    86: GuestAgentFailed,  # AGENT_UNRESPONSIVE
    87: Busy,  # RESOURCE_BUSY
    92: InvalidDocument,  # XML_INVALID_SCHEMA
    97: GuestAgentFailed,  # AGENT_UNSYNCED
    103: NoCheckpoint,  # NO_DOMAIN_CHECKPOINT
    109: BitmapBroken,  # CHECKPOINT_INCONSISTENT
    111: GuestAgentFailed,  # AGENT_COMMAND_TIMEOUT
    112: GuestAgentFailed,  # AGENT_COMMAND_FAILED
}

# virErrorDomain: the client side of a connection.
_CONNECTION = {
    7,  # RPC
    13,  # REMOTE
    16,  # NET (socket and TLS of 7.0 and before)
    45,  # URI
}

_BUSY_TEXTS = (
    "state change lock",
    "another backup job is already running",
    "already in active block job",
    "has active block job",
    "domain has active",
    "another job is running",
)
_BROKEN_TEXTS = (
    re.compile(r"missing or broken bitmap '[^']*' for disk '([^']*)'"),
    re.compile(r"bitmap '[^']*' not found in backing chain of '([^']*)'"),
    re.compile(r"Bitmaps are of different sizes()"),  # of which disk, QEMU does not say
)
_FORBIDDEN = re.compile(r"Failed to bind socket to .*: Permission denied")
_HINTS: dict[type[CkptmgrError], str] = {
    ReadOnlyConnection: "open the connection for writing, which is without --readonly",
    Busy: "try again when the job is done; `virsh domjobinfo DOMAIN` shows it",
    ConnectionFailed: "check the URI and that libvirt's daemon is running",
}


def hint_of(text: str) -> str | None:
    """What the user can do about what QEMU refused; `text` is its own, whoever passes it on."""
    if _FORBIDDEN.search(text):
        return (
            "QEMU may not make a socket there: leave socket_directory out of ckptmgr.toml, or have "
            "QEMU's user, and AppArmor or SELinux, allow it there (`journalctl -k` shows what they "
            "denied)"
        )
    return None


def classify(code: int, origin: int, text: str) -> type[CkptmgrError]:
    """The class of ours for a libvirt error.

    code -- virErrorNumber
    origin -- virErrorDomain: the part of libvirt that reports it
    text -- the message; looked at only where libvirt has no number of its own for the case
    """
    if origin in _CONNECTION and code in (INTERNAL_ERROR, SYSTEM_ERROR):
        return ConnectionFailed  # "client socket is closed", "Cannot recv data", ...
    if any(busy in text for busy in _BUSY_TEXTS):
        return Busy
    if any(broken.search(text) for broken in _BROKEN_TEXTS):
        return BitmapBroken
    if code == OPERATION_FAILED and re.search(r"domain moment .* already exists", text):
        return CheckpointExists
    if code == INTERNAL_ERROR and "Bitmap already exists" in text:
        return CheckpointExists
    return CLASSES.get(code, OperationFailed)


def ours(
    code: int, origin: int, text: str, *, what: str, domain: str | None = None
) -> CkptmgrError:
    """The error of ours for a libvirt error that came up while doing `what`."""
    chosen = classify(code, origin, text)
    of = f" for domain {domain!r}" if domain is not None else ""
    message = f"{what} failed{of}: {text}"
    hint = _HINTS.get(chosen) or hint_of(text)
    if chosen is BitmapBroken:
        found = next((match for broken in _BROKEN_TEXTS if (match := broken.search(text))), None)
        return BitmapBroken(message, disk=(found[1] or None) if found else None, hint=hint)
    return chosen(message, hint=hint)


class _Collection:
    """Python's collection of garbage, held while libvirt is asked.

    libvirt keeps a thread's last error, and the binding asks for it after a call has failed. An
    object of libvirt's that is collected in between has libvirt forget the error: what is raised
    then has neither a number nor a text.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._was_enabled = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """No object is collected in the block, but for those that nothing refers to."""
        with self._lock:
            if not self._holders:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders and self._was_enabled:
                    gc.enable()


_collection = _Collection()


@contextmanager
def translate(what: str, domain: str | None = None) -> Iterator[None]:
    """Turn a libvirtError of the block into one of ours; libvirt's is its cause.

    what -- what is being done, as in "creating checkpoint c1"
    domain -- name of the domain it is done to
    """
    try:
        with _collection.held():
            yield
    except libvirt.libvirtError as error:
        code, origin = error.get_error_code(), error.get_error_domain()
        text = error.get_error_message() or str(error)
        raise ours(
            -1 if code is None else code,
            -1 if origin is None else origin,
            text,
            what=what,
            domain=domain,
        ) from error
