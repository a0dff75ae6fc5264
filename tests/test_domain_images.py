"""qcow2 headers and qemu-img's reports are read as their documentation says."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.domain.images import Header, parse_chain, parse_header, raw_size, read_header
from ckptmgr.errors import OperationFailed


def header(
    version: int = 3,
    bits: int = 16,
    size: int = 64 << 20,
    backing: bytes = b"",
    incompatible: int = 0,
    data_file: bytes | None = None,
) -> bytes:
    """As in docs/interop/qcow2.txt."""
    length = 104 if version == 3 else 72
    extensions = b""
    if data_file is not None:
        # a feature name table comes first, as QEMU writes it
        extensions += struct.pack(">II", 0x6803F857, 48) + b"\0" * 48
        padded = data_file.ljust((len(data_file) + 7) // 8 * 8, b"\0")
        extensions += struct.pack(">II", 0x44415441, len(data_file)) + padded
    extensions += struct.pack(">II", 0, 0)
    offset = length + len(extensions) if backing else 0
    head = b"QFI\xfb" + struct.pack(">IQIIQ", version, offset, len(backing), bits, size)
    head = head.ljust(72, b"\0")
    if version == 3:
        head += struct.pack(">QQQII", incompatible, 0, 0, 4, 104)
    return head + extensions + backing + b"\0" * 512


def test_version_cluster_size_and_size() -> None:
    assert parse_header(header()) == Header(3, 65536, 64 << 20)
    assert parse_header(header(version=2, bits=21)) == Header(2, 2 << 20, 64 << 20)


def test_a_backing_file_is_read_and_its_absence_seen() -> None:
    found = parse_header(header(backing=b"../base of \xc3\xa9.qcow2"))
    assert found is not None
    assert found.backing_file == "../base of é.qcow2"


def test_an_external_data_file_is_known_by_its_incompatible_bit() -> None:
    found = parse_header(header(incompatible=4, data_file=b"data.raw"))
    assert found is not None
    assert (found.has_data_file, found.data_file) == (True, "data.raw")
    # the name without the bit says nothing; the bit without the name is still a data file
    stale = parse_header(header(data_file=b"data.raw"))
    assert stale is not None
    assert not stale.has_data_file
    bare = parse_header(header(incompatible=4))
    assert bare is not None
    assert (bare.has_data_file, bare.data_file) == (True, None)


@pytest.mark.parametrize(
    "data", [b"", b"QFI\xfb", b"\0" * 512, header(version=1), header(bits=60), b"MBR" + header()]
)
def test_what_is_no_qcow2_has_no_header(data: bytes) -> None:
    assert parse_header(data) is None


@given(st.binary(max_size=300))
def test_no_bytes_after_the_magic_do_harm(data: bytes) -> None:
    parse_header(b"QFI\xfb\0\0\0\3" + data)


def test_a_fifo_in_place_of_an_image_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert read_header(tmp_path / "fifo") is None
    (tmp_path / "image").write_bytes(header())
    assert read_header(tmp_path / "image") == Header(3, 65536, 64 << 20)
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none")


def test_a_raw_image_is_as_large_as_its_file_in_whole_sectors(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"x" * 513)
    assert raw_size(tmp_path / "raw") == 1024
    assert raw_size(tmp_path) is None


def test_flags_say_whether_a_bitmap_records_and_whether_it_is_whole() -> None:
    report = [
        {
            "filename": "/img/a.qcow2",
            "format": "qcow2",
            "virtual-size": 1 << 20,
            "format-specific": {
                "type": "qcow2",
                "data": {
                    "compat": "1.1",
                    "bitmaps": [
                        {"name": "on", "granularity": 65536, "flags": ["auto"]},
                        {"name": "off", "granularity": 512, "flags": []},
                        {"name": "torn", "granularity": 65536, "flags": ["in-use", "auto"]},
                    ],
                },
            },
        },
        {"filename": "/img/b.raw", "format": "raw", "virtual-size": 1 << 20},
    ]
    top, base = parse_chain(json.dumps(report))
    assert {b.name: (b.recording, b.inconsistent) for b in top.bitmaps} == {
        "on": (True, False),
        "off": (False, False),
        "torn": (False, True),
    }
    assert (base.image, base.format, base.bitmaps) == ("/img/b.raw", "raw", ())


@pytest.mark.parametrize("text", ["", "{}x", "[1]", '[{"filename": "/a"}]', '"text"', "3"])
def test_a_report_of_another_form_is_an_error(text: str) -> None:
    with pytest.raises(OperationFailed):
        parse_chain(text)
