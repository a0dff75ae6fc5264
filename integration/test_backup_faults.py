"""A backup whose target fails it: it fails whole, and the next one has all that changed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ckptmgr
from ckptmgr.backup import qcow2
from ckptmgr.backup.block import BLOCK
from ckptmgr.backup.manifest import Manifest
from ckptmgr.store import files
from integration.conftest import MakeMachine
from integration.evidence import bitmaps, everything, known, wipe
from integration.stand import MIB, Daemon, DiskSpec, Machine
from integration.test_backup import Backups, MakeBackups, modes

CALLS = (
    "_create",
    "_write",
    "_fsync",
    "_rename",
    "_unlink",
    "_rmdir",
    "_mkdir",
    "_fsync_folder",
)
FAULTS = {
    "disk-full": (errno.ENOSPC, False),
    "read-only": (errno.EROFS, True),
    "broken": (errno.EIO, False),
}
REMOVING = ("_unlink", "_rmdir", "_fsync_folder")
"""What a full disk still does."""


@dataclass
class Fault:
    """Fails call number `at` of all that write to the store or the repository; sticky: and the
    rest, too."""

    error: int
    at: int
    sticky: bool
    calls: int = 0
    where: str = ""

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in CALLS:
            patch.setattr(files, name, self._around(name, getattr(files, name)))
        system = SimpleNamespace(**vars(os))
        for name in ("open", "pwrite", "ftruncate", "fsync"):
            setattr(system, name, self._around(f"image {name}", getattr(os, name)))
        patch.setattr(qcow2, "os", system)

    def _around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            if self.error == errno.ENOSPC and name in REMOVING:
                return call(*arguments)
            self.calls += 1
            if self.calls == self.at or (self.sticky and self.calls > self.at):
                self.where = self.where or f"{name} {arguments[0]}"
                raise OSError(self.error, os.strerror(self.error))
            return call(*arguments)

        return called

    @property
    def struck(self) -> bool:
        return self.calls >= self.at


@pytest.fixture
def backups(daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path) -> MakeBackups:
    def make(*disks: DiskSpec, state: str = "running", engine: str = "auto") -> Backups:
        made = Backups(make_vm_on(daemon, list(disks), state=state), tmp_path)
        made.engine = engine
        return made

    return make


def partials(repository: Path) -> list[str]:
    return [str(path) for path in repository.rglob("*") if path.name.startswith(".")]


def whole(repository: Path, *names: str) -> None:
    """The repository has just these points, and nothing else."""
    listing = ckptmgr.repository(repository).points()
    assert {point.name for point in listing.points} == {*names}
    assert not listing.damaged
    assert not any(point.broken for point in listing.points)
    assert partials(repository) == []


def sound(repository: Path) -> None:
    """Every byte of it is what was written, as `verify` sees it."""
    view = ckptmgr.repository(repository).verify()
    assert [(each.code, each.message) for each in view.findings] == []


def quiet(machine: Machine) -> None:
    """No job, export, node, server or file of ours is left."""
    assert machine.domain.jobInfo()[0] == 0
    assert machine.qmp("query-block-exports") == []
    assert machine.qmp("query-jobs") == []


def clean(vm: Backups) -> None:
    with vm.domain() as domain:
        assert [each.code for each in domain.check() if not each.harmless] == []


@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", FAULTS)
def test_at_every_write(
    fault: str, backups: MakeBackups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the repository's images and files, and of the store's."""
    error, sticky = FAULTS[fault]
    vm = backups(DiskSpec("vda", size=MIB + 512))
    made = [vm.take("p0")]
    stayed: list[str] = []
    failed = 0
    for at in count(1):
        vm.io("vda", f"write -P 1 {at % 16 * BLOCK} 512")
        there, listed = bitmaps(vm.machine), known(vm.machine)
        injected = Fault(error, at, sticky)
        name, failure = f"f{at}", None
        with monkeypatch.context() as patch:
            injected.install(patch)
            try:
                made.append(vm.take(name))
            except (ckptmgr.RepositoryFailed, ckptmgr.StoreFailed) as caught:
                failure = caught
        if not injected.struck:
            break
        where = f"{fault} at call {at}, {injected.where}"
        if failure is not None:
            failed += 1
            assert os.strerror(error) in failure.message, where
            assert "Errno" not in failure.message, where
            assert failure.hint, where
            if not sticky:
                whole(vm.repository, *(point.name for point in made))
                assert bitmaps(vm.machine) == there, where
                assert known(vm.machine) == listed, where
            quiet(vm.machine)
        vm.io("vda", f"write -P 2 {at % 15 * BLOCK} {BLOCK + 512}")
        made.append(vm.take(f"n{at}"))
        assert [disk.reason for disk in made[-1].disks] == [None], where
        for point in set(names_in(vm.repository)) - {*stayed, *(each.name for each in made)}:
            # The rename was done, and could not be undone: a whole point, which stays.
            assert sticky, where
            assert point == name, where
            stayed.append(point)
        whole(vm.repository, *(point.name for point in made), *stayed)
        vm.check(made[-1])
        clean(vm)
        if len(made) > 8:
            sound(vm.repository)
            wipe(vm.machine)
            shutil.rmtree(vm.repository)
            shutil.rmtree(vm.store)
            made, stayed = [vm.take(f"p{at}")], []
    sound(vm.repository)
    print(f"{fault}: {failed} failures at {at - 1} calls")
    assert failed >= 20


