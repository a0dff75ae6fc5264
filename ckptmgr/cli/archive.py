"""The command archive."""

from __future__ import annotations

import click

from .answer import Answer, Document
from .arguments import domain_argument, dry_run_option
from .checkpoints import planned
from .render import archived
from .session import Command, Session


@click.command(cls=Command)
@domain_argument
@click.option(
    "--keep",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many of the newest bitmaps each disk keeps.",
)
@dry_run_option
@click.pass_obj
def archive(session: Session, domain: str, keep: int, dry_run: bool) -> Answer:
    """Drop old bitmaps from QEMU and the images.

    What they say is in the store, so that differences stay as they are; a bitmap that alone
    knows something stays. Prints the checkpoints, each with the disks whose bitmaps went.
    """
    with session.domain(domain) as target:
        if dry_run:
            return planned(target.plan_archive(keep))
        of = target.view
        gone = target.archive(keep)

    def document() -> Document:
        return {
            "domain": of.json(),
            "archived": [
                {"checkpoint": name, "disks": list(disks)} for name, disks in gone.items()
            ],
        }

    return Answer(document, lambda _: archived(gone))


COMMANDS = (archive,)
