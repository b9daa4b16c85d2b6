"""What this machine lacks and whether it trains rightly, or whether plug-ins fit, a line each: what `harness check` prints.

Each check imports what it looks at.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from importlib.metadata import requires
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from rich.text import Text

from harness.checklist import CHECKS as MEASURED
from harness.checklist import STYLES, Finding, Result, attempt
from harness.cluster.connect import connect, disconnect
from harness.cluster.nodes import inspect_cluster
from harness.loaders.cache import cache_dir
from harness.loaders.datasets import load_dataset
from harness.options import CheckOptions, Grid, Resources
from harness.plan import open_out
from harness.plugins import load_file, load_plugins
from harness.preflight import LEAST_DISK_GIB, free_gib, judge, measure_between, measure_nodes
from harness.record import DALI_WHEELS, installed_version
from harness.resources import Session, make_allocation
from harness.results.remote import check_uri, is_uri, redact
from harness.results.store import write_atomic
from harness.selfcheck import find_devices, make_ranks
from harness.spec import INSTALL, RunPaths, UserError, at_home
from harness.training.nvml import count_gpus, cuda_driver_version, driver_version

LEAST_SHARED_MEMORY_GIB = 1.0  # for Ray's object store and NCCL; Docker's default is 64 MiB
MOST_SECONDS = 600.0  # of a device's checks
DATA_FOLDERS = {
    ("cifar-10-batches-py",): "cifar-10-batches-py", ("train", "test"): "class folders", ("train", "val"): "class folders",
    ("train.txt", "val.txt", "images"): "miniplaces",
}  # fmt: skip


def check_torch(target: CheckOptions) -> str:
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    nccl = "NCCL" if torch.distributed.is_nccl_available() else "no NCCL: one GPU a run"
    return f"{torch.__version__}, {cuda}, {nccl}; Python {sys.version.split()[0]} at {sys.prefix}"


def check_gpu(target: CheckOptions) -> str:
    """Whether torch's CUDA, the driver's and DALI's fit together, and what they may use."""
    import torch

    try:
        driver, (newest, minor) = driver_version(), cuda_driver_version()
    except Exception as error:  # pynvml.NVMLError
        advice = "runs train on the CPU; where there is a GPU, install NVIDIA's driver; in a container, --gpus all"
        raise Finding("absent", f"none ({error})", advice) from None
    builds = {"torch": torch.version.cuda or "none"}
    builds |= {wheel: f"{wheel[-3:-1]}.0" for wheel in DALI_WHEELS if installed_version(wheel) is not None}
    have = ", ".join(f"{name} for CUDA {cuda}" for name, cuda in builds.items())
    detail = f"driver {driver} for CUDA {newest}.{minor}; {have}"
    kind = {11: "cu118", 12: "cu126 or cu128"}.get(newest, f"cu{newest}0")
    fitting = f"install a torch built for CUDA {newest} ({kind}: pytorch.org/get-started has the line)"
    too_new = [name for name, cuda in builds.items() if cuda != "none" and float(cuda) >= newest + 1]
    if torch.version.cuda is None:
        raise Finding("missing", detail, f"this torch uses no GPU; {fitting}")
    if "torch" in too_new:
        other = "update the driver" + " to 580 or newer" * torch.version.cuda.startswith("13")
        raise Finding("missing", detail, f"the driver is too old for this torch; {fitting}, or {other}")
    if too_new:
        advice = f"pip uninstall {too_new[0]} && pip install nvidia-dali-cuda{newest}0"
        raise Finding("missing", detail, f"the driver is too old for this DALI; {advice}")
    if not (count := count_gpus()):
        hidden = f"none (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}); {detail}"
        raise Finding("absent", hidden, "runs train on the CPU")
    if not torch.cuda.is_available():
        raise Finding("missing", f"{count}; {detail}", "torch cannot use it: a newer driver, or an older torch")
    return f"{count}; {detail}"


