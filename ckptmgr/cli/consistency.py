"""The commands check and repair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from .answer import Answer, Document
from .arguments import domain_argument, dry_run_option
from .checkpoints import planned
from .render import findings, repaired
from .session import Command, Session

if TYPE_CHECKING:
    from ..consistency.findings import Finding
    from ..manager import Host
    from ..plan.steps import Plan

INCONSISTENT = 4
"""Exit status when something was found that is not harmless."""


def _found(host: Host, name: str) -> Sequence[Finding]:
    """Of a domain, or of one that was to be and that libvirt never knew."""
    from ..consistency import Unfinished

    try:
        domain = host.domain(name)
    except Unfinished as error:
        return (error.finding,)
    return domain.check()


def _plan(host: Host, name: str, foreign: bool) -> Plan:
    from ..consistency import Unfinished

    try:
        domain = host.domain(name)
    except Unfinished:
        plan = host.plan_take_back(name)
        if plan is None:  # somebody was quicker
            raise
        return plan
    return domain.plan_repair(foreign=foreign)


def _repaired(host: Host, name: str, foreign: bool) -> tuple[Sequence[Finding], Sequence[Finding]]:
    """What was cured, and what is left."""
    from ..consistency import Unfinished

    try:
        domain = host.domain(name)
    except Unfinished:
        cured = host.take_back(name)
        if not cured:  # somebody was quicker
            raise
        return cured, ()
    return domain.repair(foreign=foreign), domain.check()


@click.command(cls=Command)
@domain_argument
@click.pass_obj
def check(session: Session, domain: str) -> Answer:
    """Compare the store with libvirt, the images and QEMU.

    Names each mismatch and its cure; the exit status is then 4, unless all are harmless. Of a
    running domain the monitor is asked, which taints it, except with --engine libvirt or
    --readonly.
    """
    from ..consistency import consistent

    with session.host() as host:
        found = _found(host, domain)
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

    with session.host() as host:
        if dry_run:
            return planned(_plan(host, domain, foreign))
        cured, left = _repaired(host, domain, foreign)
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
