"""What a machine's disks really held at each of its checkpoints, across branches.

The model follows what is done to a machine, and never asks ckptmgr: it keeps every byte of both
disks at every checkpoint and every snapshot, and of every interval the granules that were written
in it.  So it can say of a difference that it leaves nothing out, and that there is not more in it
than what is promised:

- an interval has the granules that were written in it, and no other;
- the interval to the checkpoint that a revert makes has what was written while its parent was
  current, on whichever line: the documented superset;
- an interval in which a record was lost may be unknown.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libvirt
from lxml import etree

import ckptmgr
from ckptmgr.dirtymap import DirtyMap
from integration.evidence import domain_of
from integration.stand import Machine

GRANULARITY = 65536

Bytes = dict[str, bytes]
Granules = dict[str, set[int]]
"""By disk."""

_MARKER = ".//{urn:ckptmgr:1}current"


@dataclass
class Point:
    """A checkpoint.

    bound -- the granules that the interval from its parent may have at most
    lost -- that interval may be unknown
    during -- what was written while it was current
    during_lost -- a part of that may be unknown
    """

    parent: str | None
    held: Bytes
    bound: Granules
    lost: bool
    during: Granules = field(default_factory=dict)
    during_lost: bool = False


@dataclass
class Kept:
    """A snapshot.

    at -- the checkpoint that was current then
    held -- what the disks held
    images -- their top images
    below -- of each, the images that it stands on
    stale -- an image below has been written since, so that nobody knows what it holds now
    """

    at: str | None
    held: Bytes
    images: dict[str, Path]
    below: dict[str, list[Path]]
    state: str
    stale: bool = False


class Branches:
    """The model.

    now -- what the disks hold
    at -- the current checkpoint
    recording -- checkpoints whose bitmaps are there
    loose -- intervals may have more in them than was written (block jobs copy)
    misled -- libvirt's hook was told of a revert that has failed since: it takes the next start for
        the one that belongs to it, and the bitmaps out
    """

    def __init__(self, machine: Machine, store: Path, engine: str = "auto") -> None:
        self.machine = machine
        self.store = store
        self.engine = engine
        self.targets = tuple(machine.images)
        self.points: dict[str, Point] = {}
        self.snapshots: dict[str, Kept] = {}
        self.at: str | None = None
        self.recording: set[str] = set()
        self.loose = False
        self.misled = False
        self._since: Granules = {}
        self._lost = False
        self._gone: dict[str, str | None] = {}
        self._pattern = 0
        self._devices: dict[str, str] = {}
        self.now: dict[str, bytearray] = {}
        self.look()

    @property
    def domain(self) -> ckptmgr.Domain:
        """The domain; the engine asked for is for a machine that runs."""
        engine = self.engine if self.machine.active else "auto"
        return domain_of(self.machine, self.store, engine)

    # --- looking ------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the machine if it does not run.

        The news of a QEMU's death may reach libvirt late, which then ends the next one (9.0): so it
        gets some time for it.
        """
        if not self.machine.active:
            reason = self.machine.domain.state()[1]
            if reason not in (
                libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED,
                libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN,
            ):
                time.sleep(1)
            self.machine.start()
            if self.misled:
                self.misled = False
                self._unrecorded()

    def look(self) -> None:
        """Find the disks' top images and devices anew, and read every byte."""
        self.find()
        self.now = {target: bytearray(self.machine.contents(target)) for target in self.targets}

    def find(self) -> None:
        """Find the disks' top images and devices."""
        root = etree.fromstring(self.machine.domain.XMLDesc())
        for disk in root.iterfind("devices/disk"):
            target, source = disk.find("target"), disk.find("source")
            if target is not None and source is not None and source.get("file"):
                self.machine.images[str(target.get("dev"))] = Path(str(source.get("file")))
        self._devices = {}

    def require_bytes(self) -> None:
        """The disks hold what they should."""
        for target in self.targets:
            held = self.machine.contents(target)
            where = _first_difference(held, bytes(self.now[target]))
            assert where is None, f"{target} does not hold what it should at {where}"

    def marked(self) -> str | None:
        """The checkpoint that the domain's own metadata name."""
        text = self.machine.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        element = etree.fromstring(text).find(_MARKER)
        return None if element is None else element.get("checkpoint")

    # --- writing ------------------------------------------------------------------------------

    def write(self, target: str, offset: int, length: int) -> None:
        """Bytes that were not there before."""
        self._pattern = self._pattern % 255 + 1
        self.act(target, offset, length, f"write -P {self._pattern} {offset} {length}")
        self.now[target][offset : offset + length] = bytes([self._pattern]) * length

    def zero(self, target: str, offset: int, length: int) -> None:
        """Zeroes, by the request for them."""
        self.act(target, offset, length, f"write -z {offset} {length}")
        self.now[target][offset : offset + length] = bytes(length)

    def discard(self, target: str, offset: int, length: int) -> None:
        """Whole granules, which may read as zeroes then, or as before."""
        self.act(target, offset, length, f"discard {offset} {length}")
        self.now[target] = bytearray(self.machine.contents(target))

    def act(self, target: str, offset: int, length: int, command: str) -> None:
        """A command of qemu-io that may change a range."""
        if self.machine.active:
            if target not in self._devices:
                self._devices[target] = self.machine.device(target)
            printed = self.machine.hmp(f'qemu-io -d {self._devices[target]} "{command}"')
        else:
            image = self.machine.images[target]
            done = subprocess.run(
                ["qemu-io", "-d", "unmap", "-f", "qcow2", "-c", command, image],
                capture_output=True,
                text=True,
                check=True,
            )
            printed = done.stdout + done.stderr
        if not re.search(rf"(wrote|discard) {length}/{length} bytes", printed) and printed.strip():
            raise RuntimeError(f"{command} on {target}: {printed.strip()}")
        self.wrote_to(self.machine.images[target])
        last = (offset + length - 1) // GRANULARITY
        self._since.setdefault(target, set()).update(range(offset // GRANULARITY, last + 1))

    def wrote_to(self, image: Path) -> None:
        """An image was written, by whomever: snapshots that stand on it are worth nothing now."""
        for kept in self.snapshots.values():
            kept.stale |= any(image in below for below in kept.below.values())

    def scatter(self, number: int) -> None:
        """A write to each disk, in a place that depends on `number`."""
        for at, target in enumerate(self.targets):
            size = len(self.now[target])
            self.write(target, (number * 7 + at * 3) * 100_001 % (size - 70_000), 70_000)

    # --- what happens to the history ----------------------------------------------------------

    def create(self, name: str) -> ckptmgr.CheckpointView:
        """Make a checkpoint."""
        made = self.domain.create(name)
        self.made(name)
        assert made.parent == self.points[name].parent, f"{name} is in the wrong place"
        return made

    def made(self, name: str) -> None:
        """A checkpoint called `name` was made now."""
        self.require_bytes()
        self._settle()
        self.points[name] = Point(self.at, self._held(), _copy(self._since), self._lost)
        self._enter(name)

    def snapshot(
        self, name: str, *, checkpoint: bool = False, **options: Any
    ) -> ckptmgr.SnapshotView:
        """Take a snapshot."""
        taken = self.domain.create_snapshot(name, checkpoint=checkpoint, **options)
        if checkpoint:
            found = self.domain.checkpoints().current
            assert found is not None
            self.made(found)
        self.taken(name)
        assert taken.checkpoint == self.at
        return taken

    def begin(self) -> None:
        """c1, snapshot s1, c2, snapshot s2, with writes before, between and after."""
        self.scatter(1)
        self.create("c1")
        self.scatter(2)
        self.snapshot("s1")
        self.scatter(3)
        self.create("c2")
        self.scatter(4)
        self.snapshot("s2")
        self.scatter(5)

    def taken(self, name: str) -> None:
        """A snapshot called `name` was taken now, by whomever."""
        state = self.state()
        images = dict(self.machine.images)
        below = {target: _chain(image)[1:] for target, image in images.items()}
        self.snapshots[name] = Kept(self.at, self._held(), images, below, state)

    def revert(self, name: str, *, run: bool | None = None) -> ckptmgr.CheckpointView:
        """Revert with ckptmgr."""
        unsure = self._unsure(self.snapshots[name])
        made = self.domain.revert_snapshot(name, run=run)
        self.reverted(name, made.name)
        self.points[made.name].lost |= unsure
        assert made.parent == self.points[made.name].parent, "the branch is in the wrong place"
        assert made.current
        return made

    def reverted(self, name: str, made: str) -> None:
        """ckptmgr has reverted to a snapshot, and made a checkpoint of what came back."""
        kept = self.snapshots[name]
        self._leave()
        self.find()
        self.misled &= not self.machine.active
        self._are_disks_again()
        self.now = {target: bytearray(held) for target, held in kept.held.items()}
        self.require_bytes()
        above = None if kept.at is None else self.points[kept.at]
        self.points[made] = Point(
            kept.at,
            self._held(),
            {} if above is None else _copy(above.during),
            above is None or above.during_lost,
        )
        self.recording.clear()
        self._enter(made)

    def _are_disks_again(self) -> None:
        """What the images of now held for snapshots that stand on them is not there any more."""
        for image in self.machine.images.values():
            self.wrote_to(image)

    def _unsure(self, kept: Kept) -> bool:
        """Whether the images of then have left, and what they stand on has not."""
        now = {each for image in self.machine.images.values() for each in _chain(image)}
        return any(
            image not in now and not now.isdisjoint(kept.below[target])
            for target, image in kept.images.items()
        )

    def others_reverted(self) -> None:
        """Somebody reverted behind ckptmgr's back, or tried to.

        The disks stayed where they were if the current bitmaps record as before: on 7.0 and
        11.3 QEMU refuses such a revert in time (on 9.0, it dies of that).  But 11.3 has put the
        definition back before, which may have an image of then: one that was left on this line.
        """
        images = dict(self.machine.images)
        self.find()
        if not self.recorded():
            self.moved()
        elif images == self.machine.images:
            self.require_bytes()
        else:
            self.lose()
            self.points[str(self.at)].during_lost = True
            self.look()
            self._are_disks_again()

    def moved(self) -> None:
        """The disks went to another state behind ckptmgr's back; the marker says which."""
        marked = self.marked()
        while marked is not None and marked not in self.points:
            marked = self._gone[marked]
        self.went_back_to(marked)

    def recorded(self) -> bool:
        """Whether the current checkpoint's bitmaps are there on all disks, as far as QEMU knows."""
        for target in self.targets:
            bitmap = self.machine.bitmaps(target).get(str(self.at), {})
            flags = bitmap.get("flags", ())
            good = bitmap.get("recording") or ("auto" in flags and "in-use" not in flags)
            if not good or bitmap.get("inconsistent"):
                return False
        return True

    def went_back_to(self, name: str | None) -> None:
        """The disks went to a state that descends from a checkpoint, and nobody knows how."""
        self._lost = True
        self._leave()
        self.at = name
        if name is not None:
            self.points[name].during_lost = True
        self.recording.clear()
        self._lost = True
        self.look()
        self._are_disks_again()

    def crashed(self) -> None:
        """QEMU was killed: what its bitmaps had is lost, and what was not flushed, too."""
        self._unrecorded()
        self.look()

    def _unrecorded(self) -> None:
        self._lost = True
        self.recording.clear()
        if self.at is not None:
            self.points[self.at].during_lost = True

    def deleted(self, name: str) -> None:
        """A checkpoint was deleted."""
        point = self.points.pop(name)
        self._gone[name] = point.parent
        above = None if point.parent is None else self.points[point.parent]
        for below in self.points.values():
            if below.parent == name:
                below.parent = point.parent
                below.bound = _union(below.bound, point.bound)
                below.lost |= point.lost
        for kept in self.snapshots.values():
            if kept.at == name:
                kept.at = point.parent
        if above is not None:
            above.during = _union(above.during, point.during, point.bound)
            above.during_lost |= point.lost or point.during_lost
        if self.at == name:
            self.at = point.parent
            self._since = _union(self._since, point.bound)
            self._lost = self.at not in self.recording
        self.recording.discard(name)

    def archived(self, keep: int) -> None:
        """The bitmaps of all but the newest checkpoints of the current line may be gone."""
        self.recording &= set(
            [name for name in self._line(self.at) if name in self.recording][:keep]
        )

    def lose(self) -> None:
        """What was written since the current checkpoint may be unknown."""
        self._lost = True

    def state(self) -> str:
        """stopped, paused or running."""
        if not self.machine.active:
            return "stopped"
        paused = self.machine.domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED
        return "paused" if paused else "running"

    def _held(self) -> Bytes:
        return {target: bytes(held) for target, held in self.now.items()}

    def _settle(self) -> None:
        """What was written lately was written while the current checkpoint was."""
        if self.at is not None:
            point = self.points[self.at]
            point.during = _union(point.during, self._since)
            point.during_lost |= self._lost

    def _leave(self) -> None:
        self._settle()
        self._since = {}

    def _enter(self, name: str) -> None:
        self.at = name
        self._since = {}
        self._lost = False
        self.recording.add(name)

    # --- what must be true --------------------------------------------------------------------

    def check_all(self) -> None:
        """Every pair of checkpoints, both ways, and from each until now."""
        names = list(self.points)
        for start in names:
            for end in (*(name for name in names if name != start), None):
                self.check(start, end)

    def check(self, start: str, end: str | None) -> None:
        """No byte that differs is left out, and what is known has not more than is promised."""
        where = f"{start}..{end or 'now'}"
        before = self.points[start].held
        after = self._held() if end is None else self.points[end].held
        bound, lost = self.between(start, end)
        found = {disk.name: disk for disk in self.domain.diff(start, end).disks}
        assert set(self.targets) <= set(found), where
        for target in self.targets:
            disk = found[target]
            changed = differing(before[target], after[target])
            shown = granules(disk)
            assert changed <= shown, f"{where} of {target} leaves out {sorted(changed - shown)}"
            if not disk.known:
                assert disk.reason
                assert lost, f"{where} of {target} should be known: {disk.reason}"
                continue
            if bound is not None and not lost and not self.loose:
                more = shown - bound.get(target, set())
                assert not more, f"{where} of {target} has {sorted(more)} too many"

    def between(self, start: str, end: str | None) -> tuple[Granules | None, bool]:
        """What may lie between two points at most (None: anything may), and whether it may be
        unknown.
        """
        last = self.at if end is None else end
        if last is None:
            return None, True
        up, down = self._line(start), self._line(last)
        common = next((name for name in up if name in down), None)
        if common is None:
            return None, True
        steps = [*up[: up.index(common)], *down[: down.index(common)]]
        points = [self.points[name] for name in steps]
        bound = _union(*(point.bound for point in points))
        lost = any(point.lost for point in points)
        if end is None:
            bound = _union(bound, self._since)
            # an older bitmap that is still there may know what a newer one does not
            lost = lost or self._lost
        return bound, lost

    def _line(self, name: str | None) -> list[str]:
        found = []
        while name is not None:
            found.append(name)
            name = self.points[name].parent
        return found

    def require_tree(self) -> None:
        """The tree is the one that ckptmgr shows."""
        listed = self.domain.checkpoints()
        shown = {view.name: view.parent for view in listed.checkpoints}
        assert shown == {name: point.parent for name, point in self.points.items()}
        assert listed.current == self.at


def _chain(image: Path) -> list[Path]:
    """An image and those below, top first."""
    command = ["qemu-img", "info", "-U", "--output=json", "--backing-chain", str(image)]
    done = subprocess.run(command, capture_output=True, check=True)
    return [Path(each["filename"]) for each in json.loads(done.stdout)]


def differing(before: bytes, after: bytes) -> set[int]:
    """The granules in which two contents differ; what only one of them has, differs."""
    if before == after:
        return set()
    size = max(len(before), len(after))
    return {
        start // GRANULARITY
        for start in range(0, size, GRANULARITY)
        if before[start : start + GRANULARITY] != after[start : start + GRANULARITY]
    }


def granules(disk: ckptmgr.DiskDiff) -> set[int]:
    """The granules that a difference shows; their size is the model's."""
    shown = DirtyMap.from_extents(GRANULARITY, disk.size, disk.extents())
    return {
        granule
        for start, length in shown.extents()
        for granule in range(start // GRANULARITY, -(-(start + length) // GRANULARITY))
    }


def _first_difference(one: bytes, other: bytes) -> int | None:
    if one == other:
        return None
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _copy(some: Granules) -> Granules:
    return {target: set(found) for target, found in some.items()}


def _union(*several: Granules) -> Granules:
    merged: Granules = {}
    for each in several:
        for target, found in each.items():
            merged.setdefault(target, set()).update(found)
    return merged
