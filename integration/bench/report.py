"""The table, in Markdown."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import libvirt

from integration.stand.accel import domain_type

from .timing import Row

_HEAD = ("what", "ms", "beside", "ms", "ratio", "aim")


def lines(rows: Sequence[Row], rounds: int, seconds: float) -> Iterator[str]:
    """What was measured, where, and in how long."""
    cells = [_HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEAD))]
    rule = tuple("-" * (width - 1) + ":" if number in (1, 3, 4) else "-" * width
                 for number, width in enumerate(widths))  # fmt: skip
    for row in (cells[0], rule, *cells[1:]):
        yield "| " + " | ".join(_set(row, widths)) + " |"
    yield ""
    yield f"Medians of {rounds} rounds in turns, {seconds:.0f} s in all. {machine()}."


def _cells(row: Row) -> tuple[str, ...]:
    bare = "" if row.bare is None else f"{row.bare * 1000:.1f}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return row.what, f"{row.ours * 1000:.1f}", row.against, bare, ratio, _aim(row)


def _aim(row: Row) -> str:
    if row.aim is None:
        return ""
    value = row.ours if row.ratio is None else row.ratio
    shown = f"{row.aim * 1000:.0f} ms" if row.ratio is None else f"{row.aim:.1f}"
    return f"{'met' if value <= row.aim else 'MISSED'}: at most {shown}"


def _set(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.rjust(width) if column in (1, 3, 4) else cell.ljust(width)


def machine() -> str:
    """When and where this was measured, a sentence."""
    number = libvirt.getVersion()
    libvirt_version = f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
    done = subprocess.run(
        ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True
    )
    qemu_version = done.stdout.split()[3]
    accelerator = "KVM" if domain_type() == "kvm" else "TCG"
    load = os.getloadavg()[0]
    return (
        f"{datetime.now(UTC):%Y-%m-%d}: libvirt {libvirt_version}, QEMU {qemu_version} "
        f"({accelerator}), Python {platform.python_version()}, {os.cpu_count()} cores, "
        f"load {load:.1f}"
    )
