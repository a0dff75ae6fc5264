"""Where disks are restored to is decided, and refused, before anything is touched."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from ckptmgr.backup.placement import Found, Kind, Place, Request, look, place, remarks
from ckptmgr.errors import InvalidRequest
from ckptmgr.qcow2 import Header

from .repositories import SIZE, manifest, point_disk

POINT = manifest("monday", disks=(point_disk("vda"), point_disk("vdb", format="raw")))
FOLDER = Path("/restored")
RAW = Found(Path("/v/raw"), (1, 1), SIZE)
LARGE = Found(Path("/dev/v"), (-1, 7), SIZE + 5, block=True)
QCOW2 = Found(Path("/v/a.qcow2"), (1, 3), 100, qcow2=True)


def test_overlays_are_qcow2_and_images_have_the_format_of_the_domain() -> None:
    assert place(POINT, Request("monday", FOLDER), {}) == (
        Place("vda", Kind.OVERLAY, FOLDER / "vda.qcow2", "qcow2", SIZE),
        Place("vdb", Kind.OVERLAY, FOLDER / "vdb.qcow2", "qcow2", SIZE),
    )
    assert place(POINT, Request("monday", FOLDER, flatten=True), {}) == (
        Place("vda", Kind.IMAGE, FOLDER / "vda.qcow2", "qcow2", SIZE),
        Place("vdb", Kind.IMAGE, FOLDER / "vdb.raw", "raw", SIZE),
    )
    other = replace(POINT, disks=(point_disk("vda", format="vmdk"),))
    assert [each.format for each in place(other, Request("monday", FOLDER, flatten=True), {})] == [
        "qcow2"
    ]


def test_volumes_are_written_and_qcow2_files_replaced() -> None:
    request = Request("monday", onto={"vdb": Path("/dev/v"), "vda": Path("/v/a.qcow2")})
    assert place(POINT, request, {"vda": QCOW2, "vdb": LARGE}) == (
        Place("vda", Kind.REPLACEMENT, QCOW2.path, "qcow2", SIZE),
        Place("vdb", Kind.VOLUME, LARGE.path, "raw", SIZE, block=True),
    )


def test_a_device_that_held_a_qcow2_image_is_written_as_raw_which_is_said() -> None:
    request = Request("monday", onto={"vda": Path("/dev/v")})
    held = {"vda": replace(LARGE, qcow2=True)}
    (only,) = place(POINT, request, held)
    assert (only.kind, only.format) == (Kind.VOLUME, "raw")
    (remark,) = remarks(held)
    assert "/dev/v held a qcow2 image" in remark
    assert remarks({"vda": QCOW2, "vdb": LARGE}) == ()


def test_disks_that_have_no_volume_go_into_the_folder_or_stay_out() -> None:
    request = Request("monday", FOLDER, onto={"vdb": Path("/v/raw")})
    assert [each.kind for each in place(POINT, request, {"vdb": RAW})] == [
        Kind.OVERLAY,
        Kind.VOLUME,
    ]
    request = replace(request, folder=None)
    assert [each.disk for each in place(POINT, request, {"vdb": RAW})] == ["vdb"]
    request = Request("monday", FOLDER, ("vdb",))
    assert [each.disk for each in place(POINT, request, {})] == ["vdb"]


def test_a_file_that_ends_within_a_sector_holds_all_of_the_sector() -> None:
    request = Request("monday", onto={"vdb": Path("/v/raw")})
    assert place(POINT, request, {"vdb": replace(RAW, size=SIZE - 511)})[0].size == SIZE
    with pytest.raises(InvalidRequest, match="bytes, and disk vdb has"):
        place(POINT, request, {"vdb": replace(RAW, size=SIZE - 512)})
    with pytest.raises(InvalidRequest, match="bytes, and disk vdb has"):
        place(POINT, request, {"vdb": replace(LARGE, size=SIZE - 1)})


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request("monday"), "not said where to restore to"),
        (Request("monday", FOLDER, ("vdc",)), "no disk 'vdc'"),
        (Request("monday", FOLDER, onto={"vdc": FOLDER}), "no disk 'vdc'"),
        (Request("monday", onto={"vda": FOLDER}, flatten=True), "--flatten needs a folder"),
        (Request("monday", None, ("vda", "vdb"), {"vda": FOLDER}), "where to restore disk vdb"),
        (Request("monday", FOLDER, ("vda",), {"vdb": FOLDER}), "vdb has a volume"),
        (Request("monday", onto={"vda": FOLDER, "vdb": FOLDER}), "the same volume"),
    ],
)
def test_what_cannot_be_meant_is_refused(request_: Request, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        place(POINT, request_, dict.fromkeys(request_.onto, RAW))


def test_a_volume_is_known_by_what_it_is_whatever_it_is_called(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(b"x" * 1000)
    (tmp_path / "link").symlink_to("raw")
    (tmp_path / "same").hardlink_to(raw)
    found = [look(tmp_path / name) for name in ("raw", "link", "same")]
    assert len({each.identity for each in found}) == 1
    assert found[1] == found[0]
    assert (found[0].size, found[0].qcow2, found[0].block) == (1000, False, False)
    raw.write_bytes(b"QFI\xfb" + bytes(100))
    assert look(raw).qcow2


@pytest.mark.parametrize(
    "head",
    [
        b"LUKS\xba\xbe\0\1" + bytes(600),
        Header(1 << 20, encryption=2).pack(),
        b"LUKS\xba\xbe\0\2" + bytes(600),
    ],
)
def test_what_is_encrypted_is_not_replaced_by_what_is_not(tmp_path: Path, head: bytes) -> None:
    volume = tmp_path / "volume"
    volume.write_bytes(head + bytes(1 << 20))
    found = look(volume)
    with pytest.raises(InvalidRequest, match="is encrypted"):
        place(POINT, Request("monday", onto={"vda": volume}), {"vda": found})


def test_what_is_no_volume_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name, says in {
        "fifo": "neither a file nor a block device",
        "none": "No such file",
        "loop": "cannot be used",
        "a\0b": "cannot be used",
        ".": "neither a file nor a block device",
    }.items():
        with pytest.raises(InvalidRequest, match=says):
            look(tmp_path / name)
