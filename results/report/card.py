"""A model card: what stands beside a run's weights, from its record alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from harness.results.metrics import METRICS
from harness.results.metrics import figures as plain
from harness.results.report.text import clean
from harness.results.values import Record

CARD = "README.md"


def fill_template(name: str, **values: Any) -> str:
    """Text by a template beside this file; no control characters in what it prints of the values."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, finalize=lambda value: clean(value) if type(value) is str else value,
    )  # fmt: skip
    return environment.get_template(name).render(**values)


def make_card(record: Record, *, about: str = "", classes: int | None = None) -> str:
    """Markdown with the front matter of model hubs: figures, network, recipe, how to load it and train it again.

    `about`: a sentence on the variant. `classes`: of the data set. Raises ValueError for a run without a result.
    """
    if record.result is None:
        raise ValueError(f"{record.name} has no result")
    figures = [
        {"heading": m.heading, "text": m.text(value), "means": m.means}
        for m in METRICS.values()
        if (value := m.value(record.result)) is not None
    ]
    versions = record.environment.get("versions") or {}
    return fill_template(
        "card.md.j2", record=record, result=record.result, images=record.images(), figures=figures, about=about, classes=classes,
        version=versions.get("resnet-harness"),
        peak=None if record.result.mfu is None else plain((record.result.peak_flops or 0) / 1e12),
    )  # fmt: skip
