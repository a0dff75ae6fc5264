"""check and repair: every kind of mismatch, made for real on running and on stopped machines.

Each is named, `repair --dry-run` changes nothing, `repair` cures it without stopping the machine,
no difference ever leaves out a byte that differs, and the next checkpoint is exact again.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import libvirt
import pytest

import ckptmgr
from ckptmgr.checkpoint import Checkpoint, CheckpointDisk, EngineName, State
from ckptmgr.consistency import consistent
from ckptmgr.document import format_libvirt
from ckptmgr.store import Intent, Store
from ckptmgr.xml import NAMESPACE
from integration.conftest import MakeMachine
from integration.evidence import Timeline, bitmaps, files, gaps, has_checkpoints, known, unchanged
from integration.stand import MIB, Daemon, DiskSpec, Embedded, Machine, Stand

DISKS = (
    DiskSpec("vda", size=12 * MIB + 1536),
    DiskSpec("vdb", size=6 * MIB, cluster_size=4096, backing=("qcow2", "raw")),
)
BOTH = {"vda", "vdb"}
NAMES = ("c0", "c1", "c2")
METADATA_ONLY = libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY
REDEFINE = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE


@dataclass
class Scene:
    """A machine with three checkpoints, and what was really on its disks at each.

    replaced -- the disks of which the timeline knows no more what is on them
    """

    machine: Machine
    host: ckptmgr.Host
    store: Path
    timeline: Timeline
    state: str
    replaced: set[str] = field(default_factory=set)

    @property
    def domain(self) -> ckptmgr.Domain:
        return self.host.domain(self.machine.name)

    @property
    def folder(self) -> Path:
        return self.store / str(self.machine.domain.UUIDString())

    def create(self, name: str) -> None:
        self.timeline.scatter()
        self.domain.create(name)
        self.timeline.cut(name)
        self.timeline.scatter()

    def codes(self) -> set[str]:
        return {finding.code for finding in self.domain.check() if not finding.harmless}

    def names(self) -> list[str]:
        listed = {view.name for view in self.domain.checkpoints().checkpoints}
        return [name for name in self.timeline.cuts if name in listed]

    def restart(self) -> None:
        """Back to the state that the scene is about."""
        if self.state == "paused":
            self.machine.start()

    def add(self, target: str, name: str) -> None:
        """A bitmap that nobody knows of."""
        if self.machine.active:
            node = self.machine.node(target)
            self.machine.qmp("block-dirty-bitmap-add", node=node, name=name, persistent=True)
        else:
            self._image_bitmap("--add", target, name)

    def remove(self, target: str, name: str) -> None:
        """A bitmap that is lost."""
        if self.machine.active:
            node = self.machine.node(target)
            self.machine.qmp("block-dirty-bitmap-remove", node=node, name=name)
        else:
            self._image_bitmap("--remove", target, name)

    def _image_bitmap(self, action: str, target: str, name: str) -> None:
        command = ["qemu-img", "bitmap", action, str(self.machine.images[target]), name]
        subprocess.run(command, check=True)

    def sound(self, since: Sequence[str] | None = None) -> None:
        """From each checkpoint to the next, and until now, no byte differs outside of the diff.

        since -- the checkpoints from which until now is looked at; None: all
        """
        now = {target: self.machine.contents(target) for target in BOTH}
        names = self.names()
        spans: list[tuple[str, str | None]] = [*pairwise(names)]
        spans += [(name, None) for name in (names if since is None else since)]
        for start, end in spans:
            for disk in self.domain.diff(start, end).disks:
                before = self.timeline._contents[start][disk.name]
                after = now if end is None else self.timeline._contents[end]
                self._same_outside(disk, before, after[disk.name], f"{start}..{end}")

    def _same_outside(
        self, disk: ckptmgr.DiskDiff, before: bytes, after: bytes, where: str
    ) -> None:
        size = min(len(before), len(after))
        for begin, past in gaps(disk.extents(), max(len(before), len(after), disk.size)):
            if begin == past:
                continue
            same = before[begin : min(past, size)] == after[begin : min(past, size)]
            assert same, f"{where} on {disk.name}: a byte in {begin}..{past} differs"
            assert past <= size or len(before) == len(after), f"{where}: the grown part is left out"

    def known(self, start: str, end: str | None = None) -> set[str]:
        return {disk.name for disk in self.domain.diff(start, end).disks if disk.known}

    def goes_on(self) -> None:
        """The next checkpoints are made, and exact."""
        self.create("n1")
        self.create("n2")
        self.sound(since=(self.names()[0], *(("n2",) if self.replaced else ())))
        if not self.replaced:
            self.timeline.check(self.domain, "n1", "n2", BOTH)
            self.timeline.check(self.domain, "n2", None, BOTH)
        assert self.codes() == set()

    def heals(self, *codes: str, foreign: bool = False, first: bool = True) -> None:
        """Named, cured, and afterwards as if nothing had been.

        first -- look at the differences before the cure, too
        """
        assert self.codes() == set(codes)
        if first:
            self.sound()
        pid = self.machine.pid if self.machine.active else None
        with unchanged(self.machine, self.store):
            plan = self.domain.plan_repair(foreign=foreign)
        assert len(plan.notes) == sum(not each.harmless for each in self.domain.check())
        cured = self.domain.repair(foreign=foreign)
        assert set(codes) <= {finding.code for finding in cured}
        assert (self.machine.pid if self.machine.active else None) == pid
        assert self.codes() == set()
        assert self.domain.repair(foreign=foreign) == ()
        self.sound()
        self.goes_on()


class Prepared:
    """A machine with three checkpoints, made once; each test gets it as it was then.

    state -- paused or stopped
    """

    def __init__(self, stand: Stand, state: str, folder: Path) -> None:
        self._state = state
        self._images, self._store = folder / "images", folder / "store"
        self._machine = machine = Machine(stand, DISKS, state=state)
        self._timeline = Timeline(machine)
        with ckptmgr.connect(machine.uri, store=self._store) as host:
            scene = Scene(machine, host, self._store, self._timeline, state)
            for name in NAMES:
                scene.create(name)
            assert scene.codes() == set()
        if machine.active:
            machine.stop()
        self._xml = machine.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        self._documents = [
            machine.domain.checkpointLookupByName(name).getXMLDesc() for name in NAMES
        ]
        shutil.copytree(machine.folder, self._images)
        machine.destroy()

    @contextmanager
    def scene(self, store: Path) -> Iterator[Scene]:
        """The machine, with a store that is not there yet."""
        machine = copy(self._machine)
        machine.images = dict(self._machine.images)
        shutil.rmtree(machine.folder)
        shutil.copytree(self._images, machine.folder)
        shutil.copytree(self._store, store)
        machine.domain = machine.stand.handle.defineXML(self._xml)
        try:
            for document in self._documents:
                machine.domain.checkpointCreateXML(document, REDEFINE)
            if self._state == "paused":
                machine.start()
            with ckptmgr.connect(machine.uri, store=store) as host:
                yield Scene(machine, host, store, self._timeline.continued(machine), self._state)
        finally:
            machine.destroy()


@pytest.fixture(
    scope="module", params=["paused", pytest.param("stopped", marks=pytest.mark.thorough)]
)
def prepared(
    request: pytest.FixtureRequest, embedded: Embedded, tmp_path_factory: pytest.TempPathFactory
) -> Prepared:
    return Prepared(embedded, request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def scene(prepared: Prepared, tmp_path: Path) -> Iterator[Scene]:
    with prepared.scene(tmp_path / "store") as scene:
        assert scene.codes() == set()
        yield scene


running = pytest.mark.parametrize("prepared", ["paused"], indirect=True)
"""For what can only happen to a running machine."""


# --- bitmaps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stray", "with space <&'\">", "c1x"])
def test_an_orphan_bitmap_goes_only_when_told_to(scene: Scene, name: str) -> None:
    scene.add("vda", name)
    before = bitmaps(scene.machine)
    assert scene.codes() == {"orphan-bitmap"}
    assert scene.domain.repair() == ()
    assert bitmaps(scene.machine) == before
    scene.heals("orphan-bitmap", foreign=True)


def test_an_orphan_in_a_backing_image_is_named_with_that_image(scene: Scene) -> None:
    scene.machine.stop() if scene.machine.active else None
    base = scene.machine.folder / "vdb-base1.qcow2"
    subprocess.run(["qemu-img", "bitmap", "--add", str(base), "tpl"], check=True)
    scene.restart()
    (finding,) = [each for each in scene.domain.check() if not each.harmless]
    assert str(base) in finding.message
    scene.heals("orphan-bitmap", foreign=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_bitmap_costs_what_it_alone_knew(scene: Scene, name: str) -> None:
    scene.remove("vda", name)
    scene.heals("missing-bitmap")
    for start, end in (("c0", "c1"), ("c1", "c2"), ("c0", "c2")):
        assert scene.known(start, end) == BOTH
    if name != "c2":
        assert scene.known(name) == BOTH


def test_bitmaps_that_a_crash_lost(scene: Scene) -> None:
    if scene.state == "stopped":
        scene.machine.start()
    scene.domain.create("c3")  # those before are in the image
    scene.timeline.cut("c3")
    scene.machine.kill()
    scene.restart()
    scene.heals("missing-bitmap", "inconsistent-bitmap")
    assert scene.known("c0", "c2") == BOTH
    assert scene.known("c0") == set()


def test_bitmaps_that_a_crash_left_in_use(scene: Scene) -> None:
    if scene.machine.active:
        scene.machine.stop()
    scene.machine.start()
    scene.timeline.scatter()
    scene.machine.kill()
    scene.restart()
    scene.heals("inconsistent-bitmap")
    assert scene.known("c0", "c2") == BOTH


def test_after_a_crash_the_next_create_goes_on_without_repair(scene: Scene) -> None:
    if scene.machine.active:
        scene.machine.stop()
    scene.machine.start()
    scene.timeline.scatter()
    scene.machine.kill()
    scene.restart()
    scene.create("n1")
    scene.create("n2")
    scene.timeline.check(scene.domain, "n1", "n2", BOTH)
    scene.timeline.check(scene.domain, "n2", None, BOTH)
    scene.timeline.check(scene.domain, "c0", "c2", BOTH)
    assert scene.known("c2", "n1") == set()
    scene.sound()


def test_a_bitmap_that_was_let_go_of_is_there_again(scene: Scene) -> None:
    scene.domain.archive()
    scene.add("vda", "c0")
    scene.heals("stale-bitmap")


def test_a_bitmap_that_records_no_more(scene: Scene) -> None:
    if scene.machine.active:
        node = scene.machine.node("vdb")
        scene.machine.qmp("block-dirty-bitmap-disable", node=node, name="c1")
    else:
        command = ["qemu-img", "bitmap", "--disable", str(scene.machine.images["vdb"]), "c1"]
        subprocess.run(command, check=True)
    scene.heals("broken-bitmap")


# --- libvirt's list --------------------------------------------------------------------------


def test_a_checkpoint_that_only_libvirt_knows(scene: Scene) -> None:
    xml = "<domaincheckpoint><name>virsh</name><creationTime>1</creationTime>{}</domaincheckpoint>"
    if scene.machine.active:
        scene.machine.domain.checkpointCreateXML(xml.format(""), 0)
    else:
        for target in BOTH:
            scene.add(target, "virsh")
        parent = "<parent><name>c2</name></parent>"
        disks = "".join(f"<disk name='{each}' bitmap='virsh'/>" for each in sorted(BOTH))
        document = xml.format(f"{parent}<disks>{disks}</disks>")
        scene.machine.domain.checkpointCreateXML(document, REDEFINE)
    scene.timeline.cut("virsh")
    scene.heals("libvirt-only")
    assert "virsh" in scene.names()


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_that_only_the_store_knows(scene: Scene, name: str) -> None:
    scene.machine.domain.checkpointLookupByName(name).delete(METADATA_ONLY)
    scene.heals("store-only", first=False)  # a diff would show libvirt what it reads


def test_a_list_that_libvirt_lost_altogether(scene: Scene) -> None:
    for each in scene.machine.domain.listAllCheckpoints():
        each.delete(METADATA_ONLY)
    scene.heals("store-only", first=False)
    assert known(scene.machine)["c2"] == "c1"


def test_a_wrong_parent(scene: Scene) -> None:
    document = scene.domain.document("c2").replace("<name>c1</name>", "<name>c0</name>")
    scene.machine.domain.checkpointCreateXML(document, REDEFINE)
    assert known(scene.machine)["c2"] == "c0"
    scene.heals("wrong-parent")
    assert known(scene.machine)["c2"] == "c1"


def test_a_checkpoint_that_libvirt_has_with_other_disks(scene: Scene) -> None:
    document = scene.domain.document("c1").replace(
        "<disk name='vdb' checkpoint='bitmap' bitmap='c1'/>",
        "<disk name='vdb' checkpoint='no'/>",
    )
    scene.machine.domain.checkpointCreateXML(document, REDEFINE)
    scene.heals("libvirt-disks")


def test_a_checkpoint_that_libvirt_should_not_have_any_more(scene: Scene) -> None:
    document = scene.domain.document("c0")
    scene.domain.archive()
    scene.machine.domain.checkpointCreateXML(document, REDEFINE)
    scene.heals("libvirt-stale")
    assert "c0" not in known(scene.machine)


def test_the_dummy_of_a_killed_removal(scene: Scene) -> None:
    scene.machine.domain.checkpointCreateXML(
        "<domaincheckpoint><name>ckptmgr-discard</name><creationTime>1</creationTime>"
        "<disks><disk name='vda' bitmap='c1'/></disks></domaincheckpoint>",
        REDEFINE,
    )
    scene.heals("leftover-checkpoint")


# --- disks -----------------------------------------------------------------------------------


def _redefine(scene: Scene, change: Callable[[str], str]) -> None:
    """Change the stopped domain's definition."""
    xml = scene.machine.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    scene.machine.domain = scene.machine.stand.handle.defineXML(change(xml))


