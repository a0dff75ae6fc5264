"""Whether what a repository holds is what was written: every file, every relation, every block.

Each layer, which is one image by itself, is looked at once, however many points stand on it.  What
was found names the point that is damaged, and all those that cannot be trusted therefore.  Nothing
is changed, and no lock is taken: a point that somebody changes meanwhile is looked at again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbd
from pyroaring import AbstractBitMap64, BitMap64

from .. import nbd as nbd_client
from ..engine.qemu_img import ImageServer, image_name
from ..errors import (
    NoPoint,
    OperationFailed,
    RepositoryDamaged,
    RepositoryFailed,
    StoreDamaged,
    Unsupported,
)
from ..store import files
from . import overlays, rewriting
from .block import BLOCK, block_count
from .compaction import open_digests, serving
from .copying import Source, read_blocks
from .digests import Digests, runs
from .header import read_header
from .manifest import Manifest, PointDisk, PointFile
from .points import Points
from .repository import GONE, LOCK, MANIFEST, PARTIAL, Lineage, Loaded
from .views import VerifyFinding

log = logging.getLogger("ckptmgr")

DEPTH = "qemu:allocation-depth"
"""QEMU's docs/interop/nbd.txt: 0 where an image holds nothing itself."""

_AT_ONCE = 1 << 20
_TRIES = 10


@dataclass(frozen=True)
class Found:
    """One thing that is wrong.

    point -- the one that is damaged, or that should be there
    disk -- the disk that is concerned; None: no one in particular
    affected -- the points that cannot be trusted therefore
    harmless -- nothing is lost by it
    """

    code: str
    point: str | None
    disk: str | None
    message: str
    affected: tuple[str, ...] = ()
    harmless: bool = False


def verify(
    lineage: Lineage, wanted: Iterable[str] | None = None
) -> tuple[int, list[VerifyFinding]]:
    """How many points were looked at, and what was found.

    wanted -- points, with all that they stand on; None: all, and whatever else lies there

    Raises NoPoint for a point that is not there, RepositoryFailed if the folder cannot be read or
    goes away, Unsupported where QEMU's tools are not installed.
    """
    names = None if wanted is None else set(wanted)
    loaded = lineage.load()
    looked_at = _looked_at(loaded, names)
    found = list(_layers(lineage, loaded.points, looked_at))
    for _ in range(_TRIES):
        if not found or (now := lineage.load()) == loaded:
            break
        lineage.require()
        # Somebody made, merged or removed points meanwhile: this may lie between two states.
        loaded = now
        suspects = {each.point for each in found}
        again = [name for name in loaded.points.by_time() if name in suspects]
        found = list(_layers(lineage, loaded.points, again))
    relevant = set(looked_at) | (names or set())
    told = [
        each
        for each in structure(loaded)
        if names is None or each.point in relevant or relevant & set(each.affected)
    ]
    told += found
    if names is None:
        told += _strays(lineage, loaded)
    damaged = {each.point for each in loaded.damaged if each.point is not None}
    count = len({*looked_at, *(damaged if names is None else damaged & names)})
    return count, [_told(lineage, loaded.points, each) for each in told]


def _layers(lineage: Lineage, points: Points, names: Iterable[str]) -> Iterator[Found]:
    """What is wrong with the files and images of points."""
    for name in names:
        log.info("verifying restore point %s", name)
        yield from _files(lineage, points, name)
        for disk in points.get(name).disks:
            affected = (name, *points.dependants(name, disk.name))
            for code, message in _layer(lineage, points, name, disk):
                yield Found(code, name, disk.name, message, affected)


def _told(lineage: Lineage, points: Points, found: Found) -> VerifyFinding:
    names = [*([] if found.point is None else [found.point]), *found.affected]
    manifests = [points.manifests[name] for name in names if name in points.manifests]
    return VerifyFinding(
        code=found.code,
        lineage=lineage.key,
        domain=manifests[0].domain_name if manifests else None,
        point=found.point,
        disk=found.disk,
        message=found.message,
        affected=found.affected,
        harmless=found.harmless,
    )


