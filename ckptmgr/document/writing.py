"""Writing a checkpoint as XML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .. import xml
from ..checkpoint import Checkpoint, CheckpointDisk, State, check_name
from ..errors import InvalidDocument, InvalidRequest
from .validity import fault

_NOT_XML = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
"""What is not a Char of XML 1.0, section 2.2."""

_TRACKED_DISK = re.compile(
    r"^    <disk name='([^']*)' checkpoint='bitmap' bitmap='[^']*'(?=/>$)", re.MULTILINE
)


def format_libvirt(checkpoint: Checkpoint) -> str:
    """The document that libvirt takes with REDEFINE.

    Raises InvalidRequest for what a checkpoint cannot be or XML cannot hold.
    """
    return _format(checkpoint, "")


def with_sizes(document: str, sizes: Mapping[str, int]) -> str:
    """A document of `format_libvirt` with the bytes written since, as libvirt's XML_SIZE gives it:
    ``<disk name='vda' checkpoint='bitmap' bitmap='c1' size='65536'/>``.

    sizes -- by disk; disks that are not there or not tracked are passed over
    """
    known = {_attribute(name): size for name, size in sizes.items()}

    def sized(line: re.Match[str]) -> str:
        size = known.get(line.group(1))
        return line.group() if size is None else f"{line.group()} size='{size}'"

    head, end, rest = document.partition("  </disks>\n")
    return _TRACKED_DISK.sub(sized, head) + end + rest


def format_store(checkpoint: Checkpoint) -> str:
    """The store's document, from which `parse_store` gives an equal checkpoint.

    Raises InvalidRequest for what a checkpoint cannot be or XML cannot hold.
    """
    disks = "".join(_format_disk(disk) for disk in checkpoint.disks)
    known = _attributes(
        engine=checkpoint.engine.value,
        point=checkpoint.point,
        generation=checkpoint.generation,
    )
    return _format(
        checkpoint,
        f"  <ckptmgr:checkpoint xmlns:ckptmgr='{xml.NAMESPACE}'{known}>\n"
        f"{disks}  </ckptmgr:checkpoint>\n",
    )


def format_request(name: str, description: str | None, disks: Sequence[tuple[str, str]]) -> str:
    """The document that asks libvirt for a new checkpoint.

    disks -- each disk's target with ``bitmap`` or ``no``

        <domaincheckpoint>
          <name>c1</name>
          <disks>
            <disk name='vda' checkpoint='bitmap'/>
          </disks>
        </domaincheckpoint>

    Raises InvalidRequest for a name or description that cannot be.
    """
    lines = [_format_head(name, description)]
    lines += [f"    <disk{_attributes(name=target, checkpoint=mode)}/>\n" for target, mode in disks]
    if disks:
        lines[1:1] = ["  <disks>\n"]
        lines.append("  </disks>\n")
    return "".join(["<domaincheckpoint>\n", *lines, "</domaincheckpoint>\n"])


def _format(checkpoint: Checkpoint, tail: str) -> str:
    if (wrong := fault(checkpoint)) is not None:
        raise InvalidRequest(f"checkpoint {checkpoint.name}: {wrong}")
    parts = [
        "<domaincheckpoint>\n",
        _format_head(checkpoint.name, checkpoint.description),
    ]
    if checkpoint.parent is not None:
        parts.append(f"  <parent>\n    <name>{_text(checkpoint.parent)}</name>\n  </parent>\n")
    parts.append(f"  <creationTime>{checkpoint.created}</creationTime>\n")
    if checkpoint.disks:  # libvirt's schema takes no empty <disks>
        parts.append("  <disks>\n")
        for disk in checkpoint.disks:
            bitmap = libvirt_bitmap(disk)
            mode = "no" if bitmap is None else "bitmap"
            parts.append(
                f"    <disk{_attributes(name=disk.name, checkpoint=mode, bitmap=bitmap)}/>\n"
            )
        parts.append("  </disks>\n")
    if checkpoint.domain_xml is not None:
        parts.append(f"  {_embeddable(checkpoint.domain_xml)}\n")
    return "".join([*parts, tail, "</domaincheckpoint>\n"])


def _format_head(name: str, description: str | None) -> str:
    head = f"  <name>{_text(check_name(name))}</name>\n"
    if description:  # libvirt takes an empty description for none
        head += f"  <description>{_text(description)}</description>\n"
    return head


def _format_disk(disk: CheckpointDisk) -> str:
    start = "    <ckptmgr:disk" + _attributes(
        name=disk.name,
        bitmap=disk.bitmap,
        node=disk.node,
        granularity=disk.granularity,
        persistent=None
        if disk.bitmap is None and disk.persistent
        else ("yes" if disk.persistent else "no"),
        size=disk.size,
        source=disk.source,
        state=disk.state.value,
        reason=_printable(disk.reason),
    )
    if disk.interval is None:
        return f"{start}/>\n"
    interval = _attributes(
        since=disk.interval.since,
        map=disk.interval.map,
        reason=_printable(disk.interval.reason),
    )
    return f"{start}>\n      <ckptmgr:interval{interval}/>\n    </ckptmgr:disk>\n"


def libvirt_bitmap(disk: CheckpointDisk) -> str | None:
    """The bitmap that libvirt is told of, or None."""
    return disk.bitmap if disk.persistent and disk.state is not State.ARCHIVED else None


def _attributes(**values: str | int | None) -> str:
    return "".join(
        f" {name}='{_attribute(str(value))}'" for name, value in values.items() if value is not None
    )


def _attribute(value: str) -> str:
    # A parser turns bare line ends and tabs in attributes into spaces.
    escaped = _text(value).replace("'", "&apos;").replace('"', "&quot;")
    return escaped.replace("\n", "&#10;").replace("\t", "&#9;")


def _text(value: str) -> str:
    if (found := _NOT_XML.search(value)) is not None:
        raise InvalidRequest(
            f"XML cannot hold the character U+{ord(found.group()):04X} in {ascii(value)[:60]}",
            hint="leave control characters out of descriptions and file names",
        )
    # A parser turns a bare carriage return into a newline.
    escaped = value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("\r", "&#13;")


def _printable(reason: str | None) -> str | None:
    """`reason`, which may quote anything, without what XML cannot hold."""
    return None if reason is None else _NOT_XML.sub("\ufffd", reason)


def _embeddable(domain_xml: str) -> str:
    text = domain_xml.strip()
    root = xml.parse(text, what="the domain's definition")
    if root.tag != "domain":
        raise InvalidDocument(f"<domain> was expected as the domain's definition, not <{root.tag}>")
    if text.startswith("<domain") and text.endswith("</domain>"):
        return text
    return xml.serialized(root)  # without a declaration and comments around it
