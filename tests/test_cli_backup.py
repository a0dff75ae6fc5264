"""The command backup: what it asks the library for, and what it refuses."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ckptmgr.cli import main
from ckptmgr.cli.bars import Bars

from .cli_host import Host, host_fixture

__all__ = ["host_fixture"]


def asked(host: Host) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """What the library was asked for, in order."""
    return host.only.asked


def test_options_reach_the_library(host: Host, tmp_path: Path) -> None:
    command = f"backup web {tmp_path} p --full --disk vda --disk /x --compress zstd --pause"
    assert main([*command.split(), "--quiesce", "--limit", "1.5M", "--new", "--decrypt"]) == 0
    (call,) = asked(host)
    assert call[0] == "backup"
    assert call[1:3] == ((tmp_path, "p"), {
        "full": True, "disks": ("vda", "/x"), "compress": True,
        "quiesce": True, "pause": True, "limit": 1536 * 1024, "new": True,
        "decrypt": True,
    })  # fmt: skip


def test_the_guest_is_frozen_if_it_can_be_where_nothing_is_said(host: Host, tmp_path: Path) -> None:
    main(["backup", "web", str(tmp_path)])
    assert asked(host)[0][2]["quiesce"] is None
    main(["backup", "web", str(tmp_path), "--no-quiesce", "--dry-run"])
    assert asked(host)[1][0] == "plan_backup"
    assert asked(host)[1][2]["quiesce"] is False


@pytest.mark.parametrize(
    ("told", "bytes_"),
    [("50M", 50 << 20), ("1GiB/s", 1 << 30), ("512", 512), ("0.5k", 512), ("2 TB", 2 << 40)],
)
def test_a_rate_has_binary_units(host: Host, tmp_path: Path, told: str, bytes_: int) -> None:
    main(["backup", "web", str(tmp_path), "--limit", told])
    assert asked(host)[0][2]["limit"] == bytes_


@pytest.mark.parametrize("told", ["", "0", "fast", "-5M", "5Q", "1e9", "0.0M"])
def test_what_is_no_rate_is_refused(host: Host, tmp_path: Path, told: str) -> None:
    assert main(["backup", "web", str(tmp_path), f"--limit={told}"]) == 2
    assert not asked(host)


@pytest.mark.parametrize("width", [40, 50, 60, 80, 120])
def test_a_bar_stays_on_its_line_on_a_narrow_terminal(width: int) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=width, height=20)
    bars = Bars(console)
    bars.start()
    bars.show("vda", 18 << 20, 512 << 20)
    bars.show("vdb", 180 << 20, 51200 << 20)
    bars.stop()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.getvalue())
    last = re.split(r"[\r\n]+", shown.rstrip())[-2:]
    assert [line.split()[0] for line in last] == ["vda", "vdb"]
    assert all(len(line) <= width and "iB" in line for line in last), last
