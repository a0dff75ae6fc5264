"""The name of a new checkpoint: the one that is asked for, or the time."""

from __future__ import annotations

from collections.abc import Iterable

from ..checkpoint import check_name
from ..domain.known import is_known
from ..errors import CheckpointExists, InvalidRequest
from ..plan.libvirt import DISCARD
from ..store import Loaded
from .session import Session


def free_name(loaded: Loaded, now: int, known: Iterable[str] = ()) -> str:
    """A name for a checkpoint that nobody names: the time in seconds, or the next that is free.

    known -- names that are taken elsewhere
    """
    taken = {*loaded.history.checkpoints, *loaded.damaged_names, *loaded.record.moved, *known}
    return next(name for name in map(str, range(now, now + len(taken) + 1)) if name not in taken)


def checked_name(session: Session, loaded: Loaded, asked: str) -> str:
    """The name that somebody asks for.  Raises InvalidRequest, CheckpointExists if it cannot be."""
    check_name(asked)
    if asked == DISCARD:
        raise InvalidRequest(
            f"the name {DISCARD} is reserved: ckptmgr has libvirt remove bitmaps with it",
            hint="choose another name",
        )
    if asked in loaded.history.checkpoints or asked in loaded.damaged_names:
        raise CheckpointExists(
            f"domain {session.adapter.name!r} has a checkpoint {asked!r} already",
            hint="choose another name, or delete that one first",
        )
    if asked in loaded.record.moved:
        raise CheckpointExists(
            f"domain {session.adapter.name!r} had a checkpoint {asked!r}, which was deleted; "
            "one of its snapshots may still refer to that one",
            hint="choose another name, or delete the snapshots first",
        )
    if is_known(session.adapter, asked):
        raise CheckpointExists(
            f"libvirt has a checkpoint {asked!r} of domain {session.adapter.name!r} already, "
            "which ckptmgr did not make",
            hint="choose another name, or take it over with `ckptmgr adopt`",
        )
    return asked
