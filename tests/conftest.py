"""What all tests share: a cache of their own, and the same examples in each run."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# the same examples each time: a test that fails by chance blocks what has nothing to do with it
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parent.parent
# half a minute and more each
LONGEST = "test_checks test_engine test_files test_halt test_page_access test_plugin_parts test_plugins test_tune test_watchdog"

# threads that wait for others must not keep a core busy that another process could use
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
for name in ("HARNESS_OUT", "HARNESS_DATA_DIR", "HARNESS_ADDRESS"):  # a person's own
    os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip, with the reason, where there is none. Of two processes of pytest one has all that start Ray,
    which mostly wait, and takes them first; all others go by file, the longest first, so that both end together."""
    items.sort(key=lambda item: (item.get_closest_marker("ray") is None, item.path.stem not in LONGEST.split()))
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """What is imported stays: no collection of garbage has to walk through it. A run asks for one each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # nanobind looks for leaks at the end


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither read nor write the person's cache."""
    before = os.environ.get("HARNESS_CACHE")
    os.environ["HARNESS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["HARNESS_CACHE"]
    else:
        os.environ["HARNESS_CACHE"] = before


@pytest.fixture(scope="session", autouse=True)
def _undisturbed() -> None:
    """What else the machine does marks no epoch: tests/test_host.py sets the shares that do."""
    from harness.training import host

    host.WAIT_SHARE = host.STEAL_SHARE = 2.0


@pytest.fixture(scope="session", autouse=True)
def _no_flush() -> None:
    """No file of a test needs to outlast a power cut."""
    os.fsync = lambda _: None  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """What a test draws without a generator of its own is the same each time, in whatever order the tests run."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
