"""The parser takes what libvirt writes and refuses what could harm."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from ckptmgr.errors import CkptmgrError, InvalidDocument
from ckptmgr.xml import parse, to_text

BILLION_LAUGHS = """<?xml version="1.0"?>
<!DOCTYPE lolz [
 <!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">
 <!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;"><!ENTITY d "&c;&c;&c;&c;&c;&c;&c;&c;&c;&c;">
 <!ENTITY e "&d;&d;&d;&d;&d;&d;&d;&d;&d;&d;"><!ENTITY f "&e;&e;&e;&e;&e;&e;&e;&e;&e;&e;">
 <!ENTITY g "&f;&f;&f;&f;&f;&f;&f;&f;&f;&f;"><!ENTITY h "&g;&g;&g;&g;&g;&g;&g;&g;&g;&g;">
]><domaincheckpoint><name>&h;</name></domaincheckpoint>"""


@pytest.mark.parametrize(
    "text",
    [
        BILLION_LAUGHS,
        "<!DOCTYPE a [<!ENTITY x 'y'>]><a>plain</a>",
        "<!DOCTYPE a SYSTEM 'file:///nonexistent.dtd'><a/>",
        "<!DOCTYPE a><a/>",
        "<!DOCTYPE a [<!ATTLIST a b CDATA 'default'>]><a/>",
        "<!DOCTYPE a [<!ENTITY % p SYSTEM 'http://127.0.0.1:1/x'>%p;]><a/>",
    ],
)
def test_every_doctype_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidDocument, match="DOCTYPE"):
        parse(text)
    with pytest.raises(InvalidDocument, match="DOCTYPE"):
        parse(text.encode())


def test_an_external_entity_never_shows_the_file(tmp_path: object) -> None:
    secret = f"{tmp_path}/secret"
    with open(secret, "w") as file:  # noqa: PTH123
        file.write("hunter2")
    with pytest.raises(InvalidDocument) as caught:
        parse(f"<!DOCTYPE a [<!ENTITY x SYSTEM 'file://{secret}'>]><a>&x;</a>")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n",
        "not xml",
        "<a>",
        "<a></b>",
        "<a/><b/>",
        "<a b='1' b='2'/>",
        "<a>&undefined;</a>",
        "<a>&#0;</a>",
        "<a>\x01</a>",
        "<x:a/>",
        "<a>\ud800</a>",
        b"<a>\xff\xfe</a>",
        "<a/>\0<b/>",
        "<a>\0</a>",
        b"<a/>\0",
        "<a>" * 5000 + "</a>" * 5000,
    ],
)
def test_malformed_text_is_an_invalid_document(text: str | bytes) -> None:
    with pytest.raises(InvalidDocument) as caught:
        parse(text, what="the checkpoint c1.xml")
    assert "the checkpoint c1.xml" in caught.value.message


def test_a_declared_encoding_does_not_matter_for_str_and_does_for_bytes() -> None:
    assert parse("<?xml version='1.0' encoding='latin-1'?><a>ž</a>").text == "ž"
    assert parse("<?xml version='1.0' encoding='latin-1'?><a>é</a>".encode("latin-1")).text == "é"


def test_libvirts_comment_banner_is_no_obstacle() -> None:
    root = parse("<!--\nWARNING: AUTO-GENERATED\n-->\n\n<a><!-- x --><b/></a>")
    assert [child.tag for child in root] == ["b"]


def test_text_is_laid_out_as_libvirt_does_and_the_element_is_left_alone() -> None:
    root = parse("<a><b c='1'><d>t</d></b></a>")
    assert to_text(root) == '<a>\n  <b c="1">\n    <d>t</d>\n  </b>\n</a>\n'
    assert etree.tostring(root) == b'<a><b c="1"><d>t</d></b></a>'


NAMES = st.from_regex(r"[a-z][a-z0-9]{0,5}", fullmatch=True)
TEXTS = st.text(
    st.characters(min_codepoint=0x20, exclude_categories=("Cs", "Cn")).filter(
        lambda c: c not in "\ufffe\uffff"
    )
)


@given(NAMES, TEXTS, TEXTS)
def test_any_text_survives_being_written_and_read(tag: str, attribute: str, text: str) -> None:
    element = etree.Element(tag, a=attribute)
    etree.SubElement(element, "t").text = text
    back = parse(to_text(element))
    child = back.find("t")
    assert child is not None
    assert (back.tag, back.get("a"), child.text or "") == (tag, attribute, text)


@given(st.one_of(st.text(), st.binary()))
def test_anything_is_parsed_or_refused(text: str | bytes) -> None:
    try:
        parse(text)
    except CkptmgrError as error:
        assert isinstance(error, InvalidDocument)
