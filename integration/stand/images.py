"""Images of the machines' disks, and what a write to one should mark dirty."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True)
class DiskSpec:
    """A disk that a machine is to have.

    target -- its prefix gives the bus, unless `bus` is given: vd virtio, sd scsi, hd ide
    format -- qcow2 or raw; `compat` 0.10 makes a qcow2 that cannot hold bitmaps
    backing -- formats of the layers underneath, nearest first: ``("qcow2", "raw")``
    device -- disk or cdrom; `empty`: a drive without a medium
    image -- use this image, made by the test, and make none
    volume -- name it by pool and volume
    source_elements -- XML to go into <source>
    """

    target: str = "vda"
    format: str = "qcow2"
    size: int = 64 * MIB
    backing: tuple[str, ...] = ()
    bus: str | None = None
    device: str = "disk"
    compat: str = "1.1"
    cluster_size: int | None = None
    read_only: bool = False
    shareable: bool = False
    transient: bool = False
    empty: bool = False
    image: Path | None = None
    volume: tuple[str, str] | None = None
    source_elements: str = ""

    @property
    def on_bus(self) -> str:
        """The disk's bus."""
        return self.bus or {"vd": "virtio", "sd": "scsi", "hd": "ide"}[self.target[:2]]

    def make(self, folder: Path) -> Path | None:
        """Make the image and its backing chain in `folder`; None for an empty drive."""
        if self.empty:
            return None
        if self.image is not None:
            return self.image
        below: tuple[Path, str] | None = None
        for depth in range(len(self.backing), 0, -1):
            layer = folder / f"{self.target}-base{depth}.{self.backing[depth - 1]}"
            self._create(layer, self.backing[depth - 1], below)
            below = (layer, self.backing[depth - 1])
        top = folder / f"{self.target}.{self.format}"
        self._create(top, self.format, below)
        return top

    def _create(self, path: Path, format: str, below: tuple[Path, str] | None) -> None:
        options = []
        if format == "qcow2":
            options.append(f"compat={self.compat}")
            if self.cluster_size is not None:
                options.append(f"cluster_size={self.cluster_size}")
        if below is not None:
            options += [f"backing_file={below[0]}", f"backing_fmt={below[1]}"]
        chosen = ["-o", ",".join(options)] if options else []
        command = ["qemu-img", "create", "-q", "-f", format, *chosen, str(path), str(self.size)]
        subprocess.run(command, check=True)


def info(image: Path) -> dict[str, Any]:
    """What ``qemu-img info`` says about an image, whoever has it open."""
    command = ["qemu-img", "info", "--output=json", "-U", str(image)]
    done = subprocess.run(command, check=True, capture_output=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def await_greeting(path: Path, server: subprocess.Popen[Any]) -> None:
    """Wait until a persistent qemu-nbd has its image open.

    It makes its socket before that, and greets after it.  Then it takes signals, too: a SIGTERM
    that comes while it starts is lost (QEMU 7.2).
    """
    while True:
        assert server.poll() is None
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.01)  # not made yet, or left by another
            else:
                assert client.recv(8) == b"NBDMAGIC"
                return


def rounded(
    ranges: Iterable[tuple[int, int]], granularity: int = 65536, size: int = 64 * MIB
) -> list[tuple[int, int]]:
    """The (start, length) extents that writes of `ranges` mark: whole granules, merged, clipped."""
    granules: set[int] = set()
    for start, length in ranges:
        granules.update(range(start // granularity, -(-(start + length) // granularity)))
    extents: list[tuple[int, int]] = []
    for granule in sorted(granules):
        start = granule * granularity
        length = min(granularity, size - start)
        if extents and sum(extents[-1]) == start:
            extents[-1] = (extents[-1][0], extents[-1][1] + length)
        else:
            extents.append((start, length))
    return extents
