"""Plug-ins: loaded by file or package, named in keys by the hash of their source, sent to workers, kept beside records."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from command import harness as command

import harness
from harness import plan, plugins
from harness.cluster.job import Allocation, Worker
from harness.commands.report import make_command
from harness.models.build import build
from harness.models.variants import NETWORKS, VARIANTS, find_variant
from harness.options import parse_depths
from harness.plugins import PluginError, load_file, load_sources, sources
from harness.results.store import load_records
from harness.search_space import parse_settings
from harness.spec import RunPaths, RunSpec, UserError
from harness.training.train import train

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = (
    "--dataset digits --gpus 0 --loader resident --launcher local --limit-train 64 --limit-test 32 --batch-size 32"
)
TINY = f"{SMALL} --epochs 1"
NET = """
import torch
from harness import plugin

@plugin.network(duration=2, unit="epoch", milestones=[], lr=0.05, summary="few layers")
def few(num_classes: int, width: int = 4, activation_first: bool = False):
    layers = [torch.nn.Conv2d(3, width, 3, padding=1), torch.nn.BatchNorm2d(width), torch.nn.ReLU(), torch.nn.Dropout(0.1)]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, num_classes))
"""
BOOM = """
from pathlib import Path

class Boom(torch.nn.Module):
    def forward(self, x):
        if [*Path("runs").glob("*.partial")]:  # a run has begun
            raise OSError("boom")
        return x
"""


@pytest.fixture(autouse=True)
def _unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing stays of a test's plug-ins."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in list(plugins.LOADED):
        plugins.unload(name)


def write(folder: Path, text: str, name: str = "nets.py") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def make_specs(variants: tuple[str, ...], **given: Any) -> list[RunSpec]:
    grid = plan.Grid(**{"dataset": "digits", "variants": variants, "loader": "resident"} | given)
    allocation = Allocation(device="cpu", workers=1, concurrent_runs=1, threads=1)
    return plan.expand(grid, allocation, fingerprint="f", train_images=1437)


# --- what is registered ---


def test_a_network_comes_with_a_variant_and_fields(tmp_path: Path) -> None:
    load_file(write(tmp_path, NET + 'plugin.variant("few-wide", base="few", width=16, lr=0.2)\n'))
    variant = find_variant("few")()  # type: ignore[call-arg]
    assert (variant.network.depth, variant.recipe.lr, variant.recipe.milestones) == (0, 0.05, ())
    assert (variant.summary, variant.source, variant.recipe.batch_size) == ("few layers", "nets.py", 128)
    wide = find_variant("few-wide")()  # type: ignore[call-arg]
    assert (wide.network.extra, wide.recipe.lr) == (("width=16",), 0.2)
    assert [build(v.network, 10)[0].out_channels for v in (variant, wide)] == [4, 16]  # type: ignore[index]
    with pytest.raises(ValueError, match="depth 20: few has only one depth"):
        find_variant("few")(20)


def test_depth_and_image_size_are_filled(tmp_path: Path) -> None:
    load_file(write(tmp_path, """
from torch import nn
def deep(num_classes, image_size, depth: int = 3):
    return nn.Sequential(nn.Flatten(), *[nn.Linear(3 * image_size**2, 3 * image_size**2) for _ in range(depth)])
