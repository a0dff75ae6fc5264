from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.checkpoint import Checkpoint, CheckpointDisk, EngineName, Interval, State
from ckptmgr.errors import CheckpointExists, NoCheckpoint
from ckptmgr.history import NOT_JOINED, Deletion, History, Join, Path

from .strategies import DISKS, Model, models


def checkpoint(name: str, parent: str | None = None, created: int = 0, **since: str) -> Checkpoint:
    """A checkpoint that tracks vda, and whose interval since `vda` has the map ``>name``."""
    interval = Interval(since["vda"], f">{name}") if "vda" in since else None
    disk = CheckpointDisk("vda", bitmap=name, state=State.RECORDING, interval=interval)
    return Checkpoint(name, created, parent, EngineName.LIBVIRT, (disk,))


def line(*names: str) -> History:
    """A history without branches."""
    history = History()
    for name in names:
        above = history.current
        since = {} if above is None else {"vda": above}
        history = history.add(checkpoint(name, above, len(history.checkpoints), **since))
    return history


def untracked(point: Checkpoint) -> Checkpoint:
    return replace(point, disks=(CheckpointDisk("vda", reason="left out"),))


#       a
#     /   \
#    b     d
#    |    / \
#    c   e   f        g (its parent lost)
TREE = History(
    {
        point.name: point
        for point in (
            checkpoint("g", "lost", 9),
            checkpoint("f", "d", 5, vda="d"),
            checkpoint("e", "d", 6, vda="d"),
            checkpoint("d", "a", 1, vda="a"),
            checkpoint("c", "b", 3, vda="b"),
            checkpoint("b", "a", 2, vda="a"),
            checkpoint("a"),
        )
    },
    "c",
)


# --- relations -------------------------------------------------------------------------------


def test_relations_of_a_tree_with_branches() -> None:
    assert TREE.roots() == ("a", "g")
    assert TREE.children("a") == ("d", "b")
    assert TREE.children("d") == ("f", "e")
    assert TREE.leaves() == ("f", "e", "c", "g")
    assert TREE.topological() == ("a", "d", "f", "e", "b", "c", "g")
    assert TREE.ancestors("c") == ("b", "a")
    assert TREE.descendants("d") == ("f", "e")
    assert TREE.descendants("a") == ("d", "f", "e", "b", "c")
    assert TREE.parent("c") == "b"
    assert TREE.current == "c"
    assert TREE.has_current


def test_the_newest_is_the_last_of_its_line_also_if_the_clock_was_put_back_on_it() -> None:
    assert TREE.newest() == "g"
    points = (
        checkpoint("a", None, 1),
        checkpoint("b", "a", 5),
        checkpoint("c", "b", 2),
        checkpoint("d", "a", 3),  # of the branch that was left
    )
    assert History({point.name: point for point in points}).newest() == "c"
    assert History().newest() is None


def test_siblings_of_the_same_second_are_ordered_by_name() -> None:
    points = [checkpoint(name, created=7) for name in ("c", "a", "b")]
    assert History({point.name: point for point in points}).roots() == ("a", "b", "c")


def test_a_checkpoint_whose_parent_is_lost_is_a_root_and_keeps_its_parents_name() -> None:
    assert TREE.parent("g") is None
    assert TREE.get("g").parent == "lost"
    assert TREE.circular == ()


def test_an_empty_history_has_nothing() -> None:
    history = History()
    assert history.roots() == history.leaves() == history.topological() == ()
    assert not history.has_current


def test_checkpoints_that_are_not_there_are_named() -> None:
    for call in (TREE.get, TREE.parent, TREE.children, TREE.ancestors, TREE.descendants):
        with pytest.raises(NoCheckpoint, match="nowhere"):
            call("nowhere")
    with pytest.raises(NoCheckpoint, match="nowhere"):
        TREE.path("vda", "a", "nowhere")
    with pytest.raises(NoCheckpoint, match="nowhere"):
        TREE.deletion(["a", "nowhere"])
    with pytest.raises(NoCheckpoint, match="nowhere"):
        TREE.replace(checkpoint("nowhere"))


def test_a_current_checkpoint_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="lost"):
        History({}, "lost")


