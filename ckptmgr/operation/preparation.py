"""A checkpoint that is to be made: what it will record, and the plan that makes it.

Everything that can be refused is refused here, before anything is touched.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from ..align import DiskRequest, align_disks
from ..checkpoint import Checkpoint, EngineName
from ..document import format_libvirt, format_request
from ..domain.known import known_names
from ..errors import InvalidRequest
from ..history import History
from ..plan import planner
from ..plan.request import CreateDisk, CreateRequest, ServeDisk
from ..plan.steps import Plan, Server
from ..store import Loaded
from . import projection
from .naming import checked_name, free_name
from .session import Session
from .tracking import create_disk, recorded_disk, shown_disks
from .workspace import Workspace

Served = Mapping[str, tuple[Server, str]]
"""Where the data of disks can be read: by target, the server and the name of the export."""


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    name: str | None
    description: str | None
    disks: tuple[DiskRequest, ...]
    quiesce: bool


class Copying(Protocol):
    """Something that wants the data of disks as it is at the instant of a checkpoint.

    point -- id of the restore point that the checkpoint is to carry
    targets -- the disks whose data is wanted
    pause -- whether the guest is to stand still for that instant
    """

    point: str
    targets: tuple[str, ...]
    pause: bool

    def expect(self) -> None:
        """The data is about to be served; called before QEMU is asked for it."""
        ...

    def copy(self, history: History, checkpoint: Checkpoint, served: Served) -> None:
        """Read the data, and make the copy durable.

        history -- with the checkpoint in it, which is not recorded yet
        served -- where each disk's data is to be had, until this returns
        """
        ...

    def commit(self) -> None:
        """Make the restore point exist."""
        ...

    def withdraw(self) -> None:
        """Have it not exist: the checkpoint failed after all.  Raises nothing."""
        ...


@dataclass(frozen=True)
class Creation:
    """A checkpoint that is ready to be made.

    checkpoint -- as it will be recorded; its intervals are unknown until their maps are read
    """

    checkpoint: Checkpoint
    plan: Plan


def prepare(
    session: Session,
    loaded: Loaded,
    request: Request,
    workspace: Workspace,
    unreadable: frozenset[str] = frozenset(),
    *,
    copying: Copying | None = None,
) -> Creation:
    """Everything that can be refused is refused here, before anything is touched.

    unreadable -- disks whose recording bitmap turned out to be missing or broken
    copying -- what wants the data of that instant
    """
    engine = session.choice.engine
    now = int(time.time())
    if request.name is None:
        name = free_name(loaded, now, known_names(session.adapter))
    else:
        name = checked_name(session, loaded, request.name)
    if request.quiesce and not session.active:
        raise InvalidRequest(
            f"domain {session.adapter.name!r} is not running, so there is nothing to quiesce",
            hint="leave --quiesce out",
        )
    aligned = align_disks(name, session.disks, request.disks, engine)
    layers = session.layers(engine)
    tracked = [
        create_disk(
            loaded.history,
            choice,
            session.disks,
            layers.get(choice.target),
            workspace.scratch(choice.target),
            unreadable,
        )
        for choice in aligned
        if choice.bitmap is not None
    ]
    disks = {disk.target: disk for disk in session.disks}
    checkpoint = Checkpoint(
        name=name,
        created=now,
        parent=loaded.history.current,
        engine=engine,
        disks=tuple(
            recorded_disk(
                name, loaded.history, choice, disks[choice.target], layers.get(choice.target)
            )
            for choice in aligned
        ),
        description=request.description,
        domain_xml=session.definition(),
        point=None if copying is None else copying.point,
        generation=loaded.record.generation + 1,
    )
    plan = _plan(session, loaded.history, request, checkpoint, tracked, workspace, copying)
    notes = tuple(
        f"disk {choice.target} is not tracked: {choice.reason}"
        for choice in aligned
        if choice.bitmap is None
    )
    return Creation(checkpoint, replace(plan, notes=(*plan.notes, *notes)))


def _plan(
    session: Session,
    history: History,
    request: Request,
    checkpoint: Checkpoint,
    tracked: list[CreateDisk],
    workspace: Workspace,
    copying: Copying | None,
) -> Plan:
    engine = session.choice.engine
    asked = CreateRequest(
        name=checkpoint.name,
        document=format_request(checkpoint.name, request.description, shown_disks(checkpoint)),
        redefinition=format_libvirt(projection.shown(session, history, checkpoint)),
        disks=tuple(tracked),
        socket=workspace.address if engine is not EngineName.OFFLINE else None,
        tell_libvirt=session.tells_libvirt,
        quiesce=session.settings.freeze_timeout if request.quiesce else None,
        serve=() if copying is None else serve_disks(session, copying.targets, workspace),
    )
    plan = planner(engine).create(asked)
    if engine is EngineName.LIBVIRT:
        plan = projection.with_known(session, history, tracked, plan)
    return plan


def serve_disks(
    session: Session, targets: Iterable[str], workspace: Workspace
) -> tuple[ServeDisk, ...]:
    """What the planners need to know to serve the data of disks."""
    layers = session.layers(session.choice.engine)
    disks = {disk.target: disk for disk in session.disks}
    return tuple(
        ServeDisk(
            target,
            image=disks[target].top.path,
            format=disks[target].top.format,
            layers=layers.get(target),
            scratch=workspace.scratch(target),
        )
        for target in targets
    )
