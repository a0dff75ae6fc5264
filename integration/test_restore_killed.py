"""restore, killed at any step: the next command tells what is there, and it is right."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import libvirt
import pytest

import ckptmgr
from ckptmgr.backup.volume import MARK
from ckptmgr.consistency import Unfinished
from ckptmgr.store import Store
from integration.conftest import MakeMachine
from integration.kill.boundaries import END, Boundaries, Victim
from integration.kill.scene import await_orphans, orphans
from integration.stand import Daemon, DiskSpec, Machine, await_rest
from integration.test_backup import Backups, disk_in
from tests.restorable import content, restorable

KIB, MIB = 1 << 10, 1 << 20


def victim(how: str, number: str, repository: str, point: str, *rest: str) -> None:
    """Restore, and be killed at the boundary of that number."""
    boundaries = Boundaries(
        Victim.PROCESS,
        int(number),
        {},
        lambda where: print(where, flush=True),
        steps_only=False,
    )
    if how in ("folder", "volume"):
        catalogue = ckptmgr.repository(repository)
        (where,) = rest
        boundaries.install()
        if how == "folder":
            catalogue.restore("web", point, where, flatten=True)
        else:
            catalogue.restore("web", point, onto={"vda": where})
        boundaries.end()
        return
    uri, store, name, *rest = rest  # type: ignore[assignment]
    with ckptmgr.connect(uri, store=store) as host:
        domain = host.domain(name)
        boundaries.install()
        if how == "define":
            new, folder, flatten = rest
            host.restore(repository, name, point, folder, name=new, flatten=bool(flatten))
        else:
            domain.restore(repository, point, disks=rest)
        boundaries.end()


def killed(*arguments: object, daemon: Daemon | None = None) -> str:
    """Restore and be killed, see `victim`; returns where that was.

    daemon -- that goes on with what it was asked
    """
    before = orphans()
    done = subprocess.run(
        [sys.executable, "-m", __name__, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    await_orphans(before)
    if daemon is not None:
        await_rest(daemon.pid)
    return done.stdout.strip()


def strike(
    daemon: Daemon, backups: Backups, point: str, number: int, disks: tuple[str, ...]
) -> str:
    """Restore in place and kill; returns where that was."""
    machine = backups.machine
    where = (backups.repository, point, machine.uri, backups.store, machine.name)
    return killed("in place", number, *where, *disks, daemon=daemon)


def contents(machine: Machine) -> dict[str, bytes]:
    """What every disk holds."""
    return {disk.target: machine.contents(disk.target) for disk in machine.disks}


def assert_covered(
    domain: ckptmgr.Domain, start: str, then: dict[str, bytes], machine: Machine
) -> None:
    """All that differs from a checkpoint is in what is said to have changed since."""
    for disk in domain.diff(start).disks:
        now, before = machine.contents(disk.name), then[disk.name]
        told = bytearray(len(now))
        for first, length in disk.extents():
            told[first : first + length] = b"\1" * length
        for at in range(0, len(now), 4 * KIB):
            same = now[at : at + 4 * KIB] == before[at : at + 4 * KIB]
            assert same or told[at], (disk.name, at)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("disks", [(), ("vda",)], ids=["all disks", "one disk"])
def test_killed_at_any_step_it_is_settled_by_what_is_there(
    daemon: Daemon,
    make_vm_on: MakeMachine,
    tmp_path: Path,
    disks: tuple[str, ...],
    request: pytest.FixtureRequest,
) -> None:
    # With --long at every one of them; else at every third, of one disk and of all at others.
    stride = 1 if request.config.getoption("--long") else 3
    specs = [DiskSpec("vda", size=4 * MIB), DiskSpec("vdb", size=2 * MIB)]
    machine = make_vm_on(daemon, specs, state="running")
    backups = Backups(machine, tmp_path)
    for number, name in enumerate(("monday", "tuesday")):
        for target in ("vda", "vdb"):
            machine.write(target, number * 128 * KIB, 200 * KIB, number + 1)
        backups.take(name)
    machine.stop()
    chosen = disks or ("vda", "vdb")
    done = False
    seen = []
    for number in itertools.count(1 + len(disks), stride):
        point = ("monday", "tuesday")[number % 2]
        for target in ("vda", "vdb"):
            machine.write(target, 1 * MIB + number % 16 * 32 * KIB, 32 * KIB, number % 200 + 10)
        old = contents(machine)
        with backups.domain() as domain:
            current = domain.current()
        assert current is not None
        where = strike(daemon, backups, point, number, disks)
        seen.append(where)
        done = where == END
        with backups.domain() as domain:
            domain.diff("monday")  # whatever takes the lock settles it
            found = domain.current()
            assert found is not None
            now = contents(machine)
            restored = {target for target in chosen if now[target] != old[target]}
            assert restored in (set(), set(chosen)), where
            for target in machine.images:
                wanted = backups.held[point] if target in restored else old
                assert now[target] == wanted[target], (where, target)
            if restored:
                assert found.name != current.name
                assert found.parent == (current.name if disks else point), where
                assert found.name == domain.adapter.marker().checkpoint  # type: ignore[union-attr]
                if not disks:
                    (one, two) = domain.diff(point).disks
                    assert (one.known, one.dirty_bytes, two.known, two.dirty_bytes) == (
                        True,
                        0,
                        True,
                        0,
                    ), where
            else:
                assert found.name == current.name, where
                assert not done
            for earlier in ("monday", "tuesday"):
                assert_covered(domain, earlier, backups.held[earlier], machine)
            assert [each for each in domain.check() if not each.harmless] == [], where
        if done:
            break
    # Struck before the first thing was changed, after the last, and in between.
    assert len(seen) > 30 // stride
    folder = next(iter(machine.images.values())).parent
    assert {path.name for path in folder.iterdir()} == {"vda.qcow2", "vdb.qcow2"}
    machine.start()
    machine.write("vda", 1 * MIB, 4096, 0x99)
    last = backups.take("last")
    backups.check(last)
    assert [disk.mode for disk in last.disks] == ["incremental"] * 2
    assert all(disk.reason is None for disk in last.disks)


def is_taken_back(host: ckptmgr.Host, name: str, folder: Path) -> bool:
    """Have `repair` take back what there is of a domain that libvirt never knew; whether there was
    anything, and then whoever asks for that domain is told.
    """
    with pytest.raises(ckptmgr.NoDomain) as caught:
        host.domain(name)
    plan = host.plan_take_back(name)
    cured = host.take_back(name)
    assert (plan is None) == (not cured)
    if not cured:
        assert "interrupted" not in caught.value.message
        assert not folder.exists() or list(folder.iterdir()) == []
        return False
    assert isinstance(caught.value, Unfinished)
    assert caught.value.finding == cured[0]
    assert cured[0].message in caught.value.message
    assert f"repair {name}" in str(caught.value.hint)
    assert not folder.exists()
    with pytest.raises(ckptmgr.NoDomain) as caught:
        host.domain(name)
    assert "interrupted" not in caught.value.message
    return True


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("flatten", [True, False], ids=["images", "overlays"])
def test_killed_while_a_domain_is_made_it_is_taken_back_or_completed(
    daemon: Daemon,
    make_vm_on: MakeMachine,
    tmp_path: Path,
    flatten: bool,
    request: pytest.FixtureRequest,
) -> None:
    """Whatever is done next: the same again, or `repair`, where libvirt does not know it; else any
    command.
    """
    stride = 1 if request.config.getoption("--long") else 7
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"a kernel")
    machine = make_vm_on(
        daemon,
        [DiskSpec("vda", size=1 * MIB), DiskSpec("vdb", size=1 * MIB)],
        state="stopped",
        os_elements=f"<kernel>{kernel}</kernel>",
    )
    backups = Backups(machine, tmp_path)
    for number, target in enumerate(("vda", "vdb")):
        machine.write(target, number * 128 * KIB, 200 * KIB, number + 1)
    backups.take("monday")
    folder, new = tmp_path / "new", f"{machine.name}-new"
    domain_store = Store(backups.store)
    seen = []
    known_at_once = repaired = 0
    for number in itertools.count(2 if flatten else 5, stride):
        where = killed(
            "define",
            number,
            *(backups.repository, "monday", machine.uri, backups.store, machine.name),
            *(new, folder, "flatten" if flatten else ""),
            daemon=daemon,
        )
        seen.append(where)
        defined = new in [each.name() for each in daemon.handle.listAllDomains()]
        known_at_once += defined
        with ckptmgr.connect(machine.uri, store=backups.store) as host:
            if not defined and number // stride % 2:
                repaired += is_taken_back(host, new, folder)
                assert set(domain_store.domains()) == {machine.domain.UUIDString()}, where
            if not defined:
                options: dict[str, Any] = {"name": new, "flatten": flatten}
                host.restore(backups.repository, machine.name, "monday", folder, **options)
            domain = host.domain(new)
            (vda, vdb) = domain.diff("monday").disks
            assert (vda.dirty_bytes, vdb.dirty_bytes) == (0, 0), where
            assert vda.known and vdb.known, where
            found = domain.current()
            assert found is not None
            assert found.name == "monday"
            assert [each for each in domain.check() if not each.harmless] == [], where
            uuid = domain.view.uuid
        assert {path.name for path in folder.iterdir()} == {"vda.qcow2", "vdb.qcow2", "kernel"}
        assert (folder / "kernel").read_bytes() == b"a kernel"
        for target in ("vda", "vdb"):
            assert disk_in(folder / f"{target}.qcow2") == backups.held["monday"][target], where
        # Nothing is recorded of those that were taken back.
        assert set(domain_store.domains()) == {machine.domain.UUIDString(), uuid}, where
        daemon.handle.lookupByName(new).undefineFlags(
            libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        )
        shutil.rmtree(folder)
        shutil.rmtree(backups.store / uuid)
        if where == END:
            break
    assert 0 < known_at_once < len(seen)
    assert repaired


@pytest.mark.parametrize("stride", [3])
def test_killed_while_a_folder_is_filled_all_images_come_or_none(
    tmp_path: Path, stride: int, request: pytest.FixtureRequest
) -> None:
    stride = 1 if request.config.getoption("--long") else stride
    repository = restorable(tmp_path / "repository").path.parent
    folder = tmp_path / "to"
    for number in itertools.count(1, stride):
        where = killed("folder", number, repository, "tuesday", folder)
        try:
            ckptmgr.repository(repository).restore("web", "tuesday", folder, flatten=True)
        except ckptmgr.InvalidRequest as error:
            # Interrupted when all were whole, it was completed just now.
            assert "is there already" in error.message, where
            assert where == END or "_link" in where, where
        assert sorted(path.name for path in folder.iterdir()) == ["vda.qcow2", "vdb.raw"], where
        raw = tmp_path / "seen.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", folder / "vda.qcow2", raw], check=True)
        assert raw.read_bytes() == content("tuesday"), where
        shutil.rmtree(folder)
        if where == END:
            break
    assert number > 6


def test_killed_while_a_volume_is_written_it_says_that_it_is_half_written(tmp_path: Path) -> None:
    repository = restorable(tmp_path / "repository").path.parent
    volume = tmp_path / "volume"
    old, new = b"old" * MIB, content("tuesday")
    told = []
    for number in itertools.count(1):
        volume.write_bytes(old)
        where = killed("volume", number, repository, "tuesday", volume)
        data = volume.read_bytes()
        whole = new + bytes(len(old) - len(new))
        if data.startswith(MARK):
            told.append(where)
            assert b"ckptmgr" not in data[len(MARK) :]
        else:
            assert data in (old, whole), where
        ckptmgr.repository(repository).restore("web", "tuesday", onto={"vda": volume})
        assert volume.read_bytes() == whole, where
        if where == END:
            break
    assert len(told) >= 3


if __name__ == "__main__":
    victim(*sys.argv[1:])
