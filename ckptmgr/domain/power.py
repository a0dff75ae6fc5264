"""Pausing a running domain and letting it go on."""

from __future__ import annotations

from dataclasses import dataclass

from .adapter import DomainAdapter
from .binding import libvirt
from .failure import translate

# virDomainState; "blocked" is a running one to QEMU's driver
_STATES = {
    1: "running",
    2: "running",
    3: "paused",
    4: "shutting down",
    5: "shut off",
    6: "crashed",
    7: "suspended",
}


def is_running(adapter: DomainAdapter) -> bool:
    """Whether the guest executes instructions: the domain is active and not paused."""
    with translate("asking for the state", adapter.name):
        state: int = adapter.handle.state(0)[0]
    return state in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED)


def state(adapter: DomainAdapter) -> str:
    """The domain's state in virsh's words: running, paused, shut off, ..."""
    with translate("asking for the state", adapter.name):
        return _STATES.get(adapter.handle.state(0)[0], "in no known state")


@dataclass(frozen=True)
class Standstill:
    """Why a domain writes nothing, as precisely as libvirt tells.

    instance -- libvirt's number of the QEMU process, -1 if there is none
    state, reason -- virDomainState, and why it is in it
    """

    instance: int
    state: int
    reason: int

    @property
    def paused(self) -> bool:
        """Whether there is a QEMU that executes nothing."""
        return bool(self.state == libvirt.VIR_DOMAIN_PAUSED)

    @property
    def from_snapshot(self) -> bool:
        """Whether it is as a revert left it: whoever runs or stops it changes the reason."""
        return (self.state, self.reason) in (
            (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_FROM_SNAPSHOT),
            (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_FROM_SNAPSHOT),
        )


def standstill(adapter: DomainAdapter) -> Standstill:
    """The domain's state and what led to it."""
    with translate("asking for the state", adapter.name):
        state, reason = adapter.handle.state(0)
        # A handle keeps the number that it was made with, through a revert to another QEMU.
        fresh = adapter.connection.handle.lookupByUUIDString(adapter.uuid)
        return Standstill(fresh.ID(), state, reason)


def has_let_go(adapter: DomainAdapter) -> bool:
    """Whether the QEMU of a paused domain has put the bitmaps into the images, and has none now.

    So it ends a migration, and libvirt migrates the memory of an external snapshot to its file; a
    domain that was paused before stays like that until it runs.  Only the monitor tells.
    """
    return adapter.monitor.command("query-status")["status"] in ("finish-migrate", "postmigrate")


def pause(adapter: DomainAdapter) -> None:
    """Stop the guest; nothing is written by it until `resume`."""
    with translate("pausing the domain", adapter.name):
        adapter.handle.suspend()


def resume(adapter: DomainAdapter) -> None:
    """Let a paused guest go on; a running one goes on anyway."""
    if is_running(adapter):
        return
    with translate("resuming the domain", adapter.name):
        adapter.handle.resume()
