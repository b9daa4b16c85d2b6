"""What this machine lacks and whether it trains rightly, a line each: what `harness check` prints.

Each check imports what it looks at.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from importlib.metadata import requires
from pathlib import Path
from typing import TYPE_CHECKING

from harness.checklist import CHECKS as MEASURED
from harness.checklist import STYLES, Result
from harness.options import CheckOptions, Grid, Resources
from harness.preflight import LEAST_DISK_GIB, free_gib
from harness.record import DALI_WHEELS, installed_version
from harness.results.remote import StorageError, check_uri, is_uri, redact
from harness.spec import RunPaths, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from harness.cluster.job import Allocation

LEAST_SHARED_MEMORY_GIB = 1.0  # for Ray's object store and NCCL; Docker's default is 64 MiB
MOST_SECONDS = 600.0  # of a device's checks
DATA_FOLDERS = {
    "cifar-10-batches-py": ("cifar-10-batches-py",), "class folders": ("train", "test"),
    "miniplaces": ("train.txt", "val.txt", "images"),
}  # fmt: skip


class Missing(Exception):  # noqa: N818
    """What is wrong, and advice."""


class Absent(Missing):
    """Not needed for runs on the CPU, nor named by the user."""


def check_torch(target: CheckOptions) -> str:
    if installed_version("torch") is None:
        raise Missing("not installed", "pip install 'resnet-harness[train]'")
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    nccl = "NCCL" if torch.distributed.is_nccl_available() else "no NCCL: one GPU a run"
    detail = f"{torch.__version__}, {cuda}, {nccl}; Python {sys.version.split()[0]} at {sys.prefix}"
    if (torch.ones(2, 2) @ torch.ones(2, 2)).sum().item() != 8.0 or not torch.distributed.is_gloo_available():
        raise Missing(detail, "a matrix product or gloo does not work: install it again")
    return detail


def check_gpu(target: CheckOptions) -> str:
    """Whether torch's CUDA, the driver's and DALI's fit together, and what they may use."""
    import torch

    from harness.training.nvml import count_gpus, cuda_driver_version, driver_version

    try:
        driver, (newest, minor) = driver_version(), cuda_driver_version()
    except Exception as error:  # pynvml.NVMLError
        advice = "runs train on the CPU; where there is a GPU, install NVIDIA's driver; in a container, --gpus all"
        raise Absent(f"none ({error})", advice) from None
    builds = {"torch": torch.version.cuda or "none"}
    builds |= {wheel: f"{wheel[-3:-1]}.0" for wheel in DALI_WHEELS if installed_version(wheel) is not None}
    have = ", ".join(f"{name} for CUDA {cuda}" for name, cuda in builds.items())
    detail = f"driver {driver} for CUDA {newest}.{minor}; {have}"
    kind = {11: "cu118", 12: "cu126 or cu128"}.get(newest, f"cu{newest}0")
    fitting = f"install a torch built for CUDA {newest} ({kind}: pytorch.org/get-started has the line)"
    if torch.version.cuda is None:
        raise Missing(detail, f"this torch uses no GPU; {fitting}")
    too_new = [name for name, cuda in builds.items() if int(cuda.partition(".")[0]) > newest]
    if "torch" in too_new:
        other = "update the driver" + " to 580 or newer" * torch.version.cuda.startswith("13")
        raise Missing(detail, f"the driver is too old for this torch; {fitting}, or {other}")
    if too_new:
        advice = f"pip uninstall {too_new[0]} && pip install nvidia-dali-cuda{newest}0"
        raise Missing(detail, f"the driver is too old for this DALI; {advice}")
    if not (count := count_gpus()):
        hidden = f"none (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}); {detail}"
        raise Absent(hidden, "runs train on the CPU")
    if not torch.cuda.is_available():
        raise Missing(f"{count}; {detail}", "torch cannot use it: a newer driver, or an older torch")
    return f"{count}; {detail}"


def check_dali(target: CheckOptions) -> str:
    wheels = [f"{name} {version}" for name in DALI_WHEELS if (version := installed_version(name)) is not None]
    other = "or choose --loader resident"
    if not wheels:
        raise Missing("not installed", f"the default loader: pip install nvidia-dali-cuda120, {other}")
    if len(wheels) > 1:
        raise Missing(", ".join(wheels), "two wheels write into one folder: keep one of them")
    try:
        import_module("nvidia.dali.fn")
    except Exception as error:
        raise Missing(f"{wheels[0]}: {_reason(error)}", f"install the wheel of your CUDA, {other}") from None
    return wheels[0]


def check_ray(target: CheckOptions) -> str:
    version = installed_version("ray")
    lines = (line.partition(";")[0].strip() for line in requires("resnet-harness") or ())
    pin = next((line for line in lines if re.match(r"ray\b", line)), "")
    low, high = sorted(tuple(map(int, pair)) for pair in re.findall(r"[=<](\d+)\.(\d+)", pin))
    if version is None or not low <= tuple(map(int, version.split(".")[:2])) < high:
        advice = f"several workers or runs at a time need it: pip install '{pin}', or choose --launcher local"
        raise Missing(version or "not installed", advice)
    import_module("ray.train")
    return version


