"""Verifying repositories of real images: damage is found, named, and never a traceback."""

from __future__ import annotations

import errno
import json
import os
import re
import select
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckptmgr
from ckptmgr.backup.block import BLOCK
from ckptmgr.backup.repository import Repository
from ckptmgr.cli import main
from ckptmgr.engine import qemu_img

from .kept_points import Kept, peek, shown
from .pruned import calls_of, copies, damage, fork, killed_at, points_path, tree, week

BLOCKS = range(0, 12 * BLOCK, BLOCK)
ALL = {"mo", "tu", "we", "th", "fr", "sa"}


def found(kept: Kept, *words: str) -> dict[str, Any]:
    """The document of verify, of another process; its exit status fits."""
    done = subprocess.run(
        [sys.executable, "-m", "ckptmgr", "verify", str(kept.repository), *words, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    document: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if document["sound"] else 4)
    return document


def faults(kept: Kept) -> list[tuple[str, str | None, str | None, set[str]]]:
    """Code, point, disk and affected points of each finding that is not harmless."""
    view = ckptmgr.repository(kept.repository).verify()
    return [
        (each.code, each.point, each.disk, set(each.affected))
        for each in view.findings
        if not each.harmless
    ]


@pytest.fixture(name="whole", scope="module")
def whole_fixture(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """A repository that nobody changes."""
    return week(tmp_path_factory.mktemp("whole") / "repo")


@pytest.fixture(name="kept")
def kept_fixture(whole: Kept, tmp_path: Path) -> Kept:
    """A copy with fresh file times, all of them in the wrong order."""
    shutil.copytree(whole.repository, tmp_path / "repo", copy_function=shutil.copyfile)
    for age, path in enumerate(sorted((tmp_path / "repo").rglob("*"), reverse=True)):
        os.utime(path, (age, age))
    return Kept(Repository(tmp_path / "repo").lineage(whole.lineage.key), whole.contents)


def test_a_sound_repository_is_sound_and_stays_as_it_is(kept: Kept) -> None:
    before = tree(kept.repository)
    assert found(kept) == {"sound": True, "points": 6, "findings": []}
    assert found(kept, "web", "fr") == {"sound": True, "points": 3, "findings": []}
    assert tree(kept.repository) == before


def test_a_flipped_bit_of_data_is_found_with_all_that_stands_on_it(kept: Kept) -> None:
    image = points_path(kept, "tu", "vdb")
    content = kept.contents["tu"]["vdb"]
    block = next(
        number
        for number in range(12)
        if any(content[number * BLOCK : number * BLOCK + 64])
        and content[number * BLOCK :][:64] != kept.contents["mo"]["vdb"][number * BLOCK :][:64]
    )
    damage(image, content[block * BLOCK : block * BLOCK + 64])
    document = found(kept)
    (finding,) = document["findings"]
    assert (finding["code"], finding["point"], finding["disk"]) == ("damaged-data", "tu", "vdb")
    assert finding["affected"] == ["tu", "we", "th", "fr"]
    assert finding["domain"] == "web"
    assert str(image) in finding["message"]
    assert f"byte {block * BLOCK} " in finding["message"]
    assert not found(kept, "web", "fr")["sound"]
    assert found(kept, "web", "mo")["sound"]


def test_an_image_that_cannot_be_read_is_named_with_all_that_stands_on_it(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all others it is still told whether they are whole."""
    image = points_path(kept, "tu", "vdb")
    block, at = next(
        (number, at)
        for number, data in enumerate(kept.contents["tu"]["vdb"][each:][:64] for each in BLOCKS)
        if any(data) and (at := image.read_bytes().find(data)) > 0
    )
    rule = {"event": "none", "iotype": "read", "sector": at // 512 + 3, "errno": errno.EIO}

    usual = qemu_img.image_name

    def name(path: str, *arguments: Any, **options: Any) -> str:
        named = json.loads(usual(path, *arguments, **options).removeprefix("json:"))
        if Path(path) == image:
            named["file"] = {"driver": "blkdebug", "image": named["file"], "inject-error": [rule]}
        return "json:" + json.dumps(named)

    monkeypatch.setattr(qemu_img, "image_name", name)
    shutil.rmtree(kept.lineage.path / "sa")
    view = ckptmgr.repository(kept.repository).verify()
    (finding,) = view.findings
    assert (finding.code, finding.point, finding.disk) == ("unreadable-image", "tu", "vdb")
    assert set(finding.affected) == {"tu", "we", "th", "fr"}
    where = f"disk vdb cannot be read at offset {block * BLOCK + 3 * 512}: Input/output error"
    assert where in finding.message


def test_a_deleted_middle_point_is_named(kept: Kept) -> None:
    shutil.rmtree(kept.lineage.path / "we")
    assert faults(kept) == [
        ("missing-point", "we", "vda", {"th", "sa"}),
        ("missing-point", "we", "vdb", {"th"}),
    ]


def test_a_damaged_manifest_is_named_with_all_that_stands_on_the_point(kept: Kept) -> None:
    (kept.lineage.path / "tu" / "manifest.json").write_bytes(b"{}")
    assert faults(kept) == [("damaged-manifest", "tu", None, ALL - {"mo"})]
    document = found(kept, "web", "mo")
    assert document["sound"]
    assert not found(kept, "web", "tu")["sound"]
    assert not found(kept, "web", "sa")["sound"]


def test_a_point_that_was_replaced_is_noticed(kept: Kept, tmp_path: Path) -> None:
    other = Kept.at(tmp_path / "other")
    other.add("we", None, {"vda": bytes(12 * BLOCK), "vdb": bytes(12 * BLOCK)})
    shutil.rmtree(kept.lineage.path / "we")
    shutil.copytree(other.lineage.path / "we", kept.lineage.path / "we")
    path = kept.lineage.path / "we" / "manifest.json"
    from dataclasses import replace

    from ckptmgr.backup.manifest import format_manifest, new_id, parse_manifest

    path.write_bytes(format_manifest(replace(parse_manifest(path.read_bytes()), id=new_id())))
    assert faults(kept) == [
        ("replaced-point", "we", "vda", {"th", "sa"}),
        ("replaced-point", "we", "vdb", {"th"}),
    ]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - BLOCK)


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (cut, "image-size"),
        (longer, "image-size"),
        (Path.unlink, "missing-image"),
        (link, "damaged-header"),
        (fifo, "damaged-header"),
        (lambda path: path.write_bytes(b"x" * 999), "damaged-header"),
        (lambda path: os.truncate(path, 0), "damaged-header"),
    ],
    ids=["cut", "longer", "gone", "link", "fifo", "other", "empty"],
)
def test_an_image_that_is_not_the_file_it_was_is_named(
    kept: Kept, act: Callable[[Path], object], expected: str
) -> None:
    act(points_path(kept, "we", "vda"))
    seen = faults(kept)
    assert seen[0] == (expected, "we", "vda", {"we", "th", "sa"})
    assert all(fault[1:] == seen[0][1:] for fault in seen)


@pytest.mark.parametrize("kind", ["gone", "flipped", "older", "xml", "xml gone"])
def test_other_files_of_a_point_are_looked_at(kept: Kept, kind: str) -> None:
    folder = kept.lineage.path / "we"
    disk: str | None = "vda"
    affected = {"we", "th", "sa"}
    match kind:
        case "gone":
            (folder / "vda.digests").unlink()
        case "flipped":
            damage(folder / "vda.digests", b"ckptmgr")
        case "older":
            shutil.copy(kept.lineage.path / "tu" / "vda.digests", folder)
        case "xml":
            damage(folder / "domain.xml", b"kvm")
        case "xml gone":
            (folder / "domain.xml").unlink()
    expected = "damaged-digests"
    if "xml" in kind:
        disk, affected = None, {"we"}
        expected = "missing-file" if "gone" in kind else "damaged-file"
    assert faults(kept) == [(expected, "we", disk, affected)]


def l2_table(image: bytes) -> int:
    (l1,) = struct.unpack_from(">Q", image, 40)
    (table,) = struct.unpack_from(">Q", image, l1)
    return table & (1 << 56) - 512


def test_a_block_that_was_written_into_an_image_later_is_found(kept: Kept) -> None:
    path = points_path(kept, "we", "vda")
    length = path.stat().st_size
    before, parent = peek(path), kept.contents["tu"]["vda"]
    block = next(
        number
        for number in range(12)
        if before[number * BLOCK :][:BLOCK] == parent[number * BLOCK :][:BLOCK]
    )
    subprocess.run(
        ["qemu-io", "-c", f"write -P 0x55 {block * BLOCK} 64k", str(path)],
        check=True,
        capture_output=True,
    )
    assert path.stat().st_size != length
    codes = [fault[0] for fault in faults(kept)]
    assert codes == ["image-size", "unknown-data"]


def test_a_block_that_an_image_does_not_hold_any_more_is_found(kept: Kept) -> None:
    """Its entry is zero: what the base has is seen in its place, and no program notices."""
    path = points_path(kept, "we", "vda")
    image = bytearray(path.read_bytes())
    table = l2_table(bytes(image))
    first = next(n for n in range(12) if image[table + 8 * n : table + 8 * n + 8] != bytes(8))
    image[table + 8 * first : table + 8 * first + 8] = bytes(8)
    path.write_bytes(image)
    codes = {fault[0] for fault in faults(kept)}
    assert "missing-data" in codes


def test_an_image_with_another_backing_file_is_not_followed(kept: Kept) -> None:
    path = points_path(kept, "we", "vda")
    image = path.read_bytes().replace(b"../tu/vda.qcow2", b"../mo/vda.qcow2")
    path.write_bytes(image)
    assert faults(kept) == [("wrong-backing-file", "we", "vda", {"we", "th", "sa"})]


def test_what_lies_around_is_named_and_harms_nothing(kept: Kept) -> None:
    (kept.lineage.path / "we" / "notes.txt").touch()
    (kept.lineage.path / "lost").touch()
    (kept.lineage.path / f".su.{'0' * 16}.partial").mkdir()
    document = found(kept)
    assert document["sound"]
    assert [(each["code"], each["point"]) for each in document["findings"]] == [
        ("interrupted", None),
        ("stray", None),
        ("stray", "we"),
    ]
    assert all(each["harmless"] for each in document["findings"])


def test_damage_in_several_places_is_all_found(kept: Kept) -> None:
    points_path(kept, "fr", "vda").unlink()
    (kept.lineage.path / "sa" / "manifest.json").write_bytes(b"")
    (kept.lineage.path / "mo" / "domain.xml").write_bytes(b"")
    assert [fault[:2] for fault in faults(kept)] == [
        ("damaged-manifest", "sa"),
        ("damaged-file", "mo"),
        ("missing-image", "fr"),
    ]


@pytest.mark.thorough
def test_an_interrupted_prune_is_no_damage(tmp_path: Path) -> None:
    total = calls_of(tmp_path / "dry")
    interrupted = 0
    for number, kept in copies(fork(tmp_path / "original" / "repo"), tmp_path, total):
        if number < total * 2 // 3 and number % 7:  # the last third is where the names change
            continue
        killed_at(number, kept)
        view = ckptmgr.repository(kept.repository).verify()
        assert view.sound, [finding.message for finding in view.findings]
        interrupted += any(finding.code == "interrupted" for finding in view.findings)
    assert interrupted


@pytest.mark.thorough
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_to_any_file_is_found_or_harms_no_byte(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damage")
    kept = fork(folder / "repo")
    paths = sorted(path for path in kept.lineage.path.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from([path for path in paths if path.name != "lock"]))
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["bit", "zeroes", "cut", "text"]))
    place = data.draw(st.integers(0, len(content) - 1))
    match kind:
        case "bit":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        case "zeroes":
            content[place : place + 4096] = bytes(len(content[place : place + 4096]))
        case "cut":
            del content[place:]
        case "text":
            content[place : place + 3] = b"abc"
    path.write_bytes(content)
    view = ckptmgr.repository(kept.repository).verify()
    hit = path.parent.name
    for finding in view.findings:
        assert finding.point == hit, finding
    if view.sound:
        kept.require(qemu=True)
    else:
        assert any(hit in finding.affected for finding in view.findings)
    shutil.rmtree(folder)


def test_on_a_read_only_file_system_it_is_listed_and_verified(kept: Kept, tmp_path: Path) -> None:
    (kept.lineage.path / "lock").unlink()
    code = (
        "import subprocess, sys\n"
        "from ckptmgr.cli import main\n"
        "repo = sys.argv[1]\n"
        "subprocess.run(['mount', '--bind', repo, repo], check=True)\n"
        "subprocess.run(['mount', '-o', 'remount,bind,ro', repo], check=True)\n"
        "print([main([word, repo]) for word in ('points', 'verify')])\n"
        "print(main(['prune', repo, '--keep-last', '1']))\n"
    )
    options = [] if os.geteuid() == 0 else ["--map-root-user"]
    done = subprocess.run(
        ["unshare", "--mount", *options, sys.executable, "-c", code, str(kept.repository)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert "sound: 6 points" in done.stdout
    assert done.stdout.splitlines()[-2:] == ["[0, 0]", "1"]
    assert "Read-only file system" in done.stderr


def test_a_point_or_domain_that_is_not_there_is_told(
    kept: Kept, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["nobody"], ["web", "su"]):
        assert main(["verify", str(kept.repository), *words, "--json"]) == 3
        assert json.loads(capsys.readouterr().out)["error"]["code"] == "no-point"


def test_findings_for_people(kept: Kept, capsys: pytest.CaptureFixture[str]) -> None:
    points_path(kept, "fr", "vda").unlink()
    assert main(["verify", str(kept.repository)]) == 4
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("missing-image: disk vda of restore point fr: ")
    assert out[1:] == ["  affected: fr", "1 of 6 points cannot be trusted."]


def test_points_are_opened_without_ckptmgr_as_the_documentation_says(
    whole: Kept, tmp_path: Path
) -> None:
    text = (Path(__file__).parent.parent / "docs" / "repository.md").read_text(encoding="utf-8")
    commands = [line.split() for line in text.splitlines() if line.startswith("    qemu-img ")]
    assert [command[1] for command in commands] == ["info", "convert", "create"]
    content = whole.contents["fr"]["vda"]
    for command in commands:
        words = [
            word.replace("/REPO", "REPO")
            .replace("REPO", str(whole.repository))
            .replace("<uuid>", whole.lineage.key)
            .replace("friday", "fr")
            .replace("/var/tmp", str(tmp_path))
            for word in command
        ]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        if command[1] == "info":
            assert re.findall(r"image: .*/(\w+)/vda\.qcow2", done.stdout) == ["fr", "tu", "mo"]
    assert (tmp_path / "vda.raw").read_bytes() == content
    assert shown(tmp_path / "try.qcow2") == content
    image = str(points_path(whole, "fr", "vda"))
    with subprocess.Popen(
        ["qemu-nbd", "--read-only", "--format=qcow2", f"--socket={tmp_path}/nbd", image]
    ) as server:
        uri = f"nbd+unix:///?socket={tmp_path}/nbd"
        code = "import nbd, sys, time\nh = nbd.NBD()\n" + (
            "for _ in range(600):\n"
            "    try:\n"
            f"        h.connect_uri({uri!r})\n"
            "        break\n"
            "    except nbd.Error:\n"
            "        h = nbd.NBD(); time.sleep(0.1)\n"
            "sys.stdout.buffer.write(h.pread(h.get_size(), 0)); h.shutdown()\n"
        )
        done_ = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        assert done_.stdout == content
        server.wait()


@pytest.mark.thorough
def test_while_points_are_made_merged_and_removed_a_reader_finds_nothing_wrong(
    tmp_path: Path,
) -> None:
    kept = fork(tmp_path / "repo")
    code = (
        "import sys, pathlib\n"
        "from integration.kept_points import Kept, changed\n"
        "from integration.pruned import let_go\n"
        "from ckptmgr.backup.repository import Repository\n"
        "repo, key, content = sys.argv[1:]\n"
        "kept = Kept(Repository(pathlib.Path(repo)).lineage(key))\n"
        "last = 'we'\n"
        "kept.contents['we'] = {'vda': pathlib.Path(content).read_bytes()}\n"
        "for number in range(12):\n"
        "    name = f'p{number}'\n"
        "    kept.add(name, last, {'vda': changed(kept.contents[last]['vda'], number)})\n"
        "    if number:\n"
        "        let_go(kept, last)\n"
        "    last = name\n"
        "    print(name, flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    content = tmp_path / "we"
    content.write_bytes(kept.contents["we"]["vda"])
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(kept.repository), kept.lineage.key, str(content)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    seen: set[frozenset[str]] = set()
    while writer.poll() is None:
        # It goes on once this was seen, however fast or slow either of the two is.
        done = select.select([writer.stdout], [], [], 0)[0] and writer.stdout.readline()
        view = ckptmgr.repository(kept.repository).points()
        assert view.damaged == ()
        assert all(point.broken is None for point in view.points)
        seen.add(frozenset(point.name for point in view.points))
        verified = ckptmgr.repository(kept.repository).verify()
        assert verified.sound, [finding.message for finding in verified.findings]
        if done:
            writer.stdin.write(b"\n")
            writer.stdin.flush()
    assert writer.returncode == 0
    assert len(seen) >= 12
    assert found(kept)["sound"]
