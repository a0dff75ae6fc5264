"""The command restore: which of its three ways is gone, and with what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckptmgr.cli import main

from .cli_host import Host, host_fixture
from .restorable import restorable

__all__ = ["host_fixture"]

Output = pytest.CaptureFixture[str]


@pytest.fixture(name="repo")
def repo_fixture(tmp_path: Path) -> str:
    return str(restorable(tmp_path / "repo").path.parent)


def asked(host: Host) -> list[tuple[str, tuple[object, ...], dict[str, object]]]:
    """What the hypervisor was asked, without callbacks."""
    return [
        (name, arguments, {key: value for key, value in options.items() if key != "progress"})
        for name, arguments, options in host.only.asked
    ]


def test_disks_are_restored_without_a_hypervisor(
    host: Host, repo: str, tmp_path: Path, capsys: Output
) -> None:
    folder = tmp_path / "to"
    assert main(["restore", repo, "web", "monday", str(folder), "--disk", "vda"]) == 0
    assert host.sessions == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["Disk", "Format", "Size", "Written", "File"]
    assert lines[2].split() == ["vda", "qcow2", "512", "KiB", "0", "B", f"{folder}/vda.qcow2"]
    assert (folder / "vda.qcow2").exists()


def test_a_relative_folder_is_the_callers(
    repo: str, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["restore", repo, "web", "monday", "to", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["disks"][0]["file"] == f"{tmp_path}/to/vda.qcow2"


def test_a_domain_is_defined(host: Host, repo: str, capsys: Output) -> None:
    command = ["restore", repo, "web", "monday", "/to", "--define", "web2", "--flatten"]
    assert main([*command, "--onto", "vdb=/dev/vg/a=b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["domain"]["name"] == "web"
    assert main([*command, "--dry-run"]) == 0
    options = {"disks": (), "onto": {}, "flatten": True, "name": "web2"}
    where = (Path(repo), "web", "monday", Path("/to"))
    assert asked(host) == [
        ("define", where, {**options, "onto": {"vdb": Path("/dev/vg/a=b")}}),
        ("plan_define", where, options),
    ]


def test_disks_are_put_back_in_place(host: Host, repo: str, capsys: Output) -> None:
    command = ["restore", repo, "web", "monday", "--in-place", "--disk", "vda"]
    assert main(command) == 0
    assert "/img/vda.qcow2" in capsys.readouterr().out
    assert main([*command, "--dry-run"]) == 0
    assert asked(host) == [
        ("restore", (Path(repo), "monday"), {"disks": ("vda",)}),
        ("plan_restore", (Path(repo), "monday"), {"disks": ("vda",)}),
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/to", "--in-place"], "--in-place and DIR exclude each other"),
        (["--in-place", "--define", "a"], "--in-place and --define exclude each other"),
        (["--in-place", "--flatten"], "--in-place and --flatten exclude each other"),
        (["--in-place", "--onto", "vda=/x"], "--in-place and --onto exclude each other"),
        (["--define", "web2"], "--define needs a folder"),
        (["--onto", "vda"], "does not say which disk goes to which volume"),
        (["--onto", "=/x"], "does not say which disk goes to which volume"),
        (["--onto", "vda=/x", "--onto", "vda=/y"], "a disk can be written to one volume"),
    ],
)
def test_what_does_not_go_together_is_a_usage_error(
    host: Host, repo: str, capsys: Output, arguments: list[str], says: str
) -> None:
    assert main(["restore", repo, "web", "monday", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert host.only.asked == []


def test_a_point_that_is_not_there_is_status_3(repo: str, capsys: Output) -> None:
    assert main(["restore", repo, "web", "sunday", "/to", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "no-point"
    assert main(["restore", repo, "web", "monday", "--json"]) == 2
