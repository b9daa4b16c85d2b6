"""Before a run on several nodes: have all of them the same code, versions, data and results folder, and are they as fast?"""

from __future__ import annotations

import itertools
import platform
import shutil
import statistics
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from harness.checklist import Result
from harness.cluster import nodes
from harness.cluster.job import Allocation, Failed
from harness.cluster.nodes import Unanswered
from harness.cluster.workers import driver_clock
from harness.loaders.datasets import DataError, Dataset, load_dataset
from harness.plugins import load_sources, used_by
from harness.progress import make_table, say
from harness.record import DALI_WHEELS, installed_version
from harness.resources import Session
from harness.results.identity import hash_code
from harness.results.remote import StorageError, find_sentinels, leave_sentinel, remove_sentinels
from harness.spec import RunPaths, UserError

PACKAGES = ("torch", "torchvision", "ray", "numpy", *DALI_WHEELS)
LEAST_DISK_GIB = 2.0  # for a grid's checkpoints and weights, and a decoded data set
CLOCK_READINGS = 10
CLOCK_TICK = 2.0**-22  # seconds: the step of a float that holds today's time
NAMED_CLOCK_SECONDS, LARGEST_CLOCK_SECONDS = 0.5, 60.0  # a clock that is further off is named, and refused
NETWORK_SECONDS = 60.0  # for workers that measure all-reduces to find room
OUTLIER_SHARE = 0.25  # below the median node
ELSEWHERE = "another folder, or none"
CLOCK = ("ahead_seconds", "uncertainty_seconds")
COLUMNS = ("node", "what", "there", "here")  # of a difference from this machine, or from what is needed
Difference = tuple[str, str, str, str]


def free_gib(folder: Path) -> float:
    """Disk space that is free where a folder is."""
    return shutil.disk_usage(folder).free / 2**30


def describe() -> dict[str, str]:
    """What must be equal everywhere, but for the data."""
    versions = {package: installed_version(package) or "not installed" for package in PACKAGES}
    return {"python": platform.python_version(), "code": hash_code(), **versions}


def read_clock(there: Callable[[], float]) -> tuple[float, float]:
    """Seconds that this machine's clock is ahead of the one that `there` reads, and the most by which that can be wrong:
    half of the quickest of some round trips (Cristian, Probabilistic clock synchronization, 1989)."""
    readings = []
    for _ in range(CLOCK_READINGS):
        sent, read, received = time.time(), there(), time.time()
        readings.append(((received - sent) / 2 + CLOCK_TICK, (sent + received) / 2 - read))
    uncertainty, ahead = min(readings)
    return ahead, uncertainty


def answer(paths: RunPaths, dataset: str, sentinel: str, clock: Callable[[], float]) -> dict[str, Any]:
    """The facts of the node this runs on; leaves a file beside the driver's `sentinel` in the results folder."""
    from harness.training.rates import measure_rates

    uri = paths.remote or paths.out.as_uri()
    facts: dict[str, Any] = {**describe(), "clock": read_clock(clock), "out": ELSEWHERE, "disk": 0.0, "rates": {}}
    try:
        if sentinel in find_sentinels(uri, sentinel):
            facts["out"] = f"{sentinel}-{uuid.uuid4().hex}"
            leave_sentinel(uri, facts["out"])
            paths.out.mkdir(parents=True, exist_ok=True)  # the cache of a URI
            facts["disk"] = free_gib(paths.out)
    except (OSError, StorageError) as error:
        facts["out"] = getattr(error, "strerror", None) or str(error)
    try:
        load_sources([source.identity for source in paths.plugins], paths)
        content = load_dataset(dataset, paths.data_dir, paths.cache_dir)
        facts["data"] = content.fingerprint[:12]
        if paths.out.is_dir():
            facts["rates"] = measure_rates(paths.out, content)
    except (DataError, OSError, RuntimeError, UserError) as error:
        facts["data"] = str(error)
    return facts


