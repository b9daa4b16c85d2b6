"""The store: one folder a run, written whole or not at all, and the values that are kept in it.

    <out>/<name>/            a finished run: record.json, epochs.jsonl, weights.safetensors
    <out>/<name>.partial/    a run that is going on, was interrupted, or failed (then it holds record.json too)

`record.json` is the last file to be written, and the folder gets its final name only after it.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1


class Value(BaseModel):
    """Frozen, and nothing unknown gets in: a hand-edited record with a misspelt field is named, not guessed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)


class Reading(Value):
    """A measurement that may be impossible here: a value, or null with the reason."""

    value: float | None
    reason: str | None = None


class EpochMetrics(Value):
    """What one epoch measured. Times exclude one another; errors in percent, of the set named in `RunResult`."""

    epoch: int  # from 1
    steps: int
    images: int  # training images over all ranks
    loss: float  # mean over the epoch's training images
    error: float
    top5_error: float | None = None
    lr: float  # at the epoch's last step
    train_seconds: float
    wait_seconds: float  # of train_seconds, spent waiting for the loader
    eval_seconds: float
    images_per_second: float
    timed: bool = True  # False: left out of the median (warm-up, partial epoch, resumed inside)
    attempt: int = 1


class Memory(Value):
    """Peaks over the run, after warm-up, of the rank that used most. MiB = 2**20 bytes."""

    torch_allocated_mib: Reading  # torch.cuda.max_memory_allocated
    torch_reserved_mib: Reading  # torch.cuda.max_memory_reserved
    nvml_process_mib: Reading  # NVML's used memory of this process: with DALI, NCCL and the CUDA context
    rss_mib: Reading  # peak resident memory on the host


class RunResult(Value):
    """What one run measured."""

    parameters: int
    evaluated_on: Literal["test", "val"]
    epochs: tuple[EpochMetrics, ...]
    final_error: float
    best_error: float
    best_epoch: int
    final_top5_error: float | None = None
    epoch_seconds: float | None  # median over timed epochs; None where none was timed
    warmup_epochs: int  # epochs left out of that median at the start
    eval_seconds: float | None
    images_per_second: float | None
    setup_seconds: float  # from entering the train function to the first training step: data, network, engine
    start_seconds: float | None = None  # launcher: from asking for the run to entering the train function
    train_seconds: float  # sum over epochs
    memory: Memory
    workers: int  # DDP width, the number of ranks
    batch_size: int  # global
    batch_size_per_gpu: int
    threads: int  # CPU threads of one worker
    device: str  # "NVIDIA H200", "AMD EPYC"
    attempts: int = 1


class Failure(Value):
    """Why a run gave no result."""

    kind: Literal["OOM", "NaN", "killed", "exception"]
    message: str
    traceback: str = ""


class Record(Value):
    """One run, as it is kept: whole spec, result or failure, and everything needed to repeat or distrust it."""

    schema_version: int = SCHEMA_VERSION
    key: str  # hash of the whole spec
    name: str  # folder
    status: Literal["done", "failed"]
    variant: str
    depth: int
    seed: int
    dataset: str  # label for tables: "cifar10", "cifar10-q75", "digits"
    original: bool  # the images are the published data set's own, so published numbers may stand beside
    spec: dict[str, Any]
    result: RunResult | None = None
    failure: Failure | None = None
    environment: dict[str, Any]  # commit, dirty, versions, gpu, driver, host, command
    started_at: datetime
    finished_at: datetime
