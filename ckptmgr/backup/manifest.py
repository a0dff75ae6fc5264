"""The manifest of a restore point: what the point is, which files it has and what it stands on.

    {"format": 1, "id": "5f0c…", "name": "monday", "domain_name": "web",
     "domain_uuid": "6695eb01-…", "parent": "sunday", "parent_id": "77ab…", "checkpoint": "monday",
     "checkpoint_created": 1795338000, "created": 1795338000,
     "disks": [{"name": "vda", "mode": "incremental", "base": "sunday", "base_id": "77ab…",
                "file": "vda.qcow2", "bytes": 393216, "virtual_size": 10737418240,
                "digests": "vda.digests", "digests_sha256": "9f86…", "format": "qcow2",
                "compression": null, "reason": null}],
     "files": [{"role": "domain", "file": "domain.xml", "source": null, "bytes": 4711,
                "sha256": "e3b0…"}],
     "digest": "…"}

``digest`` is the SHA-256 of the other members as JSON with sorted keys and no blanks.  A manifest
that has a member too many or too few is damaged; one of a higher format was written by a newer
version.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..checkpoint import check_name
from ..dirtymap import SIZE_MAX
from ..errors import InvalidRequest, RepositoryDamaged

FORMAT = 1
"""Of the manifests that this version writes, and the highest that it reads."""

FULL = "full"
INCREMENTAL = "incremental"

TARGET = re.compile("[A-Za-z0-9_-]{1,32}")
"""Targets of disks that can be names of files."""

_FILE = re.compile("[A-Za-z0-9_-][A-Za-z0-9_.-]{0,120}")
_ID = re.compile("[0-9a-f]{32}")
_SHA256 = re.compile("[0-9a-f]{64}")
_ROLE = re.compile("[a-z][a-z0-9-]{0,31}")
_DIGEST = "digest"
_TIME_MAX = 253402300799  # the last second of the year 9999


@dataclass(frozen=True)
class PointDisk:
    """One disk of a point: an image, and what it stands on.

    name -- the disk's target, ``vda``
    mode -- full or incremental
    base, base_id -- the point whose image is the backing file, by name and by id; None: full
    file -- the image's name in the point's folder
    bytes -- size of that file
    virtual_size -- of the disk, in bytes
    digests -- name of the file with the digests of the blocks that the image itself holds
    digests_sha256 -- of that file
    format -- the domain's own, ``qcow2`` or ``raw``
    compression -- of the image's data: zstd or None
    reason -- why the disk is full or was compared whole, for people
    """

    name: str
    mode: str
    base: str | None
    base_id: str | None
    file: str
    bytes: int
    virtual_size: int
    digests: str
    digests_sha256: str
    format: str
    compression: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class PointFile:
    """One file of a point beside the disks.

    role -- what it is: domain, checkpoint, nvram, kernel, initrd, tpm, ...
    file -- its name in the point's folder
    source -- the path that the domain names it by
    """

    role: str
    file: str
    source: str | None
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """One restore point.

    id -- names this point and no other, whatever it is called: 32 hexadecimal digits
    parent, parent_id -- the point that it comes after
    checkpoint, checkpoint_created -- the checkpoint whose state it is, and its time
    created -- seconds since the epoch
    """

    id: str
    name: str
    domain_name: str
    domain_uuid: str
    parent: str | None
    parent_id: str | None
    checkpoint: str | None
    checkpoint_created: int | None
    created: int
    disks: tuple[PointDisk, ...]
    files: tuple[PointFile, ...] = ()

    def disk(self, name: str) -> PointDisk | None:
        """The disk with target `name`, or None."""
        return next((disk for disk in self.disks if disk.name == name), None)

    def file(self, role: str) -> PointFile | None:
        """The first file with that role, or None."""
        return next((file for file in self.files if file.role == role), None)

    @property
    def file_names(self) -> frozenset[str]:
        """Names of all files in the point's folder beside the manifest."""
        images = {name for disk in self.disks for name in (disk.file, disk.digests)}
        return frozenset(images | {file.file for file in self.files})


def new_id() -> str:
    """An id for a new point."""
    return uuid.uuid4().hex


def check_target(name: str) -> str:
    """Return the target of a disk if it can be the name of a file.  Raises InvalidRequest."""
    if TARGET.fullmatch(name):
        return name
    raise InvalidRequest(
        f"disk {name[:40]!r} cannot be kept in a repository: its target is not a plain word",
        hint="leave it out with --disk",
    )


def format_manifest(manifest: Manifest) -> bytes:
    """The file.  Raises ValueError for what `parse_manifest` would refuse."""
    members = {"format": FORMAT, **asdict(manifest)}
    data = json.dumps({**members, _DIGEST: _digest(members)}, indent=2, ensure_ascii=True) + "\n"
    try:
        parse_manifest(data.encode())
    except RepositoryDamaged as error:
        raise ValueError(error.message) from error
    return data.encode()