def test_adding_makes_current_or_does_not_and_leaves_the_old_history_alone() -> None:
    old = line("a", "b")
    assert old.add(checkpoint("c", "b")).current == "c"
    assert old.add(checkpoint("c", "b"), make_current=False).current == "b"
    assert set(old.checkpoints) == {"a", "b"}
    with pytest.raises(CheckpointExists, match="b"):
        old.add(checkpoint("b"))


def test_replacing_changes_the_record_and_not_the_current_one() -> None:
    history = line("a", "b").replace(replace(checkpoint("a"), description="new"))
    assert history.get("a").description == "new"
    assert history.current == "b"


def test_damaged_parents_that_form_a_circle_end_every_walk() -> None:
    history = History(
        {
            point.name: point
            for point in (
                checkpoint("a", "c"),
                checkpoint("b", "a"),
                checkpoint("c", "b"),
                checkpoint("tail", "a"),
                checkpoint("self", "self"),
            )
        }
    )
    assert set(history.circular) == {"a", "b", "c", "self"}
    assert set(history.roots()) == {"a", "b", "c", "self"}
    assert set(history.topological()) == set(history.checkpoints)
    assert history.ancestors("tail") == ("a",)
    assert history.descendants("b") == ()
    remains = history.deletion(["a"]).history
    assert remains.ancestors("tail") in ((), ("c",), ("c", "b"), ("b",))
    assert set(remains.topological()) == {"b", "c", "tail", "self"}


def test_damaged_intervals_that_form_a_circle_end_every_walk() -> None:
    history = History(
        {
            "a": checkpoint("a", None, vda="b"),
            "b": checkpoint("b", "a", vda="a"),
            "c": checkpoint("c"),
        }
    )
    assert history.path("vda", "a", "c").broken is not None
    assert history.path("vda", "a", "a") == Path()
    disk = history.deletion(["a"]).changed[0].disk("vda")
    assert disk is not None
    assert disk.interval is None or disk.interval.map is None


def test_a_long_line_is_walked() -> None:
    history = line(*(f"c{number}" for number in range(3000)))
    assert len(history.ancestors("c2999")) == 2999
    assert len(history.descendants("c0")) == 2999
    assert len(history.path("vda", "c0", "c2999").intervals) == 2999


@given(models())
def test_topological_order_has_parents_first_and_everything_once(model: Model) -> None:
    history = model.history
    order = history.topological()
    assert sorted(order) == sorted(history.checkpoints)
    for name in order:
        parent = history.parent(name)
        assert parent is None or order.index(parent) < order.index(name)
        assert (name in history.children(parent)) if parent else (name in history.roots())
        assert set(history.descendants(name)) == {
            other for other in order if name in history.ancestors(other)
        }


# --- paths -----------------------------------------------------------------------------------


def ends(path: Path) -> list[str]:
    return [name for name, _ in path.intervals]


def test_a_path_along_one_line_has_the_intervals_between() -> None:
    history = line("a", "b", "c", "d")
    assert ends(history.path("vda", "a", "c")) == ["b", "c"]
    assert ends(history.path("vda", "c", "a")) == ["c", "b"]
    assert history.path("vda", "b", "b") == Path((), None)


def test_a_path_across_a_fork_goes_up_and_down_again() -> None:
    assert ends(TREE.path("vda", "c", "f")) == ["c", "b", "d", "f"]
    assert ends(TREE.path("vda", "e", "f")) == ["e", "f"]


def test_a_checkpoint_that_left_the_disk_out_costs_nothing() -> None:
    history = line("a").add(untracked(checkpoint("b", "a"))).add(checkpoint("c", "b", vda="a"))
    assert ends(history.path("vda", "a", "c")) == ["c"]
    assert history.tracker("vda", "b") == "a"
    assert history.tracker("vda", "c") == "c"


def test_a_checkpoint_that_does_not_track_the_disk_is_no_end_of_a_path() -> None:
    history = line("a").add(untracked(checkpoint("b", "a")))
    assert "b does not track vda" in (history.path("vda", "a", "b").broken or "")
    assert "b does not track vda" in (history.path("vda", "b", "a").broken or "")
    assert "a does not track vdz" in (history.path("vdz", "a", "a").broken or "")
    assert history.tracker("vdz", "b") is None


