"""Files that are being restored: all of them come to have their names, or none."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.backup import temporaries
from ckptmgr.backup.temporaries import land, new_token, temporary, writing

Pairs = list[tuple[Path, Path]]


def written(folder: Path, *names: str) -> Pairs:
    """Files of one restore, whole, under their temporary names."""
    token = new_token()
    pairs = [(temporary(folder / name, token), folder / name) for name in names]
    for path, final in pairs:
        path.write_text(final.name)
    return pairs


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(name="links", params=[True, False], ids=["links", "no links"], autouse=True)
def links_fixture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """File systems with hard links, and without."""

    def refused(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not request.param:
        monkeypatch.setattr(os, "link", refused)
    return bool(request.param)


def test_all_get_their_names(tmp_path: Path) -> None:
    pairs = written(tmp_path, "vda.qcow2", "vdb.qcow2")
    land(pairs)
    for path, _ in pairs:
        path.unlink(missing_ok=True)
    assert names(tmp_path) == ["vda.qcow2", "vdb.qcow2"]
    assert (tmp_path / "vdb.qcow2").read_text() == "vdb.qcow2"


def test_a_name_that_is_taken_costs_all_of_them_and_what_has_it_stays(tmp_path: Path) -> None:
    (tmp_path / "vdb.qcow2").write_text("mine")
    pairs = written(tmp_path, "vda.qcow2", "vdb.qcow2")
    with pytest.raises(FileExistsError):
        land(pairs)
    assert (tmp_path / "vdb.qcow2").read_text() == "mine"
    assert not (tmp_path / "vda.qcow2").exists()


def test_killed_between_two_names_the_others_come(
    tmp_path: Path, links: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = written(tmp_path, "vda.qcow2", "vdb.qcow2")
    land(pairs[:1])
    with writing([final for _, final in pairs]):
        # Without hard links nothing tells that they were whole; vdb is restored again.
        assert names(tmp_path) == ["vda.qcow2", "vdb.qcow2"][: 2 if links else 1]
        assert (tmp_path / "vda.qcow2").read_text() == "vda.qcow2"
    assert ("completing" in caplog.text) is links


def test_killed_before_the_first_name_nothing_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path, "vda.qcow2", "vdb.qcow2")
    with writing([tmp_path / "vdb.qcow2"]):
        assert names(tmp_path) == []
    assert "removing" in caplog.text


def test_what_others_are_writing_and_other_names_are_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    mine = written(tmp_path, "vda.qcow2")
    (tmp_path / ".vda.qcow2.restoring").write_text("not of ours")
    there = names(tmp_path)
    with writing([tmp_path / "vdx.qcow2"]):
        assert names(tmp_path) == there
    with writing([tmp_path / "other.raw"]), writing([tmp_path / "vda.qcow2"]):
        assert names(tmp_path) == there
    assert caplog.text == ""
    with writing([tmp_path / "vda.qcow2"]):
        assert names(tmp_path) == [".vda.qcow2.restoring"]
    assert not mine[0][0].exists()


def test_where_nothing_can_be_locked_nothing_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, "vda.qcow2")
    there = names(tmp_path)

    def refused(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(temporaries, "_PATIENCE", 0.0)
    with writing([tmp_path / "vda.qcow2"]):
        assert names(tmp_path) == there