def check_dali(target: CheckOptions) -> str:
    wheels = [f"{name} {version}" for name in DALI_WHEELS if (version := installed_version(name)) is not None]
    if len(wheels) != 1:
        several = "two wheels write into one folder: keep one of them"
        raise Finding("missing", f"{', '.join(wheels)}: {several}" if wheels else "not installed")
    import_module("nvidia.dali.fn")
    return wheels[0]


def check_ray(target: CheckOptions) -> str:
    version = installed_version("ray")
    lines = (line.partition(";")[0].strip() for line in requires("resnet-harness") or ())
    pin = next((line for line in lines if re.match(r"ray\b", line)), "")
    low, high = sorted(tuple(map(int, pair)) for pair in re.findall(r"[=<](\d+)\.(\d+)", pin))
    if version is None or not low <= tuple(map(int, version.split(".")[:2])) < high:
        raise Finding("missing", f"{version or 'not installed'}, and {pin} is needed")
    import_module("ray.train")
    return version


def check_cluster(target: CheckOptions) -> str:
    cluster = connect(target.address, cpus=0, gpus=0)
    disconnect()
    cpus, gpus = sum(node.cpus for node in cluster), sum(node.gpus for node in cluster)
    return f"{len(cluster)} nodes, {cpus} CPUs, {gpus} GPUs at {target.address}"


def check_storage(target: CheckOptions) -> str:
    """Write, rename and lock as results and checkpoints are stored. Leaves nothing behind."""
    if is_uri(target.out):
        check_uri(target.out)
        return f"{redact(target.out)} takes files"
    where = _nearest(Path(target.out))
    with tempfile.TemporaryDirectory(prefix=".check-", dir=where) as folder, FileLock(Path(folder, "lock"), 5):
        write_atomic(Path(folder, "file"), "whole")
    return f"{where} takes files, renames and locks"


def check_disk(target: CheckOptions) -> str:
    """Of results, and of what processes share in memory: Ray's object store, NCCL."""
    where, shared = _nearest(cache_dir() if is_uri(target.out) else Path(target.out)), Path("/dev/shm")
    free = f"{free_gib(where):.1f} GiB free in {where}"
    if free_gib(where) < LEAST_DISK_GIB:
        raise Finding("missing", free, f"at least {LEAST_DISK_GIB:.0f} are needed for weights and checkpoints")
    if shared.is_dir() and (left := free_gib(shared)) < LEAST_SHARED_MEMORY_GIB:
        advice = "Ray and NCCL need 1 there: docker run --shm-size 8g"
        raise Finding("warning", f"{left:.1f} GiB free in {shared}", advice)
    return free


def check_data(target: CheckOptions) -> str:
    if target.data_dir is None:
        if (cache_dir() / "downloads" / "cifar-10-batches-py").is_dir():
            return f"cifar10 in {cache_dir()}"
        advice = "the first run downloads 163 MiB; without a network name --data-dir, or take --dataset digits"
        raise Finding("absent", f"no cifar10 in {cache_dir()}", advice)
    for names, kind in DATA_FOLDERS.items():
        if all((target.data_dir / name).exists() for name in names):
            return f"{kind} in {target.data_dir}"
    raise Finding("missing", f"nothing known in {target.data_dir}")


CHECKS: dict[str, tuple[Callable[[CheckOptions], str], str]] = {
    "torch": (check_torch, INSTALL),
    "GPU": (check_gpu, ""),
    "DALI": (check_dali, "the default loader: install nvidia-dali-cuda120, or choose --loader resident"),
    "Ray": (check_ray, "several workers or runs at a time need it; --launcher local trains one run without it"),
    "cluster": (check_cluster, "`ray start --head` there, and one ~/.ray/auth_token on all machines: cluster/README.md"),
    "storage": (check_storage, "results go to --out: name a folder or URI whose files you may write, rename and lock"),
    "disk": (check_disk, "make room, or name another --out"),
    "data": (check_data, "cifar-10-batches-py, train/ and test/ (or val/) with class folders, or miniplaces' kit is expected in --data-dir"),
}  # fmt: skip
"""What looks at it, and advice where that is missing."""