def test_another_image_in_the_place_of_a_disk(scene: Scene) -> None:
    if scene.machine.active:
        scene.machine.stop()
    old = scene.machine.images["vda"]
    new = old.with_name("other.qcow2")
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", str(new), str(DISKS[0].size)], check=True
    )
    _redefine(scene, lambda xml: xml.replace(str(old), str(new)))
    scene.machine.images["vda"] = new
    scene.restart()
    scene.replaced.add("vda")
    scene.heals("disk-replaced")
    assert scene.known("c0", "c2") == BOTH
    assert scene.known("c0") == {"vdb"}


def test_an_image_that_was_moved_with_its_bitmaps_costs_nothing(scene: Scene) -> None:
    if scene.machine.active:
        scene.machine.stop()
    old = scene.machine.images["vda"]
    new = old.with_name("moved.qcow2")
    old.rename(new)
    _redefine(scene, lambda xml: xml.replace(str(old), str(new)))
    scene.machine.images["vda"] = new
    scene.restart()
    assert [each.code for each in scene.domain.check()] == ["image-moved"]
    scene.timeline.check_all(scene.domain, NAMES, BOTH)


def _grow(scene: Scene) -> None:
    size = 24 * MIB
    scene.replaced.add("vda")  # its last granule is whole now
    if scene.machine.active:
        flags = libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES
        scene.machine.domain.blockResize("vda", size, flags)
    else:
        command = ["qemu-img", "resize", "-q", str(scene.machine.images["vda"]), str(size)]
        subprocess.run(command, check=True)


