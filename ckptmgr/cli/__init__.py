"""The command line: ``ckptmgr``.  What it promises is written in ``docs/cli.md``."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in `arguments` (default: the process's) and return its exit status."""
    if arguments is None:
        _open_standard_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:  # asked for by scripts, so not worth loading a parser
        return _say_version()
    if arguments is None:
        gc.set_threshold(100_000)  # what a command makes lives about as long as its process
    from .program import run

    status = run(words)
    if arguments is None:
        gc.freeze()  # the end of the process frees it all anyway, without looking at each object
    return status


def _say_version() -> int:
    from .._version import __version__
    from .output import OutputLost, write

    try:
        write([f"ckptmgr {__version__}\n"])
    except OutputLost as lost:
        from .failure import report_lost

        return report_lost(lost)
    return 0


def _open_standard_streams() -> None:
    """Have the standard streams that are closed lead nowhere.

    Or else a file of the store would be standard output or standard error, for libraries and
    programs that print there.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115, PTH123
