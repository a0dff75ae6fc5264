"""The hook's shell script: who it is for, what it costs, and that it is never in the way.

Run as libvirt runs it, with a stand-in for Python that notes how it was called.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from shlex import quote

import pytest

from ckptmgr.cli import main
from ckptmgr.hook.installation import install, setting, status, uninstall
from ckptmgr.hook.script import STOPPED, Setting, script
from ckptmgr.store import DomainRecord, DomainStore, Store

UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"
MARKER = (
    '<ckptmgr:current xmlns:ckptmgr="urn:ckptmgr:1" checkpoint="{name}" generation="{number}"/>'
)

SHELLS = [shell for shell in ("dash", "bash") if any(
    os.access(f"{folder}/{shell}", os.X_OK) for folder in ("/bin", "/usr/bin")
)]  # fmt: skip


def domain(marker: str = "", *, uuid: str = UUID, more: str = "") -> str:
    """A domain's XML as libvirt lays it out."""
    metadata = f"  <metadata>\n    {marker}\n  </metadata>\n" if marker else ""
    return (
        f"<domain type='kvm' id='1'>\n  <name>my vm</name>\n  <uuid>{uuid}</uuid>\n{metadata}"
        f"  <devices>\n    {more}\n  </devices>\n</domain>\n"
    )


def marked(name: str, number: int, more: str = "") -> str:
    return domain(MARKER.format(name=name, number=number), more=more)


class Hook:
    """The installed hook, with a store that knows one domain."""

    def __init__(self, folder: Path, shell: str) -> None:
        self.folder = folder
        self.shell = shell
        self.store: DomainStore = Store(folder / "the store").domain(UUID)
        with self.store.lock(0):
            self.store.save_record(DomainRecord("my vm", "c2", 7))
        self.called = folder / "called"
        python = folder / "a python"
        python.write_text(
            f"#!/bin/sh\ncalled={quote(str(self.called))}\n"
            'echo "$*" >> "$called"\ncat > "$called.xml"\n'
            'echo "stdout"; echo "stderr" >&2; exit 3\n'
        )
        python.chmod(0o755)
        self.run_folder = folder / "run"
        self.run_folder.mkdir()
        self.path = folder / "hooks/qemu.d/ckptmgr"
        install(folder / "hooks", Setting(folder / "the store", python, folder))
        # where libvirt's status files are cannot be chosen by users
        text = self.path.read_text()
        assert "run=/run/libvirt/qemu\n" in text
        self.path.write_text(
            text.replace("run=/run/libvirt/qemu\n", f"run={quote(str(self.run_folder))}\n")
        )

    @property
    def note(self) -> Path:
        return self.store.path / STOPPED

    def event(self, xml: str | bytes, *words: str) -> list[str]:
        """Call it; returns how Python was called, as a list of lines."""
        self.called.unlink(missing_ok=True)
        data = xml.encode() if isinstance(xml, str) else xml
        done = subprocess.run(
            [self.shell, str(self.path), "my vm", *words, "-"],
            input=data,
            capture_output=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0
        return self.called.read_text().splitlines() if self.called.exists() else []

    def prepare(self, xml: str | bytes) -> list[str]:
        return self.event(xml, "prepare", "begin")

    def stop(self, xml: str, status: str) -> None:
        (self.run_folder / "my vm.xml").write_text(status)
        assert self.event(xml, "stopped", "end") == []

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.store.path.iterdir()}


@pytest.fixture(name="hook", params=SHELLS)
def hook_fixture(request: pytest.FixtureRequest, tmp_path: Path) -> Hook:
    return Hook(tmp_path, request.param)


RUNNING = "<domstatus state='running' reason='booted' pid='1'>\n  <job type='{0}' async='{1}'/>\n"
DESTROYED = RUNNING.format("destroy", "none")
REVERTING = RUNNING.format("none", "start")
FAILED = REVERTING.replace("reason='booted'", "reason='starting up'")


