"""restore in place: the disks of a domain that is shut off become those of a restore point.

With all disks of the point the domain goes back to it, as by a revert: a checkpoint R comes to be
under the one whose state the point is, and the line that was left stays in the tree.  With some of
its disks the domain goes on from where it is: R comes under the current checkpoint, and what a
restored disk differs by is in R's interval.

The order, so that nothing is ever taken for unchanged, wherever it ends:

1. an intent says under which names the new images are written beside the old ones; they are made
   durable, with R's bitmap in them; what was written since the newest checkpoint is read and kept
2. the intent of what is to come of them takes its place
3. each image gets its name by a rename: from this instant its R records whatever is written to it
4. the old bitmaps are recorded as gone, R as made, R as current; libvirt is told; the marker is set

Ended before 2, what there is of the new images is removed.  Ended between 2 and 4, it is settled by
what is there: an image is the new one if it is that file.  If none is, nothing has happened; if
some are, the others get their names too, unless the domain was used meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyroaring import BitMap64

from ..align import DiskRequest, find_disk, untrackable
from ..backup.placement import Kind, Place, chosen
from ..backup.repository import Repository
from ..backup.restoring import Kept, among, view
from ..backup.staging import Announce, Progress, Staged, check, staged
from ..backup.views import RestoreView
from ..checkpoint import Checkpoint, CheckpointDisk, EngineName, Interval, State
from ..dirtymap import DirtyMap, union
from ..document import format_libvirt
from ..domain.disk import Disk
from ..domain.images import internal_snapshots
from ..domain.known import known_names
from ..engine.qemu_img import change_bitmap, check_free
from ..errors import (
    BitmapBroken,
    CkptmgrError,
    ConnectionFailed,
    InvalidRequest,
    NoPoint,
    StoreDamaged,
    StoreFailed,
    Unsupported,
)
from ..history import History
from ..plan import planner
from ..plan.request import UndoRequest
from ..plan.steps import CheckpointRedefine, Direct, ImageBitmap, Plan
from ..store import Intent, Loaded, files
from ..tails import left_at
from ..xml import parse
from . import archive, difference, preparation, projection
from .leaving import keep_tails
from .naming import free_name
from .session import Session
from .tracking import grown, restored_disk, untracked_disk, with_maps

log = logging.getLogger("ckptmgr")

OPERATION = "restore"
"""Of the intent."""

NOT_KNOWN = "it was restored from a point of which the history has no checkpoint"


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    disks -- targets; none: all of the point
    """

    repository: Path
    point: str
    disks: tuple[str, ...] = ()


def restore(session: Session, request: Request, progress: Progress) -> RestoreView:
    """Restore disks of the domain in place.  See Domain.restore."""
    session.require_writable()
    session = session.with_any_engine()
    _stands_still(session)
    with session.locked() as loaded:
        _no_strangers(session, loaded.history)
        kept = _kept(session, loaded.history, request)
        places = _places(session, kept, request)
        with (
            _announced(session, request.point) as announce,
            staged(
                kept.lineage,
                kept.manifest,
                places,
                session.settings.lock_timeout,
                announce=announce,
                progress=progress,
            ) as work,
        ):
            session = session.renewed()
            _stands_still(session)
            name = free_name(loaded, int(time.time()))
            _add_bitmaps(session, work.disks, name)
            intent = _intent(session, loaded, kept, work.disks, name)
            for place in places:
                check_free(place.disk, str(place.path))
            session.store.write_intent(intent)
            work.keep()
            _finish(session, intent)
        return view(kept.manifest, work.disks, session.view)


@contextmanager
def _announced(session: Session, point: str) -> Iterator[Announce]:
    """Has an intent say where new images are written, as long as no other one says more."""

    def announce(names: Sequence[Path]) -> None:
        data = {"point": point, "temporaries": [str(name) for name in names]}
        session.store.write_intent(Intent(OPERATION, (), _OFFLINE.value, data))

    try:
        yield announce
    except BaseException:
        with suppress(StoreFailed, StoreDamaged):
            intent = session.store.read_intent()
            if intent is not None and not intent.names:
                session.store.clear_intent()
        raise


