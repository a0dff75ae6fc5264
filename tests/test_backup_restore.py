"""Restoring to folders, without QEMU: overlays, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptmgr.backup import volume
from ckptmgr.backup.block import BLOCK
from ckptmgr.backup.catalogue import Catalogue, repository
from ckptmgr.backup.compaction import held_back
from ckptmgr.backup.overlays import RECORD, recorded
from ckptmgr.backup.repository import Lineage
from ckptmgr.backup.volume import MARK, NewFile, Volume
from ckptmgr.domain.images import read_header
from ckptmgr.errors import (
    CkptmgrError,
    InvalidRequest,
    NoPoint,
    RepositoryDamaged,
    RestoreFailed,
)

from .repositories import OTHER_UUID, SIZE, UUID, manifest, point_disk
from .restorable import add, block, restorable


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(name="lineage")
def lineage_fixture(tmp_path: Path) -> Lineage:
    return restorable(tmp_path / "repo")


@pytest.fixture(name="catalogue")
def catalogue_fixture(lineage: Lineage) -> Catalogue:
    return repository(lineage.path.parent)


def test_an_overlay_stands_on_the_image_of_the_point(
    catalogue: Catalogue, lineage: Lineage, tmp_path: Path
) -> None:
    done = catalogue.restore("web", "tuesday", tmp_path / "a" / "b")
    assert [disk.file for disk in done.disks] == [
        str(tmp_path / "a/b/vda.qcow2"),
        str(tmp_path / "a/b/vdb.qcow2"),
    ]
    header = read_header(done.disks[0].file)
    assert header is not None
    assert header.backing_file == str(lineage.path / "tuesday/vda.qcow2")
    assert header.size == SIZE
    assert (tmp_path / "a/b").stat().st_mode & 0o777 == 0o711
    assert names(tmp_path / "a/b") == ["vda.qcow2", "vdb.qcow2"]


def test_the_point_knows_the_overlays_that_stand_on_it(
    catalogue: Catalogue, lineage: Lineage, tmp_path: Path
) -> None:
    for folder in ("a", "b"):
        catalogue.restore("web", "monday", tmp_path / folder, disks=["vda"])
    found = json.loads((lineage.path / "monday" / RECORD).read_text())
    assert [each["path"] for each in found] == [
        str(tmp_path / folder / "vda.qcow2") for folder in ("a", "b")
    ]
    assert recorded(lineage.path / "monday") == found
    assert recorded(lineage.path / "tuesday") == []
    held = held_back(lineage, lineage.load())
    assert held == {"monday": tuple(f"restored as {each['path']}" for each in found)}
    (tmp_path / "a/vda.qcow2").unlink()
    assert held_back(lineage, lineage.load()) == {"monday": held["monday"][1:]}


def test_a_domain_is_found_by_name_and_by_uuid_and_no_other(catalogue: Catalogue) -> None:
    for key in ("web", UUID):
        assert len(catalogue.plan_restore(key, "monday", "/x").steps) == 2
    with pytest.raises(NoPoint, match="no restore point of domain 'mail'"):
        catalogue.plan_restore("mail", "monday", "/x")
    with pytest.raises(NoPoint, match="no restore point 'sunday'"):
        catalogue.plan_restore("web", "sunday", "/x")


def test_two_trees_with_one_name_are_told_apart_by_uuid(catalogue: Catalogue) -> None:
    other = catalogue._repository.lineage(OTHER_UUID)
    with other.lock(0):
        made = manifest("monday", domain_uuid=OTHER_UUID, disks=(point_disk(),))
        add(other, made, {"vda": {0: block(1)}})
    with pytest.raises(InvalidRequest, match="more than one") as raised:
        catalogue.plan_restore("web", "monday", "/x")
    assert raised.value.hint is not None
    assert OTHER_UUID in raised.value.hint
    assert len(catalogue.plan_restore(UUID, "monday", "/x").steps) == 2
    assert len(catalogue.plan_restore("web", "tuesday", "/x").steps) == 2


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 9)


def other_image(path: Path) -> None:
    data = bytearray(path.read_bytes())
    name = data.find(b"../monday")
    data[name : name + 9] = b"../sunday"
    path.write_bytes(data)


Harm = Callable[[Path], object]


@pytest.mark.parametrize(
    ("file", "harm", "says"),
    [
        ("monday/vda.qcow2", Path.unlink, r"monday is damaged: the image .* is missing"),
        ("tuesday/vda.qcow2", cut, r"tuesday is damaged: .* bytes and had"),
        ("monday/vda.qcow2", cut, r"monday is damaged: .* bytes and had .*; tuesday stands on it"),
        ("tuesday/vda.qcow2", other_image, r"stands on \.\./sunday/vda"),
        ("monday/manifest.json", Path.unlink, "stands on monday, which is missing or damaged"),
        ("tuesday/manifest.json", cut, "tuesday of domain 'web' is damaged"),
    ],
)
def test_damage_is_told_before_anything_is_made(
    catalogue: Catalogue, lineage: Lineage, tmp_path: Path, file: str, harm: Harm, says: str
) -> None:
    harm(lineage.path / file)
    with pytest.raises(RepositoryDamaged, match=says):
        catalogue.restore("web", "tuesday", tmp_path / "to")
    with pytest.raises(RepositoryDamaged, match=says):
        catalogue.plan_restore("web", "tuesday", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_nothing_that_is_there_is_overwritten(catalogue: Catalogue, tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    (tmp_path / "to/vdb.qcow2").write_bytes(b"mine")
    with pytest.raises(InvalidRequest, match=r"vdb\.qcow2 is there already"):
        catalogue.restore("web", "monday", tmp_path / "to")
    with pytest.raises(InvalidRequest, match=r"vdb\.qcow2 is there already"):
        catalogue.plan_restore("web", "monday", tmp_path / "to")
    assert names(tmp_path / "to") == ["vdb.qcow2"]
    assert (tmp_path / "to/vdb.qcow2").read_bytes() == b"mine"


def test_nothing_is_restored_into_the_repository(catalogue: Catalogue, lineage: Lineage) -> None:
    (lineage.path.parent.parent / "link").symlink_to(lineage.path)
    for folder in (lineage.path / "monday", lineage.path.parent.parent / "link" / "new"):
        with pytest.raises(InvalidRequest, match="is in the repository"):
            catalogue.restore("web", "monday", folder)
    with pytest.raises(InvalidRequest, match="is in the repository"):
        catalogue.restore("web", "monday", onto={"vda": lineage.path / "tuesday/vda.qcow2"})
    assert not (lineage.path / "new").exists()


def test_a_folder_that_cannot_be_made_is_told(catalogue: Catalogue, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file" / "below", tmp_path / "file"):
        with pytest.raises(RestoreFailed, match="folder"):
            catalogue.restore("web", "monday", folder)


def test_a_plan_touches_nothing(catalogue: Catalogue, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"x" * SIZE)
    plan = catalogue.plan_restore(
        "web", "monday", tmp_path / "to", onto={"vdb": tmp_path / "raw"}, flatten=True
    )
    assert [str(step) for step in plan.steps] == [
        f"write disk vda to {tmp_path}/to/vda.qcow2 (qcow2), checking digests",
        f"clear {tmp_path}/raw and write disk vdb to it, checking digests",
    ]
    assert not (tmp_path / "to").exists()
    assert (tmp_path / "raw").read_bytes() == b"x" * SIZE


# --- volumes ---------------------------------------------------------------------------------


@pytest.fixture(name="holes", params=[True, False], ids=["holes", "no holes"])
def holes_fixture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Storage that has holes, and storage that has none."""
    if not request.param:
        monkeypatch.setattr(volume, "_fallocate", lambda *_: False)
    return bool(request.param)


