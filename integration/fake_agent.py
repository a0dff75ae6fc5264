"""A guest agent without a guest: its protocol on a socket, and the port that a guest opens."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from lxml import etree

from integration.stand import Machine
from integration.stand.patience import patiently

CHANNEL = "org.qemu.guest_agent.0"


class FakeAgent:
    """What qemu-guest-agent does with ``guest-fsfreeze-*`` (qga/qapi-schema.json).

    Two connect to its socket: QEMU, whose channel says ``mode='connect'``, and libvirt, which
    talks.  `on` holds what is done before a command is answered: it may wait, raise Refused, or
    end the agent.

    frozen -- whether the file systems are
    commands -- those of freezing and thawing, in the order in which they came
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.frozen = False
        self.commands: list[str] = []
        self.on: dict[str, Callable[[], object]] = {}
        self._connections: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True, name="fake agent").start()

    @property
    def devices(self) -> str:
        """The channel, for the machine's <devices>."""
        return (
            f"<channel type='unix'><source mode='connect' path='{self.path}'/>"
            f"<target type='virtio' name='{CHANNEL}'/></channel>"
        )

    def __enter__(self) -> FakeAgent:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.die()

    def die(self) -> None:
        """End: hang up and accept nobody any more."""
        self.path.unlink(missing_ok=True)
        for each in (self._listener, *self._connections):
            # close() alone would not wake the thread that reads
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
            finally:
                each.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            for line in connection.makefile("rb"):
                answer = self._answer(json.loads(line))
                connection.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:
            return

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        command = request["execute"]
        if command == "guest-sync":
            return {"return": request["arguments"]["id"]}
        self.commands.append(command.removeprefix("guest-fsfreeze-"))
        try:
            self.on.get(command.removeprefix("guest-fsfreeze-"), lambda: None)()
        except Refused as refused:
            return {"error": {"class": "GenericError", "desc": str(refused)}}
        if command == "guest-fsfreeze-freeze":
            self.frozen = True
            return {"return": 1}
        if command == "guest-fsfreeze-thaw":
            self.frozen = False
            return {"return": 1}
        return {"error": {"class": "CommandNotFound", "desc": f"no {command}"}}


class Refused(Exception):
    """The agent answers with an error."""


class Guest:
    """The one thing that a guest has to do: open the port, so that libvirt takes it for connected.

    QEMU's qtest protocol plays the driver: it writes to I/O ports and to the guest's memory.

    commandline -- for the machine
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.commandline = ["-qtest", f"unix:{path},server=on,wait=off", "-qtest-log", "none"]

    def open_port(self, machine: Machine) -> None:
        """Send VIRTIO_CONSOLE_PORT_OPEN, as a legacy driver (virtio 1.0, 4.8 and 5.3)."""
        root = etree.fromstring(machine.domain.XMLDesc())
        slot = int(_attribute(root, "controller[@type='virtio-serial']/address/@slot"), 16)
        port = int(_attribute(root, f"channel[target/@name='{CHANNEL}']/address/@port"))
        base, memory = 0xC000, 0x100000
        with socket.socket(socket.AF_UNIX) as self._socket:
            self._socket.connect(str(self.path))
            self._answers = self._socket.makefile("r")
            self._pci(slot, 0x10, "outl", base)  # the first BAR
            self._pci(slot, 0x04, "outw", 0x05)  # I/O ports and bus mastering on
            self._say(f"outb {base + 18} 3")  # status: acknowledged, has a driver
            self._say(f"outl {base + 4} 2")  # features: more than one port
            self._say(f"outw {base + 14} 3")  # queue 3: control messages to the device
            entries = int(self._say(f"inw {base + 12}").split()[1], 16)
            message = struct.pack("<IHH", port, 6, 1)  # PORT_OPEN: yes
            where = memory + 0x8000
            self._write(where, message)
            self._write(memory, struct.pack("<QIHH", where, len(message), 0, 0))
            self._write(memory + 16 * entries, struct.pack("<HHH", 0, 1, 0))
            self._say(f"outl {base + 8} {memory >> 12}")
            self._say(f"outb {base + 18} 7")  # status: driver ready
            self._say(f"outw {base + 16} 3")  # there is something in queue 3
        machine.resume()
        deadline = time.monotonic() + patiently(20)
        while True:
            root = etree.fromstring(machine.domain.XMLDesc())
            if root.xpath(f"//target[@name='{CHANNEL}']/@state") == ["connected"]:
                return
            assert time.monotonic() < deadline, "libvirt sees no agent"
            time.sleep(0.02)

    def _pci(self, slot: int, register: int, command: str, value: int) -> None:
        self._say(f"outl {0xCF8} {0x80000000 | slot << 11 | register}")
        self._say(f"{command} {0xCFC} {value}")

    def _write(self, address: int, data: bytes) -> None:
        self._say(f"write {address} {len(data)} 0x{data.hex()}")

    def _say(self, line: str) -> str:
        self._socket.sendall(f"{line}\n".encode())
        answer = self._answers.readline()
        assert answer.startswith("OK"), f"{line}: {answer}"
        return answer


def _attribute(root: etree._Element, path: str) -> str:
    found = root.xpath(f"devices/{path}")
    assert isinstance(found, list)
    return str(found[0])
