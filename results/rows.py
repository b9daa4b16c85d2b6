"""Records -> rows.

A row stands for all runs that differ in nothing but the seed. Runs that differ in anything else that splits by
`identity.RULES` are never averaged silently: they get rows of their own, and rows that would look the same name what
they differ in. What is only noted is in `Row.conditions`.
"""

from __future__ import annotations

import math
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from harness.results.identity import SPLIT, conditions, surroundings
from harness.results.metrics import METRICS, NONE, Figure, rounded
from harness.results.published import find_published
from harness.results.statistics import MIN_SEEDS, Against, adjust, judge, mean
from harness.results.store import Interrupted, Stored, collector_paused
from harness.results.values import Prediction, Record, RunResult, Timing, flatten, setting
from harness.words import unknown

TIMED = ("epoch_seconds", "images_per_second", "mfu", "data_stall_percent")  # metrics of timed epochs
FIELDS = tomllib.loads(Path(__file__).with_name("fields.toml").read_text(encoding="utf-8"))


@dataclass(kw_only=True, slots=True)
class Row:
    """All runs of one spec but for the seed."""

    variant: str
    depth: int
    dataset: str  # label
    original: bool
    evaluated_on: str
    device: str
    workers: int
    batch_size: int
    spec: Mapping[str, Any]  # of one of its runs
    fields: Mapping[str, str]  # everything in which rows can differ, flattened
    differs: dict[str, str] = field(default_factory=dict)  # field -> its text: what tells this row from others
    across: Mapping[str, tuple[str, ...]]  # field that --across names -> its values
    conditions: Mapping[str, Mapping[str, int]]  # what is noted: value -> runs

    done: tuple[Stored, ...]  # one per seed, those that --until-ci added last
    failed: tuple[Stored, ...]
    pruned: tuple[Stored, ...]  # by a search, before their end
    interrupted: tuple[Interrupted, ...]
    repeated: int  # earlier runs of seeds that are counted once
    results: Sequence[RunResult]  # of the runs that are done: `_undisturbed`

    figures: Mapping[str, Figure]  # by the names of `METRICS`
    by_category_mib: Mapping[str, float]  # of the run that used most memory
    against: Against | None = None
    predicted: Prediction | None = None  # by a probe on such a device, with as many threads

    @property
    def name(self) -> str:
        """msra-20, say, or msra-20/56; a network of one depth has no number."""
        depth = self.text("network.depth", str(self.depth))
        return self.text("variant", self.variant) + f"-{depth}" * bool(self.depth)

    @property
    def averaged_over(self) -> dict[str, tuple[str, ...]]:
        """Field -> its values, where there are several."""
        return {name: values for name, values in self.across.items() if len(values) > 1}

    @property
    def error(self) -> float | None:
        """Of the last epoch, in percent."""
        return self.figures["error"].value

    @property
    def test_metric(self) -> str:
        """The error of the test set; with `--val`, `error` is of the images held out."""
        return "test_error" if self.evaluated_on == "val" else "error"

    @property
    def timing(self) -> Timing | None:
        """The timed epochs of all runs together, 0 where the seconds are of disturbed ones; None where a record does not say."""
        timed = [result.timing for result in self.results if result.epoch_seconds is not None]
        known = [timing for timing in timed if timing]
        if len(known) < len(timed) or not timed:
            return None
        fastest = min((timing.fastest for timing in known if timing.fastest is not None), default=None)
        slowest = max((timing.slowest for timing in known if timing.slowest is not None), default=None)
        return Timing(epochs=sum(timing.epochs for timing in known), fastest=fastest, slowest=slowest)

    @property
    def best_minus_last(self) -> float | None:
        """Points by which the error falls where the epoch is chosen on the evaluated images; at most 0."""
        best, last = self.figures["best_error"].value, self.error
        return None if best is None or last is None else best - last

    @property
    def duration(self) -> str:
        """ "180 epochs" """
        if (duration := setting(self.spec, "recipe.duration", int, float)) is None:
            return NONE
        number = "/".join(self.averaged_over.get("recipe.duration", ())) or f"{duration:,g}"
        return f"{number} {self.text('recipe.unit', 'epoch')}{'s' * (number != '1')}"

    @property
    def batch_norm_images(self) -> int:
        """Over how many images of a step each batch norm takes its statistics."""
        local = setting(self.spec, "recipe.batch_norm", str) != "sync"
        return self.batch_size // max(1, self.workers) if local else self.batch_size

    def text(self, name: str, otherwise: str = NONE) -> str:
        """A field; all its values, where the row averages over them."""
        return "/".join(self.across.get(name, ())) or self.fields.get(name, otherwise)

    @property
    def planned(self) -> int | None:
        """How many runs were chosen before --until-ci added others for their spread; None: all."""
        added = sum(run.record.added_until is not None for run in self.done)
        return (len(self.done) - added or None) if added else None

    def measured(self, name: str) -> list[tuple[Record, float]]:
        """Each run that measured a metric, and its figure; the planned runs first."""
        known = zip(self.done, map(METRICS[name].value, self.results), strict=True)
        return [(run.record, value) for run, value in known if value is not None]

    def values(self, name: str) -> list[float]:
        """A metric of each run that measured it; the planned ones first."""
        return [value for _, value in self.measured(name)]


