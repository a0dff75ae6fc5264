"""Which points stay, and what has to be merged for that: the decisions, and the change's record."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta, timezone
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import ckptmgr
from ckptmgr.backup import overlays, rewriting
from ckptmgr.backup.block import BLOCK, ZERO, block_count
from ckptmgr.backup.digests import Digests, DigestWriter
from ckptmgr.backup.manifest import format_manifest, parse_manifest
from ckptmgr.backup.merge import merge
from ckptmgr.backup.points import Points
from ckptmgr.backup.pruning import Merging, prune, staying
from ckptmgr.backup.repository import MANIFEST, Repository
from ckptmgr.backup.retention import Retention, kept
from ckptmgr.cli import main
from ckptmgr.errors import InvalidRequest, RepositoryDamaged
from ckptmgr.store import files

from . import disk
from .repositories import (
    NOON,
    OTHER_UUID,
    UUID,
    commit,
    filled,
    manifest,
    point_disk,
    write_digests,
)
from .test_backup_points import WEEK, points

HOUR, DAY = 3600, 86400


def utc(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def names(times: list[int], retention: Retention) -> list[int]:
    """The times that stay."""
    found = kept([(str(time), time) for time in sorted(times)], retention, utc)
    return [int(name) for name in found]


# --- retention -----------------------------------------------------------------------------------


def test_nothing_asked_for_is_refused_with_the_rules() -> None:
    with pytest.raises(InvalidRequest) as raised:
        Retention()
    assert "--keep-last" in (raised.value.hint or "")
    for count_ in (0, -1, True, 1.5):
        with pytest.raises(InvalidRequest):
            Retention(daily=count_)  # type: ignore[arg-type]


def test_the_newest_of_each_period_stays() -> None:
    times = [NOON + day * DAY + hour * HOUR for day in range(40) for hour in (0, 5)]
    last = times[-1]
    assert names(times, Retention(last=3)) == times[-3:]
    assert names(times, Retention(daily=3)) == [last - 2 * DAY, last - DAY, last]
    assert names(times, Retention(hourly=3)) == times[-3:]
    # NOON is a Sunday; 40 days later it is a Thursday, and weeks begin on Monday.
    assert names(times, Retention(weekly=3)) == [last - 11 * DAY, last - 4 * DAY, last]
    monthly = [
        datetime.fromtimestamp(time, UTC).date() for time in names(times, Retention(monthly=9))
    ]
    assert [str(day) for day in monthly] == ["2026-11-30", "2026-12-31"]
    assert names(times, Retention(yearly=1)) == [last]


def test_rules_add_up_and_each_says_why() -> None:
    times = [(f"d{day}", NOON + day * DAY) for day in range(10)]
    found = kept(times, Retention(last=2, weekly=2), utc)
    assert found == {
        "d7": ("weekly",),
        "d8": ("last",),
        "d9": ("newest", "last", "weekly"),
    }


def test_an_hour_that_comes_twice_is_two() -> None:
    before, after = timezone(timedelta(hours=2)), timezone(timedelta(hours=1))
    clock = {0: before, HOUR: after}
    found = kept(
        [("summer", 0), ("winter", HOUR)],
        Retention(hourly=2),
        lambda seconds: datetime.fromtimestamp(seconds, clock[seconds]),
    )
    assert set(found) == {"summer", "winter"}


rules = st.fixed_dictionaries(
    {},
    optional={
        rule: st.integers(1, 5)
        for rule in ("last", "hourly", "daily", "weekly", "monthly", "yearly")
    },
).filter(bool)


@given(st.lists(st.integers(0, 3 * 365 * DAY), unique=True, max_size=30), rules)
def test_what_stays_is_never_less_than_asked_for(times: list[int], asked: dict[str, int]) -> None:
    found = kept([(str(time), time) for time in sorted(times)], Retention(**asked), utc)
    assert not times or str(max(times)) in found
    for rule, wanted in asked.items():
        by_rule = [name for name, reasons in found.items() if rule in reasons]
        assert len(by_rule) <= wanted
        if rule == "last":
            assert len(by_rule) == min(wanted, len(times))
    # A second time changes nothing.
    again = kept([(name, int(name)) for name in found], Retention(**asked), utc)
    assert again.keys() == found.keys()


# --- the plan ------------------------------------------------------------------------------------


def test_each_domain_is_counted_by_itself_and_keeps_its_newest() -> None:
    assert staying(WEEK, None, Retention(last=1), utc) == {
        "fr": ("newest", "last"),
        "x": ("newest", "last"),
    }
    assert staying(WEEK, "test", Retention(last=1), utc) == {"x": ("newest", "last")}


def test_the_newest_point_of_a_disk_that_later_ones_left_out_stays() -> None:
    some = points(
        manifest("a", disks=(point_disk("vda"), point_disk("vdb"), point_disk("vdc"))),
        manifest("b", created=NOON + 1, disks=(point_disk("vda"), point_disk("vdb"))),
        manifest("c", created=NOON + 2, disks=(point_disk("vda"),)),
        manifest("d", created=NOON + 3, disks=(point_disk("vda"),)),
    )
    assert staying(some, None, Retention(last=1), utc) == {
        "a": ("newest of vdc",),
        "b": ("newest of vdb",),
        "d": ("newest", "last"),
    }


def test_a_clock_that_was_put_back_does_not_cost_the_newest_point() -> None:
    """The host's clock was two hours ahead when `mo` and `tu` were made."""
    some = points(
        manifest("mo", created=NOON + 2 * HOUR),
        manifest("tu", "mo", created=NOON + 2 * HOUR + 60),
        manifest("we", "tu", created=NOON),
        manifest("th", "we", created=NOON + 60),
    )
    assert some.by_time() == ("mo", "tu", "we", "th")
    assert staying(some, None, Retention(last=1), utc) == {"th": ("newest", "last")}
    assert staying(some, None, Retention(hourly=2), utc) == {
        "tu": ("hourly",),
        "th": ("newest", "hourly"),
    }


