"""backup: a restore point of what a domain is at one instant, in a repository.

The order, so that nothing is lost wherever it ends:

1. the checkpoint's intent is written; QEMU makes the bitmaps and serves the disks as they are;
2. the maps of the intervals that end, and the copies of the disks, are made durable;
3. what served them is ended; the point comes to be, by the rename of its folder;
4. the checkpoint comes to be.

Ended before 3, the checkpoint is taken back, and the next backup covers both periods.  Killed
between 3 and 4, the point is one that no checkpoint of the history names: it can be restored, and
the next one stands on the point before it.  After a failure there it is taken back, too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from ..align import find_disk, untrackable
from ..backup.base import disk_base, find_base
from ..backup.manifest import (
    Manifest,
    check_target,
)
from ..backup.repository import Lineage, Repository
from ..checkpoint import Checkpoint, EngineName, check_name
from ..domain.disk import Disk
from ..domain.known import known_names
from ..errors import (
    CkptmgrError,
    GuestAgentFailed,
    InvalidRequest,
    PointExists,
)
from ..history import History
from ..plan import planner
from ..plan.request import CreateRequest
from ..plan.steps import Direct, Plan
from ..store import Intent, Loaded
from . import creation, preparation, repositories
from .naming import free_name
from .pausing import while_standing
from .point import Progress, Request, RestorePoint
from .preparation import Served
from .session import Session

log = logging.getLogger("ckptmgr")


def backup(session: Session, request: Request, progress: Progress) -> tuple[Lineage, Manifest]:
    """Make a restore point; returns it, and where it is.  See Domain.backup."""
    session.require_writable()
    if request.name is not None:
        check_name(request.name)
    _check_instant(request)
    targets = _targets(session, request)
    repository = Repository(request.repository)
    if not request.new:
        repositories.require_known(session, repository)
    repository.make()
    with session.locked() as loaded, _lineage(session, repository, loaded.history) as lineage:
        name = _name(session, loaded, lineage, request.name)
        with RestorePoint.begun(session, lineage, loaded.history, request, targets, name) as point:
            point.progress = progress
            _make(session, loaded, point)
            repositories.note(session, repository, lineage)
            return lineage, point.manifest


def plan_backup(session: Session, request: Request) -> Plan:
    """What backup() would do; nothing is touched, not even a lock."""
    session.require_writable()
    _check_instant(request)
    targets = _targets(session, request)
    repository = Repository(request.repository)
    if not request.new:
        repositories.require_known(session, repository)
    loaded = session.loaded()
    found = {}
    if repository.path.is_dir():
        found = {each.key: each.load().points for each in repository.lineages()}
    base = find_base(loaded.history, session.adapter.uuid, found)
    steps = []
    for target in targets:
        on = None
        if base is not None and not request.full:
            points = found[base.lineage]
            on = disk_base(loaded.history, session.adapter.uuid, points, base, target)
        how = "all of it" if on is None else f"what changed since restore point {on.point}"
        steps.append(Direct(f"repository: copy {how} of {target}"))
    asked = preparation.Request(request.name, None, (), quiesce=bool(request.quiesce))
    copying = _Wanted("0" * 32, targets, request.pause)
    if _tracked(session):
        plan = preparation.prepare(session, loaded, asked, session.place(), copying=copying).plan
    else:
        plan = _serving(session, targets)
    after = f" after {base.point}" if base is not None else ""
    steps.append(Direct(f"repository: make the restore point{after} in {repository.path}"))
    return replace(plan, steps=(*plan.steps, *steps))


# --- what is asked for -------------------------------------------------------------------------


def _check_instant(request: Request) -> None:
    if request.pause and request.quiesce:
        raise InvalidRequest(
            "a guest that stands still cannot freeze its file systems",
            hint="give one of --pause and --quiesce",
        )


def _targets(session: Session, request: Request) -> tuple[str, ...]:
    """The disks to copy.  Raises InvalidRequest, Unsupported."""
    disks = session.disks
    if request.disks:
        chosen = [find_disk(disks, name) for name in request.disks]
        for disk in chosen:
            if disk.empty:
                raise InvalidRequest(f"there is no medium in disk {disk.target}")
    else:
        chosen = [disk for disk in disks if _has_data(disk)]
    targets = tuple(dict.fromkeys(check_target(disk.target) for disk in chosen))
    encrypted = [disk.target for disk in chosen if disk.encrypted]
    if encrypted and not request.decrypt:
        raise InvalidRequest(
            f"what domain {session.adapter.name!r} has on {', '.join(encrypted)} is encrypted, and "
            "in a restore point it would not be",
            hint="--decrypt says that this is meant, such as for a repository on storage that is "
            "encrypted itself; --disk backs up other disks alone",
        )
    if not targets:
        raise InvalidRequest(f"domain {session.adapter.name!r} has no disk to back up")
    return targets


def _has_data(disk: Disk) -> bool:
    if disk.empty or disk.device not in ("disk", "lun"):
        return False
    why = None
    if disk.transient:
        why = "it is transient: what it holds goes when the domain ends"
    elif disk.top.type == "vhostuser":
        why = "it is a vhost-user device, whose data QEMU does not see"
    if why is not None:
        log.warning("disk %s is not backed up: %s", disk.target, why)
    return why is None


def _tracked(session: Session) -> bool:
    """Whether a checkpoint would track any disk."""
    engine = session.choice.engine
    return any(untrackable(disk, engine) is None for disk in session.disks)


def _name(session: Session, loaded: Loaded, lineage: Lineage, asked: str | None) -> str:
    taken = lineage.names()
    if asked is not None:
        if asked in taken:
            raise PointExists(
                f"there is a restore point {asked} of domain {session.adapter.name!r} already",
                hint="choose another name",
            )
        return asked
    known = known_names(session.adapter) if session.tells_libvirt else ()
    return free_name(loaded, int(time.time()), (*taken, *known))


@contextmanager
def _lineage(session: Session, repository: Repository, history: History) -> Iterator[Lineage]:
    """The lineage that the next point belongs to, locked and settled."""
    found = {each.key: each.load().points for each in repository.lineages()}
    base = find_base(history, session.adapter.uuid, found)
    lineage = repository.lineage(base.lineage if base is not None else session.adapter.uuid)
    with lineage.lock(session.settings.lock_timeout):
        lineage.settle()
        yield lineage


# --- making it ---------------------------------------------------------------------------------


def _make(session: Session, loaded: Loaded, point: RestorePoint) -> None:
    quiesce = point.request.quiesce
    auto = quiesce is None
    if quiesce is None:
        # A guest that stands still could not answer.
        quiesce = session.active and not point.pause and session.adapter.agent.connected()
    tracked = _tracked(session)
    if not tracked:
        log.warning(
            "no disk of domain %s can keep a bitmap, so every backup reads all of them",
            session.adapter.name,
        )
    make = _with_checkpoint if tracked else _without_checkpoint
    try:
        make(session, loaded, point, quiesce=quiesce)
    except GuestAgentFailed as error:
        if not (auto and quiesce):
            raise
        log.warning("the guest's file systems are not frozen for this backup: %s", error)
        make(session.renewed(), session.loaded(), point, quiesce=False)


def _with_checkpoint(
    session: Session, loaded: Loaded, point: RestorePoint, *, quiesce: bool
) -> None:
    asked = preparation.Request(point.name, None, (), quiesce)
    creation.create_under_lock(session, loaded, asked, point)


def _without_checkpoint(
    session: Session, loaded: Loaded, point: RestorePoint, *, quiesce: bool
) -> None:
    with session.workspace():
        plan = _serving(session, point.targets, quiesce=quiesce)
        engine = session.engine(plan.engine)
        if quiesce:
            session.store.write_intent(Intent("freeze", (), plan.engine.value))
        try:
            if point.pause:
                outcome = while_standing(session, loaded, partial(engine.run, plan.steps))[0]
            else:
                outcome = engine.run(plan.steps)
            if quiesce:
                session.clear_intent()
            point.copy(session.history(), None, outcome.served)
            engine.run(plan.finish)
            point.commit()
        except BaseException:
            point.withdraw()
            try:
                engine.run(plan.undo)
                if quiesce:
                    session.clear_intent()
            except CkptmgrError as failure:
                log.warning("what served the disks could not be ended: %s", failure)
            raise


def _serving(session: Session, targets: tuple[str, ...], *, quiesce: bool = False) -> Plan:
    engine = session.choice.engine
    workspace = session.place()
    return planner(engine).create(
        CreateRequest(
            name="",
            document="",
            redefinition="",
            disks=(),
            socket=workspace.address if engine is not EngineName.OFFLINE else None,
            quiesce=session.settings.freeze_timeout if quiesce else None,
            serve=preparation.serve_disks(session, targets, workspace),
        )
    )


@dataclass
class _Wanted:
    """A `Copying` that is only planned."""

    point: str
    targets: tuple[str, ...]
    pause: bool

    def expect(self) -> None:
        raise RuntimeError("this is only planned")

    def copy(self, history: History, checkpoint: Checkpoint, served: Served) -> None:
        raise RuntimeError("this is only planned")

    def commit(self) -> None:
        raise RuntimeError("this is only planned")

    def withdraw(self) -> None:
        raise RuntimeError("this is only planned")
