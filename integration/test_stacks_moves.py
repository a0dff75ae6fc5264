"""The history goes on whatever happens to the domain: restarts, new definitions, migrations."""

from __future__ import annotations

import libvirt
import pytest

from integration.conftest import MakeMachine
from integration.ports import free_port
from integration.stacks import Stack
from integration.stacks.fixtures import Stacks
from integration.stacks.table import Cell
from integration.stand import DiskSpec, Guest, Machine
from integration.tracked import (
    DISKS,
    LIBVIRT,
    MONITOR,
    Tracked,
    and_a_third,
    check_history,
    fitting,
    made_whole,
    two_checkpoints,
)

QCOW2 = DISKS[:2]


@pytest.mark.scenario("libvirtd restarted under a running VM")
@pytest.mark.parametrize("kill", [False, True], ids=["ended", "killed"])
def test_history_goes_on_after_a_restart_of_libvirtd(
    kill: bool, stack: Stack, make_vm_on: MakeMachine, cell: Cell
) -> None:
    tracked = Tracked(stack, make_vm_on(stack, QCOW2))
    two_checkpoints(tracked)
    pid = tracked.machine.pid
    stack.stop(kill=kill)
    stack.start()
    tracked.move(stack)
    assert tracked.machine.pid == pid
    cell.chose(fitting(stack))
    and_a_third(tracked)


@pytest.mark.scenario("undefined and defined again")
def test_history_goes_on_in_a_domain_that_is_defined_again(
    stack: Stack, make_vm_on: MakeMachine, cell: Cell
) -> None:
    machine = make_vm_on(stack, QCOW2)
    tracked = Tracked(stack, machine)
    two_checkpoints(tracked)
    machine.stop()
    definition = machine.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    machine.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
    machine.domain = stack.handle.defineXML(definition)
    assert tracked.known() == {}
    check_history(tracked, "c0", "c1")  # stopped, from the images
    machine.start()
    cell.chose(fitting(stack))
    and_a_third(tracked)


@pytest.mark.scenario("renamed, libvirtd restarted")
def test_history_goes_on_in_a_domain_that_was_renamed(
    stack: Stack, make_vm_on: MakeMachine, cell: Cell
) -> None:
    machine = make_vm_on(stack, QCOW2)
    tracked = Tracked(stack, machine)
    two_checkpoints(tracked)
    machine.stop()
    machine.name = f"{machine.name}-renamed"
    machine.domain.rename(machine.name)
    stack.stop()
    stack.start()
    tracked.move(stack)
    assert tracked.known() == {}  # libvirt's own bug, 7.0 to 11.3: the files are in a wrong folder
    machine.start()
    cell.chose(fitting(stack))
    and_a_third(tracked, also=["renamed"])


@pytest.mark.scenario("transient domain, ended and started again")
def test_a_transient_domain_has_its_history_again_when_it_is_started_again(
    stack: Stack, make_vm_on: MakeMachine, cell: Cell
) -> None:
    machine = make_vm_on(stack, QCOW2, transient=True)
    tracked = Tracked(stack, machine)
    two_checkpoints(tracked)
    documents = [tracked.domain.document(name) for name in ("c0", "c1")]
    same = machine.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    machine.stop()
    machine.domain = stack.handle.createXML(same, libvirt.VIR_DOMAIN_START_PAUSED)
    stack.workspace.record(machine.pid)
    assert tracked.known() == {}
    for document in documents:
        tracked.domain.redefine(document, validate=True)
    if fitting(stack) is LIBVIRT:
        assert tracked.known() == {"c0": None, "c1": "c0"}
    cell.chose(fitting(stack))
    and_a_third(tracked)


@pytest.mark.scenario("cold move, by dumpxml and define")
@pytest.mark.parametrize(("source", "target"), [("debian11", "debian12"), ("debian12", "debian13")])
def test_history_goes_on_where_the_domain_is_defined_anew(
    source: str, target: str, stacks: Stacks, make_vm_on: MakeMachine, cell: Cell
) -> None:
    machine = make_vm_on(stacks(source), QCOW2)
    tracked = Tracked(stacks(source), machine)
    two_checkpoints(tracked)
    machine.stop()
    definition = machine.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE)
    machine.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
    stacks(target).handle.defineXML(definition)
    tracked.move(stacks(target))
    machine.start()
    cell.of(stack=f"{source} to {target}")
    cell.chose(fitting(stacks(target)))
    and_a_third(tracked)


# --- live migration ------------------------------------------------------------------------------


