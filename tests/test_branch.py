"""Alternate histories: whatever is written, snapshotted, reverted and deleted, what differs between
two checkpoints lies inside what the history says, or the history says that it does not know.

The model keeps the true content of every checkpoint and snapshot; the history is kept by the pure
functions that the use cases stand on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pyroaring import BitMap64

from ckptmgr.branch import (
    Whereabouts,
    agrees,
    inherit,
    left_unobserved,
    off_line,
    resolve,
    reverted_interval,
    ways_out,
    whereabouts,
    written_since,
)
from ckptmgr.checkpoint import (
    Checkpoint,
    CheckpointDisk,
    EngineName,
    Interval,
    State,
    archived,
)
from ckptmgr.dirtymap import DirtyMap, union
from ckptmgr.history import History
from ckptmgr.marker import Marker
from ckptmgr.store import DomainRecord, DomainStore
from ckptmgr.tails import join_maps, left_at

DISKS = ("vda", "vdb")
GRANULARITY = 512
COUNT = 12


def dirty(granules: frozenset[int]) -> DirtyMap:
    return DirtyMap(GRANULARITY, GRANULARITY * COUNT, BitMap64(granules))


class Maps:
    """A store's maps, in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, DirtyMap] = {}

    def save_map(self, found: DirtyMap) -> str:
        digest = hashlib.sha256(found.serialize()).hexdigest()
        self.kept[digest] = found
        return digest

    def read_map(self, digest: str) -> DirtyMap:
        return self.kept[digest]


@dataclass(frozen=True)
class Snapshot:
    content: dict[str, tuple[int, ...]]
    marker: str | None


