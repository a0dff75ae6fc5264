"""The restore point that a backup makes: the copies of the disks, and what is beside them."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..align import find_disk
from ..backup.base import Base, DiskBase, disk_base, find_base
from ..backup.manifest import FULL, INCREMENTAL, Manifest, PointDisk, PointFile, new_id
from ..backup.points import Points
from ..backup.repository import Draft, Lineage
from ..checkpoint import Checkpoint, EngineName
from ..document import format_libvirt
from ..domain.attachments import attachments, members
from ..errors import RepositoryDamaged, RepositoryFailed
from ..history import History
from .headroom import Headroom
from .preparation import Served
from .session import Session

if TYPE_CHECKING:
    from pyroaring import BitMap64

    from ..backup.digests import Digests
    from ..backup.rate import Rate

log = logging.getLogger("ckptmgr")

Progress = Callable[[str, int, int], None]
"""Called with a disk, the bytes of it that are done, and how many there are to do."""

CHAIN_MAX = 128
"""Images that one may stand on; libvirt starts no domain with more than 200."""

_FILES = {
    "nvram": "nvram.fd",
    "varstore": "varstore.json",
    "kernel": "kernel",
    "initrd": "initrd",
    "dtb": "dtb",
    "tpm": "tpm.tar",
}


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    name -- of the point and its checkpoint; None: the time in seconds
    full -- stand on no other point
    disks -- targets or paths; none: all that have an image
    quiesce -- freeze the guest's file systems for the instant; None: if its agent is there
    pause -- have the guest stand still for the instant
    limit -- bytes per second; None: no limit
    new -- begin anew where the domain had points that are not there any more
    decrypt -- encrypted disks, too: what is kept of them is not encrypted
    """

    repository: Path
    name: str | None = None
    full: bool = False
    disks: tuple[str, ...] = ()
    compress: bool = False
    quiesce: bool | None = None
    pause: bool = False
    limit: int | None = None
    new: bool = False
    decrypt: bool = False


