"""The small records beside the checkpoints: the domain's, and the intent of an operation.

domain.json   {"name": "vm", "current": "c2", "generation": 7, "sha256": "…"}
intent.json   {"operation": "create", "names": ["c3"], "engine": "libvirt", "data": {…},
               "sha256": "…"}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint import check_name
from ..errors import InvalidRequest, StoreDamaged
from . import seal


@dataclass(frozen=True)
class DomainRecord:
    """What is recorded of the domain itself.

    name -- of the domain when it was last changed; empty if nothing was recorded yet
    current -- the current checkpoint
    generation -- counts the changes of `current`; the marker carries the same number
    """

    name: str = ""
    current: str | None = None
    generation: int = 0

    def serialize(self) -> bytes:
        """The file."""
        return seal.seal_json(
            {"name": self.name, "current": self.current, "generation": self.generation}
        )

    @classmethod
    def deserialize(cls, data: bytes) -> DomainRecord:
        """The record in a file.  Raises StoreDamaged."""
        members = seal.unseal_json(data)
        name, current = members.get("name"), members.get("current")
        generation = members.get("generation")
        if not isinstance(name, str) or type(generation) is not int or generation < 0:
            raise StoreDamaged("it is not the record of a domain")
        return cls(name, None if current is None else _checkpoint_name(current), generation)


@dataclass(frozen=True)
class Intent:
    """An operation under way, written before anything is changed.

    operation -- create, delete, …
    names -- the checkpoints that it makes or removes
    engine -- the engine that does it
    data -- what it takes to complete the operation or to take it back: JSON values
    """

    operation: str
    names: tuple[str, ...]
    engine: str
    data: Mapping[str, Any] = field(default_factory=dict)

    def serialize(self) -> bytes:
        """The file."""
        return seal.seal_json(
            {
                "operation": self.operation,
                "names": list(self.names),
                "engine": self.engine,
                "data": dict(self.data),
            }
        )

    @classmethod
    def deserialize(cls, data: bytes) -> Intent:
        """The intent in a file.  Raises StoreDamaged."""
        members = seal.unseal_json(data)
        operation, engine = members.get("operation"), members.get("engine")
        names, values = members.get("names"), members.get("data")
        if (
            not isinstance(operation, str)
            or not isinstance(engine, str)
            or not isinstance(names, list)
            or not isinstance(values, dict)
        ):
            raise StoreDamaged("it is not the intent of an operation")
        return cls(operation, tuple(_checkpoint_name(name) for name in names), engine, values)


def _checkpoint_name(name: object) -> str:
    try:
        return check_name(name if isinstance(name, str) else "")
    except InvalidRequest as error:
        raise StoreDamaged(error.message) from error
