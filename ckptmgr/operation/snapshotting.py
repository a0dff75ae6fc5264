"""snapshot create, list and delete: libvirt's snapshots, which carry the marker of their time."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace

from ..branch import resolve
from ..domain import snapshots
from ..domain.power import is_running, state
from ..errors import CkptmgrError, ConnectionFailed, InvalidRequest, Unsupported
from ..plan.steps import Direct, Plan, Step
from ..snapshot import Snapshot, check_snapshot_name, format_snapshot
from ..views import ListView, PlaceView, SnapshotView
from . import creation, deletion, noticing, preparation
from .pausing import go_on, stand_still
from .session import Session

log = logging.getLogger("ckptmgr")


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    disk_only -- without the memory of a running domain, in external files
    checkpoint -- with a checkpoint of the same instant
    memory -- file that the memory goes to; the disks are kept in external files then
    """

    name: str | None
    description: str | None
    disk_only: bool
    checkpoint: bool
    memory: str | None = None


def create(session: Session, request: Request) -> SnapshotView:
    """Take a snapshot.  See Domain.create_snapshot."""
    document = format_snapshot(request.name, request.description, request.memory)
    _check_memory(session, request)
    _check_images(session, request)
    with session.locked() as loaded:
        _check_free(session, request.name)
        # Paused, so that both are of one instant; the snapshot of a running domain resumes.
        resumes = request.checkpoint and session.active and is_running(session.adapter)
        try:
            if resumes:
                loaded = stand_still(session, loaded)
            made = None
            if request.checkpoint:
                made = creation.create_under_lock(session, loaded, _with_checkpoint(request)).name
            try:
                name = snapshots.create(session.adapter, document, disk_only=request.disk_only)
            except CkptmgrError as error:
                if made is not None and not isinstance(error, ConnectionFailed):
                    _take_back(session.renewed(), made)
                raise
            if resumes:
                snapshots.record_as_running(session.adapter, name)
        finally:
            loaded = go_on(session, session.loaded())
        found = snapshots.snapshot(session.adapter, name)
        return _view(session, found, resolve(loaded.history, loaded.record.moved, found.checkpoint))


def _take_back(session: Session, checkpoint: str) -> None:
    """Delete the checkpoint that was made for a snapshot, which could not be taken."""
    request = deletion.Request(checkpoint, children=False, children_only=False, metadata=False)
    try:
        deletion.delete_under_lock(session, session.loaded(), request)
    except CkptmgrError as error:
        log.warning("checkpoint %s, made for the snapshot, stays: %s", checkpoint, error)


def plan_create(session: Session, request: Request) -> Plan:
    """What create() would do; nothing is touched, not even the lock."""
    session.require_writable()
    _check_memory(session, request)
    _check_images(session, request)
    _check_free(session, request.name)
    pauses = request.checkpoint and session.active and is_running(session.adapter)
    steps: list[Step] = [Direct("libvirt: pause the domain")] if pauses else []
    notes: tuple[str, ...] = ()
    if request.checkpoint:
        plan = creation.plan_create(session, _with_checkpoint(request))
        steps += plan.steps
        notes = plan.notes
    what = "of the disks" if request.disk_only else "with the memory"
    if request.memory is not None:
        what += f" in {request.memory}, and the disks in new image files"
    if not session.active and not request.disk_only:
        what = "of the domain, which does not run"
    steps.append(Direct(f"libvirt: take a snapshot {what}"))
    if pauses:
        steps.append(Direct("libvirt: resume the domain"))
    return Plan(session.choice.engine, tuple(steps), notes=notes)


def _check_free(session: Session, name: str | None) -> None:
    if name is None:
        return
    check_snapshot_name(name)
    if name in {known.name for known in snapshots.snapshots(session.adapter)}:
        raise InvalidRequest(
            f"domain {session.adapter.name!r} has a snapshot {name!r} already",
            hint="choose another name",
        )


