"""Run in a process of its own: what is left of a run's graphs when nothing is collected. Prints a JSON object."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

gc.disable()
gc_enable, gc.enable = gc.enable, lambda: None  # type: ignore[method-assign]

from tape import Tape  # noqa: E402
from test_train import run, spec  # noqa: E402

import harness.training.setup  # noqa: E402


class Counted(Tape):
    made: list[weakref.ref[Tape]] = []  # noqa: RUF012
    resets = 0

    def __init__(self) -> None:
        super().__init__()
        Counted.made.append(weakref.ref(self))

    def reset(self) -> None:
        Counted.resets += 1
        super().reset()


def main(ending: str) -> None:
    harness.training.setup.make_graphs = lambda _: Counted  # type: ignore[assignment, return-value]
    held: BaseException | None = None
    recipe: dict[str, Any] = {"duration": 1} if ending == "well" else {"lr": 1e30, "duration": 1}
    try:
        run(spec(engine="graph", recipe=recipe), Path(tempfile.mkdtemp()))
    except Exception as error:
        held = error
    alive = sum(graph() is not None for graph in Counted.made)
    told = {"graphs": len(Counted.made), "alive": alive, "resets": Counted.resets, "error": type(held).__name__}
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