def plan_restore(session: Session, request: Request) -> Plan:
    """What restore() would do; nothing is touched, not even a lock."""
    session.require_writable()
    session = session.with_any_engine()
    _stands_still(session)
    history = session.loaded().history
    _no_strangers(session, history)
    kept = _kept(session, history, request)
    places = _places(session, kept, request)
    check(kept.lineage, kept.points, kept.manifest, places)
    whole = _whole(kept, places)
    parent = _checkpoint_of(session, history, kept) if whole else history.current
    under = f"under {parent}" if parent else "as a new root"
    return Plan(
        EngineName.OFFLINE,
        (
            Direct("keep what was written since the newest checkpoint"),
            *(Direct(str(place)) for place in places),
            Direct(f"make a checkpoint of what was restored, {under}"),
        ),
    )


# --- what is refused ---------------------------------------------------------------------------


def _stands_still(session: Session) -> None:
    name = session.adapter.name
    if not session.adapter.connection.local:
        raise Unsupported(
            f"the images of domain {name!r} are on another machine",
            hint="run ckptmgr on the hypervisor",
        )
    if session.active:
        raise InvalidRequest(
            f"domain {name!r} is running, so its disks cannot be restored in place",
            hint="shut it down, or restore to another place",
        )
    if session.adapter.has_saved_state():
        raise InvalidRequest(
            f"domain {name!r} has a saved state (virsh managedsave), which would not fit its disks "
            "after the restore",
            hint="start the domain and shut it down again, or discard the saved state: "
            f"virsh managedsave-remove {name}",
        )


def _no_strangers(session: Session, history: History) -> None:
    """libvirt would go on counting on bitmaps that go with the old images."""
    strangers = set(known_names(session.adapter)) - history.checkpoints.keys()
    for name in sorted(strangers) if session.tells_libvirt else ():
        raise Unsupported(
            f"domain {session.adapter.name!r}: libvirt has a checkpoint {name!r} that is not ours, "
            "and its bitmaps would go with the images",
            hint="`ckptmgr adopt` takes over libvirt's checkpoints",
        )


def _kept(session: Session, history: History, request: Request) -> Kept:
    """The point: of this domain, or of one that it was restored from; else by the name alone."""
    repository = Repository(request.repository)
    name, uuid = session.adapter.name, session.adapter.uuid
    loaded = [(lineage, lineage.load()) for lineage in repository.lineages()]
    ids = {each.point for each in history.checkpoints.values() if each.point is not None}
    ours = [
        (lineage, each)
        for lineage, each in loaded
        if lineage.key == uuid
        or each.points.of(uuid)
        or ids & {manifest.id for manifest in each.points.manifests.values()}
    ]
    candidates = ours or [each for each in loaded if each[1].points.of(name)]
    if not candidates:
        raise NoPoint(
            f"the repository {repository.path} has no restore point of domain {name!r}",
            hint=f"ckptmgr points {repository.path}",
        )
    return among(candidates, name, request.point)


def _places(session: Session, kept: Kept, request: Request) -> tuple[Place, ...]:
    """The domain's images that are replaced.  Raises Unsupported, InvalidRequest, Busy."""
    places = []
    for recorded in chosen(kept.manifest, request.disks):
        disk = find_disk(session.disks, recorded.name)
        if (reason := _unsuitable(session, disk)) is not None:
            raise Unsupported(
                f"disk {disk.target} of domain {session.adapter.name!r} cannot be restored in "
                f"place: {reason}",
                hint=f"restore it to another place, or leave it out with --disk; "
                f"--onto {disk.target}=… writes to a device",
            )
        path = Path(str(disk.top.path)).resolve()
        check_free(disk.target, str(path))
        form = str(disk.top.format)
        places.append(
            Place(disk.target, Kind.REPLACEMENT, path, form, recorded.virtual_size, block=False)
        )
    return tuple(places)


