"""What may stand for an argument, looked up for the shell while the user types.

Nothing here raises or prints: a hypervisor that does not answer has nothing to offer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from ..errors import CkptmgrError

if TYPE_CHECKING:
    from ..manager import Host
    from .session import Session

_DISK_CHOICES = ("", "=no")


def complete_domain(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of domains."""
    return _matching(context, incomplete, lambda host: list(host.domain_names()))


def complete_checkpoint(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of the checkpoints of the domain that the command line names."""
    domain = context.params.get("domain")
    if not domain:
        return []
    return _matching(
        context,
        incomplete,
        lambda host: [each.name for each in host.domain(domain).checkpoints().checkpoints],
    )


def complete_snapshot(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of the snapshots of the domain that the command line names."""
    domain = context.params.get("domain")
    if not domain:
        return []
    return _matching(
        context, incomplete, lambda host: [each.name for each in host.domain(domain).snapshots()]
    )


def complete_disk(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Disks of the domain's current checkpoint, as SPECs."""
    domain = context.params.get("domain")
    if not domain:
        return []

    def specs(host: Host) -> list[str]:
        view = host.domain(domain).current()
        disks = view.disks if view is not None else ()
        return [disk.name + choice for disk in disks for choice in _DISK_CHOICES]

    return _matching(context, incomplete, specs)


def _matching(
    context: click.Context, incomplete: str, look_up: Callable[[Host], list[str]]
) -> list[CompletionItem]:
    session: Session | None = context.obj
    if session is None:
        return []
    session.read_only = True
    try:
        with session.host() as host:
            found = look_up(host)
    except (CkptmgrError, OSError, ImportError):
        return []
    # The shells' protocol has a candidate a line.
    return [
        CompletionItem(text) for text in found if text.startswith(incomplete) and text.isprintable()
    ]
