"""A domain's guest agent, through libvirt: whether it is there, and freezing with it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from ..config import Driver
from ..errors import CkptmgrError, GuestAgentFailed
from ..xml import parse
from . import freezing, thawing
from .connection import Connection
from .failure import translate

log = logging.getLogger("ckptmgr")

_CHANNEL = "org.qemu.guest_agent.0"
# VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK: what libvirt starts every domain with.
_WAITS = -2


class GuestAgent:
    """The agent in a domain's guest.  Every call asks libvirt anew."""

    def __init__(self, connection: Connection, handle: Any) -> None:
        self._connection = connection
        self._handle = handle

    @property
    def _name(self) -> str:
        name: str = self._handle.name()
        return name

    def _active(self) -> bool:
        with translate("asking whether it runs", self._name):
            return bool(self._handle.isActive())

    def _xml(self) -> str:
        with translate("reading the XML", self._name):
            text: str = self._handle.XMLDesc(0)
        return text

    @contextmanager
    def frozen(self, timeout: float) -> Iterator[None]:
        """Run the block with the guest's file systems frozen.  See `freezing.frozen`.

        timeout -- seconds that freezing may take, and that the file systems may stay frozen

        Raises GuestAgentFailed.  It sets the domain's agent timeout, and then libvirt's default.
        If this process is killed meanwhile, another one thaws them, but for the embedded driver,
        which no other process can use.
        """
        self._require()
        seconds = max(1, math.ceil(timeout))

        def freeze() -> None:
            with translate("freezing the file systems", self._name):
                self._handle.fsFreeze()

        def thaw() -> None:
            with translate("thawing the file systems", self._name):
                self._handle.fsThaw()

        with translate("setting the agent's timeout", self._name):
            self._handle.agentSetResponseTimeout(seconds)
        try:
            with (
                self._guarded(timeout),
                freezing.frozen(freeze, thaw, domain=self._name, timeout=timeout),
            ):
                yield
        finally:
            self._wait_again()

    def _guarded(self, timeout: float) -> AbstractContextManager[None]:
        if self._connection.driver is Driver.EMBEDDED:
            return nullcontext()
        return thawing.guarded(self._connection.uri, self._handle.UUIDString(), timeout)

    def thaw(self, timeout: float) -> None:
        """Thaw the guest's file systems, frozen or not, if its agent is there.

        timeout -- seconds that the agent may take

        Raises OperationFailed.
        """
        if not self._active() or not self.connected():
            return
        with translate("thawing the file systems", self._name):
            self._handle.agentSetResponseTimeout(max(1, math.ceil(timeout)))
            try:
                self._handle.fsThaw()
            finally:
                self._wait_again()

    def _wait_again(self) -> None:
        """Best effort, and nothing is lost without it: must not hide what went before."""
        try:
            with translate("resetting the agent's timeout", self._name):
                self._handle.agentSetResponseTimeout(_WAITS)
        except CkptmgrError as error:
            log.info("%s", error)

    def connected(self) -> bool:
        """Whether the running domain's guest agent is connected."""
        root = parse(self._xml(), what="the domain's XML")
        channels = root.iterfind("devices/channel/target")
        return any(
            target.get("name") == _CHANNEL and target.get("state") == "connected"
            for target in channels
        )

    def _require(self) -> None:
        hint = "install and start qemu-guest-agent in the guest, or leave --quiesce out"
        if not self._active():
            raise GuestAgentFailed(f"domain {self._name!r} is not running: nothing to freeze")
        root = parse(self._xml(), what="the domain's XML")
        for target in root.iterfind("devices/channel/target"):
            if target.get("name") == _CHANNEL:
                if target.get("state") == "connected":
                    return
                raise GuestAgentFailed(
                    f"the guest agent of domain {self._name!r} is not connected", hint=hint
                )
        raise GuestAgentFailed(
            f"domain {self._name!r} has no guest agent channel ({_CHANNEL})",
            hint="add the channel to the domain; " + hint,
        )