NETWORKS = {"deep": deep}
"""))  # fmt: skip
    assert find_variant("deep")().network.depth == 3  # type: ignore[call-arg]
    made = build(find_variant("deep")(5).network, 10, 8)
    assert (len(made), made[1].in_features) == (6, 192)  # type: ignore[arg-type, index]


def test_depths_are_of_those_variants_that_have_them(tmp_path: Path) -> None:
    load_file(write(tmp_path, NET))
    names = [spec.name for spec in make_specs(("few", "he2015"), depths=(8, 14))]
    assert names == ["few", "he2015-8", "he2015-14"]
    assert parse_depths("8..14", ("few", "he2015")) == (8, 14)


def test_a_setting_is_of_the_runs_that_have_it(tmp_path: Path) -> None:
    load_file(write(tmp_path, NET))
    few, paper = make_specs(("few", "he2015"), settings=parse_settings(["width=8", "activation_first=true"]))
    assert few.network.extra == ("activation_first=true", "width=8")
    assert few.overrides == ("width=8", "activation_first=true") or few.overrides == (
        "activation_first=true",
        "width=8",
    )
    assert (paper.network.extra, paper.overrides) == ((), ())
    (default,) = make_specs(("few",), settings=parse_settings(["width=4"]))
    assert default == make_specs(("few",))[0], "a field at its default is not named"
    with pytest.raises(
        UserError,
        match="--set width: a field of network few; the network here is cifar",
    ):
        make_specs(("he2015",), settings={"width": 8})
    with pytest.raises(UserError, match="architecture few has no such field"):
        make_specs(("few",), settings={"activation": "mish"})
    with pytest.raises(UserError, match="width is a whole number, not 'x'"):
        parse_settings(["width=x"])
    with pytest.raises(UserError, match="did you mean width"):
        parse_settings(["widht=8"])
    assert RunSpec.from_json(json.loads(json.dumps(few.to_json()))) == few


def test_only_runs_that_use_a_plugin_have_another_key(tmp_path: Path) -> None:
    before = make_specs(("he2015",))[0]
    path = write(tmp_path, NET + "from helper import ONE\n")
    write(tmp_path, "ONE = 1\n", "helper.py")
    load_file(path)
    few, paper = make_specs(("few", "he2015"))
    assert paper == before
    assert re.fullmatch(r"nets:[0-9a-f]{16}", few.plugins[0])
    write(tmp_path, "ONE = 2\n", "helper.py")
    load_file(path)
    changed = make_specs(("few",))[0]
    assert changed.plugins != few.plugins
    assert changed.key != few.key


def test_the_hash_is_of_all_that_is_imported_from_the_folder(tmp_path: Path) -> None:
    path = write(
        tmp_path, "import models.net, os\ndef late():\n    from models import other\n    import late_one\n"
    )
    for name in (
        "models/__init__.py",
        "models/unused.py",
        "models/other.py",
        "models/deep/__init__.py",
        "late_one.py",
        "x.py",
    ):
        write(tmp_path, "", name)
    write(tmp_path, "from .deep import part\nfrom ..models import other\n", "models/net.py")
    write(tmp_path, "", "models/deep/part.py")
    names = [name for name, _ in plugins.collect(path)]
    assert names == [
        "late_one.py", "models/__init__.py", "models/deep/__init__.py", "models/deep/part.py", "models/net.py",
        "models/other.py", "nets.py",
    ]  # fmt: skip


def test_an_own_models_package_imports(tmp_path: Path) -> None:
    write(tmp_path, "", "models/__init__.py")
    write(tmp_path, NET, "models/zoo.py")
    load_file(write(tmp_path, "from models.zoo import few\n"))
    assert "few" in NETWORKS
    assert not sys.modules["models"].__name__.startswith("harness")
    plugins.unload("nets")
    assert "few" not in NETWORKS
    assert "few" not in VARIANTS
    assert "models.zoo" not in sys.modules


def test_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, NET, "their_nets/__init__.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = EntryPoint("theirs", "their_nets", plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda **_: [entry])
    plugins.load_plugins()
    plugins.load_plugins()
    spec = make_specs(("few",))[0]
    assert spec.plugins == (sources()[0].identity,)
    assert spec.plugins[0].startswith("theirs:")
    load_sources(spec.plugins, RunPaths(out=tmp_path, plugins=sources()))
    monkeypatch.delitem(sys.modules, "their_nets")


# --- what is wrong with one ---

BAD = {
    "syntax error": ("x = 1\ndef f(:\n", "nets.py:2: syntax error: invalid syntax"),
    "import error": ("import torch\nimport not_there\n", "nets.py:2: ModuleNotFoundError: No module named 'not_there'"),
    "raises": ("\n\nraise RuntimeError('no luck')\n", "nets.py:3: RuntimeError: no luck"),
    "exits": ("raise SystemExit(3)\n", "nets.py:1: SystemExit: 3"),
    "nothing": ("x = 1\n", "nets.py:1: it registers nothing"),
    "a built-in's name": ("def f(num_classes): ...\nNETWORKS = {'cifar': f}\n", "nets.py:2: network 'cifar' is registered already, built in"),
    "a variant's name": (NET.replace("few(", "msra("), "nets.py:5: variant 'msra' is registered already, built in"),
    "twice": (NET + NET, "nets.py:13: network 'few' is registered already, by nets.py:5"),
    "no function": ("NETWORKS = {\n  'x': 3}\n", "nets.py:1: network 'x' is no function or class but 3"),
    "no table": ("NETWORKS = ['x']\n", "nets.py:1: NETWORKS is no dictionary"),
    "a parameter": ("def f(num_classes, width): ...\nNETWORKS = {'x': f}\n", "nets.py:2: network 'x': nothing fills its parameter width"),
    "a field's name": ("def f(num_classes, activation='gelu'): ...\nNETWORKS = {'x': f}\n", "nets.py:2: network 'x': its field activation"),
    "no such base": ("from harness import plugin\nplugin.variant('x', base='y')\n", "nets.py:2: variant 'x': base 'y' is no variant"),
    "no such field": ("from harness import plugin\nplugin.variant('x', base='msra', width=3)\n", "nets.py:2: variant 'x': field 'width' is unknown"),
    "no such schedule": ("from harness import plugin\nplugin.variant('x', base='msra', schedule='cosin')\n", "did you mean cosine"),
    "a wrong type": ("from harness import plugin\nplugin.variant('x', base='msra', lr='fast')\n", "nets.py:2: variant 'x': lr: Input should be a valid number"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_line_with_its_line(
    case: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {kind: set(table) for kind, table in plugins.TABLES.items()}
    text, message = BAD[case]
    write(tmp_path, text)
    code, out, err = command(f"run --plugin nets.py {TINY} --variants he2015 --out runs", capsys)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err
    assert not (tmp_path / "runs").exists()
    assert {kind: set(table) for kind, table in plugins.TABLES.items()} == before, "nothing of it stays"


NETWORK = "import torch\nfrom torch import nn\n\ndef bad(num_classes):\n    {}\n\nNETWORKS = {{'bad': bad}}\n"
MISFITS = {
    "wrong shapes": ("return nn.Sequential(nn.Flatten(), nn.Linear(3072, 7))", "gives (8, 7) for images (8, 3, 32, 32): (8, 10) is expected"),
    "raises": ("return nn.Linear(3)", "nets.py:5: TypeError"),
    "no module": ("return 3", "gives int, and a torch.nn.Module is expected"),
    "no parameters": ("return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())", "has no parameters to train"),
    "non-determinism": (
        "import os; net = nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes)); "
        "net[1].bias.data.fill_(os.urandom(1)[0]); return net", "differs each time"),
    "no gradient": (
        "net = nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes)); "
        "net.register_parameter('spare', nn.Parameter(torch.ones(3))); return net", "no gradient reaches: spare"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_a_network_that_does_not_fit_is_refused(
    case: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    body, message = MISFITS[case]
    write(tmp_path, NETWORK.format(body))
    code, _, err = command(f"run --plugin nets.py {TINY} --variants bad --out runs", capsys)
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert "nets.py:" in err
    assert not list((tmp_path / "runs").glob("digits*"))


def test_plugins_of_one_name_and_modules_of_one_name(tmp_path: Path) -> None:
    load_file(write(tmp_path / "a", NET))
    with pytest.raises(PluginError, match="another plug-in has this name"):
        load_file(write(tmp_path / "b", NET + "# another\n"))
    write(tmp_path / "c", "", "json.py")
    with pytest.raises(PluginError, match="a module json is imported already"):
        load_file(write(tmp_path / "c", "import json\n" + NET.replace("few", "other"), "c.py"))
    with pytest.raises(PluginError, match="no such file"):
        load_file(tmp_path / "none.py")


def test_a_run_whose_plugin_is_not_loaded_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, NET)
    load_file(path)
    spec = make_specs(("few",))[0]
    plugins.unload("nets")
    grid = plan.Grid(dataset="digits", specs=(spec,))
    allocation = Allocation(device="cpu", workers=1, concurrent_runs=1, threads=1)
    with pytest.raises(
        UserError, match=r"network 'few' of few seed 0 is of plug-in nets:[0-9a-f]+: --plugin names"
    ):
        plan.expand(grid, allocation, fingerprint="f", train_images=1437)


# --- travelling ---


def test_a_copy_is_loaded_where_the_file_is_not(tmp_path: Path) -> None:
    path = write(tmp_path / "here", "from parts.zoo import few\n")
    write(tmp_path / "here", NET, "parts/zoo.py")
    load_file(path)
    spec, sent = make_specs(("few",))[0], sources()
    paths = RunPaths(out=tmp_path, cache_dir=tmp_path / "cache", plugins=sent)
    for missing in (False, True):
        plugins.unload("nets")
        if missing:
            shutil.rmtree(tmp_path / "here")
        load_sources(spec.plugins, paths)
        loaded = plugins.LOADED["nets"]
        assert (Path(loaded.source.folder) == tmp_path / "here") is not missing
        assert loaded.source.identity == spec.plugins[0]
        assert isinstance(build(spec.network, 10), torch.nn.Module)
    with pytest.raises(RuntimeError, match="was not sent here"):
        load_sources(["nets:0000000000000000"], paths)


BUILDS_ON = """
import torch
from harness import plugin
@plugin.optimizer
def rms2(groups, lr):
    return torch.optim.RMSprop(groups, lr=lr)
