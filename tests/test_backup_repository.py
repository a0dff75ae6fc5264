"""The repository: drafts become points whole, damage costs what it touches, readers only read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.backup.digests import Digests
from ckptmgr.backup.manifest import format_manifest
from ckptmgr.backup.repository import Lineage, Repository
from ckptmgr.errors import (
    Busy,
    CkptmgrError,
    InvalidRequest,
    PointExists,
    RepositoryDamaged,
    RepositoryFailed,
    StoreFailed,
)
from ckptmgr.store import files

from .repositories import OTHER_UUID, UUID, commit, fill_draft, filled, manifest

NAMES = {"monday", "tuesday", "wednesday", "friday"}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_fsync", lambda descriptor: None)
    monkeypatch.setattr(files, "_fsync_folder", lambda path: None)


@pytest.fixture(name="lineage")
def lineage_fixture(tmp_path: Path) -> Lineage:
    return filled(tmp_path / "repo")


def everything(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
    }


def look(lineage: Lineage) -> set[str]:
    """Points all of whose files are read and found to be what they should, by the readers."""
    loaded = lineage.load()
    whole = set()
    for name, point in loaded.points.manifests.items():
        try:
            for disk in point.disks:
                loaded.points.chain(name, disk.name)
                with Digests(lineage.digests(point, disk.name)) as digests:
                    if digests.sha256 != disk.digests_sha256:
                        raise RepositoryDamaged("another file")
                if lineage.image(point, disk.name).stat().st_size != disk.bytes:
                    raise RepositoryDamaged("another size")
            for file in point.files:
                lineage.read(point, file)
        except (RepositoryDamaged, RepositoryFailed, OSError):
            continue
        whole.add(name)
    return whole


def test_what_was_committed_is_there(lineage: Lineage) -> None:
    loaded = lineage.load()
    assert set(loaded.points.manifests) == NAMES == look(lineage)
    assert loaded.damaged == ()
    monday = loaded.points.get("monday")
    assert lineage.read(monday, monday.files[0]) == b"<domain>monday</domain>"
    assert sorted(path.name for path in (lineage.path / "monday").iterdir()) == [
        "domain.xml",
        "manifest.json",
        "vda.digests",
        "vda.qcow2",
    ]
    assert (lineage.path / "monday").stat().st_mode & 0o777 == 0o700


def test_reading_changes_nothing(lineage: Lineage) -> None:
    before = everything(lineage.path.parent)
    repository = Repository(lineage.path.parent)
    assert [each.key for each in repository.lineages()] == [UUID]
    assert [each.key for each in repository.find("web")] == [UUID]
    assert [each.key for each in repository.find(UUID)] == [UUID]
    assert repository.find("nobody") == ()
    look(lineage)
    unknown = repository.lineage(OTHER_UUID)
    assert unknown.load().points.manifests == {}
    assert everything(lineage.path.parent) == before


def test_a_repository_that_is_not_there_is_no_empty_one(tmp_path: Path) -> None:
    with pytest.raises(RepositoryFailed, match="there is no repository") as raised:
        Repository(tmp_path / "repo").lineages()
    assert "mounted" in (raised.value.hint or "")
    (tmp_path / "file").touch()
    for ask in (Repository(tmp_path / "file").lineages, Repository(tmp_path / "file").make):
        with pytest.raises(RepositoryFailed, match="not a folder"):
            ask()


def test_lineages_are_called_after_uuids(lineage: Lineage) -> None:
    repository = Repository(lineage.path.parent)
    for name in ("lost+found", UUID.upper(), "notes.txt"):
        (repository.path / name).mkdir()
    (repository.path / str(uuid.uuid4())).symlink_to(lineage.path)
    (repository.path / str(uuid.uuid4())).touch()
    assert [each.key for each in repository.lineages()] == [UUID]
    for key in ("web", "../x", UUID.upper()):
        with pytest.raises(InvalidRequest):
            repository.lineage(key)


def test_nothing_is_changed_without_the_lock(lineage: Lineage) -> None:
    with pytest.raises(RuntimeError):
        lineage.draft("saturday")
    with pytest.raises(RuntimeError):
        lineage.settle()
    with lineage.lock(0):
        draft = lineage.draft("saturday")
        made = fill_draft(draft, manifest("saturday", "friday"))
    with pytest.raises(RuntimeError):
        draft.commit(made)


def test_one_writer_at_a_time(lineage: Lineage) -> None:
    with (
        lineage.lock(0),
        pytest.raises(Busy, match=f"the repository's part {UUID} .* process {os.getpid()}"),
        Repository(lineage.path.parent).lineage(UUID).lock(0),
    ):
        pass


def test_errors_of_what_is_done_under_the_lock_stay_what_they_are(lineage: Lineage) -> None:
    with pytest.raises(StoreFailed), lineage.lock(0):
        raise StoreFailed("of the store")


@pytest.mark.parametrize("kind", ["point", "folder", "file"])
def test_a_name_that_is_taken_is_refused(lineage: Lineage, kind: str) -> None:
    if kind == "folder":
        (lineage.path / "saturday").mkdir()
    elif kind == "file":
        (lineage.path / "saturday").touch()
    with lineage.lock(0), pytest.raises(PointExists):
        lineage.draft("monday" if kind == "point" else "saturday")


@pytest.mark.parametrize("name", ["", "../x", ".x", "a/b", "a b", "x" * 201])
def test_a_name_that_cannot_be_is_refused(lineage: Lineage, name: str) -> None:
    with lineage.lock(0), pytest.raises(InvalidRequest):
        lineage.draft(name)


def test_a_draft_is_no_point_before_it_is_committed(lineage: Lineage) -> None:
    with lineage.lock(0):
        draft = lineage.draft("saturday")
        made = fill_draft(draft, manifest("saturday", "friday"))
        assert set(lineage.load().points.manifests) == NAMES
        with pytest.raises(ValueError, match="draft of saturday"):
            draft.commit(replace(made, name="sunday"))
        draft.path("vda.qcow2").rename(draft.path("moved"))
        with pytest.raises(RepositoryFailed, match=r"vda\.qcow2 cannot be written: No such file"):
            draft.commit(made)
        draft.path("moved").rename(draft.path("vda.qcow2"))
        draft.commit(made)
        assert look(lineage) == NAMES | {"saturday"}
        draft.abandon()  # too late
    assert look(lineage) == NAMES | {"saturday"}


def test_abandoning_leaves_nothing_and_settling_what_was_killed(lineage: Lineage) -> None:
    before = everything(lineage.path)
    with lineage.lock(0):
        draft = lineage.draft("saturday")
        fill_draft(draft, manifest("saturday", "friday"))
        draft.abandon()
    assert everything(lineage.path) == before
    with lineage.lock(0):
        fill_draft(lineage.draft("saturday"), manifest("saturday", "friday"))
    outside = lineage.path.parent.parent / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    (lineage.path / ".sunday.gone").mkdir()
    (lineage.path / ".sunday.gone" / "link").symlink_to(outside)
    (lineage.path / f".x.{'0' * 16}.partial").symlink_to(outside)
    (lineage.path / f".prune.json.{'0' * 16}.tmp").touch()
    (lineage.path / f".x.{'0' * 16}.partial").unlink()
    with lineage.lock(0):
        lineage.settle()
    assert everything(lineage.path) == before
    assert (outside / "precious").exists()


def test_a_folder_of_another_name_is_another_point(lineage: Lineage) -> None:
    shutil.copytree(lineage.path / "monday", lineage.path / "copy")
    loaded = lineage.load()
    assert set(loaded.points.manifests) == NAMES
    (damage,) = loaded.damaged
    assert damage.point == "copy"
    assert "manifest of another point, monday" in damage.message


def test_a_copied_repository_with_fresh_times_says_the_same(lineage: Lineage) -> None:
    copy = Repository(lineage.path.parent.with_name("copy"))
    shutil.copytree(lineage.path.parent, copy.path, copy_function=shutil.copyfile)
    names = list(copy.path.rglob("*"))
    for age, path in enumerate(reversed(names)):
        os.utime(path, (age, age))
    there = copy.lineage(UUID)
    assert there.load() == lineage.load()
    assert there.load().points.newest() == "friday"
    assert look(there) == NAMES


def damages(content: bytes) -> st.SearchStrategy[bytes]:
    return (
        st.tuples(st.integers(0, len(content) - 1), st.integers(1, 255)).map(
            lambda at: content[: at[0]] + bytes([content[at[0]] ^ at[1]]) + content[at[0] + 1 :]
        )
        | st.integers(0, len(content) - 1).map(lambda length: content[:length])
        | st.binary(max_size=64)
    )


@settings(max_examples=150)
@given(st.data())
def test_damage_of_any_file_is_named_and_costs_what_stands_on_it(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lineage = filled(Path(folder, "repo"))
        loaded = lineage.load()
        paths = sorted(
            path
            for path in lineage.path.rglob("*")
            if path.is_file() and path.name not in ("lock", "vda.qcow2")  # which verify reads
        )
        path = data.draw(st.sampled_from(paths))
        original = path.read_bytes()
        path.write_bytes(data.draw(damages(original)))
        hit = path.parent.name
        after = lineage.load()
        if path.read_bytes() == original:
            return
        if path.name != "manifest.json":
            assert after == loaded
            assert look(lineage) == NAMES - {hit}
        elif after != loaded:  # (a blank more or less in JSON is no damage)
            assert [each.point for each in after.damaged] == [hit]
            assert set(after.points.manifests) == NAMES - {hit}
            below = loaded.points.dependants(hit)
            assert after.points.dependants(hit) == below
            assert look(lineage) == NAMES - {hit, *below}
            assert not any(after.points.broken(name) for name in look(lineage))
            assert all(after.points.broken(name) for name in below)


@pytest.mark.parametrize("kind", ["missing", "folder", "link", "fifo", "huge", "unreadable name"])
def test_a_manifest_that_is_no_file_costs_its_point(lineage: Lineage, kind: str) -> None:
    path = lineage.path / "friday" / "manifest.json"
    content = path.read_bytes()
    path.unlink()
    match kind:
        case "folder":
            path.mkdir()
        case "link":
            (path.parent / "elsewhere").write_bytes(content)
            path.symlink_to("elsewhere")
        case "fifo":
            os.mkfifo(path)
        case "huge":
            with path.open("wb") as file:
                file.truncate(1 << 40)
        case "unreadable name":
            path.write_bytes(content)
            (lineage.path / "not a point").mkdir()
    loaded = lineage.load()
    lost = "not a point" if kind == "unreadable name" else "friday"
    assert [damage.point for damage in loaded.damaged] == [lost]
    assert set(loaded.points.manifests) == NAMES - {lost}


def test_a_newer_manifest_says_so(lineage: Lineage) -> None:
    path = lineage.path / "friday" / "manifest.json"
    members = json.loads(path.read_bytes())
    path.write_text(json.dumps(members | {"format": 9}))
    (damage,) = lineage.load().damaged
    assert "newer version" in damage.message


def test_a_file_beside_the_disks_is_checked_when_it_is_read(lineage: Lineage) -> None:
    point = lineage.load().points.get("monday")
    (lineage.path / "monday" / "domain.xml").write_bytes(b"<domain>evil!!</domain>")
    with pytest.raises(RepositoryDamaged, match="not what the manifest says"):
        lineage.read(point, point.files[0])
    (lineage.path / "monday" / "domain.xml").unlink()
    with pytest.raises(RepositoryDamaged, match="missing"):
        lineage.read(point, point.files[0])


@pytest.fixture(name="read_only")
def read_only_fixture(lineage: Lineage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lineage]:
    """Every call that changes the disk fails, as on a read-only file system."""

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("_create", "_rename", "_unlink", "_mkdir", "_rmdir"):
        monkeypatch.setattr(files, name, refuse)
    yield lineage


def test_a_read_only_repository_is_read_and_refuses_the_rest(read_only: Lineage) -> None:
    assert look(read_only) == NAMES
    with (
        read_only.lock(0),
        pytest.raises(RepositoryFailed, match="Read-only file system") as raised,
    ):
        commit(read_only, manifest("saturday"))
    assert "read-only" in (raised.value.hint or "")
    assert "--store" not in (raised.value.hint or "")
    with pytest.raises(RepositoryFailed):
        Repository(read_only.path.parent / "new").make()


def test_errors_are_the_packages_own() -> None:
    for kind in (RepositoryFailed, RepositoryDamaged, PointExists):
        assert issubclass(kind, CkptmgrError)
    assert format_manifest(manifest("a"))