Fields = tuple[tuple[str, str], ...]
_Member = tuple[Stored | Interrupted, Fields]
"""A run and all its fields."""


@collector_paused()
def summarise(
    records: Iterable[Stored],
    interrupted: Iterable[Interrupted] = (),
    across: Sequence[str] = (),
    predictions: Iterable[Prediction] = (),
) -> list[Row]:
    """Group runs by everything but the seed, ordered by data set, variant and depth.

    `across` names fields (of `Row.fields`: "workers", "recipe.lr") whose values may be averaged together; the table
    then says so in a footnote. Raises ValueError for a field that no run has.
    """
    runs: list[tuple[Stored | Interrupted, Mapping[str, Any], Fields]]
    runs = [(stored, stored.record.spec, surroundings(stored.record)) for stored in records]
    runs += [(run, run.spec or {"run": run.name}, ()) for run in interrupted]
    groups: dict[Fields, list[_Member]] = defaultdict(list)
    # of a spec and a code, and of a spec: the first group, which runs without a result join
    first: dict[tuple[Fields, object], Fields] = {}
    # of runs that differ in their seed alone: the group and all fields
    places: dict[tuple[object, ...], tuple[Fields, Fields]] = {}
    for run, spec, around in sorted(runs, key=lambda run: not run[2]):
        code = run.record.environment.get("code") if isinstance(run, Stored) else None
        if (alike := (repr({**spec, "seed": None}), around, code)) not in places:
            own = flatten_spec(spec)
            every = tuple((own | dict(around)).items())
            bare, whole = (tuple((n, v) for n, v in f if n not in across) for f in (own.items(), every))
            key = whole if around else first.get((bare, code)) or first.get((bare, None), bare)
            for of in (code, None):
                first.setdefault((bare, of), key)
            places[alike] = key, every
        key, every = places[alike]
        groups[key].append((run, every))
    rows = [_make_row(dict(key), members, across) for key, members in groups.items()]
    known = {name for members in groups.values() if across for _, every in members for name, _ in every}
    known.update(*(row.conditions for row in rows))
    for name in across:
        if name not in known:
            raise ValueError(unknown("field", name, sorted(known)))
    predicted: dict[object, Prediction] = {}  # the latest; of runs that are not done on any device
    for prediction in predictions:
        key = tuple(flatten_spec(prediction.spec).items())
        predicted |= {key: prediction, (key, prediction.device, str(prediction.threads)): prediction}
    for row in rows:
        if predicted:
            key = tuple((n, v) for n, v in row.fields.items() if n not in SPLIT.values() or n in row.spec)
            row.predicted = predicted.get((key, row.device, row.fields.get("threads")) if row.done else key)
        row.against = _judge(row)
    adjust([row.against for row in rows if row.against])
    rows.sort(key=lambda row: (row.dataset, row.variant, row.depth, row.workers, tuple(row.fields.items())))
    _name_differences(rows)
    return rows