def test_broken_points_stay_and_do_not_count() -> None:
    left = WEEK.only({"mo", "tu", "th", "fr"})
    found = staying(left, None, Retention(last=1), utc)
    assert found == {"tu": ("newest", "last"), "th": ("broken",), "fr": ("broken",)}


def test_what_stands_on_a_point_that_goes_takes_over_its_layers() -> None:
    found = prune(WEEK, {"mo", "we", "th"})
    changed = {rewrite.manifest.name: rewrite for rewrite in found.rewrites}
    assert set(changed) == {"tu", "fr"}
    assert changed["tu"].merges == (Merging("vda", ("tu", "mo"), ()),)
    assert changed["tu"].manifest.disks[0].mode == "full"
    assert changed["tu"].manifest.parent is None
    assert changed["fr"].merges == (
        Merging("vda", ("fr", "we"), ("tu", "mo")),
        Merging("vdb", ("fr", "th", "we"), ()),
    )
    vda, vdb = changed["fr"].manifest.disks
    assert (vda.base, vda.base_id) == ("tu", WEEK.get("tu").id)
    assert (vdb.mode, vdb.base) == ("full", None)
    assert (changed["fr"].manifest.parent, changed["fr"].manifest.id) == ("tu", WEEK.get("fr").id)
    assert found.goes == ("th", "we", "mo")


def test_a_leaf_goes_without_any_merge() -> None:
    found = prune(WEEK, {"fr", "x"})
    assert found.rewrites == ()
    assert set(found.goes) == {"fr", "x"}


@given(st.data())
def test_afterwards_every_chain_is_complete_and_no_relation_is_lost(data: st.DataObject) -> None:
    made = []
    for number in range(data.draw(st.integers(1, 9))):
        above = [each.name for each in made]
        parent = data.draw(st.sampled_from([None, *above]))
        targets = data.draw(st.sets(st.sampled_from(["vda", "vdb"])))
        before = points(*made)
        line = [] if parent is None else [parent, *before.ancestors(parent)]
        disks = []
        for target in sorted(targets):
            bases = [each for each in line if before.get(each).disk(target)]
            disks.append(point_disk(target, data.draw(st.sampled_from([None, *bases[:1]]))))
        made.append(
            manifest(
                f"p{number}",
                parent,
                created=NOON + data.draw(st.integers(0, 3)),
                disks=tuple(disks),
            )
        )
    before = points(*made)
    gone = data.draw(st.sets(st.sampled_from(sorted(before.manifests))))
    plan = prune(before, gone)
    state = dict(before.manifests)
    for rewrite in plan.rewrites:
        state[rewrite.manifest.name] = rewrite.manifest
        for merging in rewrite.merges:
            assert merging.layers[0] == rewrite.manifest.name
            assert set(merging.layers[1:]) <= gone
            assert merging.layers + merging.below == before.chain(merging.layers[0], merging.disk)
        assert all(Points(state).broken(name) is None for name in state)
    assert set(plan.goes) == gone
    for name in plan.goes:
        assert not Points(state).dependants(name)
        del state[name]
        assert all(Points(state).broken(each) is None for each in state)
    after = Points(state)
    for name in state:
        wanted = [each for each in before.ancestors(name) if each not in gone]
        assert list(after.ancestors(name)) == wanted


