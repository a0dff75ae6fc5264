"""Restore points after random histories: each holds, byte for byte, what the disks held.

A history is a sequence of what can happen to a domain, drawn from a seed; a failure names the
seed, and ``CKPTMGR_SEED`` runs it again.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import libvirt
import nbd
import pytest

import ckptmgr
from ckptmgr.backup.block import BLOCK
from ckptmgr.backup.manifest import Manifest
from integration.conftest import MakeMachine
from integration.stand import MIB, DiskSpec, Embedded, Machine
from integration.stand.patience import patiently
from integration.test_backup import Backups

SEEDS = 6
SEEDS_LONG = 60
STEPS = 22
PLUGGED = "sda"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One seed a history."""
    if "seed" in metafunc.fixturenames:
        chosen = os.environ.get("CKPTMGR_SEED")
        count = SEEDS_LONG if metafunc.config.getoption("--long") else SEEDS
        metafunc.parametrize("seed", [int(chosen)] if chosen else range(1, count + 1))


def create(path: Path, size: int, *options: str) -> Path:
    """A qcow2 image."""
    chosen = ["-o", ",".join(options)] if options else []
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *chosen, path, str(size)]
    subprocess.run(command, check=True)
    return path


def odd_disks(folder: Path, *, snapshots: bool) -> tuple[DiskSpec, ...]:
    """One of each kind of image, or of those that can have internal snapshots."""
    fine = create(folder / "vdb.qcow2", 3 * MIB + 4096, "extended_l2=on", "cluster_size=16k")
    if snapshots:
        return (
            DiskSpec("vda", size=4 * MIB, cluster_size=4096, backing=("qcow2", "raw")),
            DiskSpec("vdb", size=3 * MIB + 4096, image=fine),
            DiskSpec("vde", size=5 * MIB + 512),
        )
    data = f"data_file={folder}/vdd.data"
    apart = create(folder / "vdd.qcow2", 2 * MIB, data, "data_file_raw=on")
    return (
        DiskSpec("vda", size=4 * MIB, cluster_size=4096, backing=("qcow2", "raw")),
        DiskSpec("vdb", size=3 * MIB + 4096, image=fine),
        DiskSpec("vdc", size=2 * MIB + 1536, format="raw"),
        DiskSpec("vdd", size=2 * MIB, image=apart),
        DiskSpec("vde", size=5 * MIB + 512),
    )


