"""A model card: what stands beside a run's weights, from its record alone."""

from __future__ import annotations

from harness.results.metrics import METRICS, figures
from harness.results.report.text import fill_template
from harness.results.values import Record

CARD = "README.md"


def make_card(record: Record, *, about: str = "", classes: int | None = None) -> str:
    """Markdown with the front matter of model hubs: figures, network, recipe, how to load it and train it again.

    `about`: a sentence on the variant. `classes`: of the data set. Raises ValueError for a run without a result.
    """
    if record.result is None:
        raise ValueError(f"{record.name} has no result")
    version = (record.environment.get("versions") or {}).get("resnet-harness")
    known = {"record": record, "result": record.result, "images": record.images(), "version": version}
    return fill_template(
        "card.md.j2", metrics=METRICS.values(), figures=figures, about=about, classes=classes, **known
    )
