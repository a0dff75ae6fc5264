"""The snapshot and hook commands: what they ask the library for, and what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.cli import main

from .cli_host import PLAN, SNAPSHOT, Host, checkpoint, host_fixture

__all__ = ["host_fixture"]

Output = pytest.CaptureFixture[str]


def run(capsys: Output, *words: str, status: int = 0) -> str:
    assert main(list(words)) == status
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (
            ["create", "web"],
            ("create_snapshot", (None,), {"disk_only": False, "checkpoint": False}),
        ),
        (
            ["create", "web", "s1", "--disk-only", "--checkpoint", "--description", "d"],
            ("create_snapshot", ("s1",), {"disk_only": True, "checkpoint": True}),
        ),
        (
            ["create", "web", "s1", "--memory", "/img/s1.memory"],
            ("create_snapshot", ("s1",), {"disk_only": False, "memory": "/img/s1.memory"}),
        ),
        (["revert", "web", "s1"], ("revert_snapshot", ("s1",), {"run": None})),
        (["revert", "web", "s1", "--running"], ("revert_snapshot", ("s1",), {"run": True})),
        (["revert", "web", "s1", "--paused"], ("revert_snapshot", ("s1",), {"run": False})),
        (
            ["delete", "web", "s1", "--children", "--metadata"],
            ("delete_snapshot", ("s1",), {"children": True, "metadata": True}),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_asks_for_just_what_was_said(
    words: list[str], asked: tuple[str, Any, dict[str, Any]], host: Host, capsys: Output
) -> None:
    run(capsys, "snapshot", *words)
    name, arguments, options = host.only.asked[0]
    assert (name, arguments) == asked[:2]
    assert asked[2].items() <= options.items()
    # And the plan is asked for with the same.
    host.only.asked.clear()
    shown = json.loads(run(capsys, "snapshot", *words, "--dry-run", "--json"))
    assert shown["steps"] == PLAN.lines()
    assert host.only.asked == [("plan_" + name, arguments, options)]


def test_names_are_what_is_printed(host: Host, capsys: Output) -> None:
    assert run(capsys, "snapshot", "create", "web") == "before-update\n"
    assert run(capsys, "snapshot", "revert", "web", "before-update") == "c9\n"
    assert run(capsys, "snapshot", "delete", "web", "before-update") == "before-update\n"
    assert run(capsys, "snapshot", "list", "web", "--name") == "before-update\n"


def test_the_list_shows_where_each_hangs(host: Host, capsys: Output) -> None:
    header, _, row = run(capsys, "snapshot", "list", "web").splitlines()
    assert header.split() == ["Name", "Created", "Checkpoint", "State", "Memory", "Disks"]
    assert row.split()[:2] == ["*", "before-update"]
    assert row.split()[-5:] == ["c1", "running", "internal", "vda", "(internal)"]


def test_the_list_s_json_has_the_promised_fields(host: Host, capsys: Output) -> None:
    shown = json.loads(run(capsys, "snapshot", "list", "web", "--json"))
    (entry,) = shown["snapshots"]
    assert {"name", "checkpoint", "created", "current"} <= set(entry)
    assert entry == SNAPSHOT.json()


def test_a_revert_s_json_is_that_of_its_checkpoint(host: Host, capsys: Output) -> None:
    shown = json.loads(run(capsys, "snapshot", "revert", "web", "s1", "--json"))
    assert shown == checkpoint("c9", "c1").json()


def test_the_tree_s_json_has_the_snapshots_and_where_the_domain_is(
    host: Host, capsys: Output
) -> None:
    shown = json.loads(run(capsys, "list", "web", "--tree", "--json"))
    assert shown["snapshots"] == [SNAPSHOT.json()]
    assert shown["now"] == {"checkpoint": "c4", "state": "running"}


def test_a_plain_list_does_not_ask_for_snapshots(host: Host, capsys: Output) -> None:
    assert set(json.loads(run(capsys, "list", "web", "--json"))) == {
        "domain",
        "current",
        "checkpoints",
    }


def test_running_and_paused_exclude_each_other(host: Host, capsys: Output) -> None:
    assert main(["snapshot", "revert", "web", "s1", "--running", "--paused"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert not host.only.asked


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("snapshot-create-as", "snapshot create"),
        ("snapshot-revert", "snapshot revert"),
        ("snapshot-list", "snapshot list"),
        ("snapshot-current", "snapshot list"),
        ("checkpoint-list", "list"),
    ],
)
def test_virsh_words_lead_to_ours(word: str, meant: str, host: Host, capsys: Output) -> None:
    assert main([word, "web"]) == 2
    assert f"did you mean 'ckptmgr {meant}'?" in capsys.readouterr().err


def test_a_wrong_word_in_a_group_gets_a_hint(host: Host, capsys: Output) -> None:
    assert main(["snapshot", "lsit", "web"]) == 2
    said = capsys.readouterr().err
    assert "there is no command 'snapshot lsit'" in said
    assert "did you mean 'ckptmgr snapshot list'?" in said
    assert main(["snapshot"]) == 2


def test_global_options_stand_anywhere(host: Host, capsys: Output) -> None:
    shown = [
        run(capsys, "--json", "snapshot", "list", "web"),
        run(capsys, "snapshot", "--json", "list", "web"),
        run(capsys, "snapshot", "list", "web", "--json"),
    ]
    assert len(set(shown)) == 1
    assert shown[0].startswith("{")


# --- hook -------------------------------------------------------------------------------------


def test_the_hook_is_installed_told_of_and_removed(tmp_path: Path, capsys: Output) -> None:
    where = ["--directory", str(tmp_path)]
    path = tmp_path / "qemu.d/ckptmgr"
    assert "not installed" in run(capsys, "hook", "status", *where)
    assert run(capsys, "hook", "install", *where).splitlines()[0] == str(path)
    assert path.stat().st_mode & 0o777 == 0o755
    assert f"{path}: installed" in run(capsys, "hook", "status", *where)
    other = run(capsys, "hook", "status", *where, "--store", str(tmp_path / "other"))
    assert "installed, with other settings" in other
    assert run(capsys, "hook", "uninstall", *where) == "removed\n"
    assert run(capsys, "hook", "uninstall", *where) == "not installed\n"
    assert list(tmp_path.rglob("*")) == [tmp_path / "qemu.d"]


def test_the_hook_works_on_the_store_of_the_settings_that_are_named(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CKPTMGR_STORE", raising=False)
    settings = tmp_path / "ckptmgr.toml"
    settings.write_text(f'store = "{tmp_path}/theirs"\n')
    monkeypatch.setenv("CKPTMGR_CONFIG", str(settings))
    run(capsys, "hook", "install", "--directory", str(tmp_path))
    assert f"{tmp_path}/theirs" in (tmp_path / "qemu.d/ckptmgr").read_text()


def test_a_dry_run_installs_and_removes_nothing(tmp_path: Path, capsys: Output) -> None:
    where = ["--directory", str(tmp_path)]
    assert "write the hook" in run(capsys, "hook", "install", *where, "--dry-run")
    assert not list(tmp_path.iterdir())
    run(capsys, "hook", "install", *where)
    assert "remove the hook" in run(capsys, "hook", "uninstall", *where, "--dry-run")
    assert (tmp_path / "qemu.d/ckptmgr").exists()


def test_hooks_of_others_stay_and_are_named(tmp_path: Path, capsys: Output) -> None:
    where = ["--directory", str(tmp_path)]
    (tmp_path / "qemu.d").mkdir()
    for name in ("qemu", "qemu.d/other"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    run(capsys, "hook", "install", *where)
    shown = json.loads(run(capsys, "hook", "status", *where, "--json"))
    assert shown["others"] == [str(tmp_path / "qemu"), str(tmp_path / "qemu.d/other")]
    run(capsys, "hook", "uninstall", *where)
    assert (tmp_path / "qemu").read_text() == "#!/bin/sh\n"
    assert (tmp_path / "qemu.d/other").exists()


def test_a_file_of_our_name_that_is_not_ours_is_left_alone(tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "qemu.d/ckptmgr"
    path.parent.mkdir()
    path.write_bytes(b"#!/bin/sh\n\xff mine\n")
    for command in ("install", "uninstall"):
        assert main(["hook", command, "--directory", str(tmp_path)]) == 1
        assert "did not write" in capsys.readouterr().err
    assert path.read_bytes() == b"#!/bin/sh\n\xff mine\n"
    shown = json.loads(run(capsys, "hook", "status", "--directory", str(tmp_path), "--json"))
    assert shown["installed"] is False
