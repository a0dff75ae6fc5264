"""URIs, libvirt's errors, the monitor's answers, the marker and the guest's freezing."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.checkpoint import NAME_PATTERN
from ckptmgr.config import Driver
from ckptmgr.domain.connection import Location, parse_uri
from ckptmgr.domain.failure import classify, ours
from ckptmgr.domain.freezing import frozen
from ckptmgr.domain.marker import Marker, format_marker, parse_marker
from ckptmgr.domain.monitor import CommandFailed, parse_answer
from ckptmgr.engine.monitor import refusal
from ckptmgr.errors import (
    BitmapBroken,
    Busy,
    CheckpointExists,
    CkptmgrError,
    ConnectionFailed,
    GuestAgentFailed,
    InvalidDocument,
    InvalidRequest,
    NoCheckpoint,
    NoDomain,
    OperationFailed,
    ReadOnlyConnection,
    Unsupported,
)

# --- URIs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "location"),
    [
        ("qemu:///system", Location(Driver.SYSTEM)),
        ("qemu:///session", Location(Driver.SESSION)),
        ("qemu:///embed?root=/a%20b/c", Location(Driver.EMBEDDED, Path("/a b/c"))),
        (
            "qemu+unix:///system?socket=/run/x/libvirt-sock",
            Location(Driver.SYSTEM, socket="/run/x/libvirt-sock"),
        ),
        ("qemu+ssh://root@host/system", Location(Driver.SYSTEM, local=False)),
        ("qemu+tls://host/session", Location(Driver.SESSION, local=False)),
        ("qemu://host/system", Location(Driver.SYSTEM, local=False)),
        ("qemu+ext:///system?command=/x", Location(Driver.SYSTEM, local=False)),
    ],
)
def test_a_uri_says_which_driver_and_whether_it_is_here(uri: str, location: Location) -> None:
    assert parse_uri(uri) == location


@pytest.mark.parametrize(
    "uri", ["test:///default", "xen:///", "lxc+ssh://h/", "http://[", "qemux:///s"]
)
def test_other_drivers_are_refused(uri: str) -> None:
    with pytest.raises((Unsupported, InvalidRequest)):
        parse_uri(uri)


@pytest.mark.parametrize("uri", ["qemu:///embed", "qemu:///embed?root=", "qemu:///embed?root=a/b"])
def test_an_embedded_root_must_be_absolute(uri: str) -> None:
    with pytest.raises(InvalidRequest, match="absolute"):
        parse_uri(uri)


# --- libvirt's errors, as libvirt 9.0 reported them ----------------------------------------------


@pytest.mark.parametrize(
    ("code", "origin", "text", "expected"),
    [
        (42, 10, "Domain not found: no domain with matching name 'zz'", NoDomain),
        (103, 10, "Domain checkpoint not found: no domain checkpoint", NoCheckpoint),
        (
            109,
            10,
            "checkpoint inconsistent: missing or broken bitmap 'c1' for disk 'vda'",
            BitmapBroken,
        ),
        (1, 10, "internal error: bitmap 'c1' not found in backing chain of 'vda'", BitmapBroken),
        (9, 20, "operation failed: domain moment c1 already exists", CheckpointExists),
        (
            1,
            10,
            "internal error: unable to execute QEMU command 'transaction': "
            "Bitmap already exists: c1",
            CheckpointExists,
        ),
        (29, 69, "operation forbidden: read only access prevents x", ReadOnlyConnection),
        (
            68,
            10,
            "Timed out during operation: cannot acquire state change lock (held by monitor=x)",
            Busy,
        ),
        (55, 10, "Requested operation is not valid: another backup job is already running", Busy),
        (83, 10, "block copy still active: disk 'vda' already in active block job", Busy),
        (55, 10, "Requested operation is not valid: domain is not running", OperationFailed),
        (38, 7, "Failed to connect socket to '/x': No such file or directory", ConnectionFailed),
        (1, 7, "internal error: client socket is closed", ConnectionFailed),
        (38, 10, "Unable to write to monitor: Broken pipe", OperationFailed),
        (5, 0, "no connection driver available for URI 'bogus'", ConnectionFailed),
        (84, 10, "Operation not supported: incremental backup is not supported yet", Unsupported),
        (67, 10, "unsupported configuration: checkpoint for disk vdb unsupported", Unsupported),
        (3, 18, "this function is not supported by the connection driver", Unsupported),
        (
            27,
            5,
            "XML error: expecting root element of 'domaincheckpoint', not 'a'",
            InvalidDocument,
        ),
        (92, 5, "XML document failed to validate against schema", InvalidDocument),
        (86, 10, "Guest agent is not responding: guest agent command timed out", GuestAgentFailed),
        (1, 10, "internal error: something else", OperationFailed),
        (-1, -1, "", OperationFailed),
    ],
)
def test_libvirts_errors_become_ours(
    code: int, origin: int, text: str, expected: type[CkptmgrError]
) -> None:
    assert classify(code, origin, text) is expected
    error = ours(code, origin, text, what="creating c1", domain="vm")
    assert type(error) is expected
    assert error.message == f"creating c1 failed for domain 'vm': {text}"
    if isinstance(error, BitmapBroken):
        assert error.disk == "vda"


def test_whoever_is_denied_a_socket_is_told_what_denies_and_what_to_allow() -> None:
    """By libvirt's backup job and by the monitor: the text is QEMU's."""
    refused = "Failed to bind socket to /srv/s/vm.sock: Permission denied"
    answer = '{"error":{"class":"GenericError","desc":"' + refused + '"}}'
    with pytest.raises(CommandFailed) as caught:
        parse_answer(answer, "nbd-server-start", "vm")
    passed_on = f"internal error: unable to execute QEMU command 'nbd-server-start': {refused}"
    for error in (refusal(caught.value), ours(1, 10, passed_on, what="x", domain="vm")):
        assert type(error) is OperationFailed
        for word in ("socket_directory", "AppArmor", "journalctl -k"):
            assert word in str(error.hint)


# --- the monitor ---------------------------------------------------------------------------------


def test_a_qmp_error_keeps_its_class() -> None:
    text = '{"id":"libvirt-4","error":{"class":"CommandNotFound","desc":"no nosuch here"}}'
    with pytest.raises(CommandFailed, match="no nosuch here") as caught:
        parse_answer(text, "nosuch", "vm")
    assert caught.value.error_class == "CommandNotFound"
    assert isinstance(caught.value, OperationFailed)


def test_a_qmp_answer_is_what_return_holds() -> None:
    assert parse_answer('{"return":{"a":[1]},"id":"x"}', "q", "vm") == {"a": [1]}


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", '{"error":"x"}'])
def test_what_is_not_qmp_is_an_error(text: str) -> None:
    with pytest.raises(OperationFailed, match="not QMP"):
        parse_answer(text, "query-block", "vm")


# --- the marker ----------------------------------------------------------------------------------


@given(
    st.none() | st.from_regex(NAME_PATTERN, fullmatch=True).filter(lambda name: len(name) <= 200),
    st.integers(0, 10**17),
)
def test_a_marker_comes_back(checkpoint: str | None, generation: int) -> None:
    marker = Marker(checkpoint, generation)
    assert parse_marker(format_marker(marker)) == marker


def test_a_marker_is_read_with_its_namespace_and_written_without() -> None:
    text = "<ckptmgr:current xmlns:ckptmgr='urn:ckptmgr:1' checkpoint='c3' generation='7'/>"
    assert parse_marker(text) == Marker("c3", 7)
    assert "xmlns" not in format_marker(Marker("c3", 7))


@pytest.mark.parametrize(
    "text",
    [
        "<current/>",
        "<current generation='-1'/>",
        "<current generation='x'/>",
        "<other generation='1'/>",
        "<current checkpoint='../../etc' generation='1'/>",
        "<current checkpoint='' generation='1'/>",
        "<current generation='1'",
    ],
)
def test_a_foreign_marker_is_refused(text: str) -> None:
    with pytest.raises(InvalidDocument, match="marker"):
        parse_marker(text)


# --- freezing ------------------------------------------------------------------------------------


class Guest:
    """Records what is done to it; fails as told."""

    def __init__(self, *, freeze_fails: bool = False, thaw_failures: int = 0) -> None:
        self.calls: list[str] = []
        self.frozen = False
        self._freeze_fails = freeze_fails
        self._thaw_failures = thaw_failures

    def freeze(self) -> None:
        self.calls.append("freeze")
        self.frozen = True
        if self._freeze_fails:
            raise OperationFailed("agent timed out")

    def thaw(self) -> None:
        self.calls.append("thaw")
        if self._thaw_failures:
            self._thaw_failures -= 1
            raise OperationFailed("agent went away")
        self.frozen = False


def test_the_guest_is_thawed_once_after_the_block() -> None:
    guest = Guest()
    with frozen(guest.freeze, guest.thaw, domain="vm", timeout=60):
        assert guest.frozen
    assert guest.calls == ["freeze", "thaw"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_every_exception_of_the_block_thaws_and_comes_out(error: type[BaseException]) -> None:
    guest = Guest()
    with pytest.raises(error), frozen(guest.freeze, guest.thaw, domain="vm", timeout=60):
        raise error
    assert not guest.frozen


def test_a_freeze_that_failed_thaws_all_the_same() -> None:
    guest = Guest(freeze_fails=True)
    with (
        pytest.raises(GuestAgentFailed, match=r"not frozen.*agent timed out"),
        frozen(guest.freeze, guest.thaw, domain="vm", timeout=60),
    ):
        pytest.fail("the block must not run")
    assert not guest.frozen


def test_a_thaw_that_fails_is_tried_again_and_then_an_error() -> None:
    guest = Guest(thaw_failures=2)
    with frozen(guest.freeze, guest.thaw, domain="vm", timeout=60):
        pass
    assert not guest.frozen
    lost = Guest(thaw_failures=99)
    with (
        pytest.raises(GuestAgentFailed, match="may still be frozen"),
        frozen(lost.freeze, lost.thaw, domain="vm", timeout=60),
    ):
        pass


def test_a_failed_thaw_never_hides_the_first_error() -> None:
    guest = Guest(thaw_failures=99)
    with (
        pytest.raises(ValueError, match="first") as caught,
        frozen(guest.freeze, guest.thaw, domain="vm", timeout=60),
    ):
        raise ValueError("first")
    assert any("may still be frozen" in note for note in caught.value.__notes__)


def test_a_guest_is_thawed_at_the_deadline_and_the_result_disowned() -> None:
    guest = Guest()
    with (
        pytest.raises(GuestAgentFailed, match="thawed after"),
        frozen(guest.freeze, guest.thaw, domain="vm", timeout=0.05),
    ):
        deadline = time.monotonic() + 30
        while guest.frozen and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not guest.frozen
    assert guest.calls == ["freeze", "thaw"]


def test_no_timer_is_left_behind() -> None:
    before = threading.active_count()
    guest = Guest()
    with frozen(guest.freeze, guest.thaw, domain="vm", timeout=60):
        pass
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
