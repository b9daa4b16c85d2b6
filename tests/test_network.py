"""What an all-reduce costs and what NCCL says of its network; what is predicted from that, and how it is scored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks
from records import NO_GPU, make_memory, make_record
from rich.console import Console

from harness.cluster.job import Allocation, Failed, Worker
from harness.commands.probe import predict_scaling
from harness.options import Resources
from harness.plan import Grid, expand
from harness.resources import Session
from harness.results.explain import predicted_figures, why
from harness.results.rows import summarise
from harness.results.store import Stored, keep_prediction, load_predictions, load_records
from harness.results.values import Prediction
from harness.spec import RunPaths, RunSpec
from harness.training.rates import (
    ALL,
    BETWEEN,
    LARGE_BYTES,
    NCCL_LOG,
    WITHIN,
    all_reduce_seconds,
    efficiencies,
    find_idle_infiniband,
    find_infiniband,
    find_limit,
    measure_network,
    nccl_log,
    parse_nccl,
    predict_widths,
)  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent

# --- NCCL's words ---

LOGS = {
    "2.18": """NCCL version 2.18.5+cuda12.1
node07:4242:4242 [0] NCCL INFO cudaDriverVersion 12020
node07:4242:4310 [0] NCCL INFO NET/Plugin : No plugin found (libnccl-net.so), using internal implementation
node07:4242:4310 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.0.4.7<0>
node07:4242:4310 [0] NCCL INFO Using network IB
node07:4242:4310 [0] NCCL INFO NET/IB : GPU Direct RDMA Enabled for HCA 0 'mlx5_0'
node07:4242:4310 [0] NCCL INFO NET/IB : GPU Direct RDMA Disabled for HCA 1 'mlx5_1'
node07:4242:4310 [0] NCCL INFO Channel 00/0 : 7[7] -> 8[0] [receive] via NET/IB/0/GDRDMA
node07:4242:4310 [0] NCCL INFO Channel 01/0 : 7[7] -> 8[0] [receive] via NET/IB/1
node07:4242:4310 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/IPC/read
""",
    "2.21": """node07:4242:4242 [0] NCCL INFO NCCL_SOCKET_IFNAME set by environment to eth0
NCCL version 2.21.5+cuda12.4
node07:4242:4310 [0] NCCL INFO NCCL_IB_DISABLE set by environment to 1.
node07:4242:4310 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.4.7<0>
node07:4242:4310 [0] NCCL INFO Using non-device net plugin version 0
node07:4242:4310 [0] NCCL INFO Using network Socket
node07:4242:4310 [0] NCCL INFO NET/Socket : GPU Direct RDMA Disabled for HCA 0 'eth0'
node07:4242:4310 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/Socket/0
""",
    "2.26": """node07:42:42 [0] NCCL INFO NCCL version 2.26.2+cuda12.8
node07:42:90 [0] NCCL INFO NET/Plugin: Could not find: libnccl-net.so. Using internal net plugin.
node07:42:90 [0] NCCL INFO NET/IB : No device found.
node07:42:90 [0] NCCL INFO NET/IB : Using [RO]; OOB podnet1:10.0.1.9<0>
node07:42:90 [0] NCCL INFO NET/Socket : Using [0]podnet1:10.0.1.9<0> [1]podnet2:10.0.2.9<0>
node07:42:90 [0] NCCL INFO Using network Socket
node07:42:90 [0] NCCL INFO Channel 00/0 : 8[0] -> 0[0] [send] via NET/Socket/1
""",
    "2.28": """[2026-11-26 23:59:01] node07:42:42 [3] NCCL INFO NCCL version 2.28.3+cuda13.0
[2026-11-26 23:59:01] node07:42:90 [3] NCCL INFO NET/IB : Using [0]rocep1s0f1:1/RoCE [RO]; OOB bond0:10.0.1.9<0>
[2026-11-26 23:59:01] node07:42:90 [3] NCCL INFO Assigned NET plugin IB to comm
[2026-11-26 23:59:01] node07:42:90 [3] NCCL INFO Using network IB
[2026-11-26 23:59:02] node07:42:90 [3] NCCL INFO Channel 00/0 : 3[3] -> 8[0] [send] via NET/IB/0(2)/GDRDMA(PCI)/Shared
""",
    "a plug-in": """node07:42:42 [3] NCCL INFO NCCL version 2.27.5+cuda12.9
