"""QEMU is never told to stop its NBD server while a client of ours has not negotiated yet.

It would wait for that client for ever, and with it the guest (QEMU 7.2).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

from ckptmgr import nbd as client
from ckptmgr.plan.steps import Server
from integration.conftest import MakeMachine
from integration.evidence import domain_of, unchanged
from integration.stand import MIB, DiskSpec, Machine
from integration.stand.patience import patiently


@contextlib.contextmanager
def not_for_ever(machine: Machine) -> Iterator[None]:
    """Whoever waits for a QEMU that stands still goes on."""
    killed = threading.Timer(patiently(60), os.kill, (machine.pid, signal.SIGKILL))
    killed.start()
    try:
        yield
    finally:
        killed.cancel()


@pytest.mark.parametrize("engine", ["libvirt", "monitor"])
def test_an_interrupt_while_a_bitmap_is_negotiated_ends_nothing_but_the_command(
    engine: str, make_vm: MakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = make_vm([DiskSpec("vda", size=MIB)])
    domain = domain_of(machine, tmp_path, engine)
    domain.create("c0")
    begin = client._begin

    def interrupted(handle: nbd.NBD, server: Server) -> None:
        begin(handle, server)
        raise KeyboardInterrupt

    with not_for_ever(machine), monkeypatch.context() as patch, unchanged(machine, tmp_path):
        patch.setattr(client, "_begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            domain.create("c1")
    with not_for_ever(machine):
        assert domain.check() == ()
        assert domain.create("c1").parent == "c0"
