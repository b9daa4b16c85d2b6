"""What is stored of a run: its record, its epochs, what a probe predicted of it. Frozen pydantic values.

Errors are in percent, of the images that `RunResult.evaluated_on` names. A figure that could not be measured is null
with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from statistics import median
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator


class Value(BaseModel):
    """Frozen, and without unknown fields: a misspelt field in a hand-edited record is an error that names it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, ser_json_inf_nan="constants")


class Measurement(Value):
    """A figure that cannot be measured everywhere: a value, or null with the reason."""

    value: float | None
    reason: str | None = None


def measured(value: float | None, reason: str | None) -> Measurement:
    """The value, or why there is none."""
    return Measurement(value=value, reason=reason if value is None else None)


UNMEASURED = Measurement(value=None, reason="not measured")


class EpochMetrics(Value):
    """One epoch. The times do not overlap."""

    epoch: int  # from 1
    steps: int
    images: int  # training images over all ranks
    loss: float  # mean over the epoch's training images, by the training's own loss
    train_error: float | None = None  # of the training images, as each step saw them before it learnt from them
    error: float
    top5_error: float | None = None
    eval_loss: float | None = None  # mean cross-entropy over the images that `error` is of
    test_error: float | None = None  # of the test set, where `error` is of images held out
    lr: float  # at the epoch's last step
    train_seconds: float
    data_stall_seconds: float  # part of train_seconds: waiting for the loader
    eval_seconds: float
    images_per_second: float
    timed: bool = True  # False: excluded from the medians
    untimed: str = ""  # why: "warm-up", "partial epoch", "interference: the machine swapped"
    energy_joules: float | None = None  # of all GPUs of the run while it trained
    interference: tuple[str, ...] = ()  # what disturbed the timing
    attempt: int = 1
    workers: int | None = None  # DDP workers of this epoch, where they were not as many as requested
    skew: float | None = None  # slowest over fastest rank's train_seconds; None with one rank
    slowest_rank: int | None = None


MEMORY_CATEGORIES = (
    "weights", "gradients", "optimizer state", "activations", "allocator slack", "data loader", "NCCL",
    "CUDA context", "kernels", "process at its start", "unaccounted",
)  # fmt: skip
"""In the order they are shown. "kernels", on a GPU only: all else that grew outside torch's allocator until the end of the
warm-up, as libraries load their kernels. "process at its start", on the CPU only: Python and its libraries; activations are
part of "unaccounted" there. "unaccounted" is the difference to the measured total, and may be negative."""


class Memory(Value):
    """Peaks over the run, after warm-up, of the rank that used most. MiB = 2**20 bytes."""

    torch_allocated_mib: Measurement  # torch.cuda.max_memory_allocated
    torch_reserved_mib: Measurement  # torch.cuda.max_memory_reserved
    nvml_process_mib: Measurement  # NVML's used memory of this process: with DALI, NCCL and the CUDA context
    rss_mib: Measurement  # peak resident memory on the host
    warmup_allocated_mib: Measurement = UNMEASURED  # peaks of set-up and warm-up
    warmup_reserved_mib: Measurement = UNMEASURED
    growth_mib_per_epoch: Measurement = UNMEASURED  # slope of the memory in use, after warm-up
    by_category_mib: dict[str, float] = {}  # MEMORY_CATEGORIES -> its part of nvml_process_mib (CPU: of rss_mib)


class GpuUse(Value):
    """One GPU of a node, sampled about once a second during a run, including other processes' use."""

    gpu: str  # as CUDA_VISIBLE_DEVICES names it
    utilisation_percent: Measurement  # mean of the samples: share of time in which some kernel ran
    power_watts: Measurement  # mean
    power_peak_watts: Measurement
    energy_joules: Measurement  # NVML's counter, over the whole window
    memory_peak_mib: Measurement  # of all processes


class NodeUse(Value):
    """One node of a run, from its workers' start to their end: set-up, evaluation and checkpoints included."""

    host: str
    seconds: float
    samples: int
    cpu_percent: Measurement  # mean over all processors of the node, of all processes
    memory_peak_mib: Measurement  # of the node
    gpus: tuple[GpuUse, ...] = ()
    gpus_reason: str | None = None  # why `gpus` is empty


