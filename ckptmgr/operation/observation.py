"""What became of a checkpoint's bitmaps: asked where they are, not where they are recorded."""

from __future__ import annotations

from dataclasses import replace

from ..checkpoint import Checkpoint, CheckpointDisk, EngineName, State
from ..document import bitmap_sizes
from ..domain.disk import DiskLayers
from ..domain.known import known_document
from ..errors import BitmapBroken, NoCheckpoint, ReadOnlyConnection, Unsupported
from .session import Session


def observe(session: Session, checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with the states of its disks as they really are.

    Where nobody can be asked (a stopped domain of another machine, a checkpoint that libvirt was
    not told of, a connection that only allows reading), the recorded states stand.
    """
    try:
        engine = session.choice.engine
        if engine is EngineName.LIBVIRT:
            sizes = bitmap_sizes(known_document(session.adapter, checkpoint.name, size=True))
            disks = tuple(_by_size(disk, sizes) for disk in checkpoint.disks)
        else:
            layers = session.layers(engine)
            disks = tuple(by_layers(disk, layers.get(disk.name)) for disk in checkpoint.disks)
    except (BitmapBroken, NoCheckpoint, ReadOnlyConnection, Unsupported):
        return checkpoint
    return replace(checkpoint, disks=disks)


def _by_size(disk: CheckpointDisk, sizes: dict[str, int]) -> CheckpointDisk:
    # libvirt gives a size for those bitmaps alone that are valid down the backing chain.
    if disk.bitmap is None or not disk.persistent or disk.state is State.ARCHIVED:
        return disk
    if disk.name in sizes:
        return replace(disk, state=State.RECORDING, reason=None)
    return replace(disk, state=State.BROKEN, reason="its bitmap is missing or broken")


def by_layers(disk: CheckpointDisk, layers: DiskLayers | None) -> CheckpointDisk:
    """`disk` in the state that the bitmaps on its `layers` (None: no such disk now) show."""
    if disk.bitmap is None or disk.state is State.ARCHIVED:
        return disk
    if layers is None:
        return replace(disk, state=State.BROKEN, reason="the domain has no such disk now")
    broken = layers.broken(disk.bitmap)
    if broken is None:
        return replace(disk, state=State.RECORDING, reason=None)
    held = layers.holding(disk.bitmap)
    found = held[0].bitmap(disk.bitmap) if held else None
    frozen = found is not None and not found.recording and not found.inconsistent
    return replace(
        disk,
        state=State.FROZEN if frozen else State.BROKEN,
        reason=f"its bitmap is {broken}",
    )
