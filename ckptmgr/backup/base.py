"""Which restore point the next one comes after, and what each disk of it stands on: pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint import Checkpoint
from ..history import History
from .manifest import Manifest
from .points import Points


@dataclass(frozen=True)
class Base:
    """The point that the next one comes after.

    lineage -- key of the lineage that it is in
    checkpoint -- the checkpoint of the history whose state it is; None: none that is known
    """

    lineage: str
    point: str
    checkpoint: str | None


def find_base(history: History, uuid: str, lineages: Mapping[str, Points]) -> Base | None:
    """The point from which the way to the domain's present state is the shortest.

    That is one of the current checkpoint's line, the nearest; else one of another branch, the
    newest; else the newest of the same domain, of which the history knows nothing any more.  None
    where there is no point to stand on.  Points that are not whole do not count.

    uuid -- of the domain
    """
    if history.current is not None:
        for name in (history.current, *history.ancestors(history.current)):
            for key, points in lineages.items():
                for point in _of(history.get(name), uuid, points):
                    return Base(key, point, name)
    others = [
        Base(key, point, name)
        for name, checkpoint in history.checkpoints.items()
        for key, points in lineages.items()
        for point in _of(checkpoint, uuid, points)
    ]
    strangers = [
        Base(key, point, None)
        for key, points in lineages.items()
        for point in points.of(uuid)
        if points.broken(point) is None
    ]
    return _newest(others or strangers, lineages)


def _newest(found: Sequence[Base], lineages: Mapping[str, Points]) -> Base | None:
    """The last of each lineage, whatever the host's clock said; of these the one made last."""
    last: list[Base] = []
    for key, points in lineages.items():
        here = {base.point: base for base in found if base.lineage == key}
        last += [here[name] for name in points.by_time() if name in here][-1:]
    return max(last, key=lambda base: lineages[base.lineage].times[base.point], default=None)


def _of(checkpoint: Checkpoint, uuid: str, points: Points) -> Iterator[str]:
    """The points that are whole and whose state is the checkpoint's."""
    for name, manifest in points.manifests.items():
        if _is_state_of(checkpoint, uuid, manifest) and points.broken(name) is None:
            yield name


def _is_state_of(checkpoint: Checkpoint, uuid: str, manifest: Manifest) -> bool:
    # A checkpoint that came back from its XML, or from libvirt, does not name its point.
    return checkpoint.point == manifest.id or (
        manifest.domain_uuid == uuid
        and manifest.checkpoint == checkpoint.name
        and manifest.checkpoint_created == checkpoint.created
    )


@dataclass(frozen=True)
class DiskBase:
    """What the image of one disk stands on.

    checkpoint -- the checkpoint of the history whose state that image has; None: not known
    """

    point: str
    checkpoint: str | None


def disk_base(
    history: History, uuid: str, points: Points, base: Base, disk: str
) -> DiskBase | None:
    """The nearest of `base` and the points before it that has `disk`; None: there is none."""
    for name in (base.point, *points.ancestors(base.point)):
        manifest = points.get(name)
        if manifest.disk(disk) is not None:
            if name == base.point:
                return DiskBase(name, base.checkpoint)
            checkpoints = history.checkpoints.values()
            known = (each.name for each in checkpoints if _is_state_of(each, uuid, manifest))
            return DiskBase(name, next(known, None))
    return None
