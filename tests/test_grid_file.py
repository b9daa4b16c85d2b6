"""Grid files: the same runs as the command line, which wins; mistakes with their line; --save and --print-config."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from command import harness as command
from hypothesis import given, settings
from hypothesis import strategies as st

import harness
from harness import plan
from harness.cluster.job import Allocation
from harness.grid_file import KNOWN, format_config, read_command, save_grid
from harness.options import Grid, RunOptions, fill, read_values
from harness.plan import make_grid

ALLOCATION = Allocation(device="cpu", workers=1, concurrent_runs=1, threads=2)
GROUPS = """
seeds = 2
epochs = 4
set = { weight_decay = 5e-4, milestones = [2, 3] }

[[runs]]
variants = ["msra", "he2015"]
depths = "8..14"

[[runs]]
variants = "fattorib"
depths = [20]
seeds = [7]
batch-size = 64

[runs.settings]
lr = 0.05
"""


def expand(command: Any) -> list[Any]:
    return plan.expand(make_grid(command), ALLOCATION, fingerprint="f", train_images=50_000)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return path


def test_groups_are_one_list_of_runs_each_with_what_stands_above_changed_by_its_own(tmp_path: Path) -> None:
    specs = expand(read_command({}, write(tmp_path, GROUPS)))
    same = [
        *expand({"variants": "msra,he2015", "depths": "8,14", "seeds": "2", "epochs": 4,
                 "settings": ["weight_decay=5e-4", "milestones=2,3"]}),
        *expand({"variants": "fattorib", "depths": "20", "seeds": "7,", "epochs": 4, "batch_size": 64,
                 "settings": ["weight_decay=5e-4", "milestones=2,3", "lr=0.05"]}),
    ]  # fmt: skip
    assert len(specs) == 9
    assert [spec.key for spec in specs] == [spec.key for spec in same]


def test_the_command_line_wins_over_file_and_groups_field_by_field(tmp_path: Path) -> None:
    given = {"seeds": "1", "batch_size": 128, "settings": ["lr=0.2"], "variants": "he2015"}
    specs = expand(read_command(given, write(tmp_path, GROUPS)))
    assert {(spec.seed, spec.recipe.batch_size, spec.recipe.lr, spec.variant) for spec in specs} == {
        (0, 128, 0.2, "he2015")
    }
    assert {spec.recipe.weight_decay for spec in specs} == {5e-4}, "what is not given is the file's"
    assert [spec.network.depth for spec in specs] == [8, 14, 20]


MISTAKES = {
    ("loadr = 'dali'", 1): "option 'loadr' is unknown; did you mean loader?",
    ("# a comment\n\nloader = 'dalli'", 3): "--loader 'dalli' is unknown; did you mean dali?",
    ("seeds = 1\nepochs = 'ten'", 2): "epochs 'ten'",
    ("epochs = 0", 1): "--epochs 0: at least 1",
    ("# a separator\u2028of lines, for Unicode\nepochs = 0", 2): "--epochs 0: at least 1",
    ("seeds = 'x'", 1): "--seeds 'x'",
    ("seeds = true", 1): "seeds True",
    ("until = '99'", 1): "--until '99'",
    ("variants = 'msra'\ndepths = [\n  20,\n  21,\n]", 2): "depth 21 is not 6n+2",
    ("epochs = 1\n[settings]\nlr = 0.1\nlrr = 1", 4): "did you mean lr?",
    ("[set]\nlr = 'high'", 2): "lr is a non-negative number, not 'high'",
    ("settings = 3", 1): "settings 3",
    ("[[runs]]\n[[runs]]\nseeds = 2\nworkers = 2", 4): "workers holds for all runs",
    ("[[runs]]\ndataset = 'digits'", 2): "dataset holds for all runs",
    ("[[runs]]\nvariants = 'msra'\n[[runs]]\nvariants = 'mrsa'", 4): "did you mean msra?",
    ("depths = [21]\n[[runs]]\nvariants = 'he2015'", 1): "he2015: depth 21 is not 6n+2",
    ("depths = [21]\n[[runs]]\nvariants = 'msra'", 3): "msra: depth 21 is not 6n+2",
    ("[[run]]\nvariants = 'msra'", 1): "option 'run' is unknown; did you mean runs?",
    ("runs = 3", 1): "groups are allowed",
    ("depth = 8\ndepths = [8]", 2): "depths is given twice",
    ("batch_size = 32\n[settings]\nbatch_size = 64", 3): "batch_size is given twice",
}


@pytest.mark.parametrize(("text", "line"), MISTAKES)
def test_a_mistake_is_one_line_that_names_file_and_line(text: str, line: int, tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path, text)
    code, _, err = command(f"run {path} --gpus 0 --dry-run --out {tmp_path / 'runs'}", capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{path}:{line}: " in err
    assert MISTAKES[text, line] in err
    assert [p.name for p in tmp_path.iterdir()] == ["grid.toml"]


def test_a_file_that_is_absent_or_no_toml_is_said_so_and_a_mistake_of_the_command_line_is_not_the_files(
    tmp_path: Path, capsys: Any
) -> None:
    for words, says in {
        f"{tmp_path / 'none.toml'}": "No such file", f"{write(tmp_path, 'seeds = = 1')}": "line 1",
    }.items():  # fmt: skip
        code, _, err = command(f"run {words}", capsys)
        assert (code, says in err) == (2, True)
    code, _, err = command(f"run {write(tmp_path, 'depths = [20]')} --depths 21 --dry-run", capsys)
    assert code == 2
    assert "grid.toml" not in err


def test_dry_run_of_a_file_and_what_save_writes_and_print_config_prints_plan_the_same(
    tmp_path: Path, capsys: Any
) -> None:
    path, saved = write(tmp_path, GROUPS.replace("fattorib", "msra")), tmp_path / "saved.toml"
    base = f"--dataset digits --gpus 0 --loader resident --set lr=0.3 --out {tmp_path / 'runs'}"
    code, plan, _ = command(f"run {path} {base} --dry-run --save {saved}", capsys)
    assert code == 0
    assert "9 runs on digits" in plan
    assert "dry_run =" not in saved.read_text(), "what only looks is not kept"
    assert command(f"run {saved} --dry-run", capsys)[1] == plan
    code, printed, _ = command(f"run {path} {base} --print-config", capsys)
    assert code == 0
    values = tomllib.loads(printed)
    assert (values["loader"], values["precision"], values["gpus"], values["launcher"]) == (
        "resident",
        "fp32",
        0,
        "auto",
    )
    assert values["settings"] == {"weight_decay": 5e-4, "milestones": [2.0, 3.0], "lr": 0.3}
    again = write(tmp_path, printed)
    assert command(f"run {again} --dry-run", capsys)[1] == plan
    assert not (tmp_path / "runs").exists()


def test_print_config_has_every_option_and_leaves_to_a_preset_what_is_its_own(tmp_path: Path) -> None:
    for words in ({}, {"preset": "cfmz"}):
        text = format_config(words)
        names = {line.removeprefix("# ").partition(" ")[0] for line in text.splitlines()}
        assert names >= KNOWN.keys() - {"save", "print_config", "dry_run", "estimate", "profile"}
        again = read_command({}, write(tmp_path, text))
        assert make_grid(again) == make_grid(words)
        assert fill(RunOptions, again) == fill(RunOptions, words)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "variants": st.sampled_from(["msra", "he2015,msra", ["fattorib"]]),
        "depths": st.sampled_from(["8..20", [8, 14], 20]),
        "seeds": st.sampled_from([3, "0,7", [5]]),
        "epochs": st.integers(1, 300),
        "precision": st.sampled_from(["fp32", "bf16"]),
        "deterministic": st.booleans(),
        "settings": st.dictionaries(st.sampled_from(["lr", "momentum"]), st.floats(1e-5, 1)),
    },
)
HOW = st.fixed_dictionaries(
    {},
    optional={"gpus": st.integers(0, 8), "out": st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), min_size=1),
              "until_ci": st.floats(0.01, 9), "force": st.booleans(), "data_dir": st.just(Path("a b"))},
)  # fmt: skip


@settings(max_examples=60)
@given(top=OPTIONS, how=HOW, groups=st.lists(OPTIONS, max_size=2), line=OPTIONS)
def test_what_is_saved_is_read_as_the_same_command(
    tmp_path_factory: Any, top: Any, how: Any, groups: list[Any], line: Any
) -> None:
    path = tmp_path_factory.mktemp("grid") / "grid.toml"
    shared = read_command(read_values(top | how, Grid, RunOptions))
    first = {**shared, "runs": [read_command(read_values(group, Grid)) for group in groups]}
    save_grid(first if groups else shared, path)
    for given_line in ({}, read_values(line, Grid)):
        once = read_command(given_line, path)
        save_grid(once, path)
        twice = read_command({}, path)
        assert make_grid(twice) == make_grid(once)
        assert fill(RunOptions, twice) == fill(RunOptions, once)


def test_from_python_a_file_trains_and_options_win(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'dataset = "digits"\ndepths = 8\nepochs = 3\nlimit_train = 64\nlimit_test = 32\nbatch_size = 32\ngpus = 0\n'
        'loader = "resident"\nlauncher = "local"\n[[runs]]\nvariants = "msra"\n[[runs]]\nvariants = "he2015"\n',
    )
    runs = harness.run(path, epochs=1, out=tmp_path / "runs")
    assert list(runs["variant"]) == ["he2015", "msra"]
    assert set(runs["recipe.duration"]) == {1}
    with pytest.raises(harness.UserError, match=r"grid\.toml:3: .*--epochs 0"):
        harness.run(write(tmp_path, "depths = 8\n\nepochs = 0"))
