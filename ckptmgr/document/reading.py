"""Reading a checkpoint from XML, as `writing` or libvirt wrote it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from lxml import etree

from .. import xml
from ..checkpoint import Checkpoint, CheckpointDisk, EngineName, Interval, State
from ..errors import InvalidDocument
from .validity import NUMBER_MAX, fault
from .writing import libvirt_bitmap

_OURS = f"{{{xml.NAMESPACE}}}"
_LIBVIRT_ELEMENTS = ("name", "description", "parent", "creationTime", "disks", "domain")
_ENGINES, _STATES = tuple(EngineName), tuple(State)
_NUMBER = re.compile(r"[0-9]{1,19}")
_LEAD = re.compile(r"\A\ufeff?\s*(?:<\?xml\b.*?\?>)?\s*(?:<!--.*?-->\s*)*", re.DOTALL)
_DOMAIN_START = re.compile(r"<domain[\s>]")
_DOMAIN_END = "</domain>"


def parse_store(text: str | bytes, *, what: str = "the checkpoint's document") -> Checkpoint:
    """The checkpoint that `format_store` wrote.  Raises InvalidDocument for anything else."""
    return _stored(text, what, None)


def _stored(text: str | bytes, what: str, domain_xml: str | None) -> Checkpoint:
    """The checkpoint in `text`, of which <domain> was taken out before if `domain_xml` is given."""
    root, fields = _parse(text, what)
    ours = fields.get(f"{_OURS}checkpoint")
    if ours is None:
        raise InvalidDocument(f"{what} has no <ckptmgr:checkpoint>")
    values = _take(ours, ("engine", "point", "generation"))
    engine = _known(ours, values, "engine", _ENGINES)
    generation = values.get("generation")
    disks = tuple(_parse_disk(element) for element in ours)
    domain = fields.get("domain")
    if domain is not None:
        domain_xml = _domain_text(text, root, domain)
    checkpoint = replace(
        _checkpoint(fields, EngineName(engine), disks, domain_xml, what, values.get("point")),
        generation=None if generation is None else _number(generation, "generation"),
    )
    shown = [(disk.name, libvirt_bitmap(disk)) for disk in disks]
    if _parse_libvirt_disks(fields.get("disks"), checkpoint.name) != shown:
        raise InvalidDocument(f"{what}: <disks> and <ckptmgr:checkpoint> contradict each other")
    return checkpoint


def parse_sealed(text: str, *, what: str = "the checkpoint's document") -> Checkpoint:
    """The same, of a text that is known by its digest to be what `format_store` wrote.

    The definition of the domain, most of the text, was parsed when it was written and is not
    parsed again: that is most of the time that loading a history takes.
    """
    start = _DOMAIN_START.search(text)
    end = text.rfind(_DOMAIN_END)
    if start is None or end < start.start():
        return parse_store(text, what=what)
    end += len(_DOMAIN_END)
    return _stored(text[: start.start()] + text[end:], what, text[start.start() : end])


def parse_libvirt(text: str | bytes, *, what: str = "the document") -> Checkpoint:
    """The checkpoint of a document as libvirt prints it; one of the store does as well.

    Every tracked disk counts as recording, which only libvirt or QEMU can confirm, and there are
    no intervals.  Disks are named as in the document: by target, or by absolute source path.

    Raises InvalidDocument for what libvirt's schema or REDEFINE refuse.
    """
    root, fields = _parse(text, what)
    name = _name(fields, what)
    disks = tuple(
        CheckpointDisk(disk)
        if bitmap is None
        else CheckpointDisk(disk, bitmap=bitmap, state=State.RECORDING)
        for disk, bitmap in _parse_libvirt_disks(fields.get("disks"), name)
    )
    domain = fields.get("domain")
    domain_xml = None if domain is None else _domain_text(text, root, domain)
    return _checkpoint(fields, EngineName.LIBVIRT, disks, domain_xml, what)


def bitmap_sizes(text: str | bytes, *, what: str = "the document") -> dict[str, int]:
    """The ``size`` of each disk that has one: bytes written since the checkpoint, as libvirt's
    XML_SIZE gives them for the bitmaps that are valid.  Raises InvalidDocument.
    """
    _, fields = _parse(text, what)
    return {
        str(disk.get("name", "")): _number(str(disk.get("size")), "size")
        for disk in fields.get("disks", ())
        if disk.get("size") is not None
    }


def _parse(text: str | bytes, what: str) -> tuple[etree._Element, dict[str, etree._Element]]:
    """The root and its children by tag, each of them one that may be there, and only once."""
    root = xml.parse(text, what=what)
    if root.tag != "domaincheckpoint":
        raise InvalidDocument(f"{what}: <domaincheckpoint> was expected, not <{root.tag}>")
    fields: dict[str, etree._Element] = {}
    for element in root:
        tag = str(element.tag)
        if tag not in _LIBVIRT_ELEMENTS and not tag.startswith(_OURS):
            raise InvalidDocument(f"{what}: <{tag}> is not an element of a checkpoint")
        if tag in fields:
            raise InvalidDocument(f"{what} has <{tag}> twice")
        fields[tag] = element
    return root, fields


def _checkpoint(
    fields: dict[str, etree._Element],
    engine: EngineName,
    disks: tuple[CheckpointDisk, ...],
    domain_xml: str | None,
    what: str,
    point: str | None = None,
) -> Checkpoint:
    """The parts that both kinds of document share, and the checks of the whole."""
    if "creationTime" not in fields:
        raise InvalidDocument(f"{what} has no <creationTime>")
    parent = fields.get("parent")
    if parent is not None and [element.tag for element in parent] != ["name"]:
        raise InvalidDocument(f"{what}: <parent> must hold one <name>")
    description = fields.get("description")
    checkpoint = Checkpoint(
        name=_name(fields, what),
        created=_number(_content(fields["creationTime"]).strip(), "creationTime"),
        parent=None if parent is None else _content(parent[0]),
        engine=engine,
        disks=disks,
        description=None if description is None else _content(description) or None,
        domain_xml=domain_xml,
        point=point,
    )
    if (wrong := fault(checkpoint)) is not None:
        raise InvalidDocument(f"{what}: {wrong}")
    return checkpoint


def _parse_disk(element: etree._Element) -> CheckpointDisk:
    if element.tag != f"{_OURS}disk":
        raise InvalidDocument(f"<{element.tag}> is not an element of <ckptmgr:checkpoint>")
    values = _take(
        element,
        (
            "name",
            "bitmap",
            "node",
            "granularity",
            "persistent",
            "size",
            "source",
            "state",
            "reason",
        ),
    )
    granularity, size = values.get("granularity"), values.get("size")
    persistent = values.get("persistent", "yes")
    if persistent not in ("yes", "no"):
        raise InvalidDocument(f"persistent='{persistent}' is neither yes nor no")
    return CheckpointDisk(
        name=values.get("name", ""),
        bitmap=values.get("bitmap"),
        granularity=None if granularity is None else _number(granularity, "granularity"),
        node=values.get("node"),
        persistent=persistent == "yes",
        size=None if size is None else _number(size, "size"),
        source=values.get("source"),
        state=State(_known(element, values, "state", _STATES)),
        reason=values.get("reason"),
        interval=_parse_interval(element),
    )


def _parse_interval(disk: etree._Element) -> Interval | None:
    if len(disk) == 0:
        return None
    if [element.tag for element in disk] != [f"{_OURS}interval"] or len(disk[0]):
        raise InvalidDocument("a <ckptmgr:disk> holds at most one <ckptmgr:interval>")
    values = _take(disk[0], ("since", "map", "reason"))
    return Interval(values.get("since", ""), values.get("map"), values.get("reason"))


def _parse_libvirt_disks(disks: etree._Element | None, name: str) -> list[tuple[str, str | None]]:
    """Each disk's name and bitmap, by libvirt's defaults for checkpoint `name`."""
    found: list[tuple[str, str | None]] = []
    for disk in () if disks is None else disks:
        if disk.tag != "disk" or len(disk):
            raise InvalidDocument("<disks> holds nothing but empty <disk> elements")
        values = _take(disk, ("name", "checkpoint", "bitmap", "size"))
        mode = _known(disk, {"checkpoint": "bitmap", **values}, "checkpoint", ("bitmap", "no"))
        if mode == "no" and values.keys() & {"bitmap", "size"}:
            raise InvalidDocument("a <disk> with checkpoint='no' has neither bitmap nor size")
        found.append((values.get("name", ""), values.get("bitmap", name) if mode != "no" else None))
    return found


def _name(fields: dict[str, etree._Element], what: str) -> str:
    if "name" not in fields:
        raise InvalidDocument(f"{what} has no <name>")
    return _content(fields["name"])


def _content(element: etree._Element) -> str:
    if len(element):
        raise InvalidDocument(f"<{element.tag}> holds text, not elements")
    return element.text or ""


def _number(text: str, what: str) -> int:
    if not _NUMBER.fullmatch(text) or int(text) > NUMBER_MAX:
        raise InvalidDocument(f"{what}: {text[:40]!r} is not a number")
    return int(text)


def _take(element: etree._Element, names: tuple[str, ...]) -> dict[str, str]:
    """The attributes of `element`, all of them among `names`."""
    values = {str(name): str(value) for name, value in element.attrib.items()}
    if unknown := values.keys() - set(names):
        tag = etree.QName(element).localname
        raise InvalidDocument(f"<{tag}> has the unknown attribute {min(unknown)}")
    return values


def _known(
    element: etree._Element, values: dict[str, str], name: str, choices: Sequence[str]
) -> str:
    """The attribute `name`, which must be one of `choices`."""
    if (value := values.get(name)) not in choices:
        tag = etree.QName(element).localname
        shown = "nothing" if value is None else repr(value)
        raise InvalidDocument(f"<{tag}>: {name} is {shown}, not one of {', '.join(choices)}")
    return str(value)


def _domain_text(text: str | bytes, root: etree._Element, domain: etree._Element) -> str:
    """The characters of <domain> in `text`.

    lxml would print the same with other quotes, and namespaces where the root declares them; it
    does where it cannot be told from `text` with certainty which characters are the element's.
    """
    if isinstance(text, bytes) or root.nsmap:
        return xml.serialized(domain)
    lead = _LEAD.match(text)
    first = lead.end() if lead else 0
    start = _DOMAIN_START.search(text, first)
    end = text.rfind(_DOMAIN_END)
    if start is None or end < start.start():
        return xml.serialized(domain)
    found = text[start.start() : end + len(_DOMAIN_END)]
    # Comments, CDATA and processing instructions may hold what looks like a tag.
    certain = text.find("<!", first) < 0 and text.find("<?", first) < 0
    return found if certain or _says(found, domain) else xml.serialized(domain)


def _says(text: str, element: etree._Element) -> bool:
    """Whether `text` is `element`."""
    try:
        return xml.serialized(xml.parse(text)) == xml.serialized(element)
    except InvalidDocument:
        return False
