"""The values of one run: its specification (`RunSpec`) and its folders (`RunPaths`); errors of all commands.

What a run measures (`EpochMetrics`, `RunResult`) is defined in `harness.results.values`.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from harness.models.variants import Network, Recipe, added
from harness.words import suggest, unknown

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Engine = Literal["eager", "compile", "graph"]
FULL = (errno.ENOSPC, errno.EDQUOT)  # numbers of errors: a disk has no room
INSTALL = "training needs pip install 'resnet-harness[train]'"


class UserError(Exception):
    """A user's mistake: printed as one line, exit code 2, no traceback."""


@contextmanager
def mistakes(kind: type[Exception] | tuple[type[Exception], ...], what: str = "") -> Iterator[None]:
    """Errors of a kind that are raised inside are raised as UserError, with `what` before their words."""
    try:
        yield
    except kind as error:
        raise UserError(f"{what}{getattr(error, 'strerror', None) or error}") from None


def at_home(path: str | Path) -> Path:
    """With the home folder in place of "~". Raises UserError where there is none, as of an unknown user."""
    with mistakes(RuntimeError, f"{path}: "):
        return Path(path).expanduser()


def refuse(faults: Mapping[str, object], what: str = "") -> None:
    """Raise UserError for the first of these faults that is there."""
    for fault, there in faults.items():
        if there:
            raise UserError(what + fault)


def check_word(word: str, allowed: Collection[str], what: str) -> None:
    """Raise UserError unless `word` is allowed."""
    if word not in allowed:
        raise UserError(unknown(what, word, allowed))


class DivergedError(RuntimeError):
    """The loss is not finite; `steps` is the step at which the epoch ended."""

    def __init__(self, epoch: int, steps: int) -> None:
        super().__init__(f"loss is not finite in epoch {epoch} (by step {steps})")


class CheckpointError(RuntimeError):
    """A checkpoint that belongs to another run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """One run, whole: equal specs give equal results, wherever and whenever they are run."""

    variant: str
    network: Network
    recipe: Recipe  # with the overrides applied
    overrides: tuple[str, ...] = ()  # what differs from the variant's own recipe: ("epochs=2",)
    dataset: str
    fingerprint: str  # of the images and labels, sha256
    limit_train: int | None = None
    limit_test: int | None = None
    loader: str
    precision: Precision = "fp32"
    engine: Engine = "eager"
    device: Literal["cuda", "cpu"]
    workers: int = 1
    seed: int = 0
    deterministic: bool = field(default=False, metadata={"added": True})  # algorithms, at the cost of speed
    plugins: tuple[str, ...] = added(())  # identities of those that this run uses: ("nets:1f2e3d4c5b6a7980",)

    @property
    def key(self) -> str:
        """Hash of the contents, 16 hexadecimal digits. Fields that stand at their default are left out, so that a field
        added later leaves old keys as they are."""
        text = json.dumps(_contents(self, whole=False), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """For people, but for the seed: "msra-20"."""
        return f"{self.variant}-{self.network.depth}" if self.network.depth else self.variant

    @property
    def title(self) -> str:
        """For people: "msra-20 seed 0"."""
        return f"{self.name} seed {self.seed}"

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON values, defaults included but for fields that were added when runs were stored already
        (metadata "added"): specs of equal runs are equal, whenever they were stored."""
        whole: dict[str, Any] = json.loads(json.dumps(_contents(self, whole=True)))
        return whole

    @classmethod
    def from_json(cls, values: Any) -> RunSpec:
        """The inverse of `to_json`. Raises ValueError, in one line, for a field that is unknown, missing or invalid."""
        from pydantic import TypeAdapter, ValidationError

        try:
            TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": ")) from None
        parts = {"network": Network, "recipe": Recipe}
        for name, part in {"": cls, **parts}.items():
            known = {each.name for each in fields(part)}
            for key in (values[name] if name else values).keys() - known:
                raise ValueError(f"{name}.{key}: no such field{suggest(key, known)}".lstrip("."))
        # not the validated values: 180 would have become 180.0, and the key with it
        made = {name: part(**_as_tuples(values[name])) for name, part in parts.items()}
        return cls(**{**_as_tuples(values), **made})


def load_specs(paths: Iterable[str | Path]) -> tuple[RunSpec, ...]:
    """The runs of record.json and spec.json files. Raises UserError where a file holds none."""
    specs = []
    for path in paths:
        none = f"--spec {path} holds no run's specification: "
        with mistakes(OSError, f"--spec {path}: "), mistakes(ValueError, none):  # ValueError: of JSON too
            values = json.loads(at_home(path).read_bytes())
            values = values["spec"] if isinstance(values, dict) and "spec" in values else values
            specs.append(RunSpec.from_json(values))
    return tuple(specs)


def _as_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _contents(value: Any, *, whole: bool) -> Any:
    """Of nested dataclasses, as dictionaries: all fields, or those that differ from their default."""
    if not is_dataclass(value):
        return value
    kept = {}
    for each in fields(value):
        item, always = getattr(value, each.name), whole and "added" not in each.metadata
        if always or each.default is MISSING or item != each.default:
            kept[each.name] = _contents(item, whole=whole)
    return kept


@dataclass(frozen=True, kw_only=True)
class Source:
    """The source of a plug-in: what travels to workers, stands in keys by its hash, and is kept beside records."""

    name: str
    folder: str  # on the machine of the command
    main: str  # its first file, below the folder
    files: tuple[tuple[str, str], ...] = field(repr=False)  # (path below the folder, text)
    module: str = ""  # of an installed package

    @property
    def path(self) -> str:
        """Of its first file."""
        return str(Path(self.folder, self.main))

    @cached_property
    def identity(self) -> str:
        """ "nets:1f2e3d4c5b6a7980" """
        return f"{self.name}:{hashlib.sha256(json.dumps(self.files).encode()).hexdigest()[:16]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPaths:
    """Where a run finds its data and keeps its files; not part of its identity. All paths are absolute."""

    out: Path
    data_dir: Path | None = None
    cache_dir: Path | None = None
    label: str = ""  # of the data set, for folder names and tables
    checkpoint_every: int = 1  # epochs
    remote: str = ""  # the URI of the results, where `out` is its local copy
    plugins: tuple[Source, ...] = ()  # all that were loaded; a worker loads those of its run

    def name(self, spec: RunSpec) -> str:
        """Of a run's folder."""
        from harness.results.store import run_name  # not for `harness --help`

        return run_name(self.label, spec.variant, spec.network.depth, spec.seed, spec.key)

    def partial(self, spec: RunSpec) -> Path:
        """The folder of a run that has not finished."""
        from harness.results.store import partial_dir

        return partial_dir(self.out, self.name(spec))
