"""check: each mismatch has its name, what it means, its cure, and an action that cures it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.checkpoint import (
    Checkpoint,
    CheckpointDisk,
    EngineName,
    Interval,
    State,
    shown_disks,
)
from ckptmgr.consistency import (
    Action,
    Adopt,
    ClearWorkspace,
    EndJob,
    Finding,
    Forget,
    GoBack,
    Known,
    MarkArchived,
    MarkBroken,
    MarkUnknown,
    Observation,
    Redefine,
    RemoveBitmap,
    SetAside,
    SetCurrent,
    Settle,
    consistent,
    examine,
)
from ckptmgr.domain.disk import Bitmap, Disk, DiskLayers, Image, Layer
from ckptmgr.domain.marker import Marker
from ckptmgr.history import History
from ckptmgr.plan.libvirt import DISCARD
from ckptmgr.store import Damage, DomainRecord, Intent

from .strategies import DISKS, Model, models

SIZE = 1 << 20
STORE = Path("/store/vm")


# --- a domain on which everything fits together ----------------------------------------------


def image(target: str) -> str:
    return f"/img/{target}.qcow2"


def disk(target: str, *images: str, size: int = SIZE, read_only: bool = False) -> Disk:
    chain = tuple(
        Image("file", each, path=each, format="qcow2") for each in images or (image(target),)
    )
    return Disk(target, "virtio", chain=chain, size=size, read_only=read_only)


def layer(target: str, *bitmaps: Bitmap, where: str | None = None, size: int = SIZE) -> Layer:
    node = f"libvirt-{target}-format"
    return Layer(where or image(target), node, "qcow2", size, bitmaps=bitmaps)


def bitmap(name: str, **known: Any) -> Bitmap:
    return Bitmap(name, 65536, **({"recording": True} | known))


def tracked(target: str, name: str, since: str | None = None, **known: Any) -> CheckpointDisk:
    values: dict[str, Any] = {
        "granularity": 65536,
        "node": f"libvirt-{target}-format",
        "size": SIZE,
        "source": image(target),
        "state": State.RECORDING,
        "interval": None if since is None else Interval(since, name.encode().hex().zfill(64)),
    }
    return CheckpointDisk(target, name, **(values | known))


def line(*names: str, disks: tuple[str, ...] = DISKS) -> History:
    history = History()
    above = None
    for number, name in enumerate(names):
        recorded = tuple(tracked(target, name, above) for target in disks)
        history = history.add(Checkpoint(name, number, above, EngineName.LIBVIRT, recorded))
        above = name
    return history


def projected(history: History, **changes: Any) -> Observation:
    """Just what the history says is there, everywhere."""
    held: dict[str, list[Bitmap]] = {target: [] for target in DISKS}
    known = []
    parents: dict[str, str | None] = {}
    for name in history.topological():
        checkpoint = history.get(name)
        for recorded in checkpoint.disks:
            if recorded.state is State.RECORDING and recorded.bitmap is not None:
                held[recorded.name].append(bitmap(name))
        if shown_disks(checkpoint):
            above = history.parent(name)
            while above is not None and above not in parents:
                above = history.parent(above)
            parents[name] = above
            known.append(Known(name, above, shown_disks(checkpoint)))
    current = history.current
    generation = len(history.checkpoints)
    values: dict[str, Any] = {
        "domain": "vm",
        "active": True,
        "disks": tuple(disk(target) for target in DISKS),
        "history": history,
        "record": DomainRecord("vm", current, generation) if generation else DomainRecord(),
        "layers": {
            target: DiskLayers(target, (layer(target, *bitmaps),))
            for target, bitmaps in held.items()
        },
        "known": tuple(known),
        "marker": None if current is None else Marker(current, generation),
    }
    return Observation(**(values | changes))


def with_layers(seen: Observation, target: str, *layers: Layer) -> Observation:
    """`seen` with other layers below one disk."""
    others = dict(seen.layers or {})
    return replace(seen, layers={**others, target: DiskLayers(target, layers)})


def without(seen: Observation, name: str, *targets: str) -> Observation:
    """`seen` without a bitmap on some disks, or all."""
    for target, found in (seen.layers or {}).items():
        if target in (targets or DISKS):
            layers = (
                replace(each, bitmaps=tuple(b for b in each.bitmaps if b.name != name))
                for each in found.layers
            )
            seen = with_layers(seen, target, *layers)
    return seen


def adding(seen: Observation, target: str, *bitmaps: Bitmap) -> Observation:
    """`seen` with further bitmaps on a disk's top layer."""
    assert seen.layers is not None
    top, *rest = seen.layers[target].layers
    return with_layers(seen, target, replace(top, bitmaps=(*top.bitmaps, *bitmaps)), *rest)


