"""The only XML parser of this package: no entities, no DTD, no network.

Documents come from users, from files that anyone may have edited and from guests' owners through
libvirt, so a document that carries a DOCTYPE is refused whole: neither libvirt nor we ever write
one, and without it there are no entities to expand or to fetch.
"""

from __future__ import annotations

import copy

from lxml import etree

from .errors import InvalidDocument

NAMESPACE = "urn:ckptmgr:1"
"""Namespace of our own elements; the prefix is ``ckptmgr``."""


def parse(text: str | bytes, *, what: str = "document") -> etree._Element:
    """The root element of `text`; comments and processing instructions are dropped.

    A str is taken as it is, whatever encoding it declares; bytes in the encoding that they
    declare (UTF-8 if none).  `what` names the document in messages ("the checkpoint c1.xml").

    Raises InvalidDocument for anything malformed, for a DOCTYPE, for NUL bytes and for what
    exceeds libxml2's limits (256 levels, 10 MB in one text).
    """
    encoding = "utf-8" if isinstance(text, str) else None
    try:
        data = text.encode() if isinstance(text, str) else bytes(text)
    except UnicodeEncodeError as error:
        raise InvalidDocument(f"{what} is not XML: {error.reason}") from None
    # libxml2 takes a NUL for the end of the document and would accept what stands before it.
    # (UTF-16 and UTF-32 need NULs; libvirt writes UTF-8 and our store does.)
    if b"\0" in data:
        raise InvalidDocument(f"{what} is not XML: it contains NUL bytes")
    if not data.strip():
        raise InvalidDocument(f"{what} is not XML: it is empty")
    parser = etree.XMLParser(
        encoding=encoding,
        resolve_entities=False,
        load_dtd=False,
        attribute_defaults=False,
        dtd_validation=False,
        no_network=True,
        huge_tree=False,
        recover=False,
        remove_comments=True,
        remove_pis=True,
    )
    try:
        root = etree.fromstring(data, parser)
    except etree.XMLSyntaxError as error:
        if b"<!DOCTYPE" in data:
            raise _doctype(what) from None
        raise InvalidDocument(f"{what} is not well-formed XML: {error.msg}") from None
    if root.getroottree().docinfo.internalDTD is not None:
        raise _doctype(what)
    return root


def _doctype(what: str) -> InvalidDocument:
    return InvalidDocument(
        f"{what} has a DOCTYPE, which is refused",
        hint="remove the DOCTYPE and any entity that it declares",
    )


def to_text(element: etree._Element) -> str:
    """`element` as libvirt lays documents out: two spaces a level, no declaration, a newline
    at the end.  `element` itself is not changed.
    """
    shown = copy.deepcopy(element)
    shown.tail = None
    etree.indent(shown, space="  ")
    text: str = etree.tostring(shown, encoding="unicode")
    return text + "\n"


def serialized(element: etree._Element) -> str:
    """The text of an element, without what stands behind it."""
    text: str = etree.tostring(element, encoding="unicode", with_tail=False)
    return text
