"""The qcow2 format, as far as it is read or written here: QEMU's docs/interop/qcow2.txt.

    header      72 bytes (version 2), or as many as it says, at least 104 (version 3)
    extensions  type u32, length u32, data padded to 8 bytes; type 0 ends them
    the name of the backing file, where the header says

All numbers are big endian.  A header names other files, so it is read with nothing but these
functions where an image is not to be trusted: QEMU's programs would open what it names.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from dataclasses import dataclass

MAGIC = b"QFI\xfb"
SECTOR = 512
NAME_MAX = 1023
"""Bytes of the name of a backing file, of a data file, or of a bitmap."""
HEAD = 64 << 10
"""Bytes at the beginning of a file in which QEMU puts all of the header."""

# Incompatible features.
DIRTY = 1 << 0
CORRUPT = 1 << 1
DATA_FILE = 1 << 2
COMPRESSION_TYPE = 1 << 3
EXTENDED_L2 = 1 << 4

# Autoclear features.
BITMAPS = 1 << 0
"""Whoever wrote the image last knew of its bitmaps; otherwise they mean nothing."""

ZSTD = 1
"""Compression type; 0 is deflate."""

# Entries of an L1 and an L2 table.
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1 << 0
OFFSET = (1 << 56) - (1 << 9)

_FIXED = struct.Struct(">4sIQIIQIIQQIIQ")
_VERSION_3 = struct.Struct(">QQQII")
HEADER_LENGTH = 112
"""Of the header that `Header.pack` makes."""

_END = 0
_BACKING_FORMAT = 0xE2792ACA
_DATA_FILE_NAME = 0x44415441
_BITMAPS = 0x23852875


class Malformed(ValueError):
    """It begins as a qcow2 image does and does not go on as one."""


@dataclass(frozen=True)
class BitmapDirectory:
    """Where the directory of an image's bitmaps is: offset and size in bytes."""

    count: int
    size: int
    offset: int


@dataclass(frozen=True)
class Header:
    """A header.

    size -- virtual size in bytes
    version -- 2 or 3; bitmaps need 3
    cluster_bits -- logarithm of the size of a cluster
    backing_file, backing_format -- as written in the header, or None
    encryption -- 0: none
    l1_length -- entries of the L1 table; l1_offset -- in bytes, as all offsets
    refcounts_length -- clusters of the refcount table; refcount_order -- logarithm of the bits
        of a refcount
    snapshots -- how many internal ones; snapshots_offset -- of their table
    incompatible, compatible, autoclear -- features, as bits
    length -- of the header itself in bytes
    compression -- type of compressed clusters
    data_file -- name of the external data file as written in the header; None without one, or if
        only QEMU's command line tells
    bitmaps -- None without the extension, or where `autoclear` says that it means nothing
    """

    size: int
    version: int = 3
    cluster_bits: int = 16
    backing_file: str | None = None
    backing_format: str | None = None
    encryption: int = 0
    l1_length: int = 0
    l1_offset: int = 0
    refcounts_offset: int = 0
    refcounts_length: int = 0
    refcount_order: int = 4
    snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    length: int = HEADER_LENGTH
    compression: int = 0
    data_file: str | None = None
    bitmaps: BitmapDirectory | None = None

    @property
    def cluster_size(self) -> int:
        """In bytes."""
        return 1 << self.cluster_bits

    @property
    def has_data_file(self) -> bool:
        """Whether the guest's data is in an external file."""
        return bool(self.incompatible & DATA_FILE)

    def pack(self) -> bytes:
        """The bytes of a header of version 3, with the backing file's name and format.

        Raises ValueError for what is not written here: another version, data files, bitmaps.
        """
        if (self.version, self.length) != (3, HEADER_LENGTH) or self.has_data_file or self.bitmaps:
            raise ValueError(f"{self} is not a header that can be written")
        name = b"" if self.backing_file is None else os.fsencode(self.backing_file)
        extensions = b""
        if self.backing_format is not None:
            form = self.backing_format.encode()
            extensions += struct.pack(">II", _BACKING_FORMAT, len(form))
            extensions += form.ljust(_padded(len(form)), b"\0")
        extensions += struct.pack(">II", _END, 0)
        fixed = _FIXED.pack(
            MAGIC,
            self.version,
            self.length + len(extensions) if name else 0,
            len(name),
            self.cluster_bits,
            self.size,
            self.encryption,
            self.l1_length,
            self.l1_offset,
            self.refcounts_offset,
            self.refcounts_length,
            self.snapshots,
            self.snapshots_offset,
        )
        features = _VERSION_3.pack(
            self.incompatible, self.compatible, self.autoclear, self.refcount_order, self.length
        )
        return fixed + features + bytes([self.compression]) + bytes(7) + extensions + name


# --- the header ----------------------------------------------------------------------------------


