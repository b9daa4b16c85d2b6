"""Cells of text -> a table for a terminal, Markdown or LaTeX."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rich import cells as rich_cells

ANSI = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
DIGITS, SUPERSCRIPTS = "0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"
SUPERSCRIPT, ORDINARY = str.maketrans(DIGITS, SUPERSCRIPTS), str.maketrans(SUPERSCRIPTS, DIGITS)


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table of clean cells (`clean`), and which columns are aligned to the right."""

    headers: list[str]
    right: list[bool]
    cells: list[list[str]]

    def select(self, wanted: Sequence[int]) -> Sheet:
        lines = [[line[j] for j in wanted] for line in (self.headers, *self.cells)]
        return Sheet(lines[0], [self.right[j] for j in wanted], lines[1:])

    @property
    def widths(self) -> list[int]:
        """Character cells of a terminal that each column takes."""
        return [max(map(cell_len, column)) for column in zip(self.headers, *self.cells, strict=True)]

    @property
    def width(self) -> int:
        """Character cells of a terminal that the whole takes."""
        return sum(self.widths) + 2 * (len(self.headers) - 1)


def cell_len(text: str) -> int:
    """Character cells that a text takes: two for the wide letters of East Asia, none for combining marks."""
    return len(text) if text.isascii() else rich_cells.cell_len(text)


def clean(text: str) -> str:
    """No control characters: a name from a folder must neither control the terminal nor break a line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "�" for c in text)


def paint(text: str, style: str) -> str:
    return f"\x1b[{ANSI[style]}m{text}\x1b[0m" if style and text.strip() else text


def for_terminal(sheet: Sheet, width: int, styles: list[list[str]] | None = None) -> Iterator[str]:
    """Lines of plain columns; `styles` are keys of `ANSI`, cell by cell. tabulate and rich take 10 to 100 times as
    long, which is seconds for thousands of rows."""
    natural = sheet.widths
    sizes = _fit(natural, sheet.right, width)
    columns = range(len(sizes))

    def pad(text: str, j: int) -> str:
        space = " " * (sizes[j] - cell_len(text))
        return space + text if sheet.right[j] else text + space

    yield "  ".join(pad(sheet.headers[j], j) for j in columns).rstrip()
    yield "  ".join("─" * size for size in sizes)
    for i, cells in enumerate(sheet.cells):
        folded = [textwrap.wrap(cells[j], sizes[j]) if sizes[j] < natural[j] else [cells[j]] for j in columns]
        for parts in zip_longest(*folded, fillvalue=""):
            yield "  ".join(
                paint(pad(part, j), styles[i][j] if styles else "") for j, part in enumerate(parts)
            ).rstrip()


def _fit(widths: list[int], right: list[bool], width: int) -> list[int]:
    """Column widths; where they do not fit, the widest columns of words are folded, to no less than 12."""
    sizes = list(widths)
    words = [j for j in range(len(sizes)) if not right[j]]
    while (excess := sum(sizes) + 2 * (len(sizes) - 1) - width) > 0 and words:
        widest = max(words, key=lambda j: sizes[j])
        words.remove(widest)
        sizes[widest] = min(sizes[widest], max(12, sizes[widest] - excess))
    return sizes


def for_markdown(sheet: Sheet) -> str:
    from tabulate import tabulate

    headers, *cells = [list(map(escape_markdown, line)) for line in (sheet.headers, *sheet.cells)]
    sides = ["right" if right else "left" for right in sheet.right] if cells else None
    return tabulate(cells, headers, tablefmt="github", colalign=sides, disable_numparse=True)


def escape_markdown(text: str) -> str:
    """The text, with nothing in it that Markdown or HTML reads as markup."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|~#&" else c for c in text)


def for_latex(sheet: Sheet) -> str:
    """A tabular of the booktabs package."""
    header, *lines = [" & ".join(map(escape_latex, cells)) + r" \\" for cells in (sheet.headers, *sheet.cells)]
    start = rf"\begin{{tabular}}{{{''.join('r' if right else 'l' for right in sheet.right)}}}"
    return "\n".join([start, r"\toprule", header, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}"])


LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "·": r"$\cdot$",
    "–": "--", "…": r"\ldots{}", "²": r"\textsuperscript{2}", **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip


def escape_latex(text: str) -> str:
    """The text for pdflatex without further packages; letters beyond its fonts stay as they are."""
    parts = re.split(f"([{SUPERSCRIPTS},]*[{SUPERSCRIPTS}])", text)
    escaped = ["".join(LATEX.get(c, c) for c in part) for part in parts]
    escaped[1::2] = [rf"\textsuperscript{{{part.translate(ORDINARY)}}}" for part in parts[1::2]]
    return "".join(escaped)
