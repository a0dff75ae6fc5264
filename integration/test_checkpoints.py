"""Checkpoints with each engine: differences are exact to the byte, before and after deletions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import ckptmgr
from integration.evidence import (
    DISKS,
    GRANULARITY,
    Timeline,
    bitmaps,
    domain_of,
    has_checkpoints,
    known,
    on_tops,
    told,
    unchanged,
    wipe,
)
from integration.stand import Machine, Stand

NAMES = tuple(f"c{number}" for number in range(5))


@dataclass
class Scene:
    """A machine, one engine, and a store that knows nothing yet."""

    engine: str
    machine: Machine
    store: Path
    domain: ckptmgr.Domain
    timeline: Timeline

    @property
    def tracked(self) -> set[str]:
        """Raw images have a bitmap only as long as QEMU keeps it in memory."""
        return set(GRANULARITY) - (set() if self.engine == "monitor" else {"vdc"})

    def create(self, name: str) -> ckptmgr.CheckpointView:
        view = self.domain.create(name)
        self.timeline.cut(name)
        return view

    def check(self, *names: str) -> None:
        """What is to be seen of the checkpoints that are left, and nothing of others."""
        self.timeline.check_pairs(self.domain, names, self.tracked)
        self.timeline.check(self.domain, names[0], None, self.tracked)
        assert bitmaps(self.machine) == on_tops(self.machine, self.tracked, *names)
        parents = dict(zip(names, (None, *names), strict=False))
        assert known(self.machine) == told(self.machine, parents)
        listed = self.domain.checkpoints(topological=True)
        assert {view.name: view.parent for view in listed.checkpoints} == parents
        assert listed.current == names[-1]


@pytest.fixture(scope="module", params=["libvirt", "monitor", "offline"])
def shared(request: pytest.FixtureRequest, local: Stand) -> Iterator[tuple[str, Machine]]:
    engine: str = request.param
    machine = Machine(local, DISKS, state="stopped" if engine == "offline" else "paused")
    yield engine, machine
    machine.destroy()


@pytest.fixture
def scene(shared: tuple[str, Machine], tmp_path: Path) -> Iterator[Scene]:
    engine, machine = shared
    store = tmp_path / "store"
    yield Scene(engine, machine, store, domain_of(machine, store, engine), Timeline(machine))
    wipe(machine)


def test_diff_is_what_was_written_for_every_pair_and_after_deletions(scene: Scene) -> None:
    for name in NAMES:
        scene.timeline.scatter()
        scene.create(name)
    scene.timeline.scatter()
    scene.timeline.check_all(scene.domain, NAMES, scene.tracked)
    scene.check(*NAMES)
    assert scene.domain.delete("c2") == ("c2",)  # in the middle
    scene.check("c0", "c1", "c3", "c4")
    assert scene.domain.delete("c0") == ("c0",)  # the root
    scene.check("c1", "c3", "c4")
    assert scene.domain.delete("c4") == ("c4",)  # the leaf, and current
    scene.check("c1", "c3")
    scene.timeline.scatter()
    scene.create("c5")
    scene.timeline.scatter()
    scene.check("c1", "c3", "c5")


def test_diff_is_the_same_in_both_directions_and_empty_to_itself(scene: Scene) -> None:
    scene.create("a")
    scene.timeline.write("vda", 65_000, 1000)
    scene.create("b")
    for start, end in (("a", "b"), ("b", "a")):
        (vda, *_) = scene.domain.diff(start, end).disks
        assert vda.extents() == [(0, 131_072)]
    for disk in scene.domain.diff("a", "a").disks:
        assert disk.known is (disk.name in scene.tracked)
        assert not disk.known or disk.extents() == []


def test_untracked_disks_have_the_reason_in_the_output(scene: Scene) -> None:
    view = scene.domain.create("a")
    disks = {disk.name: disk for disk in view.disks}
    assert {name for name, disk in disks.items() if disk.bitmap} == scene.tracked
    assert {name: disk.granularity for name, disk in disks.items() if disk.bitmap} == {
        name: GRANULARITY[name] for name in scene.tracked
    }
    raw = disks["vdc"]
    if scene.engine == "monitor":
        assert (raw.bitmap, raw.persistent, raw.state) == ("a", False, ckptmgr.State.RECORDING)
    else:
        assert raw.state is ckptmgr.State.NONE
        assert "raw" in str(raw.reason)
        # asked for by name, it is an error and not left out
        with (
            unchanged(scene.machine, scene.store),
            pytest.raises(ckptmgr.Unsupported, match=r"vdc.*raw") as caught,
        ):
            scene.domain.create("b", disks=[ckptmgr.DiskRequest("vdc")])
        assert "--engine monitor" in str(caught.value.hint)


@pytest.mark.each_release
def test_children_go_with_their_bitmaps(scene: Scene) -> None:
    for at, name in enumerate(NAMES):
        scene.create(name)
        scene.timeline.write("vda", at * 1_000_000, 1)
    assert scene.domain.delete("c2", children_only=True) == ("c3", "c4")
    scene.check("c0", "c1", "c2")
    assert scene.domain.delete("c1", children=True) == ("c1", "c2")
    scene.check("c0")
    assert scene.domain.delete("c0", children_only=True) == ()
    assert scene.domain.delete("c0", children=True) == ("c0",)
    assert bitmaps(scene.machine) == set()
    assert known(scene.machine) == {}
    assert scene.domain.checkpoints().checkpoints == ()
    assert not scene.domain.has_current()


@pytest.mark.each_release
def test_deleted_metadata_leaves_bitmaps_and_the_rest_exact(scene: Scene) -> None:
    for at, name in enumerate(NAMES[:3]):
        scene.create(name)
        scene.timeline.write("vdb", at * 1_000_000, 1)
    before = bitmaps(scene.machine)
    assert scene.domain.delete("c1", metadata=True) == ("c1",)
    assert bitmaps(scene.machine) == before
    assert known(scene.machine) == told(scene.machine, {"c0": None, "c2": "c0"})
    scene.timeline.check_all(scene.domain, ("c0", "c2"), scene.tracked)
    with pytest.raises(ckptmgr.NoCheckpoint):
        scene.domain.checkpoint("c1")
    # the orphan is not taken for a new checkpoint's bitmap, nor removed
    with unchanged(scene.machine, scene.store), pytest.raises(ckptmgr.CheckpointExists):
        scene.domain.create("c1")


def test_a_subset_of_disks_costs_the_others_nothing(scene: Scene) -> None:
    """Each disk's interval goes back to the last checkpoint that tracks that disk."""
    scene.create("c0")
    scene.timeline.scatter()
    scene.domain.create("c1", disks=[ckptmgr.DiskRequest("vda")])
    scene.timeline.cut("c1")
    scene.timeline.scatter()
    scene.domain.create("c2", disks=[ckptmgr.DiskRequest("vdb")])
    scene.timeline.cut("c2")
    scene.timeline.scatter()
    tracked = scene.tracked
    scene.timeline.check(scene.domain, "c0", None, tracked)
    scene.timeline.check(scene.domain, "c0", "c1", {"vda"})
    scene.timeline.check(scene.domain, "c0", "c2", {"vdb"})
    scene.domain.delete("c1")
    scene.timeline.check(scene.domain, "c0", None, tracked)
    assert bitmaps(scene.machine) == {
        *on_tops(scene.machine, tracked, "c0"),
        *on_tops(scene.machine, {"vdb"}, "c2"),
    }


def test_show_says_what_was_written_since(scene: Scene) -> None:
    scene.create("c0")
    scene.timeline.scatter()
    scene.create("c1")
    scene.timeline.scatter()
    for name in ("c0", "c1"):
        for disk in scene.domain.checkpoint(name, size=True).disks:
            if disk.name in scene.tracked:
                expected = scene.timeline.expected(disk.name, name, None, GRANULARITY[disk.name])
                assert disk.dirty_bytes == sum(length for _, length in expected)
                assert disk.state is ckptmgr.State.RECORDING


def test_dry_runs_tell_the_steps_and_change_nothing(scene: Scene) -> None:
    scene.create("c0")
    scene.timeline.scatter()
    scene.create("c1")
    document = scene.domain.document("c1")
    with unchanged(scene.machine, scene.store):
        assert scene.domain.plan_create("c2").steps
        assert scene.domain.plan_delete("c0", children=True).steps
        # the store is no part of a plan
        of_metadata = scene.domain.plan_delete("c0", metadata=True).steps
        assert bool(of_metadata) == has_checkpoints(scene.machine)
        assert scene.domain.plan_redefine(document) is not None
        assert scene.domain.plan_adopt().steps == ()
