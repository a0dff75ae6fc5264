"""Everything that can be wrong: a clear error, the promised exit status, and nothing changed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from integration.command import CommandLine, Ran
from integration.evidence import everything, unchanged
from integration.stand import MIB, Daemon, DiskSpec, Machine, await_greeting
from integration.stand.patience import patiently

pytestmark = pytest.mark.together

DISKS = (
    DiskSpec("vda", size=MIB),
    DiskSpec("vdb", size=MIB, compat="0.10"),
    DiskSpec("vdc", size=MIB, format="raw"),
    DiskSpec("sda", size=MIB, read_only=True),
)

BOMB = "<!DOCTYPE d [<!ENTITY a0 'ha'>{}]><domaincheckpoint><name>&a30;</name></domaincheckpoint>"
BOMB = BOMB.format("".join(f"<!ENTITY a{n} '&a{n - 1};&a{n - 1};'>" for n in range(1, 31)))
DEEP = "<domaincheckpoint>" + "<a>" * 100_000 + "</a>" * 100_000 + "</domaincheckpoint>"


@dataclass
class Place:
    """A running machine with a checkpoint "c0", and what others left on it."""

    machine: Machine
    ours: CommandLine
    folder: Path
    told: set[str] = field(default_factory=set)

    @property
    def store(self) -> Path:
        assert self.ours.store is not None
        return self.ours.store

    def file(self, text: str | bytes) -> Path:
        path = self.folder / "document.xml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def refused(self, status: int, code: str, *arguments: str | Path, in_words: bool = True) -> str:
        """The command fails like this, in JSON and in words, and nothing is changed."""
        with unchanged(self.machine, self.store):
            ran = self.ours("--json", *arguments)
            error = ran.json["error"]
            assert (ran.status, error["code"]) == (status, code), error
            assert set(error) == {"code", "message", "hint"}
            assert error["message"]
            if code not in self.told:
                self.told.add(code)
                said = self.ours(*arguments)
                assert (said.status, said.out) == (status, "")
                assert f"ckptmgr: error: {error['message'].splitlines()[0]}"[:60] in said.err
        message: str = error["message"]
        return message


@pytest.fixture(scope="module")
def place(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("bad")
    machine = Machine(daemon, DISKS, name="bad input")
    ours = CommandLine(daemon, folder / "store")
    ours.ok("create", machine.name, "c0")
    machine.write("vda", 0, 512)
    machine.domain.checkpointCreateXML(
        "<domaincheckpoint><name>theirs</name><disks>"
        "<disk name='vda' checkpoint='bitmap'/></disks></domaincheckpoint>"
    )
    machine.qmp("block-dirty-bitmap-add", node=machine.node("vda"), name="orphan", persistent=True)
    yield Place(machine, ours, folder)
    machine.destroy()


Case = tuple[int, str, tuple[str, ...], str]

CREATE: dict[str, Case] = {
    "name taken in the store": (1, "checkpoint-exists", ("c0",), "c0"),
    "name taken in libvirt": (1, "checkpoint-exists", ("theirs",), "ckptmgr did not make"),
    "name taken by a bitmap": (1, "checkpoint-exists", ("orphan",), "orphan"),
    "disk named twice": (2, "invalid-request", ("x", "--disk", "vda", "--disk", "vda"), "twice"),
    "bitmap of another name": (2, "invalid-request", ("x", "--disk", "vda=bitmap:y"), "'y'"),
    "unknown disk": (2, "invalid-request", ("x", "--disk", "vdz"), "vdz"),
    "no disk left": (2, "invalid-request", ("x", "--disk", "vda=no"), "no disk"),
    "nonsense about a disk": (2, "invalid-request", ("x", "--disk", "vda=maybe"), "vda=maybe"),
    "qcow2 version 2": (6, "unsupported", ("x", "--disk", "vdb"), "vdb.*version 2"),
    "raw": (6, "unsupported", ("x", "--disk", "vdc"), "vdc.*raw"),
    "read-only": (6, "unsupported", ("x", "--disk", "sda"), "sda.*read-only"),
    "name with a space": (2, "invalid-request", ("a b",), "a b"),
    "name with a slash": (2, "invalid-request", ("../x",), "../x"),
    "name with a dot first": (2, "invalid-request", (".x",), ".x"),
    "name too long": (2, "invalid-request", ("n" * 201,), "nnn"),
    "name of no characters": (2, "invalid-request", ("",), "''"),
    "no agent to freeze": (1, "guest-agent", ("x", "--quiesce"), "agent"),
    "engine offline": (6, "unsupported", ("x", "--engine", "offline"), "is running"),
}


@pytest.mark.parametrize("case", CREATE)
def test_create_refuses(case: str, place: Place) -> None:
    status, code, arguments, words = CREATE[case]
    message = place.refused(status, code, "create", place.machine.name, *arguments)
    assert re.search(words, message), message


def test_a_disk_named_twice_by_target_and_by_path(place: Place) -> None:
    path = str(place.machine.images["vda"])
    arguments = ("x", "--disk", "vda", "--disk", path)
    message = place.refused(2, "invalid-request", "create", place.machine.name, *arguments)
    assert "twice" in message


@pytest.mark.parametrize(
    "command",
    [
        ("show", "nope"),
        ("parent", "nope"),
        ("parent", "c0"),  # a root
        ("delete", "nope"),
        ("diff", "nope"),
        ("diff", "c0", "nope"),
        ("list", "--from", "nope"),
        ("show", "../c0"),
    ],
    ids=" ".join,
)
def test_no_such_checkpoint(command: tuple[str, ...], place: Place) -> None:
    place.refused(3, "no-checkpoint", command[0], place.machine.name, *command[1:])


@pytest.mark.parametrize("command", ["create", "list", "current", "adopt"])
def test_no_such_domain(command: str, place: Place) -> None:
    assert "'nope'" in place.refused(3, "no-domain", command, "nope")


def _documents(place: Place) -> dict[str, str | bytes]:
    good = place.ours.ok("show", place.machine.name, "c0", "--xml")
    return {
        "nothing": "",
        "text": "hello",
        "cut off": good[:-20],
        "two roots": good + good,
        "another element": "<domainsnapshot/>",
        "no name": "<domaincheckpoint/>",
        "not UTF-8": b"<domaincheckpoint><name>\xff</name></domaincheckpoint>",
        "control characters": "<domaincheckpoint><name>\x01</name></domaincheckpoint>",
        "NUL": good + "\0<x/>",
        "bomb": BOMB,
        "deep": DEEP,
        "a number that is none": good.replace("</creationTime>", "x</creationTime>"),
        "bitmap of another": good.replace("<name>c0</name>", "<name>c9</name>"),
    }


def test_redefine_refuses_what_is_no_checkpoint(place: Place) -> None:
    for what, document in _documents(place).items():
        command = ("redefine", place.machine.name, place.file(document))
        message = place.refused(1, "invalid-document", *command)
        assert len(message) < 500, what


def test_redefine_reads_no_other_file(place: Place) -> None:
    """An external entity: the content of the file appears nowhere."""
    secret = place.folder / "secret"
    secret.write_text("tuna-melt-4711")
    for declaration in (
        f"<!ENTITY x SYSTEM '{secret}'>",
        f"<!ENTITY x SYSTEM 'file://{secret}'>",
        f"<!ENTITY % x SYSTEM '{secret}'> %x;",
    ):
        document = (
            f"<!DOCTYPE d [{declaration}]><domaincheckpoint><name>&x;</name>"
            "<description>&x;</description></domaincheckpoint>"
        )
        path = place.file(document)
        command = ("redefine", place.machine.name, path)
        place.refused(1, "invalid-document", *command)
        ran = place.ours("-v", "-v", "redefine", place.machine.name, path)
        assert "tuna" not in ran.out + ran.err
        assert "DOCTYPE" in ran.err
    include = (
        "<domaincheckpoint xmlns:xi='http://www.w3.org/2001/XInclude'><name>c9</name>"
        f"<description><xi:include href='{secret}' parse='text'/></description></domaincheckpoint>"
    )
    ran = place.ours("redefine", place.machine.name, place.file(include))
    assert ran.status == 1
    assert "tuna" not in ran.out + ran.err
    held = [path.read_bytes() for path in place.store.rglob("*") if path.is_file()]
    assert not any(b"tuna" in content for content in held)


def test_redefine_refuses_files_that_cannot_be_read(place: Place) -> None:
    place.refused(1, "failed", "redefine", place.machine.name, place.folder / "none.xml")
    place.refused(1, "failed", "redefine", place.machine.name, place.folder)


def test_a_read_only_connection_reads_and_changes_nothing(place: Place) -> None:
    name = place.machine.name
    document = place.file(place.ours.ok("show", name, "c0", "--xml"))
    for command in (
        ("create", name, "x"),
        ("delete", name, "c0"),
        ("delete", name, "c0", "--metadata"),
        ("redefine", name, document),
        ("adopt", name),
    ):
        place.refused(1, "read-only", "--readonly", *command)
    command = ("create", name, "x", "--dry-run")
    place.refused(1, "read-only", "--readonly", *command)
    with unchanged(place.machine, place.store):
        for question in ("list", "current"):
            assert "c0" in place.ours.ok("--readonly", question, name)
        found = place.ours("--json", "--readonly", "check", name)
        assert (found.status, found.json["consistent"]) == (4, False)
        (finding,) = found.json["findings"]
        assert (finding["code"], finding["checkpoint"]) == ("libvirt-only", "theirs")


# --- the store -------------------------------------------------------------------------------


def test_a_store_that_cannot_be_written(place: Place, tmp_path: Path) -> None:
    """A file in its place; a file system that is read-only; one that is full."""
    name = place.machine.name
    occupied = tmp_path / "occupied"
    occupied.write_text("not a folder")
    read_only = tmp_path / "read-only"
    read_only.mkdir()
    full = tmp_path / "full"
    full.mkdir()
    with mounted(read_only, "ro"), mounted(full, "size=4k,nr_inodes=4"):
        for store in (occupied / "store", read_only, full):
            other = Place(place.machine, CommandLine(place.ours.daemon, store), place.folder)
            with unchanged(place.machine, place.store):
                message = other.refused(1, "store", "create", name, "x")
            assert str(store) in message
    place.refused(2, "usage", "--store", occupied, "create", name, "x")
    assert occupied.read_text() == "not a folder"


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own on a folder, in the stand's mount namespace."""
    command = ["mount", "-t", "tmpfs", "-o", options, "ckptmgr-test", str(folder)]
    subprocess.run(command, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# --- images ----------------------------------------------------------------------------------


@contextmanager
def in_use(image: Path, *, read_only: bool) -> Iterator[None]:
    """Another program has an image open."""
    path = Path(f"{image}.sock")
    options = ["-r"] if read_only else []
    server = subprocess.Popen(["qemu-nbd", "-t", "-f", "qcow2", *options, "-k", path, image])
    try:
        await_greeting(path, server)
        yield
        # It has to close the image: all bitmaps of one that is killed are lost.
        server.terminate()
        assert server.wait(patiently(60)) == 0
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("read_only", [True, False], ids=["reading", "writing"])
def test_an_image_that_is_in_use_elsewhere(read_only: bool, daemon: Daemon, tmp_path: Path) -> None:
    disks = (DiskSpec("vda", size=MIB), DiskSpec("vdb", size=MIB))
    machine = Machine(daemon, disks, state="stopped")
    try:
        store = tmp_path / "store"
        ours = CommandLine(daemon, store)
        ours.ok("create", machine.name, "c0")
        machine.write("vda", 0, 512)
        before = everything(machine, store)
        commands = [("create", "c1"), ("delete", "c0")]
        with in_use(machine.images["vdb"], read_only=read_only):  # the second: the first is free
            for command, name in commands:
                ran = ours("--json", command, machine.name, name)
                assert (ran.status, ran.json["error"]["code"]) == (5, "busy"), ran.json
                assert str(machine.images["vdb"]) in ran.json["error"]["message"]
            diff = ours.json("diff", machine.name, "c0")
            # whoever writes has marked the bitmaps as in use: never taken for clean
            assert [disk["known"] for disk in diff["disks"]] == [True, read_only]
        assert everything(machine, store) == before
        ours.ok("create", machine.name, "c1")
    finally:
        machine.destroy()


def test_an_image_that_is_gone(daemon: Daemon, tmp_path: Path) -> None:
    machine = Machine(daemon, (DiskSpec("vda", size=MIB),), state="stopped")
    try:
        ours = CommandLine(daemon, tmp_path / "store")
        ours.ok("create", machine.name, "c0")
        image = machine.images["vda"]
        aside = image.rename(image.with_suffix(".aside"))
        place = Place(machine, ours, tmp_path)
        place.refused(1, "operation-failed", "create", machine.name, "c1")
        place.refused(1, "operation-failed", "diff", machine.name, "c0")
        aside.rename(image)
        ours.ok("create", machine.name, "c1")
    finally:
        machine.destroy()


def test_a_connection_that_cannot_be_made(place: Place) -> None:
    for uri, status, code in (
        ("qemu+unix:///system?socket=/nonexistent", 1, "connection"),
        ("test:///default", 6, "unsupported"),
        ("qemu:///embed", 2, "invalid-request"),
        ("qemu:///embed?root=relative", 2, "invalid-request"),
    ):
        ran: Ran = place.ours("--json", "-c", uri, "list", place.machine.name)
        assert (ran.status, ran.json["error"]["code"]) == (status, code), uri


def test_usage_errors_are_json_too(place: Place) -> None:
    for arguments in (
        ("create",),
        ("frobnicate",),
        ("create", "vm", "--frobnicate"),
        ("--engine", "quantum", "list", "vm"),
        ("list", "vm", "--tree", "--roots"),
        ("delete", "vm", "c0", "--children", "--children-only"),
    ):
        ran = place.ours("--json", *arguments)
        assert (ran.status, ran.json["error"]["code"]) == (2, "usage"), arguments
