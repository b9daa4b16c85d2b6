"""Presets, as plain data: the runs behind one source's table, and the columns in which that source prints them.

`harness run --preset NAME` trains them, `harness report --preset NAME` prints their table. No torch here.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from harness.models.variants import default_depth, find_variant


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One source's table. Its published numbers are in results/published.toml."""

    source: str
    dataset: str
    networks: tuple[tuple[str, tuple[int, ...]], ...]
    """Variants and their depths, in the order of the source's rows."""
    columns: tuple[str, ...]
    """Of the report, in the order of the source's columns, each figure beside the published one."""
    least_accuracy: float | None = None
    """Percent, of the test set after the last epoch: what the source demands of a correct implementation."""

    def select(self, variants: Sequence[str] = (), depths: Sequence[int] = ()) -> tuple[tuple[str, int], ...]:
        """Variant and depth of every row; variants or depths that a user chose stand in place of the preset's own.

        A chosen variant that the preset has not comes at its default depth. Raises ValueError for an unknown one.
        """
        own = dict(self.networks)
        return tuple(
            (name, depth)
            for name in variants or own
            for depth in depths or own.get(name) or (default_depth(find_variant(name)),)
        )


PRESETS: dict[str, Preset] = {
    "cfmz": Preset(
        source="github.com/apark263/cfmz",
        dataset="cifar10",
        networks=(("msra", (20, 32, 56, 110)),),
        columns=(
            "depth", "nvml_process_mib", "published_memory_mib", "epoch_seconds", "published_epoch_seconds",
            "error", "published_error", "train_seconds", "n",
        ),
    ),
    "fattorib": Preset(
        source="github.com/fattorib/ResNets-CIFAR10",
        dataset="cifar10",
        networks=(("fattorib", (20, 32, 44, 56)),),
        columns=("depth", "paper_error", "published_error", "test_error", "n"),
    ),
    "mpmz": Preset(
        source="github.com/apark263/mpmz",
        dataset="miniplaces",
        networks=(("mpmz", (74,)),),
        columns=("variant", "depth", "top5_error", "published_error", "error", "train_seconds", "n"),
    ),
    "convnet": Preset(
        source="github.com/KaushikRoy94/Work",
        dataset="cifar2",
        networks=(("convnet", (8,)),),
        columns=("variant", "accuracy", "error", "published_error", "train_seconds", "published_epoch_seconds", "n"),
        least_accuracy=95.0,
    ),
    "ladder": Preset(
        source="github.com/iamVarunAnand/image_classification",
        dataset="cifar10",
        networks=(
            ("he2015", (20,)),
            ("keras-xresnet", (20,)),
            ("keras-mxresnet", (20,)),
            ("keras-se-mxresnet", (20,)),
            ("keras-se-mxresnet-cosine", (20,)),
            ("keras-se-mxresnet-smooth", (20,)),
            ("keras-se-mxresnet-mixup", (20,)),
            ("keras-se-mxresnet-reflect", (20, 32, 44, 56)),
            ("keras-xresnet-bottleneck", (29,)),
            ("keras-xresnext-16x2d", (29,)),
            ("keras-se-mxresnext-16x2d-reflect", (29,)),
        ),
        columns=("variant", "depth", "parameters", "test_error", "published_error", "test_accuracy", "n"),
    ),
}  # fmt: skip


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises ValueError where there is none."""
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"unknown preset {name!r}: {hint}allowed are {', '.join(PRESETS)}")
