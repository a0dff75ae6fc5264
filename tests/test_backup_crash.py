"""A point being made, with a power cut, a full disk and an interruption at every system call."""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from ckptmgr.backup.digests import Digests
from ckptmgr.backup.failure import of_the_repository
from ckptmgr.backup.manifest import Manifest
from ckptmgr.backup.repository import Lineage, Repository
from ckptmgr.errors import RepositoryFailed
from ckptmgr.store import files

from . import disk
from .repositories import NOON, UUID, fill_draft, manifest, point_disk


@pytest.fixture(autouse=True)
def _simulated_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_fsync", lambda descriptor: None)
    monkeypatch.setattr(files, "_fsync_folder", lambda path: None)


SECOND = manifest("second", "first", created=NOON + 1, disks=(point_disk("vda", "first"),))


def prepared(root: Path) -> Lineage:
    """A lineage with one point, and its lock file."""
    repository = Repository(root / "repo")
    repository.make()
    lineage = repository.lineage(UUID)
    with lineage.lock(0):
        draft = lineage.draft("first")
        draft.commit(fill_draft(draft, manifest("first")))
    return lineage


def make_second(lineage: Lineage, recorder: disk.Recorder) -> None:
    draft = lineage.draft("second")
    try:
        made = fill_draft(draft, SECOND)
        draft.commit(made)
    except BaseException:
        draft.abandon()
        raise
    recorder.mark("committed")


def run(
    lineage: Lineage,
    recorder: disk.Recorder,
    patch: pytest.MonkeyPatch,
    scenario: Callable[[Lineage, disk.Recorder], None] = make_second,
) -> None:
    with lineage.lock(0), patch.context() as context:
        # What qemu or the block copier writes is written by these calls too, as far as we go.
        context.setattr(Path, "write_bytes", through_files)
        recorder.install(context)
        scenario(lineage, recorder)


def through_files(path: Path, data: bytes) -> int:
    with of_the_repository():
        output = files.Output(path)
        output.append(data)
        output._release()  # Draft.commit is to make it durable
    return len(data)


def require_whole(lineage: Lineage, expected: set[str]) -> None:
    loaded = lineage.load()
    assert set(loaded.points.manifests) == expected
    assert loaded.damaged == ()
    for name, point in loaded.points.manifests.items():
        require_point(lineage, name, point)


def require_point(lineage: Lineage, name: str, point: Manifest) -> None:
    (vda,) = point.disks
    assert lineage.image(point, "vda").read_bytes() == f"image of vda at {name}".encode()
    with Digests(lineage.digests(point, "vda")) as digests:
        assert digests.sha256 == vda.digests_sha256
    assert lineage.read(point, point.files[0]) == f"<domain>{name}</domain>".encode()


def test_a_power_cut_at_any_instant_leaves_a_whole_point_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lineage = prepared(tmp_path)
    start = disk.tree(tmp_path)
    recorder = disk.Recorder()
    run(lineage, recorder, monkeypatch)
    numbers = count()
    seen = set()
    for crash in disk.power_cuts(start, recorder.calls):
        root = tmp_path / f"crash {next(numbers)}"
        crash.restore(tmp_path, root)
        left = Repository(root / "repo").lineage(UUID)
        there = "second" in left.load().points
        seen.add(there)
        assert there or "committed" not in crash.done
        require_whole(left, {"first", "second"} if there else {"first"})
        with left.lock(0):
            left.settle()
            assert sorted(left.names()) == ["first", "lock", *["second"] * there]
            if not there:  # nothing stands in the way
                make_second(left, disk.Recorder())
        require_whole(left, {"first", "second"})
    assert seen == {True, False}
    assert next(numbers) > len({call for call, *_ in recorder.calls})


@pytest.mark.parametrize("missing", ["_fsync", "_fsync_folder"])
def test_the_power_cut_above_finds_a_missing_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(disk, "CALLS", tuple(call for call in disk.CALLS if call != missing))
    monkeypatch.setattr(files, missing, lambda target: None)
    with pytest.raises((AssertionError, OSError)):
        test_a_power_cut_at_any_instant_leaves_a_whole_point_or_none(tmp_path, monkeypatch)


def calls_of(root: Path, patch: pytest.MonkeyPatch) -> list[str]:
    recorder = disk.Recorder()
    run(prepared(root), recorder, patch)
    return [str(call[0]) for call in recorder.calls if call[0] != "mark"]


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (errno.ENOSPC, "ckptmgr prune"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "another repository"),
        (errno.EIO, "check the file system"),
        (errno.ESTALE, "mounted"),
    ],
)
def test_a_disk_that_refuses_any_call_leaves_the_old_points_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, hint: str
) -> None:
    calls = calls_of(tmp_path / "dry", monkeypatch)
    assert len(calls) > 15
    for number, call in enumerate(calls, start=1):
        lineage = prepared(tmp_path / str(number))
        recorder = disk.Recorder(before=disk.failing_at(number, error))
        with pytest.raises(RepositoryFailed) as raised:
            run(lineage, recorder, monkeypatch)
        assert str(lineage.path) in raised.value.message
        assert hint in (raised.value.hint or "")
        assert "--store" not in (raised.value.hint or "")
        # The very last call makes the name durable that is there already.
        done = number == len(calls) and call == "_fsync_folder"
        require_whole(lineage, {"first", "second"} if done else {"first"})
        with lineage.lock(0):
            lineage.settle()
        if not done:
            assert sorted(lineage.names()) == ["first", "lock"]
            run(lineage, disk.Recorder(), monkeypatch)
        require_whole(lineage, {"first", "second"})


def test_an_interruption_at_any_call_damages_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, _ in enumerate(calls_of(tmp_path / "dry", monkeypatch), start=1):
        lineage = prepared(tmp_path / str(number))
        recorder = disk.Recorder(before=disk.failing_at(number, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(lineage, recorder, monkeypatch)
        loaded = lineage.load()
        assert loaded.damaged == ()
        require_whole(lineage, set(loaded.points.manifests))
        with lineage.lock(0):  # released
            lineage.settle()
