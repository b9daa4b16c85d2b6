"""The measured checks: what each is for, how much it may find, and what runs do where it fails. Plain data.

The functions are in `harness.training.checks`.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    state: str  # passed, failed, skipped, left out; of what is installed ok, missing, absent
    detail: str

    def line(self) -> str:
        """ "passed   loader dali: ..." """
        return f"{self.state:8} {self.name}: {self.detail}"
