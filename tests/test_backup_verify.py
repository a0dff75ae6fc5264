"""What verify makes of relations and of what images hold; and of images that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from pyroaring import BitMap64

import ckptmgr
from ckptmgr import Retention
from ckptmgr.backup import verification
from ckptmgr.backup.digests import Digests
from ckptmgr.backup.inspection import allocation_faults
from ckptmgr.backup.manifest import PointFile
from ckptmgr.backup.points import Points
from ckptmgr.backup.repository import Damage, Loaded, Repository
from ckptmgr.backup.verification import structure
from ckptmgr.cli import main

from .repositories import UUID, commit, filled, identity, manifest, point_disk, write_digests
from .test_backup_points import WEEK, damaged


def codes(points: Points, *lost: str) -> list[tuple[str, str | None, tuple[str, ...]]]:
    damages = tuple(Damage(Path(name), name, f"{name} is damaged") for name in lost)
    return [(each.code, each.point, each.affected) for each in structure(Loaded(points, damages))]


def test_a_week_has_nothing_to_tell() -> None:
    assert codes(WEEK) == []


def test_what_is_missing_is_named_and_not_what_stands_on_it() -> None:
    left = WEEK.only(set(WEEK.manifests) - {"tu"})
    assert codes(left) == [
        ("missing-point", "tu", ("we", "fr")),
        ("missing-parent", "we", ()),
        ("missing-point", "tu", ("x",)),
        ("missing-parent", "x", ()),
    ]
    assert codes(left, "tu") == [("damaged-manifest", "tu", ("tu", "we", "fr", "x"))]


def test_a_base_that_is_not_what_it_was_is_told() -> None:
    one = manifest("a")
    assert codes(Points({"a": one, "b": manifest("b", disks=(point_disk("vdb", "a"),))})) == [
        ("missing-disk", "a", ("b",))
    ]
    other = manifest("a", id=identity("another"))
    assert codes(Points({"a": other, "b": manifest("b", "a")}))[0] == (
        "replaced-point",
        "a",
        ("b",),
    )
    round_ = Points({name: manifest(name, base) for name, base in [("a", "b"), ("b", "a")]})
    assert [code for code, _, _ in codes(round_)] == [
        "circular", "missing-parent", "circular", "missing-parent",
    ]  # fmt: skip


@given(damaged())
def test_every_broken_point_is_affected_by_something_and_no_other(found: Points) -> None:
    affected = {
        name for each in structure(Loaded(found, ())) if not each.harmless for name in each.affected
    }
    assert affected == {name for name in found.manifests if found.broken(name) is not None}


def test_what_an_image_holds_is_what_its_digests_say(tmp_path: Path) -> None:
    write_digests(tmp_path / "d", {0: b"x", 1: b"", 4: b"y"})
    with Digests(tmp_path / "d") as digests:

        def told(*allocated: int, root: bool) -> list[str]:
            faults = allocation_faults("vda", BitMap64(allocated), digests, root=root)
            return [code for code, _ in faults]

        assert told(0, 1, 4, root=False) == told(0, 1, 4, root=True) == told(0, 4, root=True) == []
        assert told(0, 4, root=False) == ["missing-data"]
        assert told(0, 1, root=True) == ["missing-data"]
        assert told(0, 1, 2, 4, root=True) == ["unknown-data"]
        assert told(2, root=False) == ["unknown-data", "missing-data"]


def test_images_that_are_none_are_found_without_asking_qemu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    lineage = filled(tmp_path / "repo")
    (lineage.path / "friday" / "vda.qcow2").unlink()
    assert main(["verify", str(tmp_path / "repo"), "--json"]) == 4
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["points"] == 4
    assert [(each["code"], each["point"]) for each in document["findings"]] == [
        ("damaged-header", "monday"),
        ("damaged-header", "tuesday"),
        ("damaged-header", "wednesday"),
        ("missing-image", "friday"),
    ]
    assert document["findings"][0]["affected"] == ["monday", "tuesday", "wednesday", "friday"]


def test_a_file_system_that_goes_away_is_no_sound_repository(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lineage = filled(tmp_path / "repo")
    look = verification._file_fault

    def going(path: Path, file: PointFile) -> str | None:
        if lineage.path.exists():
            lineage.path.rename(tmp_path / "unmounted")
        return look(path, file)

    monkeypatch.setattr(verification, "_file_fault", going)
    assert main(["verify", str(tmp_path / "repo"), "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "repository"
    assert "mounted" in error["hint"]


def test_a_point_that_is_pruned_meanwhile_is_no_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """(Images that are images are in integration/.)"""
    lineage = Repository(tmp_path / "repo").lineage(UUID)
    with lineage.lock(0):
        commit(lineage, manifest("a", disks=()))
        commit(lineage, manifest("b", "a", disks=()))
    look = verification._file_fault

    def going(path: Path, file: PointFile) -> str | None:
        if "a" in lineage.names():
            ckptmgr.repository(tmp_path / "repo").prune(Retention(last=1))
        return look(path, file)

    monkeypatch.setattr(verification, "_file_fault", going)
    assert main(["verify", str(tmp_path / "repo"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []
