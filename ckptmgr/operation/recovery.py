"""Settle what an interrupted operation left behind, by what is really there."""

from __future__ import annotations

import logging
from dataclasses import replace

from ..checkpoint import EngineName
from ..domain.power import has_let_go, state
from ..domain.snapshots import snapshots
from ..errors import CkptmgrError, ConnectionFailed, OperationFailed, StoreDamaged, StoreFailed
from ..plan.steps import CheckpointDelete
from ..snapshot import Kind
from ..store import Intent, Loaded
from . import archive, creation, deletion, replacement, reversion
from .noticing import notice
from .pausing import go_on
from .session import Session

log = logging.getLogger("ckptmgr")


def settled(session: Session) -> Loaded:
    """What the store has when all that was left behind is settled; to be called under the lock.

    That is an interrupted operation, a domain that was to stand still for a moment only, and a
    domain that went back in time.  Raises OperationFailed while QEMU has none of its bitmaps.
    """
    settle(session)
    loaded = go_on(session, session.loaded())
    require_bitmaps(session)
    return notice(session, loaded)


def require_bitmaps(session: Session) -> None:
    """Raises OperationFailed where QEMU has let go of the bitmaps for a snapshot with the memory.

    The new images of such a snapshot have empty ones, and those below seem to have none: libvirt
    takes that for "nothing was written".  Asking QEMU taints the domain, so it is asked only where
    there is such a snapshot.
    """
    adapter = session.adapter
    if (
        session.active
        and state(adapter) == "paused"
        and any(found.memory is Kind.EXTERNAL for found in snapshots(adapter))
        and has_let_go(adapter)
    ):
        raise OperationFailed(
            f"domain {adapter.name!r} was paused when a snapshot with its memory was taken: its "
            "QEMU has let go of the images and their bitmaps, until the domain runs",
            hint=f"let it run: `virsh resume {adapter.name}`",
        )


def settle(session: Session) -> None:
    """Complete or take back the operation whose intent is found; to be called under the lock."""
    intent = session.store.read_intent()
    if intent is None:
        return
    names = ", ".join(intent.names)
    loaded = session.loaded()
    if intent.operation == "create":
        _settle_create(session, intent, loaded)
    elif intent.operation == "delete":
        log.warning("completing an interrupted deletion of %s", names)
        try:
            deletion.finish(
                session, loaded, intent.names, metadata=bool(intent.data.get("metadata"))
            )
        except (ConnectionFailed, StoreFailed):
            raise
        except CkptmgrError as error:
            log.warning("what is left of %s stays: %s", names, error)
            session.store.clear_intent()
    elif intent.operation == "redefine":
        _settle_redefine(session, intent, loaded)
    elif intent.operation == "archive":
        _settle_archive(session, intent, loaded)
    elif intent.operation == "revert":
        reversion.settle(session, intent)
    elif intent.operation == "restore":
        replacement.settle(session, intent)
    elif intent.operation == "define":
        from . import inception  # libnbd, which few commands need

        log.warning("completing the interrupted restore of point %s", names)
        inception.settle(session, intent)
    elif intent.operation == "freeze":
        thaw(session)
        session.store.clear_intent()
    elif intent.operation == "adopt":
        # Each document stands for itself; the next adopt takes the rest.
        session.store.clear_intent()
    else:
        raise StoreDamaged(
            f"an interrupted operation {intent.operation!r} is not known to this version",
            hint="use the version of ckptmgr that began it",
        )


def _settle_create(session: Session, intent: Intent, loaded: Loaded) -> None:
    (name,) = intent.names
    if name in loaded.history.checkpoints:
        # The document is the moment at which a checkpoint exists; only "current" may be missing.
        log.warning("completing the interrupted creation of checkpoint %s", name)
        if loaded.history.get(name).parent == loaded.history.current:
            session.commit_current(replace(loaded.history, current=name), loaded.record)
    else:
        log.warning("taking back the interrupted creation of checkpoint %s", name)
        if intent.data.get("freezes"):
            thaw(session)
        creation.take_back(session, intent, name)
    session.store.clear_intent()


def thaw(session: Session) -> None:
    """Thaw a guest that an operation may have left frozen."""
    try:
        session.adapter.agent.thaw(session.settings.freeze_timeout)
    except CkptmgrError as error:
        name = session.adapter.name
        log.error(  # noqa: TRY400 -- for people: no traceback
            "the file systems of domain %s may still be frozen: %s; thaw them: virsh domfsthaw %s",
            name,
            error,
            name,
        )


def _settle_redefine(session: Session, intent: Intent, loaded: Loaded) -> None:
    for name in intent.names:
        if name not in loaded.history.checkpoints and session.tells_libvirt:
            log.warning("taking back the interrupted redefinition of checkpoint %s", name)
            step = CheckpointDelete(name, metadata_only=True, missing_ok=True)
            session.engine(EngineName.LIBVIRT).run((step,))
    session.store.clear_intent()


def _settle_archive(session: Session, intent: Intent, loaded: Loaded) -> None:
    log.warning("completing an interrupted archiving of %s", ", ".join(intent.names))
    bitmaps = {name: tuple(disks) for name, disks in dict(intent.data["disks"]).items()}
    try:
        archive.finish(session, loaded.history, bitmaps)
    except (ConnectionFailed, StoreFailed):
        raise
    except CkptmgrError as error:
        log.warning("the other bitmaps stay: %s", error)
        session.store.clear_intent()
