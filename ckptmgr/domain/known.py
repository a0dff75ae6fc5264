"""The checkpoints that libvirt knows of a domain: reading them, and asking for one by name."""

from __future__ import annotations

import libvirt

from ..errors import NoCheckpoint
from ..xml import parse
from .adapter import DomainAdapter
from .failure import translate


def known_names(adapter: DomainAdapter) -> tuple[str, ...]:
    """Names of all, parents before their children."""
    flags = libvirt.VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL
    with translate("list the checkpoints", adapter.name):
        return tuple(found.getName() for found in adapter.handle.listAllCheckpoints(flags))


def is_known(adapter: DomainAdapter, name: str) -> bool:
    """Whether libvirt has a checkpoint called `name`."""
    try:
        with translate(f"look for checkpoint {name!r}", adapter.name):
            adapter.handle.checkpointLookupByName(name, 0)
    except NoCheckpoint:
        return False
    return True


def known_document(adapter: DomainAdapter, name: str, *, size: bool = False) -> str:
    """libvirt's document of checkpoint `name`; with `size`, of each valid bitmap the dirty bytes.

    `size` needs a running domain.  Raises NoCheckpoint.
    """
    flags = libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE if size else 0
    if size:
        flags |= libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
    with translate(f"read checkpoint {name!r}", adapter.name):
        return str(adapter.handle.checkpointLookupByName(name, 0).getXMLDesc(flags))


def known_time(adapter: DomainAdapter, name: str) -> int:
    """When libvirt made checkpoint `name`, in seconds since the epoch.  Raises NoCheckpoint."""
    flags = libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
    what = f"read checkpoint {name!r}"
    with translate(what, adapter.name):
        text = adapter.handle.checkpointLookupByName(name, 0).getXMLDesc(flags)
    return int(parse(text, what="the checkpoint").findtext("creationTime") or 0)


def known_parent(adapter: DomainAdapter, name: str) -> str | None:
    """The parent that libvirt gives checkpoint `name`, or None.  Raises NoCheckpoint."""
    with translate(f"read checkpoint {name!r}", adapter.name):
        checkpoint = adapter.handle.checkpointLookupByName(name, 0)
    try:
        with translate(f"read the parent of checkpoint {name!r}", adapter.name):
            return str(checkpoint.getParent(0).getName())
    except NoCheckpoint:
        return None