def read_header(descriptor: int) -> Header | None:
    """The header of an open file; None if that is no qcow2 image.

    Raises OSError, Malformed.
    """
    return parse_header(os.pread(descriptor, HEAD, 0))


def read(descriptor: int, length: int, offset: int) -> bytes:
    """At most `length` bytes at an `offset` that the file names.  Raises OSError, Malformed."""
    if offset >= 1 << 56:
        raise Malformed("a table is beyond the end of any file")
    return os.pread(descriptor, length, offset)


def parse_header(data: bytes) -> Header | None:
    """Parse the first bytes of a file, `HEAD` of them if it has so many; None if it is no qcow2
    image.  Raises Malformed.
    """
    if len(data) < _FIXED.size or not data.startswith(MAGIC):
        return None
    _, version, name_at, name_length, cluster_bits, size, *rest = _FIXED.unpack_from(data)
    encryption, l1_length, l1_at, refcounts_at, refcounts_length, snapshots, snapshots_at = rest
    if version not in (2, 3) or not 9 <= cluster_bits <= 21:
        raise Malformed(f"version {version}, clusters of 2**{cluster_bits} bytes")
    incompatible, compatible, autoclear, order, length = 0, 0, 0, 4, _FIXED.size
    if version == 3:
        if len(data) < _FIXED.size + _VERSION_3.size:
            raise Malformed("the header is cut off")
        incompatible, compatible, autoclear, order, length = _VERSION_3.unpack_from(
            data, _FIXED.size
        )
    extensions = _extensions(data, length, name_at or 1 << cluster_bits)
    return Header(
        size,
        version,
        cluster_bits,
        _name(_part(data, name_at, name_length)) if name_at else None,
        _name(extensions.get(_BACKING_FORMAT)),
        encryption,
        l1_length,
        l1_at,
        refcounts_at,
        refcounts_length,
        refcount_order=order,
        snapshots=snapshots,
        snapshots_offset=snapshots_at,
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        length=length,
        compression=data[104] if length > 104 and len(data) > 104 else 0,
        data_file=_name(extensions.get(_DATA_FILE_NAME)) if incompatible & DATA_FILE else None,
        bitmaps=_bitmap_directory(extensions.get(_BITMAPS)) if autoclear & BITMAPS else None,
    )


