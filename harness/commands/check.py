"""What this machine lacks and whether it trains rightly, a line each: what `harness check` prints.

Each check imports what it looks at.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import requires
from pathlib import Path
from typing import TYPE_CHECKING

from harness.preflight import LEAST_DISK_GIB, free_gib
from harness.record import installed_version
from harness.spec import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from harness.training.checks import Check

LEAST_SHARED_MEMORY_GIB = 1.0  # for Ray's object store and NCCL; Docker's default is 64 MiB
DALI_WHEELS = ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "nvidia-dali-cuda110")


@dataclass(frozen=True, slots=True)
class Target:
    """What a user wants to run with."""

    out: Path
    data_dir: Path | None = None
    address: str | None = None
    gpus: int | None = None  # None: all
    quick: bool = False  # nothing is measured


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found."""

    ok: bool
    detail: str
    why: str = ""  # what it is for; printed where it is missing, as the advice is
    advice: str = ""
    needed: bool = True  # for runs on the CPU, or since the user named it

    def line(self, name: str) -> str:
        """ "missing  DALI: not installed; ..." """
        if self.ok:
            return f"ok       {name}: {self.detail}"
        state = "missing" if self.needed else "absent "
        return f"{state}  {name}: {'; '.join(part for part in (self.detail, self.why, self.advice) if part)}"


def check_python(target: Target) -> Finding:
    detail = f"{sys.version.split()[0]} at {sys.prefix}"
    return Finding(sys.version_info >= (3, 11), detail, advice="3.11 or newer is needed")


def check_torch(target: Target) -> Finding:
    if installed_version("torch") is None:
        return Finding(False, "not installed", "networks are made with it", "pip install torch torchvision")
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    product = torch.ones(2, 2) @ torch.ones(2, 2)
    works = product.sum().item() == 8.0 and torch.distributed.is_gloo_available()
    why = "a matrix product or gloo does not work"
    return Finding(works, f"{torch.__version__}, {build}", why, "install it again")


def check_nvml(target: Target) -> Finding:
    from harness.training.nvml import driver_version

    why = "GPUs are counted and their memory is measured with it"
    try:
        return Finding(True, f"driver {driver_version()}")
    except ImportError:
        return Finding(False, "no module pynvml", why, "pip install nvidia-ml-py")
    except Exception as error:  # pynvml.NVMLError
        return Finding(False, str(error), why, "install NVIDIA's driver where there is a GPU", needed=False)


def check_gpu(target: Target) -> Finding:
    from harness.training.nvml import count_gpus

    count = count_gpus()
    if not count:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        detail = "none" if hidden is None else f"none (CUDA_VISIBLE_DEVICES={hidden})"
        advice = "nothing to do for CPU runs; else NVIDIA's driver, and --gpus all in a container"
        return Finding(False, detail, "runs train on the CPU", advice, needed=False)
    import torch

    if not torch.cuda.is_available():
        why, advice = "its CUDA build and the driver do not fit", "a newer driver, or torch for an older CUDA"
        return Finding(False, f"{count}, which torch cannot use", why, advice, needed=False)
    value = torch.ones(8, 8, device="cuda").sum().item()
    names = sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())})
    detail = f"{torch.cuda.device_count()} x {', '.join(names)}"
    return Finding(value == 64.0, detail, "a sum on it is wrong", needed=False)


