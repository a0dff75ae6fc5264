"""Execution of steps through libvirt's public API."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence

from ..checkpoint import EngineName
from ..domain.adapter import DomainAdapter
from ..domain.binding import libvirt
from ..domain.failure import OPERATION_INVALID, translate
from ..errors import BitmapBroken, Busy, NoCheckpoint, OperationFailed, Unsupported
from ..plan.libvirt import serves, tracked_disks, with_disks
from ..plan.steps import (
    BackupBegin,
    BackupEnd,
    CheckpointCreate,
    CheckpointDelete,
    CheckpointPurge,
    CheckpointRedefine,
    DataServed,
    Quiesced,
    ReadMaps,
    Step,
)
from .base import Outcome, run_steps

log = logging.getLogger("ckptmgr")

JOB_END_TIMEOUT = 60.0
"""Seconds for a backup job to end after it was told to; libvirt removes its scratch files then."""

JOB_BEGIN_TIMEOUT = 20.0
"""Seconds for a job to begin that a process which is gone has asked for."""

_PAUSE = 0.002

NO_DOMAIN_BACKUP = 104  # virErrorNumber

# What qemuBackupGetJobInfoStats says while virDomainBackupBegin is still at work.
_BEGINNING_TEXT = "backup job data missing"
_BEGINNING = "(beginning)"
_STUCK = (
    "try again; if this lasts, libvirt itself was killed while it began a backup job: shut the "
    "domain off, restart libvirt's daemon, and start the domain"
)


class LibvirtEngine:
    """The checkpoint and backup APIs of one domain."""

    name = EngineName.LIBVIRT

    def __init__(self, adapter: DomainAdapter) -> None:
        self.adapter = adapter

    def run(self, steps: Sequence[Step]) -> Outcome:
        """Execute `steps`; see `Engine`."""
        return run_steps(self.name, steps, self.perform)

    def perform(self, step: Step, outcome: Outcome) -> None:
        """Execute one step."""
        match step:
            case CheckpointCreate():
                with translate("creating the checkpoint", self.adapter.name):
                    self.adapter.handle.checkpointCreateXML(step.document, 0)
            case CheckpointRedefine():
                self._redefine(step)
            case CheckpointDelete():
                self._delete(step)
            case CheckpointPurge():
                self._purge(step)
            case BackupBegin():
                self._begin(step)
            case BackupEnd():
                self._end(step)
            case ReadMaps():
                read_maps(step, outcome)
            case DataServed():
                outcome.served |= {disk: (step.socket, name) for disk, name in step.exports}
            case Quiesced():
                quiesced(self.adapter, step, lambda inner: self.perform(inner, outcome))
            case _:
                raise OperationFailed(f"engine {self.name} cannot do this: {step}")

    def _redefine(self, step: CheckpointRedefine) -> None:
        flags = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
        if step.validate:
            flags |= libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE
        with translate(f"redefining checkpoint {step.name}", self.adapter.name):
            self.adapter.handle.checkpointCreateXML(step.document, flags)

    def _delete(self, step: CheckpointDelete) -> None:
        flags = libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY if step.metadata_only else 0
        try:
            with translate(f"deleting checkpoint {step.name}", self.adapter.name):
                self.adapter.handle.checkpointLookupByName(step.name, 0).delete(flags)
        except NoCheckpoint:
            if not step.missing_ok:
                raise

    def _purge(self, step: CheckpointPurge) -> None:
        left = set(tracked_disks(step.document))
        known = self._knows(step.name)
        while left:
            if not known:
                shown = with_disks(step.document, left)
                self._redefine(CheckpointRedefine(step.name, shown))
            try:
                self._delete(CheckpointDelete(step.name, missing_ok=True))
            except BitmapBroken as error:
                if error.disk not in left:
                    raise
                left.discard(error.disk)
                known = False
            else:
                return
        self._delete(CheckpointDelete(step.name, metadata_only=True, missing_ok=True))

    def _knows(self, name: str) -> bool:
        try:
            with translate(f"looking for checkpoint {name}", self.adapter.name):
                self.adapter.handle.checkpointLookupByName(name, 0)
        except NoCheckpoint:
            return False
        return True

    def _begin(self, step: BackupBegin) -> None:
        # libvirt would wait up to 30 s for another job, and then refuse.
        if self._job_running():
            raise Busy(
                f"domain {self.adapter.name!r} has another job running, such as a backup",
                hint="try again when it is done; `virsh domjobinfo DOMAIN` shows it",
            )
        try:
            with translate("beginning a backup job to read dirty bitmaps", self.adapter.name):
                self.adapter.handle.backupBegin(step.backup, step.checkpoint, 0)
        except NoCheckpoint as error:
            # "Checkpoint 'c1' for incremental backup of disk 'vda' not found"
            found = re.search(r"backup of disk '([^']*)'", error.message)
            raise BitmapBroken(error.message, disk=found[1] if found else None) from error
        except Unsupported as error:
            # "cannot perform disk backup for inactive domain": it was running when we looked.
            if self.adapter.active():
                raise
            raise OperationFailed(
                f"domain {self.adapter.name!r} ended before the backup job began"
            ) from error

    def _end(self, step: BackupEnd) -> None:
        # The job goes on for some milliseconds after it was told to end.  Until it is gone, libvirt
        # refuses others, and an embedded driver that is closed meanwhile leaves scratch files.
        # One that a killed process asked for may only be about to begin in the daemon; to redefine
        # its checkpoint then is a segmentation fault there (9.0, virDomainMomentDropParent).
        start = time.monotonic()
        told = False
        while (job := self._backup_job()) is _BEGINNING or (job and serves(job, step.socket)):
            if job is not _BEGINNING and not told:
                try:
                    with translate("ending the backup job", self.adapter.name):
                        self.adapter.handle.abortJob()
                except OperationFailed:
                    if self._backup_job() == job:
                        raise
                    continue  # it has ended: whoever was killed had told it to
                told = True
            waited = time.monotonic() - start
            if waited > (JOB_END_TIMEOUT if told else JOB_BEGIN_TIMEOUT):
                raise Busy(
                    f"the backup job of domain {self.adapter.name!r} does not end",
                    hint=None if told else _STUCK,
                )
            time.sleep(_PAUSE)

    def _backup_job(self) -> str | None:
        """The document of the backup job that is running; None if there is no such job."""
        try:
            with translate("looking for a backup job", self.adapter.name):
                document = self.adapter.handle.backupGetXMLDesc(0)
        except OperationFailed as error:
            if not _has_code(error, NO_DOMAIN_BACKUP, OPERATION_INVALID):
                raise
        else:
            job: str = document
            return job
        return _BEGINNING if self._backup_beginning() else None

    def _backup_beginning(self) -> bool:
        try:
            with translate("looking for running jobs", self.adapter.name):
                job = self.adapter.handle.jobStats(0)
        except OperationFailed as error:
            if _has_code(error, OPERATION_INVALID):  # the domain is not running
                return False
            if _BEGINNING_TEXT in error.message:
                return True
            raise
        active = job["type"] != libvirt.VIR_DOMAIN_JOB_NONE
        return bool(active and job.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP)

    def _job_running(self) -> bool:
        try:
            with translate("looking for running jobs", self.adapter.name):
                job = self.adapter.handle.jobInfo()[0]
        except OperationFailed as error:
            if _BEGINNING_TEXT in error.message:
                raise Busy(
                    f"a backup job of domain {self.adapter.name!r} is beginning", hint=_STUCK
                ) from error
            raise
        return bool(job != libvirt.VIR_DOMAIN_JOB_NONE)


def _has_code(error: OperationFailed, *codes: int) -> bool:
    cause = error.__cause__
    return isinstance(cause, libvirt.libvirtError) and cause.get_error_code() in codes


def read_maps(step: ReadMaps, outcome: Outcome) -> None:
    """Read every export of `step` into `outcome`."""
    from ..nbd import read_dirty_map  # libnbd: a backup loads it while its job begins

    for export in step.exports:
        outcome.add(export.disk, read_dirty_map(step.socket, export))


def quiesced(adapter: DomainAdapter, step: Quiesced, perform: Callable[[Step], None]) -> None:
    """Perform the inner step with the guest's file systems frozen."""
    with adapter.agent.frozen(step.timeout):
        perform(step.step)