@dataclass
class Domain:
    """A domain with its bitmaps, and its history as the use cases keep it.

    content -- by disk, of each granule the number of its last write
    bitmaps -- (checkpoint, disk) -> granules written since, of those that record
    """

    history: History = field(default_factory=History)
    record: DomainRecord = field(default_factory=lambda: DomainRecord("vm"))
    maps: Maps = field(default_factory=Maps)
    content: dict[str, tuple[int, ...]] = field(
        default_factory=lambda: dict.fromkeys(DISKS, (0,) * COUNT)
    )
    bitmaps: dict[tuple[str, str], frozenset[int]] = field(default_factory=dict)
    snapshots: list[Snapshot] = field(default_factory=list)
    truth: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    writes: int = 0
    made: int = 0
    lost: bool = False

    @property
    def store(self) -> DomainStore:
        return cast(DomainStore, self.maps)

    def write(self, disk: str, granules: frozenset[int]) -> None:
        self.writes += 1
        old = self.content[disk]
        self.content[disk] = tuple(
            self.writes if place in granules else value for place, value in enumerate(old)
        )
        for (name, target), written in self.bitmaps.items():
            if target == disk:
                self.bitmaps[name, target] = written | granules

    def _record(self, parent: str | None, tracked: set[str], intervals: dict[str, Any]) -> str:
        name = f"c{self.made}"
        self.made += 1
        disks = tuple(
            CheckpointDisk(disk, bitmap=name, state=State.RECORDING, interval=intervals.get(disk))
            if disk in tracked
            else CheckpointDisk(disk)
            for disk in DISKS
        )
        checkpoint = Checkpoint(name, self.made, parent, EngineName.LIBVIRT, disks)
        self.history = replace(self.history, current=parent).add(checkpoint)
        self.truth[name] = dict(self.content)
        for disk in tracked:
            self.bitmaps[name, disk] = frozenset()
        return name

    def tail(self, disk: str) -> tuple[str, str | None] | None:
        """The open interval of a disk: since when, and its map if the bitmap records."""
        current = self.history.current
        since = None if current is None else self.history.tracker(disk, current)
        if since is None:
            return None
        written = self.bitmaps.get((since, disk))
        return since, None if written is None else self.maps.save_map(dirty(written))

    def checkpoint(self, tracked: set[str]) -> None:
        intervals = {}
        for disk in tracked:
            found = self.tail(disk)
            if found is not None:
                since, digest = found
                intervals[disk] = Interval(since, digest, None if digest else "not recorded")
        self._record(self.history.current, tracked, intervals)

    def snapshot(self) -> None:
        self.snapshots.append(Snapshot(dict(self.content), self.history.current))

    def _leave(self) -> dict[str, dict[str, str | None]]:
        tails: dict[str, dict[str, str | None]] = {}
        for disk in DISKS:
            found = self.tail(disk)
            if found is not None:
                tails.setdefault(found[0], {})[disk] = found[1]
        return tails

    def revert(self, number: int) -> None:
        """As ``snapshot revert`` does."""
        snapshot = self.snapshots[number]
        parent, _ = resolve(self.history, self.record.moved, snapshot.marker)
        tails = self._leave()
        intervals = {}
        for disk in DISKS if parent is not None else ():
            assert parent is not None
            ways = ways_out(self.history, self.record.tails, disk, parent)
            digest = None
            if ways is not None and ways.unknown is None:
                parts = list(ways.maps)
                if ways.live:
                    last = tails.get(ways.since, {}).get(disk)
                    parts = [] if last is None else [*parts, last]
                digest = join_maps(self.store, parts) if parts else None
            interval = reverted_interval(ways, digest)
            if interval is not None:
                intervals[disk] = interval
                if not self.lost:
                    assert interval.map is not None, interval
        self.record = left_at(self.store, self.record, tails)
        self._archive()
        self.content = dict(snapshot.content)
        self._record(parent, set(DISKS), intervals)

    def revert_unnoticed(self, number: int, written: dict[str, frozenset[int]]) -> None:
        """As another tool does, with writes before the next command notices."""
        snapshot = self.snapshots[number]
        self.content = dict(snapshot.content)
        self.bitmaps.clear()
        for disk, granules in written.items():
            self.write(disk, granules)
        self.lost = True
        target, _ = resolve(self.history, self.record.moved, snapshot.marker)
        tails = left_unobserved(self.history, self.record.tails)
        self.record = replace(self.record, tails=tails)
        self._archive()
        self.history = replace(self.history, current=target)

    def revert_by_hook(self, number: int, written: dict[str, frozenset[int]]) -> None:
        """As another tool does with the hook, which reads the bitmaps in time."""
        snapshot = self.snapshots[number]
        self.record = left_at(self.store, self.record, self._leave())
        target, _ = resolve(self.history, self.record.moved, snapshot.marker)
        self._archive()
        self.history = replace(self.history, current=target)
        self.content = dict(snapshot.content)
        for disk, granules in written.items():
            self.write(disk, granules)
        self.lost = True

    def _archive(self) -> None:
        self.bitmaps.clear()
        for checkpoint in self.history.checkpoints.values():
            self.history = self.history.replace(archived(checkpoint, DISKS))

    def can_delete(self, name: str) -> bool:
        """Whether the open interval stays known: check_recorder refuses the rest."""
        deletion = self.history.deletion((name,))
        for disk in DISKS:
            if self.history.current is None or deletion.current is None:
                continue
            recorder = self.history.tracker(disk, self.history.current)
            heir = deletion.history.tracker(disk, deletion.current)
            if recorder == name and heir is not None and (heir, disk) not in self.bitmaps:
                return False
        return True

    def delete(self, name: str) -> None:
        left = inherit(self.history, self.record.tails, name)
        tails = {point: dict(disks) for point, disks in self.record.tails.items() if point != name}
        for disk, (since, maps) in left.tails.items():
            digest = None if maps is None else join_maps(self.store, maps)
            tails.setdefault(since, {})[disk] = digest
        self.record = replace(
            self.record, tails=tails, moved={**self.record.moved, name: left.heir}
        )
        deletion = self.history.deletion((name,))
        joined = {
            join: self.maps.save_map(union(self.maps.read_map(digest) for digest in join.maps))
            for join in deletion.joins
        }
        self.history = deletion.history
        for checkpoint in deletion.settled(joined):
            self.history = self.history.replace(checkpoint)
        self.bitmaps = {key: value for key, value in self.bitmaps.items() if key[0] != name}
        del self.truth[name]

    # --- what the history says -----------------------------------------------------------------

    def said(self, disk: str, start: str, end: str) -> frozenset[int] | None:
        path = self.history.path(disk, start, end)
        if path.broken is not None:
            return None
        maps = [self.maps.read_map(each.map) for _, each in path.intervals if each.map is not None]
        return frozenset(granule for found in maps for granule in found.granules)


def differ(one: tuple[int, ...], other: tuple[int, ...]) -> frozenset[int]:
    return frozenset(place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)


granule_sets = st.frozensets(st.integers(0, COUNT - 1), min_size=1, max_size=3)
written = st.dictionaries(st.sampled_from(DISKS), granule_sets)
tracked_sets = st.sampled_from([{"vda", "vdb"}, {"vda", "vdb"}, {"vda"}, {"vdb"}])


