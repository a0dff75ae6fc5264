"""The command line: ``ckptmgr``.  What it promises is written in ``docs/cli.md``."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in `arguments` (default: the process's) and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:  # asked for by scripts, so not worth loading a parser
        from .._version import __version__

        print(f"ckptmgr {__version__}")
        return 0
    if arguments is None:
        gc.set_threshold(100_000)  # what a command makes lives about as long as its process
    from .program import run

    status = run(words)
    if arguments is None:
        gc.freeze()  # the end of the process frees it all anyway, without looking at each object
    return status
