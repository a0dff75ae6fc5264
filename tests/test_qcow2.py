"""The qcow2 format is read and written as its documentation says."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr import qcow2
from ckptmgr.domain.images import internal_snapshots, read_header
from ckptmgr.errors import OperationFailed
from ckptmgr.qcow2 import (
    BitmapDirectory,
    BitmapEntry,
    Header,
    Malformed,
    parse_bitmaps,
    parse_header,
    parse_snapshots,
)

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


def header(
    version: int = 3,
    bits: int = 16,
    size: int = 64 << 20,
    backing: bytes = b"",
    incompatible: int = 0,
    autoclear: int = 0,
    data_file: bytes | None = None,
    bitmaps: bytes | None = None,
    snapshots: tuple[int, int] = (0, 0),
) -> bytes:
    """As in docs/interop/qcow2.txt."""
    length = 104 if version == 3 else 72
    # a feature name table comes first, as QEMU writes it
    extensions = struct.pack(">II", 0x6803F857, 48) + b"\0" * 48
    for kind, content in ((0x44415441, data_file), (0x23852875, bitmaps)):
        if content is not None:
            padded = content.ljust((len(content) + 7) // 8 * 8, b"\0")
            extensions += struct.pack(">II", kind, len(content)) + padded
    extensions += struct.pack(">II", 0, 0)
    offset = length + len(extensions) if backing else 0
    head = b"QFI\xfb" + struct.pack(">IQIIQ", version, offset, len(backing), bits, size)
    head = head.ljust(60, b"\0") + struct.pack(">IQ", *snapshots)
    if version == 3:
        head += struct.pack(">QQQII", incompatible, 0, autoclear, 4, 104)
    return head + extensions + backing + b"\0" * 512


def found(data: bytes) -> Header:
    """The header that is there."""
    header = parse_header(data)
    assert header is not None
    return header


def test_version_cluster_size_and_size() -> None:
    assert found(header()) == Header(64 << 20, length=104)
    old = found(header(version=2, bits=21))
    assert (old.version, old.cluster_size, old.size) == (2, 2 << 20, 64 << 20)


def test_a_backing_file_is_read_and_its_absence_seen() -> None:
    assert found(header()).backing_file is None
    assert found(header(backing=b"../base of \xc3\xa9.qcow2")).backing_file == "../base of é.qcow2"


def test_an_external_data_file_is_known_by_its_incompatible_bit() -> None:
    named = found(header(incompatible=4, data_file=b"data.raw"))
    assert (named.has_data_file, named.data_file) == (True, "data.raw")
    # the name without the bit says nothing; the bit without the name is still a data file
    stale = found(header(data_file=b"data.raw"))
    assert (stale.has_data_file, stale.data_file) == (False, None)
    bare = found(header(incompatible=4))
    assert (bare.has_data_file, bare.data_file) == (True, None)


def test_bitmaps_count_only_if_the_last_writer_knew_of_them() -> None:
    extension = struct.pack(">IIQQ", 2, 0, 64, 1 << 20)
    assert found(header(autoclear=1, bitmaps=extension)).bitmaps == BitmapDirectory(2, 64, 1 << 20)
    assert found(header(autoclear=0, bitmaps=extension)).bitmaps is None
    assert found(header(autoclear=1)).bitmaps is None


@pytest.mark.parametrize("data", [b"", b"QFI\xfb", b"\0" * 512, b"MBR" + header()])
def test_what_is_no_qcow2_has_no_header(data: bytes) -> None:
    assert parse_header(data) is None


@pytest.mark.parametrize(
    "data",
    [
        header(version=1),
        header(bits=60),
        header()[:90],
        header(backing=b"a\0b"),
        header(backing=b"a" * 1024),
        header(backing=b"base.qcow2")[:-515],
        header(autoclear=1, bitmaps=b"short"),
    ],
)
def test_an_impossible_header_is_not_taken_for_another_kind_of_file(
    data: bytes, tmp_path: Path
) -> None:
    with pytest.raises(Malformed):
        parse_header(data)
    (tmp_path / "image").write_bytes(data)
    assert read_header(tmp_path / "image") is None


@given(st.binary(max_size=300))
def test_no_bytes_after_the_magic_do_harm(data: bytes) -> None:
    with contextlib.suppress(Malformed):
        parse_header(b"QFI\xfb\0\0\0\3" + data)


@given(
    st.builds(
        Header,
        size=u64,
        cluster_bits=st.integers(9, 21),
        backing_file=st.none() | names.filter(lambda name: len(name.encode()) <= 1023),
        backing_format=st.sampled_from([None, "qcow2", "raw"]),
        encryption=u32,
        l1_length=u32,
        l1_offset=u64,
        refcounts_offset=u64,
        refcounts_length=u32,
        refcount_order=u32,
        snapshots=u32,
        snapshots_offset=u64,
        incompatible=u64.map(lambda bits: bits & ~qcow2.DATA_FILE),
        compatible=u64,
        autoclear=u64,
        compression=st.integers(0, 255),
    )
)
def test_a_header_that_is_written_is_the_one_that_is_read(header: Header) -> None:
    assert parse_header(header.pack()) == header


def entry(name: bytes, flags: int = 0, bits: int = 16, kind: int = 1, extra: bytes = b"") -> bytes:
    """An entry of the directory of bitmaps."""
    fixed = struct.pack(">QIIBBHI", 1 << 20, 1, flags, kind, bits, len(name), len(extra))
    whole = fixed + extra + name
    return whole.ljust((len(whole) + 7) // 8 * 8, b"\0")


def test_flags_in_the_directory_of_bitmaps() -> None:
    data = entry(b"on", 2) + entry(b"off", bits=9) + entry("zerrissen é".encode(), 3)
    assert parse_bitmaps(data, 3) == (
        BitmapEntry("on", 65536, 1 << 20, 1, in_use=False, auto=True),
        BitmapEntry("off", 512, 1 << 20, 1, in_use=False, auto=False),
        BitmapEntry("zerrissen é", 65536, 1 << 20, 1, in_use=True, auto=True),
    )


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (entry(b"a"), 2),
        (entry(b"a") + entry(b"b"), 1),
        (entry(b"a")[:-1], 1),
        (entry(b"a")[:20], 1),
        (entry(b""), 1),
        (entry(b"a", flags=4), 1),
        (entry(b"a", bits=8), 1),
        (entry(b"a", kind=2), 1),
        (entry(b"a", extra=b"12345678"), 1),
    ],
)
def test_a_directory_that_qemu_would_not_open_is_none(data: bytes, count: int) -> None:
    with pytest.raises(Malformed):
        parse_bitmaps(data, count)


@given(st.binary(max_size=200), st.integers(0, 3))
def test_no_bytes_of_a_directory_or_a_snapshot_table_do_harm(data: bytes, count: int) -> None:
    for parse in (parse_bitmaps, parse_snapshots):
        with contextlib.suppress(Malformed):
            parse(data, count)


def snapshot(name: bytes, extra: int = 24) -> bytes:
    """An entry of the snapshot table."""
    fixed = struct.pack(">QIHHIIQII", 1 << 20, 1, 1, len(name), 0, 0, 0, 0, extra)
    whole = fixed + bytes(extra) + b"1" + name
    return whole.ljust((len(whole) + 7) // 8 * 8, b"\0")


def test_the_names_of_internal_snapshots(tmp_path: Path) -> None:
    table = snapshot(b"before") + snapshot(b"after update", 16)
    image = tmp_path / "image"
    data = header(snapshots=(2, 4096)).ljust(4096, b"\0") + table
    image.write_bytes(data)
    assert internal_snapshots(image) == {"before", "after update"}
    image.write_bytes(header())
    assert internal_snapshots(image) == set()


@pytest.mark.parametrize("snapshots", [(1, 4096), (1, 2**64 - 1), (2**32 - 1, 0)])
def test_snapshots_that_cannot_be_read_are_not_taken_for_none(
    snapshots: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / "image").write_bytes(header(snapshots=snapshots))
    with pytest.raises(OperationFailed):
        internal_snapshots(tmp_path / "image")
    (tmp_path / "other").write_bytes(header(bits=60, snapshots=snapshots))
    with pytest.raises(OperationFailed):
        internal_snapshots(tmp_path / "other")
