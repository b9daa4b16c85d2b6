"""What is missing on this machine, one line each: what `harness doctor` prints. Each probe imports what it asks for."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from harness.spec import UserError

if TYPE_CHECKING:
    from rich.console import Console

GIB = 2**30
LEAST_DISK_GIB = 2.0  # a sweep's checkpoints and weights, and a decoded data set
LEAST_SHARED_MEMORY_GIB = 1.0  # Ray's object store and NCCL; Docker gives 64 MiB unless told


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    found: str  # what is here
    why: str = ""  # what it is for, said where it is missing
    advice: str = ""  # what to do
    needed: bool = True  # runs on the CPU need it, or the person named it

    def line(self) -> str:
        """ "missing  DALI: no nvidia.dali; ..." """
        if self.ok:
            return f"ok       {self.name}: {self.found}"
        state = "missing" if self.needed else "absent "
        tail = "; ".join(part for part in (self.found, self.why, self.advice) if part)
        return f"{state}  {self.name}: {tail}"


def examine(out: Path, data_dir: Path | None = None, address: str | None = None) -> Iterator[Finding]:
    """Every probe's finding, as it is found. A probe that breaks is a finding, not a traceback."""
    probes: list[tuple[str, Callable[[], Finding | None]]] = [
        ("Python", _python),
        ("torch", _torch),
        ("NVML", _nvml),
        ("GPU", _gpu),
        ("NCCL", _nccl),
        ("DALI", _dali),
        ("Ray", _ray),
        ("cluster", lambda: _cluster(address)),
        ("storage", lambda: _storage(out)),
        ("disk", lambda: _disk(out)),
        ("shared memory", _shared_memory),
        ("data", lambda: _data(data_dir)),
        ("pynvml", _unwanted_pynvml),
    ]
    for name, probe in probes:
        try:
            finding = probe()
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            finding = Finding(name=name, ok=False, found=f"the probe failed: {reason[:200]}")
        if finding is not None:
            yield finding


def check(out: Path, data_dir: Path | None, address: str | None, console: Console) -> int:
    """Print a line for each finding. Returns 0 when everything that runs on the CPU need is here, else 1.

    Raises UserError for an address that cannot be one.
    """
    if address is not None and address != "auto" and not re.fullmatch(r".+:\d+", address):
        raise UserError(f"--address {address!r} is not HOST:PORT or auto")
    from rich.text import Text

    wrong = 0
    for finding in examine(out, data_dir, address):
        style = "green" if finding.ok else "red" if finding.needed else "yellow"
        text = Text(finding.line())
        text.stylize(style, 0, 7)
        console.print(text, soft_wrap=True)
        wrong += finding.needed and not finding.ok
    console.print(
        "ready" if not wrong else f"{wrong} of what a run needs is missing", style="bold", soft_wrap=True
    )
    return 1 if wrong else 0


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _python() -> Finding:
    found = f"{sys.version.split()[0]} at {sys.prefix}"
    return Finding(name="Python", ok=sys.version_info >= (3, 11), found=found, advice="3.11 or newer is needed")


def _torch() -> Finding:
    if _installed("torch") is None:
        return Finding(name="torch", ok=False, found="not installed", why="networks are made of it",
                       advice="pip install torch torchvision")  # fmt: skip
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    product = torch.ones(2, 2) @ torch.ones(2, 2)
    works = product.sum().item() == 8.0 and torch.distributed.is_gloo_available()
    return Finding(name="torch", ok=works, found=f"{torch.__version__}, {build}",
                   why="a matrix product or gloo does not work", advice="install it again")  # fmt: skip


def _nvml() -> Finding:
    why = "GPUs are counted and their memory is measured with it"
    try:
        import pynvml
    except ImportError:
        return Finding(name="NVML", ok=False, found="no module pynvml", why=why,
                       advice="pip install nvidia-ml-py")  # fmt: skip
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Finding(name="NVML", ok=False, needed=False, found=f"{error}", why=why,
                       advice="install NVIDIA's driver where there is a GPU")  # fmt: skip
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()
    return Finding(name="NVML", ok=True, found=f"driver {driver}")