class Alternatives(RuleBasedStateMachine):
    """Everything that happens to a domain, in any order."""

    @initialize()
    def begin(self) -> None:
        self.domain = Domain()

    @rule(disk=st.sampled_from(DISKS), granules=granule_sets)
    def write(self, disk: str, granules: frozenset[int]) -> None:
        self.domain.write(disk, granules)

    @rule(tracked=tracked_sets)
    def checkpoint(self, tracked: set[str]) -> None:
        self.domain.checkpoint(tracked)

    @rule()
    def snapshot(self) -> None:
        self.domain.snapshot()

    @precondition(lambda self: self.domain.snapshots)
    @rule(data=st.data())
    def revert(self, data: st.DataObject) -> None:
        self.domain.revert(data.draw(st.integers(0, len(self.domain.snapshots) - 1)))

    @precondition(lambda self: self.domain.snapshots and self.domain.writes > 4)
    @rule(data=st.data(), writes=written, hook=st.booleans())
    def revert_by_others(
        self, data: st.DataObject, writes: dict[str, frozenset[int]], hook: bool
    ) -> None:
        number = data.draw(st.integers(0, len(self.domain.snapshots) - 1))
        if hook:
            self.domain.revert_by_hook(number, writes)
        else:
            self.domain.revert_unnoticed(number, writes)

    @precondition(lambda self: self.domain.history.checkpoints)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.domain.history.checkpoints)))
        if self.domain.can_delete(name):
            self.domain.delete(name)

    @invariant()
    def what_differs_lies_inside_what_is_said(self) -> None:
        domain = self.domain
        names = list(domain.history.checkpoints)
        for disk in DISKS:
            tracked = [name for name in names if domain.history.tracks(disk, name)]
            for start in tracked:
                for end in tracked:
                    said = domain.said(disk, start, end)
                    if said is not None:
                        real = differ(domain.truth[start][disk], domain.truth[end][disk])
                        assert real <= said, (disk, start, end)

    @invariant()
    def the_open_interval_has_what_changed_since(self) -> None:
        domain = self.domain
        for (name, disk), recorded in domain.bitmaps.items():
            assert differ(domain.truth[name][disk], domain.content[disk]) <= recorded


TestAlternatives = Alternatives.TestCase
TestAlternatives.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


# --- single decisions -------------------------------------------------------------------------


def line(domain: Domain, *writes: frozenset[int]) -> None:
    for granules in writes:
        domain.checkpoint(set(DISKS))
        domain.write("vda", granules)


def test_two_reverts_to_one_snapshot_are_two_branches() -> None:
    domain = Domain()
    line(domain, frozenset({1}))
    domain.snapshot()
    domain.write("vda", frozenset({2}))
    domain.revert(0)
    domain.write("vda", frozenset({3}))
    domain.revert(0)
    assert domain.history.children("c0") == ("c1", "c2")
    assert domain.said("vda", "c1", "c2") == frozenset({1, 2})
    # 3 was written after c1 and left with it
    assert domain.record.tails["c1"]["vda"] is not None


def test_back_and_forth_between_an_older_and_a_younger_snapshot() -> None:
    domain = Domain()
    line(domain, frozenset({1}))
    domain.snapshot()
    line(domain, frozenset({2}))
    domain.snapshot()
    domain.write("vda", frozenset({3}))
    domain.revert(0)
    domain.revert(1)
    assert domain.history.parent("c3") == "c1"
    assert domain.said("vda", "c2", "c3") == frozenset({1, 2, 3})


def test_a_snapshot_older_than_the_first_checkpoint_begins_a_root() -> None:
    domain = Domain()
    domain.snapshot()
    line(domain, frozenset({1}))
    domain.revert(0)
    assert domain.history.parent("c1") is None
    assert domain.said("vda", "c0", "c1") is None


def test_a_deleted_checkpoint_s_snapshots_go_to_its_heir_with_what_was_written() -> None:
    domain = Domain()
    line(domain, frozenset({1}), frozenset({2}))
    domain.snapshot()
    line(domain, frozenset({3}))
    domain.delete("c1")
    domain.revert(0)
    assert domain.history.parent("c3") == "c0"
    said = domain.said("vda", "c0", "c3")
    assert said is not None
    assert said >= {1, 2}


def test_the_tail_of_a_deleted_checkpoint_goes_to_the_one_before() -> None:
    domain = Domain()
    line(domain, frozenset({1}))
    domain.snapshot()
    line(domain, frozenset({2}))
    domain.snapshot()
    domain.write("vda", frozenset({3}))
    domain.revert(0)
    domain.delete("c1")
    domain.revert(1)
    said = domain.said("vda", "c0", "c3")
    assert said is not None
    assert said >= {1, 2}


def test_a_line_left_unobserved_makes_a_revert_to_it_unknown() -> None:
    domain = Domain()
    line(domain, frozenset({1}))
    domain.snapshot()
    line(domain, frozenset({2}))
    domain.snapshot()
    domain.revert_unnoticed(0, {})
    ways = ways_out(domain.history, domain.record.tails, "vda", "c1")
    assert ways is not None
    assert ways.unknown == "the line that started at c1 was left unobserved"


def test_an_unknown_way_out_makes_a_revert_unknown_and_says_why() -> None:
    domain = Domain()
    line(domain, frozenset({1}))
    domain.snapshot()
    domain.revert_unnoticed(0, {"vda": frozenset({5})})
    domain.revert(0)
    assert domain.said("vda", "c0", "c1") is None
    recorded = domain.history.get("c1").disk("vda")
    assert recorded is not None
    assert recorded.interval is not None
    assert recorded.interval.reason


