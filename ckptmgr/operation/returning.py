"""Images that come back with a revert and are no disks now: unplugged, or left by a block job.

Their bitmaps, if ours, are read and taken out like those of the disks, with QEMU's tools, since no
QEMU of this domain has them open.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from ..checkpoint import EngineName, State
from ..dirtymap import DirtyMap
from ..domain.chain import read_chain
from ..domain.disk import Bitmap, DiskLayers
from ..errors import CkptmgrError, Unsupported
from ..history import History
from ..plan import planner
from ..plan.request import ReadDisk, ReadRequest
from ..plan.steps import ImageBitmap, ImagesCheck, Step
from ..snapshot import Snapshot
from .session import Session

log = logging.getLogger("ckptmgr")


def returning(session: Session, snapshot: Snapshot) -> tuple[DiskLayers, ...]:
    """The backing chains of the qcow2 images that come back.

    Raises OperationFailed where one cannot be read.
    """
    now = _in_use(session)
    return tuple(
        DiskLayers(image.target, read_chain(image.path, "qcow2"))
        for image in snapshot.images
        if image.format == "qcow2" and image.path not in now
    )


def _in_use(session: Session) -> set[str | None]:
    """The images of the disks that there are now."""
    return {image.path for disk in session.disks for image in disk.chain}


def unsure(session: Session, images: Iterable[DiskLayers]) -> frozenset[str]:
    """Disks of which it cannot be told what comes back: a layer below the image has stayed in use,
    and whether it was written since nobody knows.
    """
    now = _in_use(session)
    return frozenset(
        image.target for image in images if any(layer.image in now for layer in image.layers[1:])
    )


def refuse(session: Session, history: History, layers: DiskLayers) -> None:
    """See that the bitmaps of one of them can go.

    Raises Unsupported where one is not ours, Busy where something uses an image.
    """
    for layer in layers.layers:
        for bitmap in layer.bitmaps:
            if not _is_ours(history, layers, bitmap):
                raise Unsupported(
                    f"the image {layer.image}, which comes back as disk {layers.target} of domain "
                    f"{session.adapter.name!r}, has a bitmap {bitmap.name!r} that is not ours, and "
                    "QEMU reverts no image that has a bitmap",
                    hint=f"remove it: qemu-img bitmap --remove {layer.image} {bitmap.name}",
                )
    top = ImagesCheck(((layers.target, layers.layers[0].image),))
    session.engine(EngineName.OFFLINE).run((top, *removal(session, layers)[:1]))


def _is_ours(history: History, layers: DiskLayers, bitmap: Bitmap) -> bool:
    """Whether a checkpoint made this bitmap on one of these images: another domain, to which the
    image was lent meanwhile, may have checkpoints of the same name.
    """
    if bitmap.name not in history.checkpoints:
        return False
    recorded = history.get(bitmap.name).disk(layers.target)
    images = {layer.image for layer in layers.layers}
    return recorded is not None and recorded.bitmap == bitmap.name and recorded.source in images


def removal(session: Session, layers: DiskLayers) -> tuple[Step, ...]:
    """The steps that take the bitmaps out: a check, and then the removals.  What a disk of now is
    on as well is none of ours here.
    """
    now = _in_use(session)
    held = [layer for layer in layers.layers if layer.bitmaps and layer.image not in now]
    if not held:
        return ()
    return (
        ImagesCheck(tuple((layers.target, layer.image) for layer in held)),
        *(
            ImageBitmap(layers.target, layer.image, "remove", bitmap.name, missing_ok=True)
            for layer in held
            for bitmap in layer.bitmaps
        ),
    )


def read(session: Session, history: History, layers: DiskLayers, since: str) -> DirtyMap | None:
    """What was written on a disk that is not there now since checkpoint `since`; None: unknown."""
    recorded = history.get(since).disk(layers.target)
    if recorded is None or recorded.state is not State.RECORDING:
        return None
    if layers.broken(since) is not None or layers.layers[0].size != recorded.size:
        return None
    disk = ReadDisk(layers.target, since, granularity=recorded.granularity, layers=layers)
    plan = planner(EngineName.OFFLINE).read(ReadRequest((disk,), None))
    try:
        return session.engine(EngineName.OFFLINE).run(plan.steps).maps[layers.target]
    except CkptmgrError as error:
        log.warning("what changed on %s until it was unplugged is lost: %s", layers.target, error)
        return None
