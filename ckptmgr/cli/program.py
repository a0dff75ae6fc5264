"""The program: its commands, and how one is run."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import click

from ..errors import CkptmgrError
from . import (
    archive,
    backup,
    checkpoints,
    completion,
    consistency,
    diff,
    hook,
    points,
    prune,
    restore,
    snapshots,
    verify,
)
from .answer import Answer, print_answer
from .failure import Interrupted, failure, report, report_lost
from .group import Group
from .help import version_option
from .output import OutputLost
from .session import Session, global_options

# What virsh calls them, where it is not just "checkpoint-" and our name.
_VIRSH = {
    "checkpoint-create-as": "create",
    "checkpoint-dumpxml": "show --xml",
    "checkpoint-edit": "redefine",
    "checkpoint-info": "show",
    "snapshot-create": "snapshot create",
    "snapshot-create-as": "snapshot create",
    "snapshot-current": "snapshot list",
    "snapshot-delete": "snapshot delete",
    "snapshot-info": "snapshot list",
    "snapshot-list": "snapshot list",
    "snapshot-revert": "snapshot revert",
}


class Program(Group):
    """The group of all commands; it knows virsh's words for them."""

    def _meant(self, name: str) -> str:
        return super()._meant(_VIRSH.get(name) or name.removeprefix("checkpoint-"))


@click.group(
    "ckptmgr",
    cls=Program,
    no_args_is_help=False,
    subcommand_metavar="COMMAND [ARGUMENTS]",
    context_settings={"help_option_names": ["-h", "--help"]},
)
def program() -> None:
    """Checkpoints of libvirt/QEMU virtual machines, with a history that survives.

    DOMAIN is the name, UUID or id of a domain, in a repository its name or UUID; C is the name
    of a checkpoint.
    """


program.params[:] = [*global_options(), version_option()]
for _module in (
    checkpoints,
    diff,
    consistency,
    archive,
    snapshots,
    backup,
    points,
    restore,
    prune,
    verify,
    hook,
    completion,
):
    for _command in _module.COMMANDS:
        program.add_command(_command)


def run(arguments: Sequence[str]) -> int:
    """Run the command in `arguments` and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name must not fail to print
            stream.reconfigure(errors="backslashreplace")
    instruction = os.environ.get(completion.VARIABLE)
    if instruction:
        return completion.answer_shell(program, instruction)

    session = Session()
    try:
        with _signals_raise():
            answer = _invoke(arguments, session)
        if isinstance(answer, int):
            return answer
        print_answer(answer, as_json=session.json)
    except OutputLost as lost:
        return report_lost(lost)
    except click.UsageError as error:
        # --json may stand behind what could not be understood.
        return report(failure(error), as_json=session.json or _asks_for_json(arguments))
    except (CkptmgrError, click.ClickException, OSError, ModuleNotFoundError) as error:
        return report(failure(error), as_json=session.json)
    except (KeyboardInterrupt, click.Abort) as error:
        return report(failure(error), as_json=session.json)
    return answer.status


def _invoke(arguments: Sequence[str], session: Session) -> Answer | int:
    try:
        with program.make_context("ckptmgr", list(arguments), obj=session) as context:
            answer: Answer = program.invoke(context)
            return answer
    except click.exceptions.Exit as done:  # --help and --version have printed already
        return done.exit_code


def _asks_for_json(arguments: Sequence[str]) -> bool:
    words = list(arguments)
    return "--json" in (words[: words.index("--")] if "--" in words else words)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise Interrupted, so that what is under way is undone and closed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP; so do we
            before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
