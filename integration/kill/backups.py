"""Backups that are killed, and what must be true of their repository afterwards."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import ckptmgr
from ckptmgr.views import DomainView
from integration.stand import Daemon

from .scene import Scene, Shape
from .warm import Task, Warm

POINTS_MAX = 12
"""Restore points of a repository before a new one is begun."""


class BackupScene(Scene):
    """A `Scene` with a repository, which knows every byte of the disks and of the points."""

    def __init__(self, daemon: Daemon, warm: Warm, shape: Shape) -> None:
        self._disks = {disk.target: bytearray(disk.size) for disk in shape.disks}
        self._held: dict[str, dict[str, bytes]] = {}
        self._read: set[str] = set()
        super().__init__(daemon, warm, shape)
        self.begin()

    @property
    def view(self) -> DomainView:
        """Name and UUID of the domain."""
        return self.domain.view

    @property
    def lineage(self) -> Path:
        """The folder with the points."""
        return self.repository / self.view.uuid

    # --- doing --------------------------------------------------------------------------------

    def _write(self, target: str, offset: int, length: int) -> None:
        pattern = self.writes % 255 + 1
        super()._write(target, offset, length)
        self._disks[target][offset : offset + length] = bytes([pattern]) * length

    def look_at_disks(self) -> None:
        """What QEMU had not written when it was killed is gone."""
        for target in self._disks:
            self._disks[target] = bytearray(self.machine.contents(target))

    def backup(self) -> str:
        """Make a restore point in this process, after some writes; returns its name."""
        self.write()
        name = self.name()
        self.expect(name)
        self.domain.backup(self.repository, name)
        self.made(name)
        return name

    def expect(self, name: str) -> None:
        """A restore point of that name would hold what the disks hold now."""
        self._held[name] = {target: bytes(data) for target, data in self._disks.items()}

    def begin(self) -> None:
        """No checkpoint, and a repository that is not there yet."""
        self.fresh()
        self._held.clear()
        self._read.clear()
        self.repository = self.daemon.workspace.folder("r") / "repository"

    def prepare(self) -> Task:
        """The task of a backup that is to be killed."""
        self.write()
        name = self.name()
        self.expect(name)
        self.made(name)
        return self.task("backup", repository=str(self.repository), name=name)

    # --- seeing -------------------------------------------------------------------------------

    def points(self) -> list[str]:
        """The names of the points in the folder, by what is there alone."""
        if not self.lineage.is_dir():
            return []
        return sorted(path.name for path in self.lineage.iterdir() if path.is_dir())

    def require_whole(self, name: str) -> None:
        """Everything in the repository is a whole point or the lock; the newest is `name`."""
        assert {path.name for path in self.lineage.iterdir()} == {*self.points(), "lock"}
        listing = ckptmgr.repository(self.repository).points()
        assert sorted(point.name for point in listing.points) == self.points()
        assert not listing.damaged, listing.damaged
        for point in self.points():
            there = {path.name for path in (self.lineage / point).iterdir()}
            document = json.loads((self.lineage / point / "manifest.json").read_text())
            files = {each["file"] for each in (*document["files"], *document["disks"])}
            digests = {each["digests"] for each in document["disks"]}
            assert there == {"manifest.json", *files, *digests}, point
        assert name in self.points()

    def require_bytes(self, *, again: bool = False) -> None:
        """Each point that was not read yet, or every one, holds what the disks held."""
        for point in self.points():
            if point in self._read and not again:
                continue
            for target, held in self._held[point].items():
                image = self.lineage / point / f"{target}.qcow2"
                wanted = held + bytes(-len(held) % 512)
                assert _disk_in(image) == wanted, f"{target} of point {point}"
            self._read.add(point)

    def require_sound(self) -> None:
        """`verify` finds nothing."""
        assert ckptmgr.repository(self.repository).verify().findings == ()

    def reasons(self, name: str) -> list[str]:
        """Why disks of a point were read whole, those aside that never have a bitmap for good."""
        document = json.loads((self.lineage / name / "manifest.json").read_text())
        return [disk["reason"] for disk in document["disks"] if disk["reason"] is not None]


def _disk_in(image: Path) -> bytes:
    subprocess.run(["qemu-img", "check", "-q", image], check=True)
    raw = image.parent.parent.parent / "seen.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    data = raw.read_bytes()
    raw.unlink()
    return data