def check_builds(target: Target) -> Finding | None:
    """Whether torch's CUDA, the driver's and DALI's fit together."""
    import torch

    from harness.training.nvml import cuda_driver_version, driver_version

    try:
        driver, newest = driver_version(), cuda_driver_version()
    except Exception:
        return None  # no driver: the NVML line says so
    builds = {"torch": torch.version.cuda or ""}
    builds |= {wheel: f"{wheel[-3:-1]}.0" for wheel in DALI_WHEELS if installed_version(wheel) is not None}
    have = ", ".join(
        f"{name} for CUDA {cuda}" if cuda else f"{name} without CUDA" for name, cuda in builds.items()
    )
    detail, fits = f"driver {driver} for CUDA {newest[0]}.{newest[1]}; {have}", newest[0]
    kind = {11: "cu118", 12: "cu126 or cu128"}.get(fits, f"cu{fits}0")
    torch_line = f"install a torch built for CUDA {fits} ({kind}: pytorch.org/get-started has the line)"
    if not builds["torch"]:
        return Finding(False, detail, "this torch uses no GPU", torch_line)
    if int(builds["torch"].split(".")[0]) > fits:
        update = (
            "or update the driver to 580 or newer" if builds["torch"].startswith("13") else "or update the driver"
        )
        return Finding(False, detail, "the driver is too old for this torch", f"{torch_line}, {update}")
    if newer := [wheel for wheel in builds if wheel != "torch" and int(wheel[-3:-1]) > fits]:
        advice = f"pip uninstall {newer[0]} && pip install nvidia-dali-cuda{fits}0"
        return Finding(False, detail, "the driver is too old for this DALI", advice)
    return Finding(True, detail)


def check_nccl(target: Target) -> Finding:
    import torch

    if not torch.distributed.is_nccl_available():
        why = "several GPUs communicate through it"
        return Finding(False, "not in this build of torch", why, "a CUDA build of torch", needed=False)
    from torch.cuda import nccl

    return Finding(True, ".".join(str(part) for part in nccl.version()))


def check_dali(target: Target) -> Finding:
    """Our own loader on four images: on a GPU too, where there is one."""
    wheels = [f"{name} {detail}" for name in DALI_WHEELS if (detail := installed_version(name)) is not None]
    why, other = "the default loader", "or choose --loader resident"
    if not wheels:
        return Finding(False, "not installed", why, f"pip install nvidia-dali-cuda120, {other}")
    import torch

    from harness.training.nvml import count_gpus

    devices = ["cpu", *["cuda:0"] * (count_gpus() > 0 and torch.cuda.is_available())]
    for device in devices:
        try:
            right = _load_by_dali(device)
        except Exception as error:
            detail, advice = (
                f"{wheels[0]} on {device}: {_reason(error)[:160]}",
                "the wheel of your CUDA (cuda120 or cuda130)",
            )
            return Finding(False, detail, why, f"{advice}, {other}")
        if not right:
            return Finding(False, f"{wheels[0]} on {device} gives wrong images", why, other)
    detail = f"{', '.join(wheels)}, runs on {' and '.join(devices)}"
    return Finding(len(wheels) == 1, detail, "two wheels write into one folder", "keep one of them")


def _load_by_dali(device: str) -> bool:
    import numpy as np
    import torch

    from harness.loaders.datasets import Split
    from harness.loaders.loader import make_loaders
    from harness.loaders.sampling import Augment, LoaderConfig, Normalize

    images = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    split = Split(images, np.arange(4, dtype=np.int64))
    config = LoaderConfig(
        augment=Augment(1, "zero", None, True),
        normalize=Normalize(np.zeros(3, np.float32), np.ones(3, np.float32)),
        batch_size=2,
        eval_batch_size=4,
        device=torch.device(device),
        channels_last=False,
    )
    loaders = make_loaders("dali", split, split, config)
    batch, _ = next(iter(loaders[1].epoch(0)))
    right = batch.shape == (4, 3, 8, 8) and abs(float(batch.max()) - 1.0) < 1e-3
    for loader in loaders:
        loader.close()
    return right


def check_ray(target: Target) -> Finding:
    detail = installed_version("ray")
    pin = next((line for line in requires("resnet-harness") or () if re.match(r"ray\b", line)), "")
    why, advice = "several workers and several runs at a time", f"pip install '{pin}', or choose --launcher local"
    if detail is None:
        return Finding(False, "not installed", why, advice)
    import ray.train

    bounds = [tuple(map(int, pair)) for pair in re.findall(r"(?:>=|<)(\d+)\.(\d+)", pin)]
    fits = len(bounds) != 2 or min(bounds) <= tuple(map(int, detail.split(".")[:2])) < max(bounds)
    return Finding(fits and hasattr(ray.train, "ScalingConfig"), detail, why, advice)


