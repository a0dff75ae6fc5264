"""Execution of steps through QEMU's monitor."""

from __future__ import annotations

import contextlib
import logging
import socket as sockets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import EngineName
from ..domain.adapter import DomainAdapter
from ..domain.failure import hint_of
from ..domain.monitor import CommandFailed
from ..errors import (
    BitmapBroken,
    Busy,
    CheckpointExists,
    CkptmgrError,
    OperationFailed,
    Unsupported,
)
from ..plan.monitor import scratch_name
from ..plan.steps import (
    BitmapRef,
    BitmapsRemove,
    NbdExport,
    NbdStart,
    NbdStop,
    Quiesced,
    ReadMaps,
    Scratch,
    ScratchAdd,
    ScratchExport,
    ScratchRemove,
    Step,
    Transaction,
)
from .base import Outcome, run_steps
from .libvirt import LibvirtEngine, quiesced, read_maps

log = logging.getLogger("ckptmgr")

EXPORT_PREFIX = "ckptmgr-"
"""Starts the ids of our block exports."""

CREATION = "ckptmgr-create"
"""Id of the job that makes a scratch file."""

SCRATCH_PREFIX = scratch_name("")
STORAGE_PREFIX = "ckptmgr-file-"
"""Start the names of our scratch nodes, and of the files below them."""

JOB_TIMEOUT = 60.0
"""Seconds for a job of QEMU's to end."""

_PAUSE = 0.005
_ANSWER = 30.0  # seconds


class MonitorEngine:
    """QMP of one running domain; what concerns libvirt's metadata goes through its API."""

    name = EngineName.MONITOR

    def __init__(self, adapter: DomainAdapter) -> None:
        self.adapter = adapter
        self._libvirt = LibvirtEngine(adapter)

    def run(self, steps: Sequence[Step]) -> Outcome:
        """Execute `steps`; see `Engine`."""
        return run_steps(self.name, steps, self.perform)

    def perform(self, step: Step, outcome: Outcome) -> None:
        """Execute one step."""
        match step:
            case Transaction():
                self._command("transaction", actions=list(step.actions))
            case BitmapsRemove():
                self._remove(step)
            case NbdStart():
                address = {"type": "unix", "data": {"path": step.socket}}
                self._command("nbd-server-start", addr=address)
            case NbdExport():
                self._export(step)
            case NbdStop():
                self._stop(step)
            case ScratchAdd():
                for scratch in step.disks:
                    self._add_scratch(scratch)
            case ScratchExport():
                for scratch in step.disks:
                    self._export_scratch(scratch)
            case ScratchRemove():
                self._remove_scratch()
            case ReadMaps():
                read_maps(step, outcome)
            case Quiesced():
                quiesced(self.adapter, step, lambda inner: self.perform(inner, outcome))
            case _:
                self._libvirt.perform(step, outcome)

    def _command(self, execute: str, /, **arguments: Any) -> Any:
        try:
            return self.adapter.monitor.command(execute, **arguments)
        except CommandFailed as error:
            raise refusal(error) from error

    def _nodes(self) -> dict[str, dict[str, Any]]:
        nodes = self._command("query-named-block-nodes", flat=True)
        return {node["node-name"]: node for node in nodes}

    # --- bitmaps ---

    def _remove(self, step: BitmapsRemove) -> None:
        wanted = step.bitmaps
        if step.missing_ok:
            found = {
                (name, bitmap.get("name"))
                for name, node in self._nodes().items()
                for bitmap in node.get("dirty-bitmaps", ())
            }
            wanted = tuple(ref for ref in wanted if (ref.node, ref.name) in found)
        if not wanted:
            return
        actions = [
            {"type": "block-dirty-bitmap-remove", "data": {"node": ref.node, "name": ref.name}}
            for ref in wanted
        ]
        with self._writable({ref.node: ref for ref in wanted if ref.read_only}):
            self._command("transaction", actions=actions)

    @contextlib.contextmanager
    def _writable(self, nodes: dict[str, BitmapRef]) -> Iterator[None]:
        """Read-only nodes made writable for a while.

        QEMU refuses to remove the bitmap of a read-only node.  QMP's blockdev-reopen would reset
        every option that it is not told, and QMP does not tell them all (discard, for one); HMP's
        ``qemu-io NODE "reopen -w"`` keeps them.  The storage below follows by itself: libvirt
        opens it with auto-read-only, and without -blockdev it inherits from its node.
        """
        reopened: list[str] = []
        try:
            for node, ref in nodes.items():
                said = self.adapter.monitor.hmp(f'qemu-io {node} "reopen -w"').strip()
                if said or self._nodes()[node]["ro"]:
                    raise _not_writable(ref, said)
                reopened.append(node)
            yield
        finally:
            for node in reversed(reopened):
                self._restore(node)

    def _restore(self, node: str) -> None:
        try:
            said = self.adapter.monitor.hmp(f'qemu-io {node} "reopen -r"').strip()
        except CkptmgrError as error:
            said = str(error)
        if said:
            log.warning(
                "domain %r: block node %s is left writable: %s", self.adapter.name, node, said
            )

    # --- NBD ---

    def _export(self, step: NbdExport) -> None:
        for item in step.exports:
            arguments = {
                "type": "nbd",
                "id": f"{EXPORT_PREFIX}{item.export.disk}",
                "node-name": item.node,
                "name": item.export.name,
                "writable": False,
                "bitmaps": [item.export.bitmap],
            }
            self._command("block-export-add", **arguments)

    # --- scratch files ---

    def _add_scratch(self, scratch: Scratch) -> None:
        """Have QEMU make the file, which then belongs to whom QEMU runs as.

        AppArmor lets QEMU read and write any file in libvirt's folder of the domain, but lock none,
        and blockdev-create locks the files that it makes.  So it is made by what else makes one,
        empty: the command that saves memory, of no bytes.
        """
        image = self._nodes()[scratch.node]["image"]
        storage = f"{STORAGE_PREFIX}{scratch.disk}"
        try:
            self._command("pmemsave", val=0, size=0, filename=scratch.file)
            self._command(
                "blockdev-add",
                driver="file",
                filename=scratch.file,
                locking="off",
                **{"node-name": storage},
            )
            self._create({"driver": "qcow2", "file": storage, "size": image["virtual-size"]})
        except OperationFailed as error:
            raise OperationFailed(
                f"QEMU cannot make a scratch file: {error}",
                hint="socket_directory in ckptmgr.toml names another folder for them",
            ) from error
        arguments = {"node-name": scratch.name, "file": storage, "backing": scratch.node}
        self._command("blockdev-add", driver="qcow2", **arguments)

    def _create(self, options: dict[str, Any]) -> None:
        """blockdev-create, which is a job."""
        self._end_creation()
        self._command("blockdev-create", **{"job-id": CREATION}, options=options)
        error = self._end_creation()
        if error is not None:
            raise OperationFailed(error)

    def _end_creation(self) -> str | None:
        """Wait for the job that makes a file, also that of a process that was killed meanwhile.

        Returns why it failed, None if it did not or there is none.
        """
        deadline = time.monotonic() + JOB_TIMEOUT
        while jobs := [each for each in self._command("query-jobs") if each["id"] == CREATION]:
            if jobs[0]["status"] == "concluded":
                self._command("job-dismiss", id=CREATION)
                error: str | None = jobs[0].get("error")
                return error
            if time.monotonic() > deadline:
                raise Busy("QEMU does not finish making a scratch file", hint="try again later")
            time.sleep(_PAUSE)
        return None

    def _export_scratch(self, scratch: Scratch) -> None:
        arguments = {
            "type": "nbd",
            "id": scratch.name,
            "node-name": scratch.name,
            "name": scratch.name,
            "writable": False,
        }
        self._command("block-export-add", **arguments)

    def _remove_scratch(self) -> None:
        self._end_creation()
        deadline = time.monotonic() + JOB_TIMEOUT
        told: set[str] = set()
        while jobs := [
            job["device"]
            for job in self._command("query-block-jobs")
            if job["device"].startswith(SCRATCH_PREFIX)
        ]:
            for job in jobs:
                if job not in told:
                    told.add(job)
                    self._command("block-job-cancel", device=job, force=True)
            if time.monotonic() > deadline:
                raise Busy(f"the job {jobs[0]} in QEMU does not end", hint="try again later")
            time.sleep(_PAUSE)
        nodes = self._nodes()
        for prefix in (SCRATCH_PREFIX, STORAGE_PREFIX):  # above before below
            for node in nodes:
                if node.startswith(prefix):
                    self._command("blockdev-del", **{"node-name": node})

    def _stop(self, step: NbdStop) -> None:
        if not (listening(step.socket) or self._exporting()):
            return
        self._command("nbd-server-stop")
        Path(step.socket).unlink(missing_ok=True)

    def _exporting(self) -> bool:
        """Whether the server has an export of ours: then its socket was merely removed."""
        exports = self._command("query-block-exports")
        return any(export["id"].startswith(EXPORT_PREFIX) for export in exports)


