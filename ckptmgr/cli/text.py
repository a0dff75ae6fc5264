"""Text from elsewhere, made harmless to print."""

from __future__ import annotations


def visible(text: str) -> str:
    r"""`text` on one line, with every character that a terminal would act on escaped.

    Control characters, line ends, direction overrides and lone surrogates appear as ``\x1b``,
    ``\n``, ``\u202e``; everything printable stays as it is.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else _escape(character) for character in text
    )


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def visible_lines(text: str) -> list[str]:
    """Each line of `text` made visible; trailing empty ones are dropped."""
    return [visible(line) for line in text.rstrip().splitlines()] or [""]


def width(text: str) -> int:
    """Columns that `text` takes on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # knows wide and combining characters

    return cell_len(text)
