"""A model card: what stands beside a run's weights, from its record alone."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from harness.results.metrics import METRICS, figures
from harness.results.values import Record

CARD = "README.md"


def make_card(record: Record, *, about: str = "", classes: int | None = None) -> str:
    """Markdown with the front matter of model hubs: figures, network, recipe, how to load it and train it again.

    `about`: a sentence on the variant. `classes`: of the data set. Raises ValueError for a run without a result.
    """
    if record.result is None:
        raise ValueError(f"{record.name} has no result")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("card.md.j2").render(
        record=record, result=record.result, metrics=METRICS.values(), figures=figures, about=about, classes=classes,
        version=(record.environment.get("versions") or {}).get("resnet-harness"),
    )  # fmt: skip