def check_cluster(target: CheckOptions) -> str:
    from harness.cluster.connect import ClusterError, connect, disconnect

    try:
        cluster = connect(target.address, cpus=0, gpus=0)
    except ClusterError as error:
        advice = "`ray start --head` there, and one ~/.ray/auth_token on all machines: cluster/README.md"
        raise Missing(str(error), advice) from None
    disconnect()
    cpus, gpus = sum(node.cpus for node in cluster), sum(node.gpus for node in cluster)
    return f"{len(cluster)} nodes, {cpus} CPUs, {gpus} GPUs at {target.address}"


def check_storage(target: CheckOptions) -> str:
    """Write, rename and lock as results and checkpoints are stored. Leaves nothing behind."""
    from filelock import FileLock

    from harness.results.store import write_atomic

    if is_uri(target.out):
        try:
            check_uri(target.out)
        except StorageError as error:
            raise Missing(str(error), "results go to --out: name a URI that you may write to") from None
        return f"{redact(target.out)} takes files"
    where = _nearest(Path(target.out))
    try:
        with tempfile.TemporaryDirectory(prefix=".check-", dir=where) as folder, FileLock(Path(folder, "lock"), 5):
            write_atomic(Path(folder, "file"), "whole")
    except (OSError, NotImplementedError) as error:
        advice = "name a folder that you may write to, where files lock and rename"
        raise Missing(f"{where}: {_reason(error)}", f"results go to --out {target.out}: {advice}") from None
    return f"{where} takes files, renames and locks"


def check_disk(target: CheckOptions) -> str:
    """Of results, and of what processes share in memory: Ray's object store, NCCL."""
    from harness.loaders.cache import cache_dir

    where = _nearest(cache_dir() if is_uri(target.out) else Path(target.out))
    shared = Path("/dev/shm")
    free, needed = f"{free_gib(where):.1f} GiB free in {where}", f"at least {LEAST_DISK_GIB:.0f} are needed"
    if free_gib(where) < LEAST_DISK_GIB:
        raise Missing(free, f"{needed} for weights and checkpoints: make room, or name another --out")
    if shared.is_dir() and (left := free_gib(shared)) < LEAST_SHARED_MEMORY_GIB:
        raise Absent(f"{left:.1f} GiB free in {shared}", "Ray and NCCL need 1 there: docker run --shm-size 8g")
    return free


def check_data(target: CheckOptions) -> str:
    from harness.loaders.cache import cache_dir

    if target.data_dir is None:
        if (cache_dir() / "downloads" / "cifar-10-batches-py").is_dir():
            return f"cifar10 in {cache_dir()}"
        advice = "the first run downloads 163 MiB; without a network name --data-dir, or take --dataset digits"
        raise Absent(f"no cifar10 in {cache_dir()}", advice)
    root = target.data_dir.expanduser()
    for kind, names in DATA_FOLDERS.items():
        if all((root / name).exists() for name in names):
            return f"{kind} in {root}"
    expected = (
        "cifar-10-batches-py, train/ and test/ with class folders, or miniplaces' kit is expected in --data-dir"
    )
    raise Missing(f"nothing known in {root}", expected)


CHECKS: dict[str, Callable[[CheckOptions], str]] = {
    "torch": check_torch, "GPU": check_gpu, "DALI": check_dali, "Ray": check_ray, "cluster": check_cluster,
    "storage": check_storage, "disk": check_disk, "data": check_data,
}  # fmt: skip


def examine(target: CheckOptions) -> Iterator[Result]:
    """What is here, as it is looked at. A check that breaks is a line, not a traceback."""
    for name, check in CHECKS.items():
        if name == "cluster" and target.address is None:
            continue
        try:
            yield Result(name, "ok", check(target))
        except Missing as finding:
            yield Result(name, type(finding).__name__.lower(), "; ".join(finding.args))
        except Exception as error:
            yield Result(name, "missing", f"the check failed: {_reason(error)}")


