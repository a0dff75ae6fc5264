"""The command line as a process on three generations of libvirt and QEMU."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptmgr.checkpoint import EngineName
from integration.command import CommandLine
from integration.conftest import MakeMachine
from integration.stacks import Stack
from integration.stacks.table import Cell
from integration.stand import DiskSpec
from integration.tracked import Tracked

DISKS = (DiskSpec("vda"), DiskSpec("vdb", backing=("qcow2", "raw")))


def settings(stack: Stack, folder: Path) -> Path:
    """A settings file with what users of a libvirt in folders of its own need."""
    file = folder / "ckptmgr.toml"
    file.write_text(f'socket_directory = "{stack.sockets}"\n')
    return file


@pytest.mark.scenario("the command line: create, list, diff, check, delete")
@pytest.mark.parametrize("state", ["paused", "stopped"])
def test_the_commands_do_what_they_do_on_every_stack(
    state: str, stack: Stack, make_vm_on: MakeMachine, tmp_path: Path, cell: Cell
) -> None:
    machine = make_vm_on(stack, DISKS, state=state)
    tracked = Tracked(stack, machine)
    store = stack.workspace.path / "store"
    ours = CommandLine(stack, store, settings=settings(stack, tmp_path))
    engine = EngineName.MONITOR if stack.kind == "debian11" else EngineName.LIBVIRT
    engine = EngineName.OFFLINE if state == "stopped" else engine
    cell.chose(engine)
    for number in range(3):
        tracked.write(2 * number)
        created = ours.json("create", machine.name, f"c{number}")
        assert created["engine"] == engine
        tracked.noted(f"c{number}")
        tracked.write(2 * number + 1)
    listed = ours.json("list", machine.name, "--topological")
    assert [each["name"] for each in listed["checkpoints"]] == ["c0", "c1", "c2"]
    assert listed["current"] == "c2"
    for start, end in (("c0", "c1"), ("c1", "c2"), ("c0", "c2"), ("c0", None), ("c2", None)):
        diff = ours.json("diff", machine.name, start, *([end] if end else []), "--extents")
        assert {
            disk["name"]: [tuple(each) for each in disk["extents"]] for disk in diff["disks"]
        } == tracked.written(start, end)
        assert all(disk["known"] for disk in diff["disks"])
    assert ours.json("check", machine.name) == {"consistent": True, "findings": []}
    assert ours.ok("delete", machine.name, "c1") == "c1\n"
    assert tracked.shown("c0", "c2") == tracked.written("c0", "c2")
    assert ours.ok("delete", machine.name, "c0", "--children").split() == ["c0", "c2"]
    assert ours.json("check", machine.name) == {"consistent": True, "findings": []}
    assert machine.bitmaps("vda") == {}


@pytest.mark.scenario("the command line: no folder for a socket is known")
def test_without_the_setting_it_is_said_which_one_is_missing(
    stack: Stack, make_vm_on: MakeMachine, tmp_path: Path, cell: Cell
) -> None:
    machine = make_vm_on(stack, DISKS[:1])
    ours = CommandLine(stack, tmp_path / "store")
    ours.ok("create", machine.name, "c0")
    ran = ours("create", machine.name, "c1")
    assert ran.status == 6
    assert "socket_directory in ckptmgr.toml" in ran.err
    assert machine.bitmaps("vda").keys() == {"c0"}
    cell.refused(ran.error)


def test_a_settings_file_that_is_named_has_to_be_there(stack: Stack, tmp_path: Path) -> None:
    ran = CommandLine(stack, tmp_path, settings=tmp_path / "none.toml")("list", "web")
    assert ran.status == 2
    assert "none.toml" in ran.err
