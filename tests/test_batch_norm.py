"""Batch norm over the global batch: 2 and 4 ranks compute what one does, with unequal shares too."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tape import Tape, install_collectives
from test_train import _port, spec
from torch import Tensor, nn

import harness.training.setup
from harness.cluster.job import Allocation, Worker
from harness.models.build import build
from harness.models.variants import find_variant
from harness.plan import Grid, expand
from harness.results.values import EpochMetrics
from harness.spec import RunPaths, UserError
from harness.training.batch_norm import SyncBatchNorm, synchronise_batch_norms
from harness.training.step import Step
from harness.training.train import train

WORLDS = (1, 2, 4)
BATCHES = (8, 7)  # the last: 4 and 3 images a rank of two, 2, 2, 2 and 1 of four
VARIANTS = {
    "msra-8": find_variant("msra")(8),
    "convnet-8": find_variant("convnet")(8),
}  # a head of (n, C); no running statistics, no weights


def compute(name: str, rank: int, world: int, all_reduce: Any) -> dict[str, Tensor]:
    """Two steps of one rank in float64 (but for the loss): every loss sum, gradient and weight, the running statistics, the logits."""
    variant = VARIANTS[name]
    torch.manual_seed(0)
    network = build(variant.network, 10, 32).double()
    if world > 1:
        synchronise_batch_norms(network)
    parameters = list(network.parameters())
    recipe = replace(variant.recipe, label_smoothing=0.1)
    step = Step(
        network, torch.optim.SGD(parameters, lr=0.05, momentum=0.9), torch.amp.GradScaler("cpu", enabled=False),
        replace(spec(), recipe=recipe), torch.zeros(2, dtype=torch.float64),
        all_reduce=all_reduce if world > 1 else None,
    )  # fmt: skip
    random, seen = torch.Generator().manual_seed(1), dict[str, Tensor]()
    for number, size in enumerate(BATCHES):
        images = 3 + torch.randn(size, 3, 32, 32, generator=random, dtype=torch.float64)
        labels = torch.randint(10, (size,), generator=random)
        shares = [size // world + (r < size % world) for r in range(world)]
        own = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
        images.requires_grad_()
        step(images[own], labels[own], size)
        for i, parameter in enumerate(parameters):
            assert parameter.grad is not None
            seen[f"gradient {number} {i}"] = parameter.grad.clone()
        assert images.grad is not None
        gradient, loss = images.grad.clone(), step.totals[0].clone()
        if world > 1:
            all_reduce(gradient), all_reduce(loss)
        seen |= {f"gradient of the images {number}": gradient, f"loss {number}": loss}
    seen |= {name: value.clone() for name, value in network.state_dict().items()}
    network.eval()
    with torch.no_grad():
        seen["logits"] = network(
            torch.ones(2, 3, 32, 32, dtype=torch.float64) * torch.tensor([[[[1.0]]], [[[2.0]]]])
        )
    return seen


def _rank(rank: int, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    group = dist.new_group([0, 1])
    seen: dict[str, Any] = {}
    for name in VARIANTS:
        seen[f"{name} 4"] = compute(name, rank, 4, dist.all_reduce)
        if rank < 2:
            seen[f"{name} 2"] = compute(name, rank, 2, partial(dist.all_reduce, group=group))
    install_collectives()
    harness.training.setup.make_graphs = lambda _: Tape  # type: ignore[assignment, return-value]
    epochs: list[EpochMetrics] = []
    for name in ("graph", "eager"):
        asked = spec(engine=name, workers=4, limit_test=16, recipe={"batch_norm": "sync", "duration": 2})
        worker = Worker(rank=rank, world_size=4, threads=1)
        result = train(asked, worker, epochs.append, paths=RunPaths(out=out / name, label="digits"))
        assert (result.engine, result.warnings) == (name, ())
    seen["losses"] = [row.loss for row in epochs]
    torch.save(seen, out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank: by variant and number of ranks, what was computed."""
    out = tmp_path_factory.mktemp("ranks")
    mp.start_processes(_rank, args=(_port(), out), nprocs=4, start_method="fork")
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("world", [2, 4])
def test_synchronised_ranks_equal_one(computed: list[dict[str, Any]], name: str, world: int) -> None:
    """Forward, gradients of weights and of images, weights, running statistics and their counts; all ranks alike."""
    one = compute(name, 0, 1, None)
    for rank in range(world):
        several = computed[rank][f"{name} {world}"]
        assert several.keys() == one.keys()
        for what, value in one.items():
            assert torch.allclose(several[what], value, rtol=1e-5, atol=1e-6), (what, rank)


