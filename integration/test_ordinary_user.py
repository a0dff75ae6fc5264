"""An ordinary user with libvirt's session driver: no root, no group, nothing of the system's.

Where the tests run as root, they run these once more as a user that nobody is.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckptmgr
from integration.command import CommandLine
from integration.conftest import MakeMachine
from integration.stand import MIB, Daemon, DiskSpec, Workspace, rounded
from integration.stand.person import run_as_ordinary_user

DISKS = (DiskSpec("vda"), DiskSpec("vdb", backing=("qcow2",)))


@pytest.fixture
def throw_away_user(workspace: Workspace) -> Workspace:
    """Where another user's folders can be made: root only."""
    return workspace


@pytest.fixture
def session(daemon: Daemon) -> Daemon:
    """The session daemon of the ordinary user that we are."""
    assert os.geteuid() != 0
    assert daemon.uri == "qemu:///session"
    return daemon


@pytest.mark.scenario("an ordinary user, on the session driver")
@pytest.mark.timeout(1800)
def test_all_of_it_works_for_an_ordinary_user(throw_away_user: Workspace) -> None:
    modules = [f"integration/test_{name}.py" for name in ("ordinary_user", "command_line")]
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--stand", "daemon", *modules]
    ran = run_as_ordinary_user(throw_away_user, *arguments, timeout=1770)
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout


def everything_of_mine(*folders: str) -> Iterator[Path]:
    """What this user has in folders of the system's."""
    me = os.geteuid()
    for folder in folders:
        for parent, names, files in os.walk(folder):
            for path in (Path(parent, name) for name in (*names, *files)):
                with contextlib.suppress(FileNotFoundError):  # somebody's, gone meanwhile
                    if path.lstat().st_uid == me:
                        yield path


def test_the_store_is_in_the_user_s_state_directory_and_private(
    session: Daemon, make_vm_on: MakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CKPTMGR_STORE", raising=False)
    machine = make_vm_on(session, DISKS)
    ours = CommandLine(session, None)
    assert ours.ok("create", machine.name, "c0") == "c0\n"
    machine.write("vda", MIB + 1, 1)
    assert ours.json("create", machine.name, "c1")["engine"] == "libvirt"
    machine.write("vdb", 2 * MIB, MIB)
    since = ours.json("diff", machine.name, "c0", "c1", "--extents")
    assert [disk["extents"] for disk in since["disks"]] == [[list(rounded([(MIB, 1)])[0])], []]
    assert ours.ok("list", machine.name, "--name", "--topological").split() == ["c0", "c1"]
    store = Path(session.environment()["XDG_STATE_HOME"]) / "ckptmgr"
    with ckptmgr.connect(session.uri) as host:
        assert host.store_directory == store
        later = host.domain(machine.name).diff("c1")
    assert [disk.extents() for disk in later.disks] == [[], [(2 * MIB, MIB)]]
    for path in (store, store / machine.domain.UUIDString()):
        status = path.stat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (os.geteuid(), 0o700)
    assert ours.json("check", machine.name)["consistent"] is True
    assert ours.ok("delete", machine.name, "c0", "--children").split() == ["c0", "c1"]
    assert not list(everything_of_mine("/var", "/run", "/etc", "/dev/shm"))


def test_the_system_driver_is_refused_and_not_touched(session: Daemon, tmp_path: Path) -> None:
    ran = CommandLine(session, tmp_path, uri="qemu:///system")("list", "web")
    assert ran.status == 1
    assert "connecting to qemu:///system failed" in ran.err
    assert not list(tmp_path.iterdir())
