"""The store: the durable record of every domain's checkpoints.  See docs/architecture.md."""

from __future__ import annotations

import os
import uuid as uuids
from pathlib import Path

from ..errors import InvalidRequest
from . import files
from .domain import INTENT, RECORD, Damage, DomainStore, Loaded
from .records import DomainRecord, Intent

__all__ = ["INTENT", "RECORD", "Damage", "DomainRecord", "DomainStore", "Intent", "Loaded", "Store"]


class Store:
    """A metadata directory: one folder per domain, called after its UUID.

    Nothing is made on disk before something is written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def domain(self, uuid: str) -> DomainStore:
        """The part of one domain, known or not.  Raises InvalidRequest for what is no UUID."""
        canonical = _canonical(uuid)
        if canonical is None:
            raise InvalidRequest(f"{uuid!r} is not the UUID of a domain")
        return DomainStore(self.directory / canonical, canonical)

    def domains(self) -> tuple[str, ...]:
        """UUIDs of the domains of which anything is recorded, or whose folder cannot be read.

        Raises StoreFailed.
        """
        with files.failing(self.directory, "cannot be read"):
            try:
                entries = sorted(os.listdir(self.directory))  # noqa: PTH208 -- names, not paths
            except FileNotFoundError:
                return ()
        return tuple(
            name
            for name in entries
            if _canonical(name) == name and self._holds_anything(self.directory / name)
        )

    def _holds_anything(self, folder: Path) -> bool:
        """Whether there is more than the lock of somebody who then changed nothing."""
        try:
            names = os.listdir(folder)  # noqa: PTH208 -- names, not paths
        except OSError:
            return True  # whoever looks into it is told what is wrong with it
        return any(name.endswith((".xml", ".json")) for name in names)


def _canonical(uuid: str) -> str | None:
    try:
        return str(uuids.UUID(uuid))
    except ValueError:
        return None