def compare(
    here: Mapping[str, str], answers: Mapping[str, dict[str, Any] | Unanswered], sentinels: Collection[str]
) -> list[Difference]:
    """Everything that differs. `sentinels` are the files of the nodes that the driver sees in its results folder."""
    differences: list[Difference] = []
    for node, facts in sorted(answers.items()):
        if isinstance(facts, Unanswered):
            differences.append((node, "answer", facts.reason, ""))
            continue
        differences += [(node, what, facts[what], here[what]) for what in here if facts[what] != here[what]]
        if facts["out"] not in sentinels:
            differences.append((node, "--out", facts["out"], "must be one shared folder"))
        elif facts["disk"] < LEAST_DISK_GIB:
            free, needed = f"{facts['disk']:.1f} GiB free", f"at least {LEAST_DISK_GIB:.0f} GiB"
            differences.append((node, "disk", free, needed))
        ahead, uncertainty = facts["clock"]
        if abs(ahead) - uncertainty > LARGEST_CLOCK_SECONDS:
            differences.append((node, "clock", f"{abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}", ""))
    return differences


def find_outliers(rates: Mapping[str, Mapping[str, float]]) -> dict[str, list[str]]:
    """By slow node, a line for each of its figures that is far below the median node's; of two nodes, below the better
    one's."""
    lines: dict[str, list[str]] = {}
    for figure in dict.fromkeys(figure for own in rates.values() for figure in own):
        by_node = {node: own[figure] for node, own in rates.items() if figure in own}
        middle = statistics.median_high(by_node.values())
        for node, value in by_node.items():
            if value < (1 - OUTLIER_SHARE) * middle:
                below = f"{100 * (1 - value / middle):.0f} % below the median node's {middle:.3g}"
                lines.setdefault(node, []).append(f"{node} is slow: {figure} {value:.3g}, {below}")
    return lines


def find_wrong_clocks(clocks: Mapping[str, tuple[float, float]]) -> list[str]:
    """A line for each clock that is further from this machine's than NAMED_CLOCK_SECONDS, whatever the uncertainty."""
    return [
        f"the clock of {node} is {abs(ahead):.3g} s {'ahead of' if ahead > 0 else 'behind'} this machine's, "
        f"± {uncertainty:.2g} s: times that two nodes took are wrong by that"
        for node, (ahead, uncertainty) in clocks.items()
        if abs(ahead) - uncertainty > NAMED_CLOCK_SECONDS
    ]


def leave_out(slow: Collection[str], job: Allocation) -> Allocation:
    """The job without these of the `working_nodes`. Raises UserError where it has no room then."""
    every = nodes.working_nodes()
    job = replace(job, avoid=tuple(every[name] for name in slow))
    cluster = nodes.inspect_cluster(job.avoid)
    if (fitted := nodes.fit(cluster, job)).concurrent_runs:
        return fitted
    if not any(nodes.count_runs(cluster, replace(job, workers=width)) for width in job.fallback_world_sizes):
        stay = f"{len(every) - len(slow)} of {len(every)} nodes stay, without {', '.join(slow)}"
        raise UserError(f"--exclude-outliers: {stay}: no room for a run of {job.workers} workers")
    return replace(job, concurrent_runs=1)


def measure_network(session: Session, workers: int) -> dict[str, Any]:
    """All-reduces between so many workers, placed as a run's are, and what NCCL says; or "reason", why there are none."""
    from harness.training.rates import measure_network as measure

    outcome = session.launch_once(measure, "all-reduce", NETWORK_SECONDS, workers=workers, fallback_world_sizes=())
    return {"reason": outcome.message} if isinstance(outcome, Failed) else outcome


def measure_between(session: Session, *, widest: bool) -> dict[str, Any]:
    """The same between a run's workers, if several; or between all that there is room for."""
    job = session.allocation
    cluster = nodes.inspect_cluster(job.avoid)
    workers = nodes.choose_world_size(cluster, job)
    if widest:
        job, workers = replace(job, placement="pack"), nodes.count_runs(cluster, replace(job, workers=1))
    return measure_network(replace(session, allocation=job), workers) if workers > 1 else {}


