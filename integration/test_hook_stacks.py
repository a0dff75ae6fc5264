"""The hook in libvirts of other releases.

11.3 calls it for every revert, as 9.0 does; 7.0 for those of a domain that is off: it loads a
snapshot into the QEMU that runs, which refuses it.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptmgr.domain.adapter import DomainAdapter
from ckptmgr.hook.script import STOPPED
from ckptmgr.store import DomainRecord, Store
from integration.branch_model import Branches
from integration.conftest import MakeMachine, with_setting
from integration.evidence import bitmaps
from integration.stacks import Stack
from integration.stacks.hooks import Hooks
from integration.stacks.table import Cell
from integration.stand import MIB, DiskSpec, Machine

pytestmark = pytest.mark.scenario("the hook")

# the daemon's run has all of test_hook.py on 9.0
others = pytest.mark.parametrize("stack", ["debian11", "debian13"], indirect=True)

DISKS = (DiskSpec("vda", size=4 * MIB + 1536), DiskSpec("vdb", size=4 * MIB, backing=("qcow2",)))
UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"

GARBAGE = (
    b"",
    bytes(range(256)) * 400,
    b"<domain type='kvm'><uuid>%s</uuid><metadata><ckptmgr:current" % UUID.encode(),
    b"<domain type='kvm'><uuid>%s</uuid></domain><domain/>" % UUID.encode(),
    b"<domain type='kvm'><uuid>../../%s</uuid></domain>" % UUID.encode(),
)


@pytest.fixture(autouse=True)
def sockets(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DomainAdapter, "runtime_directory", with_setting(stack.sockets))


@pytest.fixture
def hooks(stack: Stack, tmp_path: Path) -> Iterator[Hooks]:
    """Our hook, in a libvirt that has been told."""
    hooks = stack.hooks(tmp_path / "store")
    hooks.install()
    stack.stop()
    stack.start()
    yield hooks
    hooks.uninstall()


@others
def test_a_plain_revert_by_virsh_branches(
    hooks: Hooks, stack: Stack, make_vm_on: MakeMachine, tmp_path: Path, cell: Cell
) -> None:
    scene = Branches(make_vm_on(stack, DISKS, state="running"), tmp_path / "store")
    machine = scene.machine
    for number in (1, 2):
        scene.create(f"c{number}")
        scene.scatter(2 * number)
        scene.snapshot(f"s{number}")
        scene.scatter(2 * number + 1)
    if stack.kind == "debian11":
        pid = machine.pid
        said = stack.virsh("snapshot-revert", machine.name, "s1", check=False)
        assert "dirty bitmap" in said
        cell.refused(f"snapshot-revert by virsh of a domain that runs: {' '.join(said.split())}")
        assert machine.pid == pid
        scene.check_all()
        machine.stop()
    stack.virsh("snapshot-revert", machine.name, "s1")
    assert scene.state() == "running"
    assert bitmaps(machine) == set()
    scene.moved()
    assert scene.at == "c1"
    assert {t: bytes(held) for t, held in scene.now.items()} == scene.snapshots["s1"].held
    (finding,) = [each for each in scene.domain.check() if not each.harmless]
    assert (finding.code, finding.checkpoint) == ("reverted", "c1")
    assert "the line up to c2 was kept" in finding.message
    for number in (3, 4):
        scene.scatter(2 * number)
        scene.create(f"c{number}")
    assert scene.points["c3"].parent == "c1"
    assert scene.between("c3", "c4")[1] is False
    # what was written until the revert was kept: from c2 to s2 nothing is unknown
    made = scene.revert("s2")
    assert all(disk.known for disk in scene.domain.diff("c2", made.name).disks)
    scene.require_tree()
    scene.check_all()
    assert not [each for each in scene.domain.check() if not each.harmless]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@others
def test_garbage_on_its_standard_input_changes_nothing(
    hooks: Hooks, stack: Stack, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store").domain(UUID)
    with store.lock(0):
        store.save_record(DomainRecord("web", "c2", 7))
    before = files(tmp_path / "store")
    assert before
    script = str(hooks.install())
    for garbage in GARBAGE:
        done = subprocess.run(
            stack.inside(script, "web", "prepare", "begin", "-"),
            input=garbage,
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, garbage[:80]
        after = files(tmp_path / "store")
        if (note := store.path / STOPPED) in after:
            assert after.pop(note) == b""
        assert after == before, garbage[:80]


@pytest.mark.parametrize("stack", ["debian13"], indirect=True)
def test_an_ordinary_start_costs_little_and_changes_nothing(
    hooks: Hooks,
    stack: Stack,
    make_vm_on: MakeMachine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By turns, in one run."""
    machine = make_vm_on(stack, DISKS, state="running")
    scene = Branches(machine, tmp_path / "store")
    scene.create("c1")
    before = files(scene.store)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(4):
        installed = turn % 2 == 0
        hooks.install() if installed else hooks.uninstall()
        machine.stop()
        seconds[installed].append(started(machine))
    after = files(scene.store)
    notes = [after.pop(path) for path in list(after) if path.name == STOPPED]
    assert after == before
    assert notes, "the hook was not called"
    plain, cost = (statistics.median(seconds[each]) for each in (False, True))
    with capsys.disabled():
        print(
            f"\n{stack.kind}: a start without the hook {plain * 1000:.0f} ms, "
            f"with it {(cost - plain) * 1000:+.0f} ms"
        )


def started(machine: Machine) -> float:
    """Seconds that a start takes."""
    begun = time.monotonic()
    machine.start()
    return time.monotonic() - begun
