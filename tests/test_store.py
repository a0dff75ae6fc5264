from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyroaring import BitMap64

from ckptmgr.checkpoint import Checkpoint, CheckpointDisk, EngineName, Interval, State
from ckptmgr.dirtymap import DirtyMap
from ckptmgr.errors import Busy, InvalidRequest, StoreDamaged, StoreFailed
from ckptmgr.store import DomainRecord, DomainStore, Intent, Store, files

from .speed import slowness
from .strategies import checkpoints, dirty_maps

UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"
MAP = DirtyMap(65536, 1 << 20, BitMap64([1, 2, 5]))
OTHER_MAP = DirtyMap(65536, 1 << 20, BitMap64([3]))


@pytest.fixture()
def domain(tmp_path: Path) -> DomainStore:
    return Store(tmp_path / "store").domain(UUID)


@pytest.fixture()
def fast(domain: DomainStore, monkeypatch: pytest.MonkeyPatch) -> DomainStore:
    """The same without waiting for the disk, for tests that write a lot."""
    monkeypatch.setattr(files, "_fsync", lambda descriptor: None)
    monkeypatch.setattr(files, "_fsync_folder", lambda path: None)
    return domain


def checkpoint(name: str, parent: str | None = None, digest: str | None = None) -> Checkpoint:
    interval = None if parent is None else Interval(parent, digest)
    disk = CheckpointDisk(
        "vda", bitmap=name, state=State.RECORDING, source="/img/a.qcow2", interval=interval
    )
    return Checkpoint(name, 1700000000, parent, EngineName.LIBVIRT, (disk,), description="text")


