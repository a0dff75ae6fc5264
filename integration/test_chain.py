"""A chain that is read without qemu-img is the one that qemu-img reports."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptmgr import qcow2
from ckptmgr.domain.chain import ask, read_here
from ckptmgr.domain.images import read_header
from ckptmgr.errors import OperationFailed
from integration.stand import await_greeting

run = functools.partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)


def create(path: Path, size: str = "8M", *options: str, below: str = "", form: str = "") -> Path:
    """A new qcow2 image with creation options."""
    words = [f"-o{option}" for option in options]
    if below:
        words += [f"-b{below}", f"-F{form}"]
    run(["qemu-img", "create", "-q", "-fqcow2", *words, str(path), size])
    return path


def bitmap(path: Path, name: str, *options: str) -> None:
    """Add a bitmap."""
    run(["qemu-img", "bitmap", "--add", *options, "--", str(path), name])


def patched(path: Path, offset: int, data: bytes) -> Path:
    """The image with other bytes at `offset`."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return path


# --- what is read here -----------------------------------------------------------------------


def options(*chosen: str) -> Callable[[Path], Path]:
    return lambda folder: create(folder / "a", "8M", *chosen)


def sized(size: str) -> Callable[[Path], Path]:
    return lambda folder: create(folder / "a", size)


