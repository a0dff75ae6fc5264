"""What a local image says of itself.

Nothing here takes a lock or writes, so a running QEMU does not mind.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from .. import qcow2
from ..errors import OperationFailed
from .disk import Encryption, Image

log = logging.getLogger("ckptmgr")

LUKS = b"LUKS\xba\xbe"
"""What a LUKS container begins with."""

_METHODS = {1: "qcow", 2: "luks"}
"""crypt_method in the header of a qcow2 image, in libvirt's words."""


@contextmanager
def opened(path: str | Path) -> Iterator[int | None]:
    """A descriptor of the file or block device there; None for anything else.  Raises OSError."""
    # O_NONBLOCK: a path may turn out to be a fifo.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        yield descriptor if stat.S_ISREG(mode) or stat.S_ISBLK(mode) else None
    finally:
        os.close(descriptor)


def read_header(path: str | Path) -> qcow2.Header | None:
    """The header of a local image; None if it is no qcow2 (or no regular file or device).

    Raises OSError if it cannot be read.
    """
    with opened(path) as descriptor:
        try:
            return None if descriptor is None else qcow2.read_header(descriptor)
        except qcow2.Malformed:
            return None


def internal_snapshots(path: str | Path) -> frozenset[str]:
    """Names of the internal snapshots of a local qcow2 image; none of what is no qcow2.

    Reads the table itself; nothing is locked.  Raises OSError, and OperationFailed for a table
    that makes no sense.
    """
    with opened(path) as descriptor:
        if descriptor is None:
            return frozenset()
        try:
            header = qcow2.read_header(descriptor)
            return frozenset() if header is None else qcow2.read_snapshots(descriptor, header)
        except qcow2.Malformed as error:
            raise OperationFailed(f"the image {path} is damaged: {error}") from error


def raw_size(path: str | Path) -> int | None:
    """The virtual size of a raw image: a regular file's, in whole sectors as QEMU counts; None
    for what is no regular file.  Raises OSError.
    """
    found = Path(path).stat()
    return -(-found.st_size // 512) * 512 if stat.S_ISREG(found.st_mode) else None


def _payload(path: str | Path) -> int | None:
    """Where what a LUKS container holds begins, in bytes; None if it is none (of version 1, as
    QEMU makes and reads).  Raises OSError.

    magic 6 bytes, version u16, …; at 104 the payload's offset in sectors, u32
    """
    with opened(path) as descriptor:
        head = b"" if descriptor is None else os.pread(descriptor, 108, 0)
    if len(head) < 108 or not head.startswith(LUKS + b"\0\1"):
        return None
    return int.from_bytes(head[104:]) * qcow2.SECTOR


def _raw_size(image: Image) -> int | None:
    """The virtual size of a raw image.  Raises OSError."""
    if image.path is None:
        return None
    size = image.slice_size or raw_size(image.path)
    if image.encryption is None or size is None:
        return size
    begins = _payload(image.path)
    return None if begins is None else max(0, size - begins)


def described(image: Image) -> Image:
    """A local image with what its qcow2 header says, and its virtual size.

    That spares a call of libvirt's for each disk, which in turn asks QEMU.
    """
    if image.path is None or image.format not in ("qcow2", "raw"):
        return image
    try:
        if image.format == "raw":
            return replace(image, size=_raw_size(image))
        header = read_header(image.path)
    except OSError as error:
        log.info("%s cannot be read: %s", image.path, error)
        return image
    if header is None:
        return image
    data_file, encryption = image.data_file, image.encryption
    if encryption is None and header.encryption:
        encryption = Encryption(_METHODS.get(header.encryption, str(header.encryption)))
    if data_file is None and header.has_data_file:
        named = header.data_file or "(external data file)"
        data_file = str(Path(image.path).parent / named)
    return replace(
        image,
        data_file=data_file,
        qcow2_version=header.version,
        cluster_size=header.cluster_size,
        size=header.size,
        encryption=encryption,
    )
