"""What local images say of themselves: qcow2 headers, and what ``qemu-img info`` reports.

Nothing here takes a lock or writes, so a running QEMU does not mind.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OperationFailed
from .disk import Bitmap, Layer

QCOW2_MAGIC = b"QFI\xfb"
INFO_TIMEOUT = 60.0

# docs/interop/qcow2.txt: bit 2 of the incompatible features, and the header extension that
# names the external data file.
_INCOMPATIBLE_DATA_FILE = 1 << 2
_EXTENSION_END = 0
_EXTENSION_DATA_FILE = 0x44415441

_HEAD = 64 << 10


@dataclass(frozen=True)
class Header:
    """A qcow2 header.

    version -- 2 or 3; bitmaps need 3
    cluster_size -- in bytes
    size -- virtual size in bytes
    backing_file -- as written in the header, or None
    has_data_file -- the guest's data is in an external file
    data_file -- its name as written in the header; None if only QEMU's command line tells
    """

    version: int
    cluster_size: int
    size: int
    backing_file: str | None = None
    has_data_file: bool = False
    data_file: str | None = None


def read_header(path: str | Path) -> Header | None:
    """The header of a local image; None if it is no qcow2 (or no regular file or device).

    Raises OSError if it cannot be read.
    """
    # O_NONBLOCK: a path may turn out to be a fifo.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            return None
        return parse_header(os.pread(descriptor, _HEAD, 0))
    finally:
        os.close(descriptor)


SNAPSHOTS_MAX = 65536  # QCOW_MAX_SNAPSHOTS
_TABLE_MAX = 64 << 20  # QCOW_MAX_SNAPSHOTS_SIZE is 1 GiB, of which names are little


def internal_snapshots(path: str | Path) -> frozenset[str]:
    """Names of the internal snapshots of a local qcow2 image; none of what is no qcow2.

    Reads the table itself, docs/interop/qcow2.txt "Snapshots"; nothing is locked.  Raises OSError,
    and OperationFailed for a table that makes no sense.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            return frozenset()
        head = os.pread(descriptor, 72, 0)
        if len(head) < 72 or not head.startswith(QCOW2_MAGIC):
            return frozenset()
        count, offset = struct.unpack_from(">IQ", head, 60)
        if not count:
            return frozenset()
        if count > SNAPSHOTS_MAX:
            raise OperationFailed(f"the snapshot table of {path} makes no sense")
        return parse_snapshot_table(
            os.pread(descriptor, min(_TABLE_MAX, 4096 * count), offset), count
        )
    finally:
        os.close(descriptor)


def parse_snapshot_table(data: bytes, count: int) -> frozenset[str]:
    """The names in a qcow2 snapshot table of `count` entries.

    An entry (big endian): L1 offset u64, L1 size u32, id length u16, name length u16, seconds u32,
    nanoseconds u32, VM clock u64, VM state size u32, extra data size u32; then extra data, id and
    name, padded to 8 bytes.  Raises OperationFailed.
    """
    names = []
    position = 0
    for _ in range(count):
        try:
            id_length, name_length = struct.unpack_from(">HH", data, position + 12)
            (extra,) = struct.unpack_from(">I", data, position + 36)
        except struct.error:
            raise OperationFailed("the snapshot table of the image is cut off") from None
        start = position + 40 + extra + id_length
        names.append(os.fsdecode(data[start : start + name_length]))
        position = (start + name_length + 7) // 8 * 8
    return frozenset(names)


