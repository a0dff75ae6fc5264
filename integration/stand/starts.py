"""How the starts of Linux guests went, for the summary of a run on emulated KVM.

Runs with ``CKPTMGR_TEST_STARTS`` in their environment add a line for each start to that file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "CKPTMGR_TEST_STARTS"


@dataclass(frozen=True)
class Start:
    """One start of one guest.

    seconds -- until it took commands, or until it was given up
    hung -- what it was seen doing then; empty where it has booted
    """

    guest: str
    seconds: float
    hung: str = ""


def note(start: Start) -> None:
    """Add a start to the run's file, if it has one."""
    kept = os.environ.get(FILE)
    if kept:
        with Path(kept).open("a") as file:
            file.write(json.dumps(asdict(start)) + "\n")


def read(file: Path) -> list[Start]:
    """The starts that runs have added to a file."""
    if not file.exists():
        return []
    return [Start(**json.loads(line)) for line in file.read_text().splitlines()]


def lines(found: Sequence[Start]) -> list[str]:
    """How many there were, how long they took, and what each that hung was seen doing."""
    booted = [start.seconds for start in found if not start.hung]
    hung = [start for start in found if start.hung]
    took = f", {min(booted):.0f} to {max(booted):.0f} s until commands are taken" if booted else ""
    said = [f"{len(found)} starts{took}; {len(hung)} of them hung"]
    for start in hung:
        said.append(f"{start.guest} hung for {start.seconds:.0f} s:")
        said += [f"    {line}" for line in start.hung.splitlines()]
    return said
