"""The adapter on real domains: disks, definition, nodes, bitmaps, marker, folder."""

from __future__ import annotations

import gc
import logging
import socket
import subprocess
from pathlib import Path
from typing import Any

import libvirt
import pytest

import ckptmgr.domain.adapter as adapter_module
from ckptmgr.domain.adapter import DomainAdapter
from ckptmgr.domain.connection import connect
from ckptmgr.domain.disk import Disk, Image
from ckptmgr.domain.marker import Marker
from ckptmgr.domain.monitor import CommandFailed
from ckptmgr.domain.nodes import detect_nodes
from ckptmgr.errors import (
    CkptmgrError,
    ConnectionFailed,
    GuestAgentFailed,
    NoCheckpoint,
    NodeUnknown,
    NoDomain,
    OperationFailed,
    ReadOnlyConnection,
    Unsupported,
)
from ckptmgr.xml import parse, to_text
from integration.conftest import MakeMachine
from integration.evidence import has_checkpoints
from integration.stand import MIB, Daemon, DiskSpec, Machine, Stand

EVERY_KIND = (
    DiskSpec("vda"),
    DiskSpec("vdb", backing=("qcow2", "raw")),
    DiskSpec("vdc", format="raw"),
    DiskSpec("vdd", compat="0.10", cluster_size=4096),
    DiskSpec("sda"),
    DiskSpec("sdb", bus="sata", read_only=True, device="cdrom", format="raw"),
    DiskSpec("hda", device="cdrom", empty=True, read_only=True, format="raw"),
)
# At a socket: two libvirts that choose a port at once may choose the same.
GRAPHICS = "<graphics type='vnc' passwd='hunter2'><listen type='socket'/></graphics>"


def adapt(vm: Machine) -> DomainAdapter:
    return DomainAdapter.find(vm.stand.connection, vm.name)


def by_target(disks: tuple[Disk, ...]) -> dict[str, Disk]:
    return {disk.target: disk for disk in disks}


def paths(disk: Disk) -> list[str]:
    return [Path(image.source).name for image in disk.chain]


# --- finding domains -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["two words", "quo\"te's", "a<b&c", "žluťoučký 馬", "-dash", "12345678"]
)
def test_a_domain_is_found_by_any_name_uuid_and_id(
    stand: Stand, make_vm_on: MakeMachine, name: str
) -> None:
    vm = make_vm_on(stand, name=name)
    uuid = vm.domain.UUIDString()
    for key in (name, uuid, uuid.upper(), str(vm.domain.ID())):
        found = DomainAdapter.find(stand.connection, key)
        assert (found.name, found.uuid) == (name, uuid)
    assert name in stand.connection.domains()
    assert found.runtime_directory().is_dir()
    found.set_marker(Marker("c1", 1))
    assert found.marker() == Marker("c1", 1)


@pytest.mark.parametrize("key", ["no such", "", "a\0b", "\udcff", "99999", "0" * 32])
def test_an_unknown_domain_is_named(stand: Stand, key: str) -> None:
    with pytest.raises(NoDomain):
        DomainAdapter.find(stand.connection, key)


@pytest.mark.not_on_stacks("what Python's collection of garbage does to its binding")
def test_no_error_of_libvirts_is_lost_to_the_collection_of_garbage(
    local: Stand, make_vm: MakeMachine
) -> None:
    vm = make_vm(state="stopped")
    thresholds = gc.get_threshold()
    try:
        for allocations in range(1, 40):
            gc.disable()
            gc.collect()
            garbage: list[Any] = [vm.stand.connection.lookup(vm.name)]
            garbage.append(garbage)
            del garbage
            gc.set_threshold(allocations)
            gc.enable()
            with pytest.raises(NoDomain):
                DomainAdapter.find(local.connection, "no such")
            assert gc.isenabled()
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()


# --- disks ---------------------------------------------------------------------------------------


