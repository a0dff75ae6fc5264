"""The command restore."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .answer import Answer
from .arguments import (
    dry_run_option,
    kept_domain_argument,
    point_argument,
    repository_argument,
    text,
)
from .candidates import complete_kept_disk
from .checkpoints import planned
from .session import Command
from .table import Column, table
from .terminal import Terminal
from .units import size

if TYPE_CHECKING:
    from ..backup.views import RestoreView


@click.command(cls=Command)
@repository_argument
@kept_domain_argument(required=True)
@point_argument(required=True)
@click.argument(
    "folder", metavar="[DIR]", required=False, type=click.Path(file_okay=False, path_type=Path)
)
@click.option("--flatten", is_flag=True, help="Write images that stand by themselves.")
@click.option(
    "--disk",
    "disks",
    metavar="D",
    multiple=True,
    type=text,
    shell_complete=complete_kept_disk,
    help="Restore this disk; may be repeated.",
)
@click.option(
    "--onto",
    metavar="D=VOLUME",
    multiple=True,
    type=text,
    help="Write a disk to a volume that is there; may be repeated.",
)
@dry_run_option
def restore(
    repository: Path,
    domain: str,
    point: str,
    folder: Path | None,
    flatten: bool,
    disks: tuple[str, ...],
    onto: tuple[str, ...],
    dry_run: bool,
) -> Answer:
    """Restore the disks of a point.

    Into DIR come overlays that can be booted at once, or with --flatten images that stand by
    themselves.
    """
    from ..backup.catalogue import repository as open_repository

    found = open_repository(repository)
    volumes = dict(_volume(each) for each in onto)
    if len(volumes) != len(onto):
        raise click.BadParameter("a disk can be written to one volume", param_hint="'--onto'")
    if dry_run:
        return planned(
            found.plan_restore(domain, point, folder, disks=disks, onto=volumes, flatten=flatten)
        )
    return _answer(found.restore(domain, point, folder, disks=disks, onto=volumes, flatten=flatten))


def _volume(value: str) -> tuple[str, Path]:
    """The disk and the path in ``vda=/dev/vg/web``."""
    disk, separator, path = value.partition("=")
    if not disk or not separator or not path:
        raise click.BadParameter(
            f"{value!r} does not say which disk goes to which volume", param_hint="'--onto'"
        )
    return disk, Path(path)


def _answer(done: RestoreView) -> Answer:
    return Answer(done.json, lambda terminal: restored(done, terminal))


def restored(view: RestoreView, terminal: Terminal) -> Iterator[str]:
    """The table of ``restore``."""
    columns = [Column("Disk"), Column("Format"), Column("Size", right=True)]
    columns += [Column("Written", right=True), Column("File")]
    rows = [
        [disk.name, disk.format, size(disk.virtual_size), size(disk.bytes), disk.file]
        for disk in view.disks
    ]
    yield from table(columns, rows, terminal)


COMMANDS = (restore,)
