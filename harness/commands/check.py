"""What this machine lacks and whether it trains rightly, a line each: what `harness check` prints.

Each check imports what it looks at.
"""

from __future__ import annotations

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
from harness.spec import UserError

if TYPE_CHECKING:
    from rich.console import Console

LEAST_SHARED_MEMORY_GIB = 1.0  # for Ray's object store and NCCL; Docker's default is 64 MiB
MOST_SECONDS = 600.0  # of a device's checks


Finding = tuple[str, str]  # a state and its words, of which a Result is made


def find(ok: bool, detail: str, advice: str = "", needed: bool = True) -> Finding:
    """ok, or missing with advice, or absent where it is not needed for runs on the CPU, nor named by the user."""
    if ok:
        return "ok", detail
    return "missing" if needed else "absent", "; ".join(filter(None, (detail, advice)))


def check_torch(target: CheckOptions) -> Finding:
    if installed_version("torch") is None:
        return find(False, "not installed", "pip install torch torchvision")
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    nccl = "NCCL" if torch.distributed.is_nccl_available() else "no NCCL: one GPU a run"
    works = (torch.ones(2, 2) @ torch.ones(2, 2)).sum().item() == 8.0 and torch.distributed.is_gloo_available()
    detail = f"{torch.__version__}, {cuda}, {nccl}; Python {sys.version.split()[0]} at {sys.prefix}"
    return find(works, detail, "a matrix product or gloo does not work: install it again")


def check_gpu(target: CheckOptions) -> Finding:
    """Whether torch's CUDA, the driver's and DALI's fit together, and what they may use."""
    import torch

    from harness.training.nvml import count_gpus, cuda_driver_version, driver_version

    try:
        driver, newest = driver_version(), cuda_driver_version()
    except ImportError:
        return find(False, "no module pynvml", "pip install nvidia-ml-py: GPUs are counted with it")
    except Exception as error:  # pynvml.NVMLError
        advice = "runs train on the CPU; where there is a GPU, install NVIDIA's driver; in a container, --gpus all"
        return find(False, f"none ({error})", advice, needed=False)
    builds = {"torch": torch.version.cuda or ""}
    builds |= {wheel: f"{wheel[-3:-1]}.0" for wheel in DALI_WHEELS if installed_version(wheel) is not None}
    have = ", ".join(f"{name} for CUDA {cuda or 'none'}" for name, cuda in builds.items())
    detail, fits = f"driver {driver} for CUDA {newest[0]}.{newest[1]}; {have}", newest[0]
    kind = {11: "cu118", 12: "cu126 or cu128"}.get(fits, f"cu{fits}0")
    torch_line = f"install a torch built for CUDA {fits} ({kind}: pytorch.org/get-started has the line)"
    if not builds["torch"]:
        return find(False, detail, f"this torch uses no GPU; {torch_line}")
    if int(builds["torch"].split(".")[0]) > fits:
        newer = " to 580 or newer" * builds["torch"].startswith("13")
        return find(
            False, detail, f"the driver is too old for this torch; {torch_line}, or update the driver{newer}"
        )
    if wheels := [wheel for wheel in builds if wheel != "torch" and int(wheel[-3:-1]) > fits]:
        advice = f"pip uninstall {wheels[0]} && pip install nvidia-dali-cuda{fits}0"
        return find(False, detail, f"the driver is too old for this DALI; {advice}")
    if not (count := count_gpus()):
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        return find(
            False, f"none (CUDA_VISIBLE_DEVICES={hidden}); {detail}", "runs train on the CPU", needed=False
        )
    return find(
        torch.cuda.is_available(), f"{count}; {detail}", "torch cannot use it: a newer driver, or an older torch"
    )


def check_dali(target: CheckOptions) -> Finding:
    wheels = [f"{name} {version}" for name in DALI_WHEELS if (version := installed_version(name)) is not None]
    other = "or choose --loader resident"
    if not wheels:
        return find(False, "not installed", f"the default loader: pip install nvidia-dali-cuda120, {other}")
    try:
        import_module("nvidia.dali.fn")
    except Exception as error:
        return find(False, f"{wheels[0]}: {_reason(error)[:160]}", f"install the wheel of your CUDA, {other}")
    return find(len(wheels) == 1, ", ".join(wheels), "two wheels write into one folder: keep one of them")


def check_ray(target: CheckOptions) -> Finding:
    detail = installed_version("ray")
    pin = next((line for line in requires("resnet-harness") or () if re.match(r"ray\b", line)), "")
    advice = f"several workers or runs at a time need it: pip install '{pin}', or choose --launcher local"
    if detail is None:
        return find(False, "not installed", advice)
    import ray.train

    bounds = [tuple(map(int, pair)) for pair in re.findall(r"(?:>=|<)(\d+)\.(\d+)", pin)]
    fits = len(bounds) != 2 or min(bounds) <= tuple(map(int, detail.split(".")[:2])) < max(bounds)
    return find(fits and hasattr(ray.train, "ScalingConfig"), detail, advice)


def check_cluster(target: CheckOptions) -> Finding | None:
    if target.address is None:
        return None
    from harness.cluster.connect import ClusterError, connect, disconnect

    try:
        cluster = connect(target.address, cpus=0, gpus=0)
    except ClusterError as error:
        advice = "`ray start --head` there, and one ~/.ray/auth_token on all machines: cluster/README.md"
        return find(False, str(error), advice)
    disconnect()
    return find(True, f"{cluster.nodes} nodes, {cluster.cpus} CPUs, {cluster.gpus} GPUs at {target.address}")


