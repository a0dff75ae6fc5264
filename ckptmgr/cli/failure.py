"""Errors: their exit status, and how they are printed for people and for scripts."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from dataclasses import dataclass

import click

from ..errors import CkptmgrError
from .answer import Document, print_document
from .output import OutputLost
from .terminal import Style, terminal
from .text import visible, visible_lines


class Interrupted(KeyboardInterrupt):
    """A signal asks to stop; everything on the way out is still undone and closed."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Usage(click.UsageError):
    """A usage error with a hint of its own."""

    def __init__(self, message: str, ctx: click.Context | None, *, hint: str) -> None:
        super().__init__(message, ctx)
        self.hint = hint


@dataclass(frozen=True)
class Failure:
    """Why a command failed.

    usage -- the command's usage line, for people
    """

    code: str
    message: str
    status: int
    hint: str | None = None
    usage: str | None = None

    def json(self) -> Document:
        """``{"error": {"code", "message", "hint"}}``."""
        return {"error": {"code": self.code, "message": self.message, "hint": self.hint}}


def failure(error: BaseException) -> Failure:
    """What `error`, which is one of those that `run` catches, means to the user."""
    match error:
        case CkptmgrError():
            return Failure(error.code, error.message, error.exit_status, error.hint)
        case click.UsageError():
            return _usage_failure(error)
        case click.ClickException():
            return Failure("failed", error.format_message(), 1)
        case Interrupted():
            name = signal.Signals(error.number).name
            return Failure("interrupted", f"interrupted by {name}", 128 + error.number)
        case KeyboardInterrupt() | click.Abort():
            return Failure("interrupted", "interrupted", 128 + signal.SIGINT)
        case ModuleNotFoundError():
            return Failure(
                "failed",
                f"the Python module {error.name!r} is not installed",
                1,
                "libvirt and nbd come with the distribution's python3-libvirt and python3-libnbd",
            )
        case OSError():
            reason = error.strerror or str(error)
            where = f"{error.filename}: " if error.filename is not None else ""
            return Failure("failed", where + reason, 1)
    return Failure("failed", str(error), 1)


def _usage_failure(error: click.UsageError) -> Failure:
    usage = hint = None
    if error.ctx is not None:
        usage = " ".join(error.ctx.get_usage().split()).replace("Usage: ", "usage: ", 1)
        hint = f"try '{error.ctx.command_path} --help'"
    if isinstance(error, Usage):
        hint = error.hint
    message = error.format_message().removesuffix(".")
    return Failure("usage", message[:1].lower() + message[1:], 2, hint, usage)


def report(failed: Failure, *, as_json: bool) -> int:
    """Print why the command failed, and return the exit status."""
    if not as_json:
        _tell(failed)
        return failed.status
    try:
        print_document(failed.json())
    except OutputLost as lost:
        report_lost(lost)
    return failed.status


def report_lost(lost: OutputLost) -> int:
    """Say that the answer could not be written, and return the exit status.

    That goes to standard error, also where JSON is asked for.  A reader that has gone is told
    nothing: the status is that of a process that SIGPIPE ended.
    """
    if lost.reason is None:
        return 128 + signal.SIGPIPE
    failed = Failure("failed", f"writing the output failed: {lost.reason}", 1)
    _tell(failed)
    return failed.status


def _tell(failed: Failure) -> None:
    # Where that fails there is nobody left to tell; the exit status still says it.
    with suppress(OSError):
        _print_lines(failed)


def _print_lines(failed: Failure) -> None:
    ours = terminal(sys.stderr)
    first, *rest = visible_lines(failed.message)
    lines = [f"ckptmgr: {ours.paint('error:', Style.BAD)} {first}"]
    lines += [f"  {line}" for line in rest]
    if failed.usage is not None:
        lines.append(visible(failed.usage))
    if failed.hint is not None:
        lines.append(f"{ours.paint('hint:', Style.STRONG)} {visible(failed.hint)}")
    sys.stderr.writelines(f"{line}\n" for line in lines)
    sys.stderr.flush()
