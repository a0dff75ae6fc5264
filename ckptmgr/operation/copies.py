"""Copies of the files, beside its disks, that a domain is made of."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..backup import temporaries
from ..errors import RestoreFailed
from .newcomer import COPIED, Making, tpm_state


@contextmanager
def copied(making: Making) -> Iterator[list[tuple[Path, Path]]]:
    """The copies of the files that the domain is made of: their temporary and final names.

    What has no other name is gone at the end; the TPM's state, where the domain is not made.
    """
    kept, prepared = making.kept, making.prepared
    pairs: list[tuple[Path, Path]] = []
    written: list[Path] = []
    state: list[Path] = []
    try:
        for file in kept.manifest.files:
            if file.role in COPIED:
                path = prepared.files[file.role]
                name = temporaries.temporary(path, making.token)
                _write(name, kept.lineage.read(kept.manifest, file), written)
                pairs.append((name, path))
            elif file.role == "tpm":
                data = kept.lineage.read(kept.manifest, file)
                unpack(data, tpm_state(making.connection, prepared), state)
        yield pairs
    except BaseException:
        if not making.unsure:
            _remove(reversed(state))
        raise
    finally:
        _remove(written)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)


def _write(path: Path, data: bytes, written: list[Path], mode: int = 0o600) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        written.append(path)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        raise RestoreFailed(f"{path} cannot be written: {error.strerror}") from error


def unpack(data: bytes, folder: Path | None, written: list[Path]) -> None:
    """The files of a TPM's state, with the owner that they had: swtpm runs as a user of its own."""
    if folder is None:
        return
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                source = archive.extractfile(member) if member.isreg() else None
                if source is None:
                    continue
                if member.name.startswith("/") or ".." in Path(member.name).parts:
                    raise RestoreFailed(f"the state of the TPM has a file {member.name!r}")
                path = folder / member.name
                _make_folders(path.parent, written)
                _write(path, source.read(), written)
                _give(member, folder, path, written)
    except (tarfile.TarError, OSError) as error:
        raise RestoreFailed(
            f"the state of the TPM cannot be written to {folder}: {error}"
        ) from error


def _give(member: tarfile.TarInfo, folder: Path, path: Path, written: Sequence[Path]) -> None:
    if os.geteuid() != 0:
        return
    for each in (path, *path.parents):
        if each in written and each.is_relative_to(folder):
            os.chown(each, member.uid, member.gid)


def _make_folders(folder: Path, written: list[Path]) -> None:
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(mode=0o711)
        written.append(each)