def _looked_at(loaded: Loaded, wanted: set[str] | None) -> list[str]:
    """The points to look at: those that are wanted, and what they stand on; oldest first."""
    points = loaded.points
    if wanted is None:
        return list(points.by_time())
    damaged = {damage.point for damage in loaded.damaged}
    chosen: set[str] = set()
    for name in wanted:
        if name in damaged:
            continue
        if name not in points:
            raise NoPoint(f"there is no restore point {name}")
        chosen.add(name)
        for disk in points.get(name).disks:
            chosen.update(points.reached(name, disk.name))
    return [name for name in points.by_time() if name in chosen]


# --- relations: pure -----------------------------------------------------------------------------


def structure(loaded: Loaded) -> Iterator[Found]:
    """What is wrong with manifests and relations."""
    points = loaded.points
    damaged = {damage.point: damage for damage in loaded.damaged}
    for damage in loaded.damaged:
        if damage.point is None:
            yield Found("damaged-record", None, None, damage.message)
        else:
            affected = (damage.point, *points.dependants(damage.point))
            yield Found("damaged-manifest", damage.point, None, damage.message, affected)
    for name in points.by_time():
        manifest = points.get(name)
        for disk in manifest.disks:
            if disk.base is None or disk.base in damaged:
                continue
            affected = (name, *points.dependants(name, disk.name))
            what = f"disk {disk.name} of restore point {name} stands on {disk.base}, which"
            base = points.manifests.get(disk.base)
            if base is None:
                yield Found("missing-point", disk.base, disk.name, f"{what} is missing", affected)
            elif base.id != disk.base_id:
                message = f"{what} is another point of that name"
                yield Found("replaced-point", disk.base, disk.name, message, affected)
            elif base.disk(disk.name) is None:
                message = f"{what} has no such disk"
                yield Found("missing-disk", disk.base, disk.name, message, affected)
            elif name in points.reached(disk.base, disk.name):
                message = f"{what} stands on it"
                yield Found("circular", name, disk.name, message, affected)
        parent = manifest.parent
        if parent is not None and points.parent(name) is None and parent not in damaged:
            message = f"restore point {name} comes after {parent}, which is not there"
            yield Found("missing-parent", name, None, message, harmless=True)


# --- files ---------------------------------------------------------------------------------------


def _files(lineage: Lineage, points: Points, name: str) -> Iterator[Found]:
    """What is wrong with the files of a point beside its disks."""
    for file in points.get(name).files:
        path = lineage.path / name / file.file
        if fault := _file_fault(path, file):
            code = "missing-file" if fault == _MISSING else "damaged-file"
            yield Found(code, name, None, f"{path}, its {file.role}, {fault}", (name,))


_MISSING = "is missing"


