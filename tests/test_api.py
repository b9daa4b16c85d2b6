"""The commands as functions of Python: typed as the options are, the same results and mistakes as the command line."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any

import pytest
from command import harness as command

import harness
from harness import api

STUB = Path(harness.__file__).with_suffix(".pyi")
SMALL: dict[str, Any] = {
    "dataset": "digits", "variants": "msra", "depths": [8], "epochs": 1, "limit_train": 64, "limit_test": 32,
    "batch_size": 32, "loader": "resident", "gpus": 0, "launcher": "local",
}  # fmt: skip
LINE = "--dataset digits --variants msra --depths 8 --epochs 1 --limit-train 64 --limit-test 32 --batch-size 32 "
LINE += "--loader resident --gpus 0 --launcher local"


def annotation(parameter: inspect.Parameter) -> str:
    """What a function takes: the option's type, or the words of the command line for what is read from words."""
    text = re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Za-z])", "", inspect.formatannotation(parameter.annotation))
    text = text.strip("'")
    if listed := re.match(r"tuple\[(\w+), \.\.\.\]", text):
        item = "Path | str" if listed[1] == "RunSpec" else listed[1]
        more = " | Mapping[str, str]" if parameter.name == "search" else ""
        return " | ".join(dict.fromkeys([f"Sequence[{item}]", *item.split(" | "), "str"])) + more
    if text.startswith("Mapping"):
        return f"{text} | Sequence[str]"
    if parameter.name == "out":
        return "Path | str"
    return text.replace("datetime", "datetime | str").replace("Path", "Path | str")


def stub() -> str:
    """Typed signatures of the functions, for editors and type checkers."""
    lines = [
        "# written by tests/test_api.py from harness/options.py: UPDATE_GOLDEN=1 pytest tests/test_api.py", "",
        "from collections.abc import Mapping, Sequence", "from datetime import datetime", "from pathlib import Path",
        "from typing import Any, Literal", "", "from pandas import DataFrame", "",
        "from harness.spec import UserError as UserError", "",
        "def load(*paths: str | Path, epochs: bool = False) -> DataFrame: ...",
    ]  # fmt: skip
    for function in (api.report, api.run, api.tune):
        lines.append(f"def {function.__name__}(")
        for each in inspect.signature(function).parameters.values():
            if each.kind is inspect.Parameter.VAR_POSITIONAL:
                lines.append("    *paths: str | Path,")
                continue
            if each.kind is inspect.Parameter.POSITIONAL_ONLY:
                lines.append("    file: Path | str | None = ..., /,")
                continue
            if lines[-1].startswith("def ") or lines[-1].endswith("/,"):
                lines.append("    *,")
            lines.append(f"    {each.name}: {annotation(each)} = ...,")
        lines.append(") -> DataFrame: ...")
    return "\n".join(lines) + "\n"


def test_the_signatures_are_those_of_the_options() -> None:
    if os.environ.get("UPDATE_GOLDEN"):
        STUB.write_text(stub())
    assert STUB.read_text() == stub()


def test_run_load_and_report_give_what_the_command_line_gives(tmp_path: Path, capsys: Any) -> None:
    runs = harness.run(**SMALL, seeds=2, out=tmp_path / "a", settings={"lr": 0.05})
    assert "error %" in capsys.readouterr().out
    code, *_ = command(f"run {LINE} --seeds 2 --set lr=0.05 --out {tmp_path / 'b'}", capsys)
    other = harness.load(tmp_path / "b")
    assert code == 0
    assert list(runs["seed"]) == [0, 1]
    assert list(runs["recipe.lr"]) == [0.05, 0.05]
    assert list(runs["final_error"]) == list(other["final_error"])
    table = harness.report(tmp_path / "a", columns=["depth", "n"], output=tmp_path / "table.md", format="markdown")
    assert table.to_dict("list") == {"depth": [8], "n": [2]}
    assert "| depth" in re.sub(r"\s+", " ", (tmp_path / "table.md").read_text())


def test_variables_give_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_OUT", str(tmp_path / "mine"))
    runs = harness.run(**SMALL)
    assert len(runs) == len(harness.load()) == len(harness.report()) == 1
    assert len(list((tmp_path / "mine").glob("*/record.json"))) == 1
    assert len(harness.run(**SMALL, out=tmp_path / "other")) == 1
    monkeypatch.setenv("HARNESS_ADDRESS", "127.0.0.1:1")
    with pytest.raises(harness.UserError, match="--address is for --launcher ray"):
        harness.run(**SMALL)


MISTAKES: dict[str, dict[str, Any]] = {
    "option 'depth' is unknown; did you mean depths?": {"depth": 8},
    "epochs 'ten': expected a whole number": {"epochs": "ten"},
    "--loader 'dalli' is unknown; did you mean dali?": {"loader": "dalli"},
    "--seeds '0,x'": {"seeds": "0,x"},
    "preset 5": {"preset": 5},
    "depths ['8a']": {"depths": ["8a"]},
    "did you mean lr?": {"settings": {"lrr": 1}},
    "'learning_rate' is unknown; did you mean lr?": {"settings": {"learning_rate": 1}},
}


def test_what_is_saved_of_a_range_is_a_list(tmp_path: Path) -> None:
    some: dict[str, Any] = {"depths": range(8, 15, 6), "seeds": (seed for seed in (3, 5)), "dry_run": True}
    harness.run(**SMALL | some, out=tmp_path, save=tmp_path / "grid.toml")
    assert {"depths = [8, 14]", "seeds = [3, 5]"} <= set((tmp_path / "grid.toml").read_text().splitlines())


@pytest.mark.parametrize("look", ["dry_run", "print_config"])
def test_a_plan_makes_no_folder_and_has_no_lines(tmp_path: Path, look: str) -> None:
    assert harness.run(**SMALL, **{look: True}, out=tmp_path / "runs").empty
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("says", MISTAKES)
def test_a_mistake_is_a_user_error_in_one_line(says: str, tmp_path: Path) -> None:
    with pytest.raises(harness.UserError) as error:
        harness.run(**SMALL | MISTAKES[says], out=tmp_path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_search_names_its_fields_in_a_mapping(tmp_path: Path) -> None:
    options = {
        name: value
        for name, value in SMALL.items()
        if name not in ("variants", "depths", "limit_test", "launcher")
    }
    with pytest.raises(harness.UserError, match="no_such_field"):
        harness.tune(**options, variant="msra", depth=8, search={"no_such_field": "uniform(0,1)"}, out=tmp_path)