def refusal(error: CommandFailed) -> CkptmgrError:
    """The error of ours for what QEMU refused; by its texts, for it has no codes for them."""
    text = error.description
    if "Bitmap already exists" in text:
        return CheckpointExists(error.message, hint="choose another name for the checkpoint")
    if "is currently in use" in text or "NBD server already running" in text:
        return Busy(error.message, hint="try again when the job that uses it is done")
    if text.startswith("Dirty bitmap") and text.endswith("not found"):
        return BitmapBroken(error.message)
    if text.startswith("Bitmap") and ("inconsistent" in text or "different sizes" in text):
        return BitmapBroken(error.message)
    return OperationFailed(error.message, hint=hint_of(text))


def _not_writable(ref: BitmapRef, said: str) -> CkptmgrError:
    message = (
        f"the bitmap {ref.name!r} of disk {ref.disk} cannot be removed from the backing image "
        f"{ref.image}, which QEMU cannot open for writing: "
        f"{' '.join(said.split()) or 'it stayed read-only'}"
    )
    if '"write" lock' in said:
        return Busy(message, hint="another domain or program uses the image")
    return Unsupported(
        message, hint="delete the checkpoint through libvirt, or while the domain is stopped"
    )


def listening(path: str) -> bool:
    """Whether something accepts connections on a socket: QEMU, where the path is ours.

    It leaves QEMU no client.  ``nbd-server-stop`` waits for one that has not negotiated yet without
    listening to it (QEMU 7.2 of Debian 12), so that the whole of QEMU would stand still for ever:
    our end is shut, and it is waited for until QEMU's is.

    Raises Busy if QEMU does not answer, OperationFailed if the socket cannot be opened.
    """
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as client:
        client.settimeout(_ANSWER)
        try:
            client.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except (TimeoutError, BlockingIOError) as error:
            raise _silent(path) from error
        except OSError as error:
            raise OperationFailed(
                f"the socket {path} cannot be opened: {error.strerror}",
                hint="run as root or as the user that QEMU runs as",
            ) from error
        try:
            client.shutdown(sockets.SHUT_WR)
            while client.recv(4096):
                pass
        except TimeoutError as error:
            raise _silent(path) from error
        except OSError:
            pass  # closed as well
    return True


def _silent(path: str) -> Busy:
    return Busy(f"QEMU does not answer on its socket {path}", hint="try again later")
