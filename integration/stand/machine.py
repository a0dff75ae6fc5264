"""A domain without a guest: its disks are written through the devices' own block backends."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import libvirt
import libvirt_qemu
from lxml import etree

from .accel import domain_type
from .images import DiskSpec, info
from .killing import kill
from .libvirts import Stand, StandError
from .patience import patiently

_numbers = itertools.count(1)

_UNDEFINE = (
    libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
)


# Without a TSC deadline Linux measures its timer against another clock while it boots.  If that is
# held up between two readings, as on a busy or emulated host, the timer is wrong by any factor from
# then on, and the guest may sleep for minutes where it wanted milliseconds.  KVM emulates deadlines
# on every processor.
_CPU_ON_KVM = (
    "<cpu mode='custom' match='exact' check='none'><model fallback='forbid'>qemu64</model>"
    "<feature policy='require' name='tsc-deadline'/></cpu>"
)


# At each start libvirt asks QEMU for every property of its processor, one by one: 400 questions, of
# which QEMU reads each letter by a system call of its own.  That is four fifths of what a start
# costs.  Without this capability it asks for all of them at once, as it did of QEMU before 4.2.
CAPABILITIES = "<qemu:del capability='cpu-unavailable-features'/>"


def domain_xml(
    name: str,
    disks: Sequence[DiskSpec],
    images: Mapping[str, Path],
    *,
    memory: int = 64,
    machine: str = "pc",
    os_elements: str = "",
    devices: str = "",
    elements: str = "",
    capabilities: str = "",
    commandline: Sequence[str] = (),
    accelerator: str | None = None,
) -> str:
    """The XML of a small domain; the arguments are those of ``Machine``.

    accelerator -- kvm or qemu, where that is not to be found out by a trial
    """
    accelerator = accelerator or domain_type()
    if accelerator == "kvm":
        elements += _CPU_ON_KVM
    if capabilities:
        elements += f"<qemu:capabilities>{capabilities}</qemu:capabilities>"
    scsi = any(disk.on_bus == "scsi" for disk in disks)
    controller = "<controller type='scsi' index='0' model='virtio-scsi'/>" if scsi else ""
    if commandline:
        arguments = "".join(f"<qemu:arg value={quoteattr(each)}/>" for each in commandline)
        elements += f"<qemu:commandline>{arguments}</qemu:commandline>"
    return f"""\
<domain type='{accelerator}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{escape(name)}</name>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='{machine}'>hvm</type>{os_elements}</os>
  <features><acpi/></features>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    {"".join(_disk_xml(disk, images.get(disk.target)) for disk in disks)}
    {controller}
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    {devices}
  </devices>
  {elements}