def _file_fault(path: Path, file: PointFile) -> str | None:
    try:
        descriptor = files.open_regular(path)
        try:
            content = hashlib.sha256()
            length = 0
            while part := os.read(descriptor, _AT_ONCE):
                content.update(part)
                length += len(part)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return _MISSING
    except StoreDamaged:
        return "is no file"
    except OSError as error:
        return f"cannot be read: {_reason(error)}"
    if length != file.bytes or content.hexdigest() != file.sha256:
        return "is not what the manifest says"
    return None


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def _strays(lineage: Lineage, loaded: Loaded) -> Iterator[Found]:
    """What lies around and is nobody's, or is left of what was interrupted."""
    left = "is left of what was interrupted: the next backup or prune clears it away"
    damaged = {damage.point for damage in loaded.damaged}
    for name in lineage.names():
        path = lineage.path / name
        if name == rewriting.RECORD:
            if not any(damage.path == path for damage in loaded.damaged):
                message = f"{path}: a prune was interrupted, and the next backup or prune goes on"
                yield Found("interrupted", None, None, message, harmless=True)
        elif PARTIAL.fullmatch(name) or GONE.fullmatch(name) or files.TEMPORARY.fullmatch(name):
            yield Found("interrupted", None, None, f"{path} {left}", harmless=True)
        elif name != LOCK and name not in loaded.points and name not in damaged:
            yield Found("stray", None, None, f"{path} is nothing of ckptmgr's", harmless=True)
    for name, manifest in loaded.points.manifests.items():
        known = {MANIFEST, overlays.RECORD, *manifest.file_names}
        try:
            there = sorted(os.listdir(lineage.path / name))  # noqa: PTH208 -- names, not paths
        except OSError:
            continue  # each of its files is told to be missing
        for file in there:
            path = lineage.path / name / file
            if file in known:
                continue
            if rewriting.is_left(file, manifest):
                yield Found("interrupted", name, None, f"{path} {left}", harmless=True)
            else:
                message = f"{path} is not in the manifest of the point"
                yield Found("stray", name, None, message, harmless=True)


# --- layers --------------------------------------------------------------------------------------


_UNUSABLE = ("missing-image", "damaged-header")
"""What QEMU is not given to open: it might open another file for it."""


def _layer(
    lineage: Lineage, points: Points, name: str, disk: PointDisk
) -> Iterator[tuple[str, str]]:
    """What is wrong with an image and its digests: codes and messages."""
    manifest = points.get(name)
    what = f"disk {disk.name} of restore point {name}"
    image = lineage.image(manifest, disk.name)
    usable = True
    for code, message in _image(image, what, disk, points.manifests.get(disk.base or "")):
        usable = usable and code not in _UNUSABLE
        yield code, message
    if usable:
        yield from _checked(image, what)
    try:
        digests = open_digests(lineage, manifest, disk.name)
    except (RepositoryDamaged, RepositoryFailed) as error:
        yield "damaged-digests", f"{what}: {error.message}"
        return
    with digests:
        if usable:
            yield from _content(image, what, disk, digests)


def _image(
    path: Path, what: str, disk: PointDisk, base: Manifest | None
) -> Iterator[tuple[str, str]]:
    """What can be seen from outside and in the header."""
    try:
        length = path.lstat().st_size
        header = read_header(path)
    except FileNotFoundError:
        yield "missing-image", f"{what}: the image {path} is missing"
        return
    except (OSError, RepositoryDamaged) as error:
        reason = _reason(error) if isinstance(error, OSError) else error.message
        yield "damaged-header", f"{what}: the image {path} cannot be read: {reason}"
        return
    if header is None or header.has_data_file or header.size != disk.virtual_size:
        yield "damaged-header", f"{what}: the image {path} has not the header that was written"
        return
    if length != disk.bytes:
        yield (
            "image-size",
            f"{what}: the image {path} has {length} bytes, and {disk.bytes} were written",
        )
    expected = None
    if disk.base is not None:
        below = None if base is None else base.disk(disk.name)
        expected = f"../{disk.base}/{disk.file if below is None else below.file}"
    if header.backing_file != expected:
        yield (
            "wrong-backing-file",
            f"{what}: the image {path} has the backing file {header.backing_file or 'none'}, "
            f"and {expected or 'none'} was written",
        )


