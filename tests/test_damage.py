"""Random damage to any file of the store: a named finding, and no wrong answer elsewhere."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.checkpoint import Interval
from ckptmgr.consistency import Finding, examine
from ckptmgr.dirtymap import DirtyMap
from ckptmgr.domain.marker import Marker
from ckptmgr.errors import StoreDamaged
from ckptmgr.history import History
from ckptmgr.operation.examination import damaged_maps, read_intent
from ckptmgr.operation.session import lost_current, with_current
from ckptmgr.operation.sources import open_ended
from ckptmgr.store import DomainRecord, DomainStore, Intent, Store, files

from .observations import C3, disk, projected, recorded_as
from .strategies import DISKS

UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"
MARKER = Marker("c2", 3)


def dirty(*granules: int) -> DirtyMap:
    return DirtyMap.from_extents(65536, 1 << 20, [(each * 65536, 1) for each in granules])


MAPS = {
    ("c1", "vda"): dirty(1, 2),
    ("c1", "vdb"): dirty(3),
    ("c2", "vda"): dirty(4),
    ("c2", "vdb"): dirty(),
}
"""What was really written in each interval."""


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_fsync", lambda descriptor: None)
    monkeypatch.setattr(files, "_fsync_folder", lambda path: None)


def filled(folder: Path, *, intent: bool = False) -> DomainStore:
    """c0, c1, c2 of two disks, with their maps."""
    store = Store(folder / "store").domain(UUID)
    history = C3
    with store.lock(0):
        for (name, target), written in MAPS.items():
            recorded = history.get(name).disk(target)
            assert recorded is not None
            assert recorded.interval is not None
            interval = Interval(recorded.interval.since, store.save_map(written))
            history = recorded_as(history, name, target, interval=interval)
        for name in history.topological():
            store.save_checkpoint(history.get(name))
        store.save_record(DomainRecord("vm", "c2", 3))
        if intent:
            store.write_intent(Intent("adopt", ("c9",), "libvirt"))
    return store


@dataclass(frozen=True)
class Seen:
    history: History
    findings: tuple[Finding, ...]


def look(store: DomainStore, marker: Marker | None = MARKER) -> Seen:
    """What check does with the store, when everything else is as it was."""
    loaded = stored = store.load()
    if lost_current(stored):
        loaded = with_current(stored, marker, "vm")
    intent, damaged = read_intent(store, stored.damaged)
    intact = projected(C3, marker=marker)
    seen = replace(
        intact,
        history=loaded.history,
        record=stored.record,
        damaged=damaged,
        aside=store.aside(),
        intent=intent,
        maps=damaged_maps(store, loaded.history),
        # libvirt is not told of it here: what it lists has findings of its own.
        told=False,
        known=(),
    )
    return Seen(loaded.history, examine(seen))


def answer(
    store: DomainStore, history: History, target: str, start: str, end: str
) -> set[int] | None:
    """The granules that a diff shows; None: unknown."""
    if not {start, end} <= set(history.checkpoints):
        return None
    path = history.path(target, start, end)
    if path.broken is not None:
        return None
    granules: set[int] = set()
    for _, interval in path.intervals:
        assert interval.map is not None
        try:
            granules.update(store.read_map(interval.map).granules)
        except StoreDamaged:
            return None
    return granules


def truth(target: str, start: str, end: str) -> set[int]:
    first, last = sorted((int(start[1]), int(end[1])))
    return {
        granule
        for number in range(first + 1, last + 1)
        for granule in MAPS[f"c{number}", target].granules
    }


def check_answers(store: DomainStore, seen: Seen, *, unknown: bool) -> None:
    """No answer is too small, whatever is damaged; without damage none is missing."""
    for target in DISKS:
        for start in C3.checkpoints:
            for end in C3.checkpoints:
                given_answer = answer(store, seen.history, target, start, end)
                assert unknown or given_answer is not None
                if given_answer is not None:
                    assert given_answer >= truth(target, start, end)
            if start in seen.history.checkpoints:
                source = open_ended(seen.history, target, start, (disk("vda"), disk("vdb")))
                if source.broken is None:
                    # The bitmap that is read has all since its checkpoint.
                    assert source.bitmap is not None
                    given_answer = answer(store, seen.history, target, start, source.bitmap)
                    assert given_answer is None or given_answer >= truth(
                        target, start, source.bitmap
                    )


@dataclass(frozen=True)
class Harm:
    """A change of some bytes."""

    kind: str
    at: int
    data: bytes

    def do(self, content: bytes) -> bytes:
        at = self.at % (len(content) + 1)
        if self.kind == "cut":
            return content[:at]
        if self.kind == "insert":
            return content[:at] + self.data + content[at:]
        if self.kind == "drop":
            return content[:at] + content[at + len(self.data) :]
        return content[:at] + self.data + content[at + len(self.data) :]


harms = st.builds(
    Harm,
    st.sampled_from(["cut", "insert", "drop", "overwrite"]),
    st.integers(0, 1 << 16),
    st.binary(min_size=1, max_size=64),
)


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def stored_files(store: DomainStore) -> Iterator[Path]:
    return (
        path for path in sorted(store.path.rglob("*")) if path.is_file() and path.name != "lock"
    )


def test_an_intact_store_has_no_findings_and_all_answers(tmp_path: Path) -> None:
    store = filled(tmp_path)
    seen = look(store)
    assert seen.findings == ()
    check_answers(store, seen, unknown=False)


@settings(max_examples=200, deadline=None)
@given(harms, st.integers(0, 99), st.booleans())
def test_damage_to_any_file_is_a_named_finding_and_never_a_wrong_answer(
    harm: Harm, which: int, marked: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = filled(Path(folder), intent=True)
        everything = list(stored_files(store))
        victim = everything[which % len(everything)]
        before = victim.read_bytes()
        victim.write_bytes(harm.do(before))
        seen = look(store, MARKER if marked else None)
        if victim.read_bytes() == before:
            return
        if victim.suffix == ".json" and _same_json(before, victim.read_bytes()):
            return  # a space more or less
        named = [finding for finding in seen.findings if str(victim) in finding.message]
        assert [finding.code for finding in named] in (
            [["unreadable-file"]] if victim.parent == store.path else [["damaged-map"]]
        ), victim
        assert not named[0].harmless
        assert named[0].action is not None
        check_answers(store, seen, unknown=True)


@pytest.mark.parametrize("which", range(8))
def test_a_file_that_vanishes_is_noticed(tmp_path: Path, which: int) -> None:
    store = filled(tmp_path)
    everything = list(stored_files(store))
    assert len(everything) == 8
    victim = everything[which]
    victim.unlink()
    seen = look(store)
    codes = {finding.code for finding in seen.findings}
    if victim.suffix == ".map":
        assert codes == {"damaged-map"}
    elif victim.name == "domain.json":
        assert codes == {"current-lost"}
    else:
        # Its bitmaps are there, and are those of no checkpoint.
        assert "orphan-bitmap" in codes
        assert codes <= {"orphan-bitmap", "lost-parent", "current-lost", "wrong-current"}
    check_answers(store, seen, unknown=True)


@pytest.mark.parametrize("lost", ["c0", "c1", "c2"])
def test_one_damaged_document_costs_that_checkpoint_alone(tmp_path: Path, lost: str) -> None:
    store = filled(tmp_path)
    (store.path / f"{lost}.xml").write_bytes(b"<x/>")
    seen = look(store)
    others = [name for name in C3.checkpoints if name != lost]
    for target in DISKS:
        for start in others:
            for end in others:
                expected = truth(target, start, end)
                # What is linked through its document alone is not known to be on one line.
                known = {start, end} != {"c0", "c2"}
                found = answer(store, seen.history, target, start, end)
                assert found == (expected if known else None)
            source = open_ended(seen.history, target, start, (disk("vda"), disk("vdb")))
            assert (source.broken is None) == (start > lost or lost == "c2"), start


def test_the_next_command_goes_on_from_the_newest_when_the_current_one_is_lost(
    tmp_path: Path,
) -> None:
    store = filled(tmp_path)
    (store.path / "c2.xml").write_bytes(b"")
    seen = look(store, None)
    assert seen.history.current == "c1"
    with store.lock(0):
        store.set_aside(store.path / "c2.xml")
    seen = look(store, None)
    assert {finding.code for finding in seen.findings} == {
        "current-lost",
        "orphan-bitmap",
        "no-marker",
    }
    # The bitmap of a document that was set aside is known to be ours.
    assert all(finding.curable(foreign=False) for finding in seen.findings if not finding.harmless)


def test_damage_of_two_files_names_both(tmp_path: Path) -> None:
    store = filled(tmp_path, intent=True)
    for name in ("domain.json", "intent.json", "c1.xml"):
        (store.path / name).write_bytes(b"\0" * 100)
    seen = look(store)
    assert [finding.code for finding in seen.findings if not finding.harmless] == [
        "unreadable-file"
    ] * 3
    assert seen.history.current == "c2"
