"""Completion for bash, zsh and fish: the command that prints the script, and its answers.

click's machinery, with scripts of our own for bash and fish: click's cut a candidate at a comma
(fish) or expand it (bash), and a domain may be called ``my vm``, ``a,b`` or ``$(reboot)``.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    split_arg_string,
)

from .answer import Answer
from .session import Command, Session

VARIABLE = "_CKPTMGR_COMPLETE"
"""Set by the scripts when they ask for candidates, to ``<shell>_complete``."""

PATIENCE = 5
"""Seconds after which a hypervisor that does not answer is given up."""

# COMP_WORDS is of no use: readline takes it apart at every colon and equals sign, and
# "-c qemu:///system" has both kinds.  COMP_LINE is what was typed.  "filenames" has readline
# quote a candidate with the user's kind of quotes; it is set only where there is something to
# quote, as it also has effects that only file names want.
_BASH = """\
%(complete_func)s() {
    local type value
    COMPREPLY=()
    while IFS=, read -r type value; do
        case "$type" in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain)
                COMPREPLY+=("$value")
                [[ "$value" == *[^A-Za-z0-9_.:/=@%%+-]* ]] && compopt -o filenames
                ;;
        esac
    done < <(env %(complete_var)s=bash_complete COMP_LINE="${COMP_LINE:0:COMP_POINT}" \\
        COMP_CURRENT="${COMP_WORDS[COMP_CWORD]}" "$1" 2>/dev/null)
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""

_FISH = """\
function %(complete_func)s
    set -l response (env %(complete_var)s=fish_complete COMP_WORDS=(commandline -cp) \\
        COMP_CWORD=(commandline -t) %(prog_name)s 2>/dev/null)
    for completion in $response
        set -l parts (string split -m 1 "," -- $completion)
        switch $parts[1]
            case dir
                __fish_complete_directories $parts[2]
            case file
                __fish_complete_path $parts[2]
            case plain
                printf '%%s\\n' $parts[2]
        end
    end
end

complete --no-files --command %(prog_name)s --arguments "(%(complete_func)s)"
"""


class Bash(BashComplete):
    """bash 4.4 and later."""

    source_template = _BASH

    def source(self) -> str:
        """The script; it is printed whatever bash is installed here."""
        return ShellComplete.source(self)

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the one under the cursor, and that one as far as it is typed."""
        *words, last = split_arg_string(os.environ["COMP_LINE"] + "|")
        return words[1:], last.removesuffix("|")

    def format_completion(self, item: CompletionItem) -> str:
        """``type,value``, without what readline has split off in front."""
        _, incomplete = self.get_completion_args()
        current = os.environ.get("COMP_CURRENT", "")
        current = "" if current in (":", "=") else current
        value = str(item.value)
        if incomplete.endswith(current) and value.startswith(incomplete):
            value = value[len(incomplete) - len(current) :]
        return f"{item.type},{value}"


class Zsh(ZshComplete):
    """zsh."""


class Fish(FishComplete):
    """fish 3 and later."""

    source_template = _FISH


_SHELLS: dict[str, type[ShellComplete]] = {"bash": Bash, "zsh": Zsh, "fish": Fish}


def answer_shell(program: click.Command, instruction: str) -> int:
    """Print the candidates that a shell's script asks for; quietly none where there are none."""
    shell, _, action = instruction.partition("_")
    if shell not in _SHELLS or action != "complete":
        return 1
    # libvirt and its helpers write to the descriptor, into the line that is being edited.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(PATIENCE)
    try:
        candidates = _shell(shell, program, {"obj": Session()}).complete()
        sys.stdout.write(candidates + "\n")
        sys.stdout.flush()
    except (click.ClickException, KeyError, ValueError, IndexError, OSError):
        return 1
    return 0


def _shell(name: str, program: click.Command, context: dict[str, Any]) -> ShellComplete:
    return _SHELLS[name](program, context, "ckptmgr", VARIABLE)


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(list(_SHELLS)))
@click.pass_context
def completion(context: click.Context, shell: str) -> Answer:
    """Print the completion script of a shell.

    bash: ckptmgr completion bash > /etc/bash_completion.d/ckptmgr
    """
    script = _shell(shell, context.find_root().command, {}).source()
    return Answer(lambda: {"shell": shell, "script": script}, lambda _: script.splitlines())


COMMANDS = (completion,)