@pytest.mark.each_release
@pytest.mark.parametrize("state", ["paused", "stopped"])
def test_disks_are_the_same_running_and_stopped(
    stand: Stand, make_vm_on: MakeMachine, state: str
) -> None:
    vm = make_vm_on(stand, EVERY_KIND, state=state)
    found = by_target(adapt(vm).disks())
    assert list(found) == ["vda", "vdb", "vdc", "vdd", "sda", "sdb", "hda"]
    assert paths(found["vdb"]) == ["vdb.qcow2", "vdb-base1.qcow2", "vdb-base2.raw"]
    assert [image.format for image in found["vdb"].chain] == ["qcow2", "qcow2", "raw"]
    assert all(disk.chain_known for disk in found.values())
    assert {target: disk.size for target, disk in found.items()} == {
        **dict.fromkeys(found, 64 * MIB),
        "hda": None,
    }
    assert [disk.top.qcow2_version for disk in found.values() if disk.chain] == [
        3, 3, None, 2, 3, None,
    ]  # fmt: skip
    assert found["vdd"].top.cluster_size == 4096
    assert found["hda"].empty
    assert found["sdb"].read_only
    assert found["sdb"].device == "cdrom"
    assert (found["vda"].alias is not None) == (state == "paused")


def test_an_external_data_file_is_seen(make_vm: MakeMachine, tmp_path: Path) -> None:
    image, data = tmp_path / "a.qcow2", tmp_path / "a.data"
    options = f"data_file={data},data_file_raw=on"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, "1M"], check=True
    )
    vm = make_vm([DiskSpec(image=image)], state="stopped")
    (disk,) = adapt(vm).disks()
    assert disk.top.data_file == str(data)


def test_a_missing_image_of_a_stopped_domain_leaves_its_facts_open(make_vm: MakeMachine) -> None:
    vm = make_vm([DiskSpec("vda"), DiskSpec("vdb")], state="stopped")
    vm.images["vda"].unlink()
    gone, there = adapt(vm).disks()
    assert (gone.size, gone.top.qcow2_version, gone.chain_known) == (None, None, False)
    assert there.size == 64 * MIB
    with pytest.raises(OperationFailed, match=r"disk vda.*vda\.qcow2"):
        adapt(vm).layers()
    assert [layers.target for layers in adapt(vm).layers({"vdb"})] == ["vdb"]


# --- definition ----------------------------------------------------------------------------------


def test_the_definition_is_that_of_libvirts_own_checkpoint(make_vm: MakeMachine) -> None:
    vm = make_vm([DiskSpec(backing=("qcow2",))], devices=GRAPHICS)
    checkpoint = vm.domain.checkpointCreateXML(
        "<domaincheckpoint><name>c1</name></domaincheckpoint>"
    )
    theirs = parse(checkpoint.getXMLDesc()).find("domain")
    ours = parse(adapt(vm).definition())
    assert theirs is not None
    for path in ("uuid", "name", "devices/disk", "os/type", "cpu"):
        one, other = theirs.find(path), ours.find(path)
        assert one is not None
        assert other is not None
        assert to_text(one) == to_text(other)
    assert ours.get("id") is None
    assert ours.find("devices/disk/alias") is None
    source = ours.find("devices/disk/source")
    assert source is not None
    assert source.get("index") is None


def test_secrets_are_in_the_definition_only_when_asked_for(
    make_vm: MakeMachine, local: Stand
) -> None:
    vm = make_vm(devices=GRAPHICS)
    for _ in ("running", "stopped"):
        assert "hunter2" not in adapt(vm).definition()
        assert "hunter2" in adapt(vm).definition(secure=True)
        vm.stop() if vm.active else None
    with connect(local.uri, read_only=True) as connection:
        assert "hunter2" not in DomainAdapter.find(connection, vm.name).definition()
        with pytest.raises(ReadOnlyConnection):
            DomainAdapter.find(connection, vm.name).definition(secure=True)