# --- the merge -----------------------------------------------------------------------------------

COUNT = 12


class Two:
    """Stands where hypothesis's data does in an example: the first two layers are merged."""

    def draw(self, strategy: object) -> int:
        return 2


layers_of = st.tuples(
    st.dictionaries(st.integers(0, COUNT - 1), st.sampled_from(["data", "zero"])),
    st.sampled_from([COUNT * BLOCK, 7 * BLOCK, 7 * BLOCK - 512, 5 * BLOCK + 512, 3 * BLOCK]),
)


def bytes_of(stack: list[tuple[dict[int, str], int]]) -> list[list[object]]:
    """What is seen through a stack, top first: of each block its first and last byte, as who wrote
    it and where, or None for zero.  As QEMU reads it.
    """
    if not stack:
        return [[None, None] for _ in range(COUNT)]
    (layer, size), below = stack[0], bytes_of(stack[1:])
    found: list[list[object]] = []
    for block in range(COUNT):
        for_block: list[object] = []
        for half, offset in enumerate((0, BLOCK - 1)):
            if block * BLOCK + offset >= size:
                for_block.append(None)
            elif block in layer:
                for_block.append((len(stack), block) if layer[block] == "data" else None)
            else:
                for_block.append(below[block][half])
        found.append(for_block)
    return found


