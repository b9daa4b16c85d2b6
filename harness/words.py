"""The words in which lists are typed: "msra,he2015", "20..56", "3". Raise UserError for anything else."""

from __future__ import annotations

import re
from collections.abc import Sequence

from harness.models.variants import VARIANTS, default_depth, find_variant
from harness.spec import UserError

MOST_NUMBERS = 1000  # in a list of seeds


def parse_words(text: str, what: str = "") -> tuple[str, ...]:
    """ "a,b" -> ("a", "b"), each once."""
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UserError(f"{what} {text!r}: a list with commas and no empty places is allowed, as in a,b")
    return tuple(dict.fromkeys(words))


def parse_variants(text: str) -> tuple[str, ...]:
    """ "msra,he2015" -> ("msra", "he2015"); "all": every one."""
    return tuple(VARIANTS) if text.strip() == "all" else parse_words(text, "--variants")


def parse_depths(text: str, variants: Sequence[str] = ()) -> tuple[int, ...]:
    """ "20,32" -> (20, 32); "20..32" -> those from 20 to 32 that all the variants allow, of which each has its own."""

    def legal(depth: int) -> bool:
        try:
            return all(function(depth) for function in map(find_variant, variants) if default_depth(function))
        except ValueError:
            return False

    depths: list[int] = []
    for word in parse_words(text, "--depths"):
        numbers = _numbers(word, "--depths", text)
        chosen = [n for n in numbers if legal(n)] if len(numbers) > 1 else numbers
        if not chosen:
            raise UserError(
                f"--depths {word}: no depth from {numbers[0]} to {numbers[-1]} is one of {', '.join(variants)}"
            )
        depths += chosen
    return tuple(dict.fromkeys(depths))


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "3" -> (0, 1, 2), a count; "0,7" -> (0, 7), the seeds themselves; "7," -> (7,); "3..5" -> (3, 4, 5)."""
    if "," not in text and ".." not in text:
        count = _whole(text, "--seeds", text)
        if not 1 <= count <= MOST_NUMBERS:
            raise UserError(f"--seeds {text}: a count from 1 to 1000 is allowed, or a list of seeds as in 0,7")
        return tuple(range(count))
    words = parse_words(text.rstrip(","), "--seeds")
    return tuple(dict.fromkeys(seed for word in words for seed in _numbers(word, "--seeds", text)))


def parse_scales(text: str) -> tuple[int, ...]:
    """ "96,112,128" -> (96, 112, 128), in pixels."""
    words = parse_words(text, "--scales")
    if not all(re.fullmatch(r"[1-9]\d{0,3}", word) for word in words):
        raise UserError(f"--scales {text!r}: whole numbers of pixels from 1 to 9999 are allowed, as in 96,112,128")
    return tuple(map(int, words))


def _numbers(word: str, option: str, text: str) -> Sequence[int]:
    """ "7" -> 7; "3..5" -> 3, 4, 5."""
    first, dots, last = word.partition("..")
    low = _whole(first, option, text)
    high = _whole(last, option, text) if dots else low
    if not low <= high < low + MOST_NUMBERS:
        raise UserError(
            f"{option} {word}: a range of at most 1000 numbers, the lowest first, is allowed, as in 20..56"
        )
    return range(low, high + 1)


def _whole(word: str, option: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", word.strip()):
        raise UserError(f"{option} {text!r}: {word!r} is not a whole number")
    return int(word)