def live_migration(machine: Machine, target: Stack, xml: str | None = None) -> None:
    """Live migration with shared storage, to another libvirt of this machine.

    xml -- of the domain there, where it is not to be the same
    """
    flags = (
        libvirt.VIR_MIGRATE_LIVE
        | libvirt.VIR_MIGRATE_PERSIST_DEST
        | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
        # both ends have the images in one page cache
        | libvirt.VIR_MIGRATE_UNSAFE
    )
    # Not the port that libvirt would choose: that may be the choice of another one's as well.
    where = {libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://127.0.0.1:{free_port()}"}
    if xml is not None:
        where[libvirt.VIR_MIGRATE_PARAM_DEST_XML] = xml
    machine.domain.migrate3(target.handle, where, flags)


def migrate(tracked: Tracked, target: Stack, xml: str | None = None) -> None:
    """Likewise; the machine is looked for there from then on."""
    live_migration(tracked.machine, target, xml)
    tracked.move(target)
    target.workspace.record(tracked.machine.pid)


@pytest.mark.scenario("live migration and back")
@pytest.mark.parametrize(
    ("source", "target", "back"),
    [("debian12", "debian13", "debian12"), ("debian11", "debian12", "debian13")],
)
def test_history_travels_with_a_live_migration(
    source: str, target: str, back: str, stacks: Stacks, make_vm_on: MakeMachine, cell: Cell
) -> None:
    cell.of(stack=f"{source} to {target} to {back}")
    cell.chose(LIBVIRT)
    tracked = Tracked(stacks(source), make_vm_on(stacks(source), QCOW2, state="running"))
    two_checkpoints(tracked)
    migrate(tracked, stacks(target))
    assert tracked.known() == {}
    marker = tracked.domain.adapter.marker()
    assert marker is not None
    assert marker.checkpoint == "c1"
    tracked.write(20)
    assert tracked.create("c2").parent == "c1"
    assert tracked.known() == {"c1": None, "c2": "c1"}
    check_history(tracked, "c0", "c1", "c2")
    tracked.write(21)
    check_history(tracked, "c0", "c1", "c2")
    made_whole(tracked, "c0", "c1", "c2")
    migrate(tracked, stacks(back))
    assert tracked.known() == {}
    check_history(tracked, "c0", "c1", "c2")
    made_whole(tracked, "c0", "c1", "c2")
    assert tracked.create("c3").parent == "c2"
    tracked.write(22)
    check_history(tracked, "c0", "c1", "c2", "c3")
    for name in ("c1", "c3", "c0"):
        tracked.domain.delete(name)
    check_history(tracked, "c2")
    assert tracked.machine.bitmaps("vda").keys() == {"c2"}
    assert tracked.problems() == []


@pytest.mark.scenario("live migration and back, a Linux guest writing meanwhile")
def test_what_a_guest_writes_while_it_is_migrated_is_in_the_difference(
    stacks: Stacks, cell: Cell
) -> None:
    """It writes 4 KiB after 4 KiB without a pause: each interval is one range, none between."""
    cell.of(stack="debian12 to debian13 to debian12")
    cell.chose(LIBVIRT)
    step, granularity = 4096, 65536
    with Guest(stacks("debian12"), (DiskSpec("vda"),)) as guest:
        tracked = Tracked(stacks("debian12"), guest.machine)
        tracked.create("c0")
        guest.shell.churn("vda", step, 16000)
        guest.shell.wait_churned(20)
        before = guest.shell.churned[-1]
        tracked.create("c1")
        guest.shell.hear()
        after = guest.shell.churned[-1] + 1
        guest.shell.wait_churned(after + 20)
        port = "port"
        for name in ("debian13", "debian12"):
            # the QEMU that ends removes the socket that it has bound
            xml = guest.machine.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE)
            xml = xml.replace(f"/{port}'", f"/on-{name}'")
            port = f"on-{name}"
            migrate(tracked, stacks(name), xml)
            reached = guest.shell.churned[-1]
            guest.reconnect(port=port, churning=True)
            guest.shell.wait_churned(reached + 20)
            assert tracked.known() == {}
            assert tracked.problems() == ["store-only"]
            tracked.domain.repair()
            assert tracked.known() == {"c0": None, "c1": "c0"}
            assert tracked.problems() == []
        guest.shell.stop_churn()
        last = guest.shell.churned[-1]
        (first,) = tracked.shown("c0", "c1")["vda"] or []
        (second,) = tracked.shown("c1")["vda"] or []
    cut, begun = sum(first) // granularity - 1, second[0] // granularity
    assert first[0] == 0
    assert before * step // granularity <= cut <= after * step // granularity
    assert begun in (cut, cut + 1)
    assert sum(second) // granularity - 1 == last * step // granularity


@pytest.mark.scenario("live migration, a raw disk's bitmaps stay behind")
def test_a_raw_disk_is_unknown_after_a_live_migration_and_the_others_are_not(
    stacks: Stacks, make_vm_on: MakeMachine, cell: Cell
) -> None:
    cell.of(stack="debian12 to debian13", engine=MONITOR)
    machine = make_vm_on(stacks("debian12"), DISKS, state="running")
    tracked = Tracked(stacks("debian12"), machine, MONITOR)
    two_checkpoints(tracked)
    migrate(tracked, stacks("debian13"))
    assert tracked.shown("c0", "c1") == tracked.written("c0", "c1")
    assert tracked.shown("c1") == {**tracked.written("c1"), "vdc": None}
    tracked.write(20)
    tracked.create("c2")
    tracked.write(21)
    assert tracked.shown("c1", "c2") == {**tracked.written("c1", "c2"), "vdc": None}
    assert tracked.shown("c2") == tracked.written("c2")
