"""Other people's training code, as it is, on our images.

    python benchmarks/peers.py --peer PATH --data-dir DIR [--depth 20] [--epochs 10] [--output FILE.json]

PATH is a checkout outside this repository, and nothing in it is changed:

- akamaster/pytorch_resnet_cifar10: its `trainer.main()`, 200 epochs, lr dropped at 100 and 150;
- fattorib/ResNets-CIFAR10: its `train_model_script.py`, 180 epochs, lr dropped at 90 and 135, 2,500 images held out;
- KellerJordan/cifar10-zoo: `train()` of airbench/baselines/base_resnet18.py, with its loader that lives on the GPU and
  half precision, and our network of the depth asked for in place of its ResNet-18. Its schedule spans the epochs asked
  for, and it cuts squares out of images: its seconds can be compared with ours, its error cannot.

What is done from outside: torchvision's CIFAR10 reads our images, fattorib's network gets the depth asked for (its
script says 20) and its split its own share of the images, and on the CPU `.cuda()` does nothing. A peer trains in a
process of its own, with whatever it sets globally, and waits before each epoch until that is asked for: several ways
to train can take turns. Seconds are from asking its loader for an epoch until its last step is done on the device.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

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
    compares_error: bool  # its recipe is one of ours for as long as its lr has not dropped

    def network(self, depth: int) -> Any:
        """Its network (zoo: ours, as it trains it in place of its own), a torch module on the CPU in fp32."""
        if self.name == "akamaster":
            return _akamaster_network(_load_module("peer_akamaster", self.path / "resnet.py"), depth)
        if self.name == "fattorib":
            module = _load_module("peer_fattorib", self.path / "src/models/Model.py")
            return module.ResNet(filters_list=[16, 32, 64], N=_blocks(depth))
        return _our_network(depth)

    def epochs(
        self, depth: int, data: Path, device: str, epochs: int, batch_size: int = 128
    ) -> Iterator[PeerEpoch]:
        """Train epoch after epoch, each when it is asked for. `data` holds cifar-10-batches-py, by `write_cifar10`.

        `device` is "cuda" or "cpu". Raises PeerError with the end of the peer's own output where its code breaks.
        """
        _blocks(depth)
        if self.name == "fattorib" and batch_size != 128:
            raise PeerError(f"fattorib's code has a batch of 128, not {batch_size}")
        job = {"peer": self.name, "path": str(self.path.resolve()), "depth": depth, "data": str(data.resolve()),
               "device": device, "epochs": epochs, "batch_size": batch_size}  # fmt: skip
        # the answers' pipe must not be what the peer prints to
        reading, writing = os.pipe()
        with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+", encoding="utf-8") as log:
            child = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), "--serve", json.dumps({**job, "answers": writing})],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, pass_fds=(writing,), cwd=folder, text=True,
            )  # fmt: skip
            os.close(writing)
            assert child.stdin is not None
            try:
                with os.fdopen(reading, encoding="utf-8") as answers:
                    for number in range(1, epochs + 1):
                        with contextlib.suppress(BrokenPipeError):
                            child.stdin.write("go\n")
                            child.stdin.flush()
                        answer = answers.readline()
                        if not answer:
                            child.wait()
                            log.seek(0)
                            said = "\n".join(log.read().splitlines()[-15:])
                            raise PeerError(f"{self.name} ended in epoch {number}:\n{said}")
                        yield PeerEpoch(epoch=number, **json.loads(answer))
            finally:
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.close()
                child.kill()
                child.wait()


def load_peer(path: Path) -> Peer:
    """Recognise a checkout by its files. Raises PeerError where it is none of the known ones."""
    for name, (mark, _, compares_error) in RUNNERS.items():
        if (path / mark).is_file():
            git = ["git", "-C", str(path), "rev-parse", "HEAD"]
            done = subprocess.run(git, capture_output=True, text=True, check=False)
            commit = done.stdout.strip() if done.returncode == 0 else None
            return Peer(name=name, path=path, commit=commit, compares_error=compares_error)
    marks = ", ".join(mark for mark, _, _ in RUNNERS.values())
    raise PeerError(f"{path} is no checkout that is known here: it has none of {marks}")


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
    """Waits before each epoch of training until it is asked for, and answers how it went."""

    def __init__(self, asked: TextIO, answers: TextIO, device: str) -> None:
        self.asked, self.answers, self.device = asked, answers, device
        self.loader: object = None  # the training one: the first that is iterated over
        self.seconds = 0.0
        self.after_epoch: Callable[[], float | None] = lambda: None

    def watch(self, kind: type) -> None:
        """Time the epochs of the first loader of this class that is asked for one."""
        original = kind.__iter__  # type: ignore[attr-defined]

        def iterate(loader: object) -> Iterator[Any]:
            self.loader = self.loader or loader
            if loader is not self.loader:
                yield from original(loader)
                return
            if not self.asked.readline():
                raise SystemExit(0)
            self._synchronise()
            began = time.perf_counter()
            yield from original(loader)
            self._synchronise()
            self.seconds = time.perf_counter() - began
            if (error := self.after_epoch()) is not None:
                self.answer(error)

        kind.__iter__ = iterate  # type: ignore[attr-defined]

    def answer(self, error: float) -> None:
        """The epoch is over."""
        import torch

        memory = torch.cuda.max_memory_allocated() / 2**20 if self.device == "cuda" else None
        line = {"seconds": self.seconds, "error": error, "torch_allocated_mib": memory}
        self.answers.write(json.dumps(line) + "\n")
        self.answers.flush()

    def _synchronise(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()


def serve(job: dict[str, Any]) -> None:
    """Run a peer's code until nothing asks for another epoch."""
    import torch
    import torchvision

    data, device = Path(job["data"]), job["device"]
    turns = Turns(sys.stdin, os.fdopen(job["answers"], "w", encoding="utf-8"), device)
    if device == "cpu":
        torch.Tensor.cuda = torch.nn.Module.cuda = _stay  # type: ignore[method-assign]

    class OurImages(torchvision.datasets.CIFAR10):  # type: ignore[misc]
        """CIFAR10 wherever the peer says it lies."""

        def __init__(self, root: object, train: bool = True, transform: Any = None, **kwargs: Any) -> None:
            super().__init__(data, train=train, transform=transform, download=False)

    torchvision.datasets.cifar.check_integrity = _unchecked
    torchvision.datasets.CIFAR10 = OurImages
    _, runner, _ = RUNNERS[job["peer"]]
    runner(Path(job["path"]), job, turns)


