"""Every error that ckptmgr raises on purpose: one class per error code.

``code`` is what ``--json`` prints and ``exit_status`` is what the command line exits with;
both are promises to scripts (``docs/cli.md``).  A message says what happened, to which domain
and disk; ``hint`` says what the user can do about it.
"""

from __future__ import annotations


class CkptmgrError(Exception):
    """The operation failed."""

    code = "failed"
    exit_status = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class InvalidRequest(CkptmgrError):
    """The request itself is wrong; nothing was looked at or touched."""

    code = "invalid-request"
    exit_status = 2


class CheckpointExists(CkptmgrError):
    """The name of a new checkpoint is taken, in the store, in libvirt or by a bitmap."""

    code = "checkpoint-exists"


class InvalidDocument(CkptmgrError):
    """An XML document cannot be read, or says something that cannot be true."""

    code = "invalid-document"


class StoreFailed(CkptmgrError):
    """The store cannot be read or written (permission, space, a vanished file system)."""

    code = "store"


class StoreDamaged(CkptmgrError):
    """A file of the store does not contain what its name and digest promise."""

    code = "store-damaged"


class RepositoryFailed(CkptmgrError):
    """A repository cannot be read or written (permission, space, a vanished file system)."""

    code = "repository"


class RepositoryDamaged(CkptmgrError):
    """A file of a repository is missing, or is not what its manifest and digests promise."""

    code = "repository-damaged"


class RestoreFailed(CkptmgrError):
    """What is restored cannot be written where it is to go."""

    code = "restore"


class PointExists(CkptmgrError):
    """The name of a new restore point is taken."""

    code = "point-exists"


class ConnectionFailed(CkptmgrError):
    """libvirt cannot be reached, or went away."""

    code = "connection"


class ReadOnlyConnection(CkptmgrError):
    """The connection only allows reading."""

    code = "read-only"


class OperationFailed(CkptmgrError):
    """libvirt or QEMU refused or failed to do what was asked."""

    code = "operation-failed"


class BitmapBroken(CkptmgrError):
    """A dirty bitmap that was needed is missing, inconsistent or not recording.

    ``disk`` names the disk where that is known.
    """

    code = "bitmap-broken"

    def __init__(self, message: str, *, disk: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.disk = disk


class GuestAgentFailed(CkptmgrError):
    """The guest agent did not freeze or thaw the file systems in time."""

    code = "guest-agent"


class NoDomain(CkptmgrError):
    """No domain has that name, UUID or id."""

    code = "no-domain"
    exit_status = 3


class NoCheckpoint(CkptmgrError):
    """No checkpoint has that name, or there is no current or parent one."""

    code = "no-checkpoint"
    exit_status = 3


class NoSnapshot(CkptmgrError):
    """The domain has no snapshot of that name."""

    code = "no-snapshot"
    exit_status = 3


class NoPoint(CkptmgrError):
    """The repository has no restore point of that name, or none of that domain."""

    code = "no-point"
    exit_status = 3


class Busy(CkptmgrError):
    """A lock is held or a job is running; trying again later may work."""

    code = "busy"
    exit_status = 5


class Unsupported(CkptmgrError):
    """This stack, disk or connection cannot do it; the message says why."""

    code = "unsupported"
    exit_status = 6


class NodeUnknown(Unsupported):
    """The block node of a disk cannot be told for certain, and is not guessed."""

    code = "node-unknown"