def _unsuitable(session: Session, disk: Disk) -> str | None:
    if disk.empty or disk.top.path is None:
        return "it has no image on this machine"
    if disk.read_only:
        return "it is read-only"
    if not Path(disk.top.path).is_file():
        return f"{disk.top.path} is not a file, which could be replaced in one step"
    if disk.top.format not in ("qcow2", "raw"):
        return f"its image is {disk.top.format or 'of an unknown format'}"
    if disk.top.data_file is not None or disk.top.slice_size is not None:
        return "its image does not stand for itself (a data file, or a slice)"
    root = parse(session.adapter.description(), what="the domain's XML")
    for element in root.findall("devices/disk"):
        target = element.find("target")
        if target is None or target.get("dev") != disk.target:
            continue
        if next(element.iter("encryption"), None) is not None:
            return "its image is encrypted, and what is backed up is not"
        if element.find("backingStore/source") is not None:
            return "the domain's definition names its backing file, which the new one does not have"
    if internal_snapshots(disk.top.path):
        return f"{disk.top.path} holds snapshots, which would be lost: delete them first"
    return None


# --- what is kept ------------------------------------------------------------------------------


def _whole(kept: Kept, places: Sequence[Place]) -> bool:
    return len(places) == len(kept.manifest.disks)


def _checkpoint_of(session: Session, history: History, kept: Kept) -> str | None:
    """The checkpoint of the history whose state the point is."""
    manifest = kept.manifest
    known = history.checkpoints.get(manifest.checkpoint or "")
    if (
        known is not None
        and known.created == manifest.checkpoint_created
        and manifest.domain_uuid == session.adapter.uuid
    ):
        return known.name
    found = [each for each in history.checkpoints.values() if each.point == manifest.id]
    newest = max(found, key=lambda each: each.created, default=None)
    return None if newest is None else newest.name


def _add_bitmaps(session: Session, done: Sequence[Staged], name: str) -> None:
    """Have R record in the new images from their first instant on."""
    for each in done:
        if each.temporary is None or each.place.format != "qcow2":
            continue
        disk = find_disk(session.disks, each.place.disk)
        if untrackable(replace(disk, chain=(replace(disk.top, qcow2_version=3),)), _OFFLINE):
            continue
        change_bitmap(ImageBitmap(each.place.disk, str(each.temporary), "add", name, None))
        files.sync_file(each.temporary)


_OFFLINE = EngineName.OFFLINE


def _intent(
    session: Session, loaded: Loaded, kept: Kept, done: Sequence[Staged], name: str
) -> Intent:
    """Read and keep what would be lost; say in the intent how to go on without it."""
    history = loaded.history
    whole = _whole(kept, [each.place for each in done])
    known = _checkpoint_of(session, history, kept)
    tails = keep_tails(session, history, ())
    disks: dict[str, dict[str, Any]] = {}
    for each in done:
        assert each.temporary is not None  # noqa: S101 -- they all replace files
        status = each.temporary.stat()
        old = each.place.path.stat()
        target, size = each.place.disk, each.place.size
        if whole:
            interval = _gone_back(session, history, target, known, size)
        else:
            interval = _replaced(session, history, target, known, size, tails)
        disks[target] = {
            "path": str(each.place.path),
            "temporary": str(each.temporary),
            "file": [status.st_dev, status.st_ino],
            "old": [old.st_mtime_ns, old.st_size],
            "interval": None
            if interval is None
            else {"since": interval.since, "map": interval.map, "reason": interval.reason},
        }
    return Intent(
        OPERATION,
        (name,),
        EngineName.OFFLINE.value,
        {
            "point": kept.manifest.name,
            "id": kept.manifest.id if whole else None,
            "parent": known if whole else history.current,
            "whole": whole,
            "tails": tails if whole else {},
            "disks": disks,
        },
    )


