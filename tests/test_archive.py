"""Which bitmaps archive lets go of: never one that alone knows something."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.checkpoint import Checkpoint, CheckpointDisk, EngineName, Interval, State, archived
from ckptmgr.domain.disk import Disk, Image
from ckptmgr.errors import OperationFailed
from ckptmgr.history import History
from ckptmgr.operation.archive import Choice, choose
from ckptmgr.operation.deletion import check_recorder
from ckptmgr.operation.sources import open_ended

from .strategies import DISKS, Model, models

NOW = tuple(
    Disk(target, "virtio", chain=(Image("file", f"/img/{target}"),), size=1) for target in DISKS
)


def line(length: int, *disks: str, unknown: int | None = None) -> History:
    """c0, c1, …, each tracking `disks`; the interval that c<unknown> ends is unknown."""
    history = History()
    for number in range(length):
        interval = None
        if number:
            digest = None if number == unknown else f"{number:064x}"
            interval = Interval(f"c{number - 1}", digest, "lost" if digest is None else None)
        name = f"c{number}"
        tracked = tuple(
            CheckpointDisk(disk, name, state=State.RECORDING, interval=interval)
            for disk in disks or ("vda",)
        )
        parent = f"c{number - 1}" if number else None
        history = history.add(Checkpoint(name, number, parent, EngineName.LIBVIRT, tracked))
    return history


def marked(history: History, name: str, disk: str, state: State) -> History:
    checkpoint = history.get(name)
    disks = tuple(
        replace(each, state=state) if each.name == disk else each for each in checkpoint.disks
    )
    return history.replace(replace(checkpoint, disks=disks))


def done(history: History, choice: Choice) -> History:
    for name, targets in choice.bitmaps.items():
        history = history.replace(archived(history.get(name), targets))
    return history


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_the_newest_of_each_disk_stay(keep: int) -> None:
    choice = choose(line(4, "vda", "vdb"), keep)
    assert choice.bitmaps == {f"c{number}": ("vda", "vdb") for number in range(4 - keep)}
    assert choice.notes == ()


def test_disks_are_counted_one_by_one() -> None:
    history = line(3, "vda", "vdb")
    only_vda = CheckpointDisk("vda", "c3", state=State.RECORDING, interval=Interval("c2", "3" * 64))
    left_out = CheckpointDisk("vdb", reason="left out")
    history = history.add(Checkpoint("c3", 3, "c2", EngineName.LIBVIRT, (only_vda, left_out)))
    assert choose(history, 1).bitmaps == {
        "c0": ("vda", "vdb"),
        "c1": ("vda", "vdb"),
        "c2": ("vda",),
    }


def test_what_is_archived_already_is_neither_counted_nor_taken_again() -> None:
    history = line(4)
    once = done(history, choose(history, 2))
    assert choose(once, 2).bitmaps == {}
    assert choose(once, 1).bitmaps == {"c2": ("vda",)}


def test_a_bitmap_before_an_unknown_interval_alone_knows_what_changed_since() -> None:
    choice = choose(line(5, unknown=2), 1)
    assert choice.bitmaps == {"c2": ("vda",), "c3": ("vda",)}
    assert len(choice.notes) == 2
    assert "the bitmap of c0 on vda stays" in choice.notes[0]
    assert "c1 to c2 is unknown: lost" in choice.notes[0]


def test_where_the_newest_bitmap_is_broken_the_one_before_is_the_anchor() -> None:
    history = marked(line(4), "c3", "vda", State.BROKEN)
    choice = choose(history, 1)
    assert choice.anchors == {"vda": "c2"}
    assert choice.bitmaps == {"c0": ("vda",), "c1": ("vda",)}


def test_a_bitmap_that_is_recorded_and_gone_is_no_anchor() -> None:
    choice = choose(line(4), 1, frozenset({("c3", "vda"), ("c2", "vda")}))
    assert choice.anchors == {"vda": "c1"}
    assert choice.bitmaps == {"c0": ("vda",)}


def test_without_a_current_checkpoint_everything_stays() -> None:
    history = replace(line(3), current=None)
    choice = choose(history, 1)
    assert choice.bitmaps == {}
    assert len(choice.notes) == 3


def test_bitmaps_of_abandoned_branches_go() -> None:
    history = line(3)
    history = replace(history, current="c1")
    branch = CheckpointDisk("vda", "d", state=State.RECORDING, interval=Interval("c1", "d" * 64))
    history = history.add(Checkpoint("d", 9, "c1", EngineName.LIBVIRT, (branch,)))
    assert choose(history, 1).bitmaps == {"c0": ("vda",), "c1": ("vda",), "c2": ("vda",)}


def known_since(history: History, start: str, disk: str) -> bool:
    return open_ended(history, disk, start, NOW).broken is None


def test_a_bitmap_that_only_the_monitor_reads_is_not_said_to_be_broken() -> None:
    history = line(2)
    volatile = tuple(replace(each, persistent=False) for each in history.get("c1").disks)
    history = history.replace(replace(history.get("c1"), disks=volatile))
    source = open_ended(history, "vda", "c1", NOW, frozenset({"c0", "c1"}))
    assert "--engine monitor" in (source.broken or "")
    assert "missing" in (
        open_ended(line(2), "vda", "c1", NOW, frozenset({"c0", "c1"})).broken or ""
    )


@given(models(unknown=True), st.integers(1, 3), st.data())
def test_nothing_that_could_be_told_before_cannot_be_told_afterwards(
    model: Model, keep: int, data: st.DataObject
) -> None:
    history = model.history
    for name in list(history.checkpoints):
        for disk in DISKS:
            if history.tracks(disk, name) and not data.draw(st.integers(0, 5)):
                state = data.draw(st.sampled_from([State.BROKEN, State.ARCHIVED]))
                history = marked(history, name, disk, state)
    if data.draw(st.booleans()):
        history = replace(history, current=data.draw(st.sampled_from(list(history.checkpoints))))
    after = done(history, choose(history, keep))
    assert history.current is not None
    on_line = (history.current, *history.ancestors(history.current))
    for name in history.checkpoints:
        for disk in DISKS:
            if name in on_line and known_since(history, name, disk):
                assert known_since(after, name, disk), (name, disk)
            for other in history.checkpoints:
                assert after.path(disk, name, other) == history.path(disk, name, other)
    for disk in DISKS:
        left = [
            name
            for name in on_line
            if (found := after.get(name).disk(disk)) and found.state is State.RECORDING
        ]
        # Those beyond `keep` stay for a reason that is told.
        stay = {note.split(" of ")[1].split(" on ")[0] for note in choose(history, keep).notes}
        assert len([name for name in left if name not in stay]) <= keep


# --- what is refused afterwards --------------------------------------------------------------


def test_the_only_bitmap_that_records_is_not_deleted() -> None:
    history = done(line(3), choose(line(3), 1))
    with pytest.raises(OperationFailed, match=r"c2 cannot be deleted.*vda.*since c1") as caught:
        check_recorder(history, history.deletion(["c2"]))
    assert "create another checkpoint first" in str(caught.value.hint)


def test_after_another_create_it_can_be() -> None:
    history = done(line(4), choose(line(4), 1))
    check_recorder(history, history.deletion(["c2"]))
    check_recorder(history, history.deletion(["c0", "c1", "c2", "c3"]))


def test_a_checkpoint_that_is_not_current_may_be_the_one_that_records_a_disk() -> None:
    history = line(3, "vda", "vdb")
    only_vda = CheckpointDisk("vda", "c3", state=State.RECORDING, interval=Interval("c2", "3" * 64))
    history = history.add(Checkpoint("c3", 3, "c2", EngineName.LIBVIRT, (only_vda,)))
    history = done(history, choose(history, 1))
    with pytest.raises(OperationFailed, match=r"c2 cannot be deleted: its bitmap on vdb"):
        check_recorder(history, history.deletion(["c2"]))
    check_recorder(history, history.deletion(["c1"]))


def test_deleting_all_that_comes_after_an_archived_one_says_what_to_do() -> None:
    history = done(line(4), choose(line(4), 1))
    with pytest.raises(OperationFailed) as caught:
        check_recorder(history, history.deletion(history.descendants("c1")))
    assert "delete c1 too" in str(caught.value.hint)


def test_a_bitmap_that_was_broken_anyway_is_no_reason_to_refuse() -> None:
    history = marked(line(2), "c0", "vda", State.ARCHIVED)
    history = marked(history, "c1", "vda", State.BROKEN)
    check_recorder(history, history.deletion(["c1"]))
