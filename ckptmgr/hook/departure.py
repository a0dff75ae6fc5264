"""What is done between the old QEMU and the reverted one: the line until now is left.

What was written since the newest checkpoint is read from the images and kept; all bitmaps of ours
are taken out, or QEMU would not load the snapshot; and the history goes on from the checkpoint
that the snapshot's marker names.  libvirt is not called: the next command does the rest.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from lxml import etree

from ..branch import agrees, resolve
from ..checkpoint import State, archived
from ..dirtymap import DirtyMap
from ..domain.chain import read_chain
from ..domain.disk import Disk, DiskLayers
from ..domain.disks import parse_disks
from ..domain.images import internal_snapshots, read_header
from ..errors import BitmapBroken, Busy, InvalidDocument, OperationFailed
from ..history import History
from ..marker import Marker, parse_marker
from ..plan.steps import Export, ImageBitmap
from ..store import DomainStore, Loaded, files
from ..tails import left_at
from ..trust import doubt
from ..xml import NAMESPACE, parse
from .script import STOPPED

INPUT_MAX = 4 << 20
LOCK_TIMEOUT = 5.0
TIME = 40.0
"""Seconds for all of it; libvirt waits for its hooks."""


class How(StrEnum):
    """What the script saw."""

    START = "start"
    STOP = "stop"
    REVERT = "revert"
    OFF = "off"


@dataclass(frozen=True)
class Start:
    """A domain that is about to be started.

    definition -- its XML
    how -- what the script saw; a marker that is not the store's, if not "revert" or "off"
    config -- libvirt's file of the domain as it is defined
    """

    definition: bytes
    how: How
    config: Path


def leave(store: DomainStore, start: Start) -> str | None:
    """Do what a revert needs, if the start is one; returns what was done, for people.

    Raises CkptmgrError, with nothing lost.
    """
    deadline = time.monotonic() + TIME
    root = parse(start.definition, what="the domain's XML")
    if root.tag != "domain" or root.findtext("uuid") != store.uuid:
        return None
    marker = _marker(root)
    disks = _qcow2(parse_disks(etree.tostring(root, encoding="unicode")))
    before = _stopped(store)
    if not _is_revert(store.load(), start, root, marker, disks, before):
        return None
    with _locked(store) as held:
        if not held:
            return None  # our own revert, which has done all this
        loaded = store.load()
        return _leave(store, loaded, marker, disks, before, deadline)


def is_over(store: DomainStore) -> None:
    """Under the lock: a revert of ours is over, and the next start does not belong to it.

    Where it was to a state in which the domain was off, or has failed, libvirt has ended QEMU and
    started none, and what the script noted of that is there yet.  Raises StoreFailed.
    """
    note = store.path / STOPPED
    try:
        text = note.read_bytes()
    except OSError:  # there is none, or nobody can read it
        return
    noted = f"{How.REVERT}\n".encode()
    if text.startswith(noted):
        files.write(note, f"{How.STOP}\n".encode() + text.removeprefix(noted))


def _marker(root: etree._Element) -> Marker | None:
    element = root.find(f"metadata/{{{NAMESPACE}}}current")
    if element is None:
        return None
    return parse_marker(etree.tostring(element, encoding="unicode", with_tail=False))


def _qcow2(disks: tuple[Disk, ...]) -> dict[str, Disk]:
    """The disks whose top image is a local qcow2, by target."""
    return {
        disk.target: disk
        for disk in disks
        if not (disk.empty or disk.read_only)
        and disk.top.format == "qcow2"
        and disk.top.path is not None
    }


def _path(disk: Disk) -> str:
    if disk.top.path is None:
        raise LookupError(f"disk {disk.target} has no local image")
    return disk.top.path


def _stopped(store: DomainStore) -> dict[str, Disk] | None:
    """The disks that the domain had when its QEMU ended, as the script noted; None: unknown."""
    try:
        text = (store.path / STOPPED).read_bytes()[: 2 * INPUT_MAX]
        return _qcow2(parse_disks(text.partition(b"\n")[2].decode()))
    except (OSError, UnicodeDecodeError, InvalidDocument):
        return None


def _is_revert(
    loaded: Loaded,
    start: Start,
    root: etree._Element,
    marker: Marker | None,
    disks: Mapping[str, Disk],
    before: Mapping[str, Disk] | None,
) -> bool:
    """Whether the domain goes back: the marker alone may just be that of an old definition."""
    if not loaded.history.checkpoints or not loaded.record.name:
        return False
    if agrees(marker, loaded.history, loaded.record):
        if start.how is How.OFF and _is_defined_so(root, disks, start.config):
            return False
        if start.how not in (How.OFF, How.REVERT):
            return False
    if any(_holds_snapshots(disk) for disk in disks.values()):
        return True
    return before is not None and _tops(disks) != _tops(before)


_RUNNING = ("devices/disk/backingStore", "resource/partition", "cpu[@check='full']")
"""What libvirt (seen with 9.0) adds to a definition while its domain runs: snapshots have it."""


def _is_defined_so(root: etree._Element, disks: Mapping[str, Disk], config: Path) -> bool:
    """Whether the domain may start just as it is defined: with the disks of its definition, and
    with nothing of a running domain's that is not there, too.
    """
    try:
        text = config.read_bytes()
        defined = parse(text, what=f"the definition in {config}")
        images = _tops(_qcow2(parse_disks(text.decode())))
    except (OSError, UnicodeDecodeError, InvalidDocument):
        return True
    if images != _tops(disks):
        return False
    return all(defined.find(sign) is not None for sign in _RUNNING if root.find(sign) is not None)


def _tops(disks: Mapping[str, Disk]) -> dict[str, str]:
    return {target: _path(disk) for target, disk in disks.items()}


def _holds_snapshots(disk: Disk) -> bool:
    try:
        return bool(internal_snapshots(_path(disk)))
    except (OSError, OperationFailed):
        return False


@contextmanager
def _locked(store: DomainStore) -> Iterator[bool]:
    """The lock, waited for a little; False if a revert of our own holds it."""
    lock = store.lock(0)
    try:
        lock.__enter__()
    except Busy:
        intent = store.read_intent()
        if intent is not None and intent.operation == "revert":
            yield False
            return
        lock = store.lock(LOCK_TIMEOUT)
        lock.__enter__()
    try:
        yield True
    finally:
        lock.__exit__(None, None, None)


def _leave(
    store: DomainStore,
    loaded: Loaded,
    marker: Marker | None,
    disks: Mapping[str, Disk],
    before: Mapping[str, Disk] | None,
    deadline: float,
) -> str:
    history, record = loaded.history, loaded.record
    disks_of_both = (*disks.values(), *(before or {}).values())
    _refuse_encrypted(disks_of_both)
    layers = _layers(disks_of_both)
    ours = _ours(store, loaded)
    _refuse_foreign(layers, ours)
    tails = _tails(store, history, before or {}, deadline)
    record = left_at(store, record, tails)
    store.save_record(record)
    history, count = _take_out(store, history, layers, ours, deadline)
    current, known = resolve(history, record.moved, marker.checkpoint if marker else None)
    _superseded(store)
    store.save_record(
        replace(
            record,
            current=current,
            generation=record.generation + 1,
            left=record.left or loaded.history.current,
        )
    )
    unknown = "" if known else " (of the checkpoint that it names nothing is known)"
    return (
        f"it goes back to a snapshot taken at {current or 'no checkpoint'}{unknown}: {count} "
        f"bitmap(s) archived, the line up to {loaded.history.current or 'now'} kept"
    )


def _layers(disks: Iterable[Disk]) -> list[DiskLayers]:
    """Every layer of the images that the domain had and of those that it is to have."""
    images = {_path(disk): disk.target for disk in disks}
    found = []
    for path, target in images.items():
        if Path(path).exists():
            found.append(DiskLayers(target, read_chain(path, "qcow2")))
    return found


def _refuse_encrypted(disks: Iterable[Disk]) -> None:
    """To take bitmaps out of an image takes its key, for which libvirt cannot be asked here."""
    for path in {_path(disk) for disk in disks}:
        header = read_header(path) if Path(path).exists() else None
        if header is not None and header.encryption and header.bitmaps:
            raise OperationFailed(f"{path} is encrypted: only `ckptmgr snapshot revert` can revert")


def _ours(store: DomainStore, loaded: Loaded) -> frozenset[str]:
    """Names of the bitmaps that we made."""
    intent = store.read_intent()
    names = () if intent is None else intent.names
    return frozenset((*loaded.history.checkpoints, *loaded.damaged_names, *names))


def _refuse_foreign(layers: list[DiskLayers], ours: frozenset[str]) -> None:
    for each in layers:
        for layer in each.layers[:1]:
            for bitmap in layer.bitmaps:
                if bitmap.name not in {*ours, f"ckptmgr-{each.target}"}:
                    raise OperationFailed(
                        f"{layer.image} has a bitmap {bitmap.name!r} that is not ours"
                    )


def _tails(
    store: DomainStore, history: History, before: Mapping[str, Disk], deadline: float
) -> dict[str, dict[str, str | None]]:
    """What was written since each disk's newest checkpoint; None where that is not known."""
    tails: dict[str, dict[str, str | None]] = {}
    if history.current is None:
        return tails
    targets = dict.fromkeys(d.name for c in history.checkpoints.values() for d in c.disks)
    for target in targets:
        since = history.tracker(target, history.current)
        if since is None:
            continue
        dirty = _read(history, since, target, before, deadline)
        digest = None if dirty is None else store.save_map(dirty)
        tails.setdefault(since, {})[target] = digest
    return tails


