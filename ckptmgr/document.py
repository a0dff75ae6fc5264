"""The checkpoint as XML: libvirt's document, and the store's, which is that and one element more.

    <domaincheckpoint>
      <name>c1</name>
      <description>before the update</description>
      <parent>
        <name>c0</name>
      </parent>
      <creationTime>1700000000</creationTime>
      <disks>
        <disk name='vda' checkpoint='bitmap' bitmap='c1'/>
        <disk name='vdb' checkpoint='no'/>
      </disks>
      <domain type='kvm'>…</domain>
      <ckptmgr:checkpoint xmlns:ckptmgr='urn:ckptmgr:1' engine='libvirt' generation='7'>
        <ckptmgr:disk name='vda' bitmap='c1' node='libvirt-1-format' granularity='65536'
                      persistent='yes' size='67108864' source='/img/a.qcow2' state='recording'>
          <ckptmgr:interval since='c0' map='<sha256>'/>
        </ckptmgr:disk>
        <ckptmgr:disk name='vdb' state='none' reason='raw images cannot keep bitmaps'/>
      </ckptmgr:checkpoint>
    </domaincheckpoint>

An interval without ``map`` is unknown, ``reason`` says why.  A checkpoint whose state is that of
a restore point has its identity as ``<ckptmgr:checkpoint … point='…'>``.  Element and attribute
order are libvirt's (virDomainCheckpointDefFormatInternal), and so is the rule of what is there:
in libvirt's part a disk whose bitmap the image does not hold (a bitmap that is not persistent,
an archived one) stands as ``no``.  ``<domain>`` is kept as it was given, character by character.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lxml import etree

from . import xml
from .checkpoint import Checkpoint, CheckpointDisk, EngineName, Interval, State, check_name
from .errors import InvalidDocument, InvalidRequest

_OURS = f"{{{xml.NAMESPACE}}}"
_LIBVIRT_ELEMENTS = ("name", "description", "parent", "creationTime", "disks", "domain")
_ENGINES, _STATES = tuple(EngineName), tuple(State)
_NUMBER_MAX = 2**63 - 1
_TIME_MAX = 253402300799  # the end of the year 9999, the last that RFC 3339 can write
_NUMBER = re.compile(r"[0-9]{1,19}")
_MAP_DIGEST = re.compile(r"[0-9a-f]{64}")
_POINT = re.compile(r"[0-9a-f]{32}")
_NOT_XML = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
"""What is not a Char of XML 1.0, section 2.2."""

_LEAD = re.compile(r"\A\ufeff?\s*(?:<\?xml\b.*?\?>)?\s*(?:<!--.*?-->\s*)*", re.DOTALL)
_DOMAIN_START = re.compile(r"<domain[\s>]")
_DOMAIN_END = "</domain>"
_TRACKED_DISK = re.compile(
    r"^    <disk name='([^']*)' checkpoint='bitmap' bitmap='[^']*'(?=/>$)", re.MULTILINE
)


# --- writing ---------------------------------------------------------------------------------


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
    if (fault := _fault(checkpoint)) is not None:
        raise InvalidRequest(f"checkpoint {checkpoint.name}: {fault}")
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
            bitmap = _libvirt_bitmap(disk)
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


def _libvirt_bitmap(disk: CheckpointDisk) -> str | None:
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
    return _serialized(root)  # without a declaration and comments around it


def _serialized(element: etree._Element) -> str:
    text: str = etree.tostring(element, encoding="unicode", with_tail=False)
    return text


# --- reading ---------------------------------------------------------------------------------


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
    shown = [(disk.name, _libvirt_bitmap(disk)) for disk in disks]
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
    if (fault := _fault(checkpoint)) is not None:
        raise InvalidDocument(f"{what}: {fault}")
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


def _fault(checkpoint: Checkpoint) -> str | None:
    """Why this cannot be a checkpoint, or None."""
    try:
        check_name(checkpoint.name)
        if checkpoint.parent is not None:
            check_name(checkpoint.parent)
    except InvalidRequest as error:
        return error.message
    if checkpoint.parent == checkpoint.name:
        return "it is its own parent"
    if not 0 <= checkpoint.created <= _TIME_MAX:
        return f"{checkpoint.created} is not a creation time"
    if checkpoint.point is not None and not _POINT.fullmatch(checkpoint.point):
        return f"{checkpoint.point!r} is not the identity of a restore point"
    names = [disk.name for disk in checkpoint.disks]
    if len(set(names)) != len(names):
        return "a disk occurs twice"
    faults = (_disk_fault(checkpoint, disk) for disk in checkpoint.disks)
    return next((fault for fault in faults if fault is not None), None)


def _disk_fault(checkpoint: Checkpoint, disk: CheckpointDisk) -> str | None:
    where = f"disk {disk.name}"
    if not disk.name:
        return "a disk has no name"
    if disk.bitmap == "":
        return f"{where}: the bitmap has no name"
    if (disk.bitmap is None) is not (disk.state is State.NONE):
        return f"{where}: the state {disk.state} contradicts the bitmap {disk.bitmap}"
    granularity = disk.granularity
    if granularity is not None and (granularity < 512 or granularity & (granularity - 1)):
        return f"{where}: the granularity {granularity} is not a power of two from 512"
    if disk.size is not None and not 0 <= disk.size <= _NUMBER_MAX:
        return f"{where}: {disk.size} is not a size"
    if disk.interval is None:
        return None
    if disk.bitmap is None:
        return f"{where} has an interval but is not tracked"
    interval = disk.interval
    try:
        check_name(interval.since)
    except InvalidRequest as error:
        return f"{where}, the start of its interval: {error.message}"
    if interval.since == checkpoint.name:
        return f"{where}: its interval starts where it ends"
    if interval.map is not None and not _MAP_DIGEST.fullmatch(interval.map):
        return f"{where}: {interval.map!r} is not the digest of a dirty map"
    if interval.map is not None and interval.reason is not None:
        return f"{where}: its interval is known, and unknown for a reason"
    return None


def _name(fields: dict[str, etree._Element], what: str) -> str:
    if "name" not in fields:
        raise InvalidDocument(f"{what} has no <name>")
    return _content(fields["name"])


def _content(element: etree._Element) -> str:
    if len(element):
        raise InvalidDocument(f"<{element.tag}> holds text, not elements")
    return element.text or ""


def _number(text: str, what: str) -> int:
    if not _NUMBER.fullmatch(text) or int(text) > _NUMBER_MAX:
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
        return _serialized(domain)
    lead = _LEAD.match(text)
    first = lead.end() if lead else 0
    start = _DOMAIN_START.search(text, first)
    end = text.rfind(_DOMAIN_END)
    if start is None or end < start.start():
        return _serialized(domain)
    found = text[start.start() : end + len(_DOMAIN_END)]
    # Comments, CDATA and processing instructions may hold what looks like a tag.
    certain = text.find("<!", first) < 0 and text.find("<?", first) < 0
    return found if certain or _says(found, domain) else _serialized(domain)


def _says(text: str, element: etree._Element) -> bool:
    """Whether `text` is `element`."""
    try:
        return _serialized(xml.parse(text)) == _serialized(element)
    except InvalidDocument:
        return False
