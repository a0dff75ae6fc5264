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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..align import find_disk, untrackable
from ..backup.placement import Kind, Place, chosen
from ..backup.repository import Repository
from ..backup.restoring import Kept, among, view
from ..backup.staging import Announce, Progress, Staged, check, staged
from ..backup.views import RestoreView
from ..checkpoint import EngineName
from ..domain.disk import Disk
from ..domain.images import internal_snapshots
from ..domain.known import known_names
from ..engine.qemu_img import change_bitmap, check_free
from ..errors import InvalidRequest, NoPoint, StoreDamaged, StoreFailed, Unsupported
from ..history import History
from ..plan.steps import Direct, ImageBitmap, Plan
from ..store import Intent, files
from ..xml import parse
from .naming import free_name
from .passage import OPERATION, checkpoint_of, intent_of, is_whole
from .replacement import finish
from .session import Session

log = logging.getLogger("ckptmgr")

_OFFLINE = EngineName.OFFLINE


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
            intent = intent_of(session, loaded, kept, work.disks, name)
            for place in places:
                check_free(place.disk, str(place.path))
            session.store.write_intent(intent)
            work.keep()
            finish(session, intent)
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
    whole = is_whole(kept, places)
    parent = checkpoint_of(session, history, kept) if whole else history.current
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
                f"--onto {disk.target}=… writes to a device, as raw",
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
    if disk.encrypted:
        return "its image is encrypted, and what is backed up is not"
    root = parse(session.adapter.description(), what="the domain's XML")
    for element in root.findall("devices/disk"):
        target = element.find("target")
        if target is None or target.get("dev") != disk.target:
            continue
        if element.find("backingStore/source") is not None:
            return "the domain's definition names its backing file, which the new one does not have"
    if internal_snapshots(disk.top.path):
        return f"{disk.top.path} holds snapshots, which would be lost: delete them first"
    return None


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
