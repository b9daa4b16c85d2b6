"""Published numbers: each names a variant and depth that exist here, and says where it comes from."""

from typing import get_args, get_type_hints

import pytest

from harness.models.variants import find_variant
from harness.results.published import Published, find_published, load_published


@pytest.mark.parametrize(
    "entry", load_published(), ids=lambda e: f"{e.variant}-{e.depth}-{e.source.split('/')[-1]}"
)
def test_every_number_names_a_known_variant_and_a_legal_depth(entry: Published) -> None:
    assert find_variant(entry.variant)(entry.depth).network.depth == entry.depth  # raises where it is not
    assert entry.error is not None or entry.top5_error is not None
    for percent in (entry.error, entry.top5_error):
        assert percent is None or 0 < percent < 50
    assert entry.n >= 1
    assert entry.std is None or entry.n > 1
    hints = get_type_hints(Published)
    assert entry.rule in get_args(hints["rule"])
    assert entry.recipe in get_args(hints["recipe"])
    assert entry.recipe == "same" or entry.note  # what is other about it
    assert (entry.memory_mib is None and entry.epoch_seconds is None) or entry.hardware
    assert entry.source


def test_no_number_is_written_twice() -> None:
    entries = [(e.dataset, e.variant, e.depth, e.source, e.rule, e.error, e.top5_error) for e in load_published()]
    assert len(entries) == len(set(entries))


def test_the_numbers_of_the_papers_tables() -> None:
    # arXiv:1512.03385, table 6, and the table of apark263/cfmz, typed in a second time
    paper = {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.61, 1202: 7.93}
    for depth, error in paper.items():
        entry = find_published("cifar10", "he2015", depth)
        assert entry is not None
        assert entry.error == error
    cfmz = {20: (521, 11, 8.29), 32: (636, 18, 7.26), 56: (860, 30, 6.31), 110: (1277, 60, 6.00)}
    for depth, row in cfmz.items():
        entry = find_published("cifar10", "msra", depth)
        assert entry is not None
        assert (entry.memory_mib, entry.epoch_seconds, entry.error) == row
    entry = find_published("cifar10", "he2015", 110)
    assert entry is not None
    assert entry.sample is not None
    assert (entry.sample.n, entry.sample.std) == (5, 0.16)


def test_only_the_same_recipe_stands_beside_our_runs() -> None:
    entry = find_published("cifar10", "he2015", 20)
    assert entry is not None
    assert entry.source.startswith("arXiv:1512.03385")
    assert find_published("cifar10-q75", "he2015", 20) is None
    assert find_published("cifar10", "he2015", 26) is None