def test_local_statistics_are_another_network() -> None:
    """The test above can fail: of half a batch the statistics are others by far."""
    whole, half = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    images = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(whole(images)[:4], half(images[:4]), atol=1e-3)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_one_rank_by_our_function_equals_torchs_own(precision: torch.dtype) -> None:
    """Far from zero, where a sum of squares would drown the variance, in the types that runs compute in."""
    random, own, theirs = torch.Generator().manual_seed(0), SyncBatchNorm(5), nn.BatchNorm2d(5)
    own.all_reduce = lambda _: None
    images = (100 + 3 * torch.randn(6, 5, 4, 4, generator=random)).to(precision)
    direction = torch.randn(6, 5, 4, 4, generator=random)
    gradients = []
    for norm in (own, theirs):
        x = images.clone().contiguous(memory_format=torch.channels_last).requires_grad_()
        out = norm(x)
        assert out.dtype == precision
        (out.float() * direction).sum().backward()
        assert x.grad is not None
        assert norm.weight.grad is not None
        gradients.append((out.detach().float(), x.grad.float(), norm.weight.grad))
    tolerance = 1e-5 if precision == torch.float32 else 2e-2
    for mine, other in zip(*gradients, strict=True):
        assert torch.allclose(mine, other, rtol=tolerance, atol=3 * tolerance)
    for name, value in theirs.state_dict().items():
        assert torch.allclose(own.state_dict()[name].float(), value.float(), rtol=1e-5), name


@pytest.mark.parametrize(("norm", "words"), [("Activated", "Activated, with a forward"), (None, "momentum=None")])
def test_what_it_cannot_stand_for_is_refused(norm: str | None, words: str) -> None:
    """timm's batch norms apply the activation, which would be lost."""

    class Activated(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    network = nn.Sequential(nn.Conv2d(3, 8, 1), Activated(8) if norm else nn.BatchNorm2d(8, momentum=None))
    with pytest.raises(ValueError, match=f"batch norm with a momentum; 1 is {words}"):
        synchronise_batch_norms(network)


def test_a_run_of_four_workers_trains_the_network_of_one_captured_or_not(
    computed: list[dict[str, Any]], tmp_path: Path
) -> None:
    seen: list[EpochMetrics] = []
    train(
        spec(limit_test=16, recipe={"duration": 2}), Worker(threads=1), seen.append, paths=RunPaths(out=tmp_path)
    )
    losses = computed[0]["losses"]
    assert losses[:2] == losses[2:], "captured, it is the same bit for bit"
    assert losses[:2] == pytest.approx([row.loss for row in seen], rel=1e-4)


def test_the_plan_knows_it() -> None:
    allocation = Allocation(device="cpu", workers=2, concurrent_runs=1, threads=1)

    def make(**changes: Any) -> Any:
        grid = Grid(variants=("he2015",), **changes)
        return expand(grid, allocation, fingerprint="f", train_images=1000)[0]

    assert make().key == make(batch_norm="local").key
    synchronised = make(batch_norm="sync")
    assert (synchronised.recipe.batch_norm, synchronised.overrides) == ("sync", ("batch_norm=sync",))
    assert synchronised.key not in (make().key,)
    with pytest.raises(UserError, match="does not support --batch-norm sync: use eager or graph"):
        make(batch_norm="sync", engine="compile")
