"""Before a run on several nodes: do they all have the same code, versions, data and results folder?"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cluster.nodes import Unanswered, ask_every_node
from harness.results.remote import StorageError, find_sentinels, leave_sentinel, remove_sentinels
from harness.spec import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PACKAGE = Path(__file__).parent
COMPARED = ("torch", "torchvision", "ray", "numpy", "nvidia-dali-cuda120", "nvidia-dali-cuda130")
LEAST_DISK_GIB = 2.0
LARGEST_CLOCK_ERROR_SECONDS = 60.0
ROWS_SHOWN = 40
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What each node is asked about. Paths absolute."""

    out: Path
    remote: str  # the URI that `out` stands for, if it does
    marker: str  # name of a file that the driver has put into `out`
    dataset: str
    data_dir: Path | None
    cache_dir: Path | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One thing on one node that is not as it is here, or not as it must be."""

    node: str
    what: str
    there: str
    here: str


def hash_code(package: Path = PACKAGE) -> str:
    """SHA-256 over the package's sources, linked folders' too, as this process would import them; 12 hexadecimal
    digits."""
    digest = hashlib.sha256()
    paths = [Path(top, name) for top, _, names in os.walk(package, followlinks=True) for name in names]
    for path in sorted(path for path in paths if path.suffix == ".py"):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _describe() -> dict[str, str]:
    """What must be equal everywhere; "" for a package that is not installed."""
    facts = {"python": platform.python_version(), "code": hash_code()}
    for package in COMPARED:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = ""
    return facts


def _leave_sentinel(question: Question) -> tuple[str, str]:
    """Answer the driver's file with one beside it: its name, and the GiB free where this node writes."""
    mine = f"{question.marker}-{uuid.uuid4().hex}"
    if question.remote:
        seen = question.marker in find_sentinels(question.remote, question.marker)
        question.out.mkdir(parents=True, exist_ok=True)
        if seen:
            leave_sentinel(question.remote, mine)
    else:
        seen = (question.out / question.marker).exists()
        if seen:
            (question.out / mine).write_bytes(b"")
    if not seen:
        return "another folder, or none", ""
    return mine, f"{shutil.disk_usage(question.out).free / GIB:.1f}"


def answer(question: Question) -> dict[str, str]:
    """The facts of the node this runs on, as text. Leaves a file in `out`."""
    facts = {**_describe(), "clock": f"{time.time()}"}
    try:
        facts["out"], facts["disk"] = _leave_sentinel(question)
    except (OSError, StorageError) as error:
        facts["out"], facts["disk"] = getattr(error, "strerror", None) or str(error), ""
    from harness.loaders.datasets import DataError, load_dataset

    try:
        facts["data"] = load_dataset(question.dataset, question.data_dir, question.cache_dir).fingerprint[:12]
    except (DataError, OSError) as error:
        facts["data"] = str(error)
    return facts


def compare(
    here: Mapping[str, str],
    answers: Mapping[str, Mapping[str, str] | Unanswered],
    *,
    written: frozenset[str],
    asked_at: float,
    answered_at: float,
) -> list[Difference]:
    """Everything that differs. `written` are the names that the driver finds in its own results folder."""
    found = []
    for node, facts in sorted(answers.items()):
        if isinstance(facts, Unanswered):
            found.append(Difference(node=node, what="answer", there=facts.reason, here=""))
            continue
        for what in ("python", "code", "data", *COMPARED):
            if facts[what] != here[what]:
                there, mine = facts[what] or "not installed", here[what] or "not installed"
                found.append(Difference(node=node, what=what, there=there, here=mine))
        if facts["out"] not in written:
            found.append(Difference(node=node, what="--out", there=facts["out"], here="must be one shared folder"))
        elif float(facts["disk"]) < LEAST_DISK_GIB:
            found.append(Difference(node=node, what="disk", there=f"{facts['disk']} GiB free",
                                    here=f"at least {LEAST_DISK_GIB:.0f} GiB"))  # fmt: skip
        clock = float(facts["clock"])
        error = max(asked_at - clock, clock - answered_at)
        if error > LARGEST_CLOCK_ERROR_SECONDS:
            side = "behind" if clock < asked_at else "ahead"
            found.append(Difference(node=node, what="clock", there=f"{error:.0f} s {side}", here=""))
    return found


def check_nodes(
    dataset: str,
    fingerprint: str,
    *,
    out: Path,
    data_dir: Path | None,
    cache_dir: Path | None,
    console: Console,
    remote: str = "",
) -> None:
    """Compare every node with this process, and with what a run needs.

    Prints a table of what differs and raises UserError, or does nothing. Call `connect` before.
    """
    question = Question(
        out=out,
        remote=remote,
        marker=f".preflight-{uuid.uuid4().hex[:12]}",
        dataset=dataset,
        data_dir=data_dir,
        cache_dir=cache_dir,
    )
    if remote:
        leave_sentinel(remote, question.marker)
    else:
        (out / question.marker).write_bytes(b"")
    try:
        asked_at = time.time()
        answers = ask_every_node(partial(answer, question))
        answered_at = time.time()
        names = find_sentinels(remote, question.marker) if remote else os.listdir(out)  # noqa: PTH208
        written = frozenset(name for name in names if name.startswith(question.marker))
    finally:
        if remote:
            remove_sentinels(remote, question.marker)
        for path in out.glob(f"{question.marker}*"):
            path.unlink(missing_ok=True)
    here = {**_describe(), "data": fingerprint[:12]}
    differences = compare(here, answers, written=written, asked_at=asked_at, answered_at=answered_at)
    if differences:
        console.print(_table(differences))
        nodes = len({difference.node for difference in differences})
        raise UserError(f"{nodes} of {len(answers)} nodes are not ready: the table says what differs")


def _table(differences: list[Difference]) -> Table:
    from rich.table import Table
    from rich.text import Text

    more = len(differences) - ROWS_SHOWN
    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), caption_justify="left",
        caption=f"and {more} more" if more > 0 else None,
    )  # fmt: skip
    for name in ("node", "what", "there", "here"):
        table.add_column(name, overflow="fold")
    for difference in differences[:ROWS_SHOWN]:
        # Text: a path or a message of another machine is never taken for markup
        table.add_row(
            *(Text(word) for word in (difference.node, difference.what, difference.there, difference.here))
        )
    return table