def check_cluster(target: Target) -> Finding | None:
    if target.address is None:
        return None
    from harness.cluster.connect import ClusterError, connect, disconnect

    try:
        cluster = connect(target.address, cpus=0, gpus=0)
    except ClusterError as error:
        advice = "`ray start --head` there, and one ~/.ray/auth_token on all machines: cluster/README.md"
        return Finding(False, str(error), "named by --address", advice)
    disconnect()
    return Finding(True, f"{cluster.nodes} nodes, {cluster.cpus} CPUs, {cluster.gpus} GPUs at {target.address}")


def check_storage(target: Target) -> Finding:
    """Write, sync, lock and rename as results and checkpoints are stored. Leaves nothing behind."""
    from filelock import FileLock

    where = _nearest(target.out)
    why = f"results go to --out {target.out}"
    advice = "name a folder that you may write to, on a file system that renames and locks"
    try:
        with tempfile.TemporaryDirectory(prefix=".check-", dir=where) as folder:
            before, after = Path(folder, "a"), Path(folder, "b")
            with before.open("wb") as file:
                file.write(b"whole")
                file.flush()
                os.fsync(file.fileno())
            after.write_bytes(b"old")
            before.rename(after)
            with FileLock(Path(folder, "lock"), timeout=5):
                right = after.read_bytes() == b"whole" and not before.exists()
    except (OSError, NotImplementedError) as error:
        return Finding(False, f"{where}: {getattr(error, 'strerror', None) or error}", why, advice)
    return Finding(right, f"{where} takes files, renames and locks", why, advice)


def check_disk(target: Target) -> Finding:
    where = _nearest(target.out)
    free = free_gib(where)
    why = f"at least {LEAST_DISK_GIB:.0f} GiB is needed for weights and checkpoints"
    return Finding(
        free >= LEAST_DISK_GIB, f"{free:.1f} GiB free at {where}", why, "make room, or name another --out"
    )


def check_shared_memory(target: Target) -> Finding | None:
    path = Path("/dev/shm")
    if not path.is_dir():
        return None
    free = free_gib(path)
    why, advice = "Ray and NCCL put what processes share there", "docker run --shm-size 8g"
    return Finding(free >= LEAST_SHARED_MEMORY_GIB, f"{free:.1f} GiB free in {path}", why, advice, needed=False)


def check_data(target: Target) -> Finding:
    from harness.loaders.cache import cache_dir

    if target.data_dir is None:
        cache = cache_dir()
        here = (cache / "downloads" / "cifar-10-batches-py").is_dir()
        detail = f"cifar10 in {cache}" if here else f"no cifar10 in {cache} yet"
        advice = "without a network name --data-dir, or take --dataset digits"
        return Finding(here, detail, "the first run downloads 163 MiB", advice, needed=False)
    root = target.data_dir.expanduser()
    kinds = {
        "cifar-10-batches-py": ("cifar-10-batches-py",),
        "class folders": ("train", "test"),
        "miniplaces": ("train.txt", "val.txt", "images"),
    }
    kind = next((kind for kind, names in kinds.items() if all((root / name).exists() for name in names)), None)
    detail = f"{kind} in {root}" if kind else f"nothing known in {root}"
    advice = "cifar-10-batches-py, train/ and test/ with class folders, or miniplaces' kit is expected in it"
    return Finding(kind is not None, detail, "named by --data-dir", advice)


def check_pynvml(target: Target) -> Finding | None:
    """That a package which shadows nvidia-ml-py is not there."""
    detail = installed_version("pynvml")
    if detail is None:
        return None
    advice = "pip uninstall pynvml: nvidia-ml-py is the package that is used"
    return Finding(
        False, f"the package pynvml {detail} is installed", "it makes every process warn", advice, needed=False
    )


