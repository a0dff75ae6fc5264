"""Reading a disk of a restore point, each block compared with its digest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pyroaring import BitMap64

from ..engine.qemu_img import serve_image
from ..errors import CkptmgrError, OperationFailed, RepositoryDamaged, RepositoryFailed
from .block import BLOCK, block_count, block_length, digest
from .copying import Source, read_blocks
from .digests import Digests, held, runs
from .failure import failing
from .header import read_header
from .images import ImageFile, read_images
from .points import Points
from .repository import Lineage

log = logging.getLogger("ckptmgr")


class Sink(Protocol):
    """Where the blocks go: something that is all zeroes to begin with."""

    def write(self, first: int, data: memoryview) -> None:
        """Blocks from number `first` on; they come in ascending order."""
        ...


@dataclass(frozen=True)
class Layer:
    """One image of a chain.

    point -- the restore point that it belongs to
    """

    point: str
    image: Path
    digests: Digests


class Extraction:
    """A disk of a point, open for reading; made by `opened`.

    Where all images of the chain are of one size, which is nearly always, they are read as files;
    what a smaller one hides of those below is left to QEMU.

    size -- of the disk in bytes
    length -- bytes of the blocks that are not all zeroes
    """

    def __init__(
        self,
        points: Points,
        disk: str,
        layers: Sequence[Layer],
        *,
        images: Sequence[ImageFile] = (),
        source: Source | None = None,
    ) -> None:
        self._points = points
        self._disk = disk
        self._layers = layers
        self._images = images
        self._source = source
        self._digests = [layer.digests for layer in layers]
        self._data = BitMap64()
        for each in held(self._digests):
            self._data |= each.data
        self.size = layers[0].digests.size
        last = block_count(self.size) - 1
        missing = BLOCK - block_length(self.size, last) if last in self._data else 0
        self.length = len(self._data) * BLOCK - missing

    def copy(
        self,
        sink: Sink,
        *,
        progress: Callable[[int], None] = lambda length: None,
    ) -> None:
        """Write all blocks that are not zero to `sink`.

        progress -- called with the bytes that were done since the last call

        Raises RepositoryDamaged at the first block that is not what it was, RepositoryFailed at one
        that cannot be read, and what `sink` raises.
        """

        if self._source is None:
            self._copy_files(sink, progress)
        else:
            self._copy_served(self._source, sink, progress)

    def _copy_files(self, sink: Sink, progress: Callable[[int], None]) -> None:
        def consume(first: int, data: memoryview, digests: Sequence[bytes], layer: int) -> None:
            expected = self._digests[layer].of(first, len(digests))
            if digests != expected:
                pairs = zip(digests, expected, strict=True)
                raise self._damaged(first + [a == b for a, b in pairs].index(False))
            sink.write(first, data)

        try:
            read_images(self._images, self._digests, consume, progress=progress)
        except RepositoryDamaged as error:
            if error.hint is not None:
                raise
            raise _unreadable(self._layers[0].point, self._disk, error) from error
        except RepositoryFailed as error:
            raise RepositoryFailed(
                f"disk {self._disk} of restore point {self._layers[0].point} cannot be read: "
                f"{error.message}",
                hint=error.hint,
            ) from error

    def _copy_served(self, source: Source, sink: Sink, progress: Callable[[int], None]) -> None:
        def consume(first: int, data: memoryview, digests: Sequence[bytes]) -> None:
            for number, found in enumerate(digests):
                start = number * BLOCK
                self._compare(first + number, data[start : start + BLOCK], found)
            sink.write(first, data)

        def zero(first: int, count: int) -> None:
            raise self._damaged(first)

        self._compare_cut()
        try:
            read_blocks(source, runs(self._data), consume, zero, progress=progress)
        except OperationFailed as error:
            raise _unreadable(self._layers[0].point, self._disk, error) from error

    # --- digests -----------------------------------------------------------------------------

    def _compare(self, block: int, data: memoryview, found: bytes) -> None:
        index, expected = self._holder(block)
        size = self._digests[index].size
        has = block_length(size, block)
        if block_length(self._visible(index), block) < has:
            return  # seen to by _compare_cut()
        if has < len(data):
            # It is the last block of a layer that is smaller than the disk is now.
            if any(data[has:]):
                raise self._damaged(block)
            found = digest(data[:has])
        if found != expected:
            raise self._damaged(block)

    def _compare_cut(self) -> None:
        """Compare the blocks of which a smaller layer above hides a part, in their own layer."""
        for each in held(self._digests):
            block = each.visible // BLOCK
            layer = self._layers[each.index]
            whole = block_length(layer.digests.size, block)
            if block not in each.data or block_length(each.visible, block) == whole:
                continue
            found: list[bytes] = []

            def consume(
                first: int, data: memoryview, digests: Sequence[bytes], found: list[bytes] = found
            ) -> None:
                found.extend(digests)

            with _served(layer.point, self._disk, layer.image, chain=False) as source:
                read_blocks(source, [(block, 1)], consume, lambda first, count: None)
            if found != [layer.digests.find(block)]:
                raise self._damaged(block)

    def _holder(self, block: int) -> tuple[int, bytes]:
        """The layer that a data block is seen of, and its digest there."""
        for index, each in enumerate(self._digests):
            found = each.find(block)
            if found is not None:
                return index, found
        raise AssertionError(f"no layer holds block {block}")

    def _visible(self, index: int) -> int:
        return min(each.size for each in self._digests[: index + 1])

    def _damaged(self, block: int) -> RepositoryDamaged:
        point = self._layers[self._holder(block)[0]].point
        also = _also(self._points, point, self._disk)
        return RepositoryDamaged(
            f"restore point {point} is damaged: disk {self._disk} is not what it was at offset "
            f"{block * BLOCK}{also}",
            hint="`ckptmgr verify` names all that is affected; restore another point",
        )


@contextmanager
def opened(lineage: Lineage, points: Points, point: str, disk: str) -> Iterator[Extraction]:
    """Open a disk of a restore point.

    Raises NoPoint, RepositoryDamaged, RepositoryFailed.
    """
    with ExitStack() as stack:
        layers = [_layer(lineage, points, name, disk, stack) for name in points.chain(point, disk)]
        if len({layer.digests.size for layer in layers}) == 1:
            images = [
                stack.enter_context(ImageFile(layer.image, layer.digests.size)) for layer in layers
            ]
            yield Extraction(points, disk, layers, images=images)
            return
        source = stack.enter_context(_served(point, disk, layers[0].image))
        if source.size != layers[0].digests.size:
            raise RepositoryDamaged(
                f"restore point {point} is damaged: the image of disk {disk} has another size"
            )
        yield Extraction(points, disk, layers, source=source)


@contextmanager
def _served(point: str, disk: str, image: Path, *, chain: bool = True) -> Iterator[Source]:
    with serve_image(disk, str(image), chain=chain) as server:
        try:
            source = Source(server.socket, "", disk, check=server.check)
        except OperationFailed as error:
            raise _unreadable(point, disk, error) from error
        with source:
            yield source


def _unreadable(point: str, disk: str, error: CkptmgrError) -> RepositoryDamaged:
    return RepositoryDamaged(
        f"disk {disk} of restore point {point} cannot be read: {error.message}",
        hint="`ckptmgr verify` names all that is affected",
    )


def check_image(lineage: Lineage, points: Points, point: str, disk: str) -> Path:
    """See that an image is there, as large as it was and on the image that it was made on.

    Raises RepositoryDamaged, RepositoryFailed.
    """
    manifest, recorded = points.get(point), points.disk(point, disk)
    path = lineage.image(manifest, disk)
    with failing(path, "cannot be read"):
        try:
            length = path.lstat().st_size
            header = read_header(path)
        except FileNotFoundError:
            raise RepositoryDamaged(
                f"restore point {point} is damaged: the image {path} is missing"
                f"{_also(points, point, disk)}"
            ) from None
        except RepositoryDamaged as error:
            raise RepositoryDamaged(
                f"restore point {point} is damaged: {error.message}{_also(points, point, disk)}"
            ) from error
    backing = None
    if recorded.base is not None:
        backing = f"../{recorded.base}/{points.disk(recorded.base, disk).file}"
    wrong = None
    if header is None:
        wrong = "is no qcow2 image"
    elif length != recorded.bytes:
        wrong = f"has {length} bytes and had {recorded.bytes}"
    elif header.backing_file != backing:
        wrong = f"stands on {header.backing_file or 'nothing'}, and stood on {backing or 'nothing'}"
    elif header.size != recorded.virtual_size or header.has_data_file:
        wrong = "is another image"
    if wrong is not None:
        raise RepositoryDamaged(
            f"restore point {point} is damaged: the image {path} {wrong}"
            f"{_also(points, point, disk)}"
        )
    return path


def _also(points: Points, point: str, disk: str) -> str:
    """What else is damaged with a point, for the end of a sentence."""
    standing = points.dependants(point, disk)
    if not standing:
        return ""
    return f"; {', '.join(standing)} {'stands' if len(standing) == 1 else 'stand'} on it"


def _layer(lineage: Lineage, points: Points, point: str, disk: str, stack: ExitStack) -> Layer:
    manifest, recorded = points.get(point), points.disk(point, disk)
    image = check_image(lineage, points, point, disk)
    digests = stack.enter_context(Digests(lineage.digests(manifest, disk)))
    if digests.sha256 != recorded.digests_sha256 or digests.size != recorded.virtual_size:
        raise RepositoryDamaged(
            f"restore point {point} is damaged: the digests {digests.path} are not those that its "
            "manifest names"
        )
    return Layer(point, image, digests)
