"""The library's calls beside libvirt's, on one running machine of the embedded stand."""

from __future__ import annotations

from collections.abc import Callable

import ckptmgr
from ckptmgr.checkpoint import Checkpoint, CheckpointDisk, EngineName
from ckptmgr.store import DomainRecord, DomainStore, Intent, Store
from integration.stand import MIB, DiskSpec, Embedded, Machine, Workspace

from .bare import Bare
from .timing import Clock, Row

AIM = 1.3


def measure(rounds: int) -> list[Row]:
    """Create and delete, with the engine ``libvirt``."""
    clock = Clock()
    with Workspace() as workspace:
        stand = Embedded(workspace)
        machine = Machine(stand, (DiskSpec("vda"),))
        with ckptmgr.connect(stand.uri) as host:
            domain = host.domain(machine.name)
            bare = Bare(machine.domain, domain.adapter.runtime_directory())
            beside = Store(workspace.folder("store")).domain(domain.view.uuid)
            turns: list[Callable[[Clock], None]] = [
                lambda clock: _ours(clock, domain),
                lambda clock: _bare(clock, bare),
                lambda clock: _store(clock, beside),
            ]
            for number in range(rounds + 1):
                machine.write("vda", number % 64 * MIB, MIB)
                for turn in turns:
                    turn(clock if number else Clock())  # the first round loads what is needed
                turns.reverse()
        machine.destroy()
        stand.close()
    return _rows(clock)


def _ours(clock: Clock, domain: ckptmgr.Domain) -> None:
    clock.time("first", lambda: domain.create("first"))
    clock.time("later", lambda: domain.create("later"))
    clock.time("delete", lambda: domain.delete("later"))
    domain.delete("first")


def _bare(clock: Clock, bare: Bare) -> None:
    clock.time("bare first", lambda: bare.create("first"))
    clock.time("bare later", lambda: bare.create_and_read("later", since="first"))
    clock.time("bare mark", lambda: bare.mark("first"))
    clock.time("bare describe", bare.describe)
    clock.time("bare delete", lambda: bare.delete("later"))
    bare.delete("first")


def _store(clock: Clock, store: DomainStore) -> None:
    """What a deletion has to make durable, in another store, and nothing else."""
    point = Checkpoint("later", 0, None, EngineName.LIBVIRT, (CheckpointDisk("vda"),))

    def writes() -> None:
        store.write_intent(Intent("delete", ("later",), "libvirt"))
        store.save_record(DomainRecord("vm", None, 1))
        store.remove_checkpoint("later")
        store.clear_intent(sync=False)

    with store.lock(0):
        store.save_checkpoint(point)
        clock.time("bare writes", writes)


def _rows(clock: Clock) -> list[Row]:
    first, later, delete = (clock.median(what) for what in ("first", "later", "delete"))
    plain, job, gone, mark, describe, writes = (
        clock.median(f"bare {what}")
        for what in ("first", "later", "delete", "mark", "describe", "writes")
    )
    create = "virDomainCheckpointCreateXML"
    backup = "the backup job with checkpoint, its map read"
    own = "the definition read and the marker set"
    return [
        Row("create, the first", first, create, plain),
        Row("", first, f"that, {own}", plain + describe + mark, AIM),
        Row("create, a later one", later, backup, job),
        Row("", later, f"that, {own}", job + describe + mark, AIM),
        Row("", later, create, plain),
        Row("delete", delete, "virDomainCheckpointDelete", gone),
        Row("", delete, "that, the marker set", gone + mark, AIM),
        Row("", delete, "that, and the store's five fsyncs", gone + mark + writes),
    ]
