"""A table of words, with what stands above and below it -> text for a terminal, Markdown or LaTeX; memory in words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, chop_cells

from harness.results.metrics import NONE, decimals
from harness.results.values import MEMORY_CATEGORIES

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent
ANSI = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
DIGITS, SUPERSCRIPTS = "0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"
SUPERSCRIPT, ORDINARY = str.maketrans(DIGITS, SUPERSCRIPTS), str.maketrans(SUPERSCRIPTS, DIGITS)
GLUE = "\N{NO-BREAK SPACE}"  # figures are not folded
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
        """Cells of a terminal that each column takes: two for a wide letter."""
        return [max(map(cell_len, column)) for column in zip(self.headers, *self.cells, strict=True)]

    @property
    def width(self) -> int:
        """Letters that the whole takes beside each other."""
        return sum(self.widths) + 2 * (len(self.headers) - 1)


def clean(text: str) -> str:
    """No control characters: a name from a folder must neither control the terminal nor break a line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "�" for c in text)


@cache
def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    return Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=select_autoescape(("html",)), extensions=["jinja2.ext.do"],
        finalize=lambda value: clean(value) if type(value) is str else value,  # no value breaks a line
    )  # fmt: skip


def fill_template(template: str, /, **values: Any) -> str:
    """A template of this folder with these values, in which there are no control characters."""
    return _templates().get_template(template).render(**values)


def add_mark(text: str, number: int) -> str:
    """The text with the mark of a footnote, after those it has."""
    return text + "," * text.endswith(tuple(SUPERSCRIPTS)) + str(number).translate(SUPERSCRIPT)


def fold(text: str, width: int, indent: str = "") -> list[str]:
    """The text in lines of at most so many cells, broken between words and within one that is too long for a line."""
    if 2 * len(text) <= width or cell_len(text) <= width:  # no sign takes more than two cells
        return [text]
    lines, used = list[str](), width
    for word in filter(None, text.split(" ")):
        if (used := used + 1 + cell_len(word)) <= width:
            lines[-1] += f" {word}"
        else:
            lines += chop_cells((indent if lines else "") + word, width)
            used = cell_len(lines[-1])
    return lines


def longest_word(texts: Iterable[str]) -> int:
    """In cells."""
    return max(map(cell_len, " ".join(texts).split()), default=0)


def align(cells: Sequence[str], sizes: Sequence[int], right: Sequence[bool]) -> list[str]:
    """The cells of a line, each as wide as its column."""
    spaces = [" " * (size - cell_len(cell)) for cell, size in zip(cells, sizes, strict=True)]
    return [gap + cell if r else cell + gap for cell, gap, r in zip(cells, spaces, right, strict=True)]


def fit_columns(sheet: Sheet, width: int) -> list[int] | None:
    """How wide each column is. Where they do not fit, headers of figures are folded between words, then the widest columns of
    words, between words and then within, to no less than 12. None where that does not suffice."""
    sizes, columns = sheet.widths, list(zip(sheet.headers, *sheet.cells, strict=True))
    words = [j for j in sorted(range(len(sizes)), key=lambda j: -sizes[j]) if not sheet.right[j]]
    least = [
        (j, max([longest_word(c[:1]), *map(cell_len, c[1:])])) for j, c in enumerate(columns) if sheet.right[j]
    ]
    least += [(j, max(12, longest_word(columns[j]))) for j in words] + [(j, 12) for j in words]
    for j, narrowest in least:
        excess = sum(sizes) + 2 * (len(sizes) - 1) - width
        sizes[j] = min(sizes[j], max(narrowest, sizes[j] - max(0, excess)))
    return sizes if sum(sizes) + 2 * (len(sizes) - 1) <= width else None


def for_terminal(sheet: Sheet, width: int, *, fit: bool = True, colour: bool = False) -> str:
    """Plain columns, with what stands above and below them. To `fit` the width they are folded, and a row is a paragraph
    where that does not suffice. rich takes seconds for thousands of rows."""
    width = width if fit else max(width, sheet.width)

    def paint(text: str, style: str) -> str:
        return f"\x1b[{ANSI[style]}m{text}\x1b[0m" if colour and style and text else text

    def wrap(texts: Iterable[str], style: str = "", indent: str = "") -> list[str]:
        return [paint(line, style) for text in texts if text for line in fold(text, width, indent)]

    lines, sizes = [*wrap([sheet.caption], "bold"), *[""] * bool(sheet.caption)], fit_columns(sheet, width)
    if sizes is None:
        for cells in sheet.cells:
            named = zip(sheet.headers, cells, sheet.right, strict=True)
            known = [(head, cell.replace(" ", GLUE) if right else cell) for head, cell, right in named if cell]
            words = [f"{head} {cell}" for head, cell in known if cell != NONE]
            lines += (line.replace(GLUE, " ") for line in wrap([" · ".join(words)], indent="  "))
    else:
        plain = [""] * len(sizes)
        rules = ["─" * size for size in sizes]
        every = zip_longest([sheet.headers, rules, *sheet.cells], [plain, plain, *sheet.styles], fillvalue=plain)
        for cells, styles in every:
            columns = [fold(cell, size) for cell, size in zip(cells, sizes, strict=True)]
            for parts in zip_longest(*columns, fillvalue=""):
                aligned = align(parts, sizes, sheet.right)
                lines.append("  ".join(map(paint, aligned, styles)).rstrip())
    if sheet.notes or sheet.means:
        lines += ["", *wrap(sheet.notes, indent="  "), *wrap([" · ".join(sheet.means)], "dim")]
    return "\n".join(lines) + "\n"


