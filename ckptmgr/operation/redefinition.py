"""redefine: a checkpoint comes back from its XML."""

from __future__ import annotations

import logging
from dataclasses import replace

from ..align import find_disk
from ..checkpoint import (
    Checkpoint,
    CheckpointDisk,
    EngineName,
    Interval,
    State,
    shown_disks,
)
from ..document import format_libvirt, parse_libvirt
from ..domain.disk import Disk
from ..errors import (
    BitmapBroken,
    CheckpointExists,
    CkptmgrError,
    InvalidDocument,
    InvalidRequest,
)
from ..history import History
from ..plan.steps import CheckpointDelete, CheckpointRedefine, Plan, Step
from ..store import Intent, Loaded
from ..views import CheckpointView
from ..xml import parse
from . import projection
from .listing import view
from .observation import by_layers, observe
from .session import Session

log = logging.getLogger("ckptmgr")

UNKNOWN = "the checkpoint was redefined from its XML, which does not hold it"


def redefine(session: Session, document: str, *, validate: bool) -> CheckpointView:
    """Bring a checkpoint back.  See Domain.redefine."""
    with session.locked() as loaded:
        checkpoint = prepare(session, loaded, document)
        plan = _plan(session, loaded.history, checkpoint, validate)
        intent = Intent("redefine", (checkpoint.name,), plan.engine.value)
        known = checkpoint.name in loaded.history.checkpoints
        session.store.write_intent(intent)
        try:
            session.engine(plan.engine).run(plan.steps)
            if not known:
                checkpoint = observe(session, checkpoint)
            session.store.save_checkpoint(checkpoint)
            history = _with(loaded.history, checkpoint)
            if history.current != loaded.history.current:
                session.commit_current(history, loaded.record)
        except BaseException:
            _take_back(session, loaded, checkpoint.name, plan)
            raise
        session.clear_intent()
        return view(history, checkpoint, session.view)


def _with(history: History, checkpoint: Checkpoint) -> History:
    if checkpoint.name in history.checkpoints:
        return history.replace(checkpoint)
    return history.add(checkpoint, becomes_current(history, checkpoint))


def _take_back(session: Session, loaded: Loaded, name: str, plan: Plan) -> None:
    try:
        known = loaded.history.checkpoints.get(name)
        if known is None:
            session.withdraw((name,), loaded)
            session.engine(plan.engine).run(plan.undo)
        else:
            session.store.save_checkpoint(known)
        session.store.clear_intent()
    except CkptmgrError as failure:
        log.warning(
            "the redefinition of %s could not be taken back; the next command settles it: %s",
            name,
            failure,
        )


def plan_redefine(session: Session, document: str, *, validate: bool) -> Plan:
    """What redefine() would do; nothing is touched, not even the lock."""
    session.require_writable()
    loaded = session.loaded()
    return _plan(session, loaded.history, prepare(session, loaded, document), validate)


def prepare(session: Session, loaded: Loaded, document: str) -> Checkpoint:
    """The checkpoint that `document` describes, checked against the domain and its history.

    Raises InvalidDocument, InvalidRequest, CheckpointExists.
    """
    given = parse_libvirt(document, what="the checkpoint's XML")
    _check_domain(session, given)
    given = replace(given, disks=_by_target(session, given))
    history = loaded.history
    if given.name in loaded.damaged_names:
        raise CheckpointExists(
            f"the store has a damaged document of checkpoint {given.name!r}",
            hint="move that file away first",
        )
    if given.name in history.checkpoints:
        return _edited(history.get(given.name), given)
    if all(disk.bitmap is None for disk in given.disks):
        raise InvalidDocument(f"the XML of checkpoint {given.name!r} names no disk with a bitmap")
    if given.parent is not None and given.parent not in history.checkpoints:
        raise InvalidRequest(
            f"checkpoint {given.name!r} has the parent {given.parent!r}, which is not there",
            hint="redefine the parent first",
        )
    disks = {disk.target: disk for disk in session.disks}
    return replace(
        given,
        engine=EngineName.LIBVIRT if session.tells_libvirt else EngineName.MONITOR,
        disks=tuple(taken_over(given, disk, disks, history, UNKNOWN) for disk in given.disks),
        domain_xml=given.domain_xml or session.definition(),
    )


