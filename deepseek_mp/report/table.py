"""Plain-text tables and lists that fit a width: text wraps, numbers never do."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest

GAP = "  "
NARROWEST = 12
"""Characters that a column of text keeps, if it has that many."""
LONGEST_WORD = 24
"""Longer words may be broken."""


def table(heading: Sequence[str], rows: Iterable[Sequence[str]], width: int) -> list[str]:
    """Lines of a table; columns that are empty in every row are left out, the widest of text wrap to fit `width`.

    A column whose cells all start with a digit or a sign stands to the right. Numbers and short words are never
    broken, so a table of many columns can be wider than a narrow terminal.
    """
    body = [[clean(cell) for cell in row] for row in rows]
    kept = [index for index in range(len(heading)) if any(row[index] for row in body)]
    if not kept:
        return []
    titles = [heading[index] for index in kept]
    columns = [[row[index] for row in body] for index in kept]
    numeric = [all(_is_number(cell) for cell in column if cell) for column in columns]
    widths = _fit([_widths(*column) for column in zip(titles, columns, numeric, strict=True)], width)
    top = _lines(titles, widths, numeric)
    below = [line for row in zip(*columns, strict=True) for line in _lines(row, widths, numeric)]
    return [*top, "-" * max(map(len, [*top, *below])), *below]


def tables(heading: Sequence[str], rows: Iterable[Sequence[str]], width: int, *, repeated: int) -> list[str]:
    """A `table`, as several below each other where one would be wider than `width`.

    Each has the first `repeated` columns and as many of the others as fit, at least one.
    """
    body = [[clean(cell) for cell in row] for row in rows]
    filled = [index for index in range(len(heading)) if any(row[index] for row in body)]
    always = [index for index in filled if index < repeated]
    others = [index for index in filled if index >= repeated]
    lines: list[str] = []
    while others:
        fitting = others[:1]
        part = _columns(heading, body, [*always, *fitting], width)
        for index in others[1:]:
            longer = _columns(heading, body, [*always, *fitting, index], width)
            if max(map(len, longer)) > width:
                break
            fitting, part = [*fitting, index], longer
        lines += ["", *part] if lines else part
        others = others[len(fitting) :]
    return lines


def _columns(heading: Sequence[str], body: Sequence[Sequence[str]], kept: Sequence[int], width: int) -> list[str]:
    return table([heading[index] for index in kept], [[row[index] for index in kept] for row in body], width)


def listing(entries: Iterable[tuple[str, str]], width: int) -> list[str]:
    """Names and their texts in two columns, without a heading; entries without text are left out."""
    shown = [(name, clean(text)) for name, text in entries if text]
    left = max((len(name) for name, _ in shown), default=0)
    lines = []
    for name, text in shown:
        wrapped = _wrap(text, max(width - left - len(GAP), NARROWEST))
        lines += [
            f"{label.ljust(left)}{GAP}{part}".rstrip() for label, part in zip_longest([name], wrapped, fillvalue="")
        ]
    return lines


def paragraph(text: str, width: int) -> list[str]:
    """A sentence in lines of at most `width`."""
    return _wrap(clean(text), max(width, NARROWEST))


def clean(text: str) -> str:
    """Text on one line, without characters that would move the cursor."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "+-." or cell in ("NaN", "Infinity")


def _widths(title: str, column: Sequence[str], numeric: bool) -> tuple[int, int]:
    """The width a column has by its content, and the one it can be cut to."""
    words = [len(word) for text in (title, *column) for word in text.split()]
    least = max(map(len, [*column, *title.split()])) if numeric else max(NARROWEST, min(max(words), LONGEST_WORD))
    most = max(map(len, [title, *column]))
    return most, min(most, least)


def _fit(columns: Sequence[tuple[int, int]], width: int) -> list[int]:
    """Widths of the columns: those that can give up characters, the widest first, until a row fits."""
    widths = [most for most, _ in columns]
    while sum(widths) + len(GAP) * (len(widths) - 1) > width:
        able = [index for index, (_, least) in enumerate(columns) if widths[index] > least]
        if not able:
            break
        widths[max(able, key=lambda index: widths[index])] -= 1
    return widths


def _lines(row: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> list[str]:
    wrapped = [_wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
    return [
        GAP.join(
            part.rjust(width) if right else part.ljust(width)
            for part, width, right in zip(parts, widths, numeric, strict=True)
        ).rstrip()
        for parts in zip_longest(*wrapped, fillvalue="")
    ]


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]
