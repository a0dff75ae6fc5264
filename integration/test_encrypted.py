"""Encrypted disks: tracked as others are, and never in plain text where nobody asked for that."""

from __future__ import annotations

import contextlib
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import libvirt
import pytest

import ckptmgr
from integration.conftest import MakeMachine
from integration.stand import Daemon, DiskSpec, Machine, luks, rounded
from integration.test_backup import Backups, modes

MIB = 1 << 20


class Sealed(Backups):
    """Of a machine whose disks cannot be read without their keys."""

    def contents(self) -> dict[str, bytes]:
        return {}


class Encrypted:
    """A machine with a qcow2 and a raw image that are encrypted, and one that is not.

    secret -- libvirt's with the key of both
    """

    def __init__(self, daemon: Daemon, make_vm_on: MakeMachine, folder: Path) -> None:
        self.folder = folder
        self._key = folder / "key"
        self._key.write_bytes(luks.KEY)
        self._handle = daemon.handle
        self._uuid = str(uuid.uuid4())
        self.secret: libvirt.virSecret
        self.remember()
        elements = (
            f"<encryption format='luks'><secret type='passphrase' uuid='{self._uuid}'/>"
            "</encryption>"
        )
        disks = (
            self._disk(DiskSpec("vda", size=8 * MIB, source_elements=elements)),
            self._disk(DiskSpec("vdb", "raw", size=2 * MIB, source_elements=elements)),
            DiskSpec("vdc", size=2 * MIB),
        )
        self.machine: Machine = make_vm_on(daemon, disks, state="running")

    def remember(self) -> None:
        """Have libvirt know the secret (again)."""
        self.secret = self._handle.secretDefineXML(
            f"<secret private='no'><uuid>{self._uuid}</uuid></secret>"
        )
        self.secret.setValue(luks.KEY, 0)

    def _disk(self, spec: DiskSpec) -> DiskSpec:
        image = self.folder / f"{spec.target}.{spec.format}"
        if spec.format == "qcow2":
            luks.make_qcow2(image, spec.size, self._key)
        else:
            luks.make_raw(image, spec.size)
        return replace(spec, image=image)

    def _options(self, target: str) -> str:
        image = self.machine.images[target]
        driver = {
            "vda": "driver=qcow2,encrypt.key-secret=key",
            "vdb": "driver=luks,key-secret=key",
            "vdc": "driver=qcow2",
        }[target]
        return f"{driver},file.filename={image}"

    def write(self, target: str, offset: int, length: int, pattern: int) -> None:
        """Through the device, or to the image."""
        command = f"write -P {pattern} {offset} {length}"
        if self.machine.active:
            device = self.machine.device(target)
            said = self.machine.hmp(f'qemu-io -d {device} "{command}"')
            said += self.machine.hmp(f'qemu-io -d {device} "flush"')
            assert "rror" not in said, said
            return
        said = subprocess.run(
            [
                "qemu-io",
                "--object",
                luks.secret(self._key),
                "-c",
                command,
                "--image-opts",
                self._options(target),
            ],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        assert f"wrote {length}/{length}" in said

    def equals(self, target: str, image: Path) -> bool:
        """Whether a plain image has what the disk has; nothing has that open."""
        command = ["qemu-img", "compare", "-q", "--object", luks.secret(self._key), "--image-opts"]
        there = f"driver=qcow2,file.filename={image}"
        done = subprocess.run([*command, self._options(target), there], check=False)
        assert done.returncode in (0, 1)
        return done.returncode == 0


@pytest.fixture
def encrypted(daemon: Daemon, make_vm_on: MakeMachine, tmp_path: Path) -> Iterator[Encrypted]:
    made = Encrypted(daemon, make_vm_on, tmp_path)
    yield made
    made.secret.undefine()


def holding(folder: Path, data: bytes) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and data in path.read_bytes()]


def test_an_encrypted_disk_is_tracked_and_backed_up_running_and_shut_off(
    encrypted: Encrypted, tmp_path: Path
) -> None:
    machine = encrypted.machine
    backups = Sealed(machine, tmp_path)
    encrypted.write("vda", 0, MIB, 0x11)
    encrypted.write("vdb", 0, MIB, 0x22)
    made = [backups.take("full", decrypt=True)]
    encrypted.write("vda", 2 * MIB, 4096, 0x33)
    encrypted.write("vdb", MIB, 4096, 0x44)
    assert machine.bitmaps("vda")["full"]["count"] == 65536
    made.append(backups.take("running", decrypt=True))
    with backups.domain() as domain:
        assert domain.check() == ()
    machine.stop()
    for target in ("vda", "vdb", "vdc"):
        assert encrypted.equals(target, backups.image(made[1], target))
    with backups.domain() as domain:
        domain.create("stopped")
        encrypted.write("vda", 3 * MIB, 4096, 0x55)
        encrypted.write("vdb", MIB + 65536, 4096, 0x66)
        found = domain.diff("stopped").disks
        assert found[0].extents() == rounded([(3 * MIB, 4096)])
        assert not found[1].known
        assert found[1].dirty_bytes == 2 * MIB
    made.append(backups.take("shut-off", decrypt=True))
    assert [modes(each)["vda"] for each in made] == ["full", "incremental", "incremental"]
    assert [each.disks[0].reason for each in made[1:]] == [None, None]
    assert [disk.virtual_size for disk in made[2].disks] == [8 * MIB, 2 * MIB, 2 * MIB]
    for target in ("vda", "vdb", "vdc"):
        assert encrypted.equals(target, backups.image(made[2], target))
    with backups.domain() as domain:
        domain.archive(1)
        domain.delete("stopped")
        assert domain.check() == ()
    assert set(machine.bitmaps("vda")) == {"shut-off"}
    backups.crash()
    assert machine.bitmaps("vda") == {}
    assert holding(backups.repository, luks.KEY) == holding(backups.store, luks.KEY) == []


