"""Cells of text -> a table for a terminal, Markdown or LaTeX."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from unicodedata import combining, east_asian_width

ANSI = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
ORDINARY = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table of clean cells (`clean`), and which columns stand to the right."""

    headers: list[str]
    right: list[bool]
    cells: list[list[str]]

    def select(self, wanted: Sequence[int]) -> Sheet:
        """Only these columns, in this order."""
        return Sheet(
            [self.headers[j] for j in wanted],
            [self.right[j] for j in wanted],
            [[line[j] for j in wanted] for line in self.cells],
        )

    @property
    def widths(self) -> list[int]:
        """Columns of a terminal that each column takes."""
        return [max(map(cell_width, column)) for column in zip(self.headers, *self.cells, strict=True)]

    @property
    def width(self) -> int:
        """Columns of a terminal that the whole takes."""
        return sum(self.widths) + 2 * (len(self.headers) - 1)


def clean(text: str) -> str:
    """No control characters: a name from a folder must not steer the terminal or break a line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "�" for c in text)


UNCOMMON = re.compile("[\u0300-\u1fff\u20d0-\u20ff\u2300-\U0010ffff]")
"""Outside of these every letter takes one column."""


def cell_width(text: str) -> int:
    """Columns of a terminal that a text takes: two for the wide letters of East Asia, none for combining marks."""
    if text.isascii() or not UNCOMMON.search(text):
        return len(text)
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def paint(text: str, style: str) -> str:
    """Colour for a terminal."""
    return f"\x1b[{ANSI[style]}m{text}\x1b[0m" if style and text.strip() else text


def for_terminal(sheet: Sheet, width: int, styles: list[list[str]] | None = None) -> Iterator[str]:
    """Lines of plain columns; `styles` are keys of `ANSI`, cell by cell. Written here because rich takes five seconds
    for the rows of 10,000 runs, this a twentieth."""
    natural = sheet.widths
    sizes = _fit(natural, sheet.right, width)
    columns = range(len(sizes))
    yield "  ".join(_pad(sheet.headers[j], sizes[j], sheet.right[j]) for j in columns).rstrip()
    yield "  ".join("─" * size for size in sizes)
    for i, cells in enumerate(sheet.cells):
        folded = [textwrap.wrap(cells[j], sizes[j]) if sizes[j] < natural[j] else [cells[j]] for j in columns]
        for parts in zip_longest(*folded, fillvalue=""):
            padded = (_pad(part, sizes[j], sheet.right[j]) for j, part in enumerate(parts))
            yield "  ".join(paint(part, styles[i][j] if styles else "") for j, part in enumerate(padded)).rstrip()


def _fit(widths: list[int], right: list[bool], width: int) -> list[int]:
    """Column widths; where they do not fit, the widest columns of words are folded, to no less than 12."""
    sizes = list(widths)
    words = [j for j in range(len(sizes)) if not right[j]]
    while (excess := sum(sizes) + 2 * (len(sizes) - 1) - width) > 0 and words:
        widest = max(words, key=lambda j: sizes[j])
        words.remove(widest)
        sizes[widest] = min(sizes[widest], max(12, sizes[widest] - excess))
    return sizes


def _pad(text: str, size: int, right: bool) -> str:
    space = " " * (size - cell_width(text))
    return space + text if right else text + space


def for_markdown(sheet: Sheet) -> str:
    """A table in GitHub's Markdown."""
    from tabulate import tabulate

    return tabulate(
        [[escape_markdown(cell) for cell in cells] for cells in sheet.cells],
        headers=[escape_markdown(header) for header in sheet.headers],
        tablefmt="github",
        colalign=["right" if right else "left" for right in sheet.right] if sheet.cells else None,
        disable_numparse=True,
    )


def escape_markdown(text: str) -> str:
    """The text, with nothing in it that Markdown or HTML reads as markup."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|~#&" else c for c in text)


def for_latex(sheet: Sheet) -> str:
    """A tabular of the booktabs package."""
    lines = [" & ".join(map(escape_latex, cells)) + r" \\" for cells in (sheet.headers, *sheet.cells)]
    spec = "".join("r" if right else "l" for right in sheet.right)
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{spec}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "·": r"$\cdot$",
    "–": "--", "…": r"\ldots{}", "²": r"\textsuperscript{2}", **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip


def escape_latex(text: str) -> str:
    """The text for pdflatex without further packages; letters beyond its fonts stay as they are."""
    parts = re.split("([⁰¹²³⁴⁵⁶⁷⁸⁹,]*[⁰¹²³⁴⁵⁶⁷⁸⁹])", text)
    escaped = ["".join(LATEX.get(c, c) for c in part) for part in parts]
    escaped[1::2] = [rf"\textsuperscript{{{part.translate(ORDINARY)}}}" for part in parts[1::2]]
    return "".join(escaped)
