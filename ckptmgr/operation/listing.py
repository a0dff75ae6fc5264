"""Which checkpoints a list shows, in which order: pure."""

from __future__ import annotations

from ..checkpoint import Checkpoint
from ..errors import InvalidRequest
from ..history import History
from ..views import CheckpointView, DiskView, DomainView


def select(
    history: History,
    *,
    roots: bool = False,
    leaves: bool | None = None,
    start: str | None = None,
    descendants: bool = False,
    topological: bool = False,
) -> tuple[str, ...]:
    """Names of the checkpoints to list, as ``virsh checkpoint-list`` chooses and sorts them.

    roots -- those without a parent (not with `start`)
    leaves -- True: those without children; False: those with
    start -- the children of this checkpoint; with `descendants` all that come after it
    topological -- no checkpoint before its parent; otherwise by name
    """
    if descendants and start is None:
        raise InvalidRequest("descendants of which checkpoint?", hint="add --from CHECKPOINT")
    if roots and start is not None:
        raise InvalidRequest("roots have no parent, so there are none below a checkpoint")
    if start is None:
        names = set(history.roots() if roots else history.checkpoints)
    else:
        history.get(start)
        names = set(history.descendants(start) if descendants else history.children(start))
    if leaves is not None:
        names &= {name for name in names if (not history.children(name)) is leaves}
    order = history.topological() if topological else sorted(names, key=_by_name)
    return tuple(name for name in order if name in names)


def _by_name(name: str) -> tuple[str, str]:
    return name.casefold(), name


def view(
    history: History,
    checkpoint: Checkpoint,
    domain: DomainView,
    disks: tuple[DiskView, ...] | None = None,
) -> CheckpointView:
    """A checkpoint with its place in the history; `disks` where more is known than recorded."""
    return CheckpointView(
        name=checkpoint.name,
        domain=domain,
        parent=checkpoint.parent,
        children=tuple(history.children(checkpoint.name)),
        current=history.current == checkpoint.name,
        created=checkpoint.created,
        description=checkpoint.description,
        engine=checkpoint.engine,
        disks=recorded_disks(checkpoint) if disks is None else disks,
    )


def recorded_disks(checkpoint: Checkpoint) -> tuple[DiskView, ...]:
    """The disks of a checkpoint as the store has them."""
    return tuple(
        DiskView(
            name=disk.name,
            bitmap=disk.bitmap,
            granularity=disk.granularity,
            node=disk.node,
            persistent=disk.persistent,
            state=disk.state,
            reason=disk.reason,
        )
        for disk in checkpoint.disks
    )