def test_nothing_of_an_encrypted_disk_is_kept_in_plain_text_unasked(
    encrypted: Encrypted, tmp_path: Path
) -> None:
    backups = Sealed(encrypted.machine, tmp_path)
    encrypted.write("vda", 0, MIB, 0x11)
    for state in ("running", "shut off"):
        with pytest.raises(ckptmgr.InvalidRequest, match="vda, vdb is encrypted") as raised:
            backups.take("unasked")
        assert "--decrypt" in str(raised.value.hint), state
        assert not backups.repository.exists()
        encrypted.machine.stop() if encrypted.machine.active else None
    with backups.domain() as domain:
        assert domain.current() is None
    assert modes(backups.take("others", disks=("vdc",))) == {"vdc": "full"}
    assert holding(backups.repository, b"\x11" * 4096) == []


def test_a_snapshot_that_would_be_plain_or_end_the_domain_is_refused(
    encrypted: Encrypted, tmp_path: Path
) -> None:
    with Sealed(encrypted.machine, tmp_path).domain() as domain:
        for options, why in (
            ({"disk_only": True}, "the new image file that it would be written to would not be"),
            ({"memory": str(tmp_path / "memory")}, "the new image file"),
            ({}, "QEMU would end when it saves the memory"),
        ):
            with pytest.raises(ckptmgr.Unsupported, match=f"vda, vdb is encrypted, and {why}"):
                domain.create_snapshot("s1", **options)
        assert domain.snapshots() == ()
    assert encrypted.machine.active


def test_a_key_that_is_not_to_be_had_is_told_before_anything_is_touched(
    encrypted: Encrypted, tmp_path: Path
) -> None:
    machine = encrypted.machine
    backups = Sealed(machine, tmp_path)
    with backups.domain() as domain:
        domain.create("c1")
        domain.create("c2")
        machine.stop()
        encrypted.secret.undefine()
        before = machine.images["vda"].read_bytes()
        for act in (
            lambda: domain.create("c3"),
            lambda: domain.diff("c2"),
            lambda: domain.delete("c1"),
            lambda: domain.archive(1),
            lambda: backups.take("point", decrypt=True),
            lambda: backups.take("point", decrypt=True, disks=("vdb",)),
        ):
            with pytest.raises(ckptmgr.Unsupported, match="is encrypted, and its secret") as raised:
                act()
            assert "start the domain" in str(raised.value.hint)
        assert machine.images["vda"].read_bytes() == before
        assert domain.check() == ()
        encrypted.remember()
        assert domain.create("c3").parent == "c2"
        assert domain.archive(1) == {"c1": ("vda", "vdc"), "c2": ("vda", "vdc")}
    assert set(machine.bitmaps("vda")) == {"c3"}


def test_what_is_restored_is_not_encrypted_and_replaces_nothing_that_is(
    encrypted: Encrypted, daemon: Daemon, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine = encrypted.machine
    backups = Sealed(machine, tmp_path)
    encrypted.write("vda", 0, MIB, 0x11)
    encrypted.write("vdb", 0, MIB, 0x22)
    backups.take("point", decrypt=True)
    machine.stop()
    before = {target: machine.images[target].read_bytes() for target in ("vda", "vdb")}
    catalogue = ckptmgr.repository(backups.repository)
    for target in before:
        onto = {target: machine.images[target]}
        with pytest.raises(ckptmgr.InvalidRequest, match="is encrypted"):
            catalogue.restore(machine.name, "point", onto=onto)
        with (
            backups.domain() as domain,
            pytest.raises(ckptmgr.Unsupported, match="its image is encrypted"),
        ):
            domain.restore(backups.repository, "point", disks=(target,))
        assert machine.images[target].read_bytes() == before[target]
    with ckptmgr.connect(machine.uri, store=backups.store) as host:
        folder = tmp_path / "new"
        host.restore(backups.repository, machine.name, "point", folder, name="again", flatten=True)
    assert "the image of disk vda was encrypted, and the restored one is not" in caplog.text
    with contextlib.ExitStack() as stack:
        again = daemon.handle.lookupByName("again")
        stack.callback(
            again.undefineFlags,
            libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA,
        )
        assert "<encryption" not in again.XMLDesc()
        assert encrypted.equals("vda", folder / "vda.qcow2")
