"""restore --in-place, killed at any step: the next command tells what is there, and it is right."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ckptmgr
from ckptmgr.engine.qemu_img import check_free
from integration.conftest import MakeMachine
from integration.kill.boundaries import END, Boundaries, Victim
from integration.stand import Daemon, DiskSpec, Machine
from integration.test_backup import Backups

KIB, MIB = 1 << 10, 1 << 20


def victim(uri: str, store: str, name: str, repository: str, point: str, *rest: str) -> None:
    """Restore in place, and be killed at the boundary of that number."""
    number, *disks = rest
    boundaries = Boundaries(
        Victim.PROCESS,
        int(number),
        {},
        lambda where: print(where, flush=True),
        steps_only=False,
    )
    with ckptmgr.connect(uri, store=store) as host:
        domain = host.domain(name)
        boundaries.install()
        domain.restore(repository, point, disks=disks)
        boundaries.end()


def strike(backups: Backups, point: str, number: int, disks: tuple[str, ...]) -> str:
    """Restore and kill; returns where that was."""
    machine = backups.machine
    arguments = [machine.uri, str(backups.store), machine.name, str(backups.repository), point]
    done = subprocess.run(
        [sys.executable, "-m", __name__, *arguments, str(number), *disks],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout.strip()


def let_go(machine: Machine) -> None:
    """Wait until a qemu-img that was under way has ended: it is never ended half way."""
    deadline = time.monotonic() + 60
    for target, path in machine.images.items():
        while True:
            try:
                check_free(target, str(path))
                break
            except ckptmgr.Busy:
                assert time.monotonic() < deadline
                time.sleep(0.05)


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
        where = strike(backups, point, number, disks)
        seen.append(where)
        done = where == END
        let_go(machine)
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


if __name__ == "__main__":
    victim(*sys.argv[1:])