def measure_all(target: CheckOptions) -> Iterator[Result]:
    """All checks of every GPU here, or of one of each kind in a cluster, then those of several ranks. What GPUs come to
    is known to later runs."""
    from harness.loaders.cache import cache_dir
    from harness.resources import make_allocation
    from harness.selfcheck import find_devices, make_ranks

    resources = Resources(gpus=target.gpus, address=target.address)
    with ExitStack() as stack:
        if target.address is not None:
            yield from measure_nodes(target.address)
        allocation = make_allocation(Grid(variants=("he2015",)), resources, stack)
        on_gpu = allocation.device == "cuda"
        if target.address is not None:
            yield from measure_links(allocation, resources, stack)
        devices = find_devices(allocation, target.address)
        several = (allocation.gpus if on_gpu else allocation.threads) > 1
        if not on_gpu and several:
            allocation = replace(allocation, workers=2, threads=allocation.threads // 2)
        ranks = make_ranks(allocation, resources, None, devices)
        for device in (*devices, *[ranks] * several):
            tag = f"{device.name}: " * (len(devices) > 1)
            names = [check.name for check in MEASURED if check.ranks == device.ranks]
            for result in device.check(names, MOST_SECONDS, cache_dir()):
                yield replace(result, detail=tag + result.detail)
    if not several:
        yield Result("several ranks", "skipped", f"they need two {'GPUs' if on_gpu else 'CPU cores'}")


def measure_nodes(address: str) -> Iterator[Result]:
    """What each node of a cluster gives, and its clock; those that are far slower than the others."""
    from harness.cluster.nodes import Unanswered, ask_every_node
    from harness.cluster.workers import driver_clock
    from harness.loaders.datasets import load_dataset
    from harness.preflight import find_outliers, find_wrong_clocks, read_clock
    from harness.resources import join_cluster
    from harness.training.rates import measure_rates

    with ExitStack() as joined:
        join_cluster(joined, address, cpus=0, gpus=0, verbose=False)
        clock, here = joined.enter_context(driver_clock()), Path(tempfile.gettempdir())
        answers = ask_every_node(lambda: (measure_rates(here, load_dataset("digits")), read_clock(clock)))
    known = {node: answer for node, answer in answers.items() if not isinstance(answer, Unanswered)}
    for node, answer in answers.items():
        if isinstance(answer, Unanswered):
            yield Result(node, "failed", answer.reason)
        else:
            rates, (ahead, uncertainty) = answer
            figures = [f"{figure} {value:.3g}" for figure, value in rates.items()]
            yield Result(node, "ok", ", ".join([*figures, f"clock {ahead:+.2g} ± {uncertainty:.1g} s"]))
    slow = find_outliers({node: rates for node, (rates, _) in known.items()}).values()
    wrong = find_wrong_clocks({node: clock for node, (_, clock) in known.items()})
    for line in (*itertools.chain(*slow), *wrong):
        yield Result("nodes", "absent", line)


def measure_links(allocation: Allocation, resources: Resources, stack: ExitStack) -> Iterator[Result]:
    """All-reduces within and between a cluster's nodes, by a worker on each GPU or by two on each node; NCCL's network."""
    from harness.cluster.nodes import count_runs, inspect_cluster
    from harness.network import find_idle_infiniband
    from harness.preflight import measure_network
    from harness.resources import Session

    cluster = inspect_cluster()
    job = replace(allocation, workers=1, threads=1, placement="spread")
    workers = count_runs(cluster, job)
    if job.device == "cpu":
        workers = min(workers, 2 * sum(node.cpus > 0 for node in cluster))
    if workers == 1:
        return
    out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="harness-check-")))
    measured = measure_network(Session(job, resources, RunPaths(out=out), stack), workers)
    if "reason" in measured:
        yield Result("all-reduce", "failed", measured["reason"])
    for way, of in measured.get("all_reduce", {}).items():
        rates = f"{of['algorithm_gb_per_s']:.3g} GB/s, {of['bus_gb_per_s']:.3g} GB/s on the bus"
        yield Result("all-reduce", "ok", f"{way}, {of['ranks']} workers: {of['latency_us']:.3g} µs, {rates}")
    for said in measured.get("nccl", {}).values():
        yield Result("NCCL", "ok", "; ".join(f"{what} {', '.join(said[what])}" for what in said if said[what]))
    for line in find_idle_infiniband(measured.get("nccl", {})):
        yield Result("NCCL", "absent", line)


def print_findings(target: CheckOptions, console: Console) -> int:
    """Print a line for each finding. Returns 0 where nothing is missing that runs on the CPU need, and no measured check
    failed, else 1.

    Raises UserError for an address that cannot be one.
    """
    if target.address not in (None, "auto") and not re.fullmatch(r".+:\d+", str(target.address)):
        raise UserError(f"--address {target.address!r} is not HOST:PORT or auto")
    steps = [(examine, "of what a run needs is missing"), (measure_all, "of the checks failed")]
    for findings, verdict in steps[: 1 if target.quick else 2]:
        if wrong := show(findings(target), console):
            console.print(f"{wrong} {verdict}", style="bold", soft_wrap=True)
            return 1
    console.print("ready", style="bold")
    return 0


def show(results: Iterable[Result], console: Console) -> int:
    """Print a line for each. Returns how many are wrong."""
    from rich.text import Text

    wrong = 0
    for result in results:
        text = Text(result.line())
        text.stylize(STYLES.get(result.state, "yellow"), 0, 8)
        console.print(text, soft_wrap=True)
        wrong += result.state in ("missing", "failed")
    return wrong


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _nearest(path: Path) -> Path:
    """The folder itself, or the one in which it would be made."""
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path
