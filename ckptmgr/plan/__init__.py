"""Plans: pure functions that turn a request and what is there into steps for an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..checkpoint import EngineName
from .request import CreateRequest, DeleteRequest, ReadRequest, UndoRequest
from .steps import Plan, Step


@dataclass(frozen=True)
class Planner:
    """The four functions that each planner module has."""

    create: Callable[[CreateRequest], Plan]
    delete: Callable[[DeleteRequest], Plan]
    read: Callable[[ReadRequest], Plan]
    undo_create: Callable[[UndoRequest], tuple[Step, ...]]


def planner(engine: EngineName) -> Planner:
    """The planner for an engine."""
    from . import libvirt, monitor, offline

    module = {
        EngineName.LIBVIRT: libvirt,
        EngineName.MONITOR: monitor,
        EngineName.OFFLINE: offline,
    }[engine]
    return Planner(module.create, module.delete, module.read, module.undo_create)
