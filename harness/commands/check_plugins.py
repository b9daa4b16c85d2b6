"""Whether plug-ins fit, a line for each thing and check: what `harness check my.py` prints."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.checklist import Result
from harness.cluster.job import Worker
from harness.commands.check import show
from harness.loaders.datasets import Dataset, load_dataset
from harness.models.variants import NETWORKS, find_variant
from harness.options import Grid
from harness.plan import find_data_dir, override
from harness.plugins import Loaded, blame, load_file, load_plugins, tables
from harness.spec import RunPaths, RunSpec, UserError
from harness.training import checks, fit

if TYPE_CHECKING:
    from rich.console import Console

EXIT_MISFIT = 2
SIDE = 32  # pixels of the images that networks are tried on, or the least that they take
LIMIT = 1e-3  # of a relative difference of losses, and of pixels
RANK_EPOCHS, RANK_SECONDS = 2, 120.0
Figure = Callable[[], tuple[float, str]]


def check_plugins(paths: list[Path], console: Console) -> int:
    """Print a line for each check of what these files register. Returns 0, or 2 where one failed. Raises UserError."""
    load_plugins()
    plugins = [load_file(path) for path in paths]
    wrong = show((result for loaded in plugins for result in check_plugin(loaded)), console)
    console.print(f"{wrong} of the checks failed" if wrong else "ready", style="bold")
    return EXIT_MISFIT if wrong else 0


def check_plugin(loaded: Loaded) -> Iterator[Result]:
    """Each thing by itself: a network and its variant are one."""
    for kind, name in loaded.owned:
        if kind != "variant" or ("network", name) not in loaded.owned:
            yield from check_entry(loaded, kind, name)


def check_entry(loaded: Loaded, kind: str, name: str) -> Iterator[Result]:
    """Does it fit, is a resumed run exact, does it work in other processes, do two ranks train as one does?"""
    checks.torch.set_num_threads(os.cpu_count() or 1)
    worker = Worker(threads=checks.torch.get_num_threads())
    spec, side = make_case(worker, kind, name)
    what = f"{kind} {name}"
    try:
        dataset = make_images(spec, side)
        of = "network" if kind == "variant" else kind
        word = spec.network.architecture if kind == "variant" else name
        yield Result(
            what, "passed", fit.try_out(of, word, spec, dataset, RunPaths(out=Path(), data_dir=_data_dir(spec)))
        )
    except Exception as error:
        yield Result(what, "failed", _words(kind, name, error))
        return
    if kind == "dataset":
        return
    changes: dict[str, Any] = {"network": spec.network, "recipe": spec.recipe, "loader": spec.loader, "size": side}
    bench = checks.Bench(worker)
    short = replace(spec.recipe, duration=RANK_EPOCHS, batch_norm="sync")
    trials: dict[str, Figure] = {"resume": lambda: checks.check_resume(bench, **changes)}
    if kind == "loader":
        trials["plan"] = lambda: checks.check_loader(bench, name)
    trials["workers, 2 ranks as 1"] = lambda: _two_ranks(loaded, changes | {"recipe": short})
    for trial, run in trials.items():
        try:
            figure, words = run()
            limit = 0.0 if trial == "resume" else LIMIT
            state = "passed" if figure <= limit else "failed"
            yield Result(f"{what}, {trial}", state, f"{words} (limit {limit:g})")
        except Exception as error:
            yield Result(f"{what}, {trial}", "failed", _words(kind, name, error))


def make_case(worker: Worker, kind: str, name: str) -> tuple[RunSpec, int]:
    """A small run that uses it, and the side of its images."""
    spec = checks.make_spec(worker)
    if kind in ("network", "variant"):
        variant = find_variant(name)()  # type: ignore[call-arg]
        small = Grid(epochs=checks.EPOCHS, batch_size=checks.BATCH, val=0)
        recipe = replace(
            override(variant.recipe, small)[0], crop=None, scale_range=(), lr=min(variant.recipe.lr, 0.02)
        )
        side = max(SIDE, NETWORKS[variant.network.architecture].smallest_image)
        return replace(spec, variant=name, network=variant.network, recipe=recipe), side
    recipe = replace(spec.recipe, augmentations=(name,)) if kind == "augmentation" else spec.recipe
    if kind in ("optimizer", "schedule"):
        recipe = replace(spec.recipe, **{kind: name})
    named = {kind: name} if kind in ("loader", "dataset") else {}
    return replace(spec, recipe=recipe, **named), checks.SIZE


def _data_dir(spec: RunSpec) -> Path | None:
    return find_data_dir(None, spec.dataset)


def make_images(spec: RunSpec, side: int) -> Dataset:
    """The data set itself, or invented images."""
    if spec.dataset in tables()["dataset"]:
        return load_dataset(spec.dataset, _data_dir(spec))
    split = checks.make_split(side)
    classes = tuple(map(str, range(checks.CLASSES)))
    return Dataset("check", "check", "", False, classes, split, split, flip=True)


def _two_ranks(loaded: Loaded, changes: dict[str, Any]) -> tuple[float, str]:
    """In two new processes that have nothing but a copy of the plug-in's source. Raises RuntimeError where one fails."""
    with tempfile.TemporaryDirectory(prefix="harness-check-") as folder:
        elsewhere = replace(loaded.source, path=str(Path(folder, "nowhere", Path(loaded.source.path).name)))
        source = loaded.source if loaded.source.installed else elsewhere
        paths = RunPaths(out=Path(folder), cache_dir=Path(folder), plugins=(source,))
        case = pickle.dumps(([source.identity], paths, changes))
        Path(folder, "case.pickle").write_bytes(case)
        env = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
        processes = [
            subprocess.Popen([sys.executable, "-m", "harness.training.fit", rank, folder], stderr=subprocess.PIPE,
                             stdout=subprocess.DEVNULL, text=True, env=env)
            for rank in ("0", "1")
        ]  # fmt: skip
        try:
            for process in processes:
                _, errors = process.communicate(timeout=RANK_SECONDS)
                if process.returncode:
                    raise RuntimeError((errors.strip().splitlines() or ["no message"])[-1][:200])
            figures = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in (0, 1)]
        finally:
            for process in processes:
                process.kill()
    worst, words = max(figures)
    return float(worst), f"{words}, from a copy of its source"


def _words(kind: str, name: str, error: Exception) -> str:
    """With the plug-in's file and line, where they are known."""
    known = error if isinstance(error, UserError) else blame(kind, name, error)
    return str(known or error).splitlines()[0]
