"""The command diff."""

from __future__ import annotations

import click

from .answer import Answer
from .arguments import checkpoint_argument, domain_argument
from .render import diff_lines
from .session import Command, Session


@click.command(cls=Command)
@domain_argument
@checkpoint_argument("start", metavar="FROM")
@checkpoint_argument("end", metavar="[TO]", required=False)
@click.option("--extents", is_flag=True, help="List what changed, by start and length in bytes.")
@click.pass_obj
def diff(session: Session, domain: str, start: str, end: str | None, extents: bool) -> Answer:
    """Tell what changed between two checkpoints, or since one.

    What is not known for certain counts as changed, as a whole disk.
    """
    with session.domain(domain) as target:
        view = target.diff(start, end)
    return Answer(
        lambda: view.json(extents=extents),
        lambda terminal: diff_lines(view, terminal, extents=extents),
    )


COMMANDS = (diff,)
