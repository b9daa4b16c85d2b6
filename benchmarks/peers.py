"""Other people's training code, unchanged, on our images.

    python benchmarks/peers.py --peer PATH --data-dir DIR [--depth 20] [--epochs 10] [--json FILE]

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

import importlib
import importlib.util
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rounds import make_table, parse_options, publish

WARMUP_EPOCHS = 1  # left out of a median: cuDNN tries its kernels, the allocator fills its pools
Job = dict[str, Any]


class PeerError(Exception):
    """A checkout that is none of the known ones, or whose code did not run."""


class Peer(NamedTuple):
    """A checkout of other people's code."""

    name: str  # a key of RUNNERS
    path: Path
    commit: str

    def epochs(self, depth: int, data: Path, device: str, epochs: int, batch_size: int = 128) -> Iterator[Job]:
        """Train epoch after epoch, each when it is requested. `data`: a folder, by `write_images`.

        `device` is "cuda" or "cpu". Yields `seconds` of training alone, `error` (percent of the whole test split) and
        `torch_allocated_mib` (the peak so far; None on the CPU). Raises PeerError with the end of the peer's own output
        where its code breaks.
        """
        if depth < 8 or (depth - 2) % 6:
            raise PeerError(f"depth {depth} is not 6n+2")
        if self.name == "fattorib" and batch_size != 128:
            raise PeerError(f"fattorib's code has a batch of 128, not {batch_size}")
        job = {"peer": self.name, "path": str(self.path.resolve()), "depth": depth, "data": str(data.resolve()),
               "device": device, "epochs": epochs, "batch_size": batch_size}  # fmt: skip
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            log = stack.enter_context((Path(folder) / "log").open("w+", encoding="utf-8"))
            command = [sys.executable, str(Path(__file__).resolve()), "--serve", json.dumps(job)]
            child = stack.enter_context(subprocess.Popen(
                command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            ))  # fmt: skip
            stack.callback(child.kill)
            assert child.stdin is not None
            assert child.stdout is not None
            for number in range(1, epochs + 1):
                with suppress(BrokenPipeError):
                    os.write(child.stdin.fileno(), b"go\n")
                if not (line := child.stdout.readline()):
                    child.wait()
                    log.seek(0)
                    output = "\n".join(log.read().splitlines()[-15:])
                    raise PeerError(f"{self.name} ended in epoch {number}:\n{output}")
                yield json.loads(line)


def load_peer(path: Path) -> Peer:
    """Recognise a checkout by its files. Raises PeerError where it is none of the known ones."""
    for name, (file, _) in RUNNERS.items():
        if (path / file).is_file():
            git = ["git", "-C", str(path), "rev-parse", "HEAD"]
            return Peer(
                name, path, subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
            )
    files = ", ".join(file for file, _ in RUNNERS.values())
    raise PeerError(f"{path} is no known checkout: it has none of {files}")


def write_images(folder: Path, train: Any, test: Any, classes: tuple[str, ...]) -> None:
    """Write two splits (`harness.loaders.datasets.Split`) for a peer's process."""
    for name, split in (("train", train), ("test", test)):
        np.savez(folder / f"{name}.npz", images=split.images, labels=split.labels, classes=classes)


# --- in the peer's own process ---


class Turns:
    """Waits before each training epoch until it is requested, and reports how it went: on standard output, to which the
    peer's own lines do not go."""

    def __init__(self, device: str) -> None:
        self.results = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)
        self.gpu = device == "cuda"
        self.loader: object = None  # the training one: the first that is iterated over
        self.seconds = 0.0
        self.after_epoch: Callable[[], float] | None = None

    def attach(self, kind: type) -> None:
        """Time the epochs of the first loader of this class that is iterated over."""
        import torch

        original = kind.__iter__  # type: ignore[attr-defined]

        def iterate(loader: object) -> Iterator[Any]:
            self.loader = self.loader or loader
            if loader is not self.loader:
                yield from original(loader)
                return
            if not sys.stdin.readline():
                raise SystemExit(0)
            if self.gpu:
                torch.cuda.synchronize()
            began = time.perf_counter()
            yield from original(loader)
            if self.gpu:
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - began
            if self.after_epoch is not None:
                self.report(self.after_epoch())

        kind.__iter__ = iterate  # type: ignore[attr-defined]

    def report(self, error: float) -> None:
        """The epoch is over."""
        import torch

        memory = torch.cuda.max_memory_allocated() / 2**20 if self.gpu else None
        line = {"seconds": self.seconds, "error": error, "torch_allocated_mib": memory}
        self.results.write(json.dumps(line) + "\n")


