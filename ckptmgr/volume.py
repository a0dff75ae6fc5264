"""How a volume of a pool is named until the pool was asked where it is: ``volume:POOL/NAME``."""

from __future__ import annotations

from lxml import etree

_PREFIX = "volume:"


def volume_name(source: etree._Element) -> str | None:
    """Of the ``<source>`` of a disk; None where that is no volume."""
    pool, volume = source.get("pool"), source.get("volume")
    return f"{_PREFIX}{pool}/{volume}" if pool and volume else None


def parse_volume_name(name: str) -> tuple[str, str] | None:
    """Pool and volume; None for any other name, such as a path."""
    if not name.startswith(_PREFIX):
        return None
    pool, _, volume = name.removeprefix(_PREFIX).partition("/")
    return pool, volume
