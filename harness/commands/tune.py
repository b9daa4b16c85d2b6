"""A search space -> trials -> the best spec. What `harness tune` does."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import statistics
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, get_args

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from harness import plan
from harness.cluster.launch import Failed, Report, Started, Worker
from harness.commands.report import classify, describe_code, make_record, name_of
from harness.commands.run import (
    EXIT_DONE,
    EXIT_FAILED,
    Options,
    count_epochs,
    join_cluster,
    lay_out,
    load_data,
    lock_run,
    make_paths,
    stopping_on_sigterm,
)
from harness.commands.sweep import Algorithm, Log, Trial, count_trials, make_optuna_study, make_rule, propose
from harness.commands.sweep_progress import Board, best_first, describe
from harness.deadline import stopping_at
from harness.loaders.datasets import Dataset
from harness.models.variants import default_depth, find_variant
from harness.plan import Allocation, Grid
from harness.results.report.sweeps import METRICS, TRIALS
from harness.results.report.text import Sheet, for_terminal
from harness.results.store import (
    RECORD,
    SWEEPS,
    fail,
    finish,
    finished_dir,
    load_epochs,
    load_records,
    partial_dir,
    prune,
    start,
)
from harness.results.values import EpochMetrics, Pruned, Record, RunResult
from harness.search_space import Dimension, format_value, parse_search
from harness.spec import RunPaths, RunSpec, UserError

ALGORITHMS = get_args(Algorithm)
SCHEDULERS = ("asha", "median", "none")
VAL = 5_000
SEEDS = 5  # of the command that trains the winner


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """What a user asked for. Kept in sweep.json, from which an interrupted search goes on."""

    variant: str
    depth: int | None = None  # None: the variant's default
    search: tuple[str, ...] = ()
    samples: int | None = None
    search_algorithm: str = "random"
    scheduler: str = "asha"
    metric: str = "error"
    seed: int = 0  # of the proposals, and of every trial's training
    dataset: str = "cifar10"
    data_dir: Path | None = None
    loader: str = "dali"
    precision: str = "fp32"
    engine: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    val: int | None = None  # None: 5,000 or a tenth
    limit_train: int | None = None
    gpus: int | None = None
    workers: int | None = None
    gpus_per_trial: float = 1.0
    concurrent: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """A search with everything found out that does not change while it runs."""

    asked: Search
    name: str
    folder: Path
    dimensions: tuple[Dimension, ...]
    dataset: Dataset
    places: RunPaths
    width: Allocation
    epochs: int
    total: int

    def make_spec(self, settings: Mapping[str, Any]) -> RunSpec:
        """The run of one point. Raises UserError where it cannot be one."""
        return _make_spec(self.asked, settings, self.width, self.dataset)


def tune(asked: Search, options: Options, console: Console, *, resume: str | None, given: Collection[str]) -> int:
    """Run a search, or go on with one, and print what came of it. Returns the exit code.

    `given` names the fields of `asked` that the user typed: a resumed search keeps its own, and contradicting them is
    an error. Raises UserError before anything is started for whatever cannot work.
    """
    out = plan.check_out(options.out)
    folder = None
    if resume is not None:
        folder = _find_sweep(out, resume)
        asked = _load_asked(folder, asked, given)
    dimensions = _check(asked)
    options = replace(
        options, out=out, data_dir=asked.data_dir, gpus=asked.gpus, workers=asked.workers or 1, launcher="ray"
    )
    with ExitStack() as stack, stopping_at(options.until):
        sweep = _make_sweep(asked, {})
        width = lay_out(sweep, options, stack)
        dataset = load_data(sweep, options, console)
        if asked.metric == "top5_error" and dataset.num_classes <= 10:
            raise UserError(
                f"--metric top5_error: {asked.dataset} has {dataset.num_classes} classes, too few for a top-5"
            )
        asked, why_val = _settle(asked, width, dataset)
        total = count_trials(dimensions, asked.samples)
        width = _pack(width, asked, total)
        specs = [_make_spec(asked, point, width, dataset) for point in _corners(dimensions)]
        epochs = count_epochs(specs[0], dataset)
        if folder is None:
            folder = _make_folder(out, specs[0], dataset.label)
            _write_json(folder / "sweep.json", {
                "schema_version": 1, "name": folder.name, "asked": asdict(asked), "fingerprint": dataset.fingerprint,
                "selected_on": "val" if specs[0].recipe.val else "test", "val": specs[0].recipe.val,
                "epochs": epochs, "created_at": datetime.now(UTC).isoformat(), **describe_code(),
            })  # fmt: skip
        elif json.loads((folder / "sweep.json").read_bytes())["fingerprint"] != dataset.fingerprint:
            raise UserError(
                f"--resume {folder.name}: its images of {asked.dataset} were other ones than those here"
            )
        _lock(folder, stack)
        made = _Plan(
            asked=asked, name=folder.name, folder=folder, dimensions=dimensions, dataset=dataset,
            places=make_paths(options, dataset), width=width, epochs=epochs, total=total,
        )  # fmt: skip
        log = Log(folder / "log.jsonl", make_rule(asked.scheduler, epochs), epochs)
        console.print(
            f"sweep {escape(made.name)}: {total} trials of {epochs} epochs, {width.concurrent_runs} at a time; {why_val}",
            style="dim", soft_wrap=True, highlight=False,
        )  # fmt: skip
        if options.address is None:
            join_cluster(
                stack,
                None,
                cpus=width.threads * width.workers * width.concurrent_runs,
                gpus=width.gpus,
                verbose=options.verbose,
            )
        try:
            _run(made, log, console)
        except KeyboardInterrupt as stop:
            why = str(stop) or "stopped"  # TimeUp says more
            console.print(f"{why}; harness tune --resume {made.name} goes on", soft_wrap=True, highlight=False)
            raise
    weights = weigh(made.dimensions, log.trials, optuna=asked.search_algorithm == "optuna")
    _write_json(made.folder / TRIALS, _summary(made, log.trials, weights))
    _print_answer(made, log.trials, weights, console)
    return EXIT_DONE if any(trial.state == "finished" for trial in log.trials) else EXIT_FAILED


def train_trial(spec: RunSpec, worker: Worker, report: Report, *, places: RunPaths) -> RunResult:
    """Train a run as `harness run` does; one that was interrupted reports the epochs it has behind it, too."""
    from harness.training.train import train

    if worker.rank:
        return train(spec, worker, report, paths=places)
    folder = partial_dir(places.out, name_of(spec, places.label))
    told = 0

    def catch_up() -> None:
        nonlocal told
        for metrics in load_epochs(folder):
            if metrics.epoch > told:
                told = metrics.epoch
                report(metrics)

    catch_up()
    # a kill between checkpoint and report leaves epochs that only the checkpoint knows, until `train` reads it
    result = train(spec, worker, lambda _: catch_up(), paths=places)
    catch_up()
    return result


# --- before ---


def _check(asked: Search) -> tuple[Dimension, ...]:
    """Every check that needs neither data nor devices."""
    plan.check_word(asked.search_algorithm, ALGORITHMS, "--search-algorithm")
    plan.check_word(asked.scheduler, SCHEDULERS, "--scheduler")
    plan.check_word(asked.metric, tuple(METRICS), "--metric")
    plan.check_count(asked.samples, "--samples")
    plan.check_count(asked.concurrent, "--concurrent")
    plan.check_count(asked.seed, "--seed", least=0)
    dimensions = parse_search(asked.search)
    if not dimensions:
        raise UserError("--search is missing: name a field to search, as in --search lr=loguniform(0.01,1)")
    functions = {dimension.function for dimension in dimensions}
    if asked.search_algorithm == "optuna":
        if "grid" in functions:
            raise UserError(
                "--search-algorithm optuna makes its own choice of points: choice(...) instead of grid(...)"
            )
        make_optuna_study(dimensions, ())
    searched = {dimension.field for dimension in dimensions}
    if asked.batch_size is not None and "batch_size" in searched:
        raise UserError("batch_size is searched: leave --batch-size out")
    if asked.depth is not None and "depth" in searched:
        raise UserError("depth is searched: leave --depth out")
    if not 0 < asked.gpus_per_trial <= 1:
        raise UserError(f"--gpus-per-trial {asked.gpus_per_trial:g}: a share above 0 and up to 1 is allowed")
    if asked.gpus_per_trial < 1:
        if (asked.workers or 1) > 1:
            raise UserError(f"--gpus-per-trial {asked.gpus_per_trial:g} is for one worker, not {asked.workers}")
        if asked.metric == "epoch_seconds":
            raise UserError(
                "--metric epoch_seconds: packed trials slow each other down; leave --gpus-per-trial out"
            )
    plan.check_grid(_make_sweep(asked, {}))
    for dimension in dimensions:
        if dimension.field == "depth":
            for depth in dimension.finite or ():
                plan.check_grid(_make_sweep(asked, {"depth": depth}))
    return dimensions


def _corners(dimensions: Sequence[Dimension]) -> list[dict[str, Any]]:
    """A few points of the space that between them have every listed value and every bound: what is wrong with one
    of them is said before anything starts."""
    lists = [dimension.finite or dimension.values for dimension in dimensions]
    return [
        {d.field: values[min(i, len(values) - 1)] for d, values in zip(dimensions, lists, strict=True)}
        for i in range(max(map(len, lists)))
    ]


def _make_sweep(asked: Search, settings: Mapping[str, Any]) -> Grid:
    settings = dict(settings)
    depth = settings.pop("depth", asked.depth)
    return Grid(
        variants=(asked.variant,),
        depths=() if depth is None else (depth,),
        seeds=(asked.seed,),
        dataset=asked.dataset,
        loader=asked.loader,
        precision=asked.precision,
        engine=asked.engine,
        epochs=asked.epochs,
        batch_size=asked.batch_size,
        val=asked.val,
        limit_train=asked.limit_train,
        settings=settings,
    )


def _make_spec(asked: Search, settings: Mapping[str, Any], width: Allocation, dataset: Dataset) -> RunSpec:
    (spec,) = plan.expand(
        _make_sweep(asked, settings), width, fingerprint=dataset.fingerprint, train_images=len(dataset.train)
    )
    return spec


def _settle(asked: Search, width: Allocation, dataset: Dataset) -> tuple[Search, str]:
    """Write down what was left to the machine and the data, and say what trials are judged by."""
    function = find_variant(asked.variant)
    own = function(asked.depth or default_depth(function)).recipe.val
    images = min(asked.limit_train or len(dataset.train), len(dataset.train))
    tenth = images // 10
    val = asked.val if asked.val is not None else own or min(VAL, tenth)
    asked = replace(asked, gpus=width.gpus, workers=width.workers, val=val)
    if asked.metric in ("loss", "epoch_seconds"):
        return asked, f"judged by {METRICS[asked.metric]}"
    if not val:
        return asked, "judged ON THE TEST SET, as asked for: the winner's test error is too good"
    share = f", a tenth of {images:,}" if val == tenth else ""
    return asked, f"judged by {METRICS[asked.metric]} of {val:,} held-out training images{share}"


def _pack(width: Allocation, asked: Search, total: int) -> Allocation:
    """Lay trials over the machine: on CPUs one core a worker, on GPUs as many as the share allows."""
    most = width.concurrent_runs
    if width.device == "cpu":
        cpus = width.concurrent_runs * width.workers * width.threads
        concurrent_runs = min(asked.concurrent or cpus, cpus // width.workers, total)
        return replace(width, concurrent_runs=concurrent_runs, threads=cpus // (concurrent_runs * width.workers))
    packed = math.floor(1 / asked.gpus_per_trial + 1e-9)
    most *= packed
    return replace(
        width, concurrent_runs=min(asked.concurrent or most, most, total), threads=max(1, width.threads // packed)
    )


def _make_folder(out: Path, spec: RunSpec, label: str) -> Path:
    """runs/tune/msra-20_cifar10_20260102-030405, not there before."""
    words = f"{spec.variant}-{spec.network.depth}_{label}_{datetime.now(UTC):%Y%m%d-%H%M%S}"
    name = re.sub(r"[^A-Za-z0-9.+_]+", "-", words)
    for number in range(1, 1000):
        folder = out / SWEEPS / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise UserError(f"--out {out}: no free name for a sweep beside {name}")


def _find_sweep(out: Path, name: str) -> Path:
    folder = out / SWEEPS / name
    if not name or not (folder / "sweep.json").is_file():
        there = sorted(path.parent.name for path in out.glob(f"{SWEEPS}/*/sweep.json"))
        if there:
            plan.check_word(name, there, "--resume")
        raise UserError(f"--resume {name!r}: there is no sweep in {out}")
    return folder


def _load_asked(folder: Path, asked: Search, given: Collection[str]) -> Search:
    """What the search was asked for; the command line may repeat it, not contradict it."""
    try:
        stored = json.loads((folder / "sweep.json").read_bytes())["asked"]
        stored["search"] = tuple(stored["search"])
        stored["data_dir"] = None if stored["data_dir"] is None else Path(stored["data_dir"])
        before = Search(**stored)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume {folder.name}: sweep.json is broken: {error}") from None
    for item in fields(Search):
        old, new = getattr(before, item.name), getattr(asked, item.name)
        if item.name in given and new != old and item.name != "data_dir":
            option = f"--{item.name.replace('_', '-')}"
            raise UserError(
                f"{option}: sweep {folder.name} was begun with {old}, and goes on with that: leave it out"
            )
    return replace(before, data_dir=asked.data_dir) if "data_dir" in given else before


def _lock(folder: Path, stack: ExitStack) -> None:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"--resume {folder.name}: another harness command is running it") from None
    stack.callback(lock.release)


# --- while it runs ---


def _run(made: _Plan, log: Log, console: Console) -> None:
    from harness.cluster.search import search

    board = Board(
        log.trials,
        console,
        total=made.total,
        epochs=made.epochs,
        concurrent_runs=made.width.concurrent_runs,
        metric=made.asked.metric,
    )
    trials = _Trials(made, log, board)
    try:
        with stopping_on_sigterm(), board:
            search(
                partial(train_trial, places=made.places), trials,
                workers=made.width.workers, concurrent_runs=made.width.concurrent_runs, threads=made.width.threads,
                gpus=made.asked.gpus_per_trial if made.width.device == "cuda" else 0,
                storage=made.folder / f".ray-{os.getpid()}",
            )  # fmt: skip
    finally:
        trials.close()


@dataclass(slots=True)
class _Live:
    """A trial that is running."""

    trial: Trial
    spec: RunSpec
    lock: FileLock
    started_at: datetime
    rows: list[EpochMetrics] = field(default_factory=list)


class _Trials:
    """The search as `harness.cluster.search` sees it: proposes runs, judges epochs, stores outcomes."""

    def __init__(self, made: _Plan, log: Log, board: Board) -> None:
        self.made, self.log, self.board = made, log, board
        self.live: dict[str, _Live] = {}
        self.waiting = [trial for trial in log.trials if trial.state == "running"]

    def close(self) -> None:
        """Give the runs back that have not ended."""
        for live in self.live.values():
            live.lock.release()

    def propose(self) -> tuple[str, RunSpec] | None:
        """The next trial that needs training; those that are stored already end here."""
        made = self.made
        while True:
            if self.waiting:
                trial = self.waiting.pop(0)
                spec = made.make_spec(trial.fields)
            elif len(self.log.trials) < made.total:
                point = propose(
                    made.dimensions, made.asked.search_algorithm, made.asked.seed, self.log.trials  # type: ignore[arg-type]
                )  # fmt: skip
                if point is None:
                    return None
                spec = made.make_spec(point)
                trial = self.log.proposed(point, name_of(spec, made.places.label), spec.key)
            else:
                return None
            try:
                lock = lock_run(spec, made.places.label, made.places.out)
            except UserError as error:
                self._end(trial, "failed", reason=str(error))
                continue
            if self._take(trial, spec):
                lock.release()
                continue
            live = self.live[str(trial.number)] = _Live(trial, spec, lock, datetime.now(UTC))
            if trial.number in self.log.to_stop:  # the driver was killed between the decision and its record
                live.rows = load_epochs(partial_dir(made.places.out, trial.run))
                self.ended(str(trial.number), None)
                continue
            start(made.places.out, trial.run, spec.to_json())
            self.board.line(trial, f"starting, {describe(trial)}")
            return str(trial.number), spec

    def reported(self, name: str, event: Any) -> bool:
        """An attempt began, or an epoch ended; True stops the trial."""
        live = self.live[name]
        if isinstance(event, Started):
            if event.reason:
                live.rows.clear()
                self.board.say(f"trial {name}: {event.reason}; trying again ({event.attempt})")
            return False
        live.rows.append(event)
        value = _measure(live.rows, self.made.asked.metric)
        stop = self.log.reported(live.trial, event.epoch, value, event.train_seconds + event.eval_seconds)
        self.board.line(
            live.trial,
            f"epoch {event.epoch}/{self.made.epochs}  {self.made.asked.metric} {value:.4g}"
            f"  {event.train_seconds:.2f} s/epoch",
        )
        return stop

    def ended(self, name: str, outcome: RunResult | Failed | None) -> None:
        """Store what came of a trial."""
        live = self.live.pop(name)
        made = self.made
        if outcome is None:
            last = live.rows[-1]
            pruned = Pruned(
                by=made.asked.scheduler, sweep=made.name, epoch=last.epoch, of=made.epochs, error=last.error,
                evaluated_on="val" if live.spec.recipe.val else "test",
            )  # fmt: skip
            prune(made.places.out, self._record(live, pruned))
            self._end(live.trial, "pruned", reason=f"by {pruned.by} after epoch {last.epoch}")
        elif isinstance(outcome, Failed):
            fail(made.places.out, self._record(live, outcome))
            failure = classify(outcome)
            self._end(live.trial, "failed", reason=f"{failure.kind}: {failure.message}")
        else:
            finish(made.places.out, self._record(live, outcome))
            self._end(live.trial, "finished", _final(outcome, outcome.epochs, made.asked.metric))
        live.lock.release()

    def _record(self, live: _Live, outcome: RunResult | Failed | Pruned) -> Record:
        made = self.made
        record = make_record(
            live.spec, outcome, places=made.places, original=made.dataset.original, started_at=live.started_at,
            concurrent=made.width.concurrent_runs, launcher="tune",
        )  # fmt: skip
        extra: dict[str, Any] = {"sweep": made.name, "trial": live.trial.number}
        if made.width.device == "cuda" and made.asked.gpus_per_trial < 1:
            extra["gpu_share"] = made.asked.gpus_per_trial
        return record.model_copy(update={"environment": {**record.environment, **extra}})

    def _take(self, trial: Trial, spec: RunSpec) -> bool:
        """End a trial whose run is stored already, by whatever command."""
        folder = finished_dir(self.made.places.out, trial.run)
        if not (folder / RECORD).exists():
            return False
        for stored in load_records([folder]).records:
            result = stored.record.result
            if stored.record.key == spec.key and result is not None:
                rows = load_epochs(folder)
                for i, row in enumerate(rows, 1):
                    value = _measure(rows[:i], self.made.asked.metric)
                    self.log.reported(trial, row.epoch, value, row.train_seconds + row.eval_seconds)
                self._end(trial, "finished", _final(result, rows, self.made.asked.metric), "was done already")
                return True
        return False

    def _end(self, trial: Trial, state: Any, value: float | None = None, reason: str = "") -> None:
        self.log.ended(trial, state, value, reason)
        made = self.made
        _write_json(made.folder / TRIALS, _summary(made, self.log.trials))
        shown = f", {made.asked.metric} {value:.4g}" if value is not None else ""
        self.board.line(trial, f"{state}{shown}{f' ({reason})' if reason else ''}   [{self.board.summary()}]")


def _measure(rows: Sequence[EpochMetrics], metric: str) -> float:
    """The metric as it stands after some epochs."""
    last = rows[-1]
    if metric == "epoch_seconds":
        timed = [row.train_seconds for row in rows if row.timed]
        return statistics.median(timed) if timed else last.train_seconds
    if metric == "top5_error":
        return last.top5_error if last.top5_error is not None else math.inf
    return last.loss if metric == "loss" else last.error


def _final(result: RunResult, rows: Sequence[EpochMetrics], metric: str) -> float:
    """The metric of a whole run, as its record has it."""
    if metric == "error":
        return result.final_error
    if metric == "epoch_seconds" and result.epoch_seconds is not None:
        return result.epoch_seconds
    return _measure(rows, metric)


def _summary(made: _Plan, trials: Sequence[Trial], weights: Weights | None = None) -> dict[str, Any]:
    """The search for a program: what was searched, what each trial came to and, at the end, what mattered."""
    asked = made.asked
    searched = any(dimension.field == "depth" for dimension in made.dimensions)
    return {
        "schema_version": 1,
        "name": made.name,
        "variant": asked.variant,
        "depth": None if searched else asked.depth or default_depth(find_variant(asked.variant)),
        "dataset": made.places.label,
        "metric": asked.metric,
        "selected_on": "val" if asked.val else "test",
        "val": asked.val,
        "epochs": made.epochs,
        "scheduler": asked.scheduler,
        "search_algorithm": asked.search_algorithm,
        "total": made.total,
        "dimensions": [
            {"field": d.field, "function": d.function, "values": d.values, "log": d.function == "loguniform"}
            for d in made.dimensions
        ],
        "trials": [
            {
                "number": trial.number, "run": trial.run, "key": trial.key, "fields": trial.fields,
                "state": trial.state, "value": trial.value, "last": trial.last, "epochs": trial.epochs,
                "seconds": round(trial.seconds, 3), "reason": trial.reason,
                "curve": [[epoch, value] for epoch, value in sorted(trial.curve.items())],
            }
            for trial in trials
        ],
        "importance": None if weights is None else {
            "how": weights.how, "epoch": weights.epoch, "trials": weights.trials,
            "fields": [{"field": name, "value": value, "sign": sign} for name, value, sign in weights.fields],
        },
    }  # fmt: skip


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, default=str) + "\n")
    temporary.replace(path)


# --- after ---


def _print_answer(made: _Plan, trials: Sequence[Trial], weights: Weights | None, console: Console) -> None:
    """The table of all trials, what mattered, and the command that trains the winner."""
    asked = made.asked
    names = [dimension.field for dimension in made.dimensions]
    cells = [
        [
            str(trial.number), trial.state, f"{trial.epochs}/{made.epochs}",
            "–" if trial.last is None else f"{trial.last:.4g}",
            *(format_value(trial.fields[name]) for name in names),
            f"{trial.seconds:.1f}", trial.reason,
        ]
        for trial in best_first(trials)
    ]  # fmt: skip
    headers = ["trial", "state", "epochs", METRICS[asked.metric], *names, "seconds", ""]
    sheet = Sheet(headers, [True, False, *[True] * (len(names) + 3), False], cells)
    width = console.width if console.is_terminal else max(console.width, sheet.width)
    lines = [f"\n{len(trials)} trials of {asked.variant} on {made.places.label}, best first", ""]
    lines += for_terminal(sheet, width)
    lines.append(f"\nseconds: of training and evaluation. {METRICS[asked.metric]}: {_said(asked)}; of pruned and "
                 "failed trials as far as they came")  # fmt: skip
    if weights is not None:
        lines.append(f"\nimportance ({weights.how}, {weights.trials} trials at epoch {weights.epoch}):")
        lines += [f"  {name:<16} {value:.2f}  {sign}" for name, value, sign in weights.fields]
    whole = [trial for trial in best_first(trials) if trial.state == "finished"]
    if whole:
        lines.append("\nbest:")
        lines += [f"  {trial.value:.4g}  {describe(trial)}  ({trial.run})" for trial in whole[:3]]
        lines += ["\ntrain the winner in full:", f"  {shlex.join(winning_command(asked, whole[0], made))}"]
    else:
        lines.append("\nno trial came to its end")
    lines.append(f"\nstored in {made.folder}")
    console.file.write("\n".join(lines) + "\n")
    console.file.flush()


def _said(asked: Search) -> str:
    if asked.metric in ("loss", "epoch_seconds"):
        return "of the training set"
    return f"of {asked.val:,} held-out training images" if asked.val else "of the TEST SET, which was chosen by"


def winning_command(asked: Search, trial: Trial, made: _Plan) -> list[str]:
    """`harness run` over the winner's own recipe: all its epochs, all training images, several seeds, the test set."""
    settings = dict(trial.fields)
    depth = settings.pop("depth", made.make_spec(trial.fields).network.depth)
    words = ["harness", "run", "--variants", asked.variant, "--depths", str(depth), "--seeds", str(SEEDS)]
    for name, value in settings.items():
        words += ["--set", f"{name}={format_value(value)}"]
    if asked.batch_size is not None:
        words += ["--batch-size", str(asked.batch_size)]
    words += ["--dataset", asked.dataset]
    if asked.data_dir is not None:
        words += ["--data-dir", str(asked.data_dir)]
    words += ["--loader", asked.loader, "--precision", asked.precision]
    words += ["--gpus", "0"] if made.width.device == "cpu" else []
    return [*words, "--workers", str(made.width.workers), "--out", str(made.places.out)]