def examine(target: CheckOptions) -> Iterator[Result]:
    """What is here, as it is looked at. A check that breaks is a line, not a traceback."""
    for name, (check, advice) in CHECKS.items():
        if name != "cluster" or target.address is not None:
            result, more = attempt(name, check, target), f"; {advice}" * bool(advice)
            yield replace(result, detail=result.detail + more) if result.state == "missing" else result


def measure_all(target: CheckOptions, console: Console) -> Iterator[Result]:
    """All checks of every GPU here, or of a cluster's nodes and one GPU of each kind, then those of several ranks. What GPUs
    come to is known to later runs."""
    resources = Resources(gpus=target.gpus, address=target.address)
    with ExitStack() as stack:
        allocation = make_allocation(Grid(variants=("he2015",)), resources, stack)
        if target.address is None:
            out, remote = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="harness-check-"))), ""
        else:
            out, remote = open_out(target.out, write=True)
        session = Session(allocation, resources, RunPaths(out=out, remote=remote), stack)
        if target.address is not None:
            yield from judge(measure_nodes(load_dataset("digits"), session, console))
            # without GPUs, two workers on the smallest node
            least = min(allocation.threads, *(node.cpus for node in inspect_cluster() if node.cpus))
            halves = replace(allocation, threads=max(1, least // 2))
            yield from judge(measure_between(replace(session, allocation=halves), widest=True))
        devices = find_devices(session)
        on_gpu = allocation.device == "cuda"
        several = (allocation.gpus if on_gpu else allocation.threads) > 1
        if not on_gpu and several:
            session.allocation = replace(allocation, workers=2, threads=allocation.threads // 2)
        ranks = make_ranks(session, devices)
        for device in (*devices, *[ranks] * several):
            tag = f"{device.name}: " * (len(devices) > 1)
            names = [check.name for check in MEASURED if check.ranks == device.ranks]
            for result in device.check(names, MOST_SECONDS, cache_dir()):
                yield replace(result, detail=tag + result.detail)
    if not several:
        yield Result("several ranks", "skipped", f"they need two {'GPUs' if on_gpu else 'CPU cores'}")


def print_findings(target: CheckOptions, console: Console) -> int:
    """Print a line for each finding. Returns 0 where nothing is missing that runs on the CPU need, and no measured check
    failed, else 1. Raises UserError for an address that cannot be one."""
    if target.address not in (None, "auto") and not re.fullmatch(r".+:\d+", str(target.address)):
        raise UserError(f"--address {target.address!r} is not HOST:PORT or auto")
    code = show(examine(target), console, "{} of what a run needs is missing", "ready" * target.quick)
    return code if code or target.quick else show(measure_all(target, console), console)


def check_plugins(paths: Sequence[Path], console: Console, data_dir: Path | None) -> int:
    """Print a line for each check of what these files register. Returns 0, or 1 where one failed. Raises UserError."""
    from harness.training.fit import check_plugin

    load_plugins()
    loaded = [load_file(path) for path in paths]
    return show((result for each in loaded for result in check_plugin(each, console, data_dir)), console)


def show(
    results: Iterable[Result], console: Console, wrong: str = "{} of the checks failed", right: str = "ready"
) -> int:
    """Print a line for each, then how many are wrong. Returns whether any is."""
    found = 0
    for result in results:
        text = Text(result.line())
        text.stylize(STYLES.get(result.state, "yellow"), 0, 8)
        console.print(text, soft_wrap=True)
        found += result.state in ("missing", "failed")
    if verdict := wrong.format(found) if found else right:
        console.print(verdict, style="bold", soft_wrap=True)
    return int(found > 0)


def _nearest(path: Path) -> Path:
    """The folder itself, or the one in which it would be made."""
    path = at_home(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