def fill(domain: DomainStore) -> None:
    """c1 and, current, c2 with a map between; an intent."""
    with domain.lock(0):
        digest = domain.save_map(MAP)
        domain.save_checkpoint(checkpoint("c1"))
        domain.save_checkpoint(checkpoint("c2", "c1", digest))
        domain.save_record(DomainRecord("vm", "c2", 2))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` but the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


# --- what is kept ----------------------------------------------------------------------------


def test_what_was_saved_is_loaded(domain: DomainStore) -> None:
    fill(domain)
    loaded = domain.load()
    assert loaded.damaged == ()
    assert loaded.history.current == "c2"
    assert loaded.record == DomainRecord("vm", "c2", 2)
    interval = loaded.history.get("c2").disks[0].interval
    assert interval is not None
    assert interval.map is not None
    assert domain.read_map(interval.map) == MAP


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(checkpoints())
def test_every_checkpoint_is_loaded_as_it_was_saved(
    fast: DomainStore, checkpoint: Checkpoint
) -> None:
    domain = fast
    with domain.lock(0):
        domain.save_checkpoint(checkpoint)
        assert domain.load().history.checkpoints == {checkpoint.name: checkpoint}
        domain.remove_checkpoint(checkpoint.name)
    assert domain.load().history.checkpoints == {}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(dirty_maps(), max_size=3))
def test_every_map_is_read_as_it_was_saved(domain: DomainStore, maps: list[DirtyMap]) -> None:
    with domain.lock(0):
        digests = domain.save_maps(maps)
    assert [domain.read_map(digest) for digest in digests] == maps


def test_an_intent_is_read_as_it_was_written_until_it_is_cleared(domain: DomainStore) -> None:
    intent = Intent("delete", ("c1", "c2"), "monitor", {"é": [1, None, {"a": "b"}]})
    with domain.lock(0):
        assert domain.read_intent() is None
        domain.write_intent(intent)
        assert domain.read_intent() == intent
        domain.clear_intent()
        assert domain.read_intent() is None


def test_files_are_laid_out_as_documented_and_private(domain: DomainStore) -> None:
    os.umask(old := os.umask(0))
    try:
        fill(domain)
        with domain.lock(0):
            domain.write_intent(Intent("create", ("c3",), "libvirt"))
    finally:
        os.umask(old)
    assert {path.name for path in domain.path.iterdir()} == {
        *("c1.xml", "c2.xml", "domain.json", "intent.json", "lock", "maps")
    }
    for path in (domain.path.parent, domain.path, *domain.path.rglob("*")):
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_reading_a_store_that_is_not_there_makes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "a" / "store")
    domain = store.domain(UUID)
    assert domain.load().history.checkpoints == {}
    assert domain.load().record == DomainRecord()
    assert domain.read_intent() is None
    assert store.domains() == ()
    with pytest.raises(StoreDamaged, match="missing"):
        domain.read_map("0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_domains_are_those_of_which_something_is_recorded(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store.domain(UUID))
    with store.domain("00000000-0000-0000-0000-000000000001").lock(0):
        pass
    (tmp_path / "lost+found").mkdir()
    assert store.domains() == (UUID,)


def test_a_domain_whose_folder_cannot_be_used_is_listed_and_costs_no_other(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store.domain(UUID))
    strange = "00000000-0000-0000-0000-000000000002"
    (tmp_path / strange).write_text("a file")
    assert store.domains() == (strange, UUID)
    with pytest.raises(StoreFailed, match="is a file"):
        store.domain(strange).load()


def test_one_domain_has_one_folder_however_its_uuid_is_spelt(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.domain(UUID.upper()).path == store.domain(UUID.replace("-", "")).path


@pytest.mark.parametrize("uuid", ["", "..", "vm", "../" + UUID, UUID + "/x"])
def test_what_is_no_uuid_leads_nowhere(tmp_path: Path, uuid: str) -> None:
    with pytest.raises(InvalidRequest):
        Store(tmp_path).domain(uuid)


def test_a_checkpoint_is_recorded_anew(domain: DomainStore) -> None:
    fill(domain)
    with domain.lock(0):
        domain.save_checkpoint(replace(checkpoint("c1"), description="new"))
    assert domain.load().history.get("c1").description == "new"


@pytest.fixture()
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the documents that are read; files count as settled at once."""
    names: list[str] = []
    read = files.read

    def noted(path: Path) -> bytes:
        if path.suffix == ".xml":
            names.append(path.name)
        return read(path)

    monkeypatch.setattr(files, "_SETTLED", -(10**9))
    monkeypatch.setattr(files, "read", noted)
    return names


def test_a_document_is_read_once_as_long_as_it_is_the_same(
    domain: DomainStore, seen: list[str]
) -> None:
    fill(domain)
    seen.clear()
    first = domain.load()
    assert seen == ["c1.xml", "c2.xml"]
    assert domain.load() == first
    assert seen == ["c1.xml", "c2.xml"]
    assert domain.load(afresh=True) == first
    assert seen == ["c1.xml", "c2.xml"] * 2


def test_a_document_that_somebody_else_changed_is_read_again(
    domain: DomainStore, seen: list[str]
) -> None:
    fill(domain)
    domain.load()
    seen.clear()
    other = DomainStore(domain.path, domain.uuid)
    with other.lock(0):
        other.save_checkpoint(replace(checkpoint("c1"), description="TEXT"))
        other.remove_checkpoint("c2")
    seen.clear()
    assert set(domain.load().history.checkpoints) == {"c1"}
    assert domain.load().history.get("c1").description == "TEXT"
    assert seen == ["c1.xml"]


def test_damage_of_the_same_length_to_a_document_that_was_read_is_seen(
    domain: DomainStore, seen: list[str]
) -> None:
    fill(domain)
    domain.load()
    path = domain.path / "c1.xml"
    content = path.read_bytes()
    time.sleep(0.05)  # some ticks of the clock that files are stamped by
    path.write_bytes(content.replace(b"text", b"next"))
    assert [damage.path for damage in domain.load().damaged] == [path]
    time.sleep(0.05)
    path.write_bytes(content)
    assert domain.load().damaged == ()
    assert seen.count("c2.xml") == 1 + 1  # saving it looked whether it was there


def test_a_document_that_was_written_just_now_is_not_taken_for_settled(
    domain: DomainStore,
) -> None:
    fill(domain)
    domain.load()
    path = domain.path / "c1.xml"
    path.write_bytes(path.read_bytes().replace(b"text", b"next"))
    assert [damage.path for damage in domain.load().damaged] == [path]


def test_removing_what_is_not_there_is_done_already(domain: DomainStore) -> None:
    with domain.lock(0):
        domain.remove_checkpoint("c9")
        domain.clear_intent()


@pytest.mark.parametrize("name", ["../c1", ".c1", "a/b"])
def test_a_name_that_leads_elsewhere_is_not_removed(domain: DomainStore, name: str) -> None:
    with domain.lock(0), pytest.raises(InvalidRequest):
        domain.remove_checkpoint(name)


@pytest.mark.parametrize("digest", ["", "0" * 63, "A" * 64, "../" + "0" * 61])
def test_a_digest_that_leads_elsewhere_is_not_read(domain: DomainStore, digest: str) -> None:
    with pytest.raises(ValueError, match="not the digest"):
        domain.read_map(digest)


def test_equal_maps_are_kept_once(domain: DomainStore) -> None:
    with domain.lock(0):
        assert domain.save_map(MAP) == domain.save_map(MAP)
    assert len(list((domain.path / "maps").iterdir())) == 1


def test_a_damaged_map_is_written_again_when_it_is_saved_again(domain: DomainStore) -> None:
    fill(domain)
    (path,) = (domain.path / "maps").iterdir()
    path.write_bytes(b"damaged")
    with domain.lock(0):
        assert domain.read_map(domain.save_map(MAP)) == MAP


def test_other_peoples_files_are_passed_over_and_left_alone(domain: DomainStore) -> None:
    fill(domain)
    others = ["notes.txt", "c1.xml~", "c1.xml.bak", ".c1.xml.swp", ".hidden.xml", "maps/README"]
    for name in others:
        (domain.path / name).write_text("<x/>")
    with domain.lock(0):
        assert domain.sweep() == ()
    assert domain.load().damaged == ()
    assert all((domain.path / name).exists() for name in others)


# --- damage ----------------------------------------------------------------------------------


def test_a_file_edited_by_hand_costs_that_checkpoint_alone(domain: DomainStore) -> None:
    fill(domain)
    path = domain.path / "c1.xml"
    edited = path.read_bytes().replace(b">text<", b">Text<")
    path.write_bytes(edited)
    loaded = domain.load()
    assert set(loaded.history.checkpoints) == {"c2"}
    assert loaded.history.current == "c2"
    assert loaded.damaged_names == {"c1"}
    (damage,) = loaded.damaged
    assert damage.path == path
    assert damage.message.startswith(str(path))
    assert "edited by hand" in damage.message
    assert path.read_bytes() == edited


def test_a_document_under_another_name_is_not_that_checkpoint(domain: DomainStore) -> None:
    fill(domain)
    (domain.path / "c3.xml").write_bytes((domain.path / "c1.xml").read_bytes())
    loaded = domain.load()
    assert set(loaded.history.checkpoints) == {"c1", "c2"}
    assert "another checkpoint, c1" in loaded.damaged[0].message


def _remove(path: Path) -> None:
    path.unlink()


def _link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [_link, _pipe, _folder])
def test_what_is_not_a_plain_file_is_damage(domain: DomainStore, damage: Any) -> None:
    fill(domain)
    damage(domain.path / "c1.xml")
    loaded = domain.load()
    assert set(loaded.history.checkpoints) == {"c2"}
    assert loaded.damaged_names == {"c1"}


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 500, b"<domaincheckpoint/>", "\ufeff".encode(), b"\xff\xfe", b"<" * 100000],
)
def test_anything_may_stand_in_a_file(domain: DomainStore, content: bytes) -> None:
    fill(domain)
    for name in ("c1.xml", "domain.json", "intent.json"):
        (domain.path / name).write_bytes(content)
    loaded = domain.load()
    assert {damage.path.name for damage in loaded.damaged} == {"c1.xml", "domain.json"}
    assert loaded.history.current is None
    with pytest.raises(StoreDamaged, match=r"intent\.json"):
        domain.read_intent()


@pytest.mark.parametrize(
    "members",
    [
        {"name": "vm", "current": "../x", "generation": 1},
        {"name": "vm", "current": 3, "generation": 1},
        {"name": None, "current": None, "generation": 1},
        {"name": "vm", "current": None, "generation": True},
        {"name": "vm", "current": None, "generation": -1},
        {},
    ],
)
def test_a_record_with_a_good_digest_and_impossible_content_is_damage(
    domain: DomainStore, members: dict[str, Any]
) -> None:
    from ckptmgr.store.seal import seal_json

    fill(domain)
    (domain.path / "domain.json").write_bytes(seal_json(members))
    (domain.path / "intent.json").write_bytes(seal_json(members))
    assert [damage.path.name for damage in domain.load().damaged] == ["domain.json"]
    with pytest.raises(StoreDamaged):
        domain.read_intent()


def test_nesting_without_end_is_damage(domain: DomainStore) -> None:
    fill(domain)
    (domain.path / "domain.json").write_bytes(b"[" * 200000)
    assert [damage.path.name for damage in domain.load().damaged] == ["domain.json"]


def test_a_current_checkpoint_that_is_lost_is_not_replaced_by_a_guess(domain: DomainStore) -> None:
    fill(domain)
    (domain.path / "c2.xml").write_bytes(b"")
    loaded = domain.load()
    assert loaded.history.current is None
    assert loaded.record.current == "c2"


def test_the_name_of_a_damaged_document_stays_taken(domain: DomainStore) -> None:
    fill(domain)
    (domain.path / "c1.xml").write_bytes(b"precious remains")
    with domain.lock(0), pytest.raises(StoreDamaged) as raised:
        domain.save_checkpoint(checkpoint("c1"))
    assert "move the file away" in (raised.value.hint or "")
    assert (domain.path / "c1.xml").read_bytes() == b"precious remains"


def test_checkpoints_that_are_their_own_ancestors_are_reported(domain: DomainStore) -> None:
    with domain.lock(0):
        domain.save_checkpoint(checkpoint("a", "b"))
        domain.save_checkpoint(checkpoint("b", "a"))
    loaded = domain.load()
    assert {damage.path.name for damage in loaded.damaged} == {"a.xml", "b.xml"}
    assert set(loaded.history.roots()) == {"a", "b"}


@pytest.mark.parametrize("damage", [_remove, _link, _pipe, _folder])
def test_a_map_that_is_not_there_whole_is_damage(domain: DomainStore, damage: Any) -> None:
    with domain.lock(0):
        digest = domain.save_map(MAP)
    damage(domain.path / "maps" / f"{digest}.map")
    with pytest.raises((StoreDamaged, StoreFailed), match=digest):
        domain.read_map(digest)


def test_a_map_under_another_name_is_damage(domain: DomainStore) -> None:
    with domain.lock(0):
        one, other = domain.save_maps([MAP, OTHER_MAP])
    folder = domain.path / "maps"
    (folder / f"{one}.map").write_bytes((folder / f"{other}.map").read_bytes())
    with pytest.raises(StoreDamaged, match="damaged"):
        domain.read_map(one)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.data())
def test_no_damage_gives_a_traceback_or_another_history(
    fast: DomainStore, data: st.DataObject
) -> None:
    domain = fast
    intent = Intent("create", ("c3",), "libvirt", {"a": 1})
    # The example before this one left its damage.
    for name in snapshot(domain.path):
        (domain.path / name).unlink()
    fill(domain)
    with domain.lock(0):
        domain.write_intent(intent)
    whole = domain.load()
    digest = next(iter((domain.path / "maps").iterdir())).stem

    victim = data.draw(st.sampled_from(sorted(snapshot(domain.path))))
    path = domain.path / victim
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        for _ in range(data.draw(st.integers(1, 3))):
            position = data.draw(st.integers(0, len(content) - 1))
            content[position] = data.draw(st.integers(0, 255))
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    path.write_bytes(content)

    loaded = domain.load()
    for name, found in loaded.history.checkpoints.items():
        assert found == whole.history.get(name)
    lost = whole.history.checkpoints.keys() - loaded.history.checkpoints.keys()
    assert lost == loaded.damaged_names
    assert loaded.record in (whole.record, DomainRecord())
    try:
        assert domain.read_intent() == intent
    except StoreDamaged:
        assert victim == "intent.json"
    try:
        assert domain.read_map(digest) == MAP
    except StoreDamaged:
        assert victim.startswith("maps/")


# --- who may write, and where ----------------------------------------------------------------


def test_a_domain_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / UUID).symlink_to("elsewhere")
    domain = Store(tmp_path).domain(UUID)
    for use in (domain.load, domain.read_intent, lambda: domain.lock(0).__enter__()):
        with pytest.raises(StoreFailed, match="symbolic link"):
            use()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_store_that_is_a_link_is_the_admins_choice(tmp_path: Path) -> None:
    (tmp_path / "big-disk").mkdir()
    (tmp_path / "store").symlink_to("big-disk")
    fill(Store(tmp_path / "store").domain(UUID))
    assert (tmp_path / "big-disk" / UUID / "c1.xml").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(domain: DomainStore) -> None:
    fill(domain)
    os.chown(domain.path, 12345, 12345)
    with pytest.raises(StoreFailed, match="another user"):
        domain.load()


def test_a_folder_that_cannot_be_listed_is_a_failure_not_an_empty_history(
    domain: DomainStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(domain)

    def refuse(path: object) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(StoreFailed, match="cannot be read: Permission denied") as raised:
        domain.load()
    assert "CKPTMGR_STORE" in (raised.value.hint or "")


def test_a_file_that_cannot_be_read_costs_that_checkpoint_alone(
    domain: DomainStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(domain)
    read = files.read

    def refuse(path: Path) -> bytes:
        if path.name == "c1.xml":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(files, "read", refuse)
    loaded = domain.load()
    assert set(loaded.history.checkpoints) == {"c2"}
    assert "Input/output error" in loaded.damaged[0].message


def test_a_file_that_vanishes_while_the_folder_is_read_was_removed(
    domain: DomainStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(domain)
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [*listdir(path), "gone.xml"])
    assert domain.load().damaged == ()


def test_nothing_is_written_without_the_lock(domain: DomainStore) -> None:
    for use in (
        lambda: domain.save_checkpoint(checkpoint("c1")),
        lambda: domain.remove_checkpoint("c1"),
        lambda: domain.save_map(MAP),
        lambda: domain.save_record(DomainRecord()),
        lambda: domain.write_intent(Intent("create", (), "libvirt")),
        domain.clear_intent,
        domain.sweep,
    ):
        with pytest.raises(RuntimeError, match="lock"):
            use()
    assert not domain.path.exists()


# --- the lock --------------------------------------------------------------------------------


def _hold(folder: Path, ready: Any) -> None:
    with Store(folder).domain(UUID).lock(0):
        ready.set()
        time.sleep(60)


def test_a_held_lock_names_its_holder_and_falls_with_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready))
    holder.start()
    try:
        assert ready.wait(30)
        started = time.monotonic()
        with (
            pytest.raises(Busy, match=f"process {holder.pid}$"),
            Store(tmp_path).domain(UUID).lock(0),
        ):
            pass
        assert time.monotonic() - started < 30  # it would have waited for 60
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGKILL)
        with Store(tmp_path).domain(UUID).lock(60):
            pass
    finally:
        holder.kill()
        holder.join()


def test_the_lock_is_waited_for_and_not_longer_than_asked(
    domain: DomainStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    sleep = time.sleep

    def noted(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():
            slept.append(seconds)
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", noted)
    other = DomainStore(domain.path, domain.uuid)
    entered = threading.Event()

    def wait() -> None:
        with other.lock(60):
            entered.set()

    waiter = threading.Thread(target=wait)
    with domain.lock(0):
        waiter.start()
        started = time.monotonic()
        with pytest.raises(Busy), DomainStore(domain.path, domain.uuid).lock(0.2):
            pass
        assert time.monotonic() - started >= 0.2
        assert 0 < sum(slept) <= 0.2
        assert not entered.is_set()
    waiter.join(60)
    assert entered.is_set()


def test_readers_do_not_wait_for_writers(domain: DomainStore) -> None:
    fill(domain)
    with domain.lock(0):
        assert set(DomainStore(domain.path, domain.uuid).load().history.checkpoints) == {"c1", "c2"}


def test_the_lock_is_released_when_the_work_under_it_fails(domain: DomainStore) -> None:
    with pytest.raises(ZeroDivisionError), domain.lock(0):
        raise ZeroDivisionError
    with domain.lock(0):
        pass


# --- sweeping --------------------------------------------------------------------------------


def test_sweeping_removes_what_nothing_names(domain: DomainStore) -> None:
    fill(domain)
    leftovers = [
        domain.path / ".c9.xml.0123456789abcdef.tmp",
        domain.path / "maps" / f".{'0' * 64}.map.0123456789abcdef.tmp",
    ]
    for path in leftovers:
        path.write_bytes(b"half")
    before = snapshot(domain.path)
    with domain.lock(0):
        digest = domain.save_map(OTHER_MAP)
        leftovers.append(domain.path / "maps" / f"{digest}.map")
        assert set(domain.sweep()) == set(leftovers)
    kept = {"c1.xml", "c2.xml", "domain.json"} | {
        name for name in before if name.startswith("maps/") and name.endswith(".map")
    }
    assert set(snapshot(domain.path)) == kept


def test_no_map_is_swept_while_somebody_unknown_may_need_it(domain: DomainStore) -> None:
    fill(domain)
    with domain.lock(0):
        domain.save_map(OTHER_MAP)
        maps = set((domain.path / "maps").iterdir())
        domain.write_intent(Intent("delete", ("c1",), "libvirt"))
        assert domain.sweep() == ()
        domain.clear_intent()
        # The damaged document names a map; an admin may yet repair it.
        (domain.path / "c2.xml").write_bytes(b"damaged")
        assert domain.sweep() == ()
    assert set((domain.path / "maps").iterdir()) == maps


def test_sweeping_an_empty_store_is_no_error(domain: DomainStore) -> None:
    with domain.lock(0):
        assert domain.sweep() == ()


# --- speed -----------------------------------------------------------------------------------


def test_a_thousand_checkpoints_with_their_domains_are_loaded_in_no_time(
    fast: DomainStore,
) -> None:
    domain = fast
    device = "<disk type='file' device='disk'><target dev='vda' bus='virtio'/></disk>\n"
    definition = f"<domain type='kvm'>\n<devices>\n{device * 70}</devices>\n</domain>"
    assert len(definition) > 5000
    with domain.lock(0):
        for number in range(1000):
            parent = f"c{number - 1}" if number else None
            point = checkpoint(f"c{number}", parent, "0" * 64 if parent else None)
            domain.save_checkpoint(replace(point, domain_xml=definition))
    started = time.process_time()
    loaded = domain.load()
    elapsed = (time.process_time() - started) / slowness()
    assert len(loaded.history.ancestors("c999")) == 999
    assert loaded.history.get("c5").domain_xml == definition
    assert elapsed < 1  # it is 0.2 s


def test_json_files_are_json_for_other_tools(domain: DomainStore) -> None:
    fill(domain)
    record = json.loads((domain.path / "domain.json").read_text())
    assert record | {"sha256": ""} == {
        "name": "vm",
        "current": "c2",
        "generation": 2,
        "tails": {},
        "moved": {},
        "left": None,
        "paused": None,
        "repositories": {},
        "sha256": "",
    }