def test_an_unknown_interval_breaks_the_path_and_says_why() -> None:
    history = line("a", "b", "c")
    lost = CheckpointDisk(
        "vda", bitmap="b", state=State.RECORDING, interval=Interval("a", None, "QEMU crashed")
    )
    history = history.replace(replace(history.get("b"), disks=(lost,)))
    broken = history.path("vda", "a", "c").broken
    assert broken == "what changed on vda from a to b is unknown: QEMU crashed"
    assert history.path("vda", "b", "c").broken is None


def test_histories_without_a_link_are_told_apart() -> None:
    path = TREE.path("vda", "c", "g")
    assert path.broken is not None
    assert "a and g" in path.broken


def test_the_loss_of_a_checkpoint_between_does_not_cost_its_childrens_link() -> None:
    # The intervals of b and d both start at a, whose file is lost: what they say still holds.
    points = {name: point for name, point in TREE.checkpoints.items() if name != "a"}
    path = History(points).path("vda", "c", "f")
    assert ends(path) == ["c", "b", "d", "f"]
    assert path.broken is None


# --- deletion --------------------------------------------------------------------------------


def after(model: Model, deletion: Deletion) -> Model:
    """The model when the joins were computed and the changes recorded."""
    maps = dict(model.maps)
    digests = {}
    for join in deletion.joins:
        digests[join] = f"join {len(maps)}"
        maps[digests[join]] = frozenset().union(*(maps[digest] for digest in join.maps))
    history = deletion.history
    for point in deletion.settled(digests):
        history = history.replace(point)
    return Model(history, model.writes, maps)


def answer(model: Model, disk: str, start: str, end: str) -> frozenset[int] | None:
    """What changed, as the history says; None: unknown."""
    path = model.history.path(disk, start, end)
    if path.broken is not None:
        return None
    return frozenset().union(*(model.maps[part.map] for _, part in path.intervals if part.map))


def truth(model: Model, disk: str, start: str, end: str) -> frozenset[int]:
    """What was written on the edges between two checkpoints of the same tree."""
    up = [start, *model.history.ancestors(start)]
    down = [end, *model.history.ancestors(end)]
    return frozenset().union(
        *(model.writes[name, disk] for name in set(up).symmetric_difference(down))
    )


def lines_up(model: Model, disk: str, name: str) -> list[str]:
    """`name` and the trackers of `disk` above it that its intervals lead to."""
    found = [name]
    while (recorded := model.history.get(found[-1]).disk(disk)) and recorded.interval:
        found.append(recorded.interval.since)
    return found


def pairs(model: Model) -> list[tuple[str, str, str]]:
    """Every disk with every two checkpoints that track it."""
    history = model.history
    return [
        (disk, start, end)
        for disk, start, end in product(DISKS, history.checkpoints, history.checkpoints)
        if history.tracks(disk, start) and history.tracks(disk, end)
    ]


@given(models())
def test_every_path_covers_all_that_was_written_and_on_one_line_nothing_else(model: Model) -> None:
    for disk, start, end in pairs(model):
        said = answer(model, disk, start, end)
        if said is None:
            assert not set(lines_up(model, disk, start)) & set(lines_up(model, disk, end))
            continue
        assert said >= truth(model, disk, start, end)
        if end in lines_up(model, disk, start) or start in lines_up(model, disk, end):
            assert said == truth(model, disk, start, end)


@given(models(), st.data())
def test_deletions_change_no_answer_between_the_survivors(
    model: Model, data: st.DataObject
) -> None:
    now = model
    while now.history.checkpoints and data.draw(st.booleans() | st.just(True)):
        names = data.draw(st.sets(st.sampled_from(sorted(now.history.checkpoints)), min_size=1))
        before, now = now, after(now, now.history.deletion(names))
        for disk, start, end in pairs(now):
            up, down = lines_up(now, disk, start), lines_up(now, disk, end)
            said = answer(now, disk, start, end)
            common = [name for name in up if name in down]
            if not common:
                assert said is None
                continue
            # As far as the nearest survivor on both lines, the answer is the original one.
            assert said == answer(model, disk, start, common[0]) | answer(
                model, disk, common[0], end
            )
            assert said >= truth(model, disk, start, end)
            if start == common[0] or end == common[0]:
                assert said == truth(model, disk, start, end) == answer(before, disk, start, end)


