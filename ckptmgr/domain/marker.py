"""The marker of a libvirt domain: reading it and writing it."""

from __future__ import annotations

from typing import Any

from ..marker import Marker, format_marker, parse_marker
from ..xml import NAMESPACE
from .binding import libvirt
from .failure import NO_DOMAIN_METADATA, translate

__all__ = ["Marker", "format_marker", "parse_marker", "read_marker", "write_marker"]

KEY = "ckptmgr"


def read_marker(domain: Any, name: str, *, defined: bool = False) -> Marker | None:
    """The marker of a virDomain: the live one while it runs; None if there is none.

    defined -- that of the definition, if there is one
    """
    with translate("reading the marker", name):
        flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG if defined and domain.isPersistent() else 0
        try:
            text = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE, flags)
        except libvirt.libvirtError as error:
            if error.get_error_code() == NO_DOMAIN_METADATA:
                return None
            raise
    return parse_marker(text)


def write_marker(domain: Any, name: str, marker: Marker | None) -> None:
    """Set the marker, live and in the configuration, as far as the domain has them; None
    removes it.
    """
    with translate("writing the marker", name):
        flags = 0
        if domain.isActive():
            flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE
        if domain.isPersistent():
            flags |= libvirt.VIR_DOMAIN_AFFECT_CONFIG
        text = None if marker is None else format_marker(marker)
        domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, text, KEY, NAMESPACE, flags)
