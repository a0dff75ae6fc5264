"""Firmware variables, kernel, initrd and TPM state: in the point, with their digests."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

import ckptmgr
from ckptmgr.backup.manifest import Manifest
from ckptmgr.config import Driver
from ckptmgr.domain.attachments import Attachment, attachments
from ckptmgr.operation import point
from integration.conftest import MakeMachine
from integration.stand import MIB, DiskSpec
from integration.test_backup import Backups

TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"


def held(vm: Backups, manifest: Manifest) -> dict[str, bytes]:
    """The files of a point by their role, each as the manifest says."""
    folder = vm.image(manifest, "vda").parent
    found = {}
    for file in manifest.files:
        data = (folder / file.file).read_bytes()
        assert len(data) == file.bytes
        assert hashlib.sha256(data).hexdigest() == file.sha256
        found[file.role] = data
    return found


@pytest.mark.not_on_stacks("the state of a TPM there is in a folder that only that libvirt sees")
def test_what_is_beside_the_disks_is_in_the_point(
    make_vm: MakeMachine,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("code.fd", "vars.fd", "vmlinuz", "initrd")
    code, variables, kernel, initrd = (tmp_path / name for name in names)
    for path in (code, variables, kernel, initrd):
        path.write_bytes(path.name.encode() * 1000)
    machine = make_vm(
        [DiskSpec("vda", size=MIB)],
        state="stopped",
        machine="q35",
        os_elements=f"<loader readonly='yes' type='pflash'>{code}</loader>"
        f"<nvram>{variables}</nvram><kernel>{kernel}</kernel><initrd>{initrd}</initrd>",
    )

    def with_tpm(definition: str, *where: Any) -> tuple[Attachment, ...]:
        # libvirt defines no domain with a TPM where swtpm is not installed.
        return attachments(definition.replace("</devices>", f"{TPM}</devices>"), *where)

    monkeypatch.setattr(point, "attachments", with_tpm)
    vm = Backups(machine, tmp_path)
    # Where libvirt's own driver keeps it: swtpmStorageDir of qemu_conf.c, for a root of its own.
    root = machine.stand.connection.embedded_root
    assert root is not None
    state = root / "lib" / "swtpm" / machine.domain.UUIDString() / "tpm2"
    state.mkdir(parents=True)
    (state / "tpm2-00.permall").write_bytes(b"state of the TPM")
    first = vm.take("first")
    assert caplog.text == ""
    found = held(vm, first)
    assert set(found) == {"domain", "checkpoint", "nvram", "kernel", "initrd", "tpm"}
    assert found["nvram"] == variables.read_bytes()
    assert found["kernel"] == kernel.read_bytes()
    assert found["initrd"] == initrd.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(found["tpm"])) as archive:
        (member,) = archive.getmembers()
        assert member.name == "tpm2/tpm2-00.permall"
        file = archive.extractfile(member)
        assert file is not None
        assert file.read() == b"state of the TPM"
    sources = {file.role: file.source for file in first.files}
    assert sources["nvram"] == str(variables)

    # What changes is in the next one; what is gone costs itself alone, and is said.
    variables.write_bytes(b"changed")
    kernel.unlink()
    second = vm.take("second")
    found = held(vm, second)
    assert found["nvram"] == b"changed"
    assert set(found) == {"domain", "checkpoint", "nvram", "initrd", "tpm"}
    assert str(kernel) in caplog.text
    assert "is not in the restore point" in caplog.text
    assert first.disks[0].reason != second.disks[0].reason is None
    listing = ckptmgr.repository(vm.repository).points()
    assert [each.name for each in listing.points] == ["first", "second"]


def test_where_each_driver_keeps_the_state_of_a_tpm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As qemu_conf.c of libvirt 9.0 has it."""
    document = f"<domain><devices>{TPM}</devices></domain>"
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    home = os.environ["HOME"]
    expected = {
        Driver.SYSTEM: Path("/var/lib/libvirt/swtpm/u"),
        Driver.SESSION: Path(f"{home}/.config/libvirt/qemu/swtpm/u"),
        Driver.EMBEDDED: Path("/root-of-it/lib/swtpm/u"),
    }
    for driver, folder in expected.items():
        (found,) = attachments(document, "u", driver, Path("/root-of-it"))
        assert (found.role, found.path) == ("tpm", folder)
