"""`run --until-ci`: seeds are added to a row until its error is known well enough, or cannot become so.

The interval is `goal_half`'s, looked at from the fifth seed on. As one stops by it, it holds the true mean in 95 %, however runs
scatter (simulated: tests/test_until_ci.py). A goal that the noise of the test images alone puts out of reach is refused: a limit of
seeds would select the rows whose spread is small by chance.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from harness.loaders.datasets import Dataset
from harness.record import Recorder
from harness.results.published import find_published
from harness.results.rows import summarise
from harness.results.statistics import GOAL_LEVEL, PRIOR_FREEDOM, goal_half, mean, prior_std, smallest, t_quantile
from harness.results.store import load_records
from harness.spec import RunSpec, UserError, refuse

FIRST, MAX_SEEDS = 5, 10
RESERVE = 1.1  # of the spread: where the limit only just suffices, the rows that reach the goal do so by chance
TYPICAL = (1.0, 5.0, 10.0)  # errors in percent


@dataclass(frozen=True, slots=True)
class Known:
    """The errors of a row's runs, in percent, each of so many images."""

    errors: tuple[float, ...] = ()
    images: int | None = None
    failed: bool = False  # a run of the row is missing, or diverged

    @property
    def half(self) -> float:
        """Half the interval of their mean, in points."""
        return goal_half(self.errors, self.images)


Rows = Mapping[RunSpec, Known]  # by their specs as seed 0


@dataclass(frozen=True, slots=True)
class Goal:
    """Half an interval, in points, and how many seeds of a row it may take."""

    half: float
    max_seeds: int = MAX_SEEDS

    def seeds(self, error: float, images: int) -> int | None:
        """How many it takes where runs scatter as the test images let expect; None above 1,000. By the error's first figure
        alone: the row's own mean must not decide whether the row goes on."""
        spread = RESERVE * prior_std(float(f"{error:.1g}"), images)

        def enough(n: int) -> bool:
            return t_quantile(0.5 + GOAL_LEVEL / 2, PRIOR_FREEDOM + n - 1) * spread <= self.half * math.sqrt(n)

        return smallest(enough, FIRST)

    def refusal(self, error: float, images: int | None) -> str | None:
        """Why the goal cannot be reached; None where it can."""
        needed = self.seeds(error, images) if images else FIRST
        if needed is not None and needed <= self.max_seeds:
            return None
        takes = f"about {needed} seeds" if needed else "more than 1,000 seeds"
        return f"±{self.half:g} points needs {takes} {'at' if error else 'even at'} an error of {error:.2g} % on {images:,} images; --max-seeds allows {self.max_seeds}"

    def open(self, known: Known) -> bool:
        """Whether a row gets a further seed."""
        n = len(known.errors)
        if known.failed or n >= self.max_seeds:
            return False
        hopeless = 0 < n <= FIRST and self.refusal(mean(known.errors), known.images)
        return not hopeless and (n < FIRST or known.half > self.half)


def make_goal(half: float | None, max_seeds: int | None, seeds: int) -> Goal | None:
    """From the options; `seeds` are those that a row begins with. Raises UserError."""
    least = max(FIRST, seeds)
    refuse({
        f"--max-seeds {max_seeds} has no effect without --until-ci":
            half is None and max_seeds is not None,
        f"--until-ci {half or 0:g}: points of error above 0 are allowed, as in 0.25": half is not None and not 0 < half < math.inf,
        f"--max-seeds {max_seeds}: at least {least} is required": max_seeds is not None and max_seeds < least,
    })  # fmt: skip
    return None if half is None else Goal(half, max_seeds or max(MAX_SEEDS, seeds))


def known_errors(recorder: Recorder, specs: Sequence[RunSpec]) -> Rows:
    """What is known of each row (its spec as seed 0): the runs that the report puts into one row, the latest such row.

    The error is the one that is compared with others: of the test set, where images were held out.
    """
    finished = recorder.find_finished(specs)
    row_of = {spec.key: replace(spec, seed=0) for spec in specs}
    lost = {row_of[spec.key] for spec in specs if spec.key not in finished}
    known = {row: Known(failed=row in lost) for row in row_of.values()}
    folders = [recorder.paths.out / recorder.paths.name(spec) for spec in specs if spec.key in finished]
    rows = summarise(load_records(folders, recorder.known).records)
    for row in sorted(rows, key=lambda row: max(run.record.finished_at for run in row.done)):
        test = row.evaluated_on == "val"
        errors = tuple(filter(math.isfinite, row.values(row.test_metric)))
        first, spec = row.done[0].record, row_of[row.done[0].record.key]
        known[spec] = Known(errors, first.images(test=test), spec in lost or len(errors) < len(row.done))
    return known


def more_seeds(specs: Sequence[RunSpec], known: Rows, goal: Goal, concurrent_runs: int) -> list[RunSpec]:
    """The next runs of those rows that are open: to five at once, then one at a time, more where GPUs would stand idle."""
    used: dict[RunSpec, set[int]] = defaultdict(set)
    for spec in specs:
        used[replace(spec, seed=0)].add(spec.seed)
    rows = [row for row in used if goal.open(known[row])]
    each = max(1, concurrent_runs // max(1, len(rows)))
    more = []
    for row in rows:
        n = len(known[row].errors)
        free = (seed for seed in itertools.count() if seed not in used[row])
        count = min(max(each, FIRST - n), goal.max_seeds - n)
        more.append([replace(row, seed=seed) for seed in itertools.islice(free, count)])
    return [spec for turn in itertools.zip_longest(*more) for spec in turn if spec is not None]


def forecast(goal: Goal, known: Rows, dataset: Dataset) -> Iterator[str]:
    """How many seeds each row will need, in words. Raises UserError for a goal that is known to be out of reach."""
    for row, runs in known.items():
        images = runs.images or row.limit_test or len(dataset.test)
        entry = find_published(dataset.label, row.variant, row.network.depth) if dataset.original else None
        error = mean(runs.errors) if runs.errors else entry.error if entry else None
        refusal = goal.refusal(0.0 if error is None else error, images)
        if refusal and runs.half > goal.half:
            raise UserError(f"--until-ci {goal.half:g}: {row.name}: {refusal}")
        errors = TYPICAL if error is None else (error,)
        seeds = [f"{goal.seeds(e, images) or 'over 1,000'} seeds at an error of {e:.2g} %" for e in errors]
        of = f"{images:,} test images; more where runs scatter by more than these explain"
        yield f"{row.name}: ±{goal.half:g} points will take about {', '.join(seeds)} ({of})"


def describe(goal: Goal, known: Rows) -> Iterator[str]:
    """A line for each row: how well its error is known, and why no better where that is not enough."""
    for row, runs in known.items():
        n, points = len(runs.errors), f"±{runs.half:.2f} points"
        if not runs.failed and runs.half > goal.half:
            why = goal.refusal(mean(runs.errors), runs.images) if runs.errors else None
            after = f"{row.name}: after {n} seeds its error is known to {points}"
            yield f"{after}, not to ±{goal.half:g}" + (f": {why}" if why else "")
        elif not runs.failed:
            yield f"{row.name}: its error is known to {points} after {n} seeds (--until-ci {goal.half:g})"