def test_of_what_a_volume_held_nothing_is_left(holes: bool, tmp_path: Path) -> None:
    path = tmp_path / "volume"
    path.write_bytes(b"old" * (2 * BLOCK))
    end = 6 * BLOCK
    to = Volume(path, 5 * BLOCK)
    to.clear()
    to.write(0, memoryview(b"a" * BLOCK + b"b" * BLOCK))
    to.write(4, memoryview(b"c" * BLOCK))
    assert path.read_bytes()[: 2 * BLOCK] == MARK.ljust(BLOCK, b"\0") + b"b" * BLOCK
    to.close()
    data = path.read_bytes()
    assert data == b"a" * BLOCK + b"b" * BLOCK + bytes(2 * BLOCK) + b"c" * BLOCK + bytes(BLOCK)
    assert len(data) == end
    assert (path.stat().st_blocks * 512 < end) is holes


def test_a_half_written_volume_says_so_and_does_not_begin_like_a_disk(tmp_path: Path) -> None:
    path = tmp_path / "volume"
    path.write_bytes(b"old" * BLOCK)
    to = Volume(path, 3 * BLOCK)
    assert path.read_bytes() == b"old" * BLOCK
    to.clear()
    to.write(0, memoryview(b"a" * 2 * BLOCK))
    to.abandon()
    data = path.read_bytes()
    assert data == MARK.ljust(BLOCK, b"\0") + b"a" * BLOCK + bytes(BLOCK)
    assert len(MARK) < 446  # where the boot record has its table and its signature


def test_no_word_of_it_is_left_where_the_disk_begins_with_zeroes(tmp_path: Path) -> None:
    path = tmp_path / "volume"
    path.write_bytes(b"old" * BLOCK)
    to = Volume(path, 3 * BLOCK)
    to.clear()
    to.write(1, memoryview(b"a" * BLOCK))
    to.close()
    assert path.read_bytes() == bytes(BLOCK) + b"a" * BLOCK + bytes(BLOCK)


def test_a_file_is_made_as_long_as_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "volume"
    path.write_bytes(b"x" * 1000)
    to = Volume(path, 1024)
    to.clear()
    to.close()
    assert path.read_bytes() == bytes(1024)


def test_a_new_file_is_sparse_and_never_takes_anothers_place(tmp_path: Path) -> None:
    path = tmp_path / "new"
    to = NewFile(path, 100 * BLOCK + 512)
    to.write(3, memoryview(b"a" * BLOCK))
    to.close()
    to.abandon()
    assert path.stat().st_size == 100 * BLOCK + 512
    assert path.stat().st_blocks * 512 < 50 * BLOCK
    with pytest.raises(FileExistsError):
        NewFile(path, 1)
    gone = NewFile(tmp_path / "gone", 1)
    gone.abandon()
    assert names(tmp_path) == ["new"]


def test_every_failure_is_one_of_ours() -> None:
    assert issubclass(RestoreFailed, CkptmgrError)
    assert RestoreFailed.code == "restore"