def _gone_back(
    session: Session, history: History, target: str, known: str | None, size: int
) -> Interval | None:
    """Nothing lies between the checkpoint of the point and the point."""
    if known is None:
        return None
    since = history.tracker(target, known)
    if since is None:
        return None
    recorded = history.get(since).disk(target)
    if since != known or recorded is None:
        return Interval(since, None, f"checkpoint {known} does not track {target}")
    empty = DirtyMap(recorded.granularity or 65536, size, BitMap64())
    return Interval(since, session.store.save_map(empty))


def _replaced(
    session: Session,
    history: History,
    target: str,
    known: str | None,
    size: int,
    tails: Mapping[str, Mapping[str, str | None]],
) -> Interval | None:
    """What lies between the current checkpoint and the point: the way there, and what was written
    since on the way that is left.
    """
    since = None if history.current is None else history.tracker(target, history.current)
    if since is None:
        return None
    if known is None:
        return Interval(since, None, NOT_KNOWN)
    way = difference.between(session, history, target, known, since, size)
    if way.map is None:
        return Interval(since, None, way.reason)
    digest = tails.get(since, {}).get(target)
    if digest is None:
        return Interval(since, None, f"what was written since {since} could not be read")
    try:
        written = union((way.map, session.store.read_map(digest))).resized(size)
    except StoreDamaged as error:
        return Interval(since, None, error.message)
    return Interval(since, session.store.save_map(written))


# --- doing it ----------------------------------------------------------------------------------


def settle(session: Session, intent: Intent) -> None:
    """Complete or take back an interrupted restore, by which images are the new ones."""
    point = intent.data["point"]
    if not intent.names:
        log.warning("removing what an interrupted restore of point %s has written", point)
        for path in map(Path, intent.data["temporaries"]):
            files.remove(path, sync=False)
        session.store.clear_intent()
        return
    disks: Mapping[str, Mapping[str, Any]] = intent.data["disks"]
    recorded = intent.names[0] in session.loaded().history.checkpoints
    if recorded or any(_is(each["path"], each) for each in disks.values()):
        log.warning("completing an interrupted restore of point %s", point)
        _finish(session, intent)
        return
    log.warning(
        "taking back an interrupted restore of point %s: nothing was restored; do it again if that "
        "is still wanted",
        point,
    )
    _discard(disks)
    session.store.clear_intent()


def _is(path: str, disk: Mapping[str, Any]) -> bool:
    """Whether `path` is the image that was written for the disk."""
    try:
        status = Path(path).stat()
    except OSError:
        return False
    return bool([status.st_dev, status.st_ino] == disk["file"])


def _discard(disks: Mapping[str, Mapping[str, Any]]) -> None:
    for each in disks.values():
        if _is(each["temporary"], each):
            files.remove(Path(each["temporary"]), sync=False)


def _finish(session: Session, intent: Intent) -> None:
    """Do what the intent says; can be stopped at any point and called again."""
    session = session.with_any_engine()
    data, name = intent.data, intent.names[0]
    loaded = session.loaded()
    if name not in loaded.history.checkpoints:
        record = left_at(session.store, loaded.record, data["tails"])
        if record != loaded.record:
            session.store.save_record(record)
        restored = _replace_images(session, data["disks"])
        session = session.renewed()
        session.store.save_checkpoint(_checkpoint(session, session.loaded(), intent, restored))
        loaded = session.loaded()
    history = replace(loaded.history, current=name)
    session.commit_current(history, loaded.record)
    try:
        _let_go(session, history, name, None if data["whole"] else tuple(data["disks"]))
    except (ConnectionFailed, StoreFailed):
        raise
    except CkptmgrError as error:
        log.warning("checkpoint %s is made, but: %s", name, error)
    session.store.clear_intent()
    session.sweep()


