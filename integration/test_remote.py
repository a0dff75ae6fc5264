"""A hypervisor elsewhere: qemu+tcp, qemu+tls and qemu+ssh, with real daemons and real keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.checkpoint import EngineName
from ckptmgr.domain.adapter import DomainAdapter
from ckptmgr.domain.connection import connect
from ckptmgr.engine.libvirt import LibvirtEngine
from ckptmgr.plan import libvirt as planner
from ckptmgr.plan.request import ReadDisk, ReadRequest
from ckptmgr.plan.steps import TcpServer
from integration.command import CommandLine
from integration.conftest import MakeMachine
from integration.ports import free_port, listening, listens, watched
from integration.stacks import RELEASES
from integration.stacks.fixtures import Stacks
from integration.stacks.remote import TRANSPORTS, Remote, remote
from integration.stacks.table import Cell
from integration.stand import DiskSpec, Machine
from integration.stand.certificates import make_certificates
from integration.tracked import Tracked

pytestmark = pytest.mark.together

DISKS = (DiskSpec("vda"), DiskSpec("vdb", backing=("qcow2",)))


@pytest.fixture(scope="module", params=RELEASES)
def elsewhere(request: pytest.FixtureRequest, stacks: Stacks) -> Iterator[Remote]:
    """Each stack in turn, listening."""
    with remote(stacks(request.param)) as found:
        yield found


@pytest.fixture
def tracked(elsewhere: Remote, make_vm_on: MakeMachine) -> Tracked:
    """A machine of the remote stack, as the library on the hypervisor itself has it."""
    return Tracked(elsewhere.stack, make_vm_on(elsewhere.stack, DISKS))


def command(elsewhere: Remote, transport: str, settings: Path | None = None) -> CommandLine:
    """The command line on another machine that has the same store."""
    store = elsewhere.stack.workspace.path / "store"
    uri = elsewhere.uris[transport]
    return CommandLine(elsewhere.stack, store, uri=uri, settings=settings)


def on_debian11(elsewhere: Remote) -> bool:
    return elsewhere.stack.kind == "debian11"


def extents(diff: Any) -> dict[str, list[tuple[int, int]]]:
    """target -> extents of a diff in JSON; all of them have to be known."""
    assert all(disk["known"] for disk in diff["disks"]), diff
    return {disk["name"]: [tuple(each) for each in disk["extents"]] for disk in diff["disks"]}


def reading(folder: Path, elsewhere: Remote, **settings: object) -> Path:
    """A settings file that allows libvirt to serve dirty bitmaps over the network."""
    chosen: dict[str, object] = {
        "nbd_address": "127.0.0.1",
        "nbd_port": free_port(),
        "nbd_certificates": str(elsewhere.certificates),
        **settings,
    }
    file = folder / "ckptmgr.toml"
    words = {True: "true", False: "false"}
    file.write_text(
        "".join(
            f"{key} = {words[value] if isinstance(value, bool) else repr(value)}\n"
            for key, value in chosen.items()
        )
    )
    return file


@pytest.mark.scenario("from elsewhere: what needs no image or socket there")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_needs_nothing_of_the_other_machine_works_and_the_rest_says_so(
    transport: str, elsewhere: Remote, tracked: Tracked, cell: Cell
) -> None:
    machine = tracked.machine
    far = command(elsewhere, transport)
    engine = EngineName.MONITOR if on_debian11(elsewhere) else EngineName.LIBVIRT
    cell.chose(engine)
    assert far.json("create", machine.name, "c0")["engine"] == engine
    assert far.json("show", machine.name, "c0")["disks"][0]["state"] == "recording"
    tracked.noted("c0")
    tracked.write(1)

    # the interval would have to be read
    before = machine.bitmaps("vda")
    for arguments in (("create", machine.name, "c1"), ("diff", machine.name, "c0")):
        ran = far(*arguments)
        assert ran.status == 6
        assert "dirty bitmaps cannot be read here" in ran.err
        assert "nbd_address" in ran.err
    assert machine.bitmaps("vda").keys() == before.keys() == {"c0"}
    assert far.ok("list", machine.name, "--name") == "c0\n"

    # what the store knows needs nobody
    tracked.create("c1")
    assert extents(far.json("diff", machine.name, "c0", "c1", "--extents")) == tracked.written(
        "c0", "c1"
    )
    assert far.json("check", machine.name) == {"consistent": True, "findings": []}
    assert far.ok("delete", machine.name, "c0", "--children").split() == ["c0", "c1"]
    assert machine.bitmaps("vda") == {}

    machine.stop()
    ran = far("create", machine.name, "c2")
    assert ran.status == 6
    assert "its images are on another machine" in ran.err
    assert "run ckptmgr on the hypervisor" in ran.err


@pytest.mark.scenario("from elsewhere: dirty maps over libvirt's own NBD export")
@pytest.mark.parametrize(("transport", "tls"), [("tcp", False), ("tls", True), ("ssh", True)])
def test_dirty_maps_are_read_over_the_network_where_the_settings_allow_it(
    transport: str, tls: bool, elsewhere: Remote, tracked: Tracked, cell: Cell, tmp_path: Path
) -> None:
    machine = tracked.machine
    port = free_port()
    settings = reading(tmp_path, elsewhere, nbd_tls=tls, nbd_port=port)
    far = command(elsewhere, transport, settings)
    far.ok("create", machine.name, "c0")
    tracked.noted("c0")
    tracked.write(1)
    if on_debian11(elsewhere):
        ran = far("create", machine.name, "c1")
        assert ran.status == 6
        assert "engine 'monitor' reads dirty bitmaps through a unix socket" in ran.err
        assert far.ok("list", machine.name, "--name") == "c0\n"
        cell.refused(ran.error)
        return
    far.ok("create", machine.name, "c1")
    tracked.noted("c1")
    tracked.write(2)
    since = extents(far.json("diff", machine.name, "c0", "c1", "--extents"))
    assert since == tracked.written("c0", "c1")
    assert extents(far.json("diff", machine.name, "c1", "--extents")) == tracked.written("c1")
    assert not listens(port)
    assert far.json("check", machine.name)["consistent"] is True
    # the hypervisor's own ckptmgr says the same
    assert tracked.shown("c0") == tracked.written("c0")
    assert not list(machine.folder.glob("*.scratch"))


@pytest.mark.scenario("from elsewhere: no open port that was not asked for")
def test_no_port_is_opened_where_the_network_was_not_asked_for(
    elsewhere: Remote, tracked: Tracked
) -> None:
    """Neither by a read from elsewhere nor by the hypervisor's own."""
    machine = tracked.machine
    far = command(elsewhere, "tls")
    far.ok("create", machine.name, "c0")
    tracked.noted("c0")
    tracked.write(1)
    with watched(machine.pid) as seen:
        for arguments in (("diff", machine.name, "c0"), ("create", machine.name, "c1")):
            assert far(*arguments).status == 6
        assert tracked.shown("c0") == tracked.written("c0")
        tracked.create("c1")
    assert seen == set()


