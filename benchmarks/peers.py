"""Other people's training code, unchanged, on our images.

    python benchmarks/peers.py --peer PATH --data-dir DIR [--depth 20] [--epochs 10] [--output FILE.json]

PATH is a checkout outside this repository:

- akamaster/pytorch_resnet_cifar10: its `trainer.main()`, 200 epochs, lr dropped at 100 and 150;
- fattorib/ResNets-CIFAR10: its `train_model_script.py`, 180 epochs, lr dropped at 90 and 135, 2,500 images held out;
- KellerJordan/cifar10-zoo: `train()` of airbench/baselines/base_resnet18.py, with its loader that lives on the GPU and
  half precision, and our network of the requested depth in place of its ResNet-18. Its schedule spans the requested
  epochs, and it cuts squares out of images: its seconds can be compared with ours, its error cannot.

What is set from outside: torchvision's CIFAR10 reads our images, fattorib's network has the requested depth (its script
says 20) and its split the same share of the images, and on the CPU `.cuda()` does nothing. A peer trains in a process of
its own and waits before each epoch until it is requested, so that several ways to train can take turns. Seconds run from
the request to its loader until the epoch's last step is done on the device.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import pickle
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from rounds import write_readings

WARMUP_EPOCHS = 1  # left out of a median: cuDNN tries its kernels, the allocator fills its pools


class PeerError(Exception):
    """A checkout that is none of the known ones, or whose code did not run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerEpoch:
    """One epoch of a peer. `error`: percent of the whole test split, after it."""

    epoch: int  # from 1
    seconds: float  # training alone
    error: float
    torch_allocated_mib: float | None  # peak so far; None on the CPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """A checkout of other people's code."""

    name: str  # a key of RUNNERS
    path: Path
    commit: str | None

    def epochs(
        self, depth: int, data: Path, device: str, epochs: int, batch_size: int = 128
    ) -> Iterator[PeerEpoch]:
        """Train epoch after epoch, each when it is requested. `data` holds cifar-10-batches-py, by `write_cifar10`.

        `device` is "cuda" or "cpu". Raises PeerError with the end of the peer's own output where its code breaks.
        """
        if depth < 8 or (depth - 2) % 6:
            raise PeerError(f"depth {depth} is not 6n+2")
        if self.name == "fattorib" and batch_size != 128:
            raise PeerError(f"fattorib's code has a batch of 128, not {batch_size}")
        job = {"peer": self.name, "path": str(self.path.resolve()), "depth": depth, "data": str(data.resolve()),
               "device": device, "epochs": epochs, "batch_size": batch_size}  # fmt: skip
        reading, writing = os.pipe()  # for the epochs: what the peer prints goes to a log
        with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+", encoding="utf-8") as log:
            child = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), "--serve", json.dumps({**job, "pipe": writing})],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, pass_fds=(writing,), cwd=folder, text=True,
            )  # fmt: skip
            os.close(writing)
            assert child.stdin is not None
            try:
                with os.fdopen(reading, encoding="utf-8") as lines:
                    for number in range(1, epochs + 1):
                        with contextlib.suppress(BrokenPipeError):
                            child.stdin.write("go\n")
                            child.stdin.flush()
                        if not (line := lines.readline()):
                            child.wait()
                            log.seek(0)
                            output = "\n".join(log.read().splitlines()[-15:])
                            raise PeerError(f"{self.name} ended in epoch {number}:\n{output}")
                        yield PeerEpoch(epoch=number, **json.loads(line))
            finally:
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.close()
                child.kill()
                child.wait()


def load_peer(path: Path) -> Peer:
    """Recognise a checkout by its files. Raises PeerError where it is none of the known ones."""
    for name, (file, _) in RUNNERS.items():
        if (path / file).is_file():
            git = ["git", "-C", str(path), "rev-parse", "HEAD"]
            done = subprocess.run(git, capture_output=True, text=True, check=False)
            return Peer(name=name, path=path, commit=done.stdout.strip() if done.returncode == 0 else None)
    files = ", ".join(file for file, _ in RUNNERS.values())
    raise PeerError(f"{path} is no known checkout: it has none of {files}")


