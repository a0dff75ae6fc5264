"""Stacks for a developer's own use.

python -m integration.stacks list           the stacks, and what those that are built hold
python -m integration.stacks build NAME...  build them (all: without a name)
python -m integration.stacks start NAME     run one until ^C
python -m integration.stacks shell NAME     run one, with a shell in it

``embedded`` and ``daemon`` are this machine's own libvirt and QEMU, and need not be built.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import libvirt

from integration.stand import Daemon, StandError, Workspace, private_mounts, reap
from integration.stand.libvirts import embedded_root

from .build import RELEASES, build, built
from .stack import Stack

OWN = ("embedded", "daemon")
NAMES = (*OWN, *RELEASES)


@dataclass(frozen=True)
class Running:
    """A stack that runs.

    uri -- for every process of this machine
    remark -- what there is to know about it
    sockets -- the folder for unix sockets that ckptmgr has to be told; None: it finds one itself
    shell -- the command line of a shell in it
    environment -- of that shell
    """

    uri: str
    remark: str = ""
    sockets: Path | None = None
    shell: Sequence[str] = ("/bin/bash",)
    environment: Mapping[str, str] = field(default_factory=dict)


def main() -> None:
    """Run the command that the arguments name."""
    parser = argparse.ArgumentParser(
        prog="python -m integration.stacks", description="Libvirts and QEMUs of other releases."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="the stacks, and what those that are built hold")
    some = commands.add_parser("build", help="build stacks that are not there yet")
    some.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RELEASES))
    for command, what in (("start", "run a stack until ^C"), ("shell", "run one, with a shell in")):
        one = commands.add_parser(command, help=what)
        one.add_argument("name", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    given = parser.parse_args()
    try:
        if given.command == "list":
            show()
        elif given.command == "build":
            unknown = set(given.names) - set(RELEASES)
            if unknown:
                parser.error(f"no such stack: {', '.join(sorted(unknown))}")
            make(given.names or list(RELEASES))
        else:
            run(given.name, shell=given.command == "shell")
    except StandError as error:
        sys.exit(f"stacks: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def show() -> None:
    """Print the stacks."""
    version = ".".join(str(libvirt.getVersion() // 1000**power % 1000) for power in (2, 1))
    answer = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True)
    qemu = answer.stdout.split()[3]
    for name in OWN:
        print(f"{name:9} this machine's: libvirt {version}, QEMU {qemu}")
    for name, release in RELEASES.items():
        versions = built(name)
        held = "not built"
        if versions is not None:
            held = f"libvirt {versions['libvirt-daemon']}, QEMU {versions['qemu-system-x86']}"
        print(f"{name:9} libvirt {release.libvirt}, QEMU {release.qemu}: {held}")


def make(names: list[str]) -> None:
    """Build stacks, beside each other: much of it is waiting for the network and the disk."""
    begun = time.monotonic()
    with ThreadPoolExecutor() as threads:
        for name, root in zip(names, threads.map(build, names), strict=True):
            print(f"{name}: {root} ({time.monotonic() - begun:.0f} s)", flush=True)


@contextlib.contextmanager
def started(workspace: Workspace, name: str) -> Iterator[Running]:
    """Start a stack, and end it after the block."""
    if name == "embedded":
        # whoever opens it is the libvirt
        root = embedded_root(workspace)
        yield Running(f"qemu:///embed?root={root}", "by one process at a time")
        return
    if name == "daemon":
        daemon = Daemon(workspace)
        try:
            environment, sockets = daemon.environment(), workspace.folder("sockets")
            yield Running(daemon.socket_uri, sockets=sockets, environment=environment)
        finally:
            daemon.close()
        return
    stack = Stack(workspace, name)
    try:
        yield Running(stack.uri, sockets=stack.sockets, shell=stack.inside("/bin/bash"))
    finally:
        stack.close()


def run(name: str, *, shell: bool) -> None:
    """Run a stack until its user is done."""
    if name == "daemon" and os.geteuid() == 0:
        private_mounts()
    reap()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with Workspace() as workspace, started(workspace, name) as running:
        print("connect to   ", running.uri, running.remark)
        print("images go to ", workspace.path, flush=True)
        given = {"LIBVIRT_DEFAULT_URI": running.uri} if name in OWN else {}
        if running.sockets is not None:
            settings = workspace.path / "ckptmgr.toml"
            settings.write_text(f'socket_directory = "{running.sockets}"\n')
            print("for ckptmgr   CKPTMGR_CONFIG=", settings, sep="", flush=True)
            given["CKPTMGR_CONFIG"] = str(settings)
        if shell:
            environment = {**os.environ, **running.environment, **given}
            subprocess.run(running.shell, check=False, env=environment)
            return
        print("ends with ^C", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)
        print()


if __name__ == "__main__":
    main()