def named(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        create(folder / "plain").rename(folder / name)
        overlay = create(folder / "top")
        run(["qemu-img", "rebase", "-u", f"-b./{name}", "-Fqcow2", str(overlay)])
        return overlay

    return make


def of_many_layers(folder: Path) -> Path:
    (folder / "sub").mkdir()
    (folder / "raw").write_bytes(b"x" * 5000)
    create(folder / "sub/b", "4M", below="../raw", form="raw")
    bitmap(folder / "sub/b", "old")
    create(folder / "sub/c", "8M", below=str(folder / "sub/b"), form="qcow2")
    (folder / "link").symlink_to(folder / "sub/c")
    top = create(folder / "top", "8M", "cluster_size=512", below="link", form="qcow2")
    bitmap(top, "new")
    return top


def with_bitmaps(folder: Path) -> Path:
    image = create(folder / "a")
    bitmap(image, "fine", "-g512")
    bitmap(image, "coarse", "-g2G", "--disable")
    bitmap(image, '-- größer, "so"')
    return image


def with_snapshots(folder: Path) -> Path:
    image = create(folder / "a")
    bitmap(image, "b")
    for name in ("one", "two"):
        run(["qemu-img", "snapshot", "-c", name, str(image)])
    return image


def written_by_who_knows_no_bitmaps(folder: Path) -> Path:
    return patched(with_bitmaps(folder), 88, bytes(8))  # autoclear features


HERE = {
    "version 2": options("compat=0.10"),
    "clusters of 512": options("cluster_size=512"),
    "clusters of 2M": options("cluster_size=2M"),
    "zstd": options("compression_type=zstd"),
    "refcounts of 1 bit": options("refcount_bits=1"),
    "refcounts of 64 bits": options("refcount_bits=64"),
    "lazy refcounts": options("lazy_refcounts=on"),
    "preallocated": options("preallocation=metadata"),
    "empty": sized("0"),
    "a sector": sized("512"),
    "odd": sized("1000001"),
    "large": sized("4T"),
    "spaces": named("a b"),
    "commas and colons": named("a,b:c"),
    "quotes": named("a'\"\\{"),
    "letters": named("größe-日本"),
    "many layers": of_many_layers,
    "bitmaps": with_bitmaps,
    "snapshots": with_snapshots,
    "stale bitmaps": written_by_who_knows_no_bitmaps,
}


@pytest.mark.parametrize("kind", HERE)
def test_a_usual_chain_is_read_as_qemu_img_reports_it(kind: str, tmp_path: Path) -> None:
    path = str(HERE[kind](tmp_path))
    here = read_here(path, "qcow2")
    assert here is not None
    assert here == ask(path, "qcow2")


def test_a_raw_image_is_never_looked_into(tmp_path: Path) -> None:
    path = str(create(tmp_path / "a"))
    here = read_here(path, "raw")
    assert here is not None
    assert here == ask(path, "raw")
    assert [layer.format for layer in here] == ["raw"]


def in_use(path: Path) -> bool:
    """Whether all bitmaps are marked so in the image."""
    here = read_here(str(path), "qcow2")
    if here is None or not here[0].bitmaps:
        return False
    return all(bitmap.inconsistent for bitmap in here[0].bitmaps)


def test_bitmaps_of_an_image_that_is_open_or_was_left_open(tmp_path: Path) -> None:
    path = with_bitmaps(tmp_path)
    socket = tmp_path / "nbd"
    with subprocess.Popen(["qemu-nbd", "-fqcow2", "-t", f"-k{socket}", str(path)]) as server:
        try:
            await_greeting(socket, server)
            assert in_use(path)
            assert read_here(str(path), "qcow2") == ask(str(path), "qcow2")
        finally:
            server.kill()
    assert in_use(path)
    assert read_here(str(path), "qcow2") == ask(str(path), "qcow2")


# --- what is left to qemu-img ----------------------------------------------------------------


def rebased(backing: str, *form: str) -> Callable[[Path], Path]:
    """On a base by such a name."""

    def make(folder: Path) -> Path:
        create(folder / "base")
        overlay = create(folder / "top")
        name = backing.format(folder=folder)
        run(["qemu-img", "rebase", "-u", "-b", name, *form, str(overlay)])
        return overlay

    return make


def on_another_format(folder: Path) -> Path:
    run(["qemu-img", "create", "-q", "-fvmdk", str(folder / "base"), "8M"])
    return create(folder / "top", below="base", form="vmdk")


def with_an_unknown_format(folder: Path) -> Path:
    """The format's extension is of a type that nobody knows, so QEMU looks into the base."""
    create(folder / "base")
    overlay = create(folder / "top", below="base", form="qcow2")
    at = overlay.read_bytes().index(bytes.fromhex("e2792aca"))
    return patched(overlay, at, b"unkn")


def loop(folder: Path) -> Path:
    create(folder / "a")
    create(folder / "b", below=str(folder / "a"), form="qcow2")
    run(["qemu-img", "rebase", "-u", "-b", str(folder / "b"), "-Fqcow2", str(folder / "a")])
    return folder / "b"


LEFT = {
    "a data file": lambda folder: create(folder / "a", "8M", f"data_file={folder}/data"),
    "a raw data file": lambda folder: create(
        folder / "a", "8M", f"data_file={folder}/data,data_file_raw=on"
    ),
    "extended entries": options("extended_l2=on"),
    "encryption": lambda folder: patched(create(folder / "a"), 35, b"\1"),
    "a description": rebased(
        'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{folder}/base"}}}}', "-Fqcow2"
    ),
    "a protocol": rebased("file:{folder}/base", "-Fqcow2"),
    "another format": on_another_format,
    "an unknown format": with_an_unknown_format,
    "not closed": lambda folder: patched(create(folder / "a"), 79, b"\1"),
    "corrupt": lambda folder: patched(create(folder / "a"), 79, b"\2"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_qemu_might_see_otherwise_is_left_to_it(kind: str, tmp_path: Path) -> None:
    path = str(LEFT[kind](tmp_path))
    assert read_here(path, "qcow2") is None
    assert ask(path, "qcow2")


BROKEN = {
    "no base": rebased("{folder}/nothing", "-Fqcow2"),
    "a loop": loop,
    "no file": lambda folder: folder / "a",
    "a folder": lambda folder: folder,
    "another version": lambda folder: patched(create(folder / "a"), 7, b"\4"),
    "an unknown feature": lambda folder: patched(create(folder / "a"), 72, b"\1"),
    "a short table": lambda folder: patched(create(folder / "a", "4G"), 36, bytes(4)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_qemu_refuses_is_refused_in_its_words(kind: str, tmp_path: Path) -> None:
    path = str(BROKEN[kind](tmp_path))
    assert read_here(path, "qcow2") is None
    with pytest.raises(OperationFailed, match="qemu-img cannot read"):
        ask(path, "qcow2")


# --- damage ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image on another, with bitmaps and snapshots."""
    folder = tmp_path_factory.mktemp("chain")
    create(folder / "base")
    image = create(folder / "whole", below="base", form="qcow2")
    for name in ("one", "two"):
        bitmap(image, name)
        run(["qemu-img", "snapshot", "-c", name, str(image)])
    return image


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 319), st.integers(0, 255)),
        min_size=1,
        max_size=3,
    )
)
def test_no_damage_is_read_where_qemu_reads_another_thing(
    whole: Path, changes: list[tuple[int, int, int]]
) -> None:
    header = read_header(whole)
    assert header is not None
    assert header.bitmaps is not None
    data = bytearray(whole.read_bytes())
    for part, position, value in changes:
        start, length = (
            (0, 320),
            (header.bitmaps.offset, header.bitmaps.size),
            (header.snapshots_offset, 160),
        )[part]
        data[start + position % length] = value
    damaged = whole.with_name("damaged")
    damaged.write_bytes(data)
    here = read_here(str(damaged), "qcow2")
    if here is not None:
        assert here == ask(str(damaged), "qcow2")


def test_the_damage_above_is_of_a_chain_that_is_read_here(whole: Path) -> None:
    here = read_here(str(whole), "qcow2")
    assert here is not None
    assert here == ask(str(whole), "qcow2")
    assert [len(layer.bitmaps) for layer in here] == [2, 0]
    assert qcow2.parse_header(whole.read_bytes()) == read_header(whole)