class RankUse(Value):
    """One rank in the last attempt: medians over its timed epochs, and peaks as in `Memory`."""

    rank: int
    host: str
    train_seconds: float | None
    data_stall_seconds: float | None  # part of train_seconds
    torch_allocated_mib: float | None
    torch_reserved_mib: float | None
    nvml_process_mib: float | None
    rss_mib: float | None


class Timing(Value):
    """The epochs behind a run's seconds."""

    epochs: int  # timed
    fastest: float | None  # seconds; None: no epoch was timed
    slowest: float | None
    untimed: dict[str, int] = {}  # why the others were left out, and how many


class RunResult(Value):
    parameters: int
    evaluated_on: Literal["test", "val"]
    evaluated_images: int  # of which the errors are
    test_images: int | None = None  # of which `test_error` is
    epochs: tuple[EpochMetrics, ...] = ()  # empty in what `load_records` returns: use `load_epochs(folder)`
    final_error: float
    best_error: float
    best_epoch: int
    final_top5_error: float | None = None
    test_error: float | None = None  # of the last epoch, where `evaluated_on` is "val"
    test_top5_error: float | None = None
    epoch_seconds: float | None  # median over timed epochs; None where none was timed
    timing: Timing | None = None  # filled in by `store.finish`
    warmup_epochs: int  # untimed epochs at the start
    eval_seconds: float | None
    images_per_second: float | None
    data_stall_percent: float | None = None  # of the train_seconds of `timed_epochs`; filled in by `store.finish`
    setup_seconds: float  # from entering the train function to the first training step: data, network, engine
    launch_seconds: float | None = None  # from submitting the run to entering the train function
    train_seconds: float  # sum over epochs
    energy_joules: Measurement = UNMEASURED  # of all GPUs, sum over epochs
    interference: tuple[str, ...] = ()  # of any epoch
    memory: Memory
    workers: int  # DDP workers, as requested
    widths: tuple[int, ...] = ()  # numbers of workers in turn, (2, 1), where they were not always `workers`
    batch_size: int  # global
    batch_size_per_gpu: int
    threads: int  # CPU threads of one worker
    device: str  # "NVIDIA H200", "AMD EPYC"
    forward_flops: int | None = None  # of one image, by torch's counter; a multiplication and an addition are two
    peak_flops: float | None = None  # per second, of one worker's device in the run's precision
    peak_source: str = ""
    machine: dict[str, Any] = {}  # host, GPU, driver, versions, on the rank 0 worker
    attempts: int = 1
    engine: str | None = None  # the one that was used, which a fallback makes differ from the spec's
    runs_per_gpu: int = 1  # processes that shared each GPU; where more than 1, no epoch is timed
    warnings: tuple[str, ...] = ()  # a damaged checkpoint, an engine fallback
    ranks: tuple[RankUse, ...] = ()
    nodes: tuple[NodeUse, ...] = ()  # in the last attempt

    @property
    def accuracy(self) -> float:
        return 100 - self.final_error

    @property
    def mfu(self) -> Measurement:
        """Model FLOPs utilisation in percent (arXiv:2204.02311, appendix B). Training is three forward passes: backward
        takes a product for the inputs and one for the weights."""
        if self.images_per_second is None or self.forward_flops is None or self.peak_flops is None:
            return UNMEASURED if self.images_per_second else Measurement(value=None, reason="no epoch was timed")
        share = 100 * 3 * self.forward_flops * self.images_per_second / (self.workers * self.peak_flops)
        busy = "faster than the measured peak, perhaps of a busy device: `harness check` measures it again"
        return measured(share if share <= 100 else None, busy)

    @property
    def all_disturbed(self) -> bool:
        """Whether its seconds are of disturbed epochs, as there are no others."""
        return self.epoch_seconds is not None and self.timing is not None and not self.timing.epochs

    @property
    def test_accuracy(self) -> float | None:
        return None if self.test_error is None else 100 - self.test_error


def timed_epochs(epochs: Sequence[EpochMetrics]) -> list[EpochMetrics]:
    """Those that seconds are of. Where every epoch was disturbed, they are shown, with a note: `all_disturbed`."""
    return [e for e in epochs if e.timed] or [e for e in epochs if e.untimed.startswith("interference")]