plugin.variant("alpha", base="few", optimizer="rms2")
"""


def test_a_plugin_that_builds_on_another_is_loaded_after_it(tmp_path: Path) -> None:
    for path in (write(tmp_path, NET), write(tmp_path, BUILDS_ON, "alpha.py")):
        load_file(path)
    sent = sources()
    for spec in (make_specs(("alpha",))[0], make_specs(("he2015",), settings={"optimizer": "rms2"})[0]):
        for name in ("nets", "alpha"):
            plugins.unload(name)
        load_sources(spec.plugins, RunPaths(out=tmp_path, cache_dir=tmp_path / "cache", plugins=sent))
        assert list(plugins.LOADED) == ["nets", "alpha"]
        assert find_variant("alpha")().recipe.optimizer == "rms2"  # type: ignore[call-arg]


def test_of_files_that_cannot_be_loaded_every_fault_is_named(tmp_path: Path) -> None:
    """One may only miss what the other would have brought."""
    builds, broken = (
        write(tmp_path, BUILDS_ON, "alpha.py"),
        write(tmp_path, f"{NET}\nraise ValueError('real reason')\n"),
    )
    with pytest.raises(PluginError, match=r"alpha\.py:\d+: .*; .*nets\.py:\d+: ValueError: real reason"):
        plugins.load_plugins([builds, broken])


def test_a_run_keeps_its_plugin_and_can_be_repeated_and_evaluated(tmp_path: Path, capsys: Any) -> None:
    path, out = write(tmp_path, NET), tmp_path / "runs"
    code, printed, err = command(f"run --plugin {path} {TINY} --variants few --set width=6 --out {out}", capsys)
    assert code == 0, err
    assert "width=6" in printed
    (stored,) = load_records([out]).records
    assert stored.folder.name.startswith("digits_few_s0_")
    kept = stored.folder / "plugins" / "nets" / "nets.py"
    assert kept.read_text() == path.read_text()
    plugins.unload("nets")
    path.unlink()
    code, _, err = command(f"eval --weights {stored.folder / 'weights.safetensors'} --dataset digits", capsys)
    assert (code, f"--plugin {kept}" in err) == (2, True)
    code, printed, err = command(
        f"eval --plugin {kept} --weights {stored.folder / 'weights.safetensors'} --dataset digits --limit 32",
        capsys,
    )
    assert code == 0, err
    assert "few on digits" in printed
    code, script, _ = command(f"repro {stored.folder}", capsys)
    (line,) = [line for line in script.splitlines() if line.startswith("harness run")]
    assert f"--plugin {kept}" in line
    again = tmp_path / "again"
    code, _, err = command(line.removeprefix("harness ").replace("--out repro", f"--out {again}"), capsys)
    assert code == 0, err
    (repeated,) = load_records([again]).records
    assert repeated.record.key == stored.record.key
    assert repeated.record.result
    assert stored.record.result
    assert repeated.record.result.final_error == stored.record.result.final_error


def test_a_run_keeps_what_its_plugin_builds_on(tmp_path: Path, capsys: Any) -> None:
    paths, out = [write(tmp_path, NET), write(tmp_path, BUILDS_ON, "alpha.py")], tmp_path / "runs"
    words = " ".join(f"--plugin {path}" for path in paths)
    for number, changed in enumerate(("--variants he2015 --depths 8 --set optimizer=rms2", "--variants alpha")):
        code, _, err = command(f"run {words} {TINY} {changed} --out {out}{number}", capsys)
        assert code == 0, err
    for name, path in zip(("nets", "alpha"), paths, strict=True):
        plugins.unload(name)
        path.unlink()
    for number in range(2):
        (stored,) = load_records([Path(f"{out}{number}")]).records
        line = " ".join(make_command(stored)[1:]).replace("--out repro", f"--out {tmp_path / 'again'}")
        code, _, err = command(line, capsys)
        assert code == 0, err
        for name in ("nets", "alpha"):
            plugins.unload(name)
    assert len(load_records([tmp_path / "again"]).records) == 2


def test_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    options: Any = {"dataset": "digits", "gpus": 0, "loader": "resident", "launcher": "local", "epochs": 1,
                    "limit_train": 64, "limit_test": 32, "batch_size": 32}  # fmt: skip
    runs = harness.run(plugin=write(tmp_path, NET), variants="few", settings={"width": 8}, **options)
    assert list(runs["variant"]) == ["few"]
    with pytest.raises(UserError, match="no such file"):
        harness.run(plugin="none.py", variants="few", **options)


def test_why_names_the_line_of_a_plugin_that_failed_and_where_the_traceback_is(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path, NET.replace("torch.nn.Dropout(0.1)", "Boom()").replace("import torch\n", "import torch\n" + BOOM)
    )
    monkeypatch.chdir(tmp_path)
    code, out, err = command(f"run --plugin nets.py --variants few {TINY} --no-check --out runs", capsys)
    assert (code, "few seed 0: FAILED: boom" in out) == (1, True), out + err
    _, out, _ = command("why few runs", capsys)
    assert "failed: exception, OSError: boom" in out
    (record,) = (tmp_path / "runs").glob("*.partial/record.json")
    assert f"{record.parent.relative_to(tmp_path)} (record.json has the traceback, under failure)" in out
    assert re.search(r'File ".*nets.py", line 9, in forward', out), out
    assert "in forward" in json.loads(record.read_text())["failure"]["traceback"]


@pytest.mark.ray
def test_ray_workers_get_it(tmp_path: Path, capsys: Any) -> None:
    line = f"run --plugin {write(tmp_path, NET)} {TINY} --variants few --seeds 2 --workers 2 --out {tmp_path / 'runs'}"
    code, _, err = command(line.replace("--launcher local", "--launcher ray"), capsys)
    assert code == 0, err
    assert len(load_records([tmp_path / "runs"]).records) == 2


@pytest.mark.long
@pytest.mark.ray
def test_its_fields_are_searched(tmp_path: Path, capsys: Any) -> None:
    line = f"tune --plugin {write(tmp_path, NET)} --dataset digits --variant few --limit-train 64 --epochs 1 --gpus 0 "
    line += f"--loader resident --batch-size 32 --search width=grid(2,6) --search lr=loguniform(0.01,0.1) --out {tmp_path / 'runs'}"
    code, out, err = command(line, capsys)
    assert code == 0, err
    records = load_records([tmp_path / "runs"]).records
    assert sorted(str(one.record.spec["network"]["extra"]) for one in records) == ["['width=2']", "['width=6']"]
    assert "width" in out
    assert "--plugin" in out[out.index("train the winner") :]
    assert (records[0].folder / "plugins/nets/nets.py").is_file()


# --- the examples ---


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 15, path


STAND_IN = """
from torch import nn
def create_model(name, num_classes):
    assert name in ("resnet10t", "mobilenetv4_conv_small")
    return nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""  # fmt: skip