def _stay(self: Any, *args: Any, **kwargs: Any) -> Any:
    """`.cuda()` on a machine without CUDA."""
    return self


def _unchecked(*args: Any) -> bool:
    """The checksums in torchvision are the published images'."""
    return True


def _run_akamaster(path: Path, job: dict[str, Any], turns: Turns) -> None:
    import torch

    sys.path.insert(0, str(path))
    trainer: Any = importlib.import_module("trainer")
    turns.watch(torch.utils.data.DataLoader)
    validate = trainer.validate

    def measured(*args: Any) -> float:
        precision: float = validate(*args)
        turns.answer(100 - precision)
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
        make(self, filters_list, _blocks(job["depth"]))

    def split_in_proportion(images: Any, lengths: list[int]) -> Any:
        held_out = len(images) * lengths[1] // sum(lengths)
        return split(images, [len(images) - held_out, held_out])

    def started(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        turns.after_epoch = lambda: _test_error(self.model, self.testloader)

    model.ResNet.__init__ = deep
    torch.utils.data.random_split = split_in_proportion  # type: ignore[assignment]
    training.Train_Model.__init__ = started
    turns.watch(torch.utils.data.DataLoader)
    runpy.run_path(str(path / "src/models/train_model_script.py"), run_name="__main__")


def _run_zoo(path: Path, job: dict[str, Any], turns: Turns) -> None:
    # the package itself would load every script of its own, and make a loader for each
    sys.modules["airbench"] = _load_module("airbench", path / "airbench/airbench/utils.py")
    baseline = _load_module("base_resnet18", path / "airbench/baselines/base_resnet18.py")
    networks = []

    def swapped_in(**kwargs: Any) -> Any:
        networks.append(_our_network(job["depth"]))
        return networks[-1]

    def error() -> float:
        accuracy = baseline.evaluate(networks[-1], test)
        networks[-1].train()
        return 100 * (1 - float(accuracy))

    baseline.ResNet18 = swapped_in
    augment = {name: baseline.hyp["aug"][name] for name in ("flip", "translate", "cutout")}
    where = 0 if job["device"] == "cuda" else "cpu"
    make = baseline.CifarLoader
    train = make(job["data"], train=True, batch_size=job["batch_size"], aug=augment, gpu=where)
    test = make(job["data"], train=False, batch_size=1000, gpu=where)
    turns.after_epoch = error
    turns.watch(make)
    baseline.train(train, test, epochs=job["epochs"])


RUNNERS: dict[str, tuple[str, Callable[[Path, dict[str, Any], Turns], None], bool]] = {
    "akamaster": ("trainer.py", _run_akamaster, True),
    "fattorib": ("src/models/train_model_script.py", _run_fattorib, True),
    "zoo": ("airbench/baselines/base_resnet18.py", _run_zoo, False),
}
"""Name -> a file that tells the checkout, what runs it, and whether its error may stand beside ours."""


def _test_error(network: Any, loader: Any) -> float:
    """Percent of wrong answers, counted image by image."""
    import torch

    wrong = images = 0
    network.eval()
    with torch.no_grad():
        for inputs, labels in loader:
            wrong += int((network(inputs.cuda()).argmax(1) != labels.cuda()).sum())
            images += len(labels)
    network.train()
    return 100 * wrong / images


def _blocks(depth: int) -> int:
    if depth < 8 or (depth - 2) % 6:
        raise PeerError(f"depth {depth} is not 6n+2")
    return (depth - 2) // 6


def _akamaster_network(module: Any, depth: int) -> Any:
    if not hasattr(module, f"resnet{depth}"):
        raise PeerError(f"akamaster has no depth {depth}: 20, 32, 44, 56, 110 and 1202 are allowed")
    return getattr(module, f"resnet{depth}")()


def _our_network(depth: int) -> Any:
    from harness.models.build import build
    from harness.models.variants import he2015

    return build(he2015(depth).network, 10)


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
    parser.add_argument("--output", type=Path, help="written anew after every epoch")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(json.loads(arguments.serve))
        return 0
    if arguments.peer is None:
        parser.error("--peer PATH is missing: a checkout of other people's code")
    try:
        _measure(arguments)
    except PeerError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _measure(arguments: argparse.Namespace) -> None:
    import torch

    from harness.loaders.datasets import limit, load_dataset

    peer = load_peer(arguments.peer)
    images = load_dataset(arguments.dataset, arguments.data_dir)
    train = limit(images.train, arguments.limit_train or len(images.train))
    test = limit(images.test, arguments.limit_test or len(images.test))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    done: list[PeerEpoch] = []
    about = {
        "peer": peer.name, "commit": peer.commit, "compares_error": peer.compares_error, "depth": arguments.depth,
        "dataset": images.label, "fingerprint": images.fingerprint, "limit_train": arguments.limit_train, "limit_test": arguments.limit_test,
        "batch_size": arguments.batch_size, "asked_epochs": arguments.epochs, "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_cifar10(Path(folder), train, test, images.classes)
        for epoch in peer.epochs(arguments.depth, Path(folder), device, arguments.epochs, arguments.batch_size):
            done.append(epoch)
            print(f"{peer.name}-{arguments.depth} epoch {epoch.epoch}/{arguments.epochs}: {epoch.seconds:.2f} s, "
                  f"test error {epoch.error:.2f} %", flush=True)  # fmt: skip
            if arguments.output:
                write = {**about, "epoch_seconds": median_seconds(done), "epochs": [asdict(e) for e in done]}
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                arguments.output.write_text(json.dumps(write, indent=1) + "\n", encoding="utf-8")
    print(f"{peer.name}-{arguments.depth} on {images.label}: {median_seconds(done):.3f} s/epoch (median without the "
          f"first), error {done[-1].error:.2f} % after {len(done)}")  # fmt: skip


def median_seconds(epochs: list[PeerEpoch]) -> float:
    """Without the warm-up, where there is more than that."""
    return statistics.median(epoch.seconds for epoch in epochs[WARMUP_EPOCHS:] or epochs)


if __name__ == "__main__":
    sys.exit(main())
