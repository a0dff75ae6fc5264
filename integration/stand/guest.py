"""A real Linux guest that writes its disks when told to.

Debian's cloud kernel and a static busybox, in an initramfs of a megabyte; it boots in a few
seconds without KVM.  Its init reads commands from the second serial port, one a line, each with
a number that the answer repeats:

    7 write vda 65536 4096 245        ->  7 ok
    8 churn vda 65536 512             ->  8 ok, then "at <n>" after each write, until "stop"

It says "ready" when it begins to.  On KVM that QEMU emulates a guest hangs now and then while it
boots; there it is started again (``come_up``), and the run says so (``starts``).

Run as a program, it fetches the kernel, so that tests need no network.
"""

from __future__ import annotations

import contextlib
import gzip
import lzma
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import libvirt
import libvirt_qemu

from . import starts
from .accel import processor_is_emulated
from .images import DiskSpec
from .libvirts import Stand
from .machine import Machine
from .patience import factor, measured, patiently

MEMORY = 128
"""MiB; less is not enough for the kernel to unpack its initramfs."""

BOOT = 60
"""Seconds that a boot may take on an ordinary machine."""

HANGS = 5
"""The same where one that hangs is started again: about five times what it takes."""

SLOWEST = 40
"""The factor up to which a slow machine is waited for there."""

STARTS = 3
"""How often a guest is started there before it is given up."""

ANSWERS = ("ok", "failed")

# In the order in which they need each other.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
)

# A write to a disk that is not there would make a plain file in /dev and succeed: hence the -b.
INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in {modules}; do
    insmod /modules/$module.ko
done
# the child of a shell that reads a line may not end meanwhile: SIGCHLD would cut the line; so
# the reader is not process 1, to which the background writer falls
sh /commands </dev/ttyS1 >/dev/ttyS1 2>/dev/console
"""

COMMANDS = """\
stty raw -echo
echo ready

put() {
    [ -b /dev/$1 ] || return 1
    head -c $3 /dev/zero | tr '\\000' "\\\\$4" |
        dd of=/dev/$1 bs=4096 iflag=fullblock seek=$2 \
            oflag=seek_bytes conv=notrunc,fsync status=none
}

churn() {
    n=0
    while [ ! -e /stop ] && [ $n -lt $3 ]; do
        for disk in $(echo $1 | tr , ' '); do
            put $disk $((n * $2)) 4096 $(printf %o $((n % 255 + 1))) || break 2
        done
        echo at $n
        n=$((n + 1))
    done
    echo at end
}

while read -r number command rest; do
    set -- $rest
    case $command in
        ping) true ;;
        write) put "$@" ;;
        churn) rm -f /stop; (churn "$@" &) ;;
        stop) touch /stop ;;
        *) false ;;
    esac && echo $number ok || echo $number failed
done
"""


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ckptmgr"


def _installed() -> str | None:
    """Release of a cloud kernel of this machine, such as ``6.1.0-41-cloud-amd64``."""
    images = Path("/boot").glob("vmlinuz-*-cloud-amd64")
    releases = [image.name.removeprefix("vmlinuz-") for image in images]
    return next((each for each in releases if Path("/lib/modules", each).is_dir()), None)


def _fetch(root: Path) -> str:
    """Unpack Debian's newest cloud kernel in `root`; returns its release."""
    depends = subprocess.run(
        ["apt-cache", "depends", "linux-image-cloud-amd64"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    package = next(word for word in depends.split()[1:] if word.startswith("linux-image-"))
    root.mkdir()
    download = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package]
    subprocess.run(download, check=True, cwd=root, stdin=subprocess.DEVNULL)
    (archive,) = root.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, root], check=True)
    (image,) = root.glob("boot/vmlinuz-*")
    return image.name.removeprefix("vmlinuz-")


def kernel() -> Path:
    """The folder with ``vmlinuz`` and ``<module>.ko``, made at the first call.

    They come from this machine's own kernel if it has Debian's for clouds, else from Debian.
    """
    found = _cache() / "guest-kernel"
    if found.is_dir():
        return found
    found.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=found.parent, prefix="fetch-") as name:
        folder = Path(name)
        release = _installed()
        root = Path("/")
        if release is None:
            root = folder / "root"
            release = _fetch(root)
        ready = folder / "ready"
        ready.mkdir()
        shutil.copy(root / f"boot/vmlinuz-{release}", ready / "vmlinuz")
        for module in MODULES:
            (file,) = (root / "lib/modules" / release).rglob(f"{module}.ko*")
            data = file.read_bytes()
            if file.suffix == ".xz":
                data = lzma.decompress(data)
            (ready / f"{module}.ko").write_bytes(data)
        try:
            ready.rename(found)
        except OSError:
            # another process was first
            if not found.is_dir():
                raise
    return found


def _entry(number: int, name: str, mode: int, data: bytes) -> bytes:
    """A file of a cpio archive in the "newc" format."""
    numbers = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % each for each in numbers) + name.encode() + b"\0"
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)