node07:42:90 [3] NCCL INFO Assigned NET plugin Libfabric to comm
node07:42:90 [3] NCCL INFO Using network Libfabric
""",
}
SAID: dict[str, dict[str, list[str]]] = {
    "2.18": {
        "version": ["2.18.5"], "network": ["IB"], "devices": ["[0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]"],
        "gpu_direct_rdma": ["Enabled for HCA 0 'mlx5_0'", "Disabled for HCA 1 'mlx5_1'"],
        "channels": ["NET/IB/0/GDRDMA", "NET/IB/1"],
    },
    "2.21": {
        "version": ["2.21.5"], "network": ["Socket"], "devices": ["[0]eth0:10.0.4.7<0>"],
        "gpu_direct_rdma": ["Disabled for HCA 0 'eth0'"], "channels": ["NET/Socket/0"],
        "settings": ["NCCL_SOCKET_IFNAME set by environment to eth0", "NCCL_IB_DISABLE set by environment to 1"],
    },
    "2.26": {
        "version": ["2.26.2"], "network": ["Socket"],
        "devices": ["[0]podnet1:10.0.1.9<0> [1]podnet2:10.0.2.9<0>"], "channels": ["NET/Socket/1"],
    },
    "2.28": {
        "version": ["2.28.3"], "network": ["IB"], "devices": ["[0]rocep1s0f1:1/RoCE [RO]"],
        "channels": ["NET/IB/0(2)/GDRDMA(PCI)/Shared"],
    },
    "a plug-in": {"version": ["2.27.5"], "network": ["Libfabric"]},
}  # fmt: skip


@pytest.mark.parametrize("version", LOGS)
def test_the_lines_in_which_nccl_names_its_network(version: str) -> None:
    said = parse_nccl(LOGS[version])
    assert {what: lines for what, lines in said.items() if lines} == SAID[version]
    assert parse_nccl(LOGS[version] * 2) == said, "each is kept once"


def test_nothing_is_found_in_another_log() -> None:
    assert not any(parse_nccl("Using cache\nn:1:1 [0] NCCL INFO Bootstrap : Using eth0:10.0.0.1<0>\n").values())


def make_port(root: Path, device: str, state: str, layer: str = "InfiniBand") -> None:
    port = root / device / "ports" / "1"
    port.mkdir(parents=True)
    for name, text in {"state": state, "rate": "200 Gb/sec (4X HDR)", "link_layer": layer}.items():
        (port / name).write_text(f"{text}\n")


def test_ports_of_infiniband_devices_that_are_active(tmp_path: Path) -> None:
    assert find_infiniband(tmp_path / "none") == []
    make_port(tmp_path, "mlx5_0", "1: DOWN")
    make_port(tmp_path, "mlx5_1", "4: ACTIVE")
    make_port(tmp_path, "mlx5_2", "4: ACTIVE", "Ethernet")
    assert find_infiniband(tmp_path) == [
        "mlx5_1:1, InfiniBand at 200 Gb/sec (4X HDR)", "mlx5_2:1, Ethernet at 200 Gb/sec (4X HDR)",
    ]  # fmt: skip


def test_sockets_beside_an_idle_infiniband_are_warned_of() -> None:
    ports = ["mlx5_1:1, InfiniBand at 200 Gb/sec (4X HDR)"]
    said = {version: parse_nccl(log) for version, log in LOGS.items()}
    hosts = {host: said["2.21"] | {"infiniband": ports} for host in ("node07", "node08")}
    assert find_idle_infiniband(hosts) == [
        "NCCL uses sockets ([0]eth0:10.0.4.7<0>) on 2 of 2 nodes, though InfiniBand is active there "
        "(mlx5_1:1, InfiniBand at 200 Gb/sec (4X HDR)): NCCL_IB_DISABLE set by environment to 1"
    ]
    unset = {"node07": said["2.26"] | {"infiniband": ports}, "node08": said["2.18"] | {"infiniband": ports}}
    (line,) = find_idle_infiniband(unset)
    assert "on 1 of 2 nodes" in line
    assert line.endswith(": NCCL_DEBUG=INFO says why")
    assert not find_idle_infiniband({host: said["2.18"] | {"infiniband": ports} for host in "ab"}), "it is in use"
    assert not find_idle_infiniband({host: said["2.21"] | {"infiniband": []} for host in "ab"}), "there is none"
    assert not find_idle_infiniband({"a": hosts["node07"]}), "within a node NCCL uses no network"


def test_nccl_writes_into_a_file_unless_the_user_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NCCL_LOG:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with nccl_log() as log:
        assert log is not None
        assert os.environ["NCCL_DEBUG_FILE"] == str(log)
        assert os.environ["NCCL_DEBUG"] == "INFO"
        assert {"INIT", "NET"} <= set(os.environ["NCCL_DEBUG_SUBSYS"].split(","))
        assert log.parent.is_dir()
    assert not log.parent.exists()
    for name in NCCL_LOG:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    with nccl_log() as log:
        assert log is None
        assert "NCCL_DEBUG_FILE" not in os.environ


# --- all-reduces ---


def reduce(rank: int, nodes: str, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(nodes))
    torch.set_num_threads(1)
    worker = Worker(rank=rank, world_size=len(nodes), node=nodes[rank])
    measured = measure_network(None, worker, lambda _: None)
    Path(folder, f"{rank}.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("nodes", "ways"),
    [
        ("ab", {BETWEEN: 2}),
        pytest.param("aa", {WITHIN: 2}, marks=pytest.mark.long),
        pytest.param("aabb", {WITHIN: 2, BETWEEN: 2, ALL: 4}, marks=pytest.mark.long),
    ],
)
def test_workers_measure_their_own_process_group(nodes: str, ways: dict[str, int], tmp_path: Path) -> None:
    run_ranks(reduce, nodes, str(tmp_path), ranks=len(nodes))
    of_ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(len(nodes))]
    assert all(of == of_ranks[0] for of in of_ranks), "all ranks know the slowest"
    (measured,) = of_ranks[0].values()  # NCCL says nothing of gloo
    assert {way: figures["ranks"] for way, figures in measured.items()} == ways
    for figures in measured.values():
        n, seconds = figures["ranks"], figures["bytes"] / 1e9 / figures["algorithm_gb_per_s"]
        assert figures["bytes"] == LARGE_BYTES["cpu"]
        assert figures["bus_gb_per_s"] == pytest.approx(figures["algorithm_gb_per_s"] * 2 * (n - 1) / n)
        assert 1e-6 < figures["latency_us"] / 1e6 < seconds < 60


# --- how far a run scales ---

GRADIENT = 2**20 + 50 * 2**20  # three buckets of DDP's
MEASURED = {
    WITHIN: {"ranks": 2, "latency_us": 10.0, "bus_gb_per_s": 100.0},
    BETWEEN: {"ranks": 2, "latency_us": 30.0, "bus_gb_per_s": 10.0},
    ALL: {"ranks": 4, "latency_us": 50.0, "bus_gb_per_s": 8.0},
}


def test_an_all_reduce_is_its_latencies_and_its_bytes() -> None:
    assert all_reduce_seconds(MEASURED, 1, GRADIENT) == 0
    assert all_reduce_seconds(MEASURED, 2, GRADIENT) == pytest.approx(3 * 10e-6 + GRADIENT / 100e9)
    assert all_reduce_seconds(MEASURED, 4, GRADIENT) == pytest.approx(3 * 50e-6 + 1.5 * GRADIENT / 8e9)
    between = {BETWEEN: MEASURED[BETWEEN]}
    assert all_reduce_seconds(between, 2, 1000) == pytest.approx(30e-6 + 1000 / 10e9)
    within = {WITHIN: MEASURED[WITHIN]}
    assert all_reduce_seconds(within, 2, 1000) == pytest.approx(10e-6 + 1000 / 100e9)


def test_epochs_by_width_and_where_more_workers_stop_paying() -> None:
    steps, halves = 100, {1: 0.080, 2: 0.040, 4: 0.020}
    widths = predict_widths(steps, GRADIENT, halves, MEASURED)
    assert [width.apart for width in widths] == pytest.approx(
        [
            8.0,
            4 + 100 * all_reduce_seconds(MEASURED, 2, GRADIENT),
            2 + 100 * all_reduce_seconds(MEASURED, 4, GRADIENT),
        ]
    )
    assert [width.hidden for width in widths] == pytest.approx([8.0, 4.0, 2.0])
    assert efficiencies(widths, "hidden") == pytest.approx([1, 1, 1])
    assert find_limit(widths, "hidden") == (4, "no more were measured")
    share = efficiencies(widths, "apart")[2]
    assert 0.6 < share < 0.7
    assert find_limit(widths, "apart") == (4, "no more were measured")

    slow = MEASURED | {
        WITHIN: MEASURED[WITHIN] | {"bus_gb_per_s": 10.0},
        ALL: MEASURED[ALL] | {"bus_gb_per_s": 3.5},
    }
    widths = predict_widths(steps, GRADIENT, halves, slow)
    assert find_limit(widths, "apart") == (2, "4 are 46 % efficient")
    assert find_limit(widths, "hidden") == (4, "no more were measured")
    slower = predict_widths(steps, GRADIENT, halves, MEASURED | {ALL: MEASURED[ALL] | {"bus_gb_per_s": 1.0}})
    assert find_limit(slower, "apart") == find_limit(slower, "hidden") == (2, "4 are no faster")
    flat = predict_widths(steps, 1000, {1: 0.02, 2: 0.02, 4: 0.02}, MEASURED)
    assert find_limit(flat, "hidden") == (1, "2 are no faster"), "a step that costs launches, not images"


def make_cell(workers: int = 2) -> RunSpec:
    grid = Grid(variants=("he2015",), depths=(20,), batch_size=128)
    width = Allocation(device="cpu", workers=workers, concurrent_runs=1, threads=8)
    (cell,) = expand(grid, width, fingerprint="f" * 64, train_images=50_000)
    return cell


def make_probe(spec: RunSpec) -> Prediction:
    """0.1 ms an image and 1 ms a step, whatever the batch."""
    batch = spec.recipe.batch_size
    steps = -(-50_000 // batch)
    return Prediction(
        spec={}, steps=30, epoch_seconds=steps * (0.001 + 1e-4 * batch), eval_seconds=2.0, setup_seconds=5.0, epochs=200,
        energy_joules=NO_GPU, workers=1, threads=8, device="NVIDIA H200", made_at=datetime.now(UTC), epoch_steps=steps,
        gradient_bytes=1_080_000,
        memory=make_memory(),
    )  # fmt: skip


@dataclass(slots=True)
class AtOnce(Session):
    """A session whose launches answer at once; it refuses what a launch of one worker after another may not have."""

    fails: int = 0  # images of a batch that does not fit

    def launch(self, probe: Any, specs: Any, *, progress: Any, row: Any) -> Any:  # type: ignore[override]
        assert (self.allocation.workers, self.allocation.concurrent_runs) == (1, 1)
        assert self.allocation.fallback_world_sizes == ()
        assert len({row(spec) for spec in specs}) == 1, "one process for all"
        for spec in specs:
            assert spec.workers == 1
            failed = Failed(exception="OutOfMemoryError", message="CUDA out of memory", traceback="", died=False)
            yield spec, failed if spec.recipe.batch_size == self.fails else probe(spec)


def make_session(out: Path, fails: int = 0) -> Session:
    job = Allocation(device="cpu", workers=2, concurrent_runs=3, threads=8, fallback_world_sizes=(1,))
    return AtOnce(job, Resources(), RunPaths(out=out), ExitStack(), fails=fails)


def test_an_estimate_says_how_far_a_run_scales_and_is_scored_later(tmp_path: Path, capsys: Any) -> None:
    predict_scaling(make_cell(), make_session(tmp_path), make_probe, MEASURED, Console(width=160))  # type: ignore[arg-type]
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.split()[:1] in (["1"], ["2"], ["4"])]
    # 391 steps: of 13.8, 7.4 and 4.2 ms; 2 buckets of 10 or 50 µs, and 1.08 MB by 100 or 8 GB/s (x 1.5)
    reduce = [0, 2 * 10e-3 + 1.08 / 100, 2 * 50e-3 + 1.5 * 1.08 / 8]
    assert [row[:3] for row in rows] == [["1", "128", "13.8"], ["2", "64", "7.40"], ["4", "32", "4.20"]]
    assert [float(row[3]) for row in rows] == pytest.approx(reduce, rel=0.01)
    assert [float(row[5]) for row in rows] == pytest.approx([0.391 * ms for ms in (13.8, 7.4, 4.2)], rel=0.01)
    assert "workers that pay off: 4 (no more were measured)" in out
    stored = {prediction.workers: prediction for prediction in load_predictions([tmp_path])}
    assert set(stored) == {2, 4}
    assert stored[4].epoch_seconds == pytest.approx(0.391 * (4.2 + reduce[2]))
    assert stored[4].hidden_epoch_seconds == pytest.approx(0.391 * 4.2)
    assert stored[4].spec["workers"] == 4
    assert stored[4].spec["recipe"]["batch_size"] == 128

    # a run at that width, later
    record = make_record(0, 8.0, result={"workers": 4, "epoch_seconds": 1.7})
    wide = {**record.spec, "workers": 4}
    record = record.model_copy(update={"spec": wide})
    of_it = stored[4].model_copy(update={
        "spec": {name: value for name, value in wide.items() if name != "seed"},
        "device": "NVIDIA H200", "threads": 8,
    })  # fmt: skip
    (row,) = summarise([Stored(record, tmp_path)], predictions=[of_it])
    pairs = {pair.figure: pair for pair in predicted_figures(row)}
    assert pairs["s/epoch"].values.startswith("1.76 → 1.70")
    assert pairs["  hidden"].values.startswith("1.64 → 1.70")
    assert "a probe of 30 steps of one worker and the all-reduces of a preflight" in why(row)


def test_a_probe_at_that_width_is_kept_and_a_batch_that_does_not_fit_is_a_line(
    tmp_path: Path, capsys: Any
) -> None:
    cell = make_cell()
    spec = {name: value for name, value in cell.to_json().items() if name != "seed"}
    keep_prediction(tmp_path, cell.key, make_probe(cell).model_copy(update={"spec": spec, "workers": 2}))
    predict_scaling(cell, make_session(tmp_path, fails=128), make_probe, MEASURED, Console(width=160))  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert "he2015-20 with 128 images a worker: OOM: CUDA out of memory" in out
    assert [line.split()[0] for line in out.splitlines() if line.split()[:1] in (["1"], ["2"], ["4"])] == [
        "2",
        "4",
    ]
    stored = {prediction.workers: prediction.hidden_epoch_seconds for prediction in load_predictions([tmp_path])}
    assert stored[2] is None, "a probe of that width knows better"
    assert stored[4] is not None


# --- on two nodes ---


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_two_nodes_are_measured_and_one_can_be_left_out(tmp_path: Path) -> None:
    script = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "measured_nodes.py"), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=560, check=False,
    )  # fmt: skip
    assert script.returncode == 0, script.stderr
    answer = json.loads(script.stdout.splitlines()[-1])
    text = "\n".join(answer["estimate"]["lines"])
    assert answer["estimate"]["code"] == 0, text
    assert "workers that pay off:" in text
    assert {prediction.workers for prediction in load_predictions([tmp_path / "runs"])} == {2}
    assert answer["run"]["code"] == 0, answer["run"]["lines"]
    (stored,) = load_records([tmp_path / "runs"]).records
    measured = stored.record.environment["preflight"]
    assert len(measured["rates"]) == len(measured["clocks"]) == 2
    for clock in measured["clocks"].values():  # of one machine
        assert abs(clock["ahead_seconds"]) <= clock["uncertainty_seconds"] + 1e-3
    assert set(measured["all_reduce"]) == {BETWEEN}
    assert measured["all_reduce"][BETWEEN]["ranks"] == 2
    check = "\n".join(answer["check"]["lines"])
    assert "all-reduce" in check, check
    assert "between nodes, 2 workers" in check
    assert answer["placed"] == [answer["nodes"][1]] * 2
