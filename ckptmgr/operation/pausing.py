"""Having a running domain stand still for a while, and letting it go on whatever happens.

It is recorded before the domain is paused, and until it runs again: if this process is killed
meanwhile, the next command lets it go on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from ..domain.power import is_running, pause, resume, standstill
from ..store import Loaded
from .session import Session

log = logging.getLogger("ckptmgr")

T = TypeVar("T")


def while_standing(session: Session, loaded: Loaded, act: Callable[[], T]) -> tuple[T, Loaded]:
    """What `act` returns, called while the domain stands still, and the store after that."""
    if not is_running(session.adapter):
        return act(), loaded
    loaded = stand_still(session, loaded)
    try:
        done = act()
    finally:
        loaded = go_on(session, loaded)
    return done, loaded


def stand_still(session: Session, loaded: Loaded) -> Loaded:
    """Pause a running domain, under the lock.  `go_on` is to be called in any case."""
    record = replace(loaded.record, paused=standstill(session.adapter).instance)
    session.store.save_record(record)
    pause(session.adapter)
    return replace(loaded, record=record)


def go_on(session: Session, loaded: Loaded) -> Loaded:
    """Let a domain run that is recorded to stand still, unless it is another QEMU by now."""
    record = loaded.record
    if record.paused is None:
        return loaded
    now = standstill(session.adapter)
    if now.paused and now.instance == record.paused:
        resume(session.adapter)
    record = replace(record, paused=None)
    session.store.save_record(record)
    return replace(loaded, record=record)
