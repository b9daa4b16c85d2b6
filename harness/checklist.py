"""What checks are: their results, and of the measured ones how much each may find and what runs do where it fails.

The functions are in `harness.training.checks`; those that look at what is installed in `harness.commands.check`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.spec import RunSpec

REFUSE, WARN, SHOW = "refuse", "warn", "show"
STYLES = {"ok": "green", "passed": "green", "missing": "red", "failed": "red"}  # of states; others are yellow


@dataclass(frozen=True, slots=True)
class Check:
    """A function of `harness.training.checks`, whose figure must not exceed `limit`: docs/gpus.md says where limits
    come from. Where it fails, runs that rest on it do `otherwise`: REFUSE, WARN, or take that value in place."""

    name: str
    function: str
    limit: float
    otherwise: str
    of: tuple[str, str] | None = None  # field and value of the runs that rest on it; None: all do
    ranks: bool = False  # needs several, and only their runs rest on it
    gpu: bool = False  # skipped on a CPU

    def concerns(self, spec: RunSpec) -> bool:
        """Whether a run rests on it."""
        own = self.of is None or getattr(spec, self.of[0]) == self.of[1]
        return own and self.otherwise != SHOW and (spec.workers > 1 or not self.ranks)


CHECKS = (
    Check("eager", "check_eager", 0.9, REFUSE),
    Check("loader resident", "check_loader", 1e-4, REFUSE, ("loader", "resident")),
    Check("loader dataloader", "check_loader", 1e-4, "resident", ("loader", "dataloader")),
    Check("loader dali", "check_loader", 1e-4, "resident", ("loader", "dali")),
    Check("engine graph", "check_engine", 1e-3, "eager", ("engine", "graph"), gpu=True),
    Check("engine compile", "check_engine", 1e-3, "eager", ("engine", "compile")),
    Check("precision tf32", "check_precision", 5e-2, REFUSE, ("precision", "tf32"), gpu=True),
    Check("precision bf16", "check_precision", 5e-2, REFUSE, ("precision", "bf16")),
    Check("precision fp16", "check_precision", 5e-2, REFUSE, ("precision", "fp16"), gpu=True),
    Check("resume", "check_resume", 0.0, WARN),
    Check("memory", "check_memory", 0.05, WARN, gpu=True),
    Check("clock", "check_clock", 0.02, WARN),
    Check("peak", "show_peak", 0.0, SHOW),
    Check("seconds per step", "show_seconds", 0.0, SHOW),
    Check("sum of gradients", "check_sum", 0.0, REFUSE, ranks=True),
    Check("ranks eager", "check_ranks", 1e-3, REFUSE, ("engine", "eager"), ranks=True),
    Check("ranks graph", "check_ranks", 1e-3, "eager", ("engine", "graph"), ranks=True, gpu=True),
    Check("process group", "check_group", 5.0, WARN, ranks=True),
)
BY_NAME = {check.name: check for check in CHECKS}


@dataclass(frozen=True, slots=True)
class Result:
    """What a check came to. Skipped: there is nothing to check here. Left out: there was no time."""

    name: str
    state: str  # passed, failed, skipped, left out; of what is installed and of nodes ok, missing, absent, warning
    detail: str

    def line(self) -> str:
        """ "passed   loader dali: ..." """
        return f"{self.state:8} {self.name}: {self.detail}"


class Finding(Exception):  # noqa: N818
    """A check that comes to neither words nor a figure: its state; what is there, and advice."""


def attempt(name: str, check: Callable[..., Any], *args: Any, limit: float | None = None) -> Result:
    """What a check comes to that returns words or, with a limit, a figure and words. One that raises has found a fault,
    but for a package that is not there to be measured."""
    try:
        found = check(*args)
    except Finding as finding:
        return Result(name, finding.args[0], "; ".join(finding.args[1:]))
    except Exception as error:
        state = "missing" if limit is None else "skipped" if isinstance(error, ImportError) else "failed"
        return Result(name, state, (str(error).strip() or type(error).__name__).splitlines()[0][:200])
    if limit is None:
        return Result(name, "ok", found)
    figure, words = found
    words += f" (limit {limit:g})" if limit else ""
    return Result(name, "passed" if figure <= limit else "failed", words)  # NaN fails
