"""QEMU's monitor, through libvirt.

Using it taints the domain ("custom-monitor"): libvirt's people will ask about it in a bug report.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from ..errors import OperationFailed
from .binding import libvirt_qemu
from .failure import translate

log = logging.getLogger("ckptmgr")

_HMP = 1  # VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP

# Domains whose user was told, by UUID: once per process is enough.
_told: set[str] = set()


class CommandFailed(OperationFailed):
    """QEMU refused a QMP command.

    command -- the command
    error_class -- QMP's class (GenericError, CommandNotFound, DeviceNotFound, ...)
    description -- QMP's own text
    """

    def __init__(
        self, message: str, *, command: str, error_class: str, description: str, hint: str | None
    ) -> None:
        super().__init__(message, hint=hint)
        self.command = command
        self.error_class = error_class
        self.description = description


class Monitor:
    """The monitor of one running domain."""

    def __init__(self, domain: Any, name: str, uuid: str) -> None:
        self._domain = domain
        self._name = name
        self._uuid = uuid

    def command(self, execute: str, /, **arguments: Any) -> Any:
        """Run a QMP command and return what it returns; ``**{"node-name": ...}`` for names
        with a dash.

        Raises CommandFailed with QMP's class if QEMU refuses, and what `translate` raises.
        """
        command: dict[str, Any] = {"execute": execute}
        if arguments:
            command["arguments"] = arguments
        return parse_answer(self._send(execute, json.dumps(command), 0), execute, self._name)

    def hmp(self, line: str) -> str:
        """Run a line of the human monitor; its answer, errors included, is text for people."""
        return self._send(line.split(" ", 1)[0], line, _HMP)

    def _send(self, what: str, command: str, flags: int) -> str:
        with translate(f"monitor command {what}", self._name):
            answer: str = libvirt_qemu.qemuMonitorCommand(self._domain, command, flags)
        if self._uuid not in _told:
            _told.add(self._uuid)
            log.warning(
                "domain %r: using the QEMU monitor; libvirt marks the running domain as tainted",
                self._name,
            )
        return answer


def parse_answer(text: str, execute: str, domain: str) -> Any:
    """What ``{"return": ...}`` holds.  Raises CommandFailed for ``{"error": ...}`` and
    OperationFailed for what is neither.
    """
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        if "return" in answer:
            return answer["return"]
        error = answer.get("error")
        if isinstance(error, dict):
            description = str(error.get("desc", ""))
            raise CommandFailed(
                f"QEMU refused {execute} for domain {domain!r}: {description}",
                command=execute,
                error_class=str(error.get("class", "GenericError")),
                description=description,
                hint=None,
            )
    raise OperationFailed(f"QEMU's answer to {execute} for domain {domain!r} is not QMP")
