"""Tables in virsh's manner: aligned columns, one line a row, never cut or wrapped.

 Name   Created                     Disks
------------------------------------------
 c1     2026-11-22 10:30:00 +0100   vda
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .terminal import Style, Terminal
from .text import visible, width

_GAP = "   "


@dataclass(frozen=True)
class Cell:
    """Text in a style; the text is made visible when the table is drawn."""

    text: str
    style: Style = Style.PLAIN


@dataclass(frozen=True)
class Column:
    """A column's title, and whether its cells are aligned right."""

    title: str
    right: bool = False


Row = Sequence[str | Cell]


def table(
    columns: Sequence[Column], rows: Sequence[Row], terminal: Terminal, *, mark: bool = False
) -> Iterator[str]:
    """Lines of a table; with `mark`, the first column is a mark without a title and gap."""
    body = [[_cell(cell) for cell in row] for row in rows]
    head = [Cell(column.title, Style.STRONG) for column in columns]
    widths = [max(width(cell.text) for cell in cells) for cells in zip(head, *body, strict=True)]
    gaps = [" "] + [_GAP] * (len(columns) - 1)
    if mark and len(gaps) > 1:
        gaps[1] = " "
    yield _line(head, columns, widths, gaps, terminal)
    yield "-" * (sum(widths) + sum(map(len, gaps)) + 1)
    for row in body:
        yield _line(row, columns, widths, gaps, terminal)


def _cell(cell: str | Cell) -> Cell:
    if isinstance(cell, str):
        return Cell(visible(cell))
    return Cell(visible(cell.text), cell.style)


def _line(
    cells: Sequence[Cell],
    columns: Sequence[Column],
    widths: Sequence[int],
    gaps: Sequence[str],
    terminal: Terminal,
) -> str:
    line = ""
    blanks = ""
    for cell, column, wanted, gap in zip(cells, columns, widths, gaps, strict=True):
        padding = " " * (wanted - width(cell.text))
        blanks += gap + (padding if column.right else "")
        if cell.text:  # so that no line ends in blanks
            line += blanks + terminal.paint(cell.text, cell.style)
            blanks = ""
        blanks += "" if column.right else padding
    return line
