"""Tables, blocks and plans as people see them."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.checkpoint import EngineName, State
from ckptmgr.cli.render import checkpoint_block, checkpoint_list, diff_lines, plan_lines
from ckptmgr.cli.table import Cell, Column, table
from ckptmgr.cli.terminal import PLAIN, Style, Terminal
from ckptmgr.plan.steps import Plan
from ckptmgr.views import CheckpointView, DomainView, ListView

from .cli_host import DIFF, DOMAIN, FORK, PLAN, checkpoint, disk

COLOUR = Terminal(colour=True, unicode=True)
HOSTILE = "\x1b]0;owned\x07[bold]\r\n\u202e'\"<"


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def uncoloured(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]+m", "", text)


def listing(checkpoints: list[CheckpointView], **options: bool) -> str:
    view = ListView(DOMAIN, None, tuple(checkpoints))
    return "\n".join(checkpoint_list(view, PLAIN, **options))


def test_list_marks_the_current_checkpoint() -> None:
    assert listing([FORK[0], FORK[4]]) == (
        """\
   Name   Created                     Engine    Disks   State
------------------------------------------------------------------
   c0     2026-11-22 12:00:00 +0000   libvirt   vda     recording
 * c4     2026-11-22 12:00:00 +0000   libvirt   vda     recording"""
    )


def test_list_with_parents() -> None:
    lines = listing([FORK[0], FORK[4]], parents=True).splitlines()
    assert lines[0].split() == ["Name", "Parent", "Created", "Engine", "Disks", "State"]
    assert lines[3].split()[:3] == ["*", "c4", "c1"]


def test_list_of_nothing_is_its_header() -> None:
    assert len(listing([]).splitlines()) == 2


def test_list_tells_which_disks_need_attention() -> None:
    disks = (
        disk("vda"),
        disk("vdb", state=State.BROKEN),
        disk("vdc", None, reason="read-only"),
        disk("vdd", state=State.FROZEN),
    )
    line = listing([checkpoint("c0", disks=disks)]).splitlines()[2]
    assert line.endswith("vda vdb vdd   broken (vdb), frozen (vdd), recording (vda)")


def test_list_shortens_many_disks() -> None:
    disks = tuple(disk(f"vd{letter}") for letter in "abcdefghij")
    line = listing([checkpoint("c0", disks=disks)]).splitlines()[2]
    assert "vda vdb vdc vdd vde and 5 more   recording" in line


def test_a_checkpoint_as_a_block() -> None:
    view = replace(FORK[1], description="before\nthe upgrade", engine=EngineName.MONITOR)
    assert "\n".join(checkpoint_block(view, PLAIN, sizes=False)) == (
        """\
Name:         c1
Domain:       web (6695eb01-f6a4-8304-79aa-97f2502e193f)
Current:      no
Parent:       c0
Children:     c2, c4
Created:      2026-11-22 12:00:00 +0000
Engine:       monitor
Description:  before
              the upgrade

 Disk   State       Bitmap   Granularity   Node               Note
---------------------------------------------------------------------------------------------
 vda    recording   c1            64 KiB   libvirt-1-format
 vdb    none        -                  -   -                  raw images cannot keep bitmaps"""
    )


def test_a_block_with_sizes_tells_unknown_from_none() -> None:
    disks = (disk("vda", dirty_bytes=0), disk("vdb", dirty_bytes=None), disk("vdc", None))
    lines = list(checkpoint_block(checkpoint("c0", disks=disks), PLAIN, sizes=True))
    assert [line.split("  ")[-1].strip() for line in lines[-5:]] == [
        "Dirty since",
        lines[-4],
        "0 B",
        "unknown",
        "-",
    ]


def test_a_bitmap_that_dies_with_qemu_is_told() -> None:
    lines = checkpoint_block(checkpoint("c0", disks=(disk(persistent=False),)), PLAIN, sizes=False)
    assert "lives as long as this QEMU process" in list(lines)[-1]


def test_what_changed() -> None:
    assert "\n".join(diff_lines(DIFF, PLAIN, extents=False)) == (
        """\
 Disk      Size   Changed    Share   Granularity   Known
--------------------------------------------------------------------------------
 vda      1 MiB   192 KiB   18.75%        64 KiB   yes
 vdb    512 KiB   512 KiB     100%             -   no: the bitmap c0 is missing"""
    )


def test_where_it_changed() -> None:
    lines = list(diff_lines(DIFF, PLAIN, extents=True))[5:]
    assert "\n".join(lines[:5]) == (
        """\
vda
  Start   Length      Size
---------------------------
      0   131072   128 KiB
 589824    65536    64 KiB"""
    )
    assert lines[6] == "vdb"


def test_a_plan() -> None:
    assert "\n".join(plan_lines(PLAN, PLAIN)) == (
        """\
Engine:       libvirt
Steps:
  1. libvirt: create the checkpoint
Note:         vdb is left out: raw
Nothing was done."""
    )
    assert "Steps:        none" in plan_lines(Plan(EngineName.OFFLINE, ()), PLAIN)


@pytest.mark.parametrize("terminal", [PLAIN, COLOUR])
def test_hostile_names_and_descriptions_are_harmless(terminal: Terminal) -> None:
    view = checkpoint(
        HOSTILE,
        HOSTILE,
        children=(HOSTILE,),
        domain=DomainView(HOSTILE, HOSTILE),
        description=HOSTILE,
        disks=(disk(HOSTILE, HOSTILE, node=HOSTILE, reason=HOSTILE),),
    )
    lines = [
        *checkpoint_block(view, terminal, sizes=True),
        *checkpoint_list(ListView(DOMAIN, None, (view,)), terminal, parents=True),
        *plan_lines(replace(PLAN, notes=(HOSTILE,)), terminal),
    ]
    assert all(uncoloured(line).isprintable() for line in lines)
    assert any("[bold]" in line for line in lines)  # shown, not interpreted


def test_colour_changes_no_text() -> None:
    view = ListView(DOMAIN, "c4", tuple(FORK))
    for draw in (checkpoint_list, lambda *a: checkpoint_block(FORK[0], a[1], sizes=True)):
        coloured = "\n".join(draw(view, COLOUR))
        assert coloured != uncoloured(coloured) == "\n".join(draw(view, PLAIN))


@given(st.lists(st.tuples(st.text(), st.text(), st.text()), max_size=5))
def test_tables_are_aligned_whatever_is_in_them(rows: list[tuple[str, str, str]]) -> None:
    from ckptmgr.cli.text import width

    columns = [Column("A"), Column("B", right=True), Column("C")]
    marked = [(a, b, Cell("|" + c, Style.BAD)) for a, b, c in rows]
    lines = list(table(columns, marked, PLAIN))
    assert len(lines) == len(rows) + 2
    assert all(line.isprintable() for line in lines)
    # The third column starts where its title does.
    start = lines[0].rindex("C")
    for line, (_, _, c) in zip(lines[2:], marked, strict=True):
        head = line[: len(line) - len(_visible(c.text))]
        assert width(head) == start


def _visible(text: str) -> str:
    from ckptmgr.cli.text import visible

    return visible(text)