class History:
    """A domain with its model: what is on each disk, and at each point and snapshot."""

    def __init__(self, machine: Machine, folder: Path, seed: int, *, rewinds: bool) -> None:
        self.rand = random.Random(seed)
        self.backups = Backups(machine, folder)
        self.machine = machine
        self.rewinds = rewinds
        self.folder = folder
        self.disks = {disk.target: machine.contents(disk.target) for disk in machine.disks}
        self.points: list[Manifest] = []
        self.snapshots: dict[str, dict[str, bytes]] = {}
        self.done: list[str] = []
        self.number = 0
        self.plug = create(folder / f"{PLUGGED}.qcow2", MIB)

    # --- what can happen -----------------------------------------------------------------------

    def write(self) -> None:
        """A few writes to every disk: patterns, zeroes, discards, and small ones here and there."""
        for target in list(self.disks):
            for _ in range(self.rand.randrange(4)):
                self._write(target)

    def _write(self, target: str) -> None:
        size = len(self.disks[target])
        kind = self.rand.choice(["data", "data", "zero", "discard", "nothing", "small"])
        if kind == "small":
            for _ in range(5):
                place = self.rand.randrange(size // 4096) * 4096
                self._put(target, place, min(4096, size - place), self.rand.randrange(1, 256))
            return
        length = self.rand.choice([512, 4096, BLOCK, BLOCK + 512, 300 * 1024])
        if kind == "discard":
            length = -(-length // BLOCK) * BLOCK
        place = self.rand.randrange((size - length) // 512 + 1) * 512
        if self.rand.random() < 0.2:
            place = (size - length) // 512 * 512  # the end of the disk
        pattern = 0 if kind in ("zero", "discard", "nothing") else self.rand.randrange(1, 256)
        self._put(target, place, length, pattern, how=kind)

    def _put(self, target: str, place: int, length: int, pattern: int, how: str = "data") -> None:
        command = f"write -P {pattern} {place} {length}"
        if how == "zero":
            flag = self.rand.choice(["", "-u "])
            command = f"write -z {flag}{place} {length}"
        if how == "discard":
            command = f"discard {place} {length}"
        if self.machine.active:
            said = self.machine.hmp(f'qemu-io -d {self._device(target)} "{command}"')
            assert "rror" not in said and "ailed" not in said, said
        else:
            image = self._image(target)
            form = "raw" if target == "vdc" else "qcow2"
            subprocess.run(
                ["qemu-io", "-f", form, "-c", command, image],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        if how == "discard":
            # What it leaves of the range is the format's business.
            self.disks[target] = self._read(target)
            return
        data = bytearray(self.disks[target])
        data[place : place + length] = bytes([pattern]) * length
        self.disks[target] = bytes(data)

    def _device(self, target: str) -> str:
        if target == PLUGGED:
            return "/machine/peripheral/ua-plugged"
        return self.machine.device(target)

    def _image(self, target: str) -> Path:
        return self.plug if target == PLUGGED else self.machine.images[target]

    def _read(self, target: str) -> bytes:
        if self.machine.active:
            self.machine.hmp(f'qemu-io -d {self._device(target)} "flush"')
        raw = self.folder / "read.raw"
        form = "raw" if target == "vdc" else "qcow2"
        command = ["qemu-img", "convert", "-U", "-f", form, "-O", "raw", self._image(target), raw]
        subprocess.run(command, check=True)
        data = raw.read_bytes()
        raw.unlink()
        return data

    def backup(self) -> None:
        """A point, of all disks or some, with any engine that works."""
        self.number += 1
        name = f"p{self.number}"
        options: dict[str, object] = {"compress": self.rand.random() < 0.3}
        targets = list(self.disks)
        if self.rand.random() < 0.15:
            targets = self.rand.sample(targets, k=2)
            options["disks"] = tuple(targets)
        if self.rand.random() < 0.05:
            options["full"] = True
        if not self.machine.active:
            self.backups.engine = "auto"
        else:
            self.backups.engine = self.rand.choice(["auto", "libvirt", "monitor"])
        held = {target: self.disks[target] for target in targets}
        made = self.backups.take(name, held=held, **options)
        assert {disk.name for disk in made.disks} == set(targets)
        self.points.append(made)
        if self.rand.random() < 0.3:
            self.backups.check(made)
        self.backups.engine = "auto"

    def create(self) -> None:
        self.number += 1
        with self.backups.domain() as domain:
            domain.create(f"c{self.number}")

    def delete(self) -> None:
        with self.backups.domain() as domain:
            names = [view.name for view in domain.checkpoints().checkpoints]
            if names:
                domain.delete(self.rand.choice(names))

    def archive(self) -> None:
        with self.backups.domain() as domain:
            domain.archive(keep=self.rand.randrange(1, 4))

    def stop_or_start(self) -> None:
        if not self.machine.active:
            self.machine.start(paused=False)
        elif self.rand.random() < 0.5:
            self._unplug()
            self.machine.stop()
        else:
            self._unplug()
            self.machine.stop()
            self.machine.start(paused=False)

    def crash(self) -> None:
        if self.machine.active:
            self.machine.kill()
            self.disks.pop(PLUGGED, None)
            self.machine.start(paused=False)
            self.disks = {target: self._read(target) for target in self.disks}

    def plug_or_unplug(self) -> None:
        if not self.machine.active:
            return
        if PLUGGED in self.disks:
            self._unplug()
            return
        self.machine.domain.attachDeviceFlags(self._plugged(), libvirt.VIR_DOMAIN_AFFECT_LIVE)
        self.disks[PLUGGED] = self._read(PLUGGED)

    def _plugged(self) -> str:
        return (
            f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>"
            f"<source file='{self.plug}'/><target dev='{PLUGGED}' bus='scsi'/>"
            "<alias name='ua-plugged'/></disk>"
        )

    def _unplug(self) -> None:
        if PLUGGED in self.disks:
            self.machine.hmp(f'qemu-io -d {self._device(PLUGGED)} "flush"')
            self.machine.domain.detachDeviceFlags(self._plugged(), libvirt.VIR_DOMAIN_AFFECT_LIVE)
            # libvirt waits for QEMU for five seconds only
            deadline = time.monotonic() + patiently(60)
            while "ua-plugged" in self.machine.domain.XMLDesc():
                assert time.monotonic() < deadline, "the disk is not unplugged"
                time.sleep(0.02)
            del self.disks[PLUGGED]

    def snapshot(self) -> None:
        if self.rewinds:
            self._unplug()
            self.number += 1
            name = f"s{self.number}"
            with self.backups.domain() as domain:
                domain.create_snapshot(name)
            self.snapshots[name] = dict(self.disks)

    def revert(self) -> None:
        if self.snapshots:
            self._unplug()
            name = self.rand.choice(list(self.snapshots))
            with self.backups.domain() as domain:
                domain.revert_snapshot(name)
            self.disks = dict(self.snapshots[name])

    # --- the end --------------------------------------------------------------------------------

    def run(self, steps: int) -> None:
        """A random history that ends with a point."""
        happenings: list[tuple[Callable[[], None], int]] = [
            (self.write, 8),
            (self.backup, 8),
            (self.create, 2),
            (self.delete, 2),
            (self.archive, 1),
            (self.stop_or_start, 2),
            (self.crash, 1),
            (self.plug_or_unplug, 1),
            (self.snapshot, 1),
            (self.revert, 2),
        ]
        choices, weights = zip(*happenings, strict=True)
        for _ in range(steps):
            (happening,) = self.rand.choices(choices, weights)
            self.done.append(happening.__name__)
            happening()
        self.write()
        self.backup()
        self.backups.check(*self.points)
        listing = ckptmgr.repository(self.backups.repository).points()
        assert {point.name for point in listing.points} == {each.name for each in self.points}
        assert not listing.damaged
        assert not any(point.broken for point in listing.points)


@pytest.mark.thorough
def test_every_point_of_a_random_history_holds_what_was_there(
    seed: int, make_vm: MakeMachine, embedded: Embedded, tmp_path: Path
) -> None:
    machine = make_vm(
        odd_disks(embedded.workspace.folder("o"), snapshots=seed % 2 == 0),
        state="running",
        devices="<controller type='scsi' index='0' model='virtio-scsi'/>",
    )
    history = History(machine, tmp_path, seed, rewinds=seed % 2 == 0)
    try:
        history.run(STEPS)
    except BaseException as error:
        error.add_note(f"seed {seed}, after: {', '.join(history.done)}")
        raise


@pytest.mark.thorough
def test_more_extents_than_a_reply_has_room_for(make_vm: MakeMachine, tmp_path: Path) -> None:
    """Every other granule: QEMU puts 131,072 extents in a reply at most."""
    count = 150_000
    size = count * 8192
    machine = make_vm([DiskSpec("vda", size=size, cluster_size=4096)], state="stopped")
    backups = Backups(machine, tmp_path)
    first = backups.take("first", held={"vda": b"-"})
    written = tmp_path / "written.raw"
    with written.open("wb") as file:
        file.truncate(size)
        for number in range(count):
            os.pwrite(file.fileno(), b"\7" * 512, number * 8192)
    # data alone is copied: a write each, and none of what is between
    convert = ["qemu-img", "convert", "-n", "--target-is-zero", "-t", "unsafe", "-S", "4k"]
    image = machine.images["vda"]
    subprocess.run([*convert, "-f", "raw", "-O", "qcow2", written, image], check=True)
    written.unlink()
    machine.start(paused=False)
    assert machine.bitmaps("vda")["first"]["count"] == count * 4096
    second = backups.take("second", held={"vda": b"-"})
    assert second.disks[0].reason is None
    (disk,) = second.disks
    assert disk.mode == "incremental"
    assert first.disks[0].bytes < BLOCK * 8
    expected = (b"\7" * 512 + bytes(8192 - 512)) * 256
    seen = nbd.NBD()
    point = str(backups.image(second, "vda"))
    seen.connect_systemd_socket_activation(["qemu-nbd", "-r", "-f", "qcow2", point])
    for offset in range(0, size, len(expected)):
        length = min(len(expected), size - offset)
        assert seen.pread(length, offset) == expected[:length], offset
    seen.shutdown()