def test_a_grown_disk_is_told_and_its_new_part_counts_as_changed(scene: Scene) -> None:
    _grow(scene)
    found = scene.domain.check()
    assert [(each.code, each.harmless) for each in found] == [("disk-resized", True)]
    assert consistent(found)
    scene.sound()
    (vda, _) = scene.domain.diff("c2").disks
    assert vda.known
    assert sum(vda.extents()[-1]) == 24 * MIB
    scene.create("n1")
    assert scene.domain.check() == ()
    scene.sound()


def test_a_disk_that_was_made_smaller(scene: Scene) -> None:
    size = 8 * MIB
    scene.replaced.add("vda")
    if scene.machine.active:
        scene.machine.domain.blockResize("vda", size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    else:
        command = ["qemu-img", "resize", "-q", "--shrink"]
        subprocess.run([*command, str(scene.machine.images["vda"]), str(size)], check=True)
    assert scene.codes() == {"disk-shrunk"}
    scene.sound()
    assert {finding.code for finding in scene.domain.repair()} == {"disk-shrunk"}
    assert scene.codes() == set()
    assert scene.known("c0", "c2") == BOTH
    assert scene.known("c0") == {"vdb"}
    scene.sound()
    scene.domain.create("n1")
    scene.machine.write("vda", 5 * MIB, 4096)
    (vda, _) = scene.domain.diff("n1").disks
    assert vda.extents() == [(5 * MIB, 65536)]
    assert scene.codes() == set()


def _snapshot(scene: Scene) -> None:
    """An external snapshot, disk only."""
    overlays = "".join(
        f"<disk name='{each}'><source file='{scene.machine.folder}/{each}.snap'/></disk>"
        for each in sorted(BOTH)
    )
    flags = (
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    )
    scene.machine.domain.snapshotCreateXML(
        f"<domainsnapshot><disks>{overlays}</disks></domainsnapshot>", flags
    )
    for each in BOTH:
        scene.machine.images[each] = scene.machine.folder / f"{each}.snap"


@running
def test_a_snapshot_costs_nothing(scene: Scene) -> None:
    _snapshot(scene)
    scene.timeline.scatter()
    found = scene.domain.check()
    assert consistent(found)
    changed = {(each.code, each.disk) for each in found}
    assert {("node-changed", target) for target in BOTH} <= changed
    scene.timeline.check_all(scene.domain, NAMES, BOTH)


@running
def test_a_layer_smaller_than_its_overlay(scene: Scene) -> None:
    _snapshot(scene)
    scene.timeline.scatter()
    _grow(scene)
    scene.timeline.scatter()
    scene.heals("layer-smaller")
    assert scene.known("c0", "c2") == BOTH
    assert scene.known("c0") == {"vdb"}


def _pull(machine: Machine, target: str) -> None:
    machine.domain.blockPull(target)
    deadline = time.monotonic() + 30
    while machine.domain.blockJobInfo(target):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@running
def test_a_bitmap_that_a_block_job_emptied_is_not_believed(scene: Scene) -> None:
    """Fact 23: without this, the next increment would be all clean."""
    _snapshot(scene)
    _grow(scene)
    _pull(scene.machine, "vda")
    # libvirt and QEMU find nothing wrong with it:
    document = scene.domain.document("c2")
    validate = REDEFINE | libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE
    scene.machine.domain.checkpointCreateXML(document, validate)
    scene.heals("bitmap-lost-in-job")


# --- current, marker, name -------------------------------------------------------------------


def _set_marker(scene: Scene, element: str | None) -> None:
    flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG
    if scene.machine.active:
        flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE
    kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
    scene.machine.domain.setMetadata(kind, element, "ckptmgr", NAMESPACE, flags)


@pytest.mark.parametrize(
    ("element", "code"),
    [
        (None, "no-marker"),
        ("<current checkpoint='c0' generation='1'/>", "wrong-current"),
        ("<current checkpoint='c9' generation='99'/>", "wrong-current"),
        ("<other/>", "unreadable-marker"),
    ],
)
def test_a_marker_that_is_not_what_the_store_says(
    scene: Scene, element: str | None, code: str
) -> None:
    _set_marker(scene, element)
    scene.heals(code, first=False)  # a diff would set it


def test_a_marker_of_checkpoints_that_the_store_does_not_have(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    """As with the wrong --store: what it names is not believed, and stays until repair."""
    machine = make_vm([DiskSpec("vda")])
    with ckptmgr.connect(machine.uri, store=tmp_path / "store") as host:
        host.domain(machine.name).create("c0")
    with ckptmgr.connect(machine.uri, store=tmp_path / "other") as host:
        domain = host.domain(machine.name)
        found = {finding.code for finding in domain.check() if not finding.harmless}
        if not has_checkpoints(machine):
            assert found == {"stray-marker", "orphan-bitmap"}
            domain.repair()
            assert [finding.code for finding in domain.check()] == ["orphan-bitmap"]
            assert domain.checkpoints().checkpoints == ()
            return
        assert found == {"stray-marker", "libvirt-only"}
        domain.repair()
        assert domain.check() == ()
        assert [view.name for view in domain.checkpoints().checkpoints] == ["c0"]


def test_a_domain_that_was_renamed(scene: Scene) -> None:
    if scene.machine.active:
        scene.machine.stop()
    scene.machine.domain.rename(f"{scene.machine.name}-renamed")
    scene.machine.name += "-renamed"
    scene.restart()
    scene.heals("renamed")


def test_libvirt_s_list_comes_back_after_a_rename_and_a_restart_of_the_daemon(
    daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path
) -> None:
    """Fact 25: libvirt writes the files to the wrong folder when a domain is renamed."""
    machine = make_vm_on(daemon, DISKS, state="stopped")
    store = tmp_path / "store"
    with ckptmgr.connect(machine.uri, store=store) as host:
        scene = Scene(machine, host, store, Timeline(machine), "stopped")
        for name in NAMES:
            scene.create(name)
    uuid = machine.domain.UUIDString()
    machine.domain.rename(f"{machine.name}-renamed")
    machine.name += "-renamed"
    daemon.stop()
    daemon.start()
    machine.domain = daemon.handle.lookupByUUIDString(uuid)
    assert known(machine) == {}
    with ckptmgr.connect(machine.uri, store=store) as host:
        scene.host = host
        scene.heals("renamed", "store-only")
        assert known(machine)["c2"] == "c1"


@pytest.mark.parametrize("definition", [True, False], ids=["with-the-domain", "image-alone"])
def test_images_that_were_put_back(scene: Scene, definition: bool) -> None:
    """A storage snapshot of the time of c2, put back after c3 and more writes."""
    if scene.machine.active:
        scene.machine.stop()
    kept = {path: path.with_suffix(".kept") for path in scene.machine.images.values()}
    for path, kept_copy in kept.items():
        shutil.copyfile(path, kept_copy)
    xml = scene.machine.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    then = {target: scene.machine.contents(target) for target in BOTH}
    scene.machine.start()
    scene.create("c3")
    scene.machine.stop()
    for path, kept_copy in kept.items():
        shutil.move(kept_copy, path)
    if definition:
        scene.machine.domain = scene.machine.stand.handle.defineXML(xml)
    assert {target: scene.machine.contents(target) for target in BOTH} == then
    scene.restart()
    scene.timeline._contents.pop("", None)
    scene.replaced = set(BOTH)  # what the timeline wrote since is not there
    found = {finding.code for finding in scene.domain.check() if not finding.harmless}
    scene.heals(*found, first=False)
    assert "rolled-back" in found
    views = {view.name: view for view in scene.domain.checkpoints().checkpoints}
    assert views["n1"].parent == "c2"
    assert views["c3"].parent == "c2"
    assert scene.known("c3", "n1") == BOTH
    assert scene.known("c0") == BOTH


# --- interrupted -----------------------------------------------------------------------------


def _socket(scene: Scene) -> str:
    return str(scene.domain.adapter.runtime_directory() / "ckptmgr.sock")


def _begin_backup(scene: Scene) -> None:
    """What a process leaves that is killed while it reads a bitmap through libvirt."""
    path = _socket(scene)
    scratch = path.replace(".sock", "-vda.scratch")
    scene.machine.domain.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{path}'/><disks>"
        "<disk name='vda' backup='yes' type='file' backupmode='incremental' incremental='c2'>"
        f"<driver type='qcow2'/><scratch file='{scratch}'/></disk></disks></domainbackup>",
        None,
        0,
    )


def _begin_export(scene: Scene) -> None:
    """The same through the monitor."""
    address = {"type": "unix", "data": {"path": _socket(scene)}}
    scene.machine.qmp("nbd-server-start", addr=address)
    node = scene.machine.node("vda")
    scene.machine.qmp("block-dirty-bitmap-add", node=node, name="ckptmgr-vda", disabled=True)


@running
@pytest.mark.parametrize("begin", [_begin_backup, _begin_export])
def test_the_job_of_a_killed_process(scene: Scene, begin: Callable[[Scene], None]) -> None:
    begin(scene)
    codes = {"leftover-job", "leftover-files"}
    if begin is _begin_export:
        codes.add("leftover-bitmap")
    scene.heals(*codes, first=False)  # a diff would end it


@running
@pytest.mark.parametrize("begin", [_begin_backup, _begin_export])
@pytest.mark.parametrize("command", ["diff", "create"])
def test_the_job_of_a_killed_process_is_no_obstacle_to_the_next_command(
    scene: Scene, begin: Callable[[Scene], None], command: str
) -> None:
    begin(scene)
    if command == "diff":
        scene.timeline.check(scene.domain, "c2", None, BOTH)
    else:
        scene.create("n1")
        scene.timeline.check(scene.domain, "c2", "n1", BOTH)
    assert scene.codes() <= {"leftover-bitmap"}
    assert not Path(_socket(scene)).exists()


@running
def test_a_job_of_somebody_else_is_left_alone(scene: Scene) -> None:
    path = str(scene.machine.folder / "other.sock")
    scratch = str(scene.machine.folder / "other.scratch")
    scene.machine.domain.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{path}'/><disks>"
        f"<disk name='vda' backup='yes' type='file'><driver type='qcow2'/>"
        f"<scratch file='{scratch}'/></disk></disks></domainbackup>",
        None,
        0,
    )
    try:
        assert scene.codes() == set()
        assert scene.domain.repair(foreign=True) == ()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(path)
    finally:
        scene.machine.domain.abortJob()


