"""``python -m integration.bench [--rounds N]``: measure, and print the table.

A process can have one libvirt of its own, so each part is measured by a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from ckptmgr.domain import binding  # noqa: F401 -- before libvirt: keeps it quiet
from integration.stand import adopt, private_mounts

from . import commands, library
from .report import lines
from .timing import Row

PARTS = {"library": library.measure, "commands": commands.measure}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all parts, or one and print its rows as JSON."""
    parser = argparse.ArgumentParser(prog="python -m integration.bench")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.part is not None:
        if asked.part == "commands" and os.geteuid() == 0:
            private_mounts()
        adopt()
        print(json.dumps([asdict(row) for row in PARTS[asked.part](asked.rounds)]))
        return
    start = time.monotonic()
    rows = [row for part in PARTS for row in _measured(part, asked.rounds)]
    for line in lines(rows, asked.rounds, time.monotonic() - start):
        print(line)


def _measured(part: str, rounds: int) -> list[Row]:
    command = [sys.executable, "-m", "integration.bench", "--part", part, "--rounds", str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return [Row(**row) for row in json.loads(done.stdout)]


if __name__ == "__main__":
    main()
