"""Nothing of a run outlives it: neither its graphs, which NCCL would wait for at its end, nor loaders and pipelines.

Without the garbage collector, which comes at any time or never, in a fresh process, where libraries are imported
while a run is under way and keep what they see.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest

WAYS = ("ends well", "raises", "is interrupted", "diverges")
KINDS = ("graphs", "loaders", "pipelines")
frames: list[Any] = []


def alive_after(way: str, out: Path) -> dict[str, int]:
    """How many of each are still there after a run; what the run raised is held meanwhile."""
    import torch
    from nvidia.dali import Pipeline
    from tape import Arena, Tape
    from test_train import RunPaths, spec

    import harness.training.setup
    from harness.cluster.job import Worker
    from harness.loaders.dali import DaliLoader
    from harness.training.train import train

    graphs: list[weakref.ref[Tape]] = []
    loaders: list[weakref.ref[Any]] = []
    closed: weakref.WeakSet[Any] = weakref.WeakSet()
    pipelines: list[weakref.ref[Any]] = []
    make_loaders, close, make_pipeline = harness.training.setup.make_loaders, DaliLoader.close, Pipeline.__init__

    def make_graphs(device: Any) -> Any:
        arena = Arena()

        def make() -> Tape:
            graph = arena()
            graphs.append(weakref.ref(graph))
            return graph

        return make

    def watch_loaders(*args: Any, **kwargs: Any) -> Any:
        made = make_loaders(*args, **kwargs)
        loaders.extend(weakref.ref(loader) for loader in made)
        return made

    def watch_close(self: Any) -> None:
        closed.add(self)
        close(self)

    def watch_pipeline(self: Any, *args: Any, **kwargs: Any) -> None:
        pipelines.append(weakref.ref(self))
        make_pipeline(self, *args, **kwargs)

    class KeepingSGD(torch.optim.SGD):
        """What torch 2.14 does: its first optimizer imports torch.fx, which keeps the frames of its callers."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            frames.append(sys._getframe())
            super().__init__(*args, **kwargs)

    sgd, torch.optim.SGD = torch.optim.SGD, KeepingSGD  # type: ignore[misc]
    harness.training.setup.make_graphs = make_graphs
    harness.training.setup.make_loaders = watch_loaders
    DaliLoader.close, Pipeline.__init__ = watch_close, watch_pipeline  # type: ignore[method-assign]
    recipe: dict[str, Any] = {"batch_size": 16, "duration": 2}
    if way == "diverges":
        recipe["lr"] = 1e30
    run = spec(engine="graph", loader="dali", limit_train=24, limit_test=8, recipe=recipe)

    def report(metrics: Any) -> None:
        if way == "raises":
            raise RuntimeError("planted")
        if way == "is interrupted":
            raise KeyboardInterrupt

    held: BaseException | None = None
    try:
        train(run, Worker(threads=1), report, paths=RunPaths(out=out, label="digits"))
    except BaseException as error:
        held = error
    counts = {
        "graphs": sum((graph := ref()) is not None and graph.state != "reset" for ref in graphs),
        "loaders": sum((loader := ref()) is not None and loader not in closed for ref in loaders),
        "pipelines": sum(ref() is not None for ref in pipelines),
        "made": min(len(graphs), len(loaders), len(pipelines)),
    }
    harness.training.setup.make_loaders = make_loaders
    DaliLoader.close, Pipeline.__init__ = close, make_pipeline  # type: ignore[method-assign]
    torch.optim.SGD = sgd  # type: ignore[misc]
    assert (held is None) == (way == "ends well"), held
    return counts


@pytest.fixture(scope="module")
def alive(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Of each way to end, one after the other."""
    finished = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, timeout=250, check=False,
        cwd=tmp_path_factory.mktemp("lifetime"),
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    found: dict[str, dict[str, int]] = json.loads(finished.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_outlives_a_run(alive: dict[str, dict[str, int]], way: str, kind: str) -> None:
    assert alive[way]["made"] > 0
    assert alive[way][kind] == 0


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    gc.disable()
    found = {}
    for one in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            found[one] = alive_after(one, Path(folder))
    print(json.dumps(found))