def _read(
    history: History, since: str, target: str, before: Mapping[str, Disk], deadline: float
) -> DirtyMap | None:
    recorded = history.get(since).disk(target)
    disk = before.get(target)
    if recorded is None or disk is None or recorded.state is not State.RECORDING:
        return None
    try:
        chain = read_chain(_path(disk), "qcow2")
        layers = DiskLayers(target, chain)
        now = replace(disk, size=chain[0].size)
        if layers.broken(since) is not None or doubt(recorded, (now,)) is not None:
            return None
        parts = [
            _read_bitmap(target, layer.image, since, recorded.granularity, deadline)
            for layer in layers.holding(since)
        ]
    except (BitmapBroken, Busy, OperationFailed, OSError):
        return None
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.union(part)
    return merged.grown_from(recorded.size)


def _read_bitmap(
    target: str, image: str, bitmap: str, granularity: int | None, deadline: float
) -> DirtyMap:
    from ..engine.qemu_img import serve
    from ..nbd import read_dirty_map

    left = deadline - time.monotonic()
    if left <= 0:
        raise OperationFailed("there was no time to read the bitmaps")
    with serve(target, image, bitmap) as server:
        return read_dirty_map(
            server.socket,
            Export(target, "", bitmap, granularity),
            check=server.check,
            appear_timeout=left,
            answer_timeout=left,
        )