def recorded_as(history: History, name: str, target: str, **changes: Any) -> History:
    checkpoint = history.get(name)
    disks = tuple(
        replace(each, **changes) if each.name == target else each for each in checkpoint.disks
    )
    return history.replace(replace(checkpoint, disks=disks))


C3 = line("c0", "c1", "c2")
FITS = projected(C3)


def test_what_is_as_recorded_gives_no_findings() -> None:
    assert examine(FITS) == ()
    assert examine(projected(History())) == ()


# --- one of each -----------------------------------------------------------------------------


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


def damage(name: str) -> Damage:
    return Damage(STORE / name, f"{STORE / name}: it is not JSON")


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


ARCHIVED = recorded_as(C3, "c0", "vda", state=State.ARCHIVED)
GONE = recorded_as(ARCHIVED, "c0", "vdb", state=State.ARCHIVED)


def _without_any(seen: Observation) -> Observation:
    for name in C3.checkpoints:
        seen = without(seen, name)
    return seen


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
        replace(_without_any(FITS), marker=Marker("c1", 2)),
        "its marker names c1, and c2 was current",
        "goes on from c1",
        GoBack("c1"),
        checkpoint="c1",
    ),
}


@pytest.mark.parametrize("code", CASES)
def test_each_mismatch_is_named_with_its_meaning_cure_and_action(code: str) -> None:
    case = CASES[code]
    found = examine(case.seen)
    assert code in [finding.code for finding in found]
    finding = next(finding for finding in found if finding.code == code)
    assert case.message in finding.message
    assert case.cure in finding.cure
    assert finding.action == case.action
    assert (finding.disk, finding.checkpoint) == (case.disk, case.checkpoint)
    assert finding.harmless is case.harmless
    assert consistent(found) is case.harmless
    for text in (finding.message, finding.cure):
        assert not text.endswith(".")
        assert "\n" not in text
    json.dumps(finding.json())


CONSEQUENCES: dict[str, set[str]] = {
    "disk-replaced": {"disk-replaced"},
    "bitmap-lost-in-job": {"bitmap-lost-in-job"},
    "disk-shrunk": {"disk-shrunk"},
    "rolled-back": {"rolled-back", "missing-bitmap"},
}


@pytest.mark.parametrize("code", CASES)
def test_one_mismatch_is_one_finding_and_not_a_flood(code: str) -> None:
    codes = [finding.code for finding in examine(CASES[code].seen)]
    assert set(codes) == CONSEQUENCES.get(code, {code})
    if code not in CONSEQUENCES:
        assert len(codes) == 1


