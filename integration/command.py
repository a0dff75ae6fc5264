"""The command line as a process of its own, against a daemon stand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration.stacks import Stack
from integration.stand import Daemon


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The error's message, for people, less the domain's name."""
        (line,) = re.findall("^ckptmgr: error: (.*)$", self.err, re.MULTILINE)
        return re.sub(r"^domain '[^']*': ", "", line)

    @property
    def json(self) -> Any:
        """The document on standard output; it must be the only thing there."""
        return json.loads(self.out)


class CommandLine:
    """``ckptmgr -c URI --store DIR ...`` as separate processes.

    store -- None: the default of the driver
    uri -- where it is not that of the daemon
    settings -- its ckptmgr.toml
    """

    def __init__(
        self,
        daemon: Daemon | Stack,
        store: Path | None,
        *,
        uri: str | None = None,
        settings: Path | None = None,
    ) -> None:
        self.daemon = daemon
        self.store = store
        self.uri = uri or daemon.uri
        self.settings = settings

    def line(self, *arguments: str | Path, program: Sequence[str] = ()) -> list[str]:
        """The words of the command line.

        program -- of Python, in the place of ckptmgr
        """
        before = [] if self.settings is None else ["env", f"CKPTMGR_CONFIG={self.settings}"]
        words = [*before, sys.executable, *(program or ("-m", "ckptmgr")), "-c", self.uri]
        if self.store is not None:
            words += ["--store", str(self.store)]
        return [*words, *map(str, arguments)]

    def __call__(self, *arguments: str | Path) -> Ran:
        """Run it."""
        done = self.daemon.run(self.line(*arguments))
        assert "Traceback" not in done.stderr, done.stderr
        return Ran(done.returncode, done.stdout, done.stderr)

    def ok(self, *arguments: str | Path) -> str:
        """Run it; it must succeed.  Returns what it printed."""
        ran = self(*arguments)
        assert ran.status == 0, ran.err + ran.out
        return ran.out

    def json(self, *arguments: str | Path) -> Any:
        """Run it with --json; it must succeed."""
        return json.loads(self.ok("--json", *arguments))

    def start(self, *arguments: str | Path, program: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start it and do not wait; program: see ``line``."""
        return subprocess.Popen(
            self.line(*arguments, program=program),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