def for_markdown(sheet: Sheet) -> str:
    headers, *cells = [list(map(escape_markdown, line)) for line in (sheet.headers, *sheet.cells)]
    sizes = [max([cell_len(head) + 2, *map(cell_len, c)]) for head, *c in zip(headers, *cells, strict=True)]
    rule = ["-" * (size + 1) + ("-", ":")[right] for size, right in zip(sizes, sheet.right, strict=True)]
    table = [f"| {' | '.join(align(line, sizes, sheet.right))} |" for line in (headers, *cells)]
    table.insert(1, f"|{'|'.join(rule)}|")
    notes = "  \n".join(map(escape_markdown, sheet.notes))
    means = "\n".join(f"- {escape_markdown(line)}" for line in sheet.means)
    return "\n\n".join(filter(None, (escape_markdown(sheet.caption), "\n".join(table), notes, means))) + "\n"


def escape_markdown(text: str) -> str:
    """The text, with nothing in it that Markdown or HTML reads as markup."""
    return re.sub(r"[\\`*_\[\]<>|~#&]", r"\\\g<0>", text)


def for_latex(sheet: Sheet, left_out: Sequence[str] = ()) -> str:
    """A floating table of the package booktabs: caption, label, numbers aligned at the point, notes below."""
    kinds, words = zip(*map(_latex_column, sheet.headers, sheet.right, *sheet.cells), strict=True)
    parts = {"sheet": sheet, "left_out": left_out, "kinds": kinds, "lines": list(zip(*words, strict=True))}
    return fill_template("table.tex", escape=escape_latex, **parts)


def _latex_column(header: str, right: bool, *cells: str) -> tuple[str, list[str]]:
    """How it is aligned, and its header and cells. Numbers are two columns that meet at the point."""
    words = list(map(escape_latex, (header, *cells)))
    parts = [re.findall(r"^(−?[\d,]*)(.*)", cell)[0] for cell in cells]  # at the point
    if not right or not any(rest for _, rest in parts):
        return "r" if right else "l", words
    pairs = [f"{escape_latex(number)} & {re.sub('^ ', '~', escape_latex(rest))}" for number, rest in parts]
    return "r@{}l", [rf"\multicolumn{{2}}{{c}}{{{words[0]}}}", *pairs]


LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "·": r"$\cdot$",
    "–": "--", "…": r"\ldots{}", "→": r"$\to$", **{c: f"\\{c}" for c in "&%$#_{}"},
})  # fmt: skip


def escape_latex(text: str) -> str:
    """The text for pdflatex without further packages; letters beyond its fonts stay as they are."""
    return MARKS.sub(lambda mark: rf"\textsuperscript{{{mark[0].translate(ORDINARY)}}}", text.translate(LATEX))


# --- memory by category ---

NOT_RECORDED = "memory by category: no record of these runs has it"


def known(categories: Mapping[str, float]) -> dict[str, float]:
    """The categories in the order they are shown, without those that hold nothing or cannot be a figure."""
    order = [*MEMORY_CATEGORIES, *sorted(categories.keys() - set(MEMORY_CATEGORIES))]
    return {name: value for name in order if math.isfinite(value := categories.get(name, 0.0)) and value}


def in_words(categories: Mapping[str, float]) -> str:
    """ "weights 1.0, activations 350, unaccounted −3 (some of it is counted twice)", in MiB."""
    parts = ", ".join(f"{clean(name)} {mib(value)}" for name, value in known(categories).items())
    return parts + " (some of it is counted twice)" * (categories.get(MEMORY_CATEGORIES[-1], 0.0) < 0)


def mib(value: float) -> str:
    """Three figures or all before the point: 0.52, 8.3, 512, 1,234."""
    return f"{value:,.{min(2, decimals(value))}f}".replace("-", "−")
