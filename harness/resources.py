"""This machine or a Ray cluster -> Allocation; the launcher that runs on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from harness.cluster import launch
from harness.cluster.connect import ClusterError, connect, disconnect
from harness.cluster.job import Allocation, Launched
from harness.cluster.nodes import Cluster, fit
from harness.options import Grid, Resources
from harness.plan import GPU_PRECISIONS
from harness.spec import INSTALL, RunPaths, RunSpec, UserError, mistakes, refuse
from harness.training.host import count_cpus
from harness.training.nvml import count_gpus


def check_resources(resources: Resources) -> None:
    """Raise UserError for what can be seen to be wrong without devices."""
    if find_spec("torch") is None:
        raise UserError(f"torch is not installed: {INSTALL}")
    share, workers, local = resources.runs_per_gpu, resources.workers, resources.launcher == "local"
    several = workers not in (None, 1)
    refuse({
        f"--runs-per-gpu {share}: runs that share a GPU have one worker, not {workers}": share > 1 and several,
        "--address is for --launcher ray: the local launcher uses this process only": local and resources.address,
        f"--launcher local runs one worker, not {workers}; --launcher ray runs more": local and several,
        f"--launcher local runs one process; --runs-per-gpu {share} needs ray": local and share > 1,
        "--exclude-outliers is for a cluster, whose nodes are measured: it needs --address": resources.exclude_outliers
        and not resources.address,
    })  # fmt: skip


def make_allocation(grid: Grid, resources: Resources, stack: ExitStack, least: int | None = None) -> Allocation:
    """Divide the cluster at `address`, which is joined until the stack closes, or this machine among the runs. A cluster may
    have less than a run is to have where that begins with fewer workers, `least` or more. Raises UserError where they do not fit."""
    check_resources(resources)
    if resources.address is not None:
        cluster = join_cluster(stack, resources.address, cpus=0, gpus=0, verbose=resources.verbose)
        gpus, cpus = sum(node.gpus for node in cluster), sum(node.cpus for node in cluster)
        where = f"the cluster at {resources.address}"
    else:
        gpus, cpus, where = count_gpus(), count_cpus(), "this machine"
    asked, resources = resources.gpus, fill_from_specs(resources, grid, gpus)
    grows = least is not None and resources.address is not None
    if grows:  # what is asked for may come later
        gpus, cpus = max(gpus, resources.gpus or 0), max(cpus, resources.workers or 1)
    if asked is None and (resources.gpus or 0) > gpus:  # what a record has, and nobody typed
        on_cpu = "--gpus 0" + " --workers 1" * (resources.workers != 1)
        on_cpu += " --engine eager" * any(spec.engine == "graph" for spec in grid.specs)
        on_cpu += " --precision fp32" * (grid.precision in GPU_PRECISIONS)
        raise UserError(
            f"--spec: these runs need GPUs ({resources.workers} each); {where} has {gpus or 'no'} GPU{'s' * (gpus > 1)}: "
            + (f"--workers {gpus} trains them on those" if gpus else f"{on_cpu} trains them on the CPU")
        )
    allocation = allocate(resources, have_gpus=gpus, have_cpus=cpus, precision=grid.precision, where=where)
    if resources.address is None:
        return allocation
    fitted = fit(cluster, allocation)
    if fitted.concurrent_runs:
        return fitted
    if grows:
        return replace(allocation, concurrent_runs=1)
    what = "GPUs" if fitted.device == "cuda" else "CPUs"
    largest = max((getattr(node, what.lower()) for node in cluster), default=0)
    raise UserError(
        f"--workers {fitted.workers} --placement {fitted.placement}: no room in {where}, whose largest node has "
        f"{largest} {what} (each worker needs a CPU)"
    )


def choose_launcher(resources: Resources, allocation: Allocation, runs: int) -> Resources:
    """ "auto" decided: Ray takes seconds to start, which one run with one worker on this machine does not need."""
    alone = runs == allocation.workers == resources.runs_per_gpu == 1 and resources.address is None
    auto = "local" if alone else "ray"
    return replace(resources, launcher=auto) if resources.launcher == "auto" else resources


def fill_from_specs(resources: Resources, grid: Grid, have_gpus: int) -> Resources:
    """What the user left open: one worker where only one is possible, else the device and workers of given specs."""
    workers = 1 if resources.launcher == "local" or resources.runs_per_gpu > 1 else resources.workers
    if not grid.specs:
        return replace(resources, workers=workers)
    widths = sorted({workers} if workers else {spec.workers for spec in grid.specs})
    gpus, devices = resources.gpus, {spec.device for spec in grid.specs}
    if len(widths) > 1:
        raise UserError(f"--spec: these runs have {' and '.join(map(str, widths))} workers; choose with --workers")
    if gpus is None and len(devices) > 1:
        raise UserError("--spec: some of these runs are for GPUs and some for the CPU; choose with --gpus")
    if gpus is None:
        gpus = 0 if devices == {"cpu"} else max(widths[0], have_gpus - have_gpus % widths[0])
    return replace(resources, gpus=gpus, workers=widths[0])


def allocate(
    resources: Resources, *, have_gpus: int, have_cpus: int, precision: str, where: str = "this machine"
) -> Allocation:
    """Divide what `where` has among concurrent runs. Raises UserError where there is less than was asked for."""
    gpus, share = have_gpus if resources.gpus is None else resources.gpus, resources.runs_per_gpu
    on_gpu, workers = gpus > 0, resources.workers or (gpus if gpus and share == 1 else 1)
    divisors = ", ".join(str(n) for n in range(1, gpus + 1) if gpus % n == 0)
    refuse({
        f"--gpus {gpus}: {where} has {have_gpus or 'no'} GPU{'s' * (have_gpus > 1)}{'' if have_gpus else '; --gpus 0 trains on the CPU'}": gpus > have_gpus,
        f"--workers {workers}: {where} has {have_cpus} CPU cores, and each worker needs one":
            not on_gpu and workers > have_cpus,
        f"--precision {precision} needs a GPU; the CPU supports fp32 and bf16":
            not on_gpu and precision in GPU_PRECISIONS,
        f"--runs-per-gpu {share} needs a GPU; leave it out on the CPU": not on_gpu and share > 1,
        f"--workers {workers} does not divide --gpus {gpus} (allowed: {divisors})": gpus % workers > 0,
    })  # fmt: skip
    return Allocation(
        device="cuda" if on_gpu else "cpu", gpus=gpus, workers=workers, placement=resources.placement,
        runs_per_gpu=share, concurrent_runs=gpus // workers * share if on_gpu and resources.launcher != "local" else 1,
        threads=max(1, have_cpus // (gpus * share)) if on_gpu else have_cpus // workers,
    )  # fmt: skip


def join_cluster(stack: ExitStack, address: str | None, *, cpus: int, gpus: int, verbose: bool) -> Cluster:
    """Connect to Ray until the stack closes. Raises UserError where no cluster answers."""
    with mistakes(ClusterError):
        cluster = connect(address, cpus=cpus, gpus=gpus, verbose=verbose)
    stack.callback(disconnect)
    return cluster


@dataclass(slots=True)
class Session:
    """What runs are launched on, for as long as `stack` is open."""

    allocation: Allocation
    resources: Resources
    paths: RunPaths
    stack: ExitStack
    joined: bool = False

    def join(self) -> None:
        """Start Ray in this machine, unless a cluster was joined or none is needed."""
        job, resources = self.allocation, self.resources
        if resources.launcher != "local" and resources.address is None and not self.joined:
            cpus = job.threads * job.workers * job.concurrent_runs
            join_cluster(self.stack, None, cpus=cpus, gpus=job.gpus, verbose=resources.verbose)
            self.joined = True

    def launch(self, train: Callable[..., Any], specs: Sequence[RunSpec], **callbacks: Any) -> Launched:
        """Launch `train(spec, worker, report)` for each spec; yields (spec, outcome) as `harness.cluster.launch` does, whose
        callbacks are taken. A Ray cluster of this machine is started at the first call that needs one."""
        self.join()
        start = launch.launch_here if self.resources.launcher == "local" else launch.launch
        return start(train, specs, self.allocation, **callbacks)

    def launch_once(self, train: Callable[..., Any], what: Any, seconds: float, **changes: Any) -> Any:
        """The outcome of one `train(what, worker, report)`, Failed where its workers find no room within `seconds`; `changes`
        are of the allocation."""
        self.join()
        job = replace(self.allocation, concurrent_runs=1, retries=0, placement_timeout_seconds=seconds, **changes)
        ((_, outcome),) = replace(self, allocation=job).launch(train, [what], progress=lambda *_: None)
        return outcome
