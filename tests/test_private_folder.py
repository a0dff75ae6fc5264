from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from ckptmgr.engine.private import PREFIX, private_folder, sweep


@pytest.fixture(autouse=True)
def folder_of_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def age(path: Path) -> None:
    long_ago = time.time() - 3600
    os.utime(path, (long_ago, long_ago))


def test_nobody_else_can_enter_and_nothing_is_left():
    with private_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "nbd.sock").touch()
    assert not folder.exists()


def test_a_folder_in_use_is_never_swept(tmp_path: Path):
    with private_folder() as folder:
        age(folder)
        sweep(tmp_path)
        assert folder.exists()


def test_what_a_killed_process_left_goes_with_the_next_use(tmp_path: Path):
    left = tmp_path / f"{PREFIX}left"
    left.mkdir()
    (left / "nbd.sock").touch()
    with private_folder():
        assert left.exists()  # it may have been made this very moment
    age(left)
    with private_folder():
        assert not left.exists()


def test_a_link_is_not_followed(tmp_path: Path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    age(precious)
    (tmp_path / f"{PREFIX}link").symlink_to(precious)
    sweep(tmp_path)
    assert (precious / "file").exists()
