"""Images and qemu-img's reports are read as their documentation says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ckptmgr.domain.chain import parse_chain
from ckptmgr.domain.disk import Encryption, Image
from ckptmgr.domain.images import described, raw_size, read_header
from ckptmgr.errors import OperationFailed
from ckptmgr.qcow2 import Header


def test_a_fifo_in_place_of_an_image_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert read_header(tmp_path / "fifo") is None
    (tmp_path / "image").write_bytes(Header(64 << 20).pack())
    assert read_header(tmp_path / "image") == Header(64 << 20)
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none")


def test_a_raw_image_is_as_large_as_its_file_in_whole_sectors(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"x" * 513)
    assert raw_size(tmp_path / "raw") == 1024
    assert raw_size(tmp_path) is None


def test_a_luks_container_holds_what_is_behind_its_header(tmp_path: Path) -> None:
    """LUKS of version 1: the payload's offset in sectors is at byte 104."""
    head = b"LUKS\xba\xbe\0\1".ljust(104, b"\0") + (8).to_bytes(4)
    (tmp_path / "luks").write_bytes(head.ljust(8 * 512 + 1024, b"\0"))
    (tmp_path / "not").write_bytes(bytes(8 * 512 + 1024))
    keyed = Encryption("luks", ("uuid", "u"))
    for name, encryption, size in (
        ("luks", keyed, 1024),
        ("luks", None, 8 * 512 + 1024),
        ("not", keyed, None),  # libvirt is asked
    ):
        path = str(tmp_path / name)
        found = described(Image("file", path, path, "raw", encryption=encryption))
        assert found.size == size


def test_an_encrypted_image_says_so_itself(tmp_path: Path) -> None:
    path = tmp_path / "image"
    for method, form in ((1, "qcow"), (2, "luks"), (7, "7")):
        path.write_bytes(Header(64 << 20, encryption=method).pack())
        found = described(Image("file", str(path), str(path), "qcow2"))
        assert found.encryption == Encryption(form)


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