def _gpu() -> Finding:
    from harness.training.nvml import count_gpus

    count = count_gpus()
    if not count:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        found = "none" if hidden is None else f"none (CUDA_VISIBLE_DEVICES={hidden})"
        return Finding(name="GPU", ok=False, needed=False, found=found, why="runs train on the CPU",
                       advice="nothing to do for CPU runs; else NVIDIA's driver, and --gpus all in a container")  # fmt: skip
    import torch

    if not torch.cuda.is_available():
        return Finding(name="GPU", ok=False, needed=False, found=f"{count}, which torch cannot use",
                       why="its CUDA build and the driver do not fit",
                       advice="a newer driver, or torch for an older CUDA")  # fmt: skip
    value = torch.ones(8, 8, device="cuda").sum().item()
    names = sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())})
    return Finding(name="GPU", ok=value == 64.0, found=f"{torch.cuda.device_count()} x {', '.join(names)}",
                   why="a sum on it is wrong", needed=False)  # fmt: skip


def _nccl() -> Finding:
    import torch

    if not torch.distributed.is_nccl_available():
        return Finding(name="NCCL", ok=False, needed=False, found="not in this build of torch",
                       why="several GPUs talk through it", advice="a CUDA build of torch")  # fmt: skip
    from torch.cuda import nccl

    return Finding(name="NCCL", ok=True, found=".".join(str(part) for part in nccl.version()))


def _dali() -> Finding:
    """Loads it and runs our own loader on four images: on a GPU too, where there is one."""
    wheels = [f"{name} {found}" for name in ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "nvidia-dali-cuda110")
              if (found := _installed(name)) is not None]  # fmt: skip
    why, other = "the default loader", "or choose --loader resident"
    if not wheels:
        return Finding(name="DALI", ok=False, found="not installed", why=why,
                       advice=f"pip install nvidia-dali-cuda120, {other}")  # fmt: skip
    import numpy as np
    import torch

    from harness.loaders.datasets import Split
    from harness.loaders.loader import make_loaders
    from harness.loaders.sampling import Augment, LoaderConfig, Normalize
    from harness.training.nvml import count_gpus

    images = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    split = Split(images, np.arange(4, dtype=np.int64))
    normalize = Normalize(np.zeros(3, np.float32), np.ones(3, np.float32))
    devices = ["cpu", *["cuda:0"] * (count_gpus() > 0 and torch.cuda.is_available())]
    for device in devices:
        try:
            config = LoaderConfig(
                augment=Augment(1, "zero", None, True),
                normalize=normalize,
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
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            return Finding(name="DALI", ok=False, found=f"{wheels[0]} on {device}: {reason[:160]}", why=why,
                           advice=f"the wheel of your CUDA (cuda120 or cuda130), {other}")  # fmt: skip
        if not right:
            return Finding(name="DALI", ok=False, found=f"{wheels[0]} on {device} gives wrong images", why=why,
                           advice=other)  # fmt: skip
    clash = len(wheels) > 1
    return Finding(name="DALI", ok=not clash, found=f"{', '.join(wheels)}, runs on {' and '.join(devices)}",
                   why="two wheels write into one folder", advice="keep one of them")  # fmt: skip


def _ray() -> Finding:
    found = _installed("ray")
    pin = next((line for line in requires("resnet-harness") or () if re.match(r"ray\b", line)), "")
    bounds = [tuple(map(int, pair)) for pair in re.findall(r"(?:>=|<)(\d+)\.(\d+)", pin)]
    why, other = "several workers and several runs at a time", "or choose --launcher local"
    if found is None:
        return Finding(
            name="Ray", ok=False, found="not installed", why=why, advice=f"pip install '{pin}', {other}"
        )
    have = tuple(map(int, found.split(".")[:2]))
    fits = len(bounds) != 2 or min(bounds) <= have < max(bounds)
    import ray.train

    works = hasattr(ray.train, "ScalingConfig")
    return Finding(name="Ray", ok=fits and works, found=found, why=why, advice=f"pip install '{pin}', {other}")


def _cluster(address: str | None) -> Finding | None:
    if address is None:
        return None
    from harness.cluster.launch import ClusterError, connect, disconnect

    try:
        cluster = connect(address, cpus=0, gpus=0)
    except ClusterError as error:
        return Finding(name="cluster", ok=False, found=str(error), why="named by --address",
                       advice="`ray start --head` there, and one ~/.ray/auth_token on all machines: cluster/README.md")  # fmt: skip
    disconnect()
    return Finding(name="cluster", ok=True,
                   found=f"{cluster.nodes} nodes, {cluster.cpus} CPUs, {cluster.gpus} GPUs at {address}")  # fmt: skip


def _nearest(path: Path) -> Path:
    """The folder itself, or the one it would be made in."""
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path


def _storage(out: Path) -> Finding:
    """Writes, syncs, locks and renames, as results and checkpoints are stored; leaves nothing behind."""
    from filelock import FileLock

    where = _nearest(out)
    why = f"results go to --out {out}"
    advice = "name a folder that you may write to, on a file system that renames and locks"
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=where) as folder:
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
        reason = getattr(error, "strerror", None) or str(error)
        return Finding(name="storage", ok=False, found=f"{where}: {reason}", why=why, advice=advice)
    return Finding(
        name="storage", ok=right, found=f"{where} takes files, renames and locks", why=why, advice=advice
    )