@dataclass(frozen=True, slots=True)
class Weights:
    """How much each field mattered: name, importance from 0 to 1, which way."""

    how: str
    epoch: int
    trials: int
    fields: tuple[tuple[str, float, str], ...]


def weigh(dimensions: Sequence[Dimension], trials: Sequence[Trial], *, optuna: bool) -> Weights | None:
    """Importance of each field for the metric, over all trials at the last epoch that all of them reached.

    Rank correlation (Spearman) for numbers; for words the share of the ranks' variance between them (its root, so that
    two words give the same figure as a rank correlation). Optuna's fANOVA where Optuna made the proposals. None for
    fewer than four trials.
    """
    known = [trial for trial in trials if trial.curve and trial.state in ("finished", "pruned")]
    if len(known) < 4:
        return None
    epoch = min(trial.epochs for trial in known)
    known = [trial for trial in known if epoch in trial.curve]
    values = [trial.curve[epoch] for trial in known]
    if len(known) < 4 or len(set(values)) == 1:
        return None
    weights = []
    for dimension in dimensions:
        points = [trial.fields[dimension.field] for trial in known]
        if len(set(points)) > 1:
            weights.append((dimension.field, *_correlate(points, values)))
    how = "rank correlation"
    if optuna and len(weights) > 1:
        import optuna as library

        whole = [replace(trial, state="finished", value=trial.curve[epoch]) for trial in known]
        found = library.importance.get_param_importances(make_optuna_study(dimensions, whole))
        weights = [(name, float(found.get(name, 0.0)), sign) for name, _, sign in weights]
        how = "Optuna's, shares of the variance"
    weights.sort(key=lambda weight: -weight[1])
    return Weights(how, epoch, len(known), tuple(weights))


def _correlate(points: Sequence[Any], values: Sequence[float]) -> tuple[float, str]:
    from scipy.stats import rankdata, spearmanr

    if all(isinstance(point, int | float) and not isinstance(point, bool) for point in points):
        rho = float(spearmanr(points, values).statistic)
        return abs(rho), "more is better" if rho < 0 else "less is better"
    ranks = rankdata(values)
    groups: dict[Any, list[float]] = {}
    for point, rank in zip(points, ranks, strict=True):
        groups.setdefault(point, []).append(float(rank))
    middle = statistics.fmean(map(float, ranks))
    between = sum(len(g) * (statistics.fmean(g) - middle) ** 2 for g in groups.values())
    best = min(groups, key=lambda point: statistics.fmean(groups[point]))
    return math.sqrt(between / sum((float(r) - middle) ** 2 for r in ranks)), f"{format_value(best)} is best"
