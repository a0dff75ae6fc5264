"""Other ways to copy the disk of a running domain, or to get it back from a copy."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import libvirt

from integration.stand import Machine

from .cost import Cost, Meter

MISSING = (
    "virtnbdbackup is not installed, so it is left out: apt-get install virtnbdbackup "
    "(Debian 12 has it)"
)

_PULL = """\
<domainbackup mode='pull'>
  <server transport='unix' socket='{socket}'/>
  <disks><disk name='vda' backup='yes' type='file' exportname='vda'>
    <driver type='qcow2'/><scratch file='{folder}/rival.scratch'/>
  </disk></disks>
</domainbackup>"""

_PUSH = """\
<domainbackup mode='push'>{since}
  <disks><disk name='vda' backup='yes' type='file'>
    <driver type='qcow2'/><target file='{target}'/>
  </disk></disks>
</domainbackup>"""

_FLUSH = ("-t", "writeback")
"""qemu-img's own default leaves the image in the page cache."""


def has_virtnbdbackup() -> bool:
    """Whether Debian's package is there."""
    return shutil.which("virtnbdbackup") is not None


@contextmanager
def pulled(machine: Machine) -> Iterator[str]:
    """libvirt's pull backup job; gives the URI of the NBD export of vda."""
    socket = machine.folder / "rival.sock"
    machine.domain.backupBegin(_PULL.format(socket=socket, folder=machine.folder), None, 0)
    try:
        yield f"nbd+unix:///vda?socket={socket}"
    finally:
        machine.domain.abortJob()
        _until_over(machine.domain)


def nbdcopy(machine: Machine, target: Path) -> Cost:
    """A raw copy."""
    with Meter(machine.pid) as meter, pulled(machine) as export:
        meter.run("nbdcopy", "--flush", export, target / "vda.raw")
    return meter.cost


def convert(machine: Machine, target: Path, *options: str) -> Cost:
    """A qcow2 copy by qemu-img."""
    with Meter(machine.pid) as meter, pulled(machine) as export:
        command = ["qemu-img", "convert", *_FLUSH, *options, "-f", "raw", "-O", "qcow2"]
        meter.run(*command, export, target / "vda.qcow2")
    return meter.cost


def compress(machine: Machine, target: Path) -> Cost:
    """The same, compressed."""
    return convert(machine, target, "-c", "-o", "compression_type=zstd")


def push(machine: Machine, target: Path, since: str | None = None) -> Cost:
    """libvirt's push backup job: a qcow2 image, of all or of what changed since a checkpoint."""
    image = target / "vda.qcow2"
    wanted = "" if since is None else f"<incremental>{since}</incremental>"
    with Meter(machine.pid) as meter:
        machine.domain.backupBegin(_PUSH.format(target=image, since=wanted), None, 0)
        _until_over(machine.domain)
        meter.run("sync", image)
    done = machine.domain.jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED)
    if not done.get("success", 1):
        raise RuntimeError(f"the push backup of {machine.name} failed")
    return meter.cost


def virtnbdbackup(machine: Machine, target: Path, level: str, *options: str) -> Cost:
    """A copy by Debian's virtnbdbackup; level: copy, full, inc."""
    environment = {**machine.stand.environment(), **_logs_in(machine.folder)}
    with Meter(machine.pid, environment=environment) as meter:
        command = ["virtnbdbackup", "-U", machine.uri, "-d", machine.name, "-l", level]
        places = ["-S", str(machine.folder), "-f", str(machine.folder / "virtnbd.sock")]
        meter.run(*command, "-n", *options, *places, "-o", target)
    return meter.cost


def copy_file(machine: Machine, target: Path) -> Cost:
    """`cp` of the image, as if the domain were off."""
    with Meter() as meter:
        meter.run("cp", machine.images["vda"], target / "vda.qcow2")
        meter.run("sync", target / "vda.qcow2")
    return meter.cost


# --- and back ---------------------------------------------------------------------------------


def convert_image(image: Path, target: Path) -> Cost:
    """A chain of images made one by qemu-img."""
    with Meter() as meter:
        command = ["qemu-img", "convert", *_FLUSH, "-f", "qcow2", "-O", "qcow2"]
        meter.run(*command, image, target / "vda.qcow2")
    return meter.cost


def nbdcopy_image(image: Path, target: Path) -> Cost:
    """A chain of images made one raw file by nbdcopy."""
    with Meter() as meter:
        served = ("[", "qemu-nbd", "-r", "-f", "qcow2", str(image), "]")
        meter.run("nbdcopy", "--flush", "--", *served, target / "vda.raw")
    return meter.cost


def virtnbdrestore(copies: Path, target: Path) -> Cost:
    """What virtnbdbackup copied, got back by its own tool."""
    with Meter(environment=_logs_in(target)) as meter:
        places = ("-i", copies, "-o", target, "-L", target / "log", "-f", target / "sock")
        meter.run("virtnbdrestore", "-n", *places)
    return meter.cost


def _logs_in(folder: Path) -> dict[str, str]:
    """Where virtnbdbackup is to leave what its qemu-nbd and qemu-img say."""
    return {"TMPDIR": str(folder)}


def _until_over(domain: libvirt.virDomain) -> None:
    while True:
        try:
            domain.backupGetXMLDesc(0)
        except libvirt.libvirtError:
            return
        time.sleep(0.002)