def test_the_definition_of_a_running_domain_has_a_disk_that_was_plugged_in(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    vm = make_vm()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "p", "1M"], check=True)
    vm.domain.attachDeviceFlags(
        f"<disk type='file'><driver name='qemu' type='qcow2'/><source file='{tmp_path}/p'/>"
        "<target dev='vdz' bus='virtio'/></disk>",
        libvirt.VIR_DOMAIN_AFFECT_LIVE,
    )
    assert "vdz" in adapt(vm).definition()
    # and libvirt takes it as a definition
    vm.stop()
    again = vm.stand.handle.defineXML(adapt(vm).definition(secure=True))
    assert again.UUIDString() == vm.domain.UUIDString()


# --- nodes and bitmaps ---------------------------------------------------------------------------


@pytest.mark.each_release
def test_on_blockdev_nodes_are_read_and_no_detection_is_run(
    stand: Stand, make_vm_on: MakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = make_vm_on(stand, EVERY_KIND)
    entered: list[object] = []

    def detection(*arguments: Any, **_options: Any) -> dict[str, tuple[str, ...]]:
        entered.append(arguments)
        raise AssertionError("detection was entered")

    monkeypatch.setattr(adapter_module.nodes, "detect_nodes", detection)
    adapter = adapt(vm)
    assert adapter.on_blockdev()
    found = adapter.nodes()
    assert not entered
    assert list(found) == ["vda", "vdb", "vdc", "vdd", "sda", "sdb"]
    assert len(found["vdb"]) == 3
    assert found["vda"] == (vm.node("vda"),)
    # each is the node of that image, says QEMU
    files = {
        node["node-name"]: node["file"]
        for node in adapter.monitor.command("query-named-block-nodes", flat=True)
    }
    for disk in adapter.disks():
        for image, node in zip(disk.chain, found.get(disk.target, ()), strict=True):
            assert files[node] == image.path


DRIVE_IMAGES = {
    "virtio": ("top.qcow2", "mid.qcow2", "base.qcow2"),
    "scsi": ("top.qcow2", "base.raw"),
    "sata": ("top.qcow2", "base.qcow2"),
}


@pytest.fixture
def drives(make_vm: MakeMachine, tmp_path: Path) -> tuple[Machine, tuple[Disk, ...]]:
    """A machine with extra -drive disks on three buses, and what a libvirt that has started them
    so would say of them.
    """
    arguments: list[str] = ["-device", "virtio-scsi-pci,id=scsi7,addr=0x10"]
    arguments += ["-device", "ich9-ahci,id=sata7,addr=0x11"]
    devices = {
        "virtio": ("virtio-disk7", "virtio-blk-pci,addr=0x12,"),
        "scsi": ("scsi7-0-0-0", "scsi-hd,bus=scsi7.0,"),
        "sata": ("sata7-0-0", "ide-hd,bus=sata7.0,"),
    }
    disks = []
    for bus, names in DRIVE_IMAGES.items():
        (tmp_path / bus).mkdir()
        chain: list[Image] = []
        for name in reversed(names):
            path = str(tmp_path / bus / name)
            form = name.rpartition(".")[2]
            below = ["-b", chain[0].source, "-F", chain[0].format or ""] if chain else []
            subprocess.run(["qemu-img", "create", "-q", "-f", form, *below, path, "8M"], check=True)
            chain.insert(0, Image("file", path, path, form))
        alias, device = devices[bus]
        drive = f"file={chain[0].path},format=qcow2,if=none,id=drive-{alias}"
        arguments += ["-drive", drive, "-device", f"{device}drive=drive-{alias},id={alias}"]
        disks.append(Disk(f"d{bus}", bus, alias=alias, chain=tuple(chain)))
    return make_vm(commandline=arguments), tuple(disks)


def ask(adapter: DomainAdapter) -> tuple[Any, Any, Any]:
    return (
        adapter.monitor.command("query-block"),
        adapter.monitor.command("query-blockstats"),
        adapter.monitor.command("query-named-block-nodes", flat=True),
    )


def test_on_drive_nodes_of_three_buses_are_detected_and_are_the_right_ones(
    drives: tuple[Machine, tuple[Disk, ...]],
) -> None:
    vm, disks = drives
    adapter = adapt(vm)
    found = detect_nodes(disks, *ask(adapter))
    assert [len(found[disk.target]) for disk in disks] == [3, 2, 2]
    # a bitmap added to the node found is marked by writes of that device alone
    for disk in disks:
        adapter.monitor.command("block-dirty-bitmap-add", node=found[disk.target][0], name="t")
    for number, disk in enumerate(disks, start=1):
        suffix = "/virtio-backend" if disk.bus == "virtio" else ""
        qdev = f"/machine/peripheral/{disk.alias}{suffix}"
        printed = adapter.monitor.hmp(f'qemu-io -d {qdev} "write 0 {number}M"')
        assert "wrote" in printed or not printed, printed
    counts = {
        node["node-name"]: node["dirty-bitmaps"][0]["count"]
        for node in adapter.monitor.command("query-named-block-nodes", flat=True)
        if node.get("dirty-bitmaps")
    }
    assert counts == {
        found[disk.target][0]: number * MIB for number, disk in enumerate(disks, start=1)
    }


def test_on_drive_a_block_job_in_the_way_changes_nothing(
    drives: tuple[Machine, tuple[Disk, ...]], tmp_path: Path
) -> None:
    vm, disks = drives
    adapter = adapt(vm)
    before = detect_nodes(disks, *ask(adapter))
    adapter.monitor.command(
        "drive-mirror",
        **{"job-id": "m", "device": "drive-virtio-disk7", "target": str(tmp_path / "copy"),
           "sync": "full", "format": "qcow2"},
    )  # fmt: skip
    try:
        assert detect_nodes(disks, *ask(adapter)) == before
    finally:
        adapter.monitor.command("block-job-cancel", device="m", force=True)


def test_on_drive_a_mistaken_alias_is_an_error_and_no_other_disks_node(
    drives: tuple[Machine, tuple[Disk, ...]],
) -> None:
    vm, (virtio, scsi, sata) = drives
    mistaken = (Disk("dx", "virtio", alias=scsi.alias, chain=virtio.chain), sata)
    with pytest.raises(NodeUnknown, match="disk dx"):
        detect_nodes(mistaken, *ask(adapt(vm)))


@pytest.mark.each_release
@pytest.mark.parametrize("running", [True, False])
def test_layers_show_the_bitmaps_running_and_stopped(
    stand: Stand, make_vm_on: MakeMachine, running: bool
) -> None:
    vm = make_vm_on(stand, [DiskSpec("vda", backing=("qcow2",)), DiskSpec("vdb", format="raw")])
    vm.domain.checkpointCreateXML(
        "<domaincheckpoint><name>c1</name><disks><disk name='vda'/></disks></domaincheckpoint>"
    )
    vm.write("vda", 0, 1)
    if not running:
        vm.stop()
    vda, vdb = adapt(vm).layers()
    assert (vda.target, vdb.target) == ("vda", "vdb")
    assert [Path(layer.image).name for layer in vda.layers] == ["vda.qcow2", "vda-base1.qcow2"]
    (bitmap,) = vda.layers[0].bitmaps
    assert (bitmap.name, bitmap.recording, bitmap.inconsistent) == ("c1", True, False)
    assert (bitmap.granularity, bitmap.count) == (65536, 65536 if running else None)
    assert vda.broken("c1") is None
    assert vdb.layers[0].bitmaps == ()
    assert (vda.layers[0].node is not None) == running


def test_bitmaps_of_a_killed_qemu_are_inconsistent(make_vm: MakeMachine) -> None:
    vm = make_vm()
    vm.domain.checkpointCreateXML("<domaincheckpoint><name>c1</name></domaincheckpoint>")
    vm.stop()
    vm.start()
    vm.write("vda", 0, 1)
    vm.kill()
    (vda,) = adapt(vm).layers()
    assert "inconsistent" in (vda.broken("c1") or "")


# --- the monitor, libvirt's support ---------------------------------------------------------------


def test_a_refused_command_keeps_qmps_class_and_the_taint_is_told_once(
    make_vm: MakeMachine, caplog: pytest.LogCaptureFixture
) -> None:
    vm = make_vm()
    with caplog.at_level(logging.WARNING, logger="ckptmgr"):
        for _ in range(2):
            with pytest.raises(CommandFailed) as caught:
                adapt(vm).monitor.command("nosuch")
            assert caught.value.error_class == "CommandNotFound"
    assert sum("tainted" in record.message for record in caplog.records) == 1
    assert "." in adapt(vm).monitor.hmp("info version")
    vm.stop()
    with pytest.raises(OperationFailed, match="not running"):
        adapt(vm).monitor.command("query-block")


def test_what_the_xml_tells_does_not_touch_the_monitor(
    make_vm: MakeMachine, caplog: pytest.LogCaptureFixture
) -> None:
    vm = make_vm(EVERY_KIND)
    adapter = adapt(vm)
    with caplog.at_level(logging.WARNING, logger="ckptmgr"):
        adapter.disks()
        adapter.definition()
        adapter.on_blockdev()
        adapter.backup_support()
        adapter.marker()
    assert not caplog.records
    if has_checkpoints(vm):  # libvirt 7.0 does not tell of taints
        assert not any("monitor" in text for text in vm.domain.messages())


def test_support_is_decided_for_the_domain(make_vm: MakeMachine, local: Stand) -> None:
    """Also for who may only read, to whom libvirt does not tell the domain capabilities."""
    vm = make_vm()
    without = make_vm(capabilities="<qemu:del capability='incremental-backup'/>")
    with connect(local.uri, read_only=True) as reading:
        for found in (adapt(vm), DomainAdapter.find(reading, vm.name)):
            assert found.backup_support()[0] == has_checkpoints(vm)
        for found in (adapt(without), DomainAdapter.find(reading, without.name)):
            supported, reason = found.backup_support()
            assert not supported
            assert "incremental-backup" in reason


# --- marker --------------------------------------------------------------------------------------


@pytest.mark.each_release
def test_the_marker_is_live_and_in_the_configuration(stand: Stand, make_vm_on: MakeMachine) -> None:
    vm = make_vm_on(stand)
    adapter = adapt(vm)
    assert adapter.marker() is None
    adapter.set_marker(None)
    adapter.set_marker(Marker("c1", 1))
    adapter.set_marker(Marker("c2", 2))
    assert adapter.marker() == Marker("c2", 2)
    vm.stop()
    assert adapter.marker() == Marker("c2", 2)
    adapter.set_marker(Marker(None, 3))
    vm.start()
    assert adapter.marker() == Marker(None, 3)
    adapter.set_marker(None)
    assert adapter.marker() is None
    vm.stop()
    assert adapter.marker() is None


def test_a_transient_domain_has_its_marker_live(make_vm: MakeMachine) -> None:
    adapter = adapt(make_vm(transient=True))
    assert not adapter.persistent()
    adapter.set_marker(Marker("c1", 1))
    assert adapter.marker() == Marker("c1", 1)


# --- folder, agent, connections ------------------------------------------------------------------


@pytest.mark.not_on_stacks("there this folder is set, not found")
def test_qemu_binds_a_socket_in_the_runtime_directory(
    stand: Stand, make_vm_on: MakeMachine
) -> None:
    vm = make_vm_on(stand)
    adapter = adapt(vm)
    path = adapter.runtime_directory() / "t.sock"
    adapter.monitor.command("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert client.recv(8) == b"NBDMAGIC"
        # nbd-server-stop would wait for ever for a client that QEMU has not heard the end of (7.2)
        client.shutdown(socket.SHUT_WR)
        while client.recv(4096):
            pass
    adapter.monitor.command("nbd-server-stop")
    vm.stop()
    with pytest.raises(CkptmgrError):
        adapter.runtime_directory()


def test_an_override_that_is_no_folder_is_refused(make_vm: MakeMachine, tmp_path: Path) -> None:
    adapter = adapt(make_vm())
    assert adapter.runtime_directory(tmp_path) == tmp_path
    with pytest.raises(Unsupported, match="none-here"):
        adapter.runtime_directory(tmp_path / "none-here")


AGENT = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"


@pytest.mark.parametrize(
    ("devices", "state", "message"),
    [
        ("", "running", "no guest agent channel"),
        (AGENT, "running", "not connected"),
        (AGENT, "stopped", "not running"),
    ],
)
def test_without_an_agent_nothing_is_frozen_and_the_block_not_run(
    make_vm: MakeMachine, devices: str, state: str, message: str
) -> None:
    adapter = adapt(make_vm(devices=devices, state=state))
    with pytest.raises(GuestAgentFailed, match=message), adapter.agent.frozen(1):
        pytest.fail("the block must not run")


def test_a_read_only_connection_reads_and_refuses_to_change(
    make_vm: MakeMachine, local: Stand
) -> None:
    vm = make_vm()
    with connect(local.uri, read_only=True) as connection:
        adapter = DomainAdapter.find(connection, vm.name)
        assert [disk.size for disk in adapter.disks()] == [64 * MIB]
        assert adapter.on_blockdev()
        assert adapter.marker() is None
        for change in (
            lambda: adapter.set_marker(Marker("c1", 1)),
            lambda: adapter.monitor.command("query-block"),
        ):
            with pytest.raises(ReadOnlyConnection):
                change()


def test_libvirts_errors_are_ours(make_vm: MakeMachine) -> None:
    from ckptmgr.domain.failure import translate

    domain = make_vm().domain
    with pytest.raises(NoCheckpoint), translate("looking it up", "vm"):
        domain.checkpointLookupByName("zz")


# --- what only a daemon has ----------------------------------------------------------------------


def test_a_volume_has_the_path_of_its_pool_and_the_nodes_of_its_chain(
    daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path
) -> None:
    base, image = tmp_path / "base.qcow2", tmp_path / "a b.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "8M"], check=True)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", image], check=True
    )
    pool = daemon.handle.storagePoolCreateXML(
        f"<pool type='dir'><name>p</name><target><path>{tmp_path}</path></target></pool>"
    )
    try:
        volume = (
            "<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>"
            "<source pool='p' volume='a b.qcow2'/><target dev='vdv' bus='virtio'/></disk>"
        )
        vm = make_vm_on(daemon, devices=volume)
        adapter = adapt(vm)
        for _ in ("running", "stopped"):
            disk = by_target(adapter.disks())["vdv"]
            assert (disk.top.type, disk.top.source, disk.top.path) == (
                "volume",
                str(image),
                str(image),
            )
            assert (disk.size, disk.top.qcow2_version) == (8 * MIB, 3)
            assert [layer.path for layer in disk.chain[1:]] == [str(base)]
            assert len(adapter.layers({"vdv"})[0].layers) == 2
            vm.stop() if vm.active else None
    finally:
        pool.destroy()


def test_a_libvirt_that_went_away_is_a_lost_connection(
    daemon: Daemon, make_vm_on: MakeMachine
) -> None:
    vm = make_vm_on(daemon)
    adapter = adapt(vm)
    adapter.disks()
    daemon.stop(kill=True)
    try:
        for call in (adapter.disks, adapter.marker, adapter.active, adapter.layers):
            with pytest.raises(ConnectionFailed):
                call()
        with pytest.raises(ConnectionFailed):
            connect(daemon.uri)
        adapter.connection.close()
    finally:
        daemon.start()
        vm.domain = daemon.handle.lookupByName(vm.name)
    assert adapt(vm).active()
