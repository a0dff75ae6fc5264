"""Which engine works on a domain: a pure decision, with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoint import EngineName
from ..errors import Unsupported


@dataclass(frozen=True)
class Stack:
    """What decides.

    active -- the domain runs
    local -- its images are on this machine
    backup -- libvirt's checkpoint and backup APIs work for this domain
    backup_reason -- why, or why not, in words
    """

    domain: str
    active: bool
    local: bool
    backup: bool
    backup_reason: str


@dataclass(frozen=True)
class Choice:
    """The engine and, for people, why it is that one."""

    engine: EngineName
    reason: str


def choose(asked: EngineName | None, stack: Stack) -> Choice:
    """Choose the engine, or see that the one `asked` for can work.  Raises Unsupported if not."""
    if asked is None:
        return _automatic(stack)
    if asked is EngineName.OFFLINE:
        if stack.active:
            raise Unsupported(
                f"domain {stack.domain!r} is running, so engine 'offline' cannot change its images",
                hint="leave --engine out, or stop the domain",
            )
        return _offline(stack, "asked for")
    if not stack.active:
        raise Unsupported(
            f"domain {stack.domain!r} is not running, and engine '{asked}' needs its QEMU",
            hint="leave --engine out (engine 'offline' works on the images), or start the domain",
        )
    if asked is EngineName.LIBVIRT and not stack.backup:
        raise Unsupported(
            f"engine 'libvirt' cannot work on domain {stack.domain!r}: {stack.backup_reason}",
            hint="leave --engine out, or use --engine monitor",
        )
    return Choice(asked, "asked for")


def _automatic(stack: Stack) -> Choice:
    if not stack.active:
        return _offline(stack, "the domain is not running")
    if stack.backup:
        return Choice(EngineName.LIBVIRT, stack.backup_reason)
    return Choice(EngineName.MONITOR, stack.backup_reason)


def _offline(stack: Stack, reason: str) -> Choice:
    if not stack.local:
        raise Unsupported(
            f"domain {stack.domain!r} is not running and its images are on another machine",
            hint="run ckptmgr on the hypervisor, or start the domain",
        )
    return Choice(EngineName.OFFLINE, reason)