def _disk(out: Path) -> Finding:
    where = _nearest(out)
    free = shutil.disk_usage(where).free / GIB
    return Finding(name="disk", ok=free >= LEAST_DISK_GIB, found=f"{free:.1f} GiB free at {where}",
                   why=f"at least {LEAST_DISK_GIB:.0f} GiB is wanted for weights and checkpoints",
                   advice="make room, or name another --out")  # fmt: skip


def _shared_memory() -> Finding | None:
    path = Path("/dev/shm")
    if not path.is_dir():
        return None
    free = shutil.disk_usage(path).free / GIB
    return Finding(name="shared memory", ok=free >= LEAST_SHARED_MEMORY_GIB, found=f"{free:.1f} GiB free in {path}",
                   why="Ray and NCCL put what processes share there",
                   advice="docker run --shm-size 8g", needed=False)  # fmt: skip


def _data(data_dir: Path | None) -> Finding:
    if data_dir is None:
        cache = Path(os.environ.get("HARNESS_CACHE") or Path.home() / ".cache" / "resnet-harness")
        here = (cache / "downloads" / "cifar-10-batches-py").is_dir()
        return Finding(name="data", ok=here, needed=False,
                       found=f"cifar10 in {cache}" if here else f"no cifar10 in {cache} yet",
                       why="the first run downloads 163 MiB",
                       advice="without a network name --data-dir, or take --dataset digits")  # fmt: skip
    root = data_dir.expanduser()
    kinds = {"cifar-10-batches-py": ("cifar-10-batches-py",), "class folders": ("train", "test"),
             "miniplaces": ("train.txt", "val.txt", "images")}  # fmt: skip
    found = next((kind for kind, names in kinds.items() if all((root / name).exists() for name in names)), None)
    expected = "cifar-10-batches-py, train/ and test/ with class folders, or miniplaces' kit is expected in it"
    return Finding(name="data", ok=found is not None,
                   found=f"{found} in {root}" if found else f"nothing known in {root}",
                   why="named by --data-dir", advice=expected)  # fmt: skip


def _unwanted_pynvml() -> Finding | None:
    found = _installed("pynvml")
    if found is None:
        return None
    return Finding(name="pynvml", ok=False, needed=False, found=f"the package pynvml {found} is installed",
                   why="it makes every process warn", advice="pip uninstall pynvml: nvidia-ml-py is what is used")  # fmt: skip
