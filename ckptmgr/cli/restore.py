"""The command restore."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .answer import Answer
from .arguments import (
    FilePath,
    dry_run_option,
    kept_domain_argument,
    point_argument,
    repository_argument,
    text,
)
from .candidates import complete_kept_disk
from .checkpoints import exclusive, planned
from .session import Command, Session
from .table import Column, table
from .terminal import Terminal
from .units import size

if TYPE_CHECKING:
    from ..backup.views import RestoreView


@click.command(cls=Command)
@repository_argument
@kept_domain_argument(required=True)
@point_argument(required=True)
@click.argument("folder", metavar="[DIR]", required=False, type=FilePath(file_okay=False))
@click.option("--define", "name", metavar="NAME", type=text, help="Define a domain NAME with them.")
@click.option("--flatten", is_flag=True, help="Write images that stand by themselves.")
@click.option(
    "--disk",
    "disks",
    metavar="D",
    multiple=True,
    type=text,
    shell_complete=complete_kept_disk,
    help="Restore this disk; may be repeated. Default: all, without DIR those of --onto.",
)
@click.option(
    "--onto",
    metavar="D=VOLUME",
    multiple=True,
    type=text,
    help="Write a disk to a volume that is there; may be repeated.",
)
@click.option(
    "--in-place", is_flag=True, help="Put the disks of the domain back, which must be shut off."
)
@dry_run_option
@click.pass_context
def restore(
    context: click.Context,
    repository: Path,
    domain: str,
    point: str,
    folder: Path | None,
    name: str | None,
    flatten: bool,
    disks: tuple[str, ...],
    onto: tuple[str, ...],
    in_place: bool,
    dry_run: bool,
) -> Answer:
    """Restore the disks of a point.

    Into DIR come overlays that can be booted at once, or with --flatten images that stand by
    themselves.
    """
    from .progress import CopyProgress

    given = {"DIR": folder is not None, "--define": name is not None, "--flatten": flatten}
    for option, used in {**given, "--onto": bool(onto)}.items():
        exclusive(context, {"--in-place": in_place, option: used})
    volumes = dict(_volume(each) for each in onto)
    if len(volumes) != len(onto):
        raise click.BadParameter("a disk can be written to one volume", param_hint="'--onto'")
    session = context.ensure_object(Session)
    with CopyProgress(quiet=session.verbosity < 0) as progress:
        if in_place:
            with session.domain(domain) as target:
                if dry_run:
                    return planned(target.plan_restore(repository, point, disks=disks))
                return _answer(target.restore(repository, point, disks=disks, progress=progress))
        options: dict[str, Any] = {"disks": disks, "onto": volumes, "flatten": flatten}
        if name is not None:
            if folder is None:
                raise click.UsageError("--define needs a folder DIR for the new domain's files")
            options["name"] = name
            with session.host() as host:
                if dry_run:
                    return planned(host.plan_restore(repository, domain, point, folder, **options))
                return _answer(
                    host.restore(repository, domain, point, folder, progress=progress, **options)
                )
        from ..backup.catalogue import repository as open_repository

        found = open_repository(repository)
        if dry_run:
            return planned(found.plan_restore(domain, point, folder, **options))
        return _answer(found.restore(domain, point, folder, progress=progress, **options))


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
