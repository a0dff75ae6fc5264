"""One of each mismatch: what was observed, and what has to come out of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ckptmgr.checkpoint import Interval
from ckptmgr.consistency import (
    Action,
    Adopt,
    ClearWorkspace,
    EndJob,
    Forget,
    GoBack,
    Known,
    MarkBroken,
    MarkUnknown,
    Observation,
    Redefine,
    RemoveBitmap,
    SetAside,
    SetCurrent,
    Settle,
)
from ckptmgr.domain.marker import Marker
from ckptmgr.history import History
from ckptmgr.plan.libvirt import DISCARD
from ckptmgr.store import DomainRecord, Intent

from .observations import (
    ARCHIVED,
    C3,
    FITS,
    GONE,
    SIZE,
    STORE,
    adding,
    bitmap,
    damage,
    disk,
    image,
    layer,
    line,
    projected,
    recorded_as,
    with_layers,
    without,
    without_any,
)
from .strategies import DISKS


@dataclass(frozen=True)
class Case:
    """What was observed, and what has to come out of it.

    message, cure -- must be in them
    """

    seen: Observation
    message: str
    cure: str
    action: Action | None
    disk: str | None = None
    checkpoint: str | None = None
    harmless: bool = False


def _lost_current() -> Observation:
    return replace(FITS, record=DomainRecord())


def _moved() -> Observation:
    elsewhere = "/other/vda.qcow2"
    disks = (disk("vda", elsewhere), disk("vdb"))
    seen = replace(FITS, disks=disks)
    assert seen.layers is not None
    (top,) = seen.layers["vda"].layers
    return with_layers(seen, "vda", replace(top, image=elsewhere))


def _replaced() -> Observation:
    return with_layers(_moved(), "vda", layer("vda", where="/other/vda.qcow2"))


def _resized() -> Observation:
    return replace(FITS, disks=(disk("vda", size=2 * SIZE), disk("vdb")))


def _pulled() -> Observation:
    return replace(_moved(), disks=(disk("vda", "/other/vda.qcow2", size=2 * SIZE), disk("vdb")))


def _grown_overlay() -> Observation:
    history = line("c0", disks=("vda",))
    seen = projected(history, disks=(disk("vda", "/top", image("vda"), size=2 * SIZE),))
    top = layer("vda", bitmap("c0"), where="/top", size=2 * SIZE)
    return with_layers(seen, "vda", top, layer("vda", bitmap("c0")))


def _known_otherwise(name: str, **changes: Any) -> Observation:
    known = tuple(replace(each, **changes) if each.name == name else each for each in FITS.known)
    return replace(FITS, known=known)


def _damaged_map() -> Observation:
    interval = C3.get("c1").disks[0].interval
    assert interval is not None
    assert interval.map is not None
    history = recorded_as(C3, "c1", "vdb", interval=Interval("c0", "b" * 64))
    return projected(history, maps={interval.map: "the dirty map /store/vm/maps/x is missing"})


CASES: dict[str, Case] = {
    "intent": Case(
        replace(FITS, intent=Intent("create", ("c9",), "libvirt")),
        "an interrupted create of c9",
        "completed or taken back",
        Settle(),
        checkpoint="c9",
    ),
    "leftover-job": Case(replace(FITS, job=True), "still running", "ended", EndJob()),
    "leftover-files": Case(
        replace(FITS, leftovers=("/run/ckptmgr.sock",)),
        "/run/ckptmgr.sock",
        "removed",
        ClearWorkspace(),
    ),
    "leftover-bitmap": Case(
        adding(FITS, "vda", bitmap("ckptmgr-vda", recording=False, persistent=False)),
        "which an interrupted operation left behind",
        "removed",
        RemoveBitmap("vda", "ckptmgr-vda", foreign=False),
        disk="vda",
    ),
    "leftover-checkpoint": Case(
        replace(FITS, known=(*FITS.known, Known(DISCARD, None, frozenset({"vda"})))),
        DISCARD,
        "metadata of it is deleted",
        Forget(DISCARD),
    ),
    "unreadable-file": Case(
        projected(line("c0", "c1"), damaged=(damage("c2.xml"),)),
        "checkpoint c2 cannot be used, and what changed up to it is not known",
        ".damaged",
        SetAside(str(STORE / "c2.xml")),
        checkpoint="c2",
    ),
    "damaged-map": Case(
        _damaged_map(),
        "what changed on vda from c0 to c1 is not known any more",
        "put the file back",
        MarkUnknown("c1", "vda", "its dirty map was lost or damaged"),
        disk="vda",
        checkpoint="c1",
    ),
    "lost-parent": Case(
        projected(History({"c1": C3.get("c1"), "c2": C3.get("c2")}, "c2")),
        "c1 was made after c0, which is not in the store",
        "counts as a root",
        None,
        checkpoint="c1",
        harmless=True,
    ),
    "current-lost": Case(
        _lost_current(),
        "the store does not say which checkpoint is current; c2 is taken",
        "recorded",
        SetCurrent("c2"),
        checkpoint="c2",
    ),
    "renamed": Case(
        replace(FITS, domain="vm2"),
        "was called 'vm'",
        "the new name is recorded",
        SetCurrent("c2"),
    ),
    "unreadable-image": Case(
        replace(FITS, active=False, layers={"vdb": FITS.layers["vdb"]}, blind={"vda": "no file"})
        if FITS.layers
        else FITS,
        "the images of vda cannot be read: no file",
        "bring the image back",
        None,
        disk="vda",
    ),
    "image-in-use": Case(
        replace(FITS, active=False, layers={"vdb": FITS.layers["vdb"]}, held={"vda": "/img/a"})
        if FITS.layers
        else FITS,
        "another program is writing /img/a of vda",
        "check again",
        None,
        disk="vda",
    ),
    "disk-resized": Case(
        _resized(),
        f"vda has grown from {SIZE} to {2 * SIZE} bytes since c2",
        "none is needed",
        None,
        disk="vda",
        checkpoint="c2",
        harmless=True,
    ),
    "node-changed": Case(
        projected(recorded_as(C3, "c2", "vda", node="libvirt-1-format")),
        "was libvirt-1-format when c2 was made",
        "none is needed",
        None,
        disk="vda",
        checkpoint="c2",
        harmless=True,
    ),
    "image-moved": Case(
        _moved(),
        "is /other/vda.qcow2 now, and was /img/vda.qcow2",
        "none is needed",
        None,
        disk="vda",
        checkpoint="c2",
        harmless=True,
    ),
    "stale-bitmap": Case(
        adding(projected(ARCHIVED), "vda", bitmap("c0")),
        "recorded as archived, but is there",
        "removed",
        RemoveBitmap("vda", "c0", foreign=False),
        disk="vda",
        checkpoint="c0",
    ),
    "missing-bitmap": Case(
        without(FITS, "c1", "vda"),
        "the bitmap of c1 on vda is missing: what changed there since c1",
        "the next checkpoint begins anew",
        MarkBroken("c1", "vda", "its bitmap is missing", remove=False),
        disk="vda",
        checkpoint="c1",
    ),
    "inconsistent-bitmap": Case(
        adding(without(FITS, "c1", "vda"), "vda", bitmap("c1", inconsistent=True, recording=False)),
        "QEMU did not end in an orderly way",
        "the bitmap is removed",
        MarkBroken(
            "c1",
            "vda",
            "its bitmap is inconsistent in /img/vda.qcow2: QEMU did not end in an orderly way",
            remove=True,
        ),
        disk="vda",
        checkpoint="c1",
    ),
    "broken-bitmap": Case(
        adding(without(FITS, "c1", "vda"), "vda", bitmap("c1", recording=False)),
        "not recording",
        "the bitmap is removed",
        MarkBroken("c1", "vda", "its bitmap is not recording in /img/vda.qcow2", remove=True),
        disk="vda",
        checkpoint="c1",
    ),
    "layer-smaller": Case(
        _grown_overlay(),
        "/img/vda.qcow2 has another size than the disk",
        "the next checkpoint begins anew",
        MarkBroken(
            "c0",
            "vda",
            "its bitmap cannot be read across the backing chain: "
            "/img/vda.qcow2 has another size than the disk",
            remove=True,
        ),
        disk="vda",
        checkpoint="c0",
    ),
    "bitmap-lost-in-job": Case(
        _pulled(),
        "a block job cannot have kept the bitmap",
        "the bitmap is removed",
        MarkBroken(
            "c0",
            "vda",
            "its bitmap cannot be trusted: the disk has grown and /img/vda.qcow2 has left its "
            "backing chain since: a block job cannot have kept the bitmap",
            remove=True,
        ),
        disk="vda",
        checkpoint="c0",
    ),
    "disk-replaced": Case(
        _replaced(),
        "the disk's image is /other/vda.qcow2 now and was /img/vda.qcow2",
        "that is recorded",
        MarkBroken(
            "c0",
            "vda",
            "its bitmap is missing, and the disk's image is /other/vda.qcow2 now and was "
            "/img/vda.qcow2",
            remove=False,
        ),
        disk="vda",
        checkpoint="c0",
    ),
    "disk-shrunk": Case(
        replace(FITS, disks=(disk("vda", size=SIZE // 2), disk("vdb"))),
        "the disk is smaller than it was",
        "the bitmap is removed",
        MarkBroken(
            "c0",
            "vda",
            "its bitmap cannot be trusted: the disk is smaller than it was "
            f"({SIZE // 2} bytes, {SIZE} then)",
            remove=True,
        ),
        disk="vda",
        checkpoint="c0",
    ),
    "orphan-bitmap": Case(
        adding(FITS, "vda", bitmap("stranger")),
        "'stranger' in /img/vda.qcow2, which belongs to no checkpoint",
        "--foreign",
        RemoveBitmap("vda", "stranger", foreign=True),
        disk="vda",
    ),
    "libvirt-bitmap": Case(
        adding(FITS, "vda", bitmap("libvirt-tmp-activewrite", persistent=False)),
        "which libvirt made for a job",
        "none is needed",
        None,
        disk="vda",
        harmless=True,
    ),
    "libvirt-only": Case(
        replace(FITS, known=(*FITS.known, Known("v1", "c2", frozenset({"vda"})))),
        "v1 that ckptmgr did not make",
        "ckptmgr adopt",
        Adopt(),
        checkpoint="v1",
    ),
    "store-only": Case(
        replace(FITS, known=FITS.known[:2]),
        "libvirt does not know checkpoint c2",
        "shown it again",
        Redefine("c2"),
        checkpoint="c2",
    ),
    "libvirt-stale": Case(
        projected(GONE, known=(Known("c0", None, frozenset(DISKS)), *FITS.known[1:])),
        "c0, which has no bitmap any more",
        "the store keeps it",
        Forget("c0"),
        checkpoint="c0",
    ),
    "libvirt-disks": Case(
        _known_otherwise("c1", disks=frozenset({"vda"})),
        "has bitmaps on vda, and it should be vda, vdb",
        "shown it anew",
        Redefine("c1"),
        checkpoint="c1",
    ),
    "wrong-parent": Case(
        _known_otherwise("c2", parent="c0"),
        "libvirt has c0 for the parent of c2, and it should be c1",
        "shown it anew",
        Redefine("c2"),
        checkpoint="c2",
    ),
    "no-marker": Case(
        replace(FITS, marker=None), "no marker", "it is set", SetCurrent("c2"), checkpoint="c2"
    ),
    "unreadable-marker": Case(
        replace(FITS, marker=None, no_marker="it is none of ours"),
        "it is none of ours",
        "set anew",
        SetCurrent("c2"),
        checkpoint="c2",
    ),
    "stray-marker": Case(
        projected(History(), marker=Marker("c1", 3)),
        "names checkpoint c1, and the store has no checkpoints",
        "--store",
        SetCurrent(None),
    ),
    "wrong-current": Case(
        replace(FITS, marker=Marker("c1", 3)),
        "names c1 as current, and the store c2",
        "the marker is set to what the store has",
        SetCurrent("c2"),
        checkpoint="c2",
    ),
    "rolled-back": Case(
        replace(without(FITS, "c2"), marker=Marker("c1", 2)),
        "when c1 was current and not c2",
        "c1 becomes current again",
        GoBack("c1"),
        checkpoint="c1",
    ),
    "reverted": Case(
        replace(without_any(FITS), marker=Marker("c1", 2)),
        "its marker names c1, and c2 was current",
        "goes on from c1",
        GoBack("c1"),
        checkpoint="c1",
    ),
}