@given(models(unknown=True), st.data())
def test_an_unknown_interval_never_becomes_a_known_one(model: Model, data: st.DataObject) -> None:
    names = data.draw(st.sets(st.sampled_from(sorted(model.history.checkpoints))))
    now = after(model, model.history.deletion(names))
    for disk, start, end in pairs(now):
        said = answer(now, disk, start, end)
        was = answer(model, disk, start, end)
        if was is None:
            assert said is None
        elif said is not None:
            assert said >= was


@given(models(), st.data())
def test_deletion_keeps_the_survivors_in_their_order_of_descent(
    model: Model, data: st.DataObject
) -> None:
    history = model.history
    current = data.draw(st.sampled_from([None, *sorted(history.checkpoints)]))
    history = History(history.checkpoints, current)
    names = data.draw(st.sets(st.sampled_from(sorted(history.checkpoints))))
    deletion = history.deletion(names)
    now = deletion.history
    assert set(deletion.removed) == names
    for above, below in product(deletion.removed, repeat=2):
        if above in history.ancestors(below):
            assert deletion.removed.index(below) < deletion.removed.index(above)
    for name in now.checkpoints:
        expected = [above for above in history.ancestors(name) if above not in names]
        assert list(now.ancestors(name)) == expected
        assert now.get(name).parent == (expected[0] if expected else None)
    line = [] if current is None else [current, *history.ancestors(current)]
    left = [name for name in line if name not in names]
    assert deletion.current == now.current == (left[0] if left else None)
    unchanged = now.checkpoints.keys() - {point.name for point in deletion.changed}
    assert all(now.get(name) == history.get(name) for name in unchanged)


def test_deleting_the_middle_joins_its_interval_into_the_next() -> None:
    deletion = line("a", "b", "c").deletion(["b"])
    join = Join("c", "vda", (">c", ">b"))
    assert deletion.joins == (join,)
    (changed,) = deletion.settled({join: "joined"})
    assert changed.parent == "a"
    assert changed.disks[0].interval == Interval("a", "joined")


def test_a_join_that_is_not_made_leaves_the_interval_unknown_not_clean() -> None:
    deletion = line("a", "b", "c").deletion(["b"])
    for changed in (deletion.changed[0], deletion.settled({})[0]):
        assert changed.disks[0].interval == Interval("a", None, NOT_JOINED)


def test_deleting_a_root_leaves_its_children_without_an_interval() -> None:
    deletion = line("a", "b", "c").deletion(["a"])
    assert deletion.joins == ()
    (changed,) = deletion.changed
    assert changed.parent is None
    assert changed.disks[0].interval is None


def test_deleting_a_leaf_changes_nothing_but_the_current_checkpoint() -> None:
    deletion = line("a", "b", "c").deletion(["c"])
    assert deletion.changed == deletion.joins == ()
    assert deletion.current == "b"


def test_deleting_a_fork_joins_its_interval_into_every_branch() -> None:
    deletion = TREE.deletion(["d"])
    assert deletion.joins == (Join("f", "vda", (">f", ">d")), Join("e", "vda", (">e", ">d")))
    assert {point.parent for point in deletion.changed} == {"a"}


def test_deleting_several_in_a_row_joins_all_of_them() -> None:
    deletion = line("a", "b", "c", "d").deletion(["c", "b"])
    assert deletion.joins == (Join("d", "vda", (">d", ">c", ">b")),)
    assert deletion.removed == ("c", "b")


def test_equal_maps_need_no_join() -> None:
    history = line("a", "b", "c")
    disk = replace(history.get("c").disks[0], interval=Interval("b", ">b"))
    history = history.replace(replace(history.get("c"), disks=(disk,)))
    deletion = history.deletion(["b"])
    assert deletion.joins == ()
    assert deletion.changed[0].disks[0].interval == Interval("a", ">b")


def test_deleting_everything_leaves_nothing() -> None:
    deletion = TREE.deletion(TREE.checkpoints)
    assert deletion.current is None
    assert deletion.changed == ()
    assert not deletion.history.checkpoints


def test_deleting_below_a_lost_parent_keeps_the_name_of_what_was_lost() -> None:
    history = TREE.add(checkpoint("h", "g", vda="g"))
    assert history.deletion(["g"]).changed[0].parent == "lost"