def test_an_intent_that_was_left_behind(scene: Scene) -> None:
    disks = tuple(CheckpointDisk(each, bitmap="c9", state=State.RECORDING) for each in sorted(BOTH))
    checkpoint = Checkpoint("c9", 1, None, EngineName.LIBVIRT, disks)
    engine = "libvirt" if scene.machine.active else "offline"
    intent = Intent("create", ("c9",), engine, {"redefinition": format_libvirt(checkpoint)})
    store = Store(scene.store).domain(scene.machine.domain.UUIDString())
    with store.lock(0):
        store.write_intent(intent)
    scene.add("vda", "c9")
    before = {each for each in bitmaps(scene.machine) if each[1] != "c9"}
    assert scene.codes() == {"intent"}
    scene.domain.repair()
    assert bitmaps(scene.machine) == before
    assert scene.codes() == set()
    scene.timeline.check_all(scene.domain, NAMES, BOTH)


# --- the store -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_document_that_cannot_be_read(scene: Scene, name: str) -> None:
    path = scene.folder / f"{name}.xml"
    path.write_bytes(path.read_bytes()[:-100])
    codes = {"unreadable-file"}
    if name == "c2":
        codes.add("current-lost")
    assert scene.codes() >= {"unreadable-file"}
    scene.sound()
    with unchanged(scene.machine, scene.store):
        scene.domain.plan_repair()
    scene.domain.repair()
    assert (scene.folder / f"{name}.xml.damaged").exists()
    assert scene.codes() == set()
    # libvirt has it still; what changed up to it is lost with its file.
    assert name in scene.names()
    assert scene.known(name) == BOTH
    scene.sound()
    scene.goes_on()