def names_in(repository: Path) -> list[str]:
    return [point.name for point in ckptmgr.repository(repository).points().points]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for little."""
    with small_file_system(tmp_path / "small", "40m") as folder:
        yield folder


@contextmanager
def small_file_system(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"no file system can be mounted here: {done.stderr.strip()}"
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_target_that_is_full_costs_nothing(backups: MakeBackups, small: Path) -> None:
    """Neither here, once there is room, nor to another target is the next one a full backup."""
    vm = backups(DiskSpec("vda", size=8 * MIB), DiskSpec("vdb", size=2 * MIB))
    repository = small / "repository"
    vm.scatter(1)
    other = vm.take("other")
    first = vm.take("first", repository=repository)
    subprocess.run(["mount", "-o", "remount,size=6m", str(small)], check=True)
    vm.machine.write("vda", 0, 7 * MIB, 0x77)
    before = everything(vm.machine, vm.store)
    with pytest.raises(ckptmgr.RepositoryFailed, match="No space left on device") as caught:
        vm.take("second", repository=repository)
    assert "free some space" in str(caught.value.hint)
    assert everything(vm.machine, vm.store) == before
    whole(repository, "first")
    vm.scatter(2)
    elsewhere = vm.take("elsewhere")
    assert [disk.reason for disk in elsewhere.disks] == [None, None]
    assert modes(elsewhere) == {"vda": "incremental", "vdb": "incremental"}
    subprocess.run(["mount", "-o", "remount,size=40m", str(small)], check=True)
    third = vm.take("third", repository=repository)
    assert [disk.reason for disk in third.disks] == [None, None]
    assert third.parent == "first"
    vm.check(other, first, elsewhere, third)
    sound(repository)
    sound(vm.repository)


def test_a_target_that_is_read_only_is_refused_before_anything_is_touched(
    backups: MakeBackups, small: Path
) -> None:
    vm = backups(DiskSpec("vda", size=4 * MIB))
    repository = small / "repository"
    first = vm.take("first", repository=repository)
    vm.scatter(1)
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    before = everything(vm.machine, vm.store)
    with pytest.raises(ckptmgr.RepositoryFailed, match="Read-only file system") as caught:
        vm.take("second", repository=repository)
    assert "read-only" in str(caught.value.hint)
    assert everything(vm.machine, vm.store) == before
    whole(repository, "first")
    subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
    second = vm.take("second", repository=repository)
    assert second.disks[0].reason is None
    vm.check(first, second)
    sound(repository)


def in_the_middle(vm: Backups, act: Callable[[], object], name: str, **options: Any) -> Manifest:
    """Make a point, and do something when a part of its first disk has been copied."""
    acted = False

    def progress(disk: str, done: int, total: int) -> None:
        nonlocal acted
        if done and not acted:
            assert done < total
            acted = True
            act()

    try:
        return vm.take(name, progress=progress, **options)
    finally:
        assert acted


@pytest.mark.parametrize("how", ["removed", "moved", "unmounted"])
def test_a_target_that_goes_away_in_the_middle(how: str, backups: MakeBackups, small: Path) -> None:
    vm = backups(DiskSpec("vda", size=4 * MIB), DiskSpec("vdb", size=MIB))
    repository = small / "repository"
    vm.take("first", repository=repository)
    kept = vm.take("kept")
    vm.machine.write("vda", 0, 4 * MIB, 0x55)
    there, listed = bitmaps(vm.machine), known(vm.machine)

    def act() -> None:
        if how == "removed":
            shutil.rmtree(repository)
        elif how == "moved":
            repository.rename(small / "moved")
        else:
            subprocess.run(["umount", "-l", str(small)], check=True)

    try:
        with pytest.raises(ckptmgr.RepositoryFailed) as caught:
            in_the_middle(vm, act, "second", repository=repository)
        assert str(repository) in caught.value.message
        assert caught.value.hint
        assert (bitmaps(vm.machine), known(vm.machine)) == (there, listed)
        quiet(vm.machine)
        clean(vm)
        vm.scatter(3)
        second = vm.take("second")
        assert second.disks[0].reason is None
        vm.check(kept, second)
        sound(vm.repository)
        if how == "moved":
            third = vm.take("third", repository=small / "moved")
            assert third.disks[0].reason is None
            assert third.parent == "first"
            vm.check(third)
            sound(small / "moved")
    finally:
        if how == "unmounted":
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(small)], check=True)


@contextmanager
def bound(folder: Path, at: Path) -> Iterator[None]:
    """A file system that is mounted; what is written to it is in `folder`."""
    subprocess.run(["mount", "--bind", str(folder), str(at)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def test_where_nothing_is_mounted_no_new_repository_begins_unnoticed(
    daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path
) -> None:
    """Neither of the domain that had its points there, nor of another one's first."""
    mine, other = (
        Backups(make_vm_on(daemon, [DiskSpec("vda", size=MIB)], state="running"), tmp_path)
        for _ in range(2)
    )
    volume, mount = tmp_path / "volume", tmp_path / "mnt"
    for folder in (volume, mount):
        folder.mkdir()
    link = tmp_path / "link"
    link.symlink_to(mount)
    for each in (mine, other):
        each.repository = mount
    with bound(volume, mount):
        first = mine.take("first")
    mine.scatter(1)
    for vm in (mine, other):
        before = everything(vm.machine, vm.store)
        for place in (mount, link):
            for options in ({}, {"full": True}):
                with pytest.raises(ckptmgr.RepositoryFailed, match="there are none now") as caught:
                    vm.take("second", repository=place, **options)
                assert mine.machine.name in caught.value.message
                assert "mounted" in str(caught.value.hint)
                assert "--new" in str(caught.value.hint)
        with vm.domain() as domain, pytest.raises(ckptmgr.RepositoryFailed):
            domain.plan_backup(mount)
        assert list(mount.iterdir()) == []
        assert everything(vm.machine, vm.store) == before
    mount.rmdir()  # as where the system mounts on demand
    with pytest.raises(ckptmgr.RepositoryFailed, match="there are none now"):
        mine.take("second")
    assert not mount.exists()
    mount.mkdir()
    with bound(volume, mount):
        other.take("theirs")
        second = mine.take("second")
        assert (second.parent, second.disks[0].reason) == ("first", None)
        mine.check(first, second)
    # It is meant: then there is one, and from then on it needs no word of it.
    anew = mine.take("anew", new=True)
    assert anew.disks[0].mode == "full"
    mine.scatter(2)
    on_it = mine.take("on-it")
    assert on_it.disks[0].mode == "incremental"
    mine.check(anew, on_it)
    for vm in (mine, other):
        clean(vm)
