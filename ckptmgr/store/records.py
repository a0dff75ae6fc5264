"""The small records beside the checkpoints: the domain's, and the intent of an operation.

domain.json   {"name": "vm", "current": "c2", "generation": 7,
               "tails": {"c1": {"vda": "<sha256>", "vdb": null}}, "moved": {"c0": null},
               "left": "c3", "paused": 5,
               "repositories": {"/srv/backup": "<uuid>"}, "sha256": "…"}
intent.json   {"operation": "create", "names": ["c3"], "engine": "libvirt", "data": {…},
               "sha256": "…"}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint import check_name
from ..errors import InvalidRequest, StoreDamaged
from . import seal

_DIGEST = re.compile("[0-9a-f]{64}")
_UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class DomainRecord:
    """What is recorded of the domain itself.

    name -- of the domain when it was last changed; empty if nothing was recorded yet
    current -- the current checkpoint
    generation -- counts the changes of `current`; the marker carries the same number
    tails -- checkpoints whose line was left by a revert: of each disk the digest of the dirty map
             from the checkpoint until then, None where that is unknown
    moved -- checkpoints that were deleted while the domain had snapshots, which may name them:
             the nearest ancestor that stayed
    left -- libvirt's hook found the domain going back: the checkpoint that was current before;
            for the next command to tell, and to show libvirt
    paused -- libvirt's number of a QEMU that an operation under way has paused: the next command
              lets it run, if that one was interrupted
    """

    name: str = ""
    current: str | None = None
    generation: int = 0
    tails: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    moved: Mapping[str, str | None] = field(default_factory=dict)
    left: str | None = None
    paused: int | None = None
    repositories: Mapping[str, str] = field(default_factory=dict)

    def serialize(self) -> bytes:
        """The file."""
        return seal.seal_json(
            {
                "name": self.name,
                "current": self.current,
                "generation": self.generation,
                "tails": {name: dict(disks) for name, disks in self.tails.items()},
                "moved": dict(self.moved),
                "left": self.left,
                "paused": self.paused,
                "repositories": dict(self.repositories),
            }
        )

    @classmethod
    def deserialize(cls, data: bytes) -> DomainRecord:
        """The record in a file.  Raises StoreDamaged."""
        members = seal.unseal_json(data)
        name, current, left = (members.get(key) for key in ("name", "current", "left"))
        generation, paused = members.get("generation"), members.get("paused")
        if not isinstance(name, str) or type(generation) is not int or generation < 0:
            raise StoreDamaged("it is not the record of a domain")
        if paused is not None and type(paused) is not int:
            raise StoreDamaged("it is not the record of a domain")
        return cls(
            name,
            None if current is None else _checkpoint_name(current),
            generation,
            _tails(members.get("tails", {})),
            _moved(members.get("moved", {})),
            None if left is None else _checkpoint_name(left),
            paused,
            _repositories(members.get("repositories", {})),
        )


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


def _tails(value: object) -> dict[str, dict[str, str | None]]:
    if not isinstance(value, dict):
        raise StoreDamaged("it is not the record of a domain")
    tails: dict[str, dict[str, str | None]] = {}
    for name, disks in value.items():
        if not isinstance(disks, dict):
            raise StoreDamaged("it is not the record of a domain")
        for digest in disks.values():
            if digest is not None and not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
                raise StoreDamaged("it names a dirty map by something that is not a digest")
        tails[_checkpoint_name(name)] = dict(disks)
    return tails


def _moved(value: object) -> dict[str, str | None]:
    if not isinstance(value, dict):
        raise StoreDamaged("it is not the record of a domain")
    return {
        _checkpoint_name(name): None if to is None else _checkpoint_name(to)
        for name, to in value.items()
    }


def _repositories(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise StoreDamaged("it is not the record of a domain")
    for key in value.values():
        if not isinstance(key, str) or _UUID.fullmatch(key) is None:
            raise StoreDamaged("it names a lineage by something that is not a UUID")
    return dict(value)


def _checkpoint_name(name: object) -> str:
    try:
        return check_name(name if isinstance(name, str) else "")
    except InvalidRequest as error:
        raise StoreDamaged(error.message) from error
