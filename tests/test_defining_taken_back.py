"""A domain that was being made from a restore point: what of it is taken back, and what stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckptmgr.errors import CkptmgrError, NoDomain, OperationFailed, ReadOnlyConnection
from ckptmgr.operation import inception, remnants
from ckptmgr.operation.remnants import take_back_interrupted
from ckptmgr.store import Intent, Store

UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"
URI = "qemu:///system"


class Connection:
    """Knows no domain, or fails otherwise."""

    def __init__(self, uri: str = URI, answer: CkptmgrError | None = None) -> None:
        self.uri = uri
        self.read_only = False
        self._answer = answer or NoDomain("none")

    def lookup(self, key: str) -> None:
        assert key == UUID
        raise self._answer


def interrupted(store: Store, folder: Path, **changes: Any) -> None:
    """All is written and has its names, of one that makes `folder`; then it was killed."""
    folder.mkdir()
    for name in ("vda.qcow2", "nvram.fd", "old.qcow2"):
        (folder / name).write_text(name)
    temporary = folder / ".vda.qcow2.0123456789abcdef.restoring"
    temporary.hardlink_to(folder / "vda.qcow2")
    (folder / "tpm").mkdir()
    (folder / "tpm" / "permall").write_text("state")
    files = {str(path): inception.identity_of(path) for path in folder.glob("[vno]*.*")}
    data = {
        "uri": URI,
        "domain": "web2",
        "id": "0" * 32,
        "temporaries": [str(temporary), str(folder / ".nvram.fd.0123456789abcdef.restoring")],
        "files": files,
        "replaced": [str(folder / "old.qcow2")],
        "volumes": ["/dev/vg/web"],
        "folders": [str(folder)],
        "tpm": str(folder / "tpm"),
    }
    part = store.domain(UUID)
    with part.lock(0):
        part.write_intent(Intent("define", ("monday",), "offline", {**data, **changes}))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def take_back(store: Store, connection: Connection) -> None:
    take_back_interrupted(connection, store)  # type: ignore[arg-type]


def test_all_that_is_ours_goes_and_what_is_lost_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, folder = Store(tmp_path / "store"), tmp_path / "new"
    interrupted(store, folder)
    take_back(store, Connection())
    # What was replaced is that of the user's name: it stays, and so does its folder.
    assert names(folder) == ["old.qcow2"]
    assert "old.qcow2 is replaced" in caplog.text
    assert "/dev/vg/web may be half written" in caplog.text
    assert not (tmp_path / "store" / UUID).exists()


def test_a_folder_that_was_made_for_it_goes_as_well(tmp_path: Path) -> None:
    store, folder = Store(tmp_path / "store"), tmp_path / "new"
    interrupted(store, folder, replaced=[])
    take_back(store, Connection())
    assert not folder.exists()


def test_what_was_used_meanwhile_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, folder = Store(tmp_path / "store"), tmp_path / "new"
    interrupted(store, folder, replaced=[])
    (folder / "vda.qcow2").write_text("booted by hand")
    (folder / "nvram.fd").unlink()
    (folder / "nvram.fd").write_text("of somebody else")
    take_back(store, Connection())
    assert names(folder) == ["nvram.fd", "vda.qcow2"]
    assert (folder / "vda.qcow2").read_text() == "booted by hand"
    assert "vda.qcow2 stays" in caplog.text


@pytest.mark.parametrize(
    "connection",
    [Connection(answer=OperationFailed("libvirt went away")), Connection("qemu:///session")],
    ids=["cannot be told", "another libvirt"],
)
def test_where_the_domain_may_be_defined_nothing_is_touched(
    tmp_path: Path, connection: Connection
) -> None:
    store, folder = Store(tmp_path / "store"), tmp_path / "new"
    interrupted(store, folder)
    there = names(folder)
    take_back(store, connection)
    assert names(folder) == there
    assert store.domain(UUID).read_intent() is not None


def test_what_is_under_way_is_not_touched(tmp_path: Path) -> None:
    store, folder = Store(tmp_path / "store"), tmp_path / "new"
    interrupted(store, folder)
    there = names(folder)
    with store.domain(UUID).lock(0):
        take_back(store, Connection())
    assert names(folder) == there


def test_who_asks_for_that_domain_is_told_and_can_have_it_taken_back(tmp_path: Path) -> None:
    """By its name or its UUID; asking alone, and a dry run, change nothing."""
    store, folder = Store(tmp_path / "store"), tmp_path / "new"
    interrupted(store, folder, replaced=[])
    there = names(folder)
    connection: Any = Connection()
    for name in ("web2", UUID):
        found = remnants.find(connection, store, name)
        assert found is not None
        assert "monday" in found.message
        assert "web2" in found.message
        assert not found.harmless
        plan = remnants.plan_take_back(connection, store, name)
        assert plan is not None
        paths = {line.removeprefix("remove ") for line in plan.lines()}
        assert paths == {str(folder), *(str(folder / each) for each in there)}
        assert any("half written" in note for note in plan.notes)
    assert names(folder) == there
    assert remnants.find(connection, store, "web") is None
    assert remnants.take_back(connection, store, "web") == ()
    assert names(folder) == there
    (cured,) = remnants.take_back(connection, store, "web2")
    assert cured == found
    assert not folder.exists()
    assert remnants.find(connection, store, "web2") is None
    assert remnants.plan_take_back(connection, store, "web2") is None


def test_a_store_that_cannot_be_read_says_nothing_of_unknown_domains(tmp_path: Path) -> None:
    """As to a user who may ask libvirt, and not read the system's store."""
    (tmp_path / "store").write_text("")
    connection: Any = Connection()
    assert remnants.find(connection, Store(tmp_path / "store"), "web2") is None


def test_nobody_is_told_of_what_is_under_way_or_of_another_libvirts(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    interrupted(store, tmp_path / "new")
    connection: Any = Connection()
    with store.domain(UUID).lock(0):
        assert remnants.find(connection, store, "web2") is None
    elsewhere: Any = Connection("qemu:///session")
    assert remnants.find(elsewhere, store, "web2") is None
    reading: Any = Connection()
    reading.read_only = True
    assert remnants.find(reading, store, "web2") is not None
    with pytest.raises(ReadOnlyConnection):
        remnants.take_back(reading, store, "web2")