def measure_nodes(dataset: Dataset, session: Session, console: Console) -> dict[str, Any]:
    """What each node gives of the cluster that was joined, and its clock. Prints a table of what differs from this process and
    from what a run needs, and raises UserError."""
    paths = session.paths
    say(
        console,
        f"asking {len(nodes.working_nodes())} nodes; one that has to decode images takes minutes",
        style="dim",
    )
    uri, sentinel = paths.remote or paths.out.as_uri(), f".preflight-{uuid.uuid4().hex[:12]}"
    leave_sentinel(uri, sentinel)
    try:
        own = tuple(loaded.source for loaded in used_by([("dataset", dataset.name)]))
        with driver_clock() as clock:
            ask = partial(answer, replace(paths, plugins=own), dataset.name, sentinel, clock)
            answers: dict[str, Any] = nodes.ask_every_node(ask)
        sentinels = find_sentinels(uri, sentinel)
    finally:
        remove_sentinels(uri, sentinel)
    if differences := compare({**describe(), "data": dataset.fingerprint[:12]}, answers, sentinels):
        table = make_table(*COLUMNS, left=COLUMNS)
        for difference in differences:
            table.add_row(*map(escape, difference))  # another machine's text is never taken for markup
        console.print(table)
        wrong = len({node for node, *_ in differences})
        raise UserError(f"{wrong} of {len(answers)} nodes are not ready: the table says what differs")
    rates = {node: facts["rates"] for node, facts in answers.items()}
    outliers = list(itertools.chain(*find_outliers(rates).values()))
    clocks = {node: dict(zip(CLOCK, facts["clock"], strict=True)) for node, facts in answers.items()}
    return {"rates": rates, "outliers": outliers, "clocks": clocks}


def judge(measured: Mapping[str, Any]) -> Iterator[Result]:
    """A line for each node, each figure that is slow, each clock that is off; for each way of all-reduces, for what NCCL says
    on each host, and for what is wrong with it."""
    clocks = {node: tuple(clock.values()) for node, clock in measured.get("clocks", {}).items()}
    for node, clock in clocks.items():
        figures = [f"{figure} {value:.3g}" for figure, value in measured["rates"][node].items()]
        yield Result(node, "ok", ", ".join([*figures, "clock {:+.2g} ± {:.1g} s".format(*clock)]))
    for line in (*measured.get("outliers", ()), *find_wrong_clocks(clocks)):
        yield Result("nodes", "warning", line)
    if "reason" in measured:
        yield Result("all-reduce", "failed", f"all-reduces were not measured: {measured['reason']}")
    for way, of in measured.get("all_reduce", {}).items():
        bandwidth = f"{of['algorithm_gb_per_s']:.3g} GB/s, {of['bus_gb_per_s']:.3g} GB/s on the bus"
        yield Result("all-reduce", "ok", f"{way}, {of['ranks']} workers: {of['latency_us']:.3g} µs, {bandwidth}")
    if hosts := measured.get("nccl"):
        from harness.training.rates import find_idle_infiniband  # with torch, which takes seconds

        for said in hosts.values():
            yield Result("NCCL", "ok", "; ".join(f"{what} {', '.join(said[what])}" for what in said if said[what]))
        for line in find_idle_infiniband(hosts):
            yield Result("NCCL", "warning", line)


def check_nodes(
    dataset: Dataset, session: Session, console: Console, *, exclude: bool = False, widest: bool = False
) -> dict[str, Any]:
    """Before runs on several nodes: say what is wrong, and have the session leave out slow nodes where they are to be excluded.
    Returns what was measured. Raises UserError."""
    if nodes.only_this_one():
        return {}

    def tell(measured: dict[str, Any]) -> dict[str, Any]:
        for result in judge(measured):
            if result.state != "ok":
                say(console, result.detail)
        return measured

    preflight = tell(measure_nodes(dataset, session, console))
    if exclude and (slow := list(find_outliers(preflight["rates"]))):
        session.allocation = leave_out(slow, session.allocation)
        preflight["excluded"] = slow
        say(console, f"left out, as --exclude-outliers says: {', '.join(slow)}")
    return {"preflight": preflight | tell(measure_between(session, widest=widest))}
