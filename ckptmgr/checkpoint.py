"""A checkpoint and its disks, as recorded: data, no I/O and no XML."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from .errors import InvalidRequest

# libvirt's domaincheckpoint.rng allows these characters.  libvirt itself fails above 247 (its
# temporary file "<name>.xml.new" exceeds NAME_MAX after the bitmaps are made); 200 leaves room
# for the suffixes of other tools.
NAME_PATTERN = re.compile(r"[a-zA-Z0-9_-][a-zA-Z0-9_.-]*")
NAME_MAX = 200


class EngineName(StrEnum):
    """Who makes and removes the bitmaps."""

    LIBVIRT = "libvirt"
    MONITOR = "monitor"
    OFFLINE = "offline"


class State(StrEnum):
    """What became of a checkpoint's bitmap on one disk."""

    RECORDING = "recording"
    """the bitmap is there and records: "since this checkpoint until now" is exact"""
    FROZEN = "frozen"
    """the bitmap is there but no longer records"""
    ARCHIVED = "archived"
    """the bitmap was let go of; the closed intervals are in the store"""
    BROKEN = "broken"
    """the bitmap should be there and is missing or inconsistent"""
    NONE = "none"
    """the checkpoint does not track this disk"""


@dataclass(frozen=True)
class Interval:
    """The interval of one disk that a checkpoint ends.

    since -- the checkpoint that starts it: the nearest ancestor that tracks the disk
    map -- digest of the dirty map in the store, None if unknown
    reason -- why it is unknown
    """

    since: str
    map: str | None
    reason: str | None = None


@dataclass(frozen=True)
class CheckpointDisk:
    """One disk of a checkpoint.

    name -- the disk's target, ``vda``
    bitmap -- name of the dirty bitmap that starts here; None: the disk is not tracked
    granularity -- of that bitmap, in bytes; None where it could not be learnt
    node -- block node that got the bitmap; None for an inactive domain
    persistent -- the bitmap is kept in the image (False: it lives as long as QEMU does)
    size -- virtual size in bytes when the checkpoint was made
    source -- path or URI of the disk's top image then
    state -- as last recorded in the store; what is really there may differ
    reason -- why the disk is not tracked, for people
    interval -- what changed since the last checkpoint that tracks this disk, if there is one
    """

    name: str
    bitmap: str | None = None
    granularity: int | None = None
    node: str | None = None
    persistent: bool = True
    size: int | None = None
    source: str | None = None
    state: State = State.NONE
    reason: str | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class Checkpoint:
    """One point in time of one domain.

    created -- seconds since the epoch, as libvirt's creationTime
    parent -- name of the checkpoint it was made after; None for a root
    domain_xml -- the domain's inactive definition at that time
    point -- identity of the restore point whose state this one is: 32 hexadecimal digits
    generation -- of the domain's marker when this checkpoint was made: an older marker of this name
        is another checkpoint's, deleted since; None: not known
    """

    name: str
    created: int
    parent: str | None
    engine: EngineName
    disks: tuple[CheckpointDisk, ...]
    description: str | None = None
    domain_xml: str | None = None
    point: str | None = None
    generation: int | None = None

    def disk(self, name: str) -> CheckpointDisk | None:
        """The disk with target `name`, or None."""
        return next((disk for disk in self.disks if disk.name == name), None)


def archived(checkpoint: Checkpoint, targets: Iterable[str]) -> Checkpoint:
    """`checkpoint` when its bitmaps on `targets` are gone."""
    gone = set(targets)
    return replace(
        checkpoint,
        disks=tuple(
            replace(disk, state=State.ARCHIVED)
            if disk.name in gone and disk.bitmap is not None
            else disk
            for disk in checkpoint.disks
        ),
    )


def check_name(name: str) -> str:
    """Return `name` if libvirt's schema takes it as a checkpoint's name.

    Raises InvalidRequest, with the rule, if not.
    """
    if len(name) <= NAME_MAX and NAME_PATTERN.fullmatch(name):
        return name
    shown = name if len(name) <= 40 else name[:40] + "…"
    raise InvalidRequest(
        f"{shown!r} cannot be the name of a checkpoint",
        hint=f"use 1 to {NAME_MAX} of the characters a-z A-Z 0-9 _ - and, not first, a dot",
    )


def shown_disks(checkpoint: Checkpoint) -> frozenset[str]:
    """The disks for which libvirt is to list a bitmap of a checkpoint."""
    return frozenset(
        disk.name
        for disk in checkpoint.disks
        if disk.bitmap is not None
        and disk.persistent
        and disk.state in (State.RECORDING, State.FROZEN)
    )
