"""A domain that is made from a restore point shares nothing that is written with the first one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from ckptmgr.backup.definition import Identity, Image, Redefinition, redefined
from ckptmgr.errors import InvalidDocument
from ckptmgr.xml import parse, to_text

from .strategies import texts

DATA = Path(__file__).parent / "data" / "restore"
SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
WEB = (DATA / "web.xml").read_text()

UUID = "11111111-2222-4333-8444-555555555555"
GENID = "99999999-8888-4777-8666-555555555555"


def macs() -> Callable[[], str]:
    numbers = itertools.count(1)
    return lambda: f"52:54:00:00:00:{next(numbers):02x}"


def identity(name: str = "web2") -> Identity:
    return Identity(name, UUID, GENID, macs())


def whole(text: str = WEB) -> Redefinition:
    folder = Path("/restored")
    return redefined(
        text,
        identity(),
        {
            "vda": Image(folder / "vda.qcow2", "qcow2"),
            "sda": Image(folder / "sda.raw", "raw"),
            "vdb": Image(Path("/dev/vg/restored"), "raw", block=True),
            "vde": Image(folder / "vde.qcow2", "qcow2"),
        },
        {role: folder / role for role in ("nvram", "kernel", "initrd")},
    )


def part() -> Redefinition:
    return redefined(WEB, identity(), {"vda": Image(Path("/restored/<a> 'b'.qcow2"), "qcow2")}, {})


@pytest.mark.parametrize(("name", "made"), [("whole", whole), ("part", part)])
def test_the_new_definition_is_the_expected_one(
    name: str, made: Callable[[], Redefinition]
) -> None:
    assert made().text == (DATA / f"{name}.xml").read_text()


@pytest.mark.parametrize("made", [whole, part])
def test_the_new_definition_validates_against_libvirts_schema(
    made: Callable[[], Redefinition],
) -> None:
    schema = etree.RelaxNG(etree.parse(str(SCHEMA)))
    schema.assertValid(parse(WEB))
    schema.assertValid(parse(made().text))


def test_what_was_left_out_and_what_changed_is_said() -> None:
    assert whole().dropped == ("vdc",)
    assert [note.split(":")[0] for note in whole().notes] == [
        "the image of disk vda was encrypted, and the restored one is not",
        "disk vdc is left out",
    ]
    assert part().dropped == ("sda", "vdb", "vdc", "vde")
    assert any("the firmware's variables are not in the point" in note for note in part().notes)


def test_no_path_that_the_first_domain_writes_to_is_left() -> None:
    for made in (whole(), part()):
        for path in ("/img/a", "/dev/vg/web", "pool/image", "/img/scratch", "floppy.img", "web_VA"):
            assert path not in made.text
        for path in ("/iso/debian.iso", "/img/tools.raw"):  # these are only read
            assert path in made.text


def test_the_firmwares_variables_go_where_newer_libvirts_have_them() -> None:
    text = WEB.replace(
        "VARS_4M.fd'>/var/lib/libvirt/qemu/nvram/web_VARS.fd</nvram>",
        "VARS_4M.fd' type='file' format='qcow2'><source file='/n/web_VARS.qcow2'/></nvram>"
        "<varstore template='/t' path='/n/web.json'/>",
    )
    files = {"nvram": Path("/r/nvram.fd"), "varstore": Path("/r/varstore.json")}
    made = redefined(text, identity(), {}, files).text
    template = 'template="/usr/share/OVMF/OVMF_VARS_4M.fd"'
    assert f'<nvram {template} format="qcow2">/r/nvram.fd</nvram>' in made
    assert '<varstore template="/t" path="/r/varstore.json"/>' in made
    bare = redefined(text, identity(), {}, {}).text
    assert f'<nvram {template} format="qcow2"/>' in bare
    assert '<varstore template="/t"/>' in bare


def test_the_state_of_a_tpm_goes_where_the_definition_says() -> None:
    tpm = (
        "<tpm model='tpm-crb'><backend type='emulator' version='2.0'>"
        "<source type='dir' path='/tpm/web'/></backend></tpm></devices>"
    )
    text = WEB.replace("</devices>", tpm)
    made = redefined(text, identity(), {}, {"tpm": Path("/r/tpm")}).text
    assert '<source type="dir" path="/r/tpm"/>' in made
    assert "/tpm/web" not in redefined(text, identity(), {}, {}).text


def test_a_definition_without_uuid_gets_one() -> None:
    made = redefined("<domain><name>a</name><memory>1</memory></domain>", identity(), {}, {})
    assert [element.tag for element in parse(made.text)] == ["name", "uuid", "memory"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<domain/>", "no <name>"),
        ("<network><name>a</name></network>", "<domain> was expected"),
        ("<!DOCTYPE a><domain/>", "DOCTYPE"),
        ("<domain>", "not well-formed"),
        ("<domain><name>a</name></domain>", "no disk vda"),
    ],
)
def test_what_is_no_definition_of_the_domain_is_refused(text: str, says: str) -> None:
    with pytest.raises(InvalidDocument, match=says):
        redefined(text, identity(), {"vda": Image(Path("/a"), "raw")}, {})


foreign = st.recursive(
    st.tuples(st.sampled_from(["a", "source", "new"]), st.none() | texts, st.just(())),
    lambda below: st.tuples(
        st.sampled_from(["b", "vsock", "tpm"]), st.none(), st.lists(below, max_size=3).map(tuple)
    ),
    max_leaves=6,
)


def grow(above: etree._Element, tree: tuple[str, str | None, tuple[object, ...]]) -> None:
    tag, value, below = tree
    element = etree.SubElement(above, tag)
    if value is not None:
        element.set("value", value)
    for each in below:
        grow(element, each)  # type: ignore[arg-type]


@given(st.lists(foreign, max_size=4), st.lists(foreign, max_size=3))
def test_elements_that_nobody_here_knows_stay_untouched(
    outside: list[tuple[str, str | None, tuple[object, ...]]],
    inside: list[tuple[str, str | None, tuple[object, ...]]],
) -> None:
    root = parse(WEB)
    expected = parse(whole().text)
    for tree in outside:
        grow(root, tree)
        grow(expected, tree)
    for tree in inside:
        grow(root.find("devices"), tree)  # type: ignore[arg-type]
        grow(expected.find("devices"), tree)  # type: ignore[arg-type]
    assert whole(to_text(root)).text == to_text(expected)