def test_every_code_is_documented_and_every_documented_code_has_a_case() -> None:
    text = (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")
    section = text.partition("### check DOMAIN")[2].partition("### repair")[0]
    rows = [row.partition("|")[2].partition("|")[0] for row in section.splitlines() if "|" in row]
    documented = {code for row in rows for code in row.replace("`", "").replace(",", " ").split()}
    assert documented - {"code", "---"} == set(CASES)


# --- what each rule leaves alone -------------------------------------------------------------


def codes(seen: Observation) -> list[str]:
    return [finding.code for finding in examine(seen)]


def test_an_intent_s_bitmaps_are_not_called_orphans() -> None:
    seen = adding(replace(FITS, intent=Intent("create", ("c9",), "libvirt")), "vda", bitmap("c9"))
    assert codes(seen) == ["intent"]


def test_a_bitmap_that_a_job_uses_is_left_alone() -> None:
    assert codes(adding(FITS, "vda", bitmap("x", busy=True))) == []


def test_bitmaps_of_libvirt_s_own_checkpoints_are_not_orphans() -> None:
    seen = replace(FITS, known=(*FITS.known, Known("v1", "c2", frozenset({"vda"}))))
    assert codes(adding(seen, "vda", bitmap("v1"))) == ["libvirt-only"]


def test_a_checkpoint_s_name_on_a_disk_that_it_does_not_track_is_an_orphan() -> None:
    history = recorded_as(C3, "c1", "vdb", bitmap=None, state=State.NONE, interval=None)
    history = recorded_as(history, "c2", "vdb", interval=Interval("c0", "a" * 64))
    (found,) = examine(adding(projected(history), "vdb", bitmap("c1")))
    assert (found.code, found.action) == ("orphan-bitmap", RemoveBitmap("vdb", "c1", foreign=True))


def test_bitmaps_of_read_only_disks_cannot_be_removed() -> None:
    seen = adding(FITS, "vda", bitmap("x"))
    layers = {**(seen.layers or {}), "sda": DiskLayers("sda", (layer("sda", bitmap("y")),))}
    seen = replace(seen, layers=layers, disks=(*seen.disks, disk("sda", read_only=True)))
    assert [finding.disk for finding in examine(seen)] == ["vda"]


def test_the_bitmap_of_a_document_that_was_moved_aside_is_ours() -> None:
    seen = adding(replace(FITS, aside=frozenset({"c9"})), "vda", bitmap("c9"))
    (found,) = examine(seen)
    assert found.action == RemoveBitmap("vda", "c9", foreign=False)


def test_what_libvirt_calls_something_that_cannot_be_taken_over_needs_a_person() -> None:
    refused = Known("v1", None, frozenset(), refused="it names another checkpoint's bitmap")
    (found,) = examine(replace(FITS, known=(*FITS.known, refused)))
    assert (found.code, found.action) == ("libvirt-only", None)
    assert "virsh checkpoint-delete" in found.cure


def test_a_libvirt_that_is_not_told_is_not_asked() -> None:
    assert codes(replace(FITS, known=(), told=False)) == []


def test_another_tool_s_checkpoint_between_ours_does_not_make_a_parent_wrong() -> None:
    known = (*FITS.known[:2], Known("v1", "c1", frozenset({"vda"})))
    seen = replace(FITS, known=(*known, replace(FITS.known[2], parent="v1")))
    assert codes(seen) == ["libvirt-only"]


@pytest.mark.parametrize("above", [None, "c0"])
def test_a_checkpoint_that_is_to_go_from_libvirt_s_list_is_nobody_s_parent(
    above: str | None,
) -> None:
    known = (Known("c0", None, frozenset(DISKS)), replace(FITS.known[1], parent=above))
    assert codes(projected(GONE, known=(*known, FITS.known[2]))) == ["libvirt-stale"]


def test_a_disk_that_was_taken_out_is_no_mismatch() -> None:
    seen = replace(FITS, disks=(disk("vda"),), layers={"vda": DiskLayers("vda", ())})
    assert codes(seen) == []


def test_images_of_another_machine_are_nobody_s_to_judge() -> None:
    assert codes(replace(FITS, active=False, layers=None)) == []


def test_without_the_monitor_libvirt_s_sizes_tell_which_bitmaps_are_valid() -> None:
    sized = {name: frozenset(DISKS) for name in C3.checkpoints}
    assert codes(replace(FITS, layers=None, sized=sized)) == []
    (found,) = examine(replace(FITS, layers=None, sized={**sized, "c1": frozenset({"vda"})}))
    assert (found.code, found.disk) == ("missing-bitmap", "vdb")
    reason = "its bitmap is missing or broken"
    assert found.action == MarkBroken("c1", "vdb", reason, remove=True)


def test_a_bitmap_that_lived_in_qemu_alone_is_told_so() -> None:
    history = recorded_as(C3, "c2", "vda", persistent=False)
    (found,) = examine(without(projected(history), "c2", "vda"))
    assert "it lived in the QEMU process" in found.message


def test_a_bitmap_that_recorded_again_after_a_while_is_not_trusted() -> None:
    seen = projected(recorded_as(C3, "c1", "vda", state=State.FROZEN))
    (found,) = examine(adding(seen, "vda", bitmap("c1")))
    assert (found.code, found.disk) == ("broken-bitmap", "vda")
    assert isinstance(found.action, MarkBroken)


def test_a_missing_bitmap_of_another_branch_loses_nothing() -> None:
    history = replace(C3, current="c1")
    branch = Checkpoint("d", 9, "c1", EngineName.LIBVIRT, (tracked("vda", "d", "c1"),))
    (found,) = examine(without(projected(history.add(branch)), "c2", "vda"))
    assert found.action == MarkArchived("c2", "vda", remove=False)
    assert "nothing is lost" in found.message


@pytest.mark.parametrize("marker", [Marker("c2", 3), None, Marker("c1", 2), Marker("c0", 1)])
def test_images_that_went_back_are_recognised_by_their_bitmaps_whatever_the_marker_says(
    marker: Marker | None,
) -> None:
    back = "c0" if marker == Marker("c0", 1) else "c1"
    found = examine(replace(without(FITS, "c2"), marker=marker))
    assert found[0].code == "rolled-back"
    assert found[0].action == GoBack(back)


def test_one_disk_that_lost_its_newest_bitmap_did_not_go_back_in_time() -> None:
    assert codes(without(FITS, "c2", "vda")) == ["missing-bitmap"]


def test_a_crash_that_lost_every_bitmap_did_not_go_back_in_time() -> None:
    seen = FITS
    for name in C3.checkpoints:
        seen = without(seen, name)
    assert set(codes(seen)) == {"missing-bitmap"}


def test_a_revert_that_the_hook_dealt_with_is_told_with_what_is_known() -> None:
    history = replace(C3, current="c1")
    seen = projected(history, marker=Marker("c1", 2))
    seen = _without_any(replace(seen, record=replace(seen.record, left="c2")))
    (found,) = examine(seen)
    assert (found.code, found.action) == ("reverted", GoBack("c1"))
    assert "the line up to c2 was kept" in found.message


def test_a_definition_that_is_old_while_the_current_bitmaps_record_is_no_revert() -> None:
    assert codes(replace(FITS, marker=Marker("c1", 2))) == ["wrong-current"]


def test_a_revert_to_before_the_first_checkpoint_begins_a_new_root() -> None:
    (found,) = examine(replace(_without_any(FITS), marker=None))
    assert (found.code, found.action) == ("reverted", GoBack(None))


def test_without_the_monitor_a_revert_is_seen_by_libvirt_s_sizes() -> None:
    sized = {name: frozenset[str]() for name in C3.checkpoints}
    (found,) = examine(replace(FITS, layers=None, sized=sized, marker=Marker("c1", 2)))
    assert found.code == "reverted"


def test_a_store_that_is_older_than_the_domain_is_told() -> None:
    (found,) = examine(replace(FITS, marker=Marker("c9", 12)))
    assert found.code == "wrong-current"
    assert "the store is older than the domain" in found.message


def test_no_current_checkpoint_is_no_mismatch_where_that_was_recorded() -> None:
    history = replace(C3, current=None)
    assert codes(projected(history, marker=None)) == []
    assert codes(projected(history, marker=Marker(None, 3))) == []


def test_a_current_checkpoint_whose_document_is_lost_is_told_once() -> None:
    seen = replace(projected(line("c0", "c1")), record=DomainRecord("vm", "c2", 2))
    (found,) = examine(seen)
    assert found.code == "current-lost"
    assert "the current checkpoint, c2, cannot be used; c1 is taken" in found.message
    damaged = replace(projected(C3), damaged=(damage("domain.json"),), record=DomainRecord())
    (found,) = examine(damaged)
    assert found.code == "unreadable-file"
    assert "c2 is taken for the current one" in found.message


def test_a_damaged_intent_says_that_nothing_can_be_changed() -> None:
    (found,) = examine(replace(FITS, damaged=(damage("intent.json"),)))
    assert "nothing can be changed until it is gone" in found.message


def test_foreign_bitmaps_are_cured_only_when_told_to() -> None:
    (orphan,) = examine(CASES["orphan-bitmap"].seen)
    assert not orphan.curable(foreign=False)
    assert orphan.curable(foreign=True)
    (missing,) = examine(CASES["missing-bitmap"].seen)
    assert missing.curable(foreign=False)
    (image_lost,) = examine(CASES["unreadable-image"].seen)
    assert not image_lost.curable(foreign=True)


# --- anything, on anything -------------------------------------------------------------------


@given(models(unknown=True))
def test_a_history_that_is_everywhere_as_recorded_gives_no_findings(model: Model) -> None:
    history = model.history
    for name in list(history.checkpoints):
        for recorded in history.get(name).disks:
            changes = {"size": SIZE, "source": image(recorded.name)}
            history = recorded_as(history, name, recorded.name, **changes)
    assert examine(projected(history)) == ()


names = st.sampled_from([f"c{number}" for number in range(6)] + ["x", "ckptmgr-vda", DISCARD])
found_bitmaps = st.builds(
    Bitmap,
    name=names,
    granularity=st.just(65536),
    recording=st.booleans(),
    persistent=st.booleans(),
    inconsistent=st.booleans(),
    busy=st.booleans(),
)
found_layers = st.builds(
    Layer,
    image=st.sampled_from(["/a", "/b", "/img/vda.qcow2"]),
    node=st.none() | st.sampled_from(["n1", "n2"]),
    size=st.none() | st.sampled_from([SIZE, 2 * SIZE]),
    bitmaps=st.lists(found_bitmaps, max_size=3, unique_by=lambda each: each.name).map(tuple),
)
targets = st.sampled_from([*DISKS, "vdc"])
states = st.sampled_from([State.ARCHIVED, State.BROKEN, State.FROZEN])


def _layers_of(found: Mapping[str, list[Layer]]) -> dict[str, DiskLayers]:
    return {target: DiskLayers(target, tuple(layers)) for target, layers in found.items()}


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    """Any history, and anything else beside it."""
    history = draw(models(max_size=6, unknown=True)).history
    for name in list(history.checkpoints):
        for recorded in history.get(name).disks:
            if recorded.bitmap is not None:
                state = draw(st.just(recorded.state) | states)
                size = draw(st.none() | st.sampled_from([SIZE, 2 * SIZE]))
                changes = {"state": state, "size": size, "source": draw(st.none() | st.just("/a"))}
                history = recorded_as(history, name, recorded.name, **changes)
    for name in draw(st.lists(names, max_size=2)):
        left = {each: point for each, point in history.checkpoints.items() if each != name}
        history = History(left, history.current if history.current in left else None)
    disks = tuple(
        disk(target, *images, size=size) if images else Disk(target, "virtio", size=size)
        for target, images, size in draw(
            st.lists(
                st.tuples(
                    targets,
                    st.lists(st.sampled_from(["/a", "/b"]), max_size=2),
                    st.sampled_from([SIZE, 2 * SIZE]),
                ),
                unique_by=lambda each: each[0],
                max_size=3,
            )
        )
    )
    layers = st.dictionaries(targets, st.lists(found_layers, max_size=3), max_size=3)
    known = st.builds(
        Known,
        names,
        st.none() | names,
        st.frozensets(targets, max_size=2),
        st.none() | st.just("no"),
    )
    markers = st.none() | st.builds(Marker, st.none() | names, st.integers(0, 9))
    return Observation(
        domain=draw(st.sampled_from(["vm", "other"])),
        active=draw(st.booleans()),
        disks=disks,
        history=history,
        record=draw(
            st.builds(
                DomainRecord, st.sampled_from(["", "vm"]), st.none() | names, st.integers(0, 9)
            )
        ),
        damaged=tuple(
            damage(name)
            for name in draw(st.sets(st.sampled_from(["domain.json", "intent.json", "c1.xml"])))
        ),
        aside=draw(st.frozensets(names, max_size=2)),
        maps=draw(st.dictionaries(st.just("0" * 64), st.just("it is damaged"))),
        intent=draw(
            st.none()
            | st.builds(
                Intent,
                st.sampled_from(["create", "delete"]),
                st.lists(names, max_size=2).map(tuple),
                st.just("libvirt"),
            )
        ),
        layers=draw(st.none() | layers.map(_layers_of)),
        blind=draw(st.dictionaries(targets, st.just("no file"), max_size=1)),
        held=draw(st.dictionaries(targets, st.just("/a"), max_size=1)),
        sized=draw(st.dictionaries(names, st.frozensets(targets), max_size=3)),
        known=tuple(draw(st.lists(known, max_size=5, unique_by=lambda each: each.name))),
        told=draw(st.booleans()),
        marker=draw(markers),
        no_marker=draw(st.none() | st.just("no")),
        job=draw(st.booleans()),
        leftovers=draw(st.sampled_from([(), ("/x",)])),
    )


@settings(max_examples=150)
@given(observations())
def test_anything_can_be_examined(seen: Observation) -> None:
    found = examine(seen)
    for finding in found:
        json.dumps(finding.json())
        assert finding.message
        assert finding.cure
        assert finding.code in CASES
        if finding.harmless:
            assert finding.action is None
    # Nothing that is not recorded as ours is ever removed without being told to.
    for finding in found:
        if isinstance(finding.action, RemoveBitmap) and not finding.action.foreign:
            name = finding.action.bitmap
            ours = name in seen.history.checkpoints or name in seen.aside
            assert ours or name == f"ckptmgr-{finding.action.disk}"


# --- cures, applied to what was observed -----------------------------------------------------


def cured(seen: Observation, action: Action) -> Observation:
    """What would be observed after a cure: a model of what repair does."""
    history = seen.history

    def lose(seen: Observation, target: str, name: str) -> Observation:
        return without(seen, name, target) if target in (seen.layers or {}) else seen

    match action:
        case Settle():
            return replace(seen, intent=None)
        case EndJob():
            return replace(seen, job=False)
        case ClearWorkspace():
            return replace(seen, leftovers=())
        case SetAside():
            path = Path(action.path)
            left = tuple(each for each in seen.damaged if each.path != path)
            aside = {path.stem} if path.suffix == ".xml" else set()
            return replace(seen, damaged=left, aside=seen.aside | aside)
        case SetCurrent() | GoBack():
            generation = seen.record.generation + 1
            marker = None if action.checkpoint is None else Marker(action.checkpoint, generation)
            return replace(
                seen,
                history=replace(history, current=action.checkpoint),
                record=DomainRecord(seen.domain, action.checkpoint, generation),
                marker=marker,
                no_marker=None,
            )
        case MarkBroken():
            state = {"state": State.BROKEN, "reason": action.reason}
            history = recorded_as(history, action.checkpoint, action.disk, **state)
            seen = lose(replace(seen, history=history), action.disk, action.checkpoint)
            return _shown_again(seen, action.checkpoint)
        case MarkArchived():
            history = recorded_as(history, action.checkpoint, action.disk, state=State.ARCHIVED)
            seen = lose(replace(seen, history=history), action.disk, action.checkpoint)
            return _shown_again(seen, action.checkpoint)
        case MarkUnknown():
            recorded = history.get(action.checkpoint).disk(action.disk)
            assert recorded is not None
            assert recorded.interval is not None
            interval = Interval(recorded.interval.since, None, action.reason)
            history = recorded_as(history, action.checkpoint, action.disk, interval=interval)
            return replace(seen, history=history)
        case RemoveBitmap():
            return lose(seen, action.disk, action.bitmap)
        case Redefine():
            return _shown_again(seen, action.checkpoint)
        case Forget():
            return _forgotten(seen, action.checkpoint)
        case Adopt():
            taken = tuple(
                each.name
                for each in seen.known
                if each.name not in history.checkpoints and each.refused is None
            )
            for name in taken:
                seen = _forgotten(seen, name)  # or taken over: then it is not libvirt's alone
            return seen


def _forgotten(seen: Observation, name: str) -> Observation:
    """libvirt gives the children of what is deleted its parent."""
    above = next((each.parent for each in seen.known if each.name == name), None)
    known = (
        replace(each, parent=above) if each.parent == name else each
        for each in seen.known
        if each.name != name
    )
    return replace(seen, known=tuple(known))


def _shown_again(seen: Observation, name: str) -> Observation:
    if not seen.told:
        return seen
    shown = shown_disks(seen.history.get(name))
    if not shown:
        return _forgotten(seen, name)
    names = {each.name for each in seen.known}
    above = seen.history.parent(name)
    while above is not None and above not in names:
        above = seen.history.parent(above)
    others = tuple(each for each in seen.known if each.name != name)
    return replace(seen, known=(*others, Known(name, above, shown)))


@settings(max_examples=150)
@given(observations())
def test_the_cures_lead_to_where_nothing_is_left_to_cure(seen: Observation) -> None:
    """What remains needs a person, or is harmless; and there is no circle of cures."""
    for _ in range(60):
        wanted = [each for each in examine(seen) if each.curable(foreign=True)]
        if not wanted:
            break
        action = wanted[0].action
        assert action is not None
        seen = cured(seen, action)
    left = [finding for finding in examine(seen) if not finding.harmless]
    needs_a_person = {"unreadable-image", "image-in-use", "libvirt-only"}
    assert {finding.code for finding in left} <= needs_a_person


def test_findings_are_values() -> None:
    first, second = examine(CASES["missing-bitmap"].seen), examine(CASES["missing-bitmap"].seen)
    assert first == second
    assert len({*first, *second}) == 1
    assert isinstance(first[0], Finding)