@pytest.mark.scenario("from elsewhere: the port for TLS is closed again")
def test_the_port_that_was_asked_for_is_the_only_one_and_is_closed_again(
    elsewhere: Remote, tracked: Tracked, cell: Cell, tmp_path: Path
) -> None:
    machine, port = tracked.machine, free_port()
    far = command(elsewhere, "tls", reading(tmp_path, elsewhere, nbd_port=port))
    far.ok("create", machine.name, "c0")
    tracked.noted("c0")
    tracked.write(1)
    if not on_debian11(elsewhere):
        # a read that was killed: so the port is seen while it is open
        begun(machine, elsewhere.uris["tls"], TcpServer("127.0.0.1", port, tls=True))
        assert listening(machine.pid) == {port}
    with watched(machine.pid) as seen:
        if on_debian11(elsewhere):
            ran = far("diff", machine.name, "c0")
            assert ran.status == 6
            cell.refused(ran.error)
        else:
            diff = far.json("diff", machine.name, "c0", "--extents")
            assert extents(diff) == tracked.written("c0")
    assert listening(machine.pid) == set()
    assert seen <= (set() if on_debian11(elsewhere) else {port})


@pytest.mark.scenario("from elsewhere: TLS without the right certificate")
def test_without_the_right_certificate_nothing_is_read_and_nothing_is_left(
    elsewhere: Remote, tracked: Tracked, cell: Cell, tmp_path: Path
) -> None:
    machine = tracked.machine
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    make_certificates(strangers)
    far = command(elsewhere, "tls", reading(tmp_path, elsewhere, nbd_certificates=str(strangers)))
    far.ok("create", machine.name, "c0")
    ran = far("create", machine.name, "c1")
    if on_debian11(elsewhere):
        assert ran.status == 6
        cell.refused(ran.error)
        return
    assert ran.status == 1
    assert "over NBD failed" in ran.err
    assert "nbd_certificates" in ran.err
    assert far.ok("list", machine.name, "--name") == "c0\n"
    assert machine.bitmaps("vda").keys() == {"c0"}
    assert machine.qmp("query-block-jobs") == []
    cell.refused(ran.error)


def begun(machine: Machine, uri: str, server: TcpServer) -> None:
    """What is left of a command that was killed while it read: its job."""
    with connect(uri) as connection:
        adapter = DomainAdapter.find(connection, machine.name)
        disk = ReadDisk("vda", "c0", scratch=str(machine.folder / "killed.scratch"))
        plan = planner.read(ReadRequest((disk,), server))
        LibvirtEngine(adapter).run(plan.steps[:1])


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "somebody else's"])
def test_the_job_of_a_killed_command_is_ended_and_no_other(
    ours: bool, elsewhere: Remote, tracked: Tracked, tmp_path: Path
) -> None:
    machine, port = tracked.machine, free_port()
    settings = reading(tmp_path, elsewhere, nbd_tls=False, nbd_port=port)
    far = command(elsewhere, "tcp", settings)
    far.ok("create", machine.name, "c0")
    tracked.noted("c0")
    if on_debian11(elsewhere):
        # libvirt 7.0 has no such jobs, and none is begun
        assert far("diff", machine.name, "c0").status == 6
        return
    tracked.write(1)
    server = TcpServer("127.0.0.1", port if ours else free_port(), tls=False)
    begun(machine, elsewhere.uris["tcp"], server)
    assert listens(server.port)
    ran = far("--json", "diff", machine.name, "c0", "--extents")
    if ours:
        assert extents(ran.json) == tracked.written("c0")
    else:
        assert ran.status == 5
        machine.domain.abortJob()
