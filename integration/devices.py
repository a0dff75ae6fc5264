"""Block devices of the kernel's, for as long as a test needs them."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def loop_device(file: Path, size: int | None = None) -> Iterator[Path]:
    """A loop device on `file`, which is made with so many bytes if they are given."""
    if size is not None:
        with file.open("xb") as new:
            new.truncate(size)
    command = ["losetup", "--find", "--show", str(file)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextlib.contextmanager
def other_node(device: Path, folder: Path) -> Iterator[Path]:
    """Another node of a block device, as libvirt makes one in each QEMU's own ``/dev``."""
    there = folder / "dev"
    there.mkdir(parents=True)
    # A file system of its own, as that of the folder may have been mounted without devices.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "dev,mode=700", "tmpfs", there], check=True)
    try:
        node = there / device.name
        os.mknod(node, 0o600 | stat.S_IFBLK, device.stat().st_rdev)
        yield node
    finally:
        subprocess.run(["umount", "--lazy", there], check=True)
