"""Hypothesis strategies for the data of the core."""

from __future__ import annotations

import string
from dataclasses import dataclass, replace

from hypothesis import strategies as st
from pyroaring import BitMap64

from ckptmgr.checkpoint import Checkpoint, CheckpointDisk, EngineName, Interval, State
from ckptmgr.dirtymap import DirtyMap, granule_count
from ckptmgr.history import History

_FIRST = string.ascii_letters + string.digits + "_-"

names = st.builds(
    str.__add__, st.sampled_from(_FIRST), st.text(_FIRST + ".", max_size=20)
) | st.text(_FIRST, min_size=200, max_size=200)
targets = st.sampled_from(["vda", "vdb", "sda", "hdc", "xvda1"])
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
texts = st.text(
    st.characters(
        exclude_categories=["Cs", "Cc"],
        exclude_characters="\ufffe\uffff",
        include_characters="\t\n\r<>&'\"",
    ),
    min_size=1,
    max_size=60,
)
"""Everything that XML can hold, line ends included."""
sizes = st.integers(0, 2**63 - 1)
granularities = st.integers(9, 31).map(lambda exponent: 1 << exponent)


@st.composite
def intervals(draw: st.DrawFn, ends_at: str) -> Interval:
    """A known or unknown interval of checkpoint `ends_at`."""
    since = draw(names.filter(lambda name: name != ends_at))
    if draw(st.booleans()):
        return Interval(since, draw(digests))
    return Interval(since, None, draw(st.none() | texts))


@st.composite
def checkpoint_disks(draw: st.DrawFn, name: str, checkpoint: str) -> CheckpointDisk:
    """A tracked or untracked disk `name` of `checkpoint`."""
    disk = CheckpointDisk(
        name,
        granularity=draw(st.none() | granularities),
        node=draw(st.none() | texts),
        size=draw(st.none() | sizes),
        source=draw(st.none() | texts),
        reason=draw(st.none() | texts),
    )
    if draw(st.booleans()):
        return disk
    return replace(
        disk,
        bitmap=draw(st.just(checkpoint) | texts),
        persistent=draw(st.booleans()),
        state=draw(st.sampled_from([state for state in State if state is not State.NONE])),
        interval=draw(st.none() | intervals(checkpoint)),
    )


@st.composite
def domain_definitions(draw: st.DrawFn) -> str:
    """A <domain> with what may stand in one: other namespaces, comments, CDATA, both quotes."""
    inside = st.sampled_from(
        [
            "<name>vm</name>",
            "<metadata><a:b xmlns:a='urn:a' c=\"d'e\"/></metadata>",
            "<!-- </domain> <domain> -->",
            "<![CDATA[</domain><domain>]]>",
            '<description>a "quoted" &lt;text&gt;</description>',
            "\n  ",
        ]
    )
    content = "".join(draw(st.lists(inside, max_size=5)))
    return f"<domain type='kvm' id=\"1\">{content}</domain>"


@st.composite
def checkpoints(draw: st.DrawFn) -> Checkpoint:
    """Any checkpoint that can be recorded."""
    name = draw(names)
    disks = draw(st.lists(targets, unique=True, max_size=4))
    return Checkpoint(
        name=name,
        created=draw(st.integers(0, 253402300799)),
        parent=draw(st.none() | names.filter(lambda parent: parent != name)),
        engine=draw(st.sampled_from(EngineName)),
        disks=tuple(draw(checkpoint_disks(disk, name)) for disk in disks),
        description=draw(st.none() | texts),
        domain_xml=draw(st.none() | domain_definitions()),
        point=draw(st.none() | st.text("0123456789abcdef", min_size=32, max_size=32)),
        generation=draw(st.none() | st.integers(0, 2**63 - 1)),
    )


@st.composite
def dirty_maps(draw: st.DrawFn) -> DirtyMap:
    """A small map of any granularity; sizes are multiples of 512, not of the granularity."""
    granularity = draw(st.sampled_from([512, 1024, 4096, 65536]))
    size = draw(st.integers(0, 600)) * 512
    count = granule_count(granularity, size)
    granules = draw(st.sets(st.integers(0, count - 1))) if count else set()
    return DirtyMap(granularity, size, BitMap64(granules))


DISKS = ("vda", "vdb")


@dataclass(frozen=True)
class Model:
    """A history and, by edge, what was really written: the sets that intervals are unions of.

    writes -- by checkpoint and disk: granules written between its parent and it
    maps -- by the digests that the history names
    """

    history: History
    writes: dict[tuple[str, str], frozenset[int]]
    maps: dict[str, frozenset[int]]


@st.composite
def models(draw: st.DrawFn, max_size: int = 9, unknown: bool = False) -> Model:
    """A tree as creates make it: each disk's interval since the nearest tracker above.

    unknown -- some maps are unknown
    """
    history = History()
    writes: dict[tuple[str, str], frozenset[int]] = {}
    maps: dict[str, frozenset[int]] = {}
    for number in range(draw(st.integers(1, max_size))):
        name = f"c{number}"
        parent = draw(st.sampled_from([None, *history.checkpoints])) if number else None
        disks = []
        for disk in DISKS:
            written = draw(st.frozensets(st.integers(0, 15), max_size=4))
            writes[name, disk] = written
            if not draw(st.integers(0, 3)):
                disks.append(CheckpointDisk(disk, reason="left out"))
                continue
            interval = None
            since = None if parent is None else history.tracker(disk, parent)
            if since is not None:
                above: str | None = parent
                while above is not None and above != since:
                    written |= writes[above, disk]
                    above = history.parent(above)
                if unknown and not draw(st.integers(0, 4)):
                    interval = Interval(since, None, f"lost at {name}")
                else:
                    digest = f"{len(maps):064x}"
                    maps[digest] = written
                    interval = Interval(since, digest)
            disks.append(
                CheckpointDisk(disk, bitmap=name, state=State.RECORDING, interval=interval)
            )
        created = draw(st.integers(0, 5))
        checkpoint = Checkpoint(name, created, parent, EngineName.LIBVIRT, tuple(disks))
        history = history.add(checkpoint)
    return Model(history, writes, maps)