def summarise_epochs(epochs: Sequence[EpochMetrics]) -> dict[str, Any]:
    """The figures of a RunResult that follow from its epochs alone."""
    timed = timed_epochs(epochs)
    seconds = median([epoch.train_seconds for epoch in timed]) if timed else None
    best = min(epochs, key=lambda epoch: epoch.error)
    return {
        "final_error": epochs[-1].error, "final_top5_error": epochs[-1].top5_error, "best_error": best.error,
        "best_epoch": best.epoch, "train_seconds": sum(epoch.train_seconds for epoch in epochs),
        "eval_seconds": median([epoch.eval_seconds for epoch in epochs]),
        "epoch_seconds": seconds,
        "images_per_second": median([epoch.images for epoch in timed]) / seconds if seconds else None,
    }  # fmt: skip


class Failure(Value):
    kind: Literal["OOM", "NaN", "killed", "exception"]
    message: str
    traceback: str = ""


class Pruned(Value):
    """A run that a search pruned before its end: its error is not a result, and is never averaged."""

    by: str  # the rule, "asha" or "median"
    sweep: str  # name of the search
    epoch: int  # the last one
    of: int
    error: float  # after that epoch
    evaluated_on: Literal["test", "val"]


class Record(Value):
    """One run: its whole spec, its result or failure, and everything needed to repeat or question it."""

    schema_version: Literal[1] = 1
    key: str  # hash of the whole spec
    name: str  # folder
    status: Literal["done", "failed", "pruned"]
    variant: str
    depth: int
    seed: int
    dataset: str  # label for tables: "cifar10", "cifar10-q75", "digits"
    original: bool  # the images are the published data set's, so published numbers are comparable
    spec: dict[str, Any]
    result: RunResult | None = None
    failure: Failure | None = None
    pruned: Pruned | None = None
    environment: dict[str, Any]  # commit, dirty, versions, gpu, driver, host, command
    added_until: float | None = None  # points: --until-ci added this seed, as the interval was wider than that
    started_at: datetime
    finished_at: datetime

    @model_validator(mode="after")
    def _check(self) -> Self:
        """A run has either a result, a failure or the epoch at which a search pruned it."""
        outcomes = {"done": self.result, "failed": self.failure, "pruned": self.pruned}
        if (given := [status for status, outcome in outcomes.items() if outcome is not None]) != [self.status]:
            raise ValueError(f"its status is {self.status}, its outcome {' and '.join(given) or 'missing'}")
        return self

    def images(self, *, test: bool = False) -> int | None:
        """How many images the errors are of, or `test_error`."""
        if self.result is None:
            return None
        return self.result.test_images if test else self.result.evaluated_images


class Prediction(Value):
    """What a short probe predicts of a run, whatever its seed. Warm-up is excluded."""

    schema_version: Literal[1] = 1
    spec: dict[str, Any]  # of the run, without its seed
    steps: int  # training steps that were timed
    epoch_seconds: float  # training only, as in `RunResult`
    eval_seconds: float  # one evaluation
    setup_seconds: float  # from submitting the probe to the end of its warm-up
    epochs: float  # of the whole run; the last one may be partial
    energy_joules: Measurement  # of all GPUs during one epoch of training
    memory: Memory
    interference: tuple[str, ...] = ()  # what disturbed the timing
    workers: int
    threads: int  # CPU threads of one worker
    device: str
    made_at: datetime
    epoch_steps: int | None = None
    gradient_bytes: int | None = None  # of one rank
    hidden_epoch_seconds: float | None = None
    """Of a run with more workers than were probed: with their all-reduces hidden behind computation; `epoch_seconds` is
    with none hidden."""

    @property
    def run_seconds(self) -> float:
        """The whole run: set-up, epochs, an evaluation after each."""
        return self.setup_seconds + self.epochs * self.epoch_seconds + math.ceil(self.epochs) * self.eval_seconds

    @property
    def run_joules(self) -> Measurement:
        """Energy of all GPUs while the whole run trains."""
        joules = self.energy_joules.value
        return self.energy_joules if joules is None else Measurement(value=self.epochs * joules)


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, None for a number that JSON cannot hold."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested dictionaries: {"recipe": {"lr": 0.1}} gives ("recipe.lr", 0.1)."""
    leaves: list[tuple[str, Any]] = []
    for name, value in values.items():
        leaves += flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return leaves


def setting(of: object, path: str, *kinds: type) -> Any:
    """A value inside dictionaries and values, "recipe.lr"; None where it is missing or not of these types."""
    value: Any = of
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return value if isinstance(value, kinds or object) else None
