"""Importance in sweeps, by simulation: what matters comes first, and chance is known for what it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from harness.results.sweeps import Dimension, Importance, Trial, weigh, weigh_both

FIELDS = ("momentum", "weight_decay", "label_smoothing", "gamma")
DIMENSIONS = [
    Dimension(field="lr", function="loguniform", values=(1e-3, 1.0)),
    *(Dimension(field=name, function="uniform", values=(0.0, 1.0)) for name in FIELDS),
]


def make_trials(n: int, effect: float, draw: np.random.Generator) -> list[Trial]:
    """The error is U-shaped in the logarithm of lr: `effect` points at the ends, none in the middle; and noise of 1."""
    trials = []
    for number in range(n):
        fields = {"lr": float(10 ** draw.uniform(-3, 0)), **{name: float(draw.random()) for name in FIELDS}}
        bowl = (np.log10(fields["lr"]) + 1.5) ** 2 / 1.5**2
        error = 10 + effect * bowl + 3 * fields["momentum"] + draw.standard_normal()
        trials.append(
            Trial(number=number + 1, fields=fields, state="finished", epochs=1, curve=[(1, float(error))])
        )
    return trials


def known(importance: Importance | None) -> Importance:
    assert importance is not None
    return importance


@pytest.mark.parametrize(("n", "least"), [(16, 0.9), (32, 0.95)])
def test_a_best_value_in_the_middle_ranks_first(n: int, least: float) -> None:
    draw = np.random.default_rng(0)
    found = [known(weigh(make_trials(n, 12.0, draw), DIMENSIONS)) for _ in range(100)]
    assert np.mean([one.fields[0].field == "lr" for one in found]) >= least
    assert np.mean([one.fields[0].p is not None and one.fields[0].p <= 0.05 for one in found]) >= 0.9
    assert np.mean([one.fields[0].sign not in ("less is better", "more is better") for one in found]) >= 0.9


def test_chance_is_known_for_what_it_is() -> None:
    draw, above, values = np.random.default_rng(0), 0, []
    for _ in range(150):
        trials = make_trials(16, 0.0, draw)
        for trial in trials:
            trial.curve = [(1, float(draw.standard_normal()))]
        found = known(weigh(trials, DIMENSIONS))
        above += found.fields[0].value > found.null
        values += [field.value for field in found.fields]
    assert np.mean(values) < 0.05, "no share of the ranking is explained, as each trial is left out in its turn"
    assert above <= 0.1 * 150  # 5 %, and the simulation's own error


def test_too_few_trials_are_not_weighed() -> None:
    draw = np.random.default_rng(0)
    assert weigh(make_trials(7, 12.0, draw), DIMENSIONS) is None
    assert weigh(make_trials(8, 12.0, draw), DIMENSIONS) is not None
    trials = make_trials(9, 12.0, draw)
    trials[0].state = trials[1].state = "failed"
    assert weigh(trials, DIMENSIONS) is None
    for trial in (same := make_trials(9, 12.0, draw)):
        trial.curve = [(1, 5.0)]
    assert weigh(same, DIMENSIONS) is None


def make_words(n: int, value: Any) -> list[Trial]:
    draw = np.random.default_rng(0)
    fields = [
        {"shortcut": ("A", "B", "projection")[k % 3], "lr": float(draw.random()), "depth": (8, 14)[k % 2]}
        for k in range(n)
    ]
    return [
        Trial(number=k, fields=f, state="finished", epochs=1, curve=[(1, value(f) + draw.normal())])
        for k, f in enumerate(fields)
    ]


def test_words_and_two_values() -> None:
    dimensions = [Dimension(field="shortcut", function="choice", values=("A", "B", "projection")), DIMENSIONS[0],
                  Dimension(field="depth", function="choice", values=(8, 14))]  # fmt: skip
    first = known(weigh(make_words(18, lambda f: 9.0 * (f["shortcut"] != "B")), dimensions)).fields[0]
    assert (first.field, first.sign) == ("shortcut", "B is best")
    first = known(weigh(make_words(18, lambda f: -f["depth"]), dimensions)).fields[0]
    assert (first.field, first.sign) == ("depth", "more is better")
    first = known(weigh(make_words(18, lambda f: 90 * f["lr"]), dimensions)).fields[0]
    assert (first.field, first.sign) == ("lr", "less is better")


def test_what_acts_late_is_seen_in_the_trials_that_went_on() -> None:
    """lr acts at first, momentum at the end: the list over all trials cannot know, the one of the later epoch does."""
    draw, trials = np.random.default_rng(0), []
    for number in range(40):
        fields = {"lr": float(10 ** draw.uniform(-3, 0)), **{name: float(draw.random()) for name in FIELDS}}
        curve = [(1, 50 + 10 * float(np.log10(fields["lr"]))), (9, 10 + 20 * fields["momentum"])]
        ended = number % 2
        trials.append(Trial(number=number, fields=fields, state="finished" if ended else "pruned", epochs=9 if ended else 1,
                            curve=curve if ended else curve[:1]))  # fmt: skip
    both = {name: known(one) for name, one in weigh_both(trials, DIMENSIONS).items()}
    early, late = both["importance"], both["late_importance"]
    assert (early.epoch, early.trials, early.fields[0].field) == (1, 40, "lr")
    assert (late.epoch, late.trials, late.fields[0].field) == (9, 20, "momentum")
    assert weigh(trials, DIMENSIONS) == early, "the same again"