class RestorePoint:
    """The point that is being made: a `Copying`.

    manifest -- once the data is copied
    """

    manifest: Manifest

    def __init__(
        self,
        session: Session,
        lineage: Lineage,
        history: History,
        request: Request,
        targets: tuple[str, ...],
        draft: Draft,
    ) -> None:
        self.request = request
        self.targets = targets
        self.pause = request.pause
        self.point = new_id()
        self.name = draft.name
        self.progress: Progress = lambda disk, done, total: None
        self._session = session
        self._lineage = lineage
        self._draft = draft
        self._points: Points = lineage.load().points
        self._headroom: Headroom | None = None
        self._base: Base | None = find_base(
            history, session.adapter.uuid, {lineage.key: self._points}
        )

    @classmethod
    @contextmanager
    def begun(
        cls,
        session: Session,
        lineage: Lineage,
        history: History,
        request: Request,
        targets: tuple[str, ...],
        name: str,
    ) -> Iterator[RestorePoint]:
        """A new point; what there is of it goes if it does not come to be."""
        draft = lineage.draft(name)
        try:
            yield cls(session, lineage, history, request, targets, draft)
        finally:
            draft.abandon()  # nothing, once it is committed

    # --- Copying -----------------------------------------------------------------------------

    def expect(self) -> None:
        """Load what the copying needs, while libvirt and QEMU make ready to serve the disks."""
        threading.Thread(target=_load, name="ckptmgr-load", daemon=True).start()

    def copy(self, history: History, checkpoint: Checkpoint | None, served: Served) -> None:
        """Copy the disks, and what is beside them."""
        from ..backup.rate import Rate

        if self._session.choice.engine is not EngineName.OFFLINE:
            # Now, since a domain that has ended has no such folder.
            self._headroom = self._measured(self._session.place().folder)
        # First, since they are small and may change meanwhile.
        files = tuple(self._files(checkpoint))
        rate = Rate(self.request.limit)
        disks = tuple(
            self._copied(history, checkpoint, target, served, rate) for target in self.targets
        )
        parent = None if self._base is None else self._points.get(self._base.point)
        adapter = self._session.adapter
        self.manifest = Manifest(
            id=self.point,
            name=self.name,
            domain_name=adapter.name,
            domain_uuid=adapter.uuid,
            parent=None if parent is None else parent.name,
            parent_id=None if parent is None else parent.id,
            checkpoint=None if checkpoint is None else checkpoint.name,
            checkpoint_created=None if checkpoint is None else checkpoint.created,
            created=int(time.time()) if checkpoint is None else checkpoint.created,
            disks=disks,
            files=files,
        )

    def commit(self) -> None:
        """Make the point exist."""
        self._draft.commit(self.manifest)
        newer = self._points.newer(self.manifest)
        if newer is not None:
            log.warning(
                "restore point %s counts as older than %s, whose time is later: this host's clock "
                "was put back, and `prune` goes by the times",
                self.name,
                newer,
            )

    def withdraw(self) -> None:
        """Have the point not exist, if it has come to be."""
        self._draft.withdraw()

    # --- disks -------------------------------------------------------------------------------

    def _copied(
        self,
        history: History,
        checkpoint: Checkpoint | None,
        target: str,
        served: Served,
        rate: Rate,
    ) -> PointDisk:
        from ..backup.copying import Source
        from ..backup.digests import runs
        from ..backup.layer import Layer

        server, export = served[target]
        with ExitStack() as stack:
            source = stack.enter_context(Source(server, export, target))
            below = self._below(history, target, stack)
            blocks, reason = self._blocks(history, checkpoint, target, below, source.size)
            layer = Layer(
                self._draft.path(f"{target}.qcow2"),
                self._draft.path(f"{target}.digests"),
                -(-source.size // 512) * 512,
                backing=None if below.base is None else f"../{below.base.point}/{below.file}",
                lower=below.layers,
                compress=self.request.compress,
            )
            try:
                source.read(
                    runs(blocks),
                    layer,
                    rate=rate,
                    progress=self._advance(target, len(blocks), source.size),
                    watch=self._watch,
                )
                size = layer.close()
            except BaseException:
                layer.abandon()
                raise
        disk = find_disk(self._session.disks, target)
        return PointDisk(
            name=target,
            mode=FULL if below.base is None else INCREMENTAL,
            base=None if below.base is None else below.base.point,
            base_id=None if below.base is None else self._points.get(below.base.point).id,
            file=f"{target}.qcow2",
            bytes=size,
            virtual_size=-(-source.size // 512) * 512,
            digests=f"{target}.digests",
            digests_sha256=layer.digests_sha256,
            format=disk.top.format or "raw",
            compression="zstd" if self.request.compress else None,
            reason=reason,
        )

    def _below(self, history: History, target: str, stack: ExitStack) -> _Below:
        """What the image of `target` is to stand on."""
        if self.request.full:
            return _Below(reason="a full backup was asked for")
        if self._base is None:
            return _Below(reason="there is no restore point before it")
        uuid = self._session.adapter.uuid
        base = disk_base(history, uuid, self._points, self._base, target)
        if base is None:
            return _Below(reason="no restore point before it has this disk")
        try:
            chain = self._points.chain(base.point, target)
            if len(chain) >= CHAIN_MAX:
                return _Below(reason=f"{len(chain)} images stand on one another before it")
            return self._opened(base, chain, target, stack)
        except (RepositoryDamaged, RepositoryFailed) as error:
            log.warning("disk %s is backed up in full: %s", target, error)
            return _Below(reason=f"the restore point before it is damaged: {error.message}")

    def _opened(
        self, base: DiskBase, chain: tuple[str, ...], target: str, stack: ExitStack
    ) -> _Below:
        from ..backup.digests import Digests

        layers = []
        for name in chain:
            manifest = self._points.get(name)
            recorded = self._points.disk(name, target)
            image = self._lineage.image(manifest, target)
            try:
                there = image.stat().st_size
            except OSError as error:
                raise RepositoryDamaged(f"{image} cannot be read: {error.strerror}") from error
            if there != recorded.bytes:
                raise RepositoryDamaged(f"{image} has {there} bytes in place of {recorded.bytes}")
            layer = stack.enter_context(Digests(self._lineage.digests(manifest, target)))
            if layer.sha256 != recorded.digests_sha256:
                raise RepositoryDamaged(f"{layer.path} is not what the manifest of {name} says")
            layers.append(layer)
        recorded = self._points.disk(base.point, target)
        return _Below(base, recorded.file, tuple(layers))

    def _blocks(
        self,
        history: History,
        checkpoint: Checkpoint | None,
        target: str,
        below: _Below,
        size: int,
    ) -> tuple[BitMap64, str | None]:
        """The blocks to read, and why it is all of them where that is so."""
        from ..backup.block import BLOCK, block_count, blocks_of
        from ..backup.digests import block_set
        from . import difference

        whole = block_set([(0, block_count(size))])
        if below.base is None:
            return whole, below.reason
        if checkpoint is None or below.base.checkpoint is None:
            return whole, "compared as a whole: the history does not reach back to that point"
        changed = difference.between(
            self._session, history, target, below.base.checkpoint, checkpoint.name, size
        )
        if changed.map is None:
            return whole, f"compared as a whole: {changed.reason}"
        blocks = block_set(blocks_of(changed.map.extents()))
        then = below.layers[0].size
        if then != size:
            # Also where it became smaller: its last block has another length now.
            blocks.add_range(min(then, size) // BLOCK, block_count(size))
        return blocks & whole, None

    def _advance(self, target: str, blocks: int, size: int) -> Callable[[int], None]:
        from ..backup.block import BLOCK

        total = min(blocks * BLOCK, size)
        done = 0
        self.progress(target, 0, total)

        def advance(length: int) -> None:
            nonlocal done
            done += length
            self.progress(target, done, total)

        return advance

    def _measured(self, folder: Path | None) -> Headroom | None:
        if folder is None:
            return None
        sizes = (find_disk(self._session.disks, name).size or 0 for name in self.targets)
        return Headroom(self._session.adapter.name, folder, sum(sizes))

    def _watch(self) -> None:
        if self._headroom is not None:
            self._headroom.look()

    # --- what is beside the disks ------------------------------------------------------------

    def _files(self, checkpoint: Checkpoint | None) -> Iterator[PointFile]:
        adapter = self._session.adapter
        definition = checkpoint.domain_xml if checkpoint is not None else None
        definition = definition or self._session.definition()
        yield self._draft.write("domain", "domain.xml", definition.encode())
        if checkpoint is not None:
            text = format_libvirt(checkpoint)
            yield self._draft.write("checkpoint", "checkpoint.xml", text.encode())
        location = adapter.connection
        found = attachments(definition, adapter.uuid, location.driver, location.embedded_root)
        for attachment in found:
            try:
                if not location.local:
                    raise OSError(0, "it is on another machine")
                if attachment.role == "tpm":
                    data = _archive(attachment.path)
                else:
                    data = attachment.path.read_bytes()
            except OSError as error:
                log.warning(
                    "%s (%s) is not in the restore point: %s",
                    attachment.path,
                    attachment.role,
                    error.strerror,
                )
                continue
            yield self._draft.write(
                attachment.role, _FILES[attachment.role], data, str(attachment.path)
            )


@dataclass(frozen=True)
class _Below:
    """What an image is to stand on; base None: nothing, for `reason`."""

    base: DiskBase | None = None
    file: str = ""
    layers: tuple[Digests, ...] = ()
    reason: str | None = None


def _load() -> None:
    """Load what is needed from the copying on; a failure shows there."""
    with suppress(ImportError):
        from ..backup import copying, layer, views  # noqa: F401
        from . import difference  # noqa: F401


def _archive(folder: Path) -> bytes:
    """The files of a folder as a tar archive."""
    import tarfile

    if not folder.is_dir():
        raise FileNotFoundError(2, "there is no such folder", str(folder))
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in members(folder):
            archive.add(path, arcname=str(path.relative_to(folder)), recursive=False)
    return output.getvalue()
