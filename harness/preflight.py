"""Before a run on several nodes: have all of them the same code, versions, data and results folder?"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.markup import escape

from harness.cluster.nodes import Unanswered, ask_every_node, working_nodes
from harness.progress import make_table
from harness.record import DALI_WHEELS, installed_version
from harness.results.remote import StorageError, find_sentinels, leave_sentinel, remove_sentinels
from harness.spec import RunPaths, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from harness.loaders.datasets import Dataset

PACKAGE = Path(__file__).parent
COMPARED = ("torch", "torchvision", "ray", "numpy", *DALI_WHEELS)
LEAST_DISK_GIB = 2.0  # for a grid's checkpoints and weights, and a decoded data set
LARGEST_CLOCK_ERROR_SECONDS = 60.0
ROWS_SHOWN = 40
GIB = 2**30


class Difference(NamedTuple):
    """One thing on one node that differs from this machine, or from what is needed."""

    node: str
    what: str
    there: str
    here: str = ""


def hash_code(package: Path = PACKAGE) -> str:
    """SHA-256 over the package's sources, linked folders included; 12 hexadecimal digits."""
    digest = hashlib.sha256()
    paths = [Path(top, name) for top, _, names in os.walk(package, followlinks=True) for name in names]
    for path in sorted(path for path in paths if path.suffix == ".py"):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def free_gib(folder: Path) -> float:
    """Disk space that is free where a folder is."""
    return shutil.disk_usage(folder).free / GIB


def _describe() -> dict[str, str]:
    """What must be equal everywhere; "" for a package that is not installed."""
    versions = {package: installed_version(package) or "" for package in COMPARED}
    return {"python": platform.python_version(), "code": hash_code(), **versions}


def _leave_sentinel(paths: RunPaths, sentinel: str) -> tuple[str, str]:
    """Answer the driver's file with one beside it: its name, and the GiB free where this node writes."""
    out, remote = paths.out, paths.remote
    own = f"{sentinel}-{uuid.uuid4().hex}"
    if remote:
        seen = sentinel in find_sentinels(remote, sentinel)
        out.mkdir(parents=True, exist_ok=True)
        if seen:
            leave_sentinel(remote, own)
    else:
        seen = (out / sentinel).exists()
        if seen:
            (out / own).write_bytes(b"")
    return (own, f"{free_gib(out):.1f}") if seen else ("another folder, or none", "")


def answer(paths: RunPaths, dataset: str, sentinel: str) -> dict[str, str]:
    """The facts of the node this runs on, as text; leaves a file beside the driver's `sentinel` in the results folder."""
    facts = {**_describe(), "clock": f"{time.time()}"}
    try:
        facts["out"], facts["disk"] = _leave_sentinel(paths, sentinel)
    except (OSError, StorageError) as error:
        facts["out"], facts["disk"] = getattr(error, "strerror", None) or str(error), ""
    from harness.loaders.datasets import DataError, load_dataset

    try:
        facts["data"] = load_dataset(dataset, paths.data_dir, paths.cache_dir).fingerprint[:12]
    except (DataError, OSError) as error:
        facts["data"] = str(error)
    return facts


def compare(
    here: Mapping[str, str],
    answers: Mapping[str, Mapping[str, str] | Unanswered],
    *,
    sentinels: frozenset[str],
    sent_at: float,
    received_at: float,
) -> list[Difference]:
    """Everything that differs. `sentinels` are the files of the nodes that the driver sees in its results folder."""
    differences = []

    def add(*difference: str) -> None:
        differences.append(Difference(*difference))

    for node, facts in sorted(answers.items()):
        if isinstance(facts, Unanswered):
            add(node, "answer", facts.reason)
            continue
        for what in ("python", "code", "data", *COMPARED):
            if facts[what] != here[what]:
                add(node, what, facts[what] or "not installed", here[what] or "not installed")
        if facts["out"] not in sentinels:
            add(node, "--out", facts["out"], "must be one shared folder")
        elif float(facts["disk"]) < LEAST_DISK_GIB:
            add(node, "disk", f"{facts['disk']} GiB free", f"at least {LEAST_DISK_GIB:.0f} GiB")
        clock = float(facts["clock"])
        error = max(sent_at - clock, clock - received_at)
        if error > LARGEST_CLOCK_ERROR_SECONDS:
            add(node, "clock", f"{error:.0f} s {'behind' if clock < sent_at else 'ahead'}")
    return differences


def check_nodes(dataset: Dataset, paths: RunPaths, console: Console) -> None:
    """Compare the nodes of the cluster that was joined, if several, with this process and with what a run needs.

    Prints a table of what differs and raises UserError, or does nothing.
    """
    if len(working_nodes()) < 2:
        return
    remote, sentinel = paths.remote, f".preflight-{uuid.uuid4().hex[:12]}"
    if remote:
        leave_sentinel(remote, sentinel)
    else:
        (paths.out / sentinel).write_bytes(b"")
    try:
        sent_at = time.time()
        answers = ask_every_node(partial(answer, paths, dataset.name, sentinel))
        received_at = time.time()
        names = find_sentinels(remote, sentinel) if remote else [path.name for path in paths.out.iterdir()]
    finally:
        if remote:
            remove_sentinels(remote, sentinel)
        for path in paths.out.glob(f"{sentinel}*"):
            path.unlink(missing_ok=True)
    here = {**_describe(), "data": dataset.fingerprint[:12]}
    sentinels = frozenset(name for name in names if name.startswith(sentinel))
    differences = compare(here, answers, sentinels=sentinels, sent_at=sent_at, received_at=received_at)
    if differences:
        more = len(differences) - ROWS_SHOWN
        names = list(Difference._fields)
        table = make_table(*names, left=names, fold=True, caption=f"and {more} more" if more > 0 else None)
        for difference in differences[:ROWS_SHOWN]:
            table.add_row(
                *map(escape, difference)
            )  # a path or message of another machine is never taken for markup
        console.print(table)
        nodes = len({difference.node for difference in differences})
        raise UserError(f"{nodes} of {len(answers)} nodes are not ready: the table says what differs")