def test_an_ordinary_start_does_not_start_python(hook: Hook) -> None:
    hook.stop(marked("c2", 7), DESTROYED)
    assert hook.prepare(marked("c2", 7)) == []


def test_an_older_marker_is_looked_at(hook: Hook) -> None:
    (call,) = hook.prepare(marked("c1", 5))
    assert call.split(" -m ")[1] == (
        f"ckptmgr.hook {hook.folder}/the store {UUID} start "
        f"{hook.folder}/hooks/qemu.d/../../qemu/my vm.xml"
    )
    assert (hook.folder / "called.xml").read_text() == marked("c1", 5).rstrip("\n")
    # the same checkpoint of an earlier time
    assert len(hook.prepare(marked("c2", 6))) == 1
    # a snapshot older than the first checkpoint
    assert len(hook.prepare(domain())) == 1


def test_a_revert_is_known_by_the_job_that_ended_qemu_though_the_marker_is_the_same(
    hook: Hook,
) -> None:
    hook.stop(marked("c2", 7), REVERTING)
    assert hook.note.read_text().startswith("revert\n<domain ")
    (call,) = hook.prepare(marked("c2", 7))
    assert " revert " in call
    # but for the start that comes next, and not for those after it
    assert hook.prepare(marked("c2", 7)) == []


def test_a_start_that_failed_is_no_revert(hook: Hook) -> None:
    hook.stop(marked("c2", 7), FAILED)
    assert hook.prepare(marked("c2", 7)) == []


def test_a_snapshot_that_a_stopped_domain_loads_is_known_by_its_live_form(hook: Hook) -> None:
    hook.stop(marked("c2", 7), DESTROYED)
    (call,) = hook.prepare(marked("c2", 7, "<disk><backingStore/></disk>"))
    assert " off " in call


def test_a_restore_of_saved_memory_is_no_revert(hook: Hook) -> None:
    assert hook.event(marked("c1", 5), "restore", "begin") == []
    assert hook.prepare(marked("c1", 5, "<backingStore/>")) == []
    assert len(hook.prepare(marked("c1", 5))) == 1


def test_no_current_checkpoint_and_no_marker_is_an_ordinary_start(hook: Hook) -> None:
    with hook.store.lock(0):
        hook.store.save_record(DomainRecord("my vm", None, 8))
    assert hook.prepare(domain()) == []
    assert len(hook.prepare(marked("c1", 5))) == 1


def test_how_qemu_ended_is_noted_with_its_disks_for_our_domains_alone(hook: Hook) -> None:
    xml = marked("c2", 7, "<disk type='file'><source file='/img/überlay \"x\"'/></disk>")
    hook.stop(xml, DESTROYED)
    assert hook.note.read_text() == "stop\n" + xml
    assert hook.note.stat().st_mode & 0o077 == 0
    assert hook.prepare(xml.replace("<disk", "<Disk")) == []
    assert hook.note.read_bytes() == b""
    other = domain(uuid="0" * 8 + UUID[8:])
    hook.stop(other, DESTROYED)
    assert hook.note.read_bytes() == b""
    assert [each.name for each in hook.store.path.parent.iterdir()] == [UUID]


@pytest.mark.parametrize(
    "words",
    [
        ("start", "begin"),
        ("started", "begin"),
        ("release", "end"),
        ("migrate", "begin"),
        ("reconnect", "begin"),
        ("attach", "begin"),
        ("prepare", "end"),
        ("", ""),
    ],
)
def test_other_events_are_none_of_its_business(hook: Hook, words: tuple[str, str]) -> None:
    before = hook.files()
    assert hook.event(marked("c1", 5), *words) == []
    assert hook.files() == before