def test_a_map_that_cannot_be_read(scene: Scene) -> None:
    for path in (scene.folder / "maps").iterdir():
        path.write_bytes(path.read_bytes()[::-1])
    scene.heals("damaged-map")
    assert scene.known("c0", "c1") == set()


def test_a_record_that_cannot_be_read(scene: Scene) -> None:
    (scene.folder / "domain.json").write_bytes(b"\xff")
    assert scene.domain.current() is not None
    scene.timeline.check_all(scene.domain, NAMES, BOTH)
    scene.heals("unreadable-file")


def test_a_record_and_a_marker_that_are_lost(scene: Scene) -> None:
    (scene.folder / "domain.json").unlink()
    _set_marker(scene, None)
    current = scene.domain.current()
    assert current is not None
    assert current.name == "c2"
    scene.heals("current-lost", "no-marker", first=False)


def test_an_intent_that_cannot_be_read_stops_changes_until_it_is_repaired(scene: Scene) -> None:
    (scene.folder / "intent.json").write_bytes(b"{}")
    with unchanged(scene.machine, scene.store), pytest.raises(ckptmgr.StoreDamaged) as caught:
        scene.domain.create("n1")
    assert "ckptmgr repair" in str(caught.value.hint)
    assert scene.codes() == {"unreadable-file"}
    scene.domain.repair()
    assert (scene.folder / "intent.json.damaged").exists()
    scene.goes_on()


