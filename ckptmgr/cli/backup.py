"""The command backup."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .answer import Answer
from .arguments import domain_argument, dry_run_option, repository_argument, text
from .candidates import complete_target
from .checkpoints import planned
from .render import names
from .session import Command, Session

if TYPE_CHECKING:
    from ..backup.views import PointView
    from ..manager import BackupOptions

_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?(?:/s)?", re.IGNORECASE)


def rate(value: str) -> int:
    """Bytes per second, of ``50M``, ``1.5GiB/s`` or a plain number; units are binary."""
    found = _RATE.fullmatch(value.strip())
    if found is None or not (number := float(found[1])):
        raise click.BadParameter(f"{value!r} is no rate; write 50M for 50 MiB per second")
    return max(1, int(number * 1024 ** " KMGT".index(found[2].upper() or " ")))


@click.command(cls=Command)
@domain_argument
@repository_argument
@click.argument("point", required=False, type=text)
@click.option("--full", is_flag=True, help="Stand on no other restore point.")
@click.option(
    "--disk",
    "disks",
    metavar="D",
    multiple=True,
    type=text,
    shell_complete=complete_target,
    help="This disk, by target or path; may be repeated. Default: all.",
)
@click.option(
    "--compress",
    type=click.Choice(["zstd", "none"]),
    default="none",
    show_default=True,
    help="How the images are compressed.",
)
@click.option(
    "--quiesce/--no-quiesce",
    default=None,
    help="Freeze the guest's file systems for that instant. Default: if its agent is there.",
)
@click.option("--pause", is_flag=True, help="Have the guest stand still for that instant.")
@click.option(
    "--limit", metavar="RATE", type=rate, help="Read at most so much per second, such as 50M."
)
@click.option("--new", is_flag=True, help="Begin anew where restore points are gone.")
@click.option(
    "--decrypt", is_flag=True, help="Encrypted disks, too: what is kept of them is not encrypted."
)
@dry_run_option
@click.pass_obj
def backup(
    session: Session,
    domain: str,
    repository: Path,
    point: str | None,
    full: bool,
    disks: tuple[str, ...],
    compress: str,
    quiesce: bool | None,
    pause: bool,
    limit: int | None,
    new: bool,
    decrypt: bool,
    dry_run: bool,
) -> Answer:
    """Make a restore point of a domain in a repository.

    The first is a full one; after that, of each disk just what changed is copied, as far as the
    history knows it. Prints the point's name, by default the time in seconds, which is that of its
    checkpoint as well. The repository REPO is a folder; it is made if it is not there.
    """
    from .progress import CopyProgress

    options: BackupOptions = {
        "full": full,
        "disks": disks,
        "compress": compress == "zstd",
        "quiesce": quiesce,
        "pause": pause,
        "limit": limit,
        "new": new,
        "decrypt": decrypt,
    }
    with session.domain(domain) as target:
        if dry_run:
            return planned(target.plan_backup(repository, point, **options))
        with CopyProgress(quiet=session.verbosity < 0) as progress:
            made: PointView = target.backup(repository, point, progress=progress, **options)
    return Answer(made.json, lambda _: names([made.name]))


COMMANDS = (backup,)
