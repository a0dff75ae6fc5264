"""The commands on repositories, on repositories that are really there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import ckptmgr
from ckptmgr.backup.repository import Lineage, Repository
from ckptmgr.cli import main
from ckptmgr.cli.points import point_list, point_tree
from ckptmgr.cli.terminal import PLAIN, Terminal
from ckptmgr.store import lock

from .cli_host import Host, host_fixture
from .repositories import NOON, OTHER_UUID, UUID, commit, filled, manifest, point_disk

__all__ = ["host_fixture"]

Output = pytest.CaptureFixture[str]


@pytest.fixture(name="lineage")
def lineage_fixture(tmp_path: Path) -> Lineage:
    return filled(tmp_path / "repo")


@pytest.fixture(name="repo")
def repo_fixture(lineage: Lineage) -> str:
    return str(lineage.path.parent)


def document(capsys: Output, *arguments: str, status: int = 0) -> Any:
    assert main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_points_ask_no_hypervisor(host: Host, repo: str, capsys: Output) -> None:
    assert main(["points", repo]) == 0
    assert host.sessions == []
    assert capsys.readouterr().out.splitlines()[2].split()[:2] == ["web", "monday"]


@pytest.mark.parametrize(
    "words",
    [("prune", "--keep-last=1"), ("restore", "web", "friday", "to")],
    ids=["prune", "restore"],
)
def test_others_are_waited_for_as_long_as_the_settings_say(
    words: tuple[str, ...],
    repo: str,
    lineage: Lineage,
    tmp_path: Path,
    capsys: Output,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = tmp_path / "ckptmgr.toml"
    settings.write_text("lock_timeout = 0\n")
    monkeypatch.setenv("CKPTMGR_CONFIG", str(settings))
    monkeypatch.chdir(tmp_path)
    waited: list[float] = []
    monkeypatch.setattr(lock.time, "sleep", waited.append)
    with lineage.lock(0):
        found = document(capsys, words[0], repo, *words[1:], status=5)
    assert found["error"]["code"] == "busy"
    assert waited == []


def test_points_as_json(repo: str, capsys: Output, lineage: Lineage) -> None:
    found = document(capsys, "points", repo)
    assert [point["name"] for point in found["points"]] == [
        "monday",
        "tuesday",
        "wednesday",
        "friday",
    ]
    assert [point["parent"] for point in found["points"]] == [None, "monday", "tuesday", "tuesday"]
    assert found["damaged"] == []
    tuesday = found["points"][1]
    assert tuesday["domain"] == "web"
    assert tuesday["uuid"] == tuesday["lineage"] == UUID
    assert tuesday["created"] == "2026-11-23T12:00:00Z"
    (disk,) = tuesday["disks"]
    assert disk["mode"] == "incremental"
    assert disk["base"] == "monday"
    assert Path(disk["file"]) == lineage.path / "tuesday" / "vda.qcow2"
    assert disk["bytes"] == Path(disk["file"]).stat().st_size
    assert ckptmgr.repository(repo).points(UUID).json() == found


def test_points_of_a_restored_domain_stand_in_the_same_tree(
    lineage: Lineage, capsys: Output, repo: str
) -> None:
    with lineage.lock(0):
        other = {"domain_name": "web-test", "domain_uuid": OTHER_UUID, "created": NOON + 9}
        commit(lineage, manifest("sunday", "monday", **other))
    view = ckptmgr.repository(repo).points()
    drawn = [line.split("   ") for line in point_tree(view, Terminal(unicode=True))]
    assert [line[0].rstrip() for line in drawn] == [
        "○ monday",
        "├─○ sunday",
        "└─○ tuesday",
        "  ├─○ wednesday",
        "  └─○ friday",
    ]
    assert drawn[1][-1] == "web-test"
    only = document(capsys, "points", repo, "web-test")["points"]
    assert [(point["name"], point["parent"]) for point in only] == [("sunday", "monday")]


def test_an_unknown_domain_and_repository_are_told_apart(
    repo: str, capsys: Output, tmp_path: Path
) -> None:
    found = document(capsys, "points", repo, "db", status=3)
    assert found["error"]["code"] == "no-point"
    assert "'db'" in found["error"]["message"]
    found = document(capsys, "points", str(tmp_path / "nowhere"), status=1)
    assert found["error"]["code"] == "repository"
    (tmp_path / "empty").mkdir()
    assert document(capsys, "points", str(tmp_path / "empty")) == {"points": [], "damaged": []}


def test_damage_is_shown_and_hides_nothing(repo: str, capsys: Output, lineage: Lineage) -> None:
    (lineage.path / "tuesday" / "manifest.json").write_bytes(b"\x1b[2J")
    found = document(capsys, "points", repo)
    assert [point["name"] for point in found["points"]] == ["monday", "wednesday", "friday"]
    assert [point["broken"] is None for point in found["points"]] == [True, False, False]
    assert [damage["name"] for damage in found["damaged"]] == ["tuesday"]
    for option in ([], ["--tree"]):
        assert main(["points", repo, *option]) == 0
        out = capsys.readouterr().out
        assert "damaged: " in out
        assert "stands on tuesday, which is missing or damaged" in out
        assert "\x1b" not in out


def test_a_disk_that_is_full_is_marked(tmp_path: Path) -> None:
    lineage = Repository(tmp_path / "repo").lineage(UUID)
    with lineage.lock(0):
        commit(lineage, manifest("a", disks=(point_disk("vda"), point_disk("vdb"))))
        commit(lineage, manifest("b", "a", disks=(point_disk("vda", "a"), point_disk("vdb"))))
        commit(lineage, manifest("c", "b", disks=()))
    view = ckptmgr.repository(tmp_path / "repo").points()
    cells = [re.split(r" {3,}", line) for line in point_list(view, PLAIN)]
    assert [row[5] for row in cells[2:]] == ["vda vdb (all full)", "vda vdb (full)", "-"]


def test_domains_and_points_of_a_repository_are_completed(
    repo: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for typed, expected in [
        (f"ckptmgr points {repo} ", ["plain,web"]),
        (f"ckptmgr points {repo}x ", []),
    ]:
        monkeypatch.setenv("_CKPTMGR_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_LINE", typed)
        monkeypatch.setenv("COMP_CURRENT", "")
        main([])
        assert capfd.readouterr().out.split() == expected
