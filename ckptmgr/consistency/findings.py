"""What check finds, and what repair can do about it: data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import NoDomain


@dataclass(frozen=True)
class Settle:
    """Complete or take back the operation whose intent was left behind."""


@dataclass(frozen=True)
class MarkBroken:
    """Record that what changed on a disk since a checkpoint is unknown.

    remove -- a bitmap is left, and goes
    """

    checkpoint: str
    disk: str
    reason: str
    remove: bool


@dataclass(frozen=True)
class MarkArchived:
    """Record that a bitmap of another branch is gone; nothing is lost with it.

    remove -- a bitmap is left, and goes
    """

    checkpoint: str
    disk: str
    remove: bool


@dataclass(frozen=True)
class MarkUnknown:
    """Record that the map of the interval that a checkpoint ends is lost."""

    checkpoint: str
    disk: str
    reason: str


@dataclass(frozen=True)
class RemoveBitmap:
    """Remove a bitmap from every layer of a disk.

    foreign -- nothing says that ckptmgr made it
    """

    disk: str
    bitmap: str
    foreign: bool


@dataclass(frozen=True)
class Redefine:
    """Show libvirt a checkpoint as the store has it."""

    checkpoint: str


@dataclass(frozen=True)
class Forget:
    """Delete libvirt's metadata of a checkpoint that has no bitmap any more."""

    checkpoint: str


@dataclass(frozen=True)
class Adopt:
    """Take over libvirt's checkpoints that the store lacks."""


@dataclass(frozen=True)
class SetCurrent:
    """Make a checkpoint current in the store and in the marker."""

    checkpoint: str | None


@dataclass(frozen=True)
class GoBack:
    """Go on from another checkpoint, since the domain went back in time."""

    checkpoint: str | None


@dataclass(frozen=True)
class EndJob:
    """End the job or NBD server of QEMU's that an interrupted operation left running."""


@dataclass(frozen=True)
class ClearWorkspace:
    """Remove the socket and scratch files that an interrupted operation left behind."""


@dataclass(frozen=True)
class SetAside:
    """Move a file of the store that cannot be read out of the way, beside itself."""

    path: str


Action = (
    Settle
    | MarkBroken
    | MarkArchived
    | MarkUnknown
    | RemoveBitmap
    | Redefine
    | Forget
    | Adopt
    | SetCurrent
    | GoBack
    | EndJob
    | ClearWorkspace
    | SetAside
)


@dataclass(frozen=True)
class Finding:
    """One mismatch.

    message -- what is there and what it means, a sentence
    cure -- what repair does, or what the user can do
    action -- for repair; None: it needs no cure (and is then `harmless`) or a person
    harmless -- nothing is wrong; it is worth knowing
    """

    code: str
    message: str
    cure: str
    disk: str | None = None
    checkpoint: str | None = None
    action: Action | None = None
    harmless: bool = False

    def json(self) -> dict[str, Any]:
        """The entry of ``"findings"``."""
        return {
            "code": self.code,
            "disk": self.disk,
            "checkpoint": self.checkpoint,
            "message": self.message,
            "cure": self.cure,
            "harmless": self.harmless,
        }

    def curable(self, *, foreign: bool) -> bool:
        """Whether repair has a cure that it may use."""
        if isinstance(self.action, RemoveBitmap) and self.action.foreign:
            return foreign
        return self.action is not None


class Unfinished(NoDomain):
    """There is no such domain, and an interrupted restore has left something of one.

    finding -- what that is, and its cure
    """

    def __init__(self, message: str, *, hint: str, finding: Finding) -> None:
        super().__init__(message, hint=hint)
        self.finding = finding


def consistent(findings: Iterable[Finding]) -> bool:
    """Whether everything fits together: what is harmless does not count."""
    return all(finding.harmless for finding in findings)
