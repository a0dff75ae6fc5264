"""check: what each rule leaves alone, and what it tells apart."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ckptmgr.checkpoint import Checkpoint, EngineName, Interval, State
from ckptmgr.consistency import (
    GoBack,
    Known,
    MarkArchived,
    MarkBroken,
    Observation,
    RemoveBitmap,
    examine,
)
from ckptmgr.domain.disk import DiskLayers
from ckptmgr.domain.marker import Marker
from ckptmgr.store import DomainRecord, Intent

from .mismatches import CASES
from .observations import (
    C3,
    FITS,
    GONE,
    adding,
    bitmap,
    damage,
    disk,
    layer,
    line,
    projected,
    recorded_as,
    tracked,
    without,
    without_any,
)
from .strategies import DISKS


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
    seen = without_any(replace(seen, record=replace(seen.record, left="c2")))
    (found,) = examine(seen)
    assert (found.code, found.action) == ("reverted", GoBack("c1"))
    assert "the line up to c2 was kept" in found.message


def test_a_definition_that_is_old_while_the_current_bitmaps_record_is_no_revert() -> None:
    assert codes(replace(FITS, marker=Marker("c1", 2))) == ["wrong-current"]


def test_a_revert_to_before_the_first_checkpoint_begins_a_new_root() -> None:
    (found,) = examine(replace(without_any(FITS), marker=None))
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
