"""Stored runs for other tools: TensorBoard, MLflow, Weights & Biases. One walk over the store, one writer a tool."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from harness.results.metrics import run_figures
from harness.results.store import Stored, load_epochs
from harness.results.values import EpochMetrics, flatten

Write = Callable[[Mapping[str, float], int, float], None]
"""Takes an epoch's figures by name, the epoch, and the instant of its end in seconds since 1970."""
Target = Callable[[Stored], AbstractContextManager[Write | None]]
"""Opens one run in a tool; gives None where the tool has that run already."""

EPOCH_FIGURES = [
    name for name, field in EpochMetrics.model_fields.items() if field.annotation in (float, float | None)
]


def export(runs: Iterable[Stored], target: Target) -> int:
    """Write every epoch of every run that the tool does not have yet; returns how many runs those were.

    Raises ValueError for a line of epochs.jsonl that does not parse, ImportError where the tool is not installed.
    """
    exported = 0
    for run in runs:
        epochs = load_epochs(run.folder)  # before the tool learns of a run whose epochs cannot be read
        with target(run) as write:
            if write is None:
                continue
            at = run.record.started_at.timestamp()
            for epoch in epochs:
                at += epoch.train_seconds + epoch.eval_seconds
                write(_figures(epoch), epoch.epoch, at)
            exported += 1
    return exported


def _figures(epoch: EpochMetrics) -> dict[str, float]:
    return {name: value for name in EPOCH_FIGURES if (value := getattr(epoch, name)) is not None}


def summary(run: Stored) -> dict[str, float]:
    """The figures of a whole run; "run_" before the name of one that an epoch has too."""
    if (result := run.record.result) is None:
        return {}
    values = run_figures(result) | dict(flatten({"by_category_mib": result.memory.by_category_mib}))
    return {(f"run_{n}" if n in EPOCH_FIGURES else n): value for n, value in values.items() if value is not None}


@contextmanager
def tensorboard(run: Stored) -> Iterator[Write | None]:
    """An event file in the run's own folder, so that `tensorboard --logdir runs` shows every run by its name."""
    if any(run.folder.glob("events.out.tfevents.*")):
        yield None
        return
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(logdir=str(run.folder))
    try:
        writer.add_text("spec", f"```\n{json.dumps(run.record.spec, indent=1)}\n```", 0)

        def write(figures: Mapping[str, float], epoch: int, at: float) -> None:
            for name, value in figures.items():
                writer.add_scalar(name, value, epoch, walltime=at)

        yield write
        for name, figure in summary(run).items():
            writer.add_scalar(name, figure, 0, walltime=run.record.finished_at.timestamp())
    finally:
        writer.close()


@contextmanager
def mlflow(run: Stored) -> Iterator[Write | None]:
    """A run in the experiment named by the data set, where MLFLOW_TRACKING_URI says."""
    import mlflow as tool

    client = tool.MlflowClient()
    record = run.record
    experiment = client.get_experiment_by_name(record.dataset)
    number = experiment.experiment_id if experiment else client.create_experiment(record.dataset)
    finished = record.finished_at.isoformat()
    had = client.search_runs(
        [number], f"tags.key = '{record.key}' and tags.finished_at = '{finished}'", max_results=1
    )
    if had:
        yield None
        return
    started = int(record.started_at.timestamp() * 1000)
    tags = {"key": record.key, "finished_at": finished, "folder": str(run.folder)}
    made = client.create_run(number, start_time=started, tags=tags, run_name=record.name).info.run_id
    status = "FAILED"
    try:
        for name, setting in flatten(record.spec):
            client.log_param(made, name, str(setting)[:500])

        def write(figures: Mapping[str, float], epoch: int, at: float) -> None:
            metrics = [tool.entities.Metric(n, v, int(at * 1000), epoch) for n, v in figures.items()]
            client.log_batch(made, metrics=metrics)

        yield write
        for name, value in summary(run).items():
            client.log_metric(made, name, value, timestamp=int(record.finished_at.timestamp() * 1000))
        status = "FINISHED" if record.status == "done" else "FAILED" if record.status == "failed" else "KILLED"
    finally:
        client.set_terminated(made, status, end_time=int(record.finished_at.timestamp() * 1000))


@contextmanager
def wandb(run: Stored) -> Iterator[Write | None]:
    """A run in the project that WANDB_PROJECT names, in the mode that WANDB_MODE says."""
    import wandb as tool

    record = run.record
    made = tool.init(
        id=f"{record.key}-{int(record.finished_at.timestamp())}", name=record.name, resume="allow",
        group=f"{record.variant}-{record.depth}", config={name: str(setting) for name, setting in flatten(record.spec)}, reinit=True,
    )  # fmt: skip
    failed = True
    try:
        if made.resumed:
            yield None
        else:

            def write(figures: Mapping[str, float], epoch: int, at: float) -> None:
                made.log({**figures, "epoch": epoch}, step=epoch)

            yield write
            made.summary.update(summary(run))
        failed = record.status != "done"
    finally:
        made.finish(exit_code=int(failed))


TARGETS: dict[str, Target] = {"tensorboard": tensorboard, "mlflow": mlflow, "wandb": wandb}