@pytest.mark.parametrize(
    ("file", "variant"),
    [("torchvision_nets", "resnet18"), ("torchvision_nets", "mobilenet_v3_small"), ("cifar_resnet18", "cifar_resnet18"),
     ("timm_net", "resnet10t"), ("timm_net", "resnet10t of a stand-in")],
)  # fmt: skip
def test_an_example_trains_resumes_exactly_and_is_compared(
    file: str, variant: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant, _, stand_in = variant.partition(" ")
    if stand_in:
        monkeypatch.setitem(sys.modules, "timm", type(sys)("timm"))
        exec(STAND_IN, sys.modules["timm"].__dict__)
    elif file == "timm_net":
        pytest.importorskip("timm", reason="timm is not installed, which nothing here needs")
    load_file(EXAMPLES / f"{file}.py")
    spec = next(s for s in make_specs((variant,), epochs=2, batch_size=16, limit_train=32, limit_test=16))
    from harness.loaders.datasets import load_dataset

    spec = replace(spec, fingerprint=load_dataset("digits").fingerprint)
    paths = [RunPaths(out=tmp_path / name, label="digits", plugins=sources()) for name in ("whole", "cut")]
    whole = train(spec, Worker(threads=1), lambda _: None, paths=paths[0])

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(spec, Worker(threads=1), stop, paths=paths[1])
    resumed = train(spec, Worker(threads=1), lambda _: None, paths=paths[1])
    assert (resumed.attempts, [row.loss for row in resumed.epochs]) == (2, [row.loss for row in whole.epochs])
    line = f"run --plugin {EXAMPLES / file}.py {TINY} --variants {variant},he2015 --depths 8 --set lr=0.01 --out {tmp_path / 'runs'}"
    code, out, err = command(line, capsys)
    assert code == 0, err
    assert variant in out
    assert "he2015" in out


@pytest.mark.long
def test_an_example_is_killed_and_goes_on(tmp_path: Path) -> None:
    """The command itself, by SIGKILL after its first epoch."""
    out = tmp_path / "runs"
    line = [
        sys.executable, "-m", "harness", "run", "--plugin", str(EXAMPLES / "torchvision_nets.py"), *SMALL.split(),
        "--variants", "mobilenet_v3_small", "--out", str(out), "--epochs", "3",
    ]  # fmt: skip
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 120
    while not list(out.glob("*.partial/checkpoints/*.pt")) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(line, stdout=subprocess.DEVNULL, check=True, timeout=240)
    (stored,) = load_records([out]).records
    assert stored.record.result
    assert [row["reason"] for row in stored.record.environment["attempts"]] == ["", "the command was given again"]
    assert stored.record.result.attempts == 2
    assert len(list((stored.folder / "plugins").rglob("*.py"))) == 1
