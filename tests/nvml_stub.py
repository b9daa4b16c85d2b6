"""The stub of nvml_stub.c as a fixture: `pytest_plugins = ["nvml_stub"]` in a test file, then `nvml.set(GPUS=2)`.

In this process nvidia-ml-py is given the stub as its library. In another one, `nvml.run`, it finds it by
LD_LIBRARY_PATH, as it finds the driver's.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("nvml_stub.c")
COMPILER = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


def build(folder: Path, without: tuple[str, ...] = ()) -> Path:
    """The library in `folder`; `without` names functions that it lacks, as an old one does."""
    assert COMPILER is not None
    folder.mkdir(parents=True, exist_ok=True)
    library, exports = folder / "libnvidia-ml.so.1", folder / "exports"
    exports.write_text(f"{{ global: nvml*; local: {' '.join(f'{name};' for name in without)} *; }};")
    subprocess.run(
        [COMPILER, "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-fPIC", "-shared", "-fvisibility=hidden",
         f"-Wl,--version-script={exports}", "-o", library, SOURCE],
        check=True,
    )  # fmt: skip
    return library


class NvmlStub:
    """The stub as the NVML of this process and of its children."""

    def __init__(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shared_object = library
        self._monkeypatch = monkeypatch
        for name in [name for name in os.environ if name.startswith("NVML_STUB_")]:
            monkeypatch.delenv(name)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        self.use(library)

    def use(self, library: Path) -> None:
        """As if this process had just loaded `library`."""
        import pynvml

        self.shared_object = library
        loaded = ctypes.CDLL(str(library))
        loaded.nvmlStubReset()
        self._monkeypatch.setattr(pynvml, "nvmlLib", loaded)
        self._monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        self._monkeypatch.setattr(pynvml, "_nvmlLib_refcount", 0)

    def use_old(self, folder: Path, without: tuple[str, ...]) -> None:
        """A library that lacks these functions, built in `folder`."""
        self.use(build(folder, without))

    def set(self, **scenario: object) -> None:
        """Change the scenario: names as in nvml_stub.c, less their prefix."""
        for name, value in scenario.items():
            self._monkeypatch.setenv(f"NVML_STUB_{name}", str(value))

    def run(self, code: str, *, limit_seconds: float = 60, **environment: str) -> str:
        """What a fresh Python prints that runs `code` in this scenario. Raises CalledProcessError."""
        paths = [str(self.shared_object.parent), os.environ.get("LD_LIBRARY_PATH", "")]
        finished = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))} | environment,
            capture_output=True, text=True, timeout=limit_seconds, check=False,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once."""
    if COMPILER is None:
        pytest.skip("no C compiler: the stub of NVML cannot be built")
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def nvml(nvml_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NvmlStub]:
    """One GPU, until `set` says otherwise."""
    yield NvmlStub(nvml_library, monkeypatch)
    ctypes.CDLL(str(nvml_library)).nvmlStubReset()