def _replace_images(session: Session, disks: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Give the new images their names; returns the disks that have theirs."""
    restored = []
    for target, each in disks.items():
        if _is(each["path"], each):
            restored.append(target)
        elif not _is(each["temporary"], each) or not _as_it_was(session, target, each):
            log.warning(
                "disk %s of domain %s is not restored: the domain was used meanwhile",
                target,
                session.adapter.name,
            )
        else:
            files.move(Path(each["temporary"]), Path(each["path"]))
            restored.append(target)
    _discard(disks)
    return tuple(restored)


def _as_it_was(session: Session, target: str, disk: Mapping[str, Any]) -> bool:
    """Whether the old image is as it was when the intent was written, and nobody has it open."""
    if session.renewed().active:
        return False
    try:
        check_free(target, disk["path"])
        status = Path(disk["path"]).stat()
    except (CkptmgrError, OSError):
        return False
    return bool([status.st_mtime_ns, status.st_size] == disk["old"])


def _checkpoint(
    session: Session, loaded: Loaded, intent: Intent, restored: Sequence[str]
) -> Checkpoint:
    """The checkpoint R: of the restored disks, and of the others as they are."""
    data, name = intent.data, intent.names[0]
    others = _of_others(session, loaded, name, restored)
    disks = []
    for disk in session.disks:
        if disk.target in restored:
            interval = _interval(data["disks"][disk.target]["interval"])
            disks.append(restored_disk(name, disk, interval))
        elif disk.target in others:
            disks.append(others[disk.target])
        else:
            reason = untrackable(disk, _OFFLINE) or "the domain ran before it could be tracked"
            disks.append(untracked_disk(disk, reason))
    return Checkpoint(
        name,
        int(time.time()),
        data["parent"],
        EngineName.OFFLINE,
        tuple(disks),
        domain_xml=session.definition(),
        point=data["id"] if set(restored) == set(data["disks"]) else None,
    )


def _interval(recorded: Mapping[str, str | None] | None) -> Interval | None:
    if recorded is None:
        return None
    return Interval(str(recorded["since"]), recorded["map"], recorded["reason"])


def _of_others(
    session: Session, loaded: Loaded, name: str, restored: Sequence[str]
) -> dict[str, CheckpointDisk]:
    """The disks that stay as they are, each with its open interval: R's bitmap is added first, so
    that whatever is written from then on is in it.
    """
    targets = [
        disk.target
        for disk in session.disks
        if disk.target not in restored and untrackable(disk, _OFFLINE) is None
    ]
    if not targets or session.active:
        return {}
    layers = [each for each in session.layers(_OFFLINE).values() if each.target in targets]
    undo = planner(_OFFLINE).undo_create(UndoRequest(name, "", tuple(layers)))
    unreadable: frozenset[str] = frozenset()
    while True:
        engine = session.engine(_OFFLINE)
        engine.run(undo)  # of an attempt before
        session = session.renewed()
        request = preparation.Request(name, None, tuple(map(DiskRequest, targets)), quiesce=False)
        made = preparation.prepare(session, loaded, request, session.place(), unreadable)
        steps = [step for step in made.plan.steps if not isinstance(step, CheckpointRedefine)]
        try:
            maps = grown(loaded.history, made.checkpoint, engine.run(steps).maps)
        except BitmapBroken as error:
            broken = frozenset({error.disk} if error.disk else targets)
            if broken <= unreadable:
                raise
            unreadable |= broken
            continue
        recorded = with_maps(made.checkpoint, session.store.save_maps, maps)
        return {disk.name: disk for disk in recorded.disks if disk.name in targets}


def _let_go(session: Session, history: History, name: str, targets: Sequence[str] | None) -> None:
    """Record the bitmaps that went with the old images as gone, and take out those of the line
    that was left; show libvirt the line that the domain is on now.

    targets -- the disks that were restored; None: the whole line was left
    """
    bitmaps = {
        each.name: gone
        for each in (history.get(one) for one in history.topological())
        if each.name != name
        and (
            gone := tuple(
                disk.name
                for disk in each.disks
                if disk.bitmap is not None
                and disk.state is not State.ARCHIVED
                and (targets is None or disk.name in targets)
            )
        )
    }
    history = archive.take_out(session, history, bitmaps)
    checkpoint = history.get(name)
    if session.tells_libvirt:
        shown = format_libvirt(projection.shown(session, history, checkpoint))
        session.engine(session.choice.engine).run((CheckpointRedefine(name, shown),))
        projection.show_line(session, history)
