"""Digests in the files of the store, so that damage and edits by hand are noticed.

A document ends with a comment that holds the SHA-256 of every byte before it; a JSON file has
the member ``sha256``, of all the others.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from ..errors import StoreDamaged

_SEAL = "<!-- sha256 {} of all above; edited files are refused -->\n"
_SEAL_PATTERN = re.compile(re.escape(_SEAL).replace(r"\{\}", "([0-9a-f]{64})").encode())
_SEAL_LENGTH = len(_SEAL.format("0" * 64))
_EDITED = "it does not match its digest: it was edited by hand or damaged"
_MEMBER = "sha256"


def seal(text: str) -> bytes:
    """The file of an XML document."""
    data = text.encode()
    return data + _SEAL.format(hashlib.sha256(data).hexdigest()).encode()


def unseal(data: bytes) -> str:
    """The document in a file.  Raises StoreDamaged."""
    content = data[:-_SEAL_LENGTH]
    found = _SEAL_PATTERN.fullmatch(data[-_SEAL_LENGTH:])
    if found is None:
        raise StoreDamaged("it does not end with its digest: it was cut off, edited or damaged")
    if hashlib.sha256(content).hexdigest().encode() != found.group(1):
        raise StoreDamaged(_EDITED)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise StoreDamaged("it is not UTF-8") from error


def seal_json(members: Mapping[str, Any]) -> bytes:
    """The file of a JSON object."""
    return (json.dumps({**members, _MEMBER: _json_digest(members)}, indent=2) + "\n").encode()


def unseal_json(data: bytes) -> dict[str, Any]:
    """The members of the JSON object in a file.  Raises StoreDamaged."""
    try:
        members = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreDamaged(f"it is not JSON: {error}") from error
    if not isinstance(members, dict) or _MEMBER not in members:
        raise StoreDamaged("it has no digest: it was edited by hand or damaged")
    digest = members.pop(_MEMBER)
    if digest != _json_digest(members):
        raise StoreDamaged(_EDITED)
    return members


def _json_digest(members: Mapping[str, Any]) -> str:
    content = json.dumps(members, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()
