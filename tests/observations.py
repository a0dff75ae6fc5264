"""A domain on which everything fits together, as check observes it, and changes to that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptmgr.checkpoint import Checkpoint, CheckpointDisk, EngineName, Interval, State, shown_disks
from ckptmgr.consistency import Known, Observation
from ckptmgr.domain.disk import Bitmap, Disk, DiskLayers, Image, Layer
from ckptmgr.domain.marker import Marker
from ckptmgr.history import History
from ckptmgr.store import Damage, DomainRecord

from .strategies import DISKS

SIZE = 1 << 20
STORE = Path("/store/vm")


def image(target: str) -> str:
    return f"/img/{target}.qcow2"


def disk(target: str, *images: str, size: int = SIZE, read_only: bool = False) -> Disk:
    chain = tuple(
        Image("file", each, path=each, format="qcow2") for each in images or (image(target),)
    )
    return Disk(target, "virtio", chain=chain, size=size, read_only=read_only)


def layer(target: str, *bitmaps: Bitmap, where: str | None = None, size: int = SIZE) -> Layer:
    node = f"libvirt-{target}-format"
    return Layer(where or image(target), node, "qcow2", size, bitmaps=bitmaps)


def bitmap(name: str, **known: Any) -> Bitmap:
    return Bitmap(name, 65536, **({"recording": True} | known))


def tracked(target: str, name: str, since: str | None = None, **known: Any) -> CheckpointDisk:
    values: dict[str, Any] = {
        "granularity": 65536,
        "node": f"libvirt-{target}-format",
        "size": SIZE,
        "source": image(target),
        "state": State.RECORDING,
        "interval": None if since is None else Interval(since, name.encode().hex().zfill(64)),
    }
    return CheckpointDisk(target, name, **(values | known))


def line(*names: str, disks: tuple[str, ...] = DISKS) -> History:
    history = History()
    above = None
    for number, name in enumerate(names):
        recorded = tuple(tracked(target, name, above) for target in disks)
        history = history.add(Checkpoint(name, number, above, EngineName.LIBVIRT, recorded))
        above = name
    return history


def projected(history: History, **changes: Any) -> Observation:
    """Just what the history says is there, everywhere."""
    held: dict[str, list[Bitmap]] = {target: [] for target in DISKS}
    known = []
    parents: dict[str, str | None] = {}
    for name in history.topological():
        checkpoint = history.get(name)
        for recorded in checkpoint.disks:
            if recorded.state is State.RECORDING and recorded.bitmap is not None:
                held[recorded.name].append(bitmap(name))
        if shown_disks(checkpoint):
            above = history.parent(name)
            while above is not None and above not in parents:
                above = history.parent(above)
            parents[name] = above
            known.append(Known(name, above, shown_disks(checkpoint)))
    current = history.current
    generation = len(history.checkpoints)
    values: dict[str, Any] = {
        "domain": "vm",
        "active": True,
        "disks": tuple(disk(target) for target in DISKS),
        "history": history,
        "record": DomainRecord("vm", current, generation) if generation else DomainRecord(),
        "layers": {
            target: DiskLayers(target, (layer(target, *bitmaps),))
            for target, bitmaps in held.items()
        },
        "known": tuple(known),
        "marker": None if current is None else Marker(current, generation),
    }
    return Observation(**(values | changes))


def with_layers(seen: Observation, target: str, *layers: Layer) -> Observation:
    """`seen` with other layers below one disk."""
    others = dict(seen.layers or {})
    return replace(seen, layers={**others, target: DiskLayers(target, layers)})


def without(seen: Observation, name: str, *targets: str) -> Observation:
    """`seen` without a bitmap on some disks, or all."""
    for target, found in (seen.layers or {}).items():
        if target in (targets or DISKS):
            layers = (
                replace(each, bitmaps=tuple(b for b in each.bitmaps if b.name != name))
                for each in found.layers
            )
            seen = with_layers(seen, target, *layers)
    return seen


def adding(seen: Observation, target: str, *bitmaps: Bitmap) -> Observation:
    """`seen` with further bitmaps on a disk's top layer."""
    assert seen.layers is not None
    top, *rest = seen.layers[target].layers
    return with_layers(seen, target, replace(top, bitmaps=(*top.bitmaps, *bitmaps)), *rest)


def recorded_as(history: History, name: str, target: str, **changes: Any) -> History:
    checkpoint = history.get(name)
    disks = tuple(
        replace(each, **changes) if each.name == target else each for each in checkpoint.disks
    )
    return history.replace(replace(checkpoint, disks=disks))


C3 = line("c0", "c1", "c2")
FITS = projected(C3)


def damage(name: str) -> Damage:
    return Damage(STORE / name, f"{STORE / name}: it is not JSON")


ARCHIVED = recorded_as(C3, "c0", "vda", state=State.ARCHIVED)
GONE = recorded_as(ARCHIVED, "c0", "vdb", state=State.ARCHIVED)


def without_any(seen: Observation) -> Observation:
    for name in C3.checkpoints:
        seen = without(seen, name)
    return seen