def _check_memory(session: Session, request: Request) -> None:
    """A file for the memory makes sense, and nothing is overwritten: libvirt would."""
    if request.memory is None:
        return
    name = session.adapter.name
    if request.disk_only:
        raise InvalidRequest("a snapshot of the disks alone has no memory to keep in a file")
    if not session.active:
        raise InvalidRequest(
            f"domain {name!r} does not run, so it has no memory to keep", hint="leave --memory out"
        )
    if session.adapter.connection.local and os.path.lexists(request.memory):
        raise InvalidRequest(
            f"{request.memory} is there already, and libvirt would write the memory of domain "
            f"{name!r} over it",
            hint="choose another file",
        )


def _check_images(session: Session, request: Request) -> None:
    """Over encrypted images libvirt makes plain ones, unless the snapshot's XML says otherwise; and
    QEMU (7.2) fails an assertion, which ends the domain, when it saves memory in one.
    """
    external = request.disk_only or request.memory is not None
    if not (external or session.active):
        return
    targets = [
        disk.target
        for disk in session.disks
        if not (disk.empty or disk.read_only) and disk.top.encryption is not None
    ]
    if targets:
        why = (
            "the new image file that it would be written to would not be"
            if external
            else "QEMU would end when it saves the memory of the domain there"
        )
        raise Unsupported(
            f"what domain {session.adapter.name!r} has on {', '.join(targets)} is encrypted, and "
            f"{why}",
            hint="use virsh snapshot-create --disk-only, with an <encryption> for the new image in "
            "the XML",
        )


def _with_checkpoint(request: Request) -> preparation.Request:
    return preparation.Request(None, f"snapshot {request.name or ''}".strip(), (), False)


def with_snapshots(session: Session, listed: ListView) -> ListView:
    """`listed` with the snapshots, and where the domain is now."""
    return replace(
        listed,
        snapshots=listing(session),
        place=PlaceView(noticing.place(session, session.loaded()), state(session.adapter)),
    )


def listing(session: Session) -> tuple[SnapshotView, ...]:
    """All snapshots, parents before children.  See Domain.snapshots."""
    loaded = session.loaded()
    return tuple(
        _view(session, found, resolve(loaded.history, loaded.record.moved, found.checkpoint))
        for found in snapshots.snapshots(session.adapter)
    )


def delete(session: Session, name: str, *, children: bool, metadata: bool) -> tuple[str, ...]:
    """Delete a snapshot; returns the names of what is gone.  See Domain.delete_snapshot."""
    with session.locked() as loaded:
        before = snapshots.snapshots(session.adapter)
        snapshots.snapshot(session.adapter, name)
        snapshots.delete(session.adapter, name, children=children, metadata=metadata)
        left = {found.name for found in snapshots.snapshots(session.adapter)}
        if not left and not metadata and (loaded.record.tails or loaded.record.moved):
            # They were kept for reverts to snapshots.
            session.store.save_record(replace(loaded.record, tails={}, moved={}))
            session.sweep()
        return tuple(found.name for found in before if found.name not in left)


def plan_delete(session: Session, name: str, *, children: bool, metadata: bool) -> Plan:
    """What delete() would do; nothing is touched, not even the lock."""
    session.require_writable()
    snapshots.snapshot(session.adapter, name)
    what = "forget" if metadata else "delete"
    below = " and those taken after it" if children else ""
    step = Direct(f"libvirt: {what} snapshot {name}{below}")
    return Plan(session.choice.engine, (step,))


def _view(session: Session, snapshot: Snapshot, resolved: tuple[str | None, bool]) -> SnapshotView:
    checkpoint, known = resolved
    if not known:
        log.info(
            "snapshot %s names checkpoint %s, of which nothing is known",
            snapshot.name,
            snapshot.checkpoint,
        )
    return SnapshotView(
        name=snapshot.name,
        domain=session.view,
        parent=snapshot.parent,
        checkpoint=checkpoint,
        created=snapshot.created,
        current=snapshot.current,
        state=snapshot.state,
        memory=snapshot.memory.value,
        disks=tuple((target, kind.value) for target, kind in snapshot.disks),
    )
