"""docs/repository.md says what is in the files: read here by its words, without the package."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path

from blake3 import blake3
from pyroaring import BitMap64

from .repositories import SIZE, filled, write_digests

TEXT = (Path(__file__).parent.parent / "docs" / "repository.md").read_text(encoding="utf-8")


def test_a_file_of_digests_is_read_by_the_documentation(tmp_path: Path) -> None:
    blocks = {0: b"zero?", 1: b"", 2: b"", 5: b"five", 7: b"seven"}
    write_digests(tmp_path / "vda.digests", blocks)
    data = (tmp_path / "vda.digests").read_bytes()
    content, seal = data[:-32], data[-32:]
    assert hashlib.sha256(content).digest() == seal
    assert content[:18] == b"ckptmgr digests 1\n"
    block, size, count, first, second = struct.unpack("<IQQQQ", content[-36:])
    assert (block, size, count) == (65536, SIZE, 3)
    digests = content[18 : 18 + 32 * count]
    sets = content[18 + 32 * count : -36]
    assert len(sets) == first + second
    assert list(BitMap64.deserialize(sets[:first])) == [0, 5, 7]
    assert list(BitMap64.deserialize(sets[first:])) == [1, 2]
    for number, found in enumerate((0, 5, 7)):
        assert digests[32 * number : 32 * number + 32] == blake3(blocks[found]).digest()


def test_a_manifest_is_read_by_the_documentation(tmp_path: Path) -> None:
    lineage = filled(tmp_path / "repo", "monday", "tuesday")
    text = (lineage.path / "tuesday" / "manifest.json").read_text(encoding="ascii")
    members = json.loads(text)
    digest = members.pop("digest")
    plain = json.dumps(members, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(plain.encode("ascii")).hexdigest() == digest
    (example,) = re.findall(
        r"^    (\{\"format\": 1,.*?^     \"digest\"[^\n]*\})", TEXT, re.M | re.S
    )
    documented = json.loads(example)
    assert documented.keys() == members.keys() | {"digest"}
    for part in ("disks", "files"):
        assert documented[part][0].keys() == members[part][0].keys()
    for file in ("disks", "files"):
        for entry in members[file]:
            path = lineage.path / "tuesday" / entry["file"]
            assert path.stat().st_size == entry["bytes"]
            if "sha256" in entry:
                assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
            else:
                sums = (path.parent / entry["digests"]).read_bytes()
                assert hashlib.sha256(sums).hexdigest() == entry["digests_sha256"]