def test_names_that_were_moved_in_a_circle_or_forgotten_are_not_known() -> None:
    history = History()
    assert resolve(history, {}, None) == (None, True)
    assert resolve(history, {}, "c9") == (None, False)
    assert resolve(history, {"a": "b", "b": "a"}, "a") == (None, False)
    assert resolve(history, {"a": "b", "b": None}, "a") == (None, True)


def history_of(*names: str) -> History:
    history = History()
    for name in names:
        disks = (CheckpointDisk("vda", name, state=State.RECORDING),)
        history = history.add(
            Checkpoint(name, len(name), history.current, EngineName.LIBVIRT, disks)
        )
    return history


RECORD = DomainRecord("vm", "b", 4)


@pytest.mark.parametrize(
    ("marker", "recording", "found"),
    [
        (Marker("a", 2), False, Whereabouts("a", True)),
        (Marker("a", 2), True, Whereabouts("b", False)),
        (Marker("b", 2), False, Whereabouts("b", False)),
        (None, False, Whereabouts(None, True)),
        (None, True, Whereabouts("b", False)),
        (Marker("z", 2), False, Whereabouts(None, True, known=False)),
        (Marker("z", 9), True, Whereabouts("b", False)),
    ],
)
def test_where_a_domain_is_follows_from_its_marker_and_its_bitmaps(
    marker: Marker | None, recording: bool, found: Whereabouts
) -> None:
    history = history_of("a", "b")
    assert not agrees(marker, history, RECORD)
    assert whereabouts(marker, history, RECORD, lambda _: recording) == found


def test_a_marker_older_than_the_checkpoint_that_it_names_is_of_another_one() -> None:
    history = history_of("a", "b")
    history = history.replace(replace(history.get("b"), generation=3))
    for recording in (True, False):
        found = whereabouts(Marker("b", 2), history, RECORD, lambda _, is_so=recording: is_so)
        assert found == Whereabouts("b", True, newer=frozenset({"b"}))
    assert not whereabouts(Marker("b", 3), history, RECORD, lambda _: False).went_back
    # the definition alone is an old one
    assert not whereabouts(Marker("a", 2), history, RECORD, lambda _: True).went_back


def test_a_marker_agrees_by_name_and_generation() -> None:
    history = history_of("a", "b")
    assert agrees(Marker("b", 4), history, RECORD)
    assert not agrees(Marker("b", 3), history, RECORD)
    assert agrees(None, replace(history, current=None), replace(RECORD, current=None))
    assert agrees(Marker("a", 1), History(), RECORD)
    assert agrees(Marker("a", 1), history, DomainRecord())


def test_what_is_off_the_line_is_what_does_not_lead_to_the_current_one() -> None:
    history = history_of("a", "b")
    branch = Checkpoint(
        "c", 9, "a", EngineName.LIBVIRT, (CheckpointDisk("vda", "c", state=State.RECORDING),)
    )
    history = history.add(branch)
    assert off_line(history) == {"b": ("vda",)}
    assert off_line(replace(history, current=None)) == {"a": ("vda",), "b": ("vda",), "c": ("vda",)}
    gone = history.replace(archived(history.get("b"), ("vda",)))
    assert off_line(gone) == {}


def test_what_was_written_after_a_snapshot_is_what_was_on_top_then() -> None:
    def point(name: str, created: int, parent: str | None, image: str) -> Checkpoint:
        disks = (CheckpointDisk("vda", name, source=image, state=State.RECORDING),)
        return Checkpoint(name, created, parent, EngineName.LIBVIRT, disks)

    history = History()
    for checkpoint in (
        point("a", 5, None, "/base"),  # the clock may have been wrong
        point("b", 5, "a", "/over"),
        point("c", 5, "a", "/base"),
        point("d", 4, None, "/old"),
    ):
        history = history.add(checkpoint)
    assert written_since(history, "b", 5, ["/now"]) == {"/now", "/base"}
    assert written_since(history, "c", 5, []) == {"/over"}
    assert written_since(history, None, 6, ["/now"]) == {"/now"}
    # Made when the clock had been put back, perhaps after the snapshot.
    history = history.add(point("e", 1, "d", "/back"))
    assert written_since(history, "b", 5, []) == {"/base", "/back"}


def test_a_line_that_was_left_unobserved_makes_only_its_own_tails_unknown() -> None:
    history = history_of("a", "b")
    tails = {"a": {"vda": "0" * 64}}
    assert left_unobserved(history, tails) == {"a": {"vda": "0" * 64}, "b": {"vda": None}}
    assert left_unobserved(replace(history, current=None), tails) == tails
