"""Whether plug-ins fit, a line for each thing and check: what `harness check my.py` prints."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from harness.checklist import Result, attempt
from harness.cluster.job import Worker
from harness.commands.check import show
from harness.loaders.datasets import DATASETS, Dataset
from harness.models.variants import NETWORKS, find_variant
from harness.options import Grid
from harness.plan import find_data_dir, override
from harness.plugins import Loaded, blaming, load_file, load_plugins
from harness.progress import load_data
from harness.spec import RunPaths, RunSpec
from harness.training import checks, fit

EXIT_MISFIT = 2
SIDE = 32  # pixels of the images that networks are tried on, or the least that they take
MOST_LR = 0.02  # a few steps on few images are no place for a large one
LIMIT = 1e-3  # of a relative difference of losses, and of pixels
RANK_BATCH, RANK_LR = 40, 2e-3  # two steps: by batch norm on few images a rounding error grows with each
RANK_SECONDS = 120.0


def check_plugins(paths: list[Path], console: Console) -> int:
    """Print a line for each check of what these files register. Returns 0, or 2 where one failed. Raises UserError."""
    load_plugins()
    torch.set_num_threads(os.cpu_count() or 1)
    plugins = [load_file(path) for path in paths]
    wrong = show((result for loaded in plugins for result in _check(loaded, console)), console)
    return EXIT_MISFIT if wrong else 0


def _check(loaded: Loaded, console: Console) -> Iterator[Result]:
    """Does each thing fit, is a resumed run exact; do two ranks, which have but a copy of the source, train as one does?"""
    bench, cases = checks.Bench(Worker(threads=torch.get_num_threads())), dict[str, dict[str, Any]]()
    for kind, name in loaded.owned:
        if kind == "variant" and ("network", name) in loaded.owned:
            continue  # they are one
        spec, side = _make_run(bench.worker, kind, name)
        changes: dict[str, Any] = {n: getattr(spec, n) for n in ("network", "recipe", "loader")} | {"size": side}
        what, blame = f"{kind} {name}", blaming(kind, name)
        trials: list[tuple[str, Any, float]] = [(what, partial(_fit, kind, name, spec, side, console), 0.0)]
        if kind != "dataset":
            cases[what] = changes
            trials.append((f"{what}, resume", partial(checks.check_resume, bench, **changes), 0.0))
        if kind == "loader":
            trials.append((f"{what}, plan", partial(checks.check_loader, bench, name), LIMIT))
        for title, trial, limit in trials:
            result = attempt(title, blame(trial), limit=limit)
            yield result
            if result.state == "failed":
                cases.pop(what, None)
                break
    try:
        figures = _two_ranks(loaded, cases) if cases else {}
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        yield Result(f"{loaded.source.name}, in new processes", "failed", str(error)[:200])
        return
    for what in figures:
        yield attempt(f"{what}, 2 ranks of a copy", figures.get, what, limit=LIMIT)


def _fit(kind: str, name: str, spec: RunSpec, side: int, console: Console) -> tuple[float, str]:
    of = ("network", spec.network.architecture) if kind == "variant" else (kind, name)
    paths = RunPaths(out=Path(), data_dir=find_data_dir(None, spec.dataset))
    if spec.dataset in DATASETS:
        dataset = load_data(spec.dataset, paths, console)
    else:
        split, classes = checks.make_split(side), tuple(map(str, range(checks.CLASSES)))
        dataset = Dataset("check", "check", "", False, classes, split, split, flip=True)
    return 0.0, fit.try_out(*of, spec, dataset, paths)


def _make_run(worker: Worker, kind: str, name: str) -> tuple[RunSpec, int]:
    """A small run that uses it, and the side of its images."""
    spec = checks.make_spec(worker)
    if kind in ("network", "variant"):
        variant = find_variant(name)()  # type: ignore[call-arg]
        recipe, _ = override(variant.recipe, Grid(epochs=checks.EPOCHS, batch_size=checks.BATCH, val=0))
        recipe = replace(recipe, crop=None, scale_range=(), lr=min(recipe.lr, MOST_LR))
        side = max(SIDE, NETWORKS[variant.network.architecture].smallest_image)
        return replace(spec, variant=name, network=variant.network, recipe=recipe), side
    field: dict[str, Any] = {"augmentations": (name,)} if kind == "augmentation" else {kind: name}
    if kind not in ("loader", "dataset"):
        field = {"recipe": replace(spec.recipe, **field)}
    return replace(spec, **field), checks.SIZE


def _two_ranks(loaded: Loaded, cases: dict[str, dict[str, Any]]) -> dict[str, tuple[float, str]]:
    """In two new processes that have nothing but a copy of the plug-in's source. Raises RuntimeError where one fails."""
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory(prefix="harness-check-") as folder, ThreadPoolExecutor(2) as pool:
        source = replace(loaded.source, folder=str(Path(folder, "nowhere")))
        paths = RunPaths(out=Path(folder), cache_dir=Path(folder), plugins=(source,))
        for changes in cases.values():
            recipe = changes["recipe"]
            changes["recipe"] = replace(
                recipe, duration=1, batch_size=RANK_BATCH, batch_norm="sync", lr=min(recipe.lr, RANK_LR)
            )
        Path(folder, "cases.pickle").write_bytes(pickle.dumps((source.identity, paths, cases)))

        def run(rank: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "harness.training.fit", rank, folder]
            return subprocess.run(command, capture_output=True, text=True, env=env, timeout=RANK_SECONDS)

        for ended in pool.map(run, ("0", "1")):
            if ended.returncode:
                raise RuntimeError((ended.stderr.strip().splitlines() or ["no message"])[-1])
        figures: dict[str, tuple[float, str]] = json.loads(Path(folder, "0.json").read_text())
        return figures
