"""Keeping what was written on a line of history until it was left.

A checkpoint's line may be left more than once, whenever the domain goes back to it: its tail is
then the union of them all, since a snapshot may lie on any.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

from .branch import Tails
from .dirtymap import union
from .errors import StoreDamaged
from .store import DomainRecord, DomainStore

log = logging.getLogger("ckptmgr")


def join_maps(store: DomainStore, digests: Iterable[str]) -> str | None:
    """Keep the union of dirty maps of the store; None if one of them is damaged."""
    try:
        return store.save_map(union(store.read_map(each) for each in digests))
    except StoreDamaged as error:
        log.warning("%s", error)
        return None


def left_at(store: DomainStore, record: DomainRecord, tails: Tails) -> DomainRecord:
    """`record` when the present line was left at `tails`."""
    merged = {name: dict(disks) for name, disks in record.tails.items()}
    for name, disks in tails.items():
        for target, digest in disks.items():
            merged.setdefault(name, {})[target] = _with_earlier(
                store, merged.get(name, {}), target, digest
            )
    return replace(record, tails=merged)


def _with_earlier(
    store: DomainStore, known: Mapping[str, str | None], target: str, digest: str | None
) -> str | None:
    if target not in known:
        return digest
    earlier = known[target]
    if digest is None or earlier is None:
        return None
    return digest if digest == earlier else join_maps(store, [earlier, digest])