def check_storage(target: CheckOptions) -> Finding:
    """Write, rename and lock as results and checkpoints are stored. Leaves nothing behind."""
    from filelock import FileLock

    from harness.results.store import write_atomic

    where = _nearest(target.out)
    try:
        with tempfile.TemporaryDirectory(prefix=".check-", dir=where) as folder, FileLock(Path(folder, "lock"), 5):
            write_atomic(Path(folder, "file"), "whole")
    except (OSError, NotImplementedError) as error:
        advice = (
            f"results go to --out {target.out}: name a folder that you may write to, where files lock and rename"
        )
        return find(False, f"{where}: {getattr(error, 'strerror', None) or error}", advice)
    return find(True, f"{where} takes files, renames and locks")


def check_disk(target: CheckOptions) -> Finding:
    """Of results, and of what processes share in memory: Ray's object store, NCCL."""
    where, shared = _nearest(target.out), Path("/dev/shm")
    for folder, least, advice in (
        (where, LEAST_DISK_GIB, "weights and checkpoints need room: make some, or name another --out"),
        (shared, LEAST_SHARED_MEMORY_GIB, "Ray and NCCL share memory there: docker run --shm-size 8g"),
    ):
        if folder.is_dir() and free_gib(folder) < least:
            return find(
                False, f"{free_gib(folder):.1f} of {least:.0f} GiB free in {folder}", advice, folder == where
            )
    return find(True, f"{free_gib(where):.1f} GiB free in {where}")


def check_data(target: CheckOptions) -> Finding:
    from harness.loaders.cache import cache_dir

    if target.data_dir is None:
        here = (cache_dir() / "downloads" / "cifar-10-batches-py").is_dir()
        advice = "the first run downloads 163 MiB; without a network name --data-dir, or take --dataset digits"
        return find(here, f"{'' if here else 'no '}cifar10 in {cache_dir()}", advice, needed=False)
    root = target.data_dir.expanduser()
    kinds = {
        "cifar-10-batches-py": ("cifar-10-batches-py",),
        "class folders": ("train", "test"),
        "miniplaces": ("train.txt", "val.txt", "images"),
    }
    kind = next((kind for kind, names in kinds.items() if all((root / name).exists() for name in names)), None)
    advice = (
        "cifar-10-batches-py, train/ and test/ with class folders, or miniplaces' kit is expected in --data-dir"
    )
    return find(kind is not None, f"{kind or 'nothing known'} in {root}", advice)


CHECKS: dict[str, Callable[[CheckOptions], Finding | None]] = {
    "torch": check_torch,
    "GPU": check_gpu,
    "DALI": check_dali,
    "Ray": check_ray,
    "cluster": check_cluster,
    "storage": check_storage,
    "disk": check_disk,
    "data": check_data,
}


def examine(target: CheckOptions) -> Iterator[Result]:
    """Every finding, as it comes. A check that breaks is a finding, not a traceback."""
    for name, check in CHECKS.items():
        try:
            finding = check(target)
        except Exception as error:
            finding = find(False, f"the check failed: {_reason(error)[:200]}")
        if finding is not None:
            yield Result(name, *finding)


def print_findings(target: CheckOptions, console: Console) -> int:
    """Print a line for each finding. Returns 0 where nothing is missing that runs on the CPU need, and no measured check
    failed, else 1.

    Raises UserError for an address that cannot be one.
    """
    if target.address not in (None, "auto") and not re.fullmatch(r".+:\d+", str(target.address)):
        raise UserError(f"--address {target.address!r} is not HOST:PORT or auto")
    from rich.text import Text

    def show(results: Iterable[Result]) -> int:
        wrong = 0
        for result in results:
            text = Text(result.line())
            text.stylize(STYLES.get(result.state, "yellow"), 0, 8)
            console.print(text, soft_wrap=True)
            wrong += result.state in ("missing", "failed")
        return wrong

    verdict = "ready"
    if missing := show(examine(target)):
        verdict = f"{missing} of what a run needs is missing"
    elif not target.quick and (missing := show(measure_all(target))):
        verdict = f"{missing} of the checks failed"
    console.print(verdict, style="bold", soft_wrap=True)
    return 1 if missing else 0


def measure_all(target: CheckOptions) -> Iterator[Result]:
    """All checks of every GPU here, or of one of each kind in a cluster, then those of several ranks. What GPUs come to
    is known to later runs."""
    from harness.loaders.cache import cache_dir
    from harness.resources import make_allocation
    from harness.selfcheck import find_devices, make_ranks, store_results

    resources = Resources(gpus=target.gpus, address=target.address)
    with ExitStack() as stack:
        allocation = make_allocation(Grid(variants=("he2015",)), resources, stack)
        on_gpu = allocation.device == "cuda"
        devices = find_devices(allocation, target.address)
        several = (allocation.gpus if on_gpu else allocation.threads) > 1
        if not on_gpu and several:
            allocation = replace(allocation, workers=2, threads=allocation.threads // 2)
        ranks = make_ranks(allocation, resources, None, devices)
        for device in (*devices, *[ranks] * several):
            tag = f"{device.name}: " * (len(devices) > 1)
            for result in device.measure([c.name for c in MEASURED if c.ranks == device.ranks], MOST_SECONDS):
                if on_gpu:
                    store_results(device.combination, [result], cache_dir())
                yield replace(result, detail=tag + result.detail)
    if not several:
        yield Result("several ranks", "skipped", f"they need two {'GPUs' if on_gpu else 'CPU cores'}")


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _nearest(path: Path) -> Path:
    """The folder itself, or the one in which it would be made."""
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path
