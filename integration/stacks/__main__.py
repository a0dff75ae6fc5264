"""Stacks for a developer's own use.

python -m integration.stacks list           the stacks, and what those that are built hold
python -m integration.stacks build NAME...  build them (all: without a name)
python -m integration.stacks start NAME     run one until ^C
python -m integration.stacks shell NAME     run one, with a shell in it
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from integration.stand import StandError, Workspace, reap

from .build import RELEASES, build, built
from .stack import Stack


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
        one.add_argument("name", choices=RELEASES, metavar="NAME", help=", ".join(RELEASES))
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
    for name, release in RELEASES.items():
        versions = built(name)
        held = "not built"
        if versions is not None:
            held = f"libvirt {versions['libvirt-daemon']}, QEMU {versions['qemu-system-x86']}"
        print(f"{name}  libvirt {release.libvirt}, QEMU {release.qemu}  {held}")


def make(names: list[str]) -> None:
    """Build stacks, one after another."""
    for name in names:
        begun = time.monotonic()
        print(f"{name}: {build(name)} ({time.monotonic() - begun:.0f} s)", flush=True)


def run(name: str, *, shell: bool) -> None:
    """Run a stack until its user is done."""
    reap()
    with Workspace() as workspace:
        stack = Stack(workspace, name)
        try:
            print(f"connect to    {stack.uri}")
            print(f"images go to  {workspace.path}", flush=True)
            if shell:
                subprocess.run(stack.inside("/bin/bash"), check=False)
                return
            print("ends with ^C", flush=True)
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            print()
        finally:
            stack.close()


if __name__ == "__main__":
    main()