def test_looking_changes_nothing(scene: Scene) -> None:
    scene.remove("vda", "c1")
    with unchanged(scene.machine, scene.store):
        scene.domain.check()
        scene.domain.plan_repair(foreign=True)
        scene.domain.plan_archive()


def test_a_domain_without_checkpoints_is_consistent_and_gets_no_store(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    machine = make_vm([DiskSpec("vda")], state="stopped")
    with ckptmgr.connect(machine.uri, store=tmp_path / "store") as host:
        assert host.domain(machine.name).check() == ()
    assert not (tmp_path / "store").exists()


def test_without_the_monitor_a_domain_is_not_tainted(make_vm: MakeMachine, tmp_path: Path) -> None:
    """With --engine libvirt, check and repair use libvirt's own calls alone."""
    machine = make_vm([DiskSpec("vda"), DiskSpec("vdb")])

    def tainted() -> bool:
        return any("custom monitor" in text for text in machine.domain.messages())

    with ckptmgr.connect(machine.uri, store=tmp_path / "store", engine="libvirt") as host:
        domain = host.domain(machine.name)
        for name in NAMES:
            domain.create(name)
        assert domain.check() == ()
        # c1's bitmap goes from vdb, through a checkpoint of libvirt's that names it
        machine.domain.checkpointCreateXML(
            "<domaincheckpoint><name>x</name><creationTime>1</creationTime>"
            "<disks><disk name='vdb' bitmap='c1'/></disks></domaincheckpoint>",
            REDEFINE,
        ).delete()
        machine.domain.checkpointLookupByName("c0").delete(METADATA_ONLY)
        found = {(each.code, each.checkpoint) for each in domain.check()}
        assert found == {("missing-bitmap", "c1"), ("store-only", "c0")}
        domain.repair()
        assert domain.check() == ()
        domain.archive(keep=1)
        assert domain.check() == ()
        domain.create("c3")
        assert not tainted()
    assert set(machine.bitmaps("vda")) == {"c2", "c3"}
    assert set(machine.bitmaps("vdb")) == {"c2", "c3"}
    assert tainted()  # by this question


def test_a_cure_that_fails_is_told_and_the_others_are_done(
    make_vm: MakeMachine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine = make_vm([DiskSpec("vda"), DiskSpec("vdb")], state="stopped")
    with ckptmgr.connect(machine.uri, store=tmp_path / "store") as host:
        domain = host.domain(machine.name)
        domain.create("c0")
        for target in ("vda", "vdb"):
            command = ["qemu-img", "bitmap", "--add", str(machine.images[target]), "stray"]
            subprocess.run(command, check=True)
        with _opened(machine.images["vda"], "-r"):
            cured = domain.repair(foreign=True)
            assert [each.disk for each in cured] == ["vdb"]
            assert "could not be cured" in caplog.text
        assert [each.disk for each in domain.repair(foreign=True)] == ["vda"]
        assert domain.check() == ()


def test_an_image_that_another_program_is_writing_is_not_judged(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    """All its bitmaps are marked as in use, as after a crash, until that program ends."""
    machine = make_vm(DISKS, state="stopped")
    store = tmp_path / "store"
    with ckptmgr.connect(machine.uri, store=store) as host:
        scene = Scene(machine, host, store, Timeline(machine), "stopped")
        for name in NAMES:
            scene.create(name)
        with _opened(machine.images["vda"]):
            (bitmap, *_) = machine.bitmaps("vda").values()
            assert "in-use" in bitmap["flags"]
            assert scene.codes() == {"image-in-use"}
            with unchanged(machine, store):
                assert scene.domain.repair(foreign=True) == ()
        assert scene.codes() == set()
        scene.timeline.check_all(scene.domain, NAMES, BOTH)


@contextmanager
def _opened(image: Path, *options: str) -> Iterator[None]:
    """Have an image open in another program, which closes it in an orderly way."""
    held = subprocess.Popen(
        ["qemu-io", *options, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert held.stdout is not None
        held.stdout.read(1)  # its prompt
        yield
    finally:
        held.communicate(b"quit\n")


def test_an_image_that_is_lost_is_named_and_closed_intervals_are_still_told(
    make_vm: MakeMachine, tmp_path: Path
) -> None:
    machine = make_vm(DISKS, state="stopped")
    store = tmp_path / "store"
    with ckptmgr.connect(machine.uri, store=store) as host:
        scene = Scene(machine, host, store, Timeline(machine), "stopped")
        for name in NAMES:
            scene.create(name)
        scene.domain.archive()
        machine.images["vda"].unlink()
        assert scene.codes() == {"unreadable-image"}
        written: Any = scene.timeline.expected("vda", "c0", "c2", 65536)
        (vda, vdb) = scene.domain.diff("c0", "c2").disks
        assert vda.extents() == written
        assert vdb.known
        assert files(store)