def flatten_spec(spec: Mapping[str, Any]) -> dict[str, str]:
    """{"recipe": {"lr": 0.1}, "seed": 0} -> {"recipe.lr": "0.1"}, sorted by name, without the seed."""
    return {name: _word(value) for name, value in sorted(flatten(spec)) if name != "seed"}


def _word(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_word, value)) or NONE
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return NONE if value is None else str(value)


# --- a group -> a row ---


def _make_row(fields: dict[str, str], members: Sequence[_Member], across: Sequence[str]) -> Row:
    stored = [(run, every) for run, every in members if isinstance(run, Stored)]
    stored.sort(key=lambda member: member[0].record.finished_at)
    # of each seed its last run: one that was run again is not another sample, but two devices are
    last = {(run.record.result is None, run.record.seed, every): run for run, every in stored}
    finished = [last[key] for key in sorted(last) if last[key].record.result]
    done = sorted(finished, key=lambda run: run.record.added_until is not None)
    specs = [run.record.spec for run in done]  # with the seed
    lacking = [run for (lacks, *_), run in last.items() if lacks and run.record.spec not in specs]
    failed, pruned = (tuple(run for run in lacking if getattr(run.record, how)) for how in ("failure", "pruned"))
    waiting = [run for run, _ in members if isinstance(run, Interrupted) and run.spec not in specs]
    interrupted = tuple({repr(run.spec): run for run in waiting}.values())  # each once
    values = {n: tuple(dict.fromkeys(v for _, every in members for m, v in every if m == n)) for n in across}
    results = _undisturbed([run.record.result for run in done if run.record.result])
    known = [run.record for run in (*done, *failed, *pruned)]
    about = known[0] if known else interrupted[0]
    noted: dict[str, Counter[str]] = defaultdict(Counter)
    for name, value in (noting for run in done for noting in conditions(run.record).items()):
        noted[name][value] += 1
    spec, device = about.spec, results[0].device if results else NONE
    return Row(
        variant=setting(spec, "variant", str) or about.name, depth=setting(spec, "network.depth", int) or 0,
        dataset=known[0].dataset if known else about.name.split("_")[0] if spec else NONE,
        original=bool(known) and all(record.original for record in known),
        evaluated_on=results[0].evaluated_on if results else "val" if setting(spec, "recipe.val", int) else "test",
        device=device, workers=setting(spec, "workers", int) or 1,
        batch_size=setting(spec, "recipe.batch_size", int) or (results[0].batch_size if results else 0),
        spec=spec, fields=fields, across=values, conditions=noted, done=tuple(done), failed=failed, pruned=pruned,
        interrupted=interrupted, repeated=sum(run.record.result is not None for run, _ in stored) - len(done), results=results,
        figures={name: metric.summarise(results) for name, metric in METRICS.items()},
        by_category_mib=max((r.memory.by_category_mib for r in results), key=lambda c: sum(c.values()), default={}),
    )  # fmt: skip


def _undisturbed(results: Sequence[RunResult]) -> Sequence[RunResult]:
    """Runs of a row; where some have undisturbed epochs, the others are as if no epoch was timed."""
    if all(result.all_disturbed or result.epoch_seconds is None for result in results):
        return results
    nothing = dict.fromkeys(("epoch_seconds", "images_per_second", "data_stall_percent"))
    return [result.model_copy(update=nothing) if result.all_disturbed else result for result in results]


# --- beside published errors ---


def incomparable(row: Row) -> list[tuple[str, str]]:
    """Why a row is never set beside published errors, and the column that says so."""
    limit, widths = setting(row.spec, "limit_test", int), row.text("widths", "")
    known: list[tuple[object, str, str]] = [
        (
            (row.done or row.failed or row.pruned) and not row.original,
            f"{row.dataset} is not a published data set's own images",
            "dataset",
        ),
        (setting(row.spec, "limit_train", int), "trained on a part of the training set", "limit_train"),
        (limit is not None, f"of {limit or 0:,} of the test images", "error"),
        (row.text("loader") == "synthetic", "synthetic images", "loader"),
        (widths, f"world size {widths}: the cluster had no room for {row.workers} workers", "error"),
        *((v, f"averaged over {n}: {', '.join(v)}, as requested", "n") for n, v in row.averaged_over.items()),
    ]
    return [(text, column) for applies, text, column in known if applies]


