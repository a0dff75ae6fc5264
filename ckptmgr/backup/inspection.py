"""What is wrong with one image by itself and its digests: from outside, by its header, in QEMU's
eyes, and block by block.  Whatever it stands on is not opened.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbd
from pyroaring import AbstractBitMap64, BitMap64

from .. import nbd as nbd_client
from ..engine.qemu_img import ImageServer, image_name
from ..errors import OperationFailed, RepositoryDamaged, RepositoryFailed, Unsupported
from .block import BLOCK, block_count
from .compaction import open_digests, serving
from .copying import Source, read_blocks
from .digests import Digests, runs
from .header import read_header
from .manifest import Manifest, PointDisk
from .points import Points
from .repository import Lineage

DEPTH = "qemu:allocation-depth"
"""QEMU's docs/interop/nbd.txt: 0 where an image holds nothing itself."""

_UNUSABLE = ("missing-image", "damaged-header")
"""What QEMU is not given to open: it might open another file for it."""


def inspect(
    lineage: Lineage, points: Points, name: str, disk: PointDisk
) -> Iterator[tuple[str, str]]:
    """What is wrong with the image of a disk of a point, and its digests: codes and messages.

    Raises Unsupported without QEMU's tools.
    """
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
        why = reason(error) if isinstance(error, OSError) else error.message
        yield "damaged-header", f"{what}: the image {path} cannot be read: {why}"
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


def reason(error: OSError) -> str:
    """What the system says of an error."""
    return os.strerror(error.errno) if error.errno else str(error)
