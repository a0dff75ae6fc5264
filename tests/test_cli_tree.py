"""The tree: every checkpoint once, below its parent, and in nobody else's line."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.checkpoint import State
from ckptmgr.cli.terminal import PLAIN, Terminal
from ckptmgr.cli.tree import tree
from ckptmgr.views import CheckpointView, ListView, PlaceView

from .cli_host import DOMAIN, FORK, SNAPSHOT, checkpoint, disk, forest

DRAWN = Terminal(unicode=True)


def listed(checkpoints: list[CheckpointView], **more: Any) -> ListView:
    current = next((each.name for each in checkpoints if each.current), None)
    return ListView(DOMAIN, current, tuple(checkpoints), **more)


def drawn(checkpoints: list[CheckpointView], terminal: Terminal = PLAIN, **more: Any) -> str:
    """The tree without its times."""
    lines = [
        re.sub(r" {3,}\d{4}-\S+ \S+ [+-]\d{4}", "", line)
        for line in tree(listed(checkpoints, **more), terminal)
    ]
    return "\n".join(lines)


def test_a_line_of_history_stays_in_one_column() -> None:
    assert drawn(forest({"c0": None, "c1": "c0", "c2": "c1"}, "c2")) == (
        """\
o c0
o c1
* c2   current"""
    )


def test_branches_get_columns_of_their_own() -> None:
    assert drawn(FORK) == (
        """\
o c0
o c1
|-o c2
| o c3
`-* c4   current"""
    )


def test_line_drawing_characters_where_they_can_be_shown() -> None:
    parents = {
        "c0": None, "a1": "c0", "a2": "a1", "a3": "a1", "a4": "a3", "b1": "c0", "b2": "b1",
        "r": None,
    }  # fmt: skip
    assert drawn(forest(parents, "a4"), DRAWN) == (
        """\
○ c0
├─○ a1
│ ├─○ a2
│ └─○ a3
│   ● a4   current
└─○ b1
  ○ b2

○ r"""
    )


def test_snapshots_hang_where_they_were_taken_and_the_domain_is_shown_where_it_is() -> None:
    later = replace(SNAPSHOT, name="later")
    before = replace(SNAPSHOT, name="old", checkpoint=None)
    shown = drawn(FORK, snapshots=(SNAPSHOT, later, before), place=PlaceView("c4", "running"))
    assert shown == (
        """\
o c0
o c1   snapshots before-update, later
|-o c2
| o c3
`-* c4   current   now: running

snapshot old: after no checkpoint"""
    )


def test_a_domain_that_went_back_unnoticed_is_shown_where_it_really_is() -> None:
    shown = drawn(FORK, snapshots=(), place=PlaceView("c1", "paused")).splitlines()
    assert shown[1] == "o c1   now: paused"
    assert shown[4] == "`-* c4   current"
    shown = drawn(FORK, snapshots=(), place=PlaceView(None, "shut off")).splitlines()
    assert shown[-1] == "now: shut off, after no checkpoint"


def test_no_checkpoints_is_no_tree() -> None:
    assert drawn([]) == ""


def test_times_and_notes_stand_in_columns() -> None:
    lines = list(tree(listed(FORK), PLAIN))
    assert len({line.index("2026-") for line in lines}) == 1


def test_a_broken_disk_is_told() -> None:
    broken = checkpoint("c0", disks=(disk(state=State.BROKEN), disk("vdb", state=State.RECORDING)))
    assert drawn([broken]) == "o c0   broken: vda"


def test_a_checkpoint_whose_parent_is_not_shown_is_drawn_as_a_root() -> None:
    assert drawn(FORK[2:4]) == "o c2\no c3"


def test_colour_changes_no_text() -> None:
    coloured = "\n".join(tree(listed(FORK), Terminal(colour=True)))
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == "\n".join(tree(listed(FORK), PLAIN))


@given(st.lists(st.integers(0, 40), max_size=40), st.permutations(range(40)))
def test_the_drawing_says_the_same_as_the_history(picks: list[int], order: list[int]) -> None:
    names = [f"c{number}" for number in range(len(picks))]
    parents = {
        name: (names[pick % number] if number and pick % (number + 3) < number else None)
        for number, (name, pick) in enumerate(zip(names, picks, strict=True))
    }
    shuffled = {names[i]: parents[names[i]] for i in order if i < len(names)}
    assert read_tree(drawn(forest(shuffled))) == parents


def test_a_history_of_thousands_is_drawn() -> None:
    line = {f"c{n}": f"c{n - 1}" if n else None for n in range(5000)}
    assert read_tree(drawn(forest(line))) == line
    comb: dict[str, str | None] = {"c0": None}
    for n in range(1, 300):
        comb |= {f"c{n}": f"c{n - 1}", f"d{n}": f"c{n - 1}"}
    assert read_tree(drawn(forest(comb))) == comb


def read_tree(text: str) -> dict[str, str | None]:
    """Parents as a reader of the drawing would see them."""
    parents: dict[str, str | None] = {}
    column: dict[int, str] = {}  # the last checkpoint in each column
    above = -1
    for line in text.splitlines():
        if not line:
            column, above = {}, -1
            continue
        match = re.fullmatch(r"((?:[| ] )*)(\|-|`-)?[o*] (\S+)", line)
        assert match, line
        lead, branch, name = match.groups()
        here = len(lead) + len(branch or "")
        assert name not in parents, f"{name} is drawn twice"
        if branch:
            parents[name] = column[len(lead)]
        elif above < 0:
            parents[name] = None
        else:
            assert above == here, f"{name} is a child of nothing"
            parents[name] = column[here]
        column[here] = name
        above = here
    return parents
