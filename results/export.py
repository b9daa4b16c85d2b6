"""Stored runs for other tools: TensorBoard, MLflow, Weights & Biases. One walk over the store, one writer a tool."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from harness.results.metrics import run_figures
from harness.results.store import Stored, load_epochs
from harness.results.values import EpochMetrics, flatten

Point = tuple[dict[str, float], int, float]
"""Figures by name of an epoch, or at last of the whole run; the epoch, or 0; its end in seconds since 1970."""
Target = Callable[[Stored, Sequence[Point]], bool]
"""Writes one run into a tool; False where the tool has that run already."""

EPOCH_FIGURES = [n for n, field in EpochMetrics.model_fields.items() if field.annotation in (float, float | None)]


def export(runs: Iterable[Stored], target: Target) -> int:
    """Write every epoch of every run that the tool does not have yet; returns how many runs those were.

    Raises ValueError for a line of epochs.jsonl that does not parse, ImportError where the tool is not installed.
    """
    exported = 0
    for run in runs:
        at, points = run.record.started_at.timestamp(), list[Point]()
        for epoch in load_epochs(run.folder):
            at += epoch.train_seconds + epoch.eval_seconds
            figures = {name: value for name in EPOCH_FIGURES if (value := getattr(epoch, name)) is not None}
            points.append((figures, epoch.epoch, at))
        exported += target(run, [*points, (summary(run), 0, run.record.finished_at.timestamp())])
    return exported


def summary(run: Stored) -> dict[str, float]:
    """The figures of a whole run; "run_" before the name of one that an epoch has too."""
    if (result := run.record.result) is None:
        return {}
    values = run_figures(result) | dict(flatten({"by_category_mib": result.memory.by_category_mib}))
    return {(f"run_{n}" if n in EPOCH_FIGURES else n): value for n, value in values.items() if value is not None}


def tensorboard(run: Stored, points: Sequence[Point]) -> bool:
    """An event file in the run's own folder, so that `tensorboard --logdir runs` shows every run by its name."""
    if any(run.folder.glob("events.out.tfevents.*")):
        return False
    from tensorboardX import SummaryWriter

    with TemporaryDirectory(prefix=".events-", dir=run.folder) as unfinished:
        with SummaryWriter(logdir=unfinished) as writer:
            writer.add_text("spec", f"```\n{json.dumps(run.record.spec, indent=1)}\n```", 0)
            for figures, epoch, at in points:
                for name, value in figures.items():
                    writer.add_scalar(name, value, epoch, walltime=at)
        for path in Path(unfinished).iterdir():
            path.rename(run.folder / path.name)
    return True


def mlflow(run: Stored, points: Sequence[Point]) -> bool:
    """A run in the experiment named by the data set, where MLFLOW_TRACKING_URI says."""
    import mlflow as tool

    client, record = tool.MlflowClient(), run.record
    experiment = tool.set_experiment(record.dataset).experiment_id
    tags = {"key": record.key, "finished_at": record.finished_at.isoformat()}
    if client.search_runs([experiment], " and ".join(f"tags.{n} = '{v}'" for n, v in tags.items()), max_results=1):
        return False
    started, ended = (int(at.timestamp() * 1000) for at in (record.started_at, record.finished_at))
    about = {"key": record.key, "folder": str(run.folder)}
    own = client.create_run(experiment, start_time=started, tags=about, run_name=record.name).info.run_id
    try:
        tool.log_params({name: str(setting)[:500] for name, setting in flatten(record.spec)}, run_id=own)
        for figures, epoch, at in points:
            tool.log_metrics(figures, step=epoch, timestamp=int(at * 1000), run_id=own)
        # last: without it no later export takes the run for whole
        client.set_tag(own, "finished_at", tags["finished_at"])
    except BaseException:
        client.delete_run(own)
        raise
    client.set_terminated(own, {"done": "FINISHED", "failed": "FAILED", "pruned": "KILLED"}[record.status], ended)
    return True


def wandb(run: Stored, points: Sequence[Point]) -> bool:
    """A run in the project that WANDB_PROJECT names, in the mode that WANDB_MODE says."""
    import wandb as tool

    record = run.record
    own = tool.init(
        id=f"{record.key}-{int(record.finished_at.timestamp())}", name=record.name, resume="allow",
        group=f"{record.variant}-{record.depth}", config={name: str(setting) for name, setting in flatten(record.spec)}, reinit=True,
    )  # fmt: skip
    failed, known = True, own.resumed and own.summary.get("exported")
    try:
        if not known:
            *epochs, (whole, _, _) = points
            for figures, epoch, _ in epochs:
                if (
                    epoch >= own.starting_step
                ):  # of an export that was interrupted; an earlier one would be refused
                    own.log({**figures, "epoch": epoch}, step=epoch)
            own.summary.update({**whole, "exported": True})
        failed = record.status != "done"
    finally:
        own.finish(exit_code=int(failed))
    return not known


TARGETS: dict[str, Target] = {"tensorboard": tensorboard, "mlflow": mlflow, "wandb": wandb}