def _judge(row: Row) -> Against | None:
    """The published number beside a row, and the verdict where one is due, not adjusted for other rows."""
    published = find_published(row.dataset, row.variant, row.depth)
    changed = {text.partition("=")[0] for text in row.text("overrides").split(",")}
    if published is None or incomparable(row) or changed - {NONE, *published.changes}:
        return None
    test = row.evaluated_on == "test"  # else the best epoch was chosen, and measured, on other images
    last = row.values(("" if test else "test_") + ("top5_error" if published.error is None else "error"))
    best = row.values("best_error") if test and published.error else []
    ours = best if published.rule == "best" else last
    if not ours or not all(map(math.isfinite, ours)):
        return None
    differences, precision = published.differences(row.spec), row.text("precision")
    local = f"batch norm over {row.batch_norm_images} images a worker, theirs over {row.batch_size}"
    unlike = [
        (differences, "; ".join(differences[:3])),
        (differences[3:], f"{len(differences) - 3} more fields"),
        (precision != published.precision, f"{precision}, theirs {published.precision}"),
        (row.batch_norm_images != row.batch_size, local),
        (published.rule != "last" and not best, "theirs may be a best epoch, and the best on the test set is not known of ours"),
        (len(row.done) < MIN_SEEDS, f"fewer than {MIN_SEEDS} seeds"),
    ]  # fmt: skip
    if reason := "; ".join(text for applies, text in unlike if applies):
        return Against(published, mean(ours) - published.number, reason=reason)
    return judge(published, last, best, row.planned)


# --- what tells rows apart ---


def shorten(values: Collection[str]) -> dict[str, str]:
    """Values -> their texts: rounded, and cut to twelve letters or as many as different values need to stay different."""
    for most in range(12, 13 + max(map(len, values))):
        texts = {v: text if len(text := rounded(v)) <= most + 4 else f"{text[:most]}…" for v in values}
        if len(set(texts.values())) == len(texts):
            return texts
    return {value: value for value in values}


def _name_differences(rows: Sequence[Row]) -> None:
    """Name, in each row, the fields without a column of their own in which comparable rows differ.

    Networks and recipes are compared within a variant and depth, fingerprints within a data set, all else over all
    rows: two loaders are not comparable where one of them ran with another version of torch.
    """

    texts = cache(lambda name: shorten({row.fields.get(name, NONE) for row in rows}))

    def extend(row: Row, names: Iterable[str]) -> None:
        row.differs |= {name: texts(name)[row.fields.get(name, NONE)] for name in names}

    def varying(key: Callable[[Row], object]) -> dict[object, set[str]]:
        """By group of rows: the fields of which they have several values."""
        pairs: dict[object, set[tuple[str, str]]] = defaultdict(set)
        for row in rows:
            pairs[key(row)].update(row.fields.items())
        counted = {group: Counter(name for name, _ in both) for group, both in pairs.items()}
        return {group: {name for name, count in names.items() if count > 1} for group, names in counted.items()}

    keys: list[Callable[[Row], object]] = [
        lambda _: None, lambda row: row.dataset,
        lambda row: (row.dataset, row.variant, row.depth, row.fields.get("overrides")),
    ]  # fmt: skip
    found = [(key, varying(key)) for key in keys]
    place = cache(lambda name: 2 if name.startswith(("recipe.", "network.")) else name == "fingerprint")
    alike: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    named, shown = FIELDS["named"], FIELDS["shown"]
    for row in rows:
        telling = [groups[key(row)] for key, groups in found]
        extend(row, [n for n in row.fields if n in named or (n not in shown and n in telling[place(n)])])
        alike[row.dataset, row.device, *row.differs.items(), *map(row.fields.get, shown)].append(row)
    for members in alike.values():  # a field that only some of them have: widths of an elastic run
        names = sorted({name for row in members[1:] for name in (*row.fields, *members[0].fields)})
        apart = [name for name in names if len({row.fields.get(name) for row in members}) > 1]
        for row in members:
            extend(row, apart)
