"""What may stand for an argument, looked up for the shell while the user types.

Nothing here raises or prints: a hypervisor that does not answer has nothing to offer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from ..errors import CkptmgrError

if TYPE_CHECKING:
    from ..backup.views import PointView
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
    return _disks(context, incomplete, _DISK_CHOICES)


def complete_target(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Disks of the domain's current checkpoint."""
    return _disks(context, incomplete, ("",))


def complete_kept_domain(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of the domains of which the repository of the command line has points."""
    return _kept(context, incomplete, None, lambda point: point.domain)


def complete_point(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of the points of the domain that the command line names."""
    domain = context.params.get("domain")
    return _kept(context, incomplete, domain, lambda point: point.name) if domain else []


def complete_kept_disk(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Disks of the restore point that the command line names."""
    domain, name = (context.params.get(each) for each in ("domain", "point"))
    if not domain or not name:
        return []
    found = _points(context, domain)
    return _items(
        dict.fromkeys(disk.name for each in found if each.name == name for disk in each.disks),
        incomplete,
    )


def _disks(
    context: click.Context, incomplete: str, choices: tuple[str, ...]
) -> list[CompletionItem]:
    domain = context.params.get("domain")
    if not domain:
        return []

    def specs(host: Host) -> list[str]:
        view = host.domain(domain).current()
        disks = view.disks if view is not None else ()
        return [disk.name + choice for disk in disks for choice in choices]

    return _matching(context, incomplete, specs)


def _kept(
    context: click.Context,
    incomplete: str,
    domain: str | None,
    candidate: Callable[[PointView], str],
) -> list[CompletionItem]:
    """What `candidate` says of the points in the repository, each once."""
    return _items(dict.fromkeys(map(candidate, _points(context, domain))), incomplete)


def _points(context: click.Context, domain: str | None) -> tuple[PointView, ...]:
    from ..backup.catalogue import repository

    path = context.params.get("repository")
    if not path:
        return ()
    try:
        return repository(path).points(domain).points
    except (CkptmgrError, OSError, ImportError):
        return ()


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
    return _items(found, incomplete)


def _items(found: Iterable[str], incomplete: str) -> list[CompletionItem]:
    # The shells' protocol has a candidate a line.
    return [
        CompletionItem(text) for text in found if text.startswith(incomplete) and text.isprintable()
    ]