def _by_target(session: Session, given: Checkpoint) -> tuple[CheckpointDisk, ...]:
    """The disks of `given` by target: libvirt takes paths of sources as well."""
    return tuple(
        replace(disk, name=find_disk(session.disks, disk.name).target)
        if disk.name.startswith("/")
        else disk
        for disk in given.disks
    )


def taken_over(
    given: Checkpoint,
    disk: CheckpointDisk,
    disks: dict[str, Disk],
    history: History,
    unknown: str,
) -> CheckpointDisk:
    """A disk of a checkpoint that another tool made: its interval is unknown, for that reason."""
    if disk.bitmap is None:
        return replace(disk, reason=disk.reason or "left out when the checkpoint was made")
    if disk.bitmap != given.name:
        # libvirt reads by the checkpoint's name and deletes by this one.
        raise InvalidDocument(
            f"disk {disk.name} of checkpoint {given.name!r} names the bitmap {disk.bitmap!r}, "
            "which would be another checkpoint's"
        )
    present = disks.get(disk.name)
    since = None if given.parent is None else history.tracker(disk.name, given.parent)
    return replace(
        disk,
        size=present.size if present else None,
        source=present.top.source if present and not present.empty else None,
        state=State.RECORDING,
        interval=None if since is None else Interval(since, None, unknown),
    )


def becomes_current(history: History, checkpoint: Checkpoint) -> bool:
    """libvirt's rule: a redefined checkpoint is current if its parent was, or nothing was."""
    return history.current is None or checkpoint.parent == history.current


def _edited(known: Checkpoint, given: Checkpoint) -> Checkpoint:
    tracked = {disk.name for disk in given.disks if disk.bitmap is not None}
    if given.parent != known.parent or tracked != shown_disks(known):
        raise CheckpointExists(
            f"checkpoint {known.name!r} exists, and only its description can be changed",
            hint="its parent and its disks are what its dirty maps rest on; "
            "use another name, or delete it first",
        )
    return replace(known, description=given.description)


def _check_domain(session: Session, given: Checkpoint) -> None:
    if given.domain_xml is None:
        return
    uuid = parse(given.domain_xml, what="the domain in the checkpoint's XML").findtext("uuid")
    if uuid is None or uuid.strip().lower() != session.adapter.uuid:
        raise InvalidDocument(
            f"the XML is that of a checkpoint of another domain (UUID {uuid}), not of "
            f"{session.adapter.name!r} ({session.adapter.uuid})"
        )


def _plan(session: Session, history: History, checkpoint: Checkpoint, validate: bool) -> Plan:
    if not session.tells_libvirt:
        if validate:
            _validate(session, checkpoint)
        note = "libvirt is not told: " + session.backup[1]
        return Plan(EngineName.LIBVIRT, (), notes=(note,))
    document = format_libvirt(projection.shown(session, history, checkpoint))
    steps: tuple[Step, ...] = (CheckpointRedefine(checkpoint.name, document, validate),)
    undo = (CheckpointDelete(checkpoint.name, metadata_only=True, missing_ok=True),)
    return Plan(EngineName.LIBVIRT, steps, undo)


def _validate(session: Session, checkpoint: Checkpoint) -> None:
    """What libvirt's VALIDATE sees to, where libvirt is not told.  Raises BitmapBroken."""
    layers = session.layers(session.choice.engine)
    for recorded in checkpoint.disks:
        disk = by_layers(recorded, layers.get(recorded.name))
        if disk.bitmap is not None and disk.state not in (State.RECORDING, State.ARCHIVED):
            raise BitmapBroken(
                f"domain {session.adapter.name!r}: checkpoint {checkpoint.name!r} is not whole on "
                f"disk {disk.name}: {disk.reason}",
                disk=disk.name,
            )