def _take_out(
    store: DomainStore,
    history: History,
    layers: list[DiskLayers],
    ours: frozenset[str],
    deadline: float,
) -> tuple[History, int]:
    """Remove our bitmaps from the images, and record them as archived; how many there were."""
    from ..engine.qemu_img import change_bitmap, check_free

    held: dict[str, dict[str, str]] = {}
    for each in layers:
        for layer in each.layers:
            if layer.bitmaps:
                check_free(each.target, layer.image)
            for bitmap in layer.bitmaps:
                if bitmap.name in ours or bitmap.name == f"ckptmgr-{each.target}":
                    held.setdefault(bitmap.name, {})[layer.image] = each.target
    order = [*(name for name in history.topological() if name in held)]
    for name in (*order, *(name for name in held if name not in history.checkpoints)):
        for image, target in held[name].items():
            if time.monotonic() > deadline:
                raise OperationFailed("there was no time to take out all bitmaps")
            change_bitmap(ImageBitmap(target, image, "remove", name, missing_ok=True))
    for name in history.topological():
        checkpoint = archived(history.get(name), [disk.name for disk in history.get(name).disks])
        if checkpoint != history.get(name):
            store.save_checkpoint(checkpoint)
            history = history.replace(checkpoint)
    return history, sum(map(len, held.values()))


def _superseded(store: DomainStore) -> None:
    """A revert of our own that was interrupted is not to be completed after this one."""
    intent = store.read_intent()
    if intent is not None and intent.operation == "revert":
        store.clear_intent()
