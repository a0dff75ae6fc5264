"""The store after a power cut, a full disk and an interruption at every single system call."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from ckptmgr.checkpoint import Checkpoint, Interval
from ckptmgr.dirtymap import union
from ckptmgr.errors import StoreDamaged, StoreFailed
from ckptmgr.store import DomainRecord, DomainStore, Intent, Loaded, Store, files

from . import disk
from .test_store import MAP, OTHER_MAP, UUID, checkpoint, fill

Scenario = Callable[[DomainStore, disk.Recorder], None]


@pytest.fixture(autouse=True)
def _simulated_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is durable is computed here; there is no need to wait for the real disk."""
    monkeypatch.setattr(files, "_fsync", lambda descriptor: None)
    monkeypatch.setattr(files, "_fsync_folder", lambda path: None)


INTENT = Intent("create", ("c3",), "libvirt")


def c3(digest: str) -> Checkpoint:
    return checkpoint("c3", "c2", digest)


def create(domain: DomainStore, recorder: disk.Recorder) -> None:
    """What creating c3 after c2 writes."""
    domain.write_intent(INTENT)
    recorder.mark("intent")
    domain.save_checkpoint(c3(domain.save_map(OTHER_MAP)))
    recorder.mark("checkpoint")
    domain.save_record(DomainRecord("vm", "c3", 3))
    recorder.mark("all but the intent")
    domain.clear_intent(sync=False)
    recorder.mark("done")
    domain.sweep()


def delete(domain: DomainStore, recorder: disk.Recorder) -> None:
    """What deleting c1 writes: its interval is joined into that of c2."""
    domain.write_intent(INTENT)
    recorder.mark("intent")
    point = domain.load().history.get("c2")
    joined = domain.save_map(union((MAP, OTHER_MAP)))
    changed = replace(point.disks[0], interval=Interval("c0", joined))
    domain.save_checkpoint(replace(point, parent="c0", disks=(changed,)))
    domain.save_record(DomainRecord("vm", "c2", 3))
    recorder.mark("checkpoint")
    domain.remove_checkpoint("c1")
    recorder.mark("all but the intent")
    domain.clear_intent(sync=False)
    recorder.mark("done")
    domain.sweep()


def start_afresh(domain: DomainStore, recorder: disk.Recorder) -> None:
    """The first checkpoint that the store ever sees."""
    domain.write_intent(INTENT)
    recorder.mark("intent")
    domain.save_checkpoint(checkpoint("c1"))
    domain.save_record(DomainRecord("vm", "c1", 1))
    recorder.mark("all but the intent")
    domain.clear_intent()
    recorder.mark("done")


def save_new(domain: DomainStore, recorder: disk.Recorder) -> None:
    domain.save_checkpoint(checkpoint("c9"))
    recorder.mark("done")


def save_again(domain: DomainStore, recorder: disk.Recorder) -> None:
    domain.save_checkpoint(replace(checkpoint("c1"), description="changed"))
    recorder.mark("done")


def save_record(domain: DomainStore, recorder: disk.Recorder) -> None:
    domain.save_record(DomainRecord("vm", "c1", 9))
    recorder.mark("done")


def remove(domain: DomainStore, recorder: disk.Recorder) -> None:
    domain.remove_checkpoint("c1")
    recorder.mark("done")


SINGLE: list[Scenario] = [save_new, save_again, save_record, remove]
WHOLE: list[Scenario] = [create, delete, start_afresh]


def prepared(tmp_path: Path, scenario: Scenario) -> DomainStore:
    """A store before `scenario`, and the lock file there already."""
    domain = Store(tmp_path / "store").domain(UUID)
    with domain.lock(0):
        pass
    if scenario is not start_afresh:
        fill(domain)
    return domain


def run(
    domain: DomainStore, scenario: Scenario, recorder: disk.Recorder, patch: pytest.MonkeyPatch
) -> None:
    with domain.lock(0), patch.context() as context:
        recorder.install(context)
        scenario(domain, recorder)


def require_maps(domain: DomainStore, loaded: Loaded) -> None:
    """Every map that a checkpoint names is there and whole."""
    for point in loaded.history.checkpoints.values():
        for recorded in point.disks:
            if recorded.interval is not None and recorded.interval.map is not None:
                domain.read_map(recorded.interval.map)