def _checked(path: Path, what: str) -> Iterator[tuple[str, str]]:
    """What ``qemu-img check`` says of the image by itself."""
    try:
        done = subprocess.run(
            ["qemu-img", "check", "--output=json", "--", image_name(str(path), backing=None)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except FileNotFoundError:
        raise Unsupported(
            "qemu-img is not installed, and no image can be verified without it",
            hint="install QEMU's tools (Debian: qemu-utils)",
        ) from None
    try:
        said = json.loads(done.stdout)
        faults = {name: said.get(name, 0) for name in ("corruptions", "leaks", "check-errors")}
    except (ValueError, AttributeError):
        said, faults = {}, {}
    if done.returncode == 0 and not any(faults.values()):
        return
    told = ", ".join(f"{count} {name}" for name, count in faults.items() if count)
    told = told or (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    yield "image-check", f"{what}: qemu-img check says of {path}: {told}"


def _content(path: Path, what: str, disk: PointDisk, digests: Digests) -> Iterator[tuple[str, str]]:
    """Whether the image holds just the blocks of its digests, and each as it was written."""
    try:
        with serving(path, disk.name, what, digests.size) as server:
            allocated = _allocated(server, path, disk.name, what)
            wrong = _differing(server, disk.name, what, digests)
    except RepositoryDamaged as error:
        yield "unreadable-image", error.message
        return
    except RepositoryFailed as error:
        yield "damaged-digests", f"{what}: {error.message}"
        return
    yield from allocation_faults(what, allocated, digests, root=disk.base is None)
    # What is not there any more is not told twice.
    if wrong := wrong & allocated:
        yield "damaged-data", f"{what}: {_blocks(wrong)} not what was written ({path})"


def allocation_faults(
    what: str, allocated: AbstractBitMap64, digests: Digests, *, root: bool
) -> Iterator[tuple[str, str]]:
    """What an image holds that its digests do not know, and the other way round.

    A block that reads as zeroes need not be held by an image that stands on nothing.
    """
    known = digests.data | digests.zero
    if unknown := allocated - known:
        yield "unknown-data", f"{what}: {_blocks(unknown)} in its image and not in its digests"
    if lost := (digests.data if root else known) - allocated:
        yield "missing-data", f"{what}: {_blocks(lost)} not in its image any more"


def _blocks(blocks: AbstractBitMap64) -> str:
    count = len(blocks)
    first = min(blocks) * BLOCK if count else 0
    if count == 1:
        return f"1 block from byte {first} on is"
    return f"{count} blocks from byte {first} on are"


def _allocated(server: ImageServer, path: Path, disk: str, what: str) -> BitMap64:
    """The blocks that an image holds itself.  Raises RepositoryDamaged."""
    found = BitMap64()
    try:
        handle = nbd_client.connect(server.socket, "", disk, DEPTH, check=server.check)
        try:
            if not handle.can_meta_context(DEPTH):
                raise Unsupported("this qemu-nbd does not tell what an image holds itself")
            size = handle.get_size()
            for start, length, depth in nbd_client.status(handle, DEPTH, disk, 0, size):
                if depth:
                    found.add_range(start // BLOCK, block_count(start + length))
        finally:
            nbd_client.disconnect(handle)
    except OperationFailed as error:
        raise RepositoryDamaged(f"{what}: {error.message}") from error
    except nbd.Error as error:
        raise RepositoryDamaged(f"{what}: {path} cannot be read: {error.string}") from error
    return found


def _differing(server: ImageServer, disk: str, what: str, digests: Digests) -> BitMap64:
    """The blocks that are not what their digests say.

    Raises RepositoryDamaged, RepositoryFailed.
    """
    wrong = BitMap64()
    read = BitMap64()

    def consume(first: int, data: memoryview, told: Sequence[bytes]) -> None:
        for number, digest in enumerate(told, first):
            read.add(number)
            if digest != digests.find(number):
                wrong.add(number)

    def zero(first: int, count: int) -> None:
        read.add_range(first, first + count)
        wrong.update(digests.data & _range(first, count))

    try:
        with Source(server.socket, "", disk, check=server.check) as source:
            read_blocks(source, runs(digests.data | digests.zero), consume, zero)
    except OperationFailed as error:
        raise RepositoryDamaged(f"{what}: {error.message}") from error
    return wrong | ((digests.data | digests.zero) - read)


def _range(first: int, count: int) -> BitMap64:
    found = BitMap64()
    found.add_range(first, first + count)
    return found