def initramfs(kernel_folder: Path) -> bytes:
    """The guest's file system: busybox, the modules and the init."""
    directory, executable = 0o040755, 0o100755
    busybox = shutil.which("busybox")
    if busybox is None:
        raise FileNotFoundError("busybox is not installed (Debian: busybox-static)")
    files = [(name, directory, b"") for name in ("bin", "dev", "proc", "sys", "modules")]
    files.append(("bin/busybox", executable, Path(busybox).read_bytes()))
    files.append(("init", executable, INIT.format(modules=" ".join(MODULES)).encode()))
    files.append(("commands", 0o100644, COMMANDS.encode()))
    for module in MODULES:
        data = (kernel_folder / f"{module}.ko").read_bytes()
        files.append((f"modules/{module}.ko", executable, data))
    archive = b"".join(_entry(number, *file) for number, file in enumerate(files, start=1))
    return gzip.compress(archive + _entry(0, "TRAILER!!!", 0, b""), compresslevel=1)


@dataclass(frozen=True)
class Boot:
    """The files of a guest, in a folder of its own."""

    folder: Path

    @classmethod
    def prepare(cls, folder: Path) -> Boot:
        """Put kernel and initramfs into `folder`."""
        linux = kernel()
        (folder / "initramfs").write_bytes(initramfs(linux))
        shutil.copy(linux / "vmlinuz", folder / "vmlinuz")
        return cls(folder)

    @property
    def os_elements(self) -> str:
        """What goes into the domain's <os>."""
        return (
            f"<kernel>{self.folder}/vmlinuz</kernel><initrd>{self.folder}/initramfs</initrd>"
            "<cmdline>console=ttyS0 quiet panic=-1</cmdline>"
        )

    @property
    def devices(self) -> str:
        """What goes into the domain's <devices>: a console, and the port for commands."""
        return (
            f"<serial type='file'><source path='{self.folder}/console'/></serial>"
            f"<serial type='unix'><source mode='bind' path='{self.folder}/port'/></serial>"
        )

    def console(self) -> str:
        """The last that the kernel and the tools said."""
        return (self.folder / "console").read_text(errors="replace")[-2000:]


class Shell:
    """The command line of a guest that was started with the files of a ``Boot``.

    churned -- numbers of the writes that ``churn`` has finished so far
    """

    def __init__(
        self,
        boot: Boot,
        *,
        port: str = "port",
        churning: bool = False,
        seconds: float | None = None,
    ) -> None:
        """Wait until the guest takes commands.

        port -- where in the folder of `boot` it does
        churning -- it was told to ``churn`` by another command line
        seconds -- how long to wait, of this machine; by default as long as any boot may take
        Raises TimeoutError.
        """
        self.boot = boot
        self.churned: list[int] = []
        self._answers: dict[int, str] = {}
        self._changed = threading.Condition()
        self._churn_over = not churning
        self._number = 0
        self._port = socket.socket(socket.AF_UNIX)
        try:
            self._port.connect(f"{boot.folder}/{port}")
            threading.Thread(target=self._listen, daemon=True, name="guest").start()
            self._wait_for_boot(patiently(BOOT) if seconds is None else seconds)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Hang up; the port is free for another then."""
        # the thread that listens has it as well: closing alone would leave it open
        with contextlib.suppress(OSError):
            self._port.shutdown(socket.SHUT_RDWR)
        self._port.close()

    def _wait_for_boot(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        # One that runs already has said that it is ready to somebody else, and is asked.  Seldom:
        # until its init listens all that is sent waits for it, and where the machine is emulated
        # a character at the port costs a hundredth of a second.
        pause = 0.25
        while time.monotonic() < deadline:
            self._port.sendall(b"\n0 ping\n")
            with self._changed:
                if self._changed.wait_for(lambda: 0 in self._answers, timeout=pause):
                    return
            pause = min(2 * pause, 10, max(0.25, deadline - time.monotonic()))
        raise TimeoutError(f"the guest has not booted in {seconds:.0f} s: {self.boot.console()}")

    def _listen(self) -> None:
        try:
            with self._port.makefile(encoding="ascii", errors="replace") as lines:
                for line in lines:
                    self._heard(line.split())
        except (OSError, ValueError):
            # the guest has ended, or we have
            return

    def _heard(self, words: list[str]) -> None:
        with self._changed:
            match words:
                case ["at", "end"]:
                    self._churn_over = True
                case ["at", number] if number.isdigit():
                    self.churned.append(int(number))
                case ["ready"]:
                    self._answers[0] = "ok"
                # what was sent before it listened comes back as an echo
                case [number, answer] if number.isdigit() and answer in ANSWERS:
                    self._answers[int(number)] = answer
            self._changed.notify_all()

    def _command(self, text: str, seconds: float = 60) -> None:
        self._number += 1
        number = self._number
        self._port.sendall(f"{number} {text}\n".encode())
        with self._changed:
            if not self._changed.wait_for(lambda: number in self._answers, patiently(seconds)):
                raise TimeoutError(f"the guest does not answer: {text}")
            answer = self._answers.pop(number)
        if answer != "ok":
            raise RuntimeError(f"the guest failed: {text}: {self.boot.console()}")

    def hear(self) -> None:
        """Wait until all is heard that the guest has said so far."""
        self._command("ping")

    def write(self, target: str, offset: int, length: int, pattern: int = 0xA5) -> None:
        """Let the guest write and fsync `length` bytes of `pattern` (not 0) at `offset`."""
        self._command(f"write {target} {offset} {length} {pattern:o}")

    def churn(self, target: str, step: int, count: int) -> None:
        """Let the guest write 4 KiB at 0, `step`, 2 `step`, ..., each with fsync, meanwhile.

        target -- of several disks, ``vda,vdb``, each gets a write before the first has the next
        The write number n is in ``churned`` once it is on the disk.
        """
        self.churned.clear()
        self._churn_over = False
        self._command(f"churn {target} {step} {count}")

    def stop_churn(self, seconds: float = 60) -> None:
        """End the writing and wait until the last write is done."""
        self._command("stop")
        with self._changed:
            if not self._changed.wait_for(lambda: self._churn_over, patiently(seconds)):
                raise TimeoutError("the guest does not stop writing")

    def wait_churned(self, number: int, seconds: float = 60) -> None:
        """Wait until write `number` is on the disk."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: bool(self.churned) and self.churned[-1] >= number, patiently(seconds)
            )
        if not done:
            raise TimeoutError(f"the guest has not got to write {number}")


