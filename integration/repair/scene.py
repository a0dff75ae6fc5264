"""A machine with three checkpoints, what was really on its disks, and what a cure has to leave."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import libvirt
import pytest

import ckptmgr
from ckptmgr.xml import NAMESPACE
from integration.evidence import Timeline, gaps, unchanged
from integration.stand import MIB, DiskSpec, Machine, Stand

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


@contextmanager
def three_checkpoints(machine: Machine, store: Path, state: str = "stopped") -> Iterator[Scene]:
    """The scene of a machine that has none yet."""
    with ckptmgr.connect(machine.uri, store=store) as host:
        scene = Scene(machine, host, store, Timeline(machine), state)
        for name in NAMES:
            scene.create(name)
        yield scene


class Prepared:
    """A machine with three checkpoints, made once; each test gets it as it was then.

    state -- paused or stopped
    """

    def __init__(self, stand: Stand, state: str, folder: Path) -> None:
        self._state = state
        self._images, self._store = folder / "images", folder / "store"
        self._machine = machine = Machine(stand, DISKS, state=state)
        with three_checkpoints(machine, self._store, state) as scene:
            self._timeline = scene.timeline
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


running = pytest.mark.parametrize("prepared", ["paused"], indirect=True)
"""For what can only happen to a running machine."""


def set_marker(scene: Scene, element: str | None) -> None:
    """Put another element in the place of the domain's marker, or none."""
    flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG
    if scene.machine.active:
        flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE
    kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
    scene.machine.domain.setMetadata(kind, element, "ckptmgr", NAMESPACE, flags)


@contextmanager
def opened(image: Path, *options: str) -> Iterator[None]:
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
