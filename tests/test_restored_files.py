"""The files beside the disks of a domain that is made from a point."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from ckptmgr.errors import RestoreFailed
from ckptmgr.operation.copies import unpack
from ckptmgr.operation.defining import _mac


def archive(*members: tuple[str, bytes], link: str | None = None) -> bytes:
    """A tar archive of a TPM's state, with a symbolic link if `link` is given."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as tar:
        if link is not None:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, link
            tar.addfile(info)
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.uid, info.gid = len(data), os.getuid(), os.getgid()
            tar.addfile(info, io.BytesIO(data))
    return output.getvalue()


def test_the_state_of_a_tpm_is_unpacked_and_known(tmp_path: Path) -> None:
    written: list[Path] = []
    folder = tmp_path / "swtpm" / "uuid"
    unpack(archive(("tpm2/state", b"secret"), ("tpm2/.lock", b"")), folder, written)
    assert (folder / "tpm2/state").read_bytes() == b"secret"
    assert (folder / "tpm2/state").stat().st_mode & 0o777 == 0o600
    assert written == [
        tmp_path / "swtpm",
        folder,
        folder / "tpm2",
        folder / "tpm2/state",
        folder / "tpm2/.lock",
    ]


@pytest.mark.parametrize("name", ["../state", "/etc/state", "a/../../state"])
def test_no_file_of_an_archive_gets_out_of_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(RestoreFailed, match="has a file"):
        unpack(archive((name, b"x")), tmp_path / "tpm", [])
    assert not (tmp_path / "state").exists()


def test_links_are_passed_over_and_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "tpm"
    unpack(archive(("state", b"x"), link="/etc"), folder, [])
    assert [path.name for path in folder.iterdir()] == ["state"]
    with pytest.raises(RestoreFailed, match="exists"):
        unpack(archive(("state", b"y")), folder, [])
    assert (folder / "state").read_bytes() == b"x"
    with pytest.raises(RestoreFailed):
        unpack(b"no archive" * 100, folder, [])


def test_addresses_are_qemus_and_differ() -> None:
    found = {_mac() for _ in range(50)}
    assert len(found) == 50
    assert all(each.startswith("52:54:00:") and len(each) == 17 for each in found)