def write_cifar10(folder: Path, train: Any, test: Any, classes: tuple[str, ...]) -> None:
    """Write two splits (`harness.loaders.datasets.Split`) as torchvision's CIFAR10 reads them: cifar-10-batches-py."""
    batches = folder / "cifar-10-batches-py"
    batches.mkdir(parents=True, exist_ok=True)

    def write(name: str, images: Any, labels: Any) -> None:
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        (batches / name).write_bytes(pickle.dumps({"data": rows, "labels": labels.tolist()}))

    parts = [slice(k * len(train) // 5, (k + 1) * len(train) // 5) for k in range(5)]
    for number, part in enumerate(parts, 1):
        write(f"data_batch_{number}", train.images[part], train.labels[part])
    write("test_batch", test.images, test.labels)
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list(classes)}))


# --- in the peer's own process ---


class Turns:
    """Waits before each training epoch until it is requested, and reports how it went."""

    def __init__(self, requests: TextIO, results: TextIO, device: str) -> None:
        self.requests, self.results, self.device = requests, results, device
        self.loader: object = None  # the training one: the first that is iterated over
        self.seconds = 0.0
        self.after_epoch: Callable[[], float | None] = lambda: None

    def attach(self, kind: type) -> None:
        """Time the epochs of the first loader of this class that is iterated over."""
        original = kind.__iter__  # type: ignore[attr-defined]

        def iterate(loader: object) -> Iterator[Any]:
            self.loader = self.loader or loader
            if loader is not self.loader:
                yield from original(loader)
                return
            if not self.requests.readline():
                raise SystemExit(0)
            self._synchronise()
            began = time.perf_counter()
            yield from original(loader)
            self._synchronise()
            self.seconds = time.perf_counter() - began
            if (error := self.after_epoch()) is not None:
                self.report(error)

        kind.__iter__ = iterate  # type: ignore[attr-defined]

    def report(self, error: float) -> None:
        """The epoch is over."""
        import torch

        memory = torch.cuda.max_memory_allocated() / 2**20 if self.device == "cuda" else None
        line = {"seconds": self.seconds, "error": error, "torch_allocated_mib": memory}
        self.results.write(json.dumps(line) + "\n")
        self.results.flush()

    def _synchronise(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()


def serve(job: dict[str, Any]) -> None:
    """Run a peer's code until no further epoch is requested."""
    import torch
    import torchvision

    turns = Turns(sys.stdin, os.fdopen(job["pipe"], "w", encoding="utf-8"), job["device"])
    if job["device"] == "cpu":
        torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]

    class OurImages(torchvision.datasets.CIFAR10):  # type: ignore[misc]
        """CIFAR10, wherever the peer looks for it."""

        def __init__(self, root: object, train: bool = True, transform: Any = None, **kwargs: Any) -> None:
            super().__init__(Path(job["data"]), train=train, transform=transform, download=False)

    torchvision.datasets.cifar.check_integrity = lambda *_: (
        True
    )  # torchvision's checksums are the published images'
    torchvision.datasets.CIFAR10 = OurImages
    RUNNERS[job["peer"]][1](Path(job["path"]), job, turns)


def _run_akamaster(path: Path, job: dict[str, Any], turns: Turns) -> None:
    import torch

    sys.path.insert(0, str(path))
    trainer: Any = importlib.import_module("trainer")
    turns.attach(torch.utils.data.DataLoader)
    validate = trainer.validate

    def measured(*args: Any) -> float:
        precision: float = validate(*args)
        turns.report(100 - precision)
        return precision

    trainer.validate = measured
    sys.argv = ["trainer.py", f"--arch=resnet{job['depth']}", f"--batch-size={job['batch_size']}"]
    trainer.main()