def _extensions(data: bytes, offset: int, end: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while offset + 8 <= min(end, len(data)):
        kind, length = struct.unpack_from(">II", data, offset)
        if offset + 8 + length > end:
            raise Malformed("an extension is longer than the header")
        if kind == _END:
            break
        found[kind] = _part(data, offset + 8, length)
        offset += 8 + _padded(length)
    return found


def _part(data: bytes, offset: int, length: int) -> bytes:
    if offset + length > len(data):
        raise Malformed("the header is cut off")
    return data[offset : offset + length]


def _name(data: bytes | None) -> str | None:
    if not data:
        return None
    if len(data) > NAME_MAX or b"\0" in data:
        raise Malformed("a name in the header is not a valid name")
    return os.fsdecode(data)


def _bitmap_directory(data: bytes | None) -> BitmapDirectory | None:
    """Count u32, reserved u32, size u64, offset u64."""
    if data is None:
        return None
    if len(data) != 24:
        raise Malformed("the bitmaps extension has another length")
    count, reserved, size, offset = struct.unpack(">IIQQ", data)
    if not 0 < count <= _BITMAPS_MAX or reserved:
        raise Malformed(f"{count} bitmaps")
    return BitmapDirectory(count, size, offset)


def _padded(length: int) -> int:
    return (length + 7) // 8 * 8


# --- bitmaps and snapshots -----------------------------------------------------------------------

_BITMAPS_MAX = 65535  # QCOW2_MAX_BITMAPS
_DIRECTORY_MAX = 1024 * _BITMAPS_MAX
_SNAPSHOTS_MAX = 65536  # QCOW_MAX_SNAPSHOTS
_SNAPSHOTS_READ = 64 << 20  # of 1 GiB that QEMU allows, of which names are little
_EXTRA_MAX = 1024  # QCOW_MAX_SNAPSHOT_EXTRA_DATA
_BITMAP = struct.Struct(">QIIBBHI")
_IN_USE = 1 << 0
_AUTO = 1 << 1
_ALL_ONES = 1  # in a bitmap's table, where no cluster is
_TABLE_MAX = 1 << 17  # entries of a bitmap's table; QEMU allows a thousand times that
_TRACKING = 1  # the only type of bitmap


@dataclass(frozen=True)
class BitmapEntry:
    """An entry of the directory of bitmaps.

    granularity -- in bytes
    table_offset, table_length -- of the table of its clusters, in bytes and in entries
    in_use -- it was not saved when the image was last written: its contents are worthless
    auto -- it records when the image is opened for writing
    """

    name: str
    granularity: int
    table_offset: int
    table_length: int
    in_use: bool
    auto: bool


def read_bitmaps(descriptor: int, header: Header) -> tuple[BitmapEntry, ...]:
    """The bitmaps of an open image, in the order of their directory.

    Raises OSError, and Malformed for whatever QEMU would not open.
    """
    where = header.bitmaps
    if where is None:
        return ()
    if where.size > _DIRECTORY_MAX or where.offset % header.cluster_size:
        raise Malformed("the directory of bitmaps is at a place where none can be")
    entries = parse_bitmaps(read(descriptor, where.size, where.offset), where.count)
    for entry in entries:
        if not entry.in_use:  # of others QEMU looks at nothing more
            _check_bitmap(descriptor, header, entry)
    return entries


def _check_bitmap(descriptor: int, header: Header, entry: BitmapEntry) -> None:
    """See that the bitmap has as many clusters as it needs, and that its table names clusters."""
    words = -(-header.size // entry.granularity // 64)
    clusters = -(-words * 8 // header.cluster_size)
    if entry.table_length != clusters or clusters > _TABLE_MAX:
        raise Malformed(f"the table of bitmap {entry.name!r} has another length")
    data = read(descriptor, 8 * clusters, entry.table_offset)
    if len(data) != 8 * clusters or entry.table_offset % header.cluster_size:
        raise Malformed(f"the table of bitmap {entry.name!r} is cut off")
    end = os.fstat(descriptor).st_size
    for where in unpack_table(data):
        inside = not where % header.cluster_size and where + header.cluster_size <= end
        if not (inside or where == _ALL_ONES):
            raise Malformed(
                f"the table of bitmap {entry.name!r} names something that is not a cluster"
            )


def parse_bitmaps(data: bytes, count: int) -> tuple[BitmapEntry, ...]:
    """The entries of a directory of `count` bitmaps, in its order.

    An entry: table offset u64, table length u32, flags u32, type u8, granularity (logarithm) u8,
    name length u16, extra data length u32; then extra data and name, padded to 8 bytes.

    Raises Malformed for whatever QEMU would not open.
    """
    found = []
    position = 0
    while position < len(data):
        if position + _BITMAP.size > len(data):
            raise Malformed("the directory of bitmaps is cut off")
        fields = _BITMAP.unpack_from(data, position)
        table_at, table_length, flags, kind, bits, length, extra = fields
        name = _name(_part(data, position + _BITMAP.size, length))
        if flags & ~(_IN_USE | _AUTO) or kind != _TRACKING or extra or not 9 <= bits <= 31:
            raise Malformed(f"bitmap {name!r} is of an unknown kind")
        if name is None or not table_at or not table_length:
            raise Malformed("a bitmap has no name or no table")
        in_use, auto = bool(flags & _IN_USE), bool(flags & _AUTO)
        found.append(BitmapEntry(name, 1 << bits, table_at, table_length, in_use, auto))
        position += _padded(_BITMAP.size + length)
    if position != len(data) or len(found) != count:
        raise Malformed("the directory of bitmaps has another length")
    return tuple(found)


def read_snapshots(descriptor: int, header: Header) -> frozenset[str]:
    """The names of an open image's internal snapshots.  Raises OSError, Malformed."""
    if not header.snapshots:
        return frozenset()
    if header.snapshots > _SNAPSHOTS_MAX:
        raise Malformed(f"{header.snapshots} snapshots")
    length = min(_SNAPSHOTS_READ, 4096 * header.snapshots)
    return parse_snapshots(read(descriptor, length, header.snapshots_offset), header.snapshots)


def parse_snapshots(data: bytes, count: int) -> frozenset[str]:
    """The names in a table of `count` internal snapshots; `data` may be longer.

    An entry: L1 offset u64, L1 length u32, id length u16, name length u16, seconds u32,
    nanoseconds u32, VM clock u64, VM state size u32, extra data length u32; then extra data, id
    and name, padded to 8 bytes.

    Raises Malformed.
    """
    names = []
    position = 0
    for _ in range(count):
        try:
            id_length, name_length = struct.unpack_from(">HH", data, position + 12)
            (extra,) = struct.unpack_from(">I", data, position + 36)
        except struct.error:
            raise Malformed("the snapshot table is cut off") from None
        start = position + 40 + extra + id_length
        if extra > _EXTRA_MAX or start + name_length > len(data):
            raise Malformed("the snapshot table is cut off")
        names.append(os.fsdecode(data[start : start + name_length]))
        position = _padded(start + name_length)
    return frozenset(names)


# --- tables --------------------------------------------------------------------------------------


def unpack_table(data: bytes) -> array[int]:
    """The entries of a table of 64 bits each."""
    entries = array("Q", data)
    if sys.byteorder == "little":
        entries.byteswap()
    return entries


def pack_table(entries: array[int]) -> bytes:
    """The bytes of a table, its entries of whatever size."""
    if sys.byteorder == "little":
        entries = entries[:]
        entries.byteswap()
    return entries.tobytes()
