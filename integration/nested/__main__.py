"""One run: boot a host, set it up, run tests in it on KVM, bring out the results, end it."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType

from integration.stacks import table
from integration.stand import StandError, Workspace, reap, starts
from integration.stand.accel import domain_type

from .host import CHECKOUT, TREE, Host, Image, Lan

LIMIT = 2400
"""Seconds after which a run of tests is given up."""

FIRST, SECOND = "192.168.77.1/24", "192.168.77.2/24"
"""The two ends of the cable."""

RESULTS = "/var/tmp/results"
"""In the host."""

NOTED = f"{starts.FILE}={RESULTS}/starts"


def say(text: str) -> None:
    """A line about what is going on, with the seconds since the start."""
    print(f"[{time.monotonic() - BEGUN:4.0f} s] {text}", flush=True)


BEGUN = time.monotonic()


def prepare(host: Host) -> float:
    """Copy the tree and set the host up; returns how patient one has to be with it."""
    host.push()
    measure = f"cd {TREE} && .venv/bin/python -m integration.stand.patience"
    patience = float(host.shell(measure))
    host.shell(f"mkdir -p {RESULTS}")
    given = [f"CKPTMGR_TEST_PATIENCE={patience}", "CKPTMGR_SAMPLES=web", NOTED]
    if host.show("env", *given, "vagrant/provision.sh", seconds=LIMIT):
        raise StandError(f"{host.name}: vagrant/provision.sh has failed")
    say(f"{host.name} is ready; it is {patience:.0f} times slower than an ordinary machine")
    return patience


def quieten(host: Host) -> None:
    """Even an idle guest takes a good part of an emulated processor."""
    host.shell("virsh -q -c qemu:///system suspend web")


def _files() -> list[str]:
    """The files with tests for this; to read all others takes long in a slow host."""
    files = sorted((CHECKOUT / "integration").glob("test_*.py"))
    return [
        str(file.relative_to(CHECKOUT))
        for file in files
        if "pytest.mark.nested" in file.read_text()
    ]


def tests(
    host: Host, patience: float, stand: str, arguments: Sequence[str], *environment: str
) -> bool:
    """Run the tests of one stand; whether all have passed."""
    say(f"tests on KVM, {stand} libvirt")
    status = host.show(
        "env",
        "CKPTMGR_TEST_ACCEL=kvm",
        f"CKPTMGR_TEST_PATIENCE={patience}",
        f"{table.CELLS}={RESULTS}/cells",
        NOTED,
        *environment,
        *(".venv/bin/python", "-m", "pytest", *_files(), "-q", "--stand", stand),
        *("-m", "nested", "-p", "no:cacheprovider", f"--timeout={300 * patience:.0f}"),
        *(f"--junitxml={RESULTS}/{stand}.xml", "-rP", *arguments),
        seconds=LIMIT,
    )
    # where arguments deselect all of a stand's tests, that is no failure (pytest's status 5)
    return status == 0 or (status == 5 and bool(arguments))


def summary(host: Host, results: Path) -> None:
    """What it ran on, and the table."""
    print("\n--- the host, and its machines")
    print(host.shell("cat /proc/sys/kernel/hostname && uname -r && ls -l /dev/kvm").strip())
    print(host.shell("grep -h . /sys/module/kvm_*/parameters/nested | sed 's/^/nested: /'").strip())
    info = "virsh -c qemu:///system qemu-monitor-command web --hmp 'info kvm'"
    print(f"sample VM 'web': {host.shell(info).strip()}")
    print("\n--- Linux guests on KVM")
    for line in starts.lines(starts.read(results / "starts")):
        print(line)
    print("\n--- on KVM, on which libvirt, with which engine")
    if not (results / "cells").exists():
        print("no test has run")
        return
    found = [
        replace(result, stack=f"{table.KVM} {result.stack}")
        for result in table.read(results / "cells")
    ]
    for line in table.lines(found):
        print(line)
    kept = os.environ.get(table.CELLS)
    if kept:
        table.add(Path(kept), found)


def booted(workspace: Workspace, image: Image) -> Host:
    """A host that takes commands; one that is emulated and does not boot is booted again, once."""
    again = domain_type() != "kvm"
    while True:
        host = Host(workspace, image)
        try:
            host.wait()
        except BaseException as reason:
            host.close()
            if not again or not isinstance(reason, StandError):
                raise
            again = False
            say(f"{reason}\nbooting another")
        else:
            return host


def on_one_host(workspace: Workspace, image: Image, options: argparse.Namespace) -> bool:
    """The tests that are marked; whether all have passed."""
    with booted(workspace, image) as host:
        say(f"{host.name} runs; setting it up")
        patience = prepare(host)
        if options.shell:
            host.interact()
            return True
        quieten(host)
        sample = "CKPTMGR_TEST_SAMPLE=web"
        passed = [
            tests(host, patience, stand, options.pytest, sample) for stand in ("embedded", "daemon")
        ]
        host.pull(RESULTS, options.results)
        summary(host, options.results)
        return all(passed)


def on_two_hosts(workspace: Workspace, image: Image, options: argparse.Namespace) -> bool:
    """The tests that need a second host, in the first; whether all have passed."""
    cable = workspace.folder("l")
    ends = (Lan(cable, "host1", "host2", FIRST), Lan(cable, "host2", "host1", SECOND))
    with ExitStack() as stack:
        hosts = [
            stack.enter_context(Host(workspace, image, end.here, memory=2048, lan=end))
            for end in ends
        ]
        for host in hosts:
            host.wait()
            say(f"{host.name} runs")
        first, second = hosts
        introduce(first, second)
        with ThreadPoolExecutor() as both:
            patience = max(both.map(prepare, hosts))
        for host in hosts:
            quieten(host)
        other = f"CKPTMGR_TEST_OTHER_HOST={SECOND.partition('/')[0]}"
        passed = tests(first, patience, "daemon", options.pytest, other)
        first.pull(RESULTS, options.results)
        summary(first, options.results)
        return passed


def introduce(first: Host, second: Host) -> None:
    """Let root of the first in by ssh on the second."""
    first.shell(
        "ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519"
        " && echo StrictHostKeyChecking accept-new >/root/.ssh/config"
    )
    key = first.shell("cat /root/.ssh/id_ed25519.pub").strip()
    second.shell(f"echo {shlex.quote(key)} >>/root/.ssh/authorized_keys")


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(prog="vagrant/run-nested", description=__doc__)
    parser.add_argument("--results", type=Path, metavar="DIR", help="keep what the run left there")
    parser.add_argument("--migration", action="store_true", help="between two hosts")
    parser.add_argument("--shell", action="store_true", help="no tests: a shell in the host")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    reap()
    try:
        image = Image.get()
        say(f"booting from {image.folder}")
        with Workspace() as workspace:
            options.results = options.results or workspace.folder("results")
            passed = (on_two_hosts if options.migration else on_one_host)(workspace, image, options)
    except KeyboardInterrupt:
        return 130
    except (StandError, subprocess.TimeoutExpired) as reason:
        print(f"run-nested: {reason}", file=sys.stderr)
        return 1
    say("all passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