def serve(job: Job) -> None:
    """Run a peer's code until no further epoch is requested."""
    import torch
    import torchvision

    if job["device"] == "cpu":
        torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]

    class OurImages(torchvision.datasets.CIFAR10):  # type: ignore[misc]
        """CIFAR10, wherever the peer looks for it."""

        def __init__(self, root: object, train: bool = True, transform: Any = None, **kwargs: Any) -> None:
            torchvision.datasets.VisionDataset.__init__(self, job["data"], transform=transform)
            with np.load(Path(job["data"]) / f"{'train' if train else 'test'}.npz") as split:
                self.data, self.targets, self.classes = (
                    split["images"],
                    split["labels"].tolist(),
                    list(split["classes"]),
                )

    torchvision.datasets.CIFAR10 = OurImages
    RUNNERS[job["peer"]][1](Path(job["path"]), job, Turns(job["device"]))


def _run_akamaster(path: Path, job: Job, turns: Turns) -> None:
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


def _run_fattorib(path: Path, job: Job, turns: Turns) -> None:
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


def _run_zoo(path: Path, job: Job, turns: Turns) -> None:
    from harness.models.build import build
    from harness.models.variants import he2015

    # the package itself would load every script of its own, and make a loader for each
    sys.modules["airbench"] = _load_module("airbench", path / "airbench/airbench/utils.py")
    baseline = _load_module("base_resnet18", path / "airbench/baselines/base_resnet18.py")
    networks = []

    def make_ours(**kwargs: Any) -> Any:
        networks.append(build(he2015(job["depth"]).network, 10))
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


def describe(content: dict[str, Any]) -> str:
    """The table of a stored reading."""
    epochs = content["epochs"]
    cells = (f"{content['peer']}-{content['depth']}", (content["commit_of_peer"] or "–")[:7], len(epochs),
             f"{content['epoch_seconds']:.3g}", f"{epochs[-1]['error']:.2f}")  # fmt: skip
    return make_table(("peer", "commit", "epochs", "s/epoch", "test error %"), [cells])


def main() -> None:
    options = parse_options(
        __doc__, serve="", peer=Path, dataset="cifar10", data_dir=Path, depth=20, epochs=10, batch_size=128,
        limit_train=int, limit_test=int,
    )  # fmt: skip
    if options.serve:
        return serve(json.loads(options.serve))
    import torch

    from harness.loaders.datasets import limit, load_dataset

    if options.peer is None:
        sys.exit("peers: --peer PATH is missing: a checkout of other people's code")
    images, epochs = load_dataset(options.dataset, options.data_dir), []
    train, test = (limit(split, most or len(split)) for split, most in
                   ((images.train, options.limit_train), (images.test, options.limit_test)))  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder), train, test, images.classes)
            peer = load_peer(options.peer)
            for epoch in peer.epochs(options.depth, Path(folder), device, options.epochs, options.batch_size):
                epochs.append(epoch)
                print(f"{peer.name}-{options.depth} epoch {len(epochs)}/{options.epochs}: {epoch['seconds']:.2f} s, "
                      f"test error {epoch['error']:.2f} %", file=sys.stderr)  # fmt: skip
    except PeerError as error:
        sys.exit(f"peers: {error}")
    publish(
        describe, options.json, peer=peer.name, commit_of_peer=peer.commit, depth=options.depth, dataset=images.label,
        fingerprint=images.fingerprint, limit_train=options.limit_train, limit_test=options.limit_test,
        batch_size=options.batch_size, epochs=epochs,
        epoch_seconds=statistics.median(epoch["seconds"] for epoch in epochs[WARMUP_EPOCHS:] or epochs),
    )  # fmt: skip
    return None


if __name__ == "__main__":
    main()
