"""A domain that is being made from a restore point: what is known of it, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..backup.definition import Identity, Redefinition
from ..backup.placement import Place
from ..backup.restoring import Kept
from ..domain.attachments import attachments
from ..domain.connection import Connection
from ..store import DomainStore

COPIED = ("nvram", "varstore", "kernel", "initrd", "dtb")
"""Roles of files that go into the folder."""


@dataclass(frozen=True)
class Prepared:
    """What is known before anything is touched."""

    places: tuple[Place, ...]
    identity: Identity
    redefinition: Redefinition
    files: Mapping[str, Path]


@dataclass
class Making:
    """A domain that is being made.

    token -- of the temporary names
    unsure -- libvirt may know the domain, so all has to stay as it is
    """

    connection: Connection
    kept: Kept
    prepared: Prepared
    part: DomainStore
    token: str
    missing: tuple[Path, ...]
    unsure: bool = False


def tpm_state(connection: Connection, prepared: Prepared) -> Path | None:
    """Where the new domain's TPM has its state."""
    found = attachments(
        prepared.redefinition.text,
        prepared.identity.uuid,
        connection.driver,
        connection.embedded_root,
    )
    return next((each.path for each in found if each.role == "tpm"), None)
