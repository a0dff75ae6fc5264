"""Which engine works on a domain, and why."""

from __future__ import annotations

import pytest

from ckptmgr.checkpoint import EngineName
from ckptmgr.engine.choice import Stack, choose
from ckptmgr.errors import Unsupported

LIBVIRT, MONITOR, OFFLINE = EngineName.LIBVIRT, EngineName.MONITOR, EngineName.OFFLINE


def stack(*, active: bool = True, local: bool = True, backup: bool = True) -> Stack:
    return Stack("vm", active, local, backup, "libvirt can" if backup else "libvirt cannot")


@pytest.mark.parametrize(
    ("asked", "stack_", "engine", "reason"),
    [
        (None, stack(), LIBVIRT, "libvirt can"),
        (None, stack(backup=False), MONITOR, "libvirt cannot"),
        (None, stack(active=False), OFFLINE, "the domain is not running"),
        (None, stack(local=False), LIBVIRT, "libvirt can"),
        (LIBVIRT, stack(), LIBVIRT, "asked for"),
        (MONITOR, stack(), MONITOR, "asked for"),
        (OFFLINE, stack(active=False), OFFLINE, "asked for"),
    ],
)
def test_the_engine_that_can_is_chosen(
    asked: EngineName | None, stack_: Stack, engine: EngineName, reason: str
) -> None:
    choice = choose(asked, stack_)
    assert (choice.engine, choice.reason) == (engine, reason)


@pytest.mark.parametrize(
    ("asked", "stack_", "message"),
    [
        (LIBVIRT, stack(backup=False), "libvirt cannot"),
        (LIBVIRT, stack(active=False), "is not running"),
        (MONITOR, stack(active=False), "is not running"),
        (OFFLINE, stack(), "is running"),
        (OFFLINE, stack(active=False, local=False), "another machine"),
        (None, stack(active=False, local=False), "another machine"),
    ],
)
def test_an_engine_that_cannot_is_refused_with_the_reason(
    asked: EngineName | None, stack_: Stack, message: str
) -> None:
    with pytest.raises(Unsupported, match=message) as raised:
        choose(asked, stack_)
    assert raised.value.hint
