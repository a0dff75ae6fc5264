"""The header of a qcow2 image, as far as it says what else a program that opens it will open.

QEMU's docs/interop/qcow2.txt.  It is read here, and not by a program of QEMU's, because that would
open the file that the header names, whatever that is.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from ..errors import RepositoryDamaged, StoreDamaged
from ..store import files

_FIXED = struct.Struct(">4sIQIIQ")
_MAGIC = b"QFI\xfb"
_INCOMPATIBLE = struct.Struct(">Q")
_INCOMPATIBLE_AT = 72
_DATA_FILE = 1 << 2  # incompatible feature: the data is in another file
_NAME_MAX = 1023


@dataclass(frozen=True)
class Header:
    """What the header of an image says.

    backing -- name of the backing file, None without one
    size -- of the disk, in bytes
    cluster -- bytes of a cluster
    data_file -- the data is in another file
    """

    backing: str | None
    size: int
    cluster: int
    data_file: bool


def read_header(path: Path) -> Header | None:
    """The header of the image at `path`; None if that is no qcow2 image.

    Raises OSError, and RepositoryDamaged for what is no file or has an impossible header.
    """
    try:
        descriptor = files.open_regular(path)
    except StoreDamaged as error:
        raise RepositoryDamaged(error.message) from error
    try:
        start = os.pread(descriptor, 4096, 0)
        if len(start) < _FIXED.size or not start.startswith(_MAGIC):
            return None
        _, version, offset, length, bits, size = _FIXED.unpack_from(start)
        features = 0
        if version >= 3 and len(start) >= _INCOMPATIBLE_AT + _INCOMPATIBLE.size:
            (features,) = _INCOMPATIBLE.unpack_from(start, _INCOMPATIBLE_AT)
        if not 9 <= bits <= 21 or length > _NAME_MAX:
            raise RepositoryDamaged(f"the header of {path} is damaged")
        name = os.pread(descriptor, length, offset) if 0 < offset < 1 << 62 else b""
        if offset and len(name) != length:
            raise RepositoryDamaged(f"the header of {path} is damaged")
        backing = os.fsdecode(name) if offset and length else None
        return Header(backing, size, 1 << bits, bool(features & _DATA_FILE))
    finally:
        os.close(descriptor)