def observed(domain: libvirt.virDomain) -> str:
    """What a guest that does not answer is doing: QEMU's word, and two looks at its processor."""
    printed: list[str] = []

    def look() -> None:
        flags = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
        for line in ("info status", "info kvm", "info registers", "info lapic", "info registers"):
            try:
                said = libvirt_qemu.qemuMonitorCommand(domain, line, flags)
            except libvirt.libvirtError as reason:
                said = str(reason)
            # of the registers, those up to the flags
            kept = [text.strip() for text in said.splitlines() if text.strip()]
            ends = (n for n, text in enumerate(kept, 1) if text.startswith(("RIP=", "EIP=")))
            printed.append("\n".join(kept[: next(ends, None)]))

    # a monitor can hang with its guest
    looking = threading.Thread(target=look, daemon=True, name="observed")
    looking.start()
    looking.join(max(30, patiently(2)))
    return "\n".join(printed) or "its monitor does not answer"


def may_hang(domain: libvirt.virDomain) -> bool:
    """Whether the domain is on KVM and that on SVM in software."""
    return processor_is_emulated() and domain.XMLDesc().startswith("<domain type='kvm'")


def come_up(
    boot: Boot, domain: libvirt.virDomain, again: Callable[[], None], *, name: str
) -> Shell:
    """Wait until a guest that was just started takes commands.

    again -- ends it and starts it anew, where one may hang: on KVM that is emulated
    Raises TimeoutError, with what the guest was seen doing.
    """
    hangs = may_hang(domain)
    last = STARTS if hangs else 1
    number = 1
    while True:
        # what others do on this machine changes: it counts how slow it is now
        seconds = HANGS * max(factor(), min(measured(), SLOWEST)) if hangs else patiently(BOOT)
        begun = time.monotonic()
        try:
            shell = Shell(boot, seconds=seconds)
        except TimeoutError as reason:
            seen = observed(domain)
            starts.note(starts.Start(name, time.monotonic() - begun, seen))
            if number == last:
                raise TimeoutError(f"{reason}\nstart {number} of {last}; seen:\n{seen}") from None
        else:
            starts.note(starts.Start(name, time.monotonic() - begun))
            return shell
        print(f"{name} hangs; starting it again.  It was seen:\n{seen}", file=sys.stderr)
        again()
        number += 1


class Guest:
    """A machine of a stand with Linux in it: ``machine`` from outside, ``shell`` from inside."""

    def __init__(
        self,
        stand: Stand,
        disks: Sequence[DiskSpec] = (DiskSpec(),),
        *,
        name: str | None = None,
    ) -> None:
        """Boot the guest and wait until it takes commands."""
        boot = Boot.prepare(stand.workspace.folder("g"))
        self.machine = Machine(
            stand,
            disks,
            name=name,
            state="running",
            memory=MEMORY,
            os_elements=boot.os_elements,
            devices=boot.devices,
        )
        try:
            machine = self.machine
            self.shell = come_up(boot, machine.domain, self._again, name=machine.name)
        except BaseException:
            self.machine.destroy()
            raise

    def _again(self) -> None:
        self.machine.domain.destroy()
        self.machine.start(paused=False)

    def reconnect(self, *, port: str = "port", churning: bool = False) -> None:
        """Take up its command line again after its QEMU was replaced, as by a revert.

        port, churning -- see ``Shell``
        """
        self.machine.stand.workspace.record(self.machine.pid)
        self.shell.close()
        self.shell = Shell(self.shell.boot, port=port, churning=churning)

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.shell.close()
        self.machine.destroy()


if __name__ == "__main__":
    sys.stdout.write(f"{kernel()}\n")