</domain>"""


def _disk_xml(disk: DiskSpec, image: Path | None) -> str:
    kind, source = "file", ""
    if disk.volume is not None:
        pool, volume = map(quoteattr, disk.volume)
        kind, source = "volume", f"<source pool={pool} volume={volume}>"
    elif image is not None:
        kind, name = ("block", "dev") if image.is_block_device() else ("file", "file")
        source = f"<source {name}={quoteattr(str(image))}>"
    if source:
        source += f"{disk.source_elements}</source>"
    wanted = {
        "readonly": disk.read_only,
        "shareable": disk.shareable,
        "transient": disk.transient,
    }
    flags = "".join(f"<{name}/>" for name, is_wanted in wanted.items() if is_wanted)
    return (
        f"<disk type='{kind}' device='{disk.device}'>"
        f"<driver name='qemu' type='{disk.format}'/>{source}"
        f"<target dev='{disk.target}' bus='{disk.on_bus}'/>{flags}</disk>"
    )


class Machine:
    """A domain of a stand and its images; ``destroy`` leaves nothing of either.

    images -- target -> path of the top image (no entry for an empty drive)
    writes -- target -> the (offset, length) ranges written through ``write``, in order
    """

    def __init__(
        self,
        stand: Stand,
        disks: Sequence[DiskSpec] = (DiskSpec(),),
        *,
        name: str | None = None,
        state: str = "paused",
        memory: int = 64,
        machine: str = "pc",
        os_elements: str = "",
        devices: str = "",
        elements: str = "",
        capabilities: str = "",
        commandline: Sequence[str] = (),
        transient: bool = False,
    ) -> None:
        """Define and start a machine.

        state -- paused, running or stopped
        memory -- MiB
        os_elements, devices, elements -- XML to go into <os>, <devices> and <domain>
        capabilities -- XML to go into <qemu:capabilities>, beside ``CAPABILITIES``
        commandline -- further arguments of QEMU (qemu:commandline)
        transient -- started without being defined
        """
        self.stand = stand
        self.name = f"vm{next(_numbers)}" if name is None else name
        self.disks = tuple(disks)
        self.folder = stand.workspace.folder("i")
        self.images: dict[str, Path] = {}
        for disk in self.disks:
            path = disk.make(self.folder)
            if path is not None:
                self.images[disk.target] = path
        self.writes: dict[str, list[tuple[int, int]]] = {disk.target: [] for disk in self.disks}
        self.xml = domain_xml(
            self.name,
            self.disks,
            self.images,
            memory=memory,
            machine=machine,
            os_elements=os_elements,
            devices=devices,
            elements=elements,
            capabilities=CAPABILITIES + capabilities,
            commandline=commandline,
        )
        self.domain: libvirt.virDomain
        if transient:
            flags = libvirt.VIR_DOMAIN_START_PAUSED if state == "paused" else 0
            self.domain = stand.handle.createXML(self.xml, flags)
            self._record()
            return
        self.domain = stand.handle.defineXML(self.xml)
        if state != "stopped":
            self.start(paused=state == "paused")

    # --- life ---------------------------------------------------------------------------------

    @property
    def uri(self) -> str:
        """URI of the machine's libvirt."""
        return self.stand.uri

    @property
    def active(self) -> bool:
        """Whether there is a QEMU."""
        return bool(self.domain.isActive())

    @property
    def pid(self) -> int:
        """Process id of the machine's QEMU."""
        return self.stand.pid_of(self.name)

    def _record(self) -> None:
        self.stand.workspace.record(self.pid)

    def start(self, *, paused: bool = True) -> None:
        """Start the machine.

        libvirt waits half a minute for what it has yet to do with one whose QEMU was just killed; a
        machine with much other work may take longer.
        """
        deadline = time.monotonic() + patiently(120)
        while True:
            try:
                self.domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)
                break
            except libvirt.libvirtError as error:
                late = error.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT
                if not late or time.monotonic() > deadline:
                    raise
        self._record()

    def resume(self) -> None:
        """Let the processors run."""
        self.domain.resume()

    def stop(self) -> None:
        """Switch the machine off; QEMU closes its images properly."""
        self.domain.destroyFlags(libvirt.VIR_DOMAIN_DESTROY_GRACEFUL)

    def kill(self) -> None:
        """``kill -9`` of QEMU, as a crash of the host would; returns when libvirt knows."""
        kill(self.pid)
        self.gone()

    def gone(self) -> None:
        """Wait until libvirt knows that the machine's QEMU was killed."""
        deadline = time.monotonic() + patiently(60)
        while self.domain.isActive():
            if time.monotonic() > deadline:
                raise TimeoutError(f"libvirt has not noticed that {self.name} was killed")
            time.sleep(0.02)

    def destroy(self) -> None:
        """End the machine at once, whatever becomes of its images, and let libvirt forget it."""
        with contextlib.suppress(libvirt.libvirtError, OSError, StandError):
            if self.active:
                kill(self.pid)
        with contextlib.suppress(libvirt.libvirtError):
            self.domain.destroy()
        with contextlib.suppress(libvirt.libvirtError):
            self.domain.undefineFlags(_UNDEFINE)

    # --- the monitor --------------------------------------------------------------------------

    def qmp(self, execute: str, **arguments: Any) -> Any:
        """Run a QMP command; names with a dash are given with an underscore."""
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        command = json.dumps({"execute": execute, "arguments": given})
        flags = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT
        answer = json.loads(libvirt_qemu.qemuMonitorCommand(self.domain, command, flags))
        if "error" in answer:
            raise RuntimeError(f"{execute}: {answer['error']['desc']}")
        return answer["return"]

    def hmp(self, line: str) -> str:
        """Run a line of the human monitor and return what it printed."""
        flags = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
        printed: str = libvirt_qemu.qemuMonitorCommand(self.domain, line, flags)
        return printed

    # --- the disks ----------------------------------------------------------------------------

    def _live_disk(self, target: str) -> etree._Element:
        found = etree.fromstring(self.domain.XMLDesc()).xpath(
            "devices/disk[target/@dev=$target]", target=target
        )
        assert isinstance(found, list)
        disk = found[0]
        assert isinstance(disk, etree._Element)
        return disk

    def node(self, target: str) -> str:
        """Node name of the disk's top layer, as libvirt assigned it."""
        source = self._live_disk(target).find("source")
        assert source is not None
        return f"libvirt-{source.get('index')}-format"

    def device(self, target: str) -> str:
        """Path of the disk's device in QEMU's object tree, as ``qemu-io -d`` takes it."""
        alias_element = self._live_disk(target).find("alias")
        assert alias_element is not None
        alias = f"/machine/peripheral/{alias_element.get('name')}"
        virtio = next(disk for disk in self.disks if disk.target == target).on_bus == "virtio"
        return f"{alias}/virtio-backend" if virtio else alias

    def _format(self, target: str) -> str:
        return next(disk.format for disk in self.disks if disk.target == target)

    def _flush(self, target: str) -> None:
        if self.active:
            self.hmp(f'qemu-io -d {self.device(target)} "flush"')

    def _qemu_io(self, target: str, *commands: str, options: Sequence[str] = ()) -> str:
        given = [word for command in commands for word in ("-c", command)]
        done = subprocess.run(
            ["qemu-io", *options, "-f", self._format(target), *given, self.images[target]],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout + done.stderr

    def write(self, target: str, offset: int, length: int, pattern: int = 0xA5) -> None:
        """Write `length` bytes of `pattern` at `offset`: through the device, or to the image.

        Raises RuntimeError if they cannot be read back: the monitor's qemu-io reports no error.
        """
        command = f"write -P {pattern:#04x} {offset} {length}"
        if self.active:
            printed = self.hmp(f'qemu-io -d {self.device(target)} "{command}"')
            held = self.holds(target, offset, length, pattern)
        else:
            printed = self._qemu_io(target, command, f"read -P {pattern:#04x} {offset} {length}")
            held = self._held(target, length, printed)
        if not held:
            raise RuntimeError(f"write to {target} of {self.name} failed: {printed.strip()}")
        self.writes[target].append((offset, length))

    def holds(self, target: str, offset: int, length: int, pattern: int) -> bool:
        """Whether every byte there is `pattern`."""
        self._flush(target)
        read = f"read -P {pattern:#04x} {offset} {length}"
        return self._held(target, length, self._qemu_io(target, read, options=("-r", "-U")))

    def _held(self, target: str, length: int, printed: str) -> bool:
        """What the `qemu-io` says that has read: whether every byte was the pattern."""
        if not re.search(rf"read {length}/{length} bytes", printed):
            raise RuntimeError(f"read of {target} of {self.name}: {printed.strip()}")
        return "Pattern verification failed" not in printed

    def contents(self, target: str) -> bytes:
        """Every byte of the disk as the guest would read it."""
        self._flush(target)
        with tempfile.NamedTemporaryFile(dir=self.folder) as copy:
            command = ["qemu-img", "convert", "-U", "-f", self._format(target), "-O", "raw"]
            subprocess.run([*command, str(self.images[target]), copy.name], check=True)
            return Path(copy.name).read_bytes()

    def bitmaps(self, target: str) -> dict[str, dict[str, Any]]:
        """The bitmaps on the disk's top layer, name -> what QEMU (or, stopped, qemu-img) says.

        Of a running machine the entries are QMP's BlockDirtyInfo (``count``, ``recording``, ...),
        of a stopped one those of ``qemu-img info`` (``flags``, ``granularity``).
        """
        if not self.active:
            specific = info(self.images[target]).get("format-specific", {}).get("data", {})
            return {entry["name"]: entry for entry in specific.get("bitmaps", [])}
        name = self.node(target)
        for node in self.qmp("query-named-block-nodes", flat=True):
            if node["node-name"] == name:
                return {entry["name"]: entry for entry in node.get("dirty-bitmaps", [])}
        raise RuntimeError(f"{self.name} has no node {name}")