def parse_manifest(data: bytes) -> Manifest:
    """The manifest in a file.  Raises RepositoryDamaged, with what is wrong."""
    try:
        members = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RepositoryDamaged(f"it is not JSON: {error}") from error
    if not isinstance(members, dict) or _DIGEST not in members:
        raise RepositoryDamaged("it has no digest: it was cut off, edited or damaged")
    digest = members.pop(_DIGEST)
    version = members.get("format")
    if type(version) is int and version > FORMAT:
        raise RepositoryDamaged(
            f"it has format {version}: it was written by a newer version of ckptmgr",
            hint="use that version",
        )
    if digest != _digest(members):
        raise RepositoryDamaged("it does not match its digest: it was edited by hand or damaged")
    if type(version) is not int or version != FORMAT:
        raise RepositoryDamaged("it is not the manifest of a restore point")
    del members["format"]
    manifest = _manifest(members)
    if fault := _fault(manifest):
        raise RepositoryDamaged(fault)
    return manifest


def _digest(members: Mapping[str, Any]) -> str:
    try:
        content = json.dumps(members, sort_keys=True, separators=(",", ":"))
    except RecursionError:
        raise RepositoryDamaged("it is nested too deep") from None
    return hashlib.sha256(content.encode()).hexdigest()


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _manifest(members: dict[str, Any]) -> Manifest:
    disks, files = members.pop("disks", None), members.pop("files", None)
    if not isinstance(disks, list) or not isinstance(files, list):
        raise RepositoryDamaged("it has no lists of disks and files")
    manifest: Manifest = _made(
        Manifest,
        members,
        disks=tuple(_made(PointDisk, disk) for disk in disks),
        files=tuple(_made(PointFile, file) for file in files),
    )
    return manifest


def _made(kind: Any, members: object, **known: Any) -> Any:
    """An object of the dataclass `kind` from the members that its fields name, all of them."""
    types = {each.name: each.type for each in fields(kind) if each.name not in known}
    if not isinstance(members, dict) or members.keys() != types.keys():
        raise RepositoryDamaged(f"it does not describe a {kind.__name__} as this format does")
    for name, expected in types.items():
        value = members[name]
        if not (
            (value is None and expected.endswith("None"))
            or (type(value) is str and expected.startswith("str"))
            or (type(value) is int and expected.startswith("int"))
        ):
            raise RepositoryDamaged(f"{name} is {value!r:.40}")
    return kind(**members, **known)


def _fault(manifest: Manifest) -> str | None:
    """Why this cannot be a point, or None."""
    try:
        check_name(manifest.name)
        for name in (manifest.parent, manifest.checkpoint):
            if name is not None:
                check_name(name)
    except InvalidRequest as error:
        return error.message
    if not _ID.fullmatch(manifest.id) or not _is_uuid(manifest.domain_uuid):
        return "it names itself or its domain by what is no id"
    if (manifest.parent is None) is not (manifest.parent_id is None) or (
        manifest.parent_id is not None and not _ID.fullmatch(manifest.parent_id)
    ):
        return "its parent has a name and an id, or neither"
    if manifest.parent == manifest.name:
        return "it is its own parent"
    times = (manifest.created, manifest.checkpoint_created or 0)
    if not all(0 <= time <= _TIME_MAX for time in times):
        return "it has a time that is none"
    names = [disk.name for disk in manifest.disks]
    listed = [name for disk in manifest.disks for name in (disk.file, disk.digests)]
    listed += [file.file for file in manifest.files]
    if _repeats(names) or _repeats(listed) or "manifest.json" in listed:
        return "a disk or file occurs twice"
    if not all(map(_FILE.fullmatch, listed)):
        return "it names a file by what is no plain name"
    faults = (
        *(_disk_fault(manifest, disk) for disk in manifest.disks),
        *(_file_fault(file) for file in manifest.files),
    )
    return next((fault for fault in faults if fault is not None), None)


def _disk_fault(manifest: Manifest, disk: PointDisk) -> str | None:
    where = f"disk {disk.name[:40]}"
    if not TARGET.fullmatch(disk.name):
        return "the name of a disk is no plain word"
    if disk.mode not in (FULL, INCREMENTAL):
        return f"{where}: {disk.mode[:40]!r} is no mode"
    stands = disk.mode == INCREMENTAL
    if stands is (disk.base is None) or stands is (disk.base_id is None):
        return f"{where}: it is {disk.mode}, which contradicts its base"
    if disk.base is not None:
        try:
            check_name(disk.base)
        except InvalidRequest as error:
            return f"{where}: {error.message}"
        if disk.base == manifest.name:
            return f"{where} stands on itself"
    if disk.base_id is not None and not _ID.fullmatch(disk.base_id):
        return f"{where}: its base has no id"
    if not 0 <= disk.bytes <= SIZE_MAX or not 0 <= disk.virtual_size <= SIZE_MAX:
        return f"{where} has a size that is none"
    if not _SHA256.fullmatch(disk.digests_sha256):
        return f"{where}: its digests have no digest"
    return None


def _file_fault(file: PointFile) -> str | None:
    if not _ROLE.fullmatch(file.role):
        return f"{file.role[:40]!r} is no role of a file"
    if not 0 <= file.bytes <= SIZE_MAX or not _SHA256.fullmatch(file.sha256):
        return f"the file {file.file} has no size or digest"
    return None


def _repeats(names: Collection[str]) -> bool:
    return len(set(names)) != len(names)


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False
