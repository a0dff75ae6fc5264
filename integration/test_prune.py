"""Pruning repositories of real images: every point that stays shows the same bytes, always."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckptmgr
from ckptmgr import Retention
from ckptmgr.backup.block import BLOCK
from ckptmgr.backup.repository import Repository
from ckptmgr.cli import main
from ckptmgr.errors import RepositoryDamaged

from .kept_points import Kept, changed, seen, shown
from .pruned import SIZE, damage, let_go, points_path, require_tidy, tree, week

SLOW = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    "gone",
    ["mo", "tu", "we", "sa", "mo tu", "we th", "mo tu we th fr"],
)
def test_what_stays_shows_the_same_bytes(tmp_path: Path, gone: str, compress: bool) -> None:
    kept = week(tmp_path / "repo", compress=compress)
    kept.require()
    let_go(kept, *gone.split())
    kept.require({"mo", "tu", "we", "th", "fr", "sa"} - set(gone.split()))
    require_tidy(kept)
    points = kept.lineage.load().points
    if gone == "tu":  # the tree closes over what went
        assert points.parent("we") == points.parent("fr") == "mo"
        assert points.disk("we", "vdb").base == "mo"
    if gone == "mo tu we th fr":
        assert points.disk("sa", "vda").mode == "full"
        assert points.get("sa").parent is None
        header = json.loads(
            subprocess.run(
                ["qemu-img", "info", "--output=json", points_path(kept, "sa", "vda")],
                check=True,
                capture_output=True,
            ).stdout
        )
        assert "backing-filename" not in header
        assert (header["format-specific"]["data"]["compression-type"] == "zstd") == compress


sizes = st.sampled_from([3 * BLOCK, 5 * BLOCK + 512, 8 * BLOCK, 8 * BLOCK - 1024, 11 * BLOCK])


@pytest.mark.thorough
@SLOW
@given(data=st.data())
def test_any_tree_of_any_sizes_keeps_its_bytes_whatever_goes(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kept = Kept.at(tmp_path_factory.mktemp("prune") / "repo")
    names = [f"p{number}" for number in range(data.draw(st.integers(2, 8)))]
    for number, name in enumerate(names):
        parent = data.draw(st.sampled_from(names[:number])) if number else None
        targets = data.draw(st.sets(st.sampled_from(["vda", "vdb"]), min_size=1))
        contents = {}
        for target in sorted(targets):
            before = b"" if parent is None else kept.contents[parent].get(target, b"")
            seed = data.draw(st.integers(0, 1 << 30))
            contents[target] = changed(before, seed, size=data.draw(sizes))
        full = data.draw(st.sets(st.sampled_from(["vda", "vdb"]), max_size=1))
        again = data.draw(st.sets(st.integers(0, 10), max_size=3))
        compress = data.draw(st.booleans())
        kept.add(name, parent, contents, full=full, again=again, compress=compress)
    kept.require(qemu=False)
    left = set(names)
    while len(left) > 1:
        gone = data.draw(st.sets(st.sampled_from(sorted(left)), min_size=1, max_size=len(left) - 1))
        let_go(kept, *gone)
        left -= gone
        kept.require(left, qemu=False)
        require_tidy(kept, check=False)
    kept.require()
    require_tidy(kept)
    shutil.rmtree(kept.repository)


@pytest.mark.parametrize("compress", [False, True])
def test_what_a_smaller_image_hid_stays_hidden(tmp_path: Path, compress: bool) -> None:
    """The disk shrank into the middle of a block, and grew; no image holds that block anew."""
    kept = Kept.at(tmp_path / "repo")
    content = random.Random(8).randbytes(8 * BLOCK)
    more: dict[str, Any] = {"edges": False, "compress": compress}
    kept.add("mo", None, {"vda": content}, **more)
    content = content[: 3 * BLOCK] + b"tuesday " * (BLOCK // 8) + content[4 * BLOCK :]
    kept.add("tu", "mo", {"vda": content}, **more)
    short = content[: 3 * BLOCK + 512]
    kept.add("we", "tu", {"vda": short}, **more)
    kept.add("th", "we", {"vda": seen(short, 7 * BLOCK)}, **more)
    kept.add("fr", "we", {"vda": seen(short, 3 * BLOCK + 1024)}, **more)

    def require_shown(*names: str) -> None:
        assert set(kept.lineage.load().points.manifests) == set(names)
        for name in names:
            assert shown(points_path(kept, name, "vda")) == kept.contents[name]["vda"]

    require_shown("mo", "tu", "we", "th", "fr")
    copy = tmp_path / "copy"
    shutil.copytree(kept.repository, copy)
    let_go(kept, "we")  # tu, on which it stood, still has all of that block
    require_shown("mo", "tu", "th", "fr")
    let_go(kept, "tu")
    kept.require({"mo", "th", "fr"})
    require_tidy(kept)
    kept = Kept(Repository(copy).lineage(kept.lineage.key), kept.contents)
    let_go(kept, "we", "tu")  # both at once
    kept.require({"mo", "th", "fr"})
    require_tidy(kept)


def test_a_damaged_block_stops_the_prune_and_nothing_is_lost(tmp_path: Path) -> None:
    kept = Kept.at(tmp_path / "repo")
    content = random.Random(1).randbytes(SIZE)
    kept.add("mo", None, {"vda": content})
    middle = content[: 3 * BLOCK] + random.Random(2).randbytes(BLOCK) + content[4 * BLOCK :]
    kept.add("tu", "mo", {"vda": middle})
    kept.add("we", "tu", {"vda": middle[:-BLOCK] + random.Random(3).randbytes(BLOCK)})
    damage(points_path(kept, "tu", "vda"), middle[3 * BLOCK : 3 * BLOCK + 64])
    before = tree(kept.repository)
    with pytest.raises(
        RepositoryDamaged, match=f"vda of restore point tu .* {3 * BLOCK} on"
    ) as error:
        let_go(kept, "tu")
    assert "ckptmgr verify" in (error.value.hint or "")
    assert tree(kept.repository) == before


@pytest.mark.parametrize(
    "kind", ["image cut", "image gone", "no image", "digests", "other digests"]
)
def test_a_damaged_file_stops_the_prune_and_nothing_is_lost(tmp_path: Path, kind: str) -> None:
    kept = week(tmp_path / "repo")
    image = points_path(kept, "tu", "vda")
    digests = image.with_name("vda.digests")
    match kind:
        case "image cut":
            os.truncate(image, image.stat().st_size - 3 * BLOCK)
        case "image gone":
            image.unlink()
        case "no image":
            image.write_bytes(b"no qcow2" * 1000)
        case "digests":
            damage(digests, b"ckptmgr")
        case "other digests":
            shutil.copy(kept.lineage.path / "we" / "vda.digests", digests)
    before = tree(kept.repository)
    with pytest.raises(RepositoryDamaged, match="vda"):
        let_go(kept, "tu")
    assert tree(kept.repository) == before


def test_an_image_that_points_elsewhere_is_not_followed(tmp_path: Path) -> None:
    kept = week(tmp_path / "repo")
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * BLOCK)
    image = points_path(kept, "tu", "vda")
    image.unlink()
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={secret}", image, str(SIZE)],
        check=True,
    )
    with pytest.raises(RepositoryDamaged, match="header"):
        let_go(kept, "tu")


def test_a_point_with_a_restored_overlay_stays_as_long_as_that_is_there(tmp_path: Path) -> None:
    kept = week(tmp_path / "repo")
    overlay = tmp_path / "restored" / "web.qcow2"
    overlay.parent.mkdir()
    image = points_path(kept, "tu", "vda")
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(image), str(overlay)],
        check=True,
    )
    record = kept.lineage.path / "tu" / "overlays.json"
    record.write_text(json.dumps([{"path": str(overlay), "created": 1795338000}]))
    catalogue = ckptmgr.repository(kept.repository)
    view = catalogue.prune(Retention(last=1))
    stays = {point.name: point.reasons for point in view.points if point.stays}
    assert stays == {
        "tu": (f"restored as {overlay}",),
        "fr": ("newest of vdb",),  # which sa left out
        "sa": ("newest", "last"),
    }
    kept.require({"tu", "fr", "sa"})
    assert shown(overlay) == kept.contents["tu"]["vda"]
    # It has been flattened: nothing stands on the point any more.
    subprocess.run(["qemu-img", "rebase", "-q", "-b", "", "-f", "qcow2", str(overlay)], check=True)
    catalogue.prune(Retention(last=1))
    kept.require({"fr", "sa"})
    assert shown(overlay) == kept.contents["tu"]["vda"]


def test_a_damaged_point_is_not_robbed_of_what_it_stands_on(tmp_path: Path) -> None:
    kept = week(tmp_path / "repo")
    (kept.lineage.path / "we" / "manifest.json").write_bytes(b"{}")
    view = ckptmgr.repository(kept.repository).prune(Retention(last=1))
    stays = {point.name: point.reasons for point in view.points if point.stays}
    # th and sa stood on it: nothing is known that could replace them.
    assert set(stays) == {"tu", "th", "fr", "sa"}
    assert stays["th"] == stays["sa"] == ("broken",)
    assert stays["tu"] == ("we, damaged, stands on it",)
    assert [damage.point for damage in view.damaged] == ["we"]
    for name, disk in [("tu", "vda"), ("fr", "vdb")]:
        assert shown(points_path(kept, name, disk)) == kept.contents[name][disk]
    for disk in ("vda", "vdb"):  # its images are still whole
        assert shown(kept.lineage.path / "we" / f"{disk}.qcow2") == kept.contents["we"][disk]


# --- the command ---------------------------------------------------------------------------------


def test_a_dry_run_shows_a_calendar_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = week(tmp_path / "repo")
    before = tree(kept.repository)
    words = ["prune", str(kept.repository), "--keep-last", "2", "--keep-weekly", "2"]
    assert main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if "2026-" in line]
    assert [row.split()[0] for row in rows] == ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri"]
    assert rows[0].split()[5:] == ["mo", "stays", "weekly"]
    assert rows[1].split()[5:] == ["tu", "goes"]
    assert rows[4].split()[5:8] == ["fr", "stays", "last,"]
    assert rows[4].endswith("last, newest of vdb; vda vdb merged with what goes")
    assert "newest, last, weekly" in rows[5]
    assert "3 of 6 points would go" in out
    assert tree(kept.repository) == before
    assert main(words) == 0
    assert capsys.readouterr().out.split() == ["tu", "we", "th"]
    kept.require({"mo", "fr", "sa"})


def test_points_of_another_domain_stay(tmp_path: Path) -> None:
    kept = week(tmp_path / "repo")
    other = "0a1b2c3d-0000-4000-8000-97f2502e193f"
    kept.add("test1", "tu", {"vda": changed(kept.contents["tu"]["vda"], 5)}, uuid=other)
    kept.add("test2", "test1", {"vda": changed(kept.contents["test1"]["vda"], 6)}, uuid=other)
    catalogue = ckptmgr.repository(kept.repository)
    catalogue.prune(Retention(last=1), kept.lineage.key)
    kept.require({"fr", "sa", "test1", "test2"})
    catalogue.prune(Retention(last=1))
    kept.require({"fr", "sa", "test2"})
