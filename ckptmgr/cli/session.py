"""The global options: what is taken before the command, and after it as well."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import augment_usage_errors

from .arguments import FilePath
from .help import Helped
from .logs import log_to_stderr

if TYPE_CHECKING:
    from ..manager import Domain, Host

ENGINES = ("auto", "libvirt", "monitor", "offline")


@dataclass
class Session:
    """What the global options say, filled in as they are read.

    verbosity -- -1: errors, 0: and warnings, 1: and what is decided and why, 2: everything
    """

    connect: str | None = None
    store: Path | None = None
    engine: str = "auto"
    read_only: bool = False
    json: bool = False
    verbosity: int = 0

    @contextmanager
    def host(self) -> Iterator[Host]:
        """The hypervisor, for as long as the context lasts."""
        if self.verbosity < 1:
            # The embedded driver logs warnings of its own to our standard error; its errors
            # reach us as exceptions.
            os.environ.setdefault("LIBVIRT_DEBUG", "error")
        from ..manager import connect

        with connect(
            self.connect, store=self.store, engine=self.engine, read_only=self.read_only
        ) as host:
            yield host

    @contextmanager
    def domain(self, name: str) -> Iterator[Domain]:
        """The domain with that name, UUID or id, for as long as the context lasts."""
        with self.host() as host:
            yield host.domain(name)


def _remember(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    session = context.ensure_object(Session)
    match parameter.name:
        case "verbose":
            session.verbosity += value
        case "quiet":
            session.verbosity -= value
        case str(name) if value:
            setattr(session, name, value)


def _complete_uri(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    known = ("qemu:///system", "qemu:///session", "qemu:///embed?root=")
    return [uri for uri in known if uri.startswith(incomplete)]


def global_options(*, hidden: bool = False) -> list[click.Option]:
    """The global options; `hidden` ones are taken but not listed in the help."""
    common: dict[str, Any] = {"expose_value": False, "callback": _remember, "hidden": hidden}
    return [
        click.Option(
            ["-c", "--connect"],
            metavar="URI",
            help="libvirt URI (default: LIBVIRT_DEFAULT_URI, then libvirt's own).",
            shell_complete=_complete_uri,
            **common,
        ),
        click.Option(
            ["--store"],
            metavar="DIR",
            type=FilePath(file_okay=False),
            help="Metadata directory (default: CKPTMGR_STORE, then that of the driver).",
            **common,
        ),
        click.Option(
            ["--engine"],
            type=click.Choice(ENGINES),
            help="Who makes and removes the bitmaps (default: auto).",
            **common,
        ),
        click.Option(
            ["-r", "--readonly", "read_only"],
            is_flag=True,
            help="Connect read-only.",
            **common,
        ),
        click.Option(
            ["--json"],
            is_flag=True,
            help="Print one JSON document, on errors too.",
            **common,
        ),
        click.Option(
            ["-v", "--verbose"],
            count=True,
            help="Say what is decided and why; twice: every detail.",
            **common,
        ),
        click.Option(
            ["-q", "--quiet"],
            count=True,
            help="Print no warnings, only errors.",
            **common,
        ),
    ]


_ANYWHERE = global_options(hidden=True)


class Command(Helped):
    """A command that takes the global options after its name too, as virsh users type them."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters, then the global options."""
        return [*super().get_params(ctx), *_ANYWHERE]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; every usage error knows its command (click's parser forgets it for some)."""
        if ctx.resilient_parsing and self._awaits_value(ctx, args[-1:]):
            # Completing "list web --from ": click's parser would give up here, and the domain
            # would not be known.
            args = args[:-1]
        with augment_usage_errors(ctx):
            return super().parse_args(ctx, args)

    def _awaits_value(self, ctx: click.Context, last: list[str]) -> bool:
        return any(
            isinstance(option, click.Option)
            and not (option.is_flag or option.count)
            and not set(option.opts).isdisjoint(last)
            for option in self.get_params(ctx)
        )

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, with its log lines on standard error."""
        log_to_stderr(ctx.ensure_object(Session).verbosity)
        return super().invoke(ctx)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Point to the global options, which the list above leaves out."""
        super().format_epilog(ctx, formatter)
        formatter.write_paragraph()
        formatter.write_text("The options of 'ckptmgr --help' are taken here too.")