@example(stack=[({}, 12 * BLOCK), ({}, 5 * BLOCK + 512), ({5: "data"}, 12 * BLOCK)], data=Two())
@given(stack=st.lists(layers_of, min_size=2, max_size=5), data=st.data())
def test_the_merged_layer_shows_what_the_layers_showed(
    stack: list[tuple[dict[int, str], int]], data: Any, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    opened = []
    for number, (layer, size) in enumerate(stack):
        writer = DigestWriter(folder / str(number), size)
        for block, kind in sorted(layer.items()):
            if block < block_count(size):
                writer.add(block, ZERO if kind == "zero" else b"%032d" % block)
        writer.close()
        opened.append(Digests(folder / str(number)))
    at = data.draw(st.integers(1, len(stack)))
    found = merge(opened[:at], opened[at:])
    top = stack[0][1]
    assert found.size == top
    merged: list[list[object]] = bytes_of(stack[at:])
    for block in range(COUNT):
        for half, offset in enumerate((0, BLOCK - 1)):
            if block * BLOCK + offset >= top or block in found.zero:
                merged[block][half] = None
    held = set(found.zero)
    for take in found.takes:
        for block in take.data:
            assert block not in held, "a block from two layers"
            held.add(block)
            for half, offset in enumerate((0, BLOCK - 1)):
                place = block * BLOCK + offset
                own = place < min(take.visible, stack[take.index][1], top)
                merged[block][half] = (len(stack) - take.index, block) if own else None
    assert merged == bytes_of(stack)
    for each in opened:
        each.close()


# --- the record of a change ----------------------------------------------------------------------


@pytest.fixture(name="no_waiting")
def no_waiting_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_fsync", lambda descriptor: None)
    monkeypatch.setattr(files, "_fsync_folder", lambda path: None)


TARGETS = ("vda", "vdb")


def two_points(root: Path) -> Any:
    """monday <- tuesday, of two disks."""
    lineage = Repository(root / "repo").lineage(UUID)
    Repository(root / "repo").make()
    with lineage.lock(0):
        commit(lineage, manifest("monday", disks=tuple(map(point_disk, TARGETS))))
        disks = tuple(point_disk(target, "monday") for target in TARGETS)
        commit(lineage, manifest("tuesday", "monday", disks=disks))
    return lineage


def change(lineage: Any, recorder: disk.Recorder) -> None:
    """What replacing tuesday's images by merged ones writes."""
    folder = lineage.path / "tuesday"
    old = parse_manifest((folder / MANIFEST).read_bytes())
    images, disks = {}, []
    for target in TARGETS:
        image = rewriting.temporary(f"{target}.qcow2")
        images[image] = f"{target}.qcow2"
        output = files.Output(folder / image)
        output.append(b"merged " + target.encode())
        output.close()
        digests = rewriting.new_digests(target)
        sha256 = write_digests(folder / digests, {0: target.encode()})
        disks.append(point_disk(target, bytes=10, digests=digests, digests_sha256=sha256))
    new = manifest("tuesday", None, created=old.created, disks=tuple(disks), files=old.files)
    record = rewriting.Rewriting("tuesday", images, rewriting.temporary(MANIFEST))
    output = files.Output(folder / record.manifest)
    output.append(format_manifest(new))
    output.close()
    rewriting.begin(lineage.path, record)
    recorder.mark("begun")
    rewriting.complete(lineage.path, record, MANIFEST)
    recorder.mark("done")
    rewriting.sweep(folder, new)


@pytest.mark.usefixtures("no_waiting")
def test_a_power_cut_during_a_change_leaves_the_old_or_the_new_and_settling_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lineage = two_points(tmp_path)
    old = lineage.load().points.get("tuesday")
    start = disk.tree(tmp_path)
    recorder = disk.Recorder()
    with lineage.lock(0), monkeypatch.context() as context:
        recorder.install(context)
        change(lineage, recorder)
    new = lineage.load().points.get("tuesday")
    assert new != old
    numbers, seen, mixed = count(), set(), set()
    for crash in disk.power_cuts(start, recorder.calls):
        root = tmp_path / f"crash {next(numbers)}"
        crash.restore(tmp_path, root)
        left = Repository(root / "repo").lineage(UUID)
        assert left.load().damaged == ()
        mixed.add(require_consistent(left, old, new))
        with left.lock(0):
            left.settle()
        found = left.load().points.get("tuesday")
        assert found == (new if "begun" in crash.done else found)
        assert found in (old, new)
        seen.add((found == new, "begun" in crash.done))
        require_consistent(left, old, new)
        assert sorted(left.names()) == ["lock", "monday", "tuesday"]
        there = {path.name for path in (left.path / "tuesday").iterdir()}
        assert there == {MANIFEST, *found.file_names}
        shutil.rmtree(root)
    assert seen == {(False, False), (True, False), (True, True)}
    many = range(len(TARGETS) + 1)  # one image after the other
    assert mixed == {tuple(at < new_ones for at in range(len(TARGETS))) for new_ones in many}


def require_consistent(lineage: Any, old: Any, new: Any) -> tuple[bool, ...]:
    """The images that are there, their sizes and digests are spoken of as they are.

    Returns which of them are new.
    """
    point = lineage.load().points.get("tuesday")
    assert lineage.load().points.broken("tuesday") is None
    are_new = []
    for each in point.disks:
        image = lineage.image(point, each.name).read_bytes()
        are_new.append(image == b"merged " + each.name.encode())
        assert each == (new if are_new[-1] else old).disk(each.name)
        assert len(image) == each.bytes
        with Digests(lineage.digests(point, each.name)) as digests:
            assert digests.sha256 == each.digests_sha256
    return tuple(are_new)


@pytest.mark.parametrize("missing", ["_fsync", "_fsync_folder"])
@pytest.mark.usefixtures("no_waiting")
def test_the_power_cut_above_finds_a_missing_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(disk, "CALLS", tuple(call for call in disk.CALLS if call != missing))
    monkeypatch.setattr(f"{__name__}.TARGETS", ("vda",))  # of fewer files there are fewer states
    with pytest.raises((AssertionError, RepositoryDamaged, OSError)):
        test_a_power_cut_during_a_change_leaves_the_old_or_the_new_and_settling_completes_it(
            tmp_path, monkeypatch
        )


@pytest.mark.parametrize(
    "change_",
    [
        {"point": "../x"},
        {"point": None},
        {"images": {"vda.qcow2": "vda.qcow2"}},
        {"images": {"../.a.0123456789abcdef.tmp": "vda.qcow2"}},
        {"images": {".a.0123456789abcdef.tmp": "../vda.qcow2"}},
        {"images": []},
        {"manifest": "manifest.json"},
    ],
)
def test_a_record_that_cannot_be_is_reported_and_never_followed(
    tmp_path: Path, change_: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    lineage = filled(tmp_path / "repo", "monday")
    good = rewriting.Rewriting("monday", {}, ".manifest.json.0123456789abcdef.tmp")
    members = {"point": good.point, "images": {}, "manifest": good.manifest} | change_
    from ckptmgr.store.seal import seal_json

    (lineage.path / "prune.json").write_bytes(seal_json(members))
    assert [each.point for each in lineage.load().damaged] == [None]
    assert set(lineage.load().points.manifests) == {"monday"}
    assert main(["prune", str(tmp_path / "repo"), "--keep-last", "1", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "repository-damaged"
    assert "ckptmgr verify" in error["hint"]


# --- the command, where nothing has to be merged -------------------------------------------------


def test_a_prune_without_a_rule_is_refused_before_anything_is_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", str(tmp_path / "nowhere"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "invalid-request"
    assert main(["prune", str(tmp_path / "nowhere"), "--keep-daily", "0", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"


def test_branches_that_were_left_go_by_the_rules(tmp_path: Path) -> None:
    lineage = filled(tmp_path / "repo")
    view = ckptmgr.repository(tmp_path / "repo").plan_prune(Retention(daily=2))
    assert [(point.name, point.stays) for point in view.points] == [
        ("monday", False),
        ("tuesday", False),
        ("wednesday", True),
        ("friday", True),
    ]
    assert len(lineage.load().points) == 4


def test_full_points_are_removed_and_their_children_stay_in_the_tree(tmp_path: Path) -> None:
    lineage = Repository(tmp_path / "repo").lineage(UUID)
    full = (point_disk(),)
    with lineage.lock(0):
        for number, (name, parent) in enumerate([("a", None), ("b", "a"), ("c", "b"), ("d", "b")]):
            commit(lineage, manifest(name, parent, created=NOON + number, disks=full))
        other = {"domain_uuid": OTHER_UUID, "created": NOON + 9, "disks": full}
        commit(lineage, manifest("e", "b", **other))
    view = ckptmgr.repository(tmp_path / "repo").prune(Retention(last=2), UUID)
    assert [point.name for point in view.points if not point.stays] == ["a", "b"]
    left = lineage.load().points
    assert set(left.manifests) == {"c", "d", "e"}
    assert {name: each.parent for name, each in left.manifests.items()} == dict.fromkeys("cde")
    assert sorted(lineage.names()) == ["c", "d", "e", "lock"]


def test_names_alone_are_printed_and_what_stays_for_another_reason_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lineage = Repository(tmp_path / "repo").lineage(UUID)
    with lineage.lock(0):
        for number, name in enumerate(("a", "b", "c")):
            commit(lineage, manifest(name, created=NOON + number, disks=(point_disk(),)))
        commit(lineage, manifest("d", created=NOON - 1, disks=(point_disk(base="x"),)))
    (lineage.path / "b" / overlays.RECORD).write_text('[{"path": "/dev/null", "created": 1}]')
    (lineage.path / "e").mkdir()
    assert main(["prune", str(tmp_path / "repo"), "--keep-last", "1"]) == 0
    out, err = capsys.readouterr()
    assert out == "a\n"
    assert "restore point b stays: restored as /dev/null" in err
    assert "restore point d stays: broken" in err
    assert "manifest.json: it is missing" in err
    assert "restore point c" not in err
    assert main(["-q", "prune", str(tmp_path / "repo"), "--keep-last", "1"]) == 0
    assert capsys.readouterr() == ("", "")


def test_an_overlay_record_that_cannot_be_read_keeps_everything(tmp_path: Path) -> None:
    lineage = filled(tmp_path / "repo", "monday")
    record = lineage.path / "monday" / overlays.RECORD
    for content in (b"", b"{", b"[" * 99999):
        record.write_bytes(content)
        with pytest.raises(RepositoryDamaged, match="not JSON"):
            ckptmgr.repository(tmp_path / "repo").prune(Retention(last=1))
    for content in (b"[]", b"[1]", b'{"path": 1}', b'[{"path": 1}, {"path": "/nowhere"}]'):
        record.write_bytes(content)
        assert overlays.standing(record.parent, ["vda.qcow2"]) == ()
