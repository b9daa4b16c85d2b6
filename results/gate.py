"""`compare --fail-on`: conditions for continuous integration, tested on the interval."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from harness.results.compare import Comparison, Pair, find_metric
from harness.results.statistics import ALPHA, Estimate, Shift, holm


class Condition(NamedTuple):
    """error>+0.3: B's error is more than 0.3 points above A's; epoch_seconds>5%: B's epochs take over 5 % longer."""

    metric: str
    above: bool
    limit: float
    percent: bool

    def __str__(self) -> str:
        return f"{self.metric}{'>' if self.above else '<'}{self.limit:+g}{'%' if self.percent else ''}"

    def on(self, figure: Comparison) -> tuple[Estimate | Shift, float] | None:
        """The test and the limit on its scale, both mirrored for "<"; None where there is none."""
        relative, centre = figure.metric.relative, figure.a.value
        limit = self.limit / 100 if self.percent else self.limit
        if figure.test is None or centre is None or (relative != self.percent and centre == 0):
            return None
        if relative != self.percent:
            limit = limit / centre if relative else limit * centre
        if relative:
            limit = math.log1p(limit) if limit > -1 else -math.inf
        return (figure.test, limit) if self.above else (-figure.test, -limit)


def parse_fail_on(text: str) -> tuple[Condition, ...]:
    """Read 'error>+0.3,epoch_seconds>5%'. Raises ValueError, in one line, for what does not parse."""
    conditions = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*([<>])\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*(%?)\s*", part)
        if match is None:
            raise ValueError(f"cannot read {part.strip()!r}: write conditions like error>+0.3,epoch_seconds>5%")
        name, sign, limit, percent = match.groups()
        find_metric(name)
        conditions.append(Condition(name, sign == ">", float(limit), bool(percent)))
    return tuple(conditions)


class Gate(NamedTuple):
    """What `--fail-on` comes to: lines for what fails, and for what the runs cannot tell."""

    failed: list[str]
    unclear: list[str]


def check_conditions(pairs: Sequence[Pair], conditions: Sequence[Condition]) -> Gate:
    """Test every pair, each condition at 5 % over all pairs (Holm).

    A condition is met where the difference is beyond its limit and the interval beyond 0 (or the limit, if that is
    nearer), and by the interval alone where that is beyond a limit that is worse than 0.
    """
    gate = Gate([], [])
    if not conditions:
        return gate
    gate.failed.extend(f"{pair.name}: {problem}" for pair in pairs for problem in pair.problems())
    both = [pair for pair in pairs if pair.figures]
    if not pairs:
        gate.failed.append("no two rows could be compared")
    for condition in conditions:
        figures = [next(f for f in pair.figures if f.metric.name == condition.metric) for pair in both]
        tests = [condition.on(figure) if figure.a.n and figure.b.n else None for figure in figures]
        ps = holm([on[0].p_above(min(0.0, on[1])) if on else 1.0 for on in tests])
        for pair, figure, on, p in zip(both, figures, tests, ps, strict=True):
            line = f"{pair.name}: {condition}"
            if not (figure.a.n and figure.b.n):
                gate.failed.append(f"{line} cannot be checked, {condition.metric} was not measured on both sides")
            elif on is None:
                gate.unclear.append(f"{line} cannot tell: {figure if figure.test is None else 'A is 0'}")
            elif (on[0].value > on[1] and p <= ALPHA + 1e-9) or on[0].interval().low > on[1] > 0:
                gate.failed.append(f"{line} fails: {figure}")
            elif on[0].interval().high > on[1]:
                gate.unclear.append(f"{line} cannot tell: {figure}")
    return gate