CHECKS: dict[str, Callable[[Target], Finding | None]] = {
    "Python": check_python,
    "torch": check_torch,
    "NVML": check_nvml,
    "GPU": check_gpu,
    "builds": check_builds,
    "NCCL": check_nccl,
    "DALI": check_dali,
    "Ray": check_ray,
    "cluster": check_cluster,
    "storage": check_storage,
    "disk": check_disk,
    "shared memory": check_shared_memory,
    "data": check_data,
    "pynvml": check_pynvml,
}


def examine(target: Target) -> Iterator[tuple[str, Finding]]:
    """Every check's finding, as it is found. A check that breaks is a finding, not a traceback."""
    for name, check in CHECKS.items():
        try:
            finding = check(target)
        except Exception as error:
            finding = Finding(False, f"the check failed: {_reason(error)[:200]}")
        if finding is not None:
            yield name, finding


def print_findings(target: Target, console: Console) -> int:
    """Print a line for each finding. Returns 0 where nothing is missing that runs on the CPU need, else 1.

    Raises UserError for an address that cannot be one.
    """
    if target.address not in (None, "auto") and not re.fullmatch(r".+:\d+", str(target.address)):
        raise UserError(f"--address {target.address!r} is not HOST:PORT or auto")
    from rich.text import Text

    missing = 0
    for name, finding in examine(target):
        text = Text(finding.line(name))
        text.stylize("green" if finding.ok else "red" if finding.needed else "yellow", 0, 7)
        console.print(text, soft_wrap=True)
        missing += finding.needed and not finding.ok
    if not missing and not target.quick:
        missing = measure(target, console)
        verdict = f"{missing} of the checks failed" if missing else "ready"
    else:
        verdict = f"{missing} of what a run needs is missing" if missing else "ready"
    console.print(verdict, style="bold", soft_wrap=True)
    return 1 if missing else 0


def measure(target: Target, console: Console) -> int:
    """Measure in this process, and then on two ranks where that is possible. Returns how many checks failed."""
    from rich.text import Text

    from harness.cluster.job import Worker
    from harness.training.checks import run_checks
    from harness.training.host import count_cpus
    from harness.training.nvml import count_gpus

    failed = 0

    def show(check: Check) -> None:
        nonlocal failed
        text = Text(check.line())
        text.stylize("yellow" if check.passed is None else "green" if check.passed else "red", 0, 7)
        console.print(text, soft_wrap=True)
        failed += check.passed is False

    if target.address is None:
        gpus = count_gpus() if target.gpus is None else min(target.gpus, count_gpus())
        for check in run_checks(Worker(device="cuda:0" if gpus else "cpu", threads=count_cpus())):
            show(check)
    for check in measure_ranks(target):
        show(check)
    return failed


def measure_ranks(target: Target) -> list[Check]:
    """The checks of several ranks, launched as a run is."""
    from harness.cluster.job import Failed, Worker
    from harness.plan import Grid
    from harness.resources import Resources, Session, make_allocation
    from harness.spec import RunPaths
    from harness.training.checks import Check, make_spec, run_rank_checks

    with ExitStack() as stack:
        out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="harness-check-")))
        resources = Resources(gpus=target.gpus, workers=None, address=target.address)
        allocation = make_allocation(Grid(variants=("he2015",)), resources, stack)
        if allocation.device == "cuda" and allocation.gpus < 2:
            return [Check("several ranks", None, "they need two GPUs")]
        if allocation.device == "cpu":
            if allocation.threads < 2:
                return [Check("several ranks", None, "they need two CPU cores")]
            allocation = replace(allocation, workers=2, threads=allocation.threads // 2)
        session = Session(allocation, resources, RunPaths(out=out), stack)
        spec = make_spec(Worker(device=allocation.device))
        runs = session.launch(run_rank_checks, [spec], progress=lambda *_: None)
        outcomes = [outcome for _, outcome in runs]
    return [
        check
        for outcome in outcomes
        for check in ([Check("several ranks", False, outcome.message)] if isinstance(outcome, Failed) else outcome)
    ]


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _nearest(path: Path) -> Path:
    """The folder itself, or the one in which it would be made."""
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path