def raw_size(path: str | Path) -> int | None:
    """The virtual size of a raw image: a regular file's, in whole sectors as QEMU counts; None
    for what is no regular file.  Raises OSError.
    """
    found = Path(path).stat()
    return -(-found.st_size // 512) * 512 if stat.S_ISREG(found.st_mode) else None


def parse_header(data: bytes) -> Header | None:
    """Parse the beginning of an image as a qcow2 header; None if it is none.

    Layout (big endian): magic, version u32, backing file offset u64 and length u32, cluster
    bits u32, size u64; from version 3 on: incompatible features u64 at 72, header length u32
    at 100, then extensions (type u32, length u32, data padded to 8 bytes).
    """
    if len(data) < 72 or not data.startswith(QCOW2_MAGIC):
        return None
    version, backing_offset, backing_length, cluster_bits, size = struct.unpack_from(
        ">IQIIQ", data, 4
    )
    if version not in (2, 3) or not 9 <= cluster_bits <= 21:
        return None
    backing_file = None
    if backing_offset:
        name = data[backing_offset : backing_offset + backing_length]
        backing_file = os.fsdecode(name) if len(name) == backing_length else None
    has_data_file, data_file = False, None
    if version == 3 and len(data) >= 104:
        (incompatible,) = struct.unpack_from(">Q", data, 72)
        (header_length,) = struct.unpack_from(">I", data, 100)
        has_data_file = bool(incompatible & _INCOMPATIBLE_DATA_FILE)
        if has_data_file:
            extension = _extension(data, header_length, _EXTENSION_DATA_FILE)
            data_file = None if extension is None else os.fsdecode(extension)
    return Header(version, 1 << cluster_bits, size, backing_file, has_data_file, data_file)


def _extension(data: bytes, offset: int, wanted: int) -> bytes | None:
    while offset + 8 <= len(data):
        kind, length = struct.unpack_from(">II", data, offset)
        if kind == _EXTENSION_END:
            return None
        content = data[offset + 8 : offset + 8 + length]
        if kind == wanted:
            return content if len(content) == length else None
        offset += 8 + (length + 7) // 8 * 8
    return None


def read_chain(path: str, form: str) -> tuple[Layer, ...]:
    """The layers of a local image and their bitmaps, top first, through ``qemu-img info``.

    form -- the image's format as the domain gives it: qemu-img must never probe what a guest
        could have written

    Raises OperationFailed, with qemu-img's message.
    """
    import subprocess  # only where qemu-img is run

    command = ["qemu-img", "info", "--output=json", "--backing-chain", "-U", "-f", form, path]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=INFO_TIMEOUT,
        )
    except FileNotFoundError:
        raise OperationFailed(
            "qemu-img is not installed", hint="install qemu-utils (Debian) or qemu-img (Fedora)"
        ) from None
    except subprocess.TimeoutExpired:
        raise OperationFailed(
            f"qemu-img did not read {path} within {INFO_TIMEOUT:g} s",
            hint="see that the storage answers",
        ) from None
    if done.returncode != 0:
        message = done.stderr.decode(errors="replace").strip().removeprefix("qemu-img: ")
        raise OperationFailed(f"qemu-img cannot read {path}: {message}")
    return parse_chain(done.stdout.decode(errors="surrogateescape"))


def parse_chain(text: str) -> tuple[Layer, ...]:
    """Parse what ``qemu-img info --output=json --backing-chain`` prints.

        [{"filename": "/img/a.qcow2", "format": "qcow2", "virtual-size": 67108864,
          "format-specific": {"type": "qcow2", "data": {"compat": "1.1", "bitmaps":
            [{"flags": ["auto"], "name": "c1", "granularity": 65536}]}}}, ...]

    Flags: ``auto`` -- the bitmap will record when the image is opened for writing; ``in-use`` --
    it was not closed properly and its contents are worthless.
    """
    try:
        return tuple(_layer(entry) for entry in json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OperationFailed(f"qemu-img's report is not in the expected form: {error!r}") from None


def _layer(entry: dict[str, Any]) -> Layer:
    data = entry.get("format-specific", {}).get("data", {})
    return Layer(
        image=entry["filename"],
        format=entry["format"],
        size=entry["virtual-size"],
        bitmaps=tuple(
            Bitmap(
                name=bitmap["name"],
                granularity=bitmap["granularity"],
                recording="auto" in bitmap["flags"] and "in-use" not in bitmap["flags"],
                inconsistent="in-use" in bitmap["flags"],
            )
            for bitmap in data.get("bitmaps", ())
        ),
    )
