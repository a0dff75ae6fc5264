"""The marker: one element in a domain's ``<metadata>`` that names its current checkpoint.

    <ckptmgr:current xmlns:ckptmgr='urn:ckptmgr:1' checkpoint='c3' generation='7'/>

libvirt keeps it in every snapshot's ``<domain>`` and puts it back on revert, whoever reverts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lxml import etree

from .checkpoint import NAME_MAX, NAME_PATTERN
from .errors import InvalidDocument
from .xml import NAMESPACE, parse


@dataclass(frozen=True)
class Marker:
    """What the marker says.

    checkpoint -- the current checkpoint; None: there is none, the next one is a root
    generation -- counts the store's changes, to tell an old marker from a new one
    """

    checkpoint: str | None
    generation: int


def parse_marker(text: str) -> Marker:
    """Read the element as libvirt hands it out (without its namespace).

    Raises InvalidDocument if it is none of ours.
    """
    element = parse(text, what="the marker in the domain's metadata")
    checkpoint = element.get("checkpoint")
    generation = element.get("generation", "")
    wrong = (
        etree.QName(element).localname != "current"
        or not re.fullmatch(r"[0-9]{1,18}", generation, re.ASCII)
        or (
            checkpoint is not None
            and (len(checkpoint) > NAME_MAX or not NAME_PATTERN.fullmatch(checkpoint))
        )
    )
    if wrong:
        raise InvalidDocument(
            "the marker in the domain's metadata is not one that ckptmgr wrote",
            hint=f"remove it: virsh metadata DOMAIN {NAMESPACE} --remove --live --config",
        )
    return Marker(checkpoint, int(generation))


def format_marker(marker: Marker) -> str:
    """The element as libvirt takes it: libvirt adds the namespace itself, and refuses an
    element that already has it ("failed to create a new XML namespace", 9.0).
    """
    element = etree.Element("current")
    if marker.checkpoint is not None:
        element.set("checkpoint", marker.checkpoint)
    element.set("generation", str(marker.generation))
    return etree.tostring(element, encoding="unicode")
