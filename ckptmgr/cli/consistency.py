"""The commands check and repair."""

from __future__ import annotations

import click

from .answer import Answer, Document
from .arguments import domain_argument, dry_run_option
from .checkpoints import planned
from .render import findings, repaired
from .session import Command, Session

INCONSISTENT = 4
"""Exit status when something was found that is not harmless."""


@click.command(cls=Command)
@domain_argument
@click.pass_obj
def check(session: Session, domain: str) -> Answer:
    """Compare the store with libvirt, the images and QEMU.

    Names each mismatch and its cure; the exit status is then 4. Of a running domain the monitor
    is asked, which taints it, except with --engine libvirt.
    """
    from ..consistency import consistent

    with session.domain(domain) as target:
        found = target.check()
    whole = consistent(found)

    def document() -> Document:
        return {"consistent": whole, "findings": [finding.json() for finding in found]}

    return Answer(
        document,
        lambda terminal: findings(found, terminal),
        status=0 if whole else INCONSISTENT,
    )


@click.command(cls=Command)
@domain_argument
@click.option("--foreign", is_flag=True, help="Also remove bitmaps that ckptmgr may not have made.")
@dry_run_option
@click.pass_obj
def repair(session: Session, domain: str, foreign: bool, dry_run: bool) -> Answer:
    """Cure what check finds, without stopping the domain.

    Prints what was cured and what is left; if that is not harmless, the exit status is 4.
    """
    from ..consistency import consistent

    with session.domain(domain) as target:
        if dry_run:
            return planned(target.plan_repair(foreign=foreign))
        cured = target.repair(foreign=foreign)
        left = target.check()
    whole = consistent(left)

    def document() -> Document:
        return {
            "consistent": whole,
            "cured": [finding.json() for finding in cured],
            "findings": [finding.json() for finding in left],
        }

    return Answer(
        document,
        lambda terminal: repaired(cured, left, terminal),
        status=0 if whole else INCONSISTENT,
    )


COMMANDS = (check, repair)