GARBAGE = {
    "nothing": b"",
    "noise": bytes(range(256)) * 400,
    "NUL": b"\0" * 100_000,
    "no domain": b"<network><uuid>" + UUID.encode() + b"</uuid></network>",
    "long": b"<domain type='kvm'>" + b"<" * 300_000,
    "no uuid": b"<domain type='kvm'><name>x</name></domain>",
    "path": b"<domain type='kvm'><uuid>../../../../etc</uuid></domain>",
    "command": b"<domain type='kvm'><uuid>$(touch /tmp/x)`id`;x</uuid></domain>",
    "short": b"<domain type='kvm'><uuid>6695eb01</uuid></domain>",
    "upper case": b"<domain type='kvm'><uuid>" + UUID.upper().encode() + b"</uuid></domain>",
    "late": b"<domain type='kvm'>" + b" " * 5000 + b"<uuid>" + UUID.encode() + b"</uuid></domain>",
}


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("words", [("prepare", "begin"), ("stopped", "end"), ("restore", "begin")])
def test_garbage_changes_nothing(hook: Hook, kind: str, words: tuple[str, str]) -> None:
    before = hook.files()
    assert hook.event(GARBAGE[kind], *words) == []
    assert hook.files() == before


def test_a_damaged_or_unreadable_store_keeps_no_domain_from_starting(hook: Hook) -> None:
    record = hook.store.path / "domain.json"
    record.write_bytes(b"\xff{{{")
    assert len(hook.prepare(marked("c2", 7))) == 1  # Python says what to make of it
    record.unlink()
    assert hook.prepare(marked("c2", 7)) == []
    record.mkdir()
    assert hook.prepare(marked("c2", 7)) == []
    hook.stop(marked("c2", 7), DESTROYED)
    assert hook.note.read_bytes() == b""


def test_a_python_that_is_gone_keeps_no_domain_from_starting(hook: Hook) -> None:
    (hook.folder / "a python").unlink()
    assert hook.prepare(marked("c1", 5)) == []


def test_a_name_that_a_shell_would_act_on_is_just_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "$(touch x) 'y' \"z\""
    folder.mkdir()
    hook = Hook(folder, "sh")
    assert len(hook.prepare(marked("c1", 5))) == 1
    (call,) = hook.called.read_text().splitlines()
    assert str(folder / "the store") in call


def test_python_s_part_takes_garbage_too(tmp_path: Path) -> None:
    from ckptmgr.hook.__main__ import main

    for arguments in ([], ["x"], [str(tmp_path), "no uuid", "start", "/x"]):
        assert main(arguments) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("streams", ["2>/dev/full", "2>&-", ">&- 2>&-"])
def test_python_s_part_exits_with_0_where_nobody_hears_it(streams: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -m ckptmgr.hook store uuid {streams}', sys.executable],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_the_script_is_what_status_compares_with(tmp_path: Path) -> None:
    wanted = setting(tmp_path / "store")
    install(tmp_path, wanted)
    found = status(tmp_path, wanted)
    assert (found.installed, found.current) == (True, True)
    found.path.write_text(script(wanted).replace("umask 077", "umask 022"))
    assert not status(tmp_path, wanted).current
    found.path.chmod(0o644)
    assert not status(tmp_path, wanted).installed
    assert uninstall(tmp_path)


def test_the_hook_itself_is_no_other_hook_however_its_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = setting(Path("store"), Path("bin/python"))
    assert wanted.python == tmp_path / "bin" / "python"
    assert setting(Path("store"), Path("python3")).python == Path("python3")
    path = install(Path("hooks"), wanted)
    other = path.with_name("other")
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    assert status(Path("hooks"), wanted).others == (str(other),)


def test_uninstall_removes_what_a_killed_install_left(tmp_path: Path) -> None:
    path = install(tmp_path, setting(tmp_path / "store"))
    left = path.with_name(".ckptmgr.new")
    path.rename(left)
    assert status(tmp_path, setting(tmp_path / "store")).others == ()
    assert not uninstall(tmp_path)
    assert not left.exists()


def test_a_dry_run_refuses_a_hook_that_is_not_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = install(tmp_path, setting(tmp_path / "store"))
    path.write_text("#!/bin/sh\n")
    for command in ("install", "uninstall"):
        assert main(["hook", command, "--directory", str(tmp_path), "--dry-run"]) == 1
        assert "did not write" in capsys.readouterr().err
    assert path.read_text() == "#!/bin/sh\n"
