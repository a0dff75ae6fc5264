"""A running stack: the libvirtd of another release, chrooted, with the interface of a stand."""

from __future__ import annotations

import contextlib
import json
import select
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

from ckptmgr.domain.connection import Connection, connect
from integration.stand import StandError, Workspace
from integration.stand.accel import domain_type
from integration.stand.libvirts import LIBVIRTD_CONF, Client, qemu_conf

from .build import RELEASES, build, hold
from .hooks import Hooks, programs

_INIT = Path(__file__).with_name("init.py")


class Stack(Client):
    """A stack that runs; ``close`` ends it, and it does not outlive this process.

    kind -- its name
    uri -- of its libvirt; good for every process on this machine
    sockets -- folder for unix sockets (and scratch files), the same inside and outside
    """

    def __init__(self, workspace: Workspace, name: str) -> None:
        """Start a stack, building it first where that was never done.

        Images and sockets have to be in `workspace`, which has the same path inside.

        Raises StandError where this machine has no means for it.
        """
        self.kind = name
        self.release = RELEASES[name]
        self.workspace = workspace
        lower = build(name)
        self._hold = hold(name)
        self._folder = workspace.folder("s")
        for each in ("root", "changes", "etc", "lib", "cache", "log", "run", "sockets"):
            (self._folder / each).mkdir()
        self.sockets = self._folder / "sockets"
        # a migration to the same host is refused
        self._conf = f'{LIBVIRTD_CONF}host_uuid = "{uuid.uuid4()}"\n'
        self.uri = f"qemu+unix:///system?socket={self._folder}/run/libvirt-sock"
        self.connection: Connection
        self._init = self._spawn(lower)
        try:
            self.pid = int(self._answer("ready"))
            self.start()
        except BaseException:
            self._end()
            raise

    def _spawn(self, lower: Path) -> subprocess.Popen[str]:
        settings = {
            "lower": str(lower),
            "folder": str(self._folder),
            "shared": str(self.workspace.path),
            # one that is there and does not work makes libvirt probe QEMU again and again
            "devices": ["kvm"] if domain_type() == "kvm" else [],
            "programs": programs(),
        }
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        with (self._folder / "init.log").open("w") as log:
            process = subprocess.Popen(
                [*command, sys.executable, "-I", _INIT, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # ^C is for the tests; the stack ends with them
                start_new_session=True,
            )
        self.workspace.record(process.pid)
        return process

    def _answer(self, expected: str, seconds: float = 180) -> str:
        # longer than init.py itself waits for anything
        assert self._init.stdout is not None
        ready, _, _ = select.select([self._init.stdout], [], [], seconds)
        line = self._init.stdout.readline().strip() if ready else ""
        word, _, rest = line.partition(" ")
        if word != expected:
            log = (self._folder / "init.log").read_text(errors="replace")
            raise StandError(f"{self.kind} does not start: {line} {log[-500:]}".strip())
        return rest

    def _tell(self, line: str) -> None:
        assert self._init.stdin is not None
        self._init.stdin.write(line + "\n")
        self._init.stdin.flush()

    # --- the daemon ---------------------------------------------------------------------------

    def start(self, *, listen: str = "", qemu: str = "") -> None:
        """Start the libvirtd (again) and connect to it.

        listen -- lines for libvirtd.conf with which it listens on the network
        qemu -- further lines for qemu.conf
        """
        (self._folder / "etc/qemu.conf").write_text(qemu_conf() + qemu)
        # libvirt takes the first of two lines about the same
        (self._folder / "etc/libvirtd.conf").write_text(listen + self._conf)
        self._tell("start --listen" if listen else "start")
        self._answer("started")
        self.connection = connect(self.uri)

    def stop(self, *, kill: bool = False) -> None:
        """End the libvirtd, which leaves its machines running; `kill`: with SIGKILL."""
        self.connection.close()
        self._tell(f"stop {(signal.SIGKILL if kill else signal.SIGTERM).value}")
        self._answer("stopped")

    def environment(self) -> Mapping[str, str]:
        """Nothing: the URI says it all."""
        return {}

    def inside(self, *command: str) -> list[str]:
        """The command line that runs `command` inside the stack."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--root", "--wd"]
        return [*enter, *command]

    def hooks(self, store: Path) -> Hooks:
        """Its libvirt's hooks, for ours; a libvirtd that had none sees them when started anew."""
        return Hooks(self._folder / "etc", store)

    def pid_of(self, domain: str) -> int:
        """Process id, outside, of a running domain's QEMU."""
        # libvirt escapes the name as if the file's path were XML (7.0 to 11.3)
        name = escape(domain, {"'": "&apos;", '"': "&quot;"})
        inside = (self._folder / f"run/qemu/{name}.pid").read_text().strip()
        namespace = Path(f"/proc/{self.pid}/ns/pid").readlink()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (process / "ns/pid").readlink() == namespace:
                    status = (process / "status").read_text()
                    ids = status.partition("NSpid:")[2].partition("\n")[0].split()
                    if ids[-1] == inside:
                        return int(process.name)
        raise StandError(f"{self.kind} has no process {inside} of domain {domain!r}")

    def close(self) -> None:
        """Close the connection and end everything that runs in the stack."""
        self.connection.close()
        self._end()

    def _end(self) -> None:
        assert self._init.stdin is not None
        assert self._init.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._init.stdin.close()
        try:
            self._init.wait(60)
        except subprocess.TimeoutExpired:
            self._init.kill()
            self._init.wait()
        self._init.stdout.close()
        self._hold.close()
        shutil.rmtree(self._folder, ignore_errors=True)
