"""adopt: take over the checkpoints that libvirt has and the store lacks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..checkpoint import Checkpoint, EngineName, check_name
from ..document import parse_libvirt
from ..domain.known import known_document, known_names
from ..errors import CkptmgrError, InvalidDocument, InvalidRequest
from ..history import History
from ..plan.steps import Plan
from ..store import Intent, Loaded
from ..views import CheckpointView
from .listing import view
from .observation import observe
from .redefinition import becomes_current, taken_over
from .session import Session

log = logging.getLogger("ckptmgr")

UNKNOWN = "the checkpoint was made by another tool, which did not keep it"


@dataclass(frozen=True)
class Adoption:
    """The history with what is to be taken over, and the names of that, parents first.

    refused -- checkpoints of libvirt's that cannot be taken over, and why
    """

    history: History
    names: tuple[str, ...]
    refused: Mapping[str, str]

    @property
    def notes(self) -> tuple[str, ...]:
        """What is left alone, and why."""
        return tuple(
            f"checkpoint {name} is left alone: {why}" for name, why in self.refused.items()
        )


def adopt(session: Session) -> tuple[CheckpointView, ...]:
    """Take over libvirt's checkpoints.  See Domain.adopt."""
    with session.locked() as loaded:
        return adopt_under_lock(session, loaded)


def adopt_under_lock(session: Session, loaded: Loaded) -> tuple[CheckpointView, ...]:
    """Take over libvirt's checkpoints; the lock is held."""
    adoption = prepare(session, loaded)
    for note in adoption.notes:
        log.warning("%s", note)
    history = adoption.history
    if adoption.names:
        session.store.write_intent(Intent("adopt", adoption.names, EngineName.LIBVIRT.value))
        try:
            for name in adoption.names:
                session.store.save_checkpoint(history.get(name))
            if history.current != loaded.history.current:
                session.commit_current(history, loaded.record)
        except BaseException:
            _take_back(session, loaded, adoption.names)
            raise
        session.clear_intent()
    return tuple(view(history, history.get(name), session.view) for name in adoption.names)


def _take_back(session: Session, loaded: Loaded, names: tuple[str, ...]) -> None:
    try:
        session.withdraw(reversed(names), loaded)
        session.store.clear_intent()
    except CkptmgrError as failure:
        log.warning("what was taken over so far stays: %s", failure)


def plan_adopt(session: Session) -> Plan:
    """What adopt() would do; nothing is touched, not even the lock."""
    session.require_writable()
    adoption = prepare(session, session.loaded())
    notes = (*(f"take over checkpoint {name}" for name in adoption.names), *adoption.notes)
    return Plan(EngineName.LIBVIRT, (), notes=notes)


def prepare(session: Session, loaded: Loaded) -> Adoption:
    """What is to be taken over; nothing is touched.

    A checkpoint of libvirt's hangs under the one that libvirt says, if the history has that.  A
    checkpoint that the history has already stays where it is there.
    """
    history = loaded.history
    taken: list[str] = []
    refused: dict[str, str] = {}
    for name in known_names(session.adapter):
        if name in history.checkpoints:
            continue
        try:
            if name in loaded.damaged_names:
                raise InvalidRequest(f"the store has a damaged document of checkpoint {name!r}")
            checkpoint = _read(session, history, check_name(name))
        except (InvalidDocument, InvalidRequest) as error:
            refused[name] = error.message
            continue
        history = history.add(checkpoint, becomes_current(history, checkpoint))
        taken.append(name)
    return Adoption(history, tuple(taken), refused)


def _read(session: Session, history: History, name: str) -> Checkpoint:
    given = parse_libvirt(known_document(session.adapter, name), what=f"checkpoint {name}")
    if given.parent is not None and given.parent not in history.checkpoints:
        given = replace(given, parent=None)
    disks = {disk.target: disk for disk in session.disks}
    taken = tuple(taken_over(given, disk, disks, history, UNKNOWN) for disk in given.disks)
    return observe(session, replace(given, engine=EngineName.LIBVIRT, disks=taken))
