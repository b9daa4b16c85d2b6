"""What is wrong with a word that is none of the allowed ones, in a line. Imports nothing of the package: all of it uses this."""

from __future__ import annotations

import difflib
from collections.abc import Collection

FEW = 20  # words that a message lists
OTHER_NAMES = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "batch": "batch_size",
    "model": "variant",
    "epochs": "recipe.duration",
}


def suggest(word: str, allowed: Collection[str]) -> str:
    """ "; did you mean dali?", or "" where no allowed word is near."""
    other = OTHER_NAMES.get(word, "")
    of_part = [each for each in allowed if each.endswith(f".{word}")]  # recipe.lr, for lr
    near = of_part or [other] if of_part or other in allowed else difflib.get_close_matches(word, allowed, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def unknown(what: str, word: str, allowed: Collection[str]) -> str:
    """ "loader 'dalli' is unknown; did you mean dali? (allowed: ...)": the nearest word, and all where they are few."""
    near = suggest(word, allowed)
    every = "" if near and len(allowed) > FEW else f" (allowed: {', '.join(allowed) or 'none'})"
    return f"{what} {word!r} is unknown{near}{every}"