def _run_fattorib(path: Path, job: dict[str, Any], turns: Turns) -> None:
    import torch

    sys.path.insert(0, str(path / "src/models"))
    model, training = importlib.import_module("Model"), importlib.import_module("Train_Model")
    make, split, start = model.ResNet.__init__, torch.utils.data.random_split, training.Train_Model.__init__

    def deep(self: Any, filters_list: list[int], N: int) -> None:  # noqa: N803, its own name
        make(self, filters_list, (job["depth"] - 2) // 6)

    def split_in_proportion(images: Any, lengths: list[int]) -> Any:
        held_out = len(images) * lengths[1] // sum(lengths)
        return split(images, [len(images) - held_out, held_out])

    def started(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        turns.after_epoch = lambda: _test_error(self.model, self.testloader)

    model.ResNet.__init__ = deep
    torch.utils.data.random_split = split_in_proportion  # type: ignore[assignment]
    training.Train_Model.__init__ = started
    turns.attach(torch.utils.data.DataLoader)
    runpy.run_path(str(path / "src/models/train_model_script.py"), run_name="__main__")


def _run_zoo(path: Path, job: dict[str, Any], turns: Turns) -> None:
    from harness.models.build import build
    from harness.models.variants import find_variant

    # the package itself would load every script of its own, and make a loader for each
    sys.modules["airbench"] = _load_module("airbench", path / "airbench/airbench/utils.py")
    baseline = _load_module("base_resnet18", path / "airbench/baselines/base_resnet18.py")
    networks = []

    def make_ours(**kwargs: Any) -> Any:
        networks.append(build(find_variant("he2015")(job["depth"]).network, 10))
        return networks[-1]

    def error() -> float:
        accuracy = baseline.evaluate(networks[-1], test)
        networks[-1].train()
        return 100 * (1 - float(accuracy))

    baseline.ResNet18 = make_ours
    augment = {name: baseline.hyp["aug"][name] for name in ("flip", "translate", "cutout")}
    where = 0 if job["device"] == "cuda" else "cpu"
    make = baseline.CifarLoader
    train = make(job["data"], train=True, batch_size=job["batch_size"], aug=augment, gpu=where)
    test = make(job["data"], train=False, batch_size=1000, gpu=where)
    turns.after_epoch = error
    turns.attach(make)
    baseline.train(train, test, epochs=job["epochs"])


RUNNERS: dict[str, tuple[str, Callable[[Path, dict[str, Any], Turns], None]]] = {
    "akamaster": ("trainer.py", _run_akamaster),
    "fattorib": ("src/models/train_model_script.py", _run_fattorib),
    "zoo": ("airbench/baselines/base_resnet18.py", _run_zoo),
}
"""Name -> a file by which the checkout is recognised, and what runs it."""


def _test_error(network: Any, loader: Any) -> float:
    """Percent of wrong predictions, counted image by image."""
    import torch

    wrong = images = 0
    network.eval()
    with torch.no_grad():
        for inputs, labels in loader:
            wrong += int((network(inputs.cuda()).argmax(1) != labels.cuda()).sum())
            images += len(labels)
    network.train()
    return 100 * wrong / images


def _load_module(name: str, file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the command ---


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--limit-train", type=int)
    parser.add_argument("--limit-test", type=int)
    parser.add_argument("--output", type=Path, help="written after every epoch")
    options = parser.parse_args()
    if options.serve:
        serve(json.loads(options.serve))
        return 0
    if options.peer is None:
        parser.error("--peer PATH is missing: a checkout of other people's code")
    try:
        measure(options)
    except PeerError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def measure(options: argparse.Namespace) -> None:
    """Train a peer, printing and writing every epoch."""
    import torch

    from harness.loaders.datasets import limit, load_dataset
    from harness.training.telemetry import device_name

    peer = load_peer(options.peer)
    images = load_dataset(options.dataset, options.data_dir)
    train = limit(images.train, options.limit_train or len(images.train))
    test = limit(images.test, options.limit_test or len(images.test))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    done: list[PeerEpoch] = []
    with tempfile.TemporaryDirectory() as folder:
        write_cifar10(Path(folder), train, test, images.classes)
        for epoch in peer.epochs(options.depth, Path(folder), device, options.epochs, options.batch_size):
            done.append(epoch)
            seconds = statistics.median(e.seconds for e in done[WARMUP_EPOCHS:] or done)
            print(f"{peer.name}-{options.depth} epoch {epoch.epoch}/{options.epochs}: {epoch.seconds:.2f} s, median "
                  f"{seconds:.3f} s, test error {epoch.error:.2f} %", flush=True)  # fmt: skip
            write_readings(
                options.output, peer=peer.name, commit_of_peer=peer.commit, depth=options.depth, dataset=images.label,
                fingerprint=images.fingerprint, limit_train=options.limit_train, limit_test=options.limit_test,
                batch_size=options.batch_size, requested_epochs=options.epochs, torch=torch.__version__,
                device=device_name(torch.device(device)), epoch_seconds=seconds, epochs=[asdict(e) for e in done],
            )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
