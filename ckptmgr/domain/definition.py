"""A domain's inactive definition without its secrets: pure."""

from __future__ import annotations

from ..xml import parse, to_text

# What libvirt prints with VIR_DOMAIN_XML_SECURE only (9.0).  MIGRATABLE implies that flag.
_SECRET_ATTRIBUTES = ("passwd", "passwdValidTo", "connected")


def without_secrets(text: str) -> str:
    """A ``<domain>`` document without graphics passwords and network disks' cookies."""
    root = parse(text, what="the domain's XML")
    for graphics in root.findall("devices/graphics"):
        for attribute in _SECRET_ATTRIBUTES:
            if attribute in graphics.attrib:
                del graphics.attrib[attribute]
    for source in root.iterfind("devices/disk//source"):
        for cookies in source.findall("cookies"):
            source.remove(cookies)
    return to_text(root)
