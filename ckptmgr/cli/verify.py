"""The command verify."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .answer import Answer
from .arguments import kept_domain_argument, point_argument, repository_argument
from .consistency import INCONSISTENT
from .session import Command
from .terminal import Style, Terminal
from .text import visible

if TYPE_CHECKING:
    from ..backup.views import VerifyView


@click.command(cls=Command)
@repository_argument
@kept_domain_argument(required=False)
@point_argument(required=False)
def verify(repository: Path, domain: str | None, point: str | None) -> Answer:
    """Compare a repository with its digests, all of it.

    Names what is damaged and all points that cannot be trusted therefore; the exit status is then
    4. With POINT, that point and what it stands on. Changes nothing.
    """
    from ..backup.catalogue import repository as open_repository

    view = open_repository(repository).verify(domain, point)
    return Answer(
        view.json,
        lambda terminal: verified(view, terminal),
        status=0 if view.sound else INCONSISTENT,
    )


def verified(view: VerifyView, terminal: Terminal) -> Iterator[str]:
    """What ``verify`` found: for each finding a line, and below it the points that it costs."""
    for finding in view.findings:
        style = Style.FAINT if finding.harmless else Style.BAD
        yield f"{terminal.paint(finding.code, style)}: {visible(finding.message)}"
        if finding.affected:
            names = visible(", ".join(finding.affected))
            yield f"  {terminal.paint('affected:', Style.STRONG)} {names}"
    points = f"{view.points} point{'' if view.points == 1 else 's'}"
    if view.sound:
        yield f"{terminal.paint('sound', Style.GOOD)}: {points}"
    else:
        lost = {(each.lineage, name) for each in view.findings for name in each.affected}
        yield f"{len(lost)} of {points} cannot be trusted."


COMMANDS = (verify,)
