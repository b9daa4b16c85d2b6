"""Presets: the runs behind one source's table, and the columns in which that source prints them (presets.toml).

`harness run --preset NAME` trains them, `harness report --preset NAME` prints their table. No torch here.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.models.variants import default_depth, find, find_variant


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One source's table: see presets.toml."""

    source: str
    dataset: str
    networks: dict[str, list[int]]
    columns: list[str]
    least_accuracy: float | None = None

    def select(self, variants: Sequence[str] = (), depths: Sequence[int] = ()) -> tuple[tuple[str, int], ...]:
        """Variant and depth of every row; variants or depths that a user chose stand in place of the preset's own.

        A chosen variant that the preset has not comes at its default depth. Raises ValueError for an unknown one.
        """
        return tuple(
            (name, depth)
            for name in variants or self.networks
            for depth in depths or self.networks.get(name) or (default_depth(find_variant(name)),)
        )


PRESETS = {
    name: Preset(**fields)
    for name, fields in tomllib.loads(Path(__file__).with_suffix(".toml").read_text()).items()
}


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises ValueError where there is none."""
    return find("preset", name, PRESETS)
