"""Each command: what it asks the library for, and what it prints."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.align import DiskRequest
from ckptmgr.cli import main
from ckptmgr.cli.checkpoints import DOCUMENT_MAX

from .cli_host import (
    DIFF,
    DOMAIN,
    FINDINGS,
    FORK,
    PLAN,
    UNFINISHED,
    Host,
    checkpoint,
    host_fixture,
)

__all__ = ["host_fixture"]

Output = pytest.CaptureFixture[str]
TEXT = "<domaincheckpoint/>"


def lines(capsys: Output, *arguments: str, status: int = 0) -> list[str]:
    assert main(list(arguments)) == status
    return capsys.readouterr().out.splitlines()


def document(capsys: Output, *arguments: str, status: int = 0) -> Any:
    assert main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_create_prints_the_name_and_nothing_else(host: Host, capsys: Output) -> None:
    assert lines(capsys, "create", "web", "c9") == ["c9"]
    assert document(capsys, "create", "web", "c9") == checkpoint("c9").json()


def test_create_asks_for_what_was_given(host: Host, capsys: Output) -> None:
    words = ["--description", "two\nlines", "--disk", "vda", "--disk", "vdb=no", "--quiesce"]
    lines(capsys, "create", "web", "c9", "--disk", "vdc=bitmap:c9", *words)
    options = {
        "description": "two\nlines",
        "disks": [
            DiskRequest("vdc", bitmap="c9"),
            DiskRequest("vda"),
            DiskRequest("vdb", track=False),
        ],
        "quiesce": True,
    }
    assert host.only.asked == [("create", ("c9",), options)]


def test_create_without_a_name_leaves_it_to_the_library(host: Host, capsys: Output) -> None:
    lines(capsys, "create", "web")
    options: dict[str, Any] = {"description": None, "disks": [], "quiesce": False}
    assert host.only.asked == [("create", (None,), options)]


@pytest.mark.parametrize(
    "words",
    [
        ["create", "web", "c9"],
        ["delete", "web", "c2", "--children"],
        ["redefine", "web", "-"],
        ["adopt", "web"],
        ["repair", "web", "--foreign"],
        ["archive", "web", "--keep", "3"],
    ],
    ids=" ".join,
)
def test_a_dry_run_plans_and_does_nothing(
    words: list[str], host: Host, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    shown = lines(capsys, *words, "--dry-run")
    assert shown[0].split() == ["Engine:", "libvirt"]
    assert shown[2] == "  1. libvirt: create the checkpoint"
    assert shown[-1] == "Nothing was done."
    assert [name for name, _, _ in host.only.asked] == [f"plan_{words[0]}"]

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert document(capsys, *words, "--dry-run") == {
        "dry_run": True,
        "engine": "libvirt",
        "steps": PLAN.lines(),
        "notes": ["vdb is left out: raw"],
    }


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ([], {}),
        (["--roots"], {"roots": True}),
        (["--leaves"], {"leaves": True}),
        (["--no-leaves"], {"leaves": False}),
        (["--from", "c1"], {"start": "c1"}),
        (["--from", "c1", "--descendants"], {"start": "c1", "descendants": True}),
        (["--topological"], {"topological": True}),
        (["--tree"], {"snapshots": True}),
        (
            ["--tree", "--from", "c1"],
            {"start": "c1", "descendants": True, "snapshots": True},
        ),
    ],
    ids=str,
)
def test_list_chooses_as_virsh_does(
    words: list[str], changed: dict[str, Any], host: Host, capsys: Output
) -> None:
    lines(capsys, "list", "web", *words)
    unasked = {
        "roots": False,
        "leaves": None,
        "start": None,
        "descendants": False,
        "topological": False,
        "snapshots": False,
    }
    assert host.only.asked[0] == ("checkpoints", (), unasked | changed)


def test_list_by_name_prints_names_only(host: Host, capsys: Output) -> None:
    assert lines(capsys, "list", "web", "--name") == ["c0", "c1", "c2", "c3", "c4"]


def test_list_as_a_tree_from_a_checkpoint_includes_it(host: Host, capsys: Output) -> None:
    shown = lines(capsys, "list", "web", "--tree", "--from", "c1")
    assert [line.split()[:2] for line in shown] == [["o", "c1"], ["o", "c2"], ["o", "c3"]]


def test_list_as_json(host: Host, capsys: Output) -> None:
    shown = document(capsys, "list", "web")
    assert set(shown) == {"domain", "current", "checkpoints"}
    assert shown["current"] == "c4"
    assert shown["checkpoints"] == [each.json() for each in FORK]


def test_piped_tables_are_not_cut(
    host: Host, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    host.only.existing = [checkpoint("n" * 200)]
    shown = lines(capsys, "list", "web")
    assert len(shown) == 3
    assert "n" * 200 in shown[2]
    assert shown[2].endswith("recording")


def test_show(host: Host, capsys: Output) -> None:
    assert lines(capsys, "show", "web", "c1")[0].split() == ["Name:", "c1"]
    assert host.only.asked == [("checkpoint", ("c1",), {"size": False})]
    assert document(capsys, "show", "web", "c1", "--size") == FORK[1].json()
    assert host.only.asked[1] == ("checkpoint", ("c1",), {"size": True})


def test_show_xml_prints_the_document_and_nothing_else(host: Host, capsys: Output) -> None:
    assert main(["show", "web", "c1", "--xml"]) == 0
    xml = host.only.document("c1")
    assert capsys.readouterr().out == xml
    assert document(capsys, "show", "web", "c1", "--xml") == FORK[1].json() | {"xml": xml}


def test_show_of_none_is_status_3(host: Host, capsys: Output) -> None:
    error = document(capsys, "show", "web", "nope", status=3)["error"]
    assert error["code"] == "no-checkpoint"
    assert document(capsys, "show", "nope", "c1", status=3)["error"]["code"] == "no-domain"


def test_current_prints_the_name(host: Host, capsys: Output) -> None:
    assert lines(capsys, "current", "web") == ["c4"]
    assert document(capsys, "current", "web") == FORK[4].json()


def test_no_current_checkpoint_is_status_3(host: Host, capsys: Output) -> None:
    host.only.existing = FORK[:2]
    assert document(capsys, "current", "web", status=3)["error"]["code"] == "no-checkpoint"


def test_whether_there_is_a_current_one_is_the_status(host: Host, capsys: Output) -> None:
    assert lines(capsys, "current", "web", "--exists") == ["yes"]
    assert document(capsys, "current", "web", "--exists") == {"exists": True}
    host.only.existing = []
    assert lines(capsys, "current", "web", "--exists", status=3) == ["no"]
    assert document(capsys, "current", "web", "--exists", status=3) == {"exists": False}


def test_parent_prints_the_name(host: Host, capsys: Output) -> None:
    assert lines(capsys, "parent", "web", "c4") == ["c1"]
    assert document(capsys, "parent", "web", "c4") == FORK[1].json()
    assert document(capsys, "parent", "web", "c0", status=3)["error"]["code"] == "no-checkpoint"


@pytest.mark.parametrize("option", [None, "children", "children_only", "metadata"])
def test_delete_prints_what_was_deleted(option: str | None, host: Host, capsys: Output) -> None:
    words = [] if option is None else ["--" + option.replace("_", "-")]
    assert lines(capsys, "delete", "web", "c2", *words) == ["c2", "c3"]
    options = {"children": False, "children_only": False, "metadata": False}
    if option is not None:
        options[option] = True
    assert host.only.asked == [("delete", ("c2",), options)]
    assert document(capsys, "delete", "web", "c2") == {
        "domain": DOMAIN.json(),
        "deleted": ["c2", "c3"],
    }


def test_redefine_reads_a_file_or_standard_input(
    host: Host, capsys: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "дом.xml"
    file.write_text(TEXT)
    assert lines(capsys, "redefine", "web", str(file), "--validate") == ["c9"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert document(capsys, "redefine", "web", "-") == checkpoint("c9").json()
    assert host.only.asked == [
        ("redefine", (TEXT,), {"validate": True}),
        ("redefine", (TEXT,), {"validate": False}),
    ]


def test_redefine_refuses_what_is_no_document_before_connecting(
    host: Host, capsys: Output, tmp_path: Path
) -> None:
    missing, folder, huge, binary = (tmp_path / name for name in ("none", "dir", "huge", "binary"))
    folder.mkdir()
    with huge.open("wb") as stream:
        stream.truncate(DOCUMENT_MAX + 1)
    binary.write_bytes(b"\xff\xfe")
    for file, code in (
        (missing, "failed"),
        (folder, "failed"),
        (huge, "invalid-document"),
        (binary, "invalid-document"),
        (Path("/dev/zero"), "invalid-document"),
    ):
        error = document(capsys, "redefine", "web", str(file), status=1)["error"]
        assert error["code"] == code
        assert str(file) in error["message"]
    assert host.sessions == []


def test_adopt_prints_names(host: Host, capsys: Output) -> None:
    assert lines(capsys, "adopt", "web") == ["v1", "v2"]
    assert document(capsys, "adopt", "web") == {
        "domain": DOMAIN.json(),
        "checkpoints": [checkpoint("v1").json(), checkpoint("v2", "v1").json()],
    }


def test_diff(host: Host, capsys: Output) -> None:
    assert len(lines(capsys, "diff", "web", "c0")) == 4
    lines(capsys, "diff", "web", "c0", "c1")
    assert host.only.asked == [("diff", ("c0", None), {}), ("diff", ("c0", "c1"), {})]


def test_diff_has_extents_only_when_asked(host: Host, capsys: Output) -> None:
    assert document(capsys, "diff", "web", "c0") == DIFF.json()
    shown = document(capsys, "diff", "web", "c0", "--extents")
    assert shown["disks"][0]["extents"] == [[0, 131072], [589824, 65536]]
    assert shown["disks"][1]["extents"] == [[0, 524288]]
    assert "0   131072   128 KiB" in "\n".join(lines(capsys, "diff", "web", "c0", "--extents"))


def test_check_names_each_finding_with_its_cure_and_is_status_4(host: Host, capsys: Output) -> None:
    assert lines(capsys, "check", "web", status=4) == [
        "missing-bitmap: the bitmap of c4 on vda is missing",
        "  cure: that is recorded",
        "disk-resized: vda \\x1b[31m has grown",
        "  cure: none is needed",
        "1 finding needs a cure.",
    ]
    shown = document(capsys, "check", "web", status=4)
    assert shown["consistent"] is False
    assert [finding["code"] for finding in shown["findings"]] == ["missing-bitmap", "disk-resized"]


def test_what_is_harmless_is_told_and_is_consistent(
    host: Host, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.only, "check", lambda: FINDINGS[1:])
    assert lines(capsys, "check", "web")[-1] == "consistent"
    assert document(capsys, "check", "web")["consistent"] is True


def test_what_was_left_of_a_domain_that_never_came_to_be_is_told_and_cured(
    host: Host, capsys: Output
) -> None:
    assert lines(capsys, "check", "web2", status=4)[0] == f"intent: {UNFINISHED.message}"
    document(capsys, "repair", "web2", "--dry-run")
    assert host.only.asked == []
    assert lines(capsys, "repair", "web2") == [f"cured intent: {UNFINISHED.message}", "consistent"]
    assert host.only.asked == [("take_back", ("web2",), {})]
    for words in (("check",), ("repair",), ("repair", "--dry-run")):
        document(capsys, *words, "web3", status=3)
    assert host.only.asked == [("take_back", ("web2",), {})]  # the store was not searched for that


def test_repair_tells_what_was_cured_and_what_is_left(
    host: Host, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    cured = "cured missing-bitmap: the bitmap of c4 on vda is missing"
    assert lines(capsys, "repair", "web", "--foreign") == [cured, "consistent"]
    assert host.only.asked[0] == ("repair", (), {"foreign": True})
    monkeypatch.setattr(host.only, "check", lambda: FINDINGS)
    assert lines(capsys, "repair", "web", status=4)[:2] == [
        cured,
        "missing-bitmap: the bitmap of c4 on vda is missing",
    ]
    assert document(capsys, "repair", "web", status=4)["consistent"] is False


def test_archive_prints_the_disks_whose_bitmaps_went(host: Host, capsys: Output) -> None:
    assert lines(capsys, "archive", "web", "--keep", "2") == ["c1: vda vdb", "c2: vda"]
    assert lines(capsys, "archive", "web")
    assert host.only.asked == [("archive", (2,), {}), ("archive", (1,), {})]
    assert document(capsys, "archive", "web")["archived"][1] == {
        "checkpoint": "c2",
        "disks": ["vda"],
    }


def test_archive_keeps_at_least_one(host: Host, capsys: Output) -> None:
    assert main(["archive", "web", "--keep", "0"]) == 2
    assert host.only.asked == []