@pytest.mark.parametrize("scenario", SINGLE + WHOLE)
def test_a_power_cut_at_any_instant_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: Scenario
) -> None:
    domain = prepared(tmp_path, scenario)
    old, start = domain.load(), disk.tree(tmp_path)
    recorder = disk.Recorder()
    run(domain, scenario, recorder, monkeypatch)
    new = domain.load()
    assert (new.history, new.record) != (old.history, old.record)

    numbers = count()
    for crash in disk.power_cuts(start, recorder.calls):
        root = tmp_path / f"crash {next(numbers)}"
        crash.restore(tmp_path, root)
        left = Store(root / "store").domain(UUID)
        loaded, intent = left.load(), left.read_intent()
        assert loaded.damaged == ()
        require_maps(left, loaded)
        for name, point in loaded.history.checkpoints.items():
            assert point in (old.history.checkpoints.get(name), new.history.checkpoints.get(name))
        state = (loaded.history.checkpoints, loaded.record)
        if "done" in crash.done:
            assert state == (new.history.checkpoints, new.record)
        elif scenario in SINGLE:
            assert state in [(was.history.checkpoints, was.record) for was in (old, new)]
        else:
            # Half of an operation is only ever seen with its intent, whole and readable.
            untouched = state == (old.history.checkpoints, old.record)
            finished = state == (new.history.checkpoints, new.record)
            assert intent == INTENT or untouched or finished
            if "intent" in crash.done and "all but the intent" not in crash.done:
                assert intent == INTENT
            if "all but the intent" in crash.done:
                assert finished
    assert next(numbers) >= len({call for call, *_ in recorder.calls})


@pytest.mark.parametrize("missing", ["_fsync", "_fsync_folder"])
def test_the_power_cut_above_finds_a_missing_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(disk, "CALLS", tuple(call for call in disk.CALLS if call != missing))
    monkeypatch.setattr(files, missing, lambda target: None)
    with pytest.raises((AssertionError, StoreDamaged)):
        test_a_power_cut_at_any_instant_leaves_the_old_or_the_new(tmp_path, monkeypatch, create)


def calls_of(tmp_path: Path, patch: pytest.MonkeyPatch, scenario: Scenario) -> list[str]:
    """Names of the system calls that a scenario makes."""
    recorder = disk.Recorder()
    run(prepared(tmp_path / "dry", scenario), scenario, recorder, patch)
    return [str(call[0]) for call in recorder.calls if call[0] != "mark"]


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "CKPTMGR_STORE"),
        (errno.EIO, "check the file system"),
    ],
)
@pytest.mark.parametrize("scenario", SINGLE + WHOLE)
def test_a_disk_that_refuses_any_call_leaves_the_old_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: Scenario, error: int, hint: str
) -> None:
    for number, call in enumerate(calls_of(tmp_path, monkeypatch, scenario), start=1):
        root = tmp_path / str(number)
        domain = prepared(root, scenario)
        old = domain.load()
        recorder = disk.Recorder(before=disk.failing_at(number, error))
        with pytest.raises(StoreFailed) as raised:
            run(domain, scenario, recorder, monkeypatch)
        assert str(root) in raised.value.message
        assert hint in (raised.value.hint or "")
        assert "Errno" not in raised.value.message

        loaded = domain.load()
        assert loaded.damaged == ()
        require_maps(domain, loaded)
        if scenario in SINGLE and call != "_fsync_folder":
            # (A folder that could not be synced may have the new name, or not.)
            assert (loaded.history, loaded.record) == (old.history, old.record)
        assert not list(root.rglob("*.tmp"))
        # Nothing stands in the way of the next attempt.
        run(domain, scenario, disk.Recorder(), monkeypatch)


@pytest.mark.parametrize("scenario", SINGLE + WHOLE)
def test_an_interruption_at_any_call_damages_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: Scenario
) -> None:
    for number, _ in enumerate(calls_of(tmp_path, monkeypatch, scenario), start=1):
        domain = prepared(tmp_path / str(number), scenario)
        recorder = disk.Recorder(before=disk.failing_at(number, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(domain, scenario, recorder, monkeypatch)
        loaded = domain.load()
        assert loaded.damaged == ()
        require_maps(domain, loaded)
        with domain.lock(0):  # released
            pass


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_store_that_cannot_be_made_is_refused_at_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    domain = Store(tmp_path / "var" / "store").domain(UUID)
    recorder = disk.Recorder(before=disk.failing_at(1, error))
    recorder.install(monkeypatch)
    with pytest.raises(StoreFailed, match="cannot be made") as raised, domain.lock(0):
        pass
    assert "CKPTMGR_STORE" in (raised.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_the_folders_above_a_new_store_are_durable_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = disk.Recorder()
    recorder.install(monkeypatch)
    with Store(tmp_path / "var" / "store").domain(UUID).lock(0):
        pass
    var, store = tmp_path / "var", tmp_path / "var" / "store"
    assert recorder.calls == [
        ("_mkdir", var),
        ("_fsync_folder", tmp_path),
        ("_mkdir", store),
        ("_fsync_folder", var),
        ("_mkdir", store / UUID),
        ("_fsync_folder", store),
    ]


def test_a_file_is_durable_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = disk.Recorder()
    recorder.install(monkeypatch)
    files.write(tmp_path / "c1.xml", b"content")
    names = [call[0] for call in recorder.calls]
    assert names == ["_create", "_write", "_fsync", "_rename", "_fsync_folder"]
