"""A table of words, with what stands above and below it -> text for a terminal, Markdown or LaTeX."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from string import Template

from rich import cells as rich_cells

ANSI = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
DIGITS, SUPERSCRIPTS = "0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"
SUPERSCRIPT, ORDINARY = str.maketrans(DIGITS, SUPERSCRIPTS), str.maketrans(SUPERSCRIPTS, DIGITS)
MARKS = re.compile(f"([{SUPERSCRIPTS},]*[{SUPERSCRIPTS}])")


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table of clean words (`clean`), and which of its columns are aligned to the right."""

    headers: Sequence[str]
    right: Sequence[bool]
    cells: Sequence[Sequence[str]]
    caption: str = ""
    notes: Sequence[str] = ()  # below, a line each
    means: Sequence[str] = ()  # below them, definitions
    styles: Sequence[Sequence[str]] = ()  # of the cells: keys of `ANSI`

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


def add_mark(text: str, number: int) -> str:
    """The text with the mark of a footnote, after those it has."""
    return text + "," * text.endswith(tuple(SUPERSCRIPTS)) + str(number).translate(SUPERSCRIPT)


def paint(text: str, style: str) -> str:
    return f"\x1b[{ANSI[style]}m{text}\x1b[0m" if style and text.strip() else text


def for_terminal(sheet: Sheet, width: int, *, colour: bool = False) -> Iterator[str]:
    """Lines of plain columns, with what stands above and below them. tabulate and rich take 10 to 100 times as long,
    which is seconds for thousands of rows."""

    def wrap(texts: Iterable[str], style: str, indent: str = "") -> Iterator[str]:
        for text in texts:
            for line in textwrap.wrap(text, width, subsequent_indent=indent):
                yield paint(line, style if colour else "")

    def pad(text: str, j: int) -> str:
        space = " " * (sizes[j] - cell_len(text))
        return space + text if sheet.right[j] else text + space

    if sheet.caption:
        yield from (*wrap([sheet.caption], "bold"), "")
    natural = sheet.widths
    sizes = _fit(natural, sheet.right, width)
    columns = range(len(sizes))
    yield "  ".join(pad(sheet.headers[j], j) for j in columns).rstrip()
    yield "  ".join("─" * size for size in sizes)
    styles: Iterable[Sequence[str]] = sheet.styles if colour else ()
    for cells, looks in zip_longest(sheet.cells, styles, fillvalue=[""] * len(sizes)):
        folded = [textwrap.wrap(cells[j], sizes[j]) if sizes[j] < natural[j] else [cells[j]] for j in columns]
        for parts in zip_longest(*folded, fillvalue=""):
            yield "  ".join(paint(pad(part, j), looks[j]) for j, part in enumerate(parts)).rstrip()
    if sheet.notes or sheet.means:
        yield from ("", *wrap(sheet.notes, "", "  "), *wrap([" · ".join(sheet.means)], "dim"))


def _fit(widths: list[int], right: Sequence[bool], width: int) -> list[int]:
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
    table = tabulate(cells, headers, tablefmt="github", colalign=sides, disable_numparse=True)
    notes = "  \n".join(map(escape_markdown, sheet.notes))
    means = "\n".join(f"- {escape_markdown(line)}" for line in sheet.means)
    return "\n\n".join(filter(None, (escape_markdown(sheet.caption), table, notes, means))) + "\n"


def escape_markdown(text: str) -> str:
    """The text, with nothing in it that Markdown or HTML reads as markup."""
    return re.sub(r"[\\`*_\[\]<>|~#&]", r"\\\g<0>", text)


NUMBER = re.compile(r"(−?[\d,]+)(?:\.(\d+))?(.*)")
"""A figure, and what follows it: its standard deviation, a unit, something in brackets, the marks of notes."""


def for_latex(sheet: Sheet, left_out: Sequence[str] = ()) -> str:
    """A floating table of the packages booktabs and siunitx: caption, label, numbers aligned at the point, notes below."""
    columns = [
        _latex_column(header, cells, right=right)
        for header, right, *cells in zip(sheet.headers, sheet.right, *sheet.cells, strict=True)
    ]
    kinds, cells = zip(*columns, strict=True)
    header, *lines = [" & ".join(line) + r" \\" for line in zip(*cells, strict=True)]
    below = map(escape_latex, filter(None, [*sheet.notes, "; ".join(sheet.means)]))
    without = f"\n% too narrow for {', '.join(left_out)}: --columns chooses" if left_out else ""
    return Template(Path(__file__).with_name("table.tex").read_text(encoding="utf-8")).substitute(
        left_out=without, caption=escape_latex(sheet.caption or "Results"), kinds="".join(kinds), header=header,
        lines="\n".join(lines), below=" \\\\\n".join(below),
    )  # fmt: skip


def _latex_column(header: str, cells: Sequence[str], *, right: bool) -> tuple[str, list[str]]:
    """How it is aligned, and its header and cells. What follows its numbers is another column, close to the first."""
    head, *words = map(escape_latex, (header, *cells))
    numbers = [NUMBER.fullmatch(cell) for cell in cells]
    if not right or not any(numbers):
        return "r" if right else "l", [head, *words]
    parts = [number.groups("") if number else ("", "", "") for number in numbers]
    values = [
        re.sub(r"\.$", "", f"{before}.{after}".replace(",", "").replace("−", "-")) for before, after, _ in parts
    ]
    whole, decimals = max(len(value.partition(".")[0]) for value in values), max(len(part[1]) for part in parts)
    kind = f"S[table-format={whole}.{decimals}]"
    lines = [
        value if number else f"{{{word}}}" for value, number, word in zip(values, numbers, words, strict=True)
    ]
    rests = [re.sub("^ ", "~", escape_latex(rest)) for _, _, rest in parts]
    if not any(rests):
        return kind, [f"{{{head}}}", *lines]
    pairs = [f"{line} & {rest}" for line, rest in zip(lines, rests, strict=True)]
    return f"{kind}@{{}}l", [rf"\multicolumn{{2}}{{c}}{{{head}}}", *pairs]


LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "·": r"$\cdot$",
    "–": "--", "…": r"\ldots{}", "→": r"$\to$", **{c: f"\\{c}" for c in "&%$#_{}"},
})  # fmt: skip


def escape_latex(text: str) -> str:
    """The text for pdflatex without further packages; letters beyond its fonts stay as they are."""
    return MARKS.sub(lambda mark: rf"\textsuperscript{{{mark[0].translate(ORDINARY)}}}", text.translate(LATEX))
