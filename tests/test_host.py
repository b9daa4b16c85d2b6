"""What disturbed an epoch on its host, and the peak of a run's memory: a /proc of invented figures, and real processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from records import make_epoch
from test_train import run, spec

from harness.cluster.job import Worker
from harness.models.variants import find_variant
from harness.results.values import EpochMetrics, Measurement
from harness.training import host, memory
from harness.training.host import CAUSES, OTHERS, HostLook, HostWindow
from harness.training.memory import MemoryMeter
from harness.training.telemetry import INTERFERENCE, EpochTelemetry
from harness.training.train import mark_outliers, summarise_history, total_energy

STOPPED, QUOTA, STOLEN, _ = CAUSES[2:]


class FakeHost:
    """Two processors; one process of ours with one thread. Seconds of processors, counted from the start."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.now = self.others = self.ran = self.waited = self.stolen = self.throttled = 0.0
        monkeypatch.setattr(host, "PROC", folder / "proc")
        monkeypatch.setattr(host, "CGROUPS", folder / "cgroup")
        monkeypatch.setattr(host, "family", lambda: [7])
        monkeypatch.setattr(host, "count_cpus", lambda: 2)
        monkeypatch.setattr(host, "WAIT_SHARE", 0.10)  # conftest.py lets nothing disturb the other tests
        monkeypatch.setattr(host, "STEAL_SHARE", 0.02)
        clock = SimpleNamespace(time=lambda: self.now, monotonic=lambda: self.now, process_time=lambda: self.ran)
        monkeypatch.setattr(host, "time", clock)
        self.schedstat = True

    def look(self) -> HostLook:
        ticks = [
            round(100 * n)
            for n in (self.others + self.ran, 2 * self.now - self.others - self.ran - self.stolen, self.stolen)
        ]
        files = {
            "proc/stat": f"cpu  {ticks[0]} 0 0 {ticks[1]} 0 0 0 {ticks[2]} 0 0\n",
            "proc/vmstat": "pswpin 5\n",
            "proc/self/cgroup": "0::/job\n",
            "cgroup/job/cpu.stat": f"nr_throttled 3\nthrottled_usec {round(1e6 * self.throttled)}\n",
        }
        if self.schedstat:
            files["proc/7/task/7/schedstat"] = f"{round(1e9 * self.ran)} {round(1e9 * self.waited)} 12\n"
        for name, text in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return HostLook()

    def window(self, seconds: float = 1.0, **spent: float) -> set[str]:
        """The causes that a window of these seconds shows."""
        before = self.look()
        self.now += seconds
        for name, value in spent.items():
            setattr(self, name, getattr(self, name) + value)
        seen = before.until(self.look())
        return seen.causes | ({OTHERS} if seen.is_disturbed(seen.own_seconds) else set())


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    return FakeHost(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("spent", "causes"),
    [
        ({"ran": 1.0}, set()),
        ({"ran": 1.0, "waited": 0.03, "others": 0.05}, set()),
        ({"ran": 0.5, "waited": 0.5, "others": 1.5}, {OTHERS}),
        ({"ran": 1.9, "waited": 1.9}, set()),  # more threads of our own than processors
        ({"ran": 1.0, "others": 1.0}, set()),  # on the other processor, in nobody's way
        ({"ran": 1.0, "stolen": 0.2}, {STOLEN}),
        ({"ran": 0.6, "throttled": 0.4}, {QUOTA}),
        ({"seconds": 0.1, "ran": 0.05, "waited": 0.05, "others": 0.1}, set()),  # too short to be judged
    ],
)
def test_who_took_the_processors(fake: FakeHost, spent: dict[str, float], causes: set[str]) -> None:
    assert fake.window(**spent) == causes


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/", {}, 16),
        ("0::/", {"cpu.max": "max 100000"}, 16),
        ("0::/", {"cpu.max": "400000 100000"}, 4),  # docker run --cpus 4
        ("0::/", {"cpu.max": "250000 100000"}, 2),  # a third thread would wait for half of each period
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "6400000 100000"}, 16),
        ("0::/kubepods/pod7", {"kubepods/cpu.max": "800000 100000", "kubepods/pod7/cpu.max": "max 100000"}, 8),
        ("4:cpu,cpuacct:/a", {"cpu,cpuacct/a/cpu.cfs_quota_us": "300000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"}, 3),
        ("4:cpu,cpuacct:/a", {"cpu,cpuacct/a/cpu.cfs_quota_us": "-1", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"}, 16),
    ],
)  # fmt: skip
def test_a_containers_quota_counts_as_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(host, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert host.count_cpus() == 16, "without /proc"
    for name, text in {"proc/self/cgroup": group, **{f"cgroup/{n}": t for n, t in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert host.count_cpus() == cores


def test_without_a_kernel_that_counts_waiting_the_others_time_decides(fake: FakeHost) -> None:
    fake.schedstat = False
    assert fake.window(ran=1.0, others=0.05) == set()
    assert fake.window(ran=0.5, others=1.5) == {OTHERS}


def test_the_ranks_of_a_run_are_not_others_to_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "WAIT_SHARE", 0.10)
    seen = HostWindow("node", set(), wait_share=0.4, own_seconds=1.0, busy_seconds=2.0, cpu_seconds=2.0)
    assert seen.is_disturbed(1.0), "of another rank, nothing is known"
    assert not seen.is_disturbed(2.0)


def test_slowed_epochs_are_found_and_quiet_ones_are_left_alone() -> None:
    """As measured on two cores: quiet epochs wait for 1 % of their time, at most 4; an epoch that is slowed to twice its
    seconds waits for as long as it runs, of which the kernel shows a part, and others have what it lacks."""
    random, n = np.random.default_rng(0), 5000
    quiet = zip(random.lognormal(np.log(0.012), 0.5, n), random.uniform(0, 0.04, n), strict=True)
    slowed = zip(random.uniform(0.2, 0.5, n), random.uniform(0.15, 0.5, n), strict=True)

    def share(windows: Any, threshold: float = 0.10) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host, "WAIT_SHARE", threshold)
            found = [
                HostWindow("n", set(), waited, 0.0, 2 * others, 2.0).is_disturbed(0.0)
                for waited, others in windows
            ]
        return float(np.mean(found))

    assert share(quiet) <= 0.01
    assert share(slowed) >= 0.95


def metrics(seconds: float, **changes: Any) -> EpochMetrics:
    return make_epoch(1, images=512, train_seconds=seconds, **changes)


@pytest.mark.parametrize("epochs", [6, 20])
def test_outliers_are_marked_at_the_end_of_a_run(epochs: int) -> None:
    """One epoch of each run takes twice its seconds; the others scatter by 3 %."""
    random, found, false, runs = np.random.default_rng(0), 0, 0, 400
    for _ in range(runs):
        seconds = random.lognormal(0, 0.03, epochs)
        seconds[0] *= 2
        marked = [not row.timed for row in mark_outliers([metrics(float(s)) for s in seconds])]
        found += marked[0]
        false += sum(marked[1:])
    assert found >= 0.95 * runs
    assert false <= 0.01 * runs * (epochs - 1)
    assert mark_outliers([metrics(s) for s in (1.0, 1.0, 1.0, 2.0)])[3].timed, "of four epochs none can be told"
    assert mark_outliers([metrics(1.0 + n / 1000) for n in (0, 0, 1, 1, 2, 20)])[5].timed, "2 % are no outlier"


def test_seconds_and_images_are_of_the_same_epochs() -> None:
    rows = [metrics(2.0), metrics(4.0), metrics(9.0, timed=False, untimed="outlier")]
    summary = summarise_history(rows, "test", 1)
    assert (summary["epoch_seconds"], summary["images_per_second"]) == (3.0, 512 / 3.0)
    disturbed = {
        "timed": False,
        "untimed": "interference: the machine swapped",
        "interference": ("the machine swapped",),
    }
    rows = [metrics(8.0, timed=False, untimed="warm-up"), metrics(5.0, **disturbed)]
    summary = summarise_history(rows, "test", 1)
    assert (summary["epoch_seconds"], summary["interference"]) == (5.0, ("the machine swapped",))


def test_energy_says_what_it_holds_and_lacks() -> None:
    gpu = Worker(device="cuda:0", threads=1)
    rows = [metrics(1.0, energy_joules=5.0) for _ in range(3)]
    assert total_energy(rows, gpu).reason is None
    shared = metrics(1.0, energy_joules=7.0, interference=(INTERFERENCE[0],))
    throttled = metrics(1.0, energy_joules=7.0, interference=(INTERFERENCE[1],), attempt=3)
    energy = total_energy([*rows, shared, throttled], gpu)
    assert energy.value == 29.0
    assert energy.reason == (
        "with the energy of other processes in 1 epochs; 1 disturbed epochs count; "
        "without what 2 interrupted attempts spent on epochs that were lost"
    )


# --- real processes ---


def in_child(work: Callable[[], Any], meanwhile: Callable[[int], None] = lambda _: None) -> Any:
    """What a forked child makes of it, as JSON."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            torch.set_num_threads(1)
            os.write(writing, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    meanwhile(child)
    with os.fdopen(reading) as file:
        answer = json.loads(file.read())
    os.waitpid(child, 0)
    return answer


def test_a_process_that_was_stopped_says_so() -> None:
    def watch() -> list[str]:
        epochs = EpochTelemetry(torch.device("cpu"))
        time.sleep(0.6)
        quiet = epochs.stop(1.0).interference
        epochs.start()
        until = time.monotonic() + 2.2
        while time.monotonic() < until:
            time.sleep(0.05)
        return [*quiet, "|", *epochs.stop(1.0).interference]

    def stop(child: int) -> None:
        time.sleep(1.0)
        os.kill(child, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(child, signal.SIGCONT)

    seen = in_child(watch, stop)
    assert STOPPED in seen[seen.index("|") :]
    assert STOPPED not in seen[: seen.index("|")]


def read_rss(meter: MemoryMeter) -> Measurement:
    return meter.read(torch.nn.Identity(), SimpleNamespace(state={})).rss_mib  # type: ignore[arg-type]


def test_the_peak_is_the_runs_own_and_counts_its_workers() -> None:
    def measure() -> list[float]:
        def rss(least: int) -> float:
            """Of a run that fills so many MiB."""
            meter = MemoryMeter(torch.device("cpu"))
            block = np.ones(least * 2**17)
            assert block[-1] == 1
            del block
            meter.sample()
            return read_rss(meter).value or 0.0

        figures = [rss(50), rss(400), rss(50)]
        stopping = multiprocessing.get_context("fork").Event()

        def fill() -> None:
            block = np.ones(100 * 2**17)
            stopping.wait(20 * block[-1])

        worker = multiprocessing.get_context("fork").Process(target=fill)
        worker.start()
        time.sleep(0.7)
        figures.append(rss(50))
        stopping.set()
        worker.join()
        return figures

    first, large, again, with_worker = in_child(measure)
    assert large - first == pytest.approx(350, rel=0.02)
    assert again == pytest.approx(first, rel=0.01)
    assert with_worker - again > 100


def test_where_the_peak_cannot_be_reset_it_is_the_processs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "PROC", tmp_path)
    rss = read_rss(MemoryMeter(torch.device("cpu")))
    assert rss.value is not None
    assert rss.reason == "of the whole process: its peak cannot be reset here"


def test_a_run_after_a_larger_one_has_its_own_peak(tmp_path: Path) -> None:
    def measure() -> list[float | None]:
        small = spec(limit_train=64, limit_test=64, recipe={"duration": 1})
        deep = find_variant("msra")(20).network
        large = spec(limit_test=64, network=deep, recipe={"duration": 1, "batch_size": 150})
        runs = enumerate((small, small, large, small))
        return [run(asked, tmp_path / str(number)).memory.rss_mib.value for number, asked in runs]

    _, alone, large, after = in_child(measure)
    # malloc decides anew where blocks of a size lie: the peaks of equal runs differ by some percent
    assert after - alone < (large - alone) / 2
