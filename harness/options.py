"""Every option, declared once as a field of a dataclass: name, type, default, help, what is allowed, how words are read.

The command line is derived from these fields (`harness.cli`); `fill` makes a dataclass of values and words by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from harness.cluster.job import PLACEMENTS, Placement
from harness.deadline import parse_until
from harness.models.variants import VARIANTS, default_depth, find_variant
from harness.spec import Engine, Precision, RunSpec, UserError, at_home, check_word, load_specs, mistakes, refuse

Group = TypeVar("Group")
PRECISIONS: tuple[str, ...] = get_args(Precision)
ENGINES: tuple[str, ...] = get_args(Engine)
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text"}
SCHEDULERS = ("asha", "hyperband", "median", "none")


@dataclass(frozen=True, slots=True)
class Option:
    """What a field's annotation says of it as an option."""

    help: str
    names: tuple[str, ...] = ()  # on the command line; none: the field's
    parse: Callable[[Any], Any] | None = None  # of its words; raises UserError
    words: Collection[str] | Callable[[], Collection[str]] = ()  # all that are allowed
    least: int | None = None
    repeatable: bool = False
    variable: str = ""  # of the environment, which holds where nothing is given
    kind: Any = str  # the field's type
    default: Any = None
    required: bool = False

    def read(self, name: str, value: Any) -> Any:
        """A value of Python or TOML as the field's type; of words, what they say. Raises UserError."""
        from pydantic import TypeAdapter, ValidationError

        kind = self.kind
        if self.repeatable:
            if isinstance(value, Mapping):
                listed = {key: v if isinstance(v, list | tuple) else [v] for key, v in value.items()}
                value = [f"{key}={','.join(map(str, words))}" for key, words in listed.items()]
            value, kind = [value] if isinstance(value, str | Path) else value, list[str | Path]
        elif (type(value) is int and get_origin(kind) is tuple) or (isinstance(value, Path) and kind is str):
            value = str(value)  # seeds=3
        if self.parse and isinstance(value, str):
            with mistakes(UserError, f"{self.names[0]} {value!r}: "):
                return self.parse(value)
        if self.words and isinstance(value, str):
            return value  # `check` says which are allowed
        try:
            value = TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            fault = error.errors()[0]
            kind = KINDS.get(fault["type"].partition("_")[0], fault["msg"].removeprefix("Input should be "))
            raise UserError(f"{name} {value!r}: expected {kind}") from None
        value = at_home(value) if isinstance(value, Path) else value
        return self.parse(value) if self.parse and self.repeatable else value

    def check(self, value: Any) -> None:
        """Raise UserError for a value that is not allowed."""
        if self.words and value is not None:
            check_word(value, self.words() if callable(self.words) else self.words, self.names[0])
        if self.least is not None and value is not None and value < self.least:
            raise UserError(f"{self.names[0]} {value}: at least {self.least} is required")


def opt(help: str, *names: str, **more: Any) -> Option:
    """An option of this help, with names other than the field's."""
    return Option(help, names, **more)


@cache
def options_of(*groups: type) -> dict[str, Option]:
    """The options among the fields of dataclasses, by name; a dataclass's own before those that it inherits."""
    options = dict[str, Option]()
    for group in groups:
        hints, known = get_type_hints(group, include_extras=True), {each.name: each for each in fields(group)}
        for name in [name for kind in group.__mro__ for name in vars(kind).get("__annotations__", ())]:
            for option in getattr(hints[name], "__metadata__", ()) if name not in options else ():
                default = known[name].default
                required = default is known[name].default_factory is MISSING
                names, kind = option.names or (f"--{name.replace('_', '-')}",), hints[name].__origin__
                options[name] = replace(option, names=names, kind=kind, default=default, required=required)
    return options


def load_named(values: Mapping[str, Any]) -> None:
    """Load the plug-ins that options name, before any other word is read: it may be one of a plug-in's."""
    from harness.plugins import load_plugins

    load_plugins(options_of(Training)["plugin"].read("plugin", values.get("plugin") or ()))


def read_values(values: Mapping[str, Any], *groups: type) -> dict[str, Any]:
    """Options that are given by name, with the plug-ins that they name loaded. Raises UserError for another name."""
    known = options_of(*groups)
    for name in values:
        check_word(name, known, "option")
    if "plugin" in known:
        load_named(values)
    given = {name: value for name, value in values.items() if value is not None}
    # a range or a generator, once: it is read again, and stored
    once = [n for n, v in given.items() if isinstance(v, Iterable) and not isinstance(v, str | Mapping | list)]
    return given | {name: tuple(given[name]) for name in once}


def fill(group: type[Group], values: Mapping[str, Any]) -> Group:
    """A dataclass from the values, or words, that are named as its fields are. What is not given may be a variable's."""
    own = {}
    for name, option in options_of(group).items():  # type: ignore[arg-type]
        value = values.get(name)
        if value is None and option.variable:
            value = os.environ.get(option.variable) or None
        if value is not None:
            own[name] = option.read(name, value)
    return group(**own)


def default_out() -> str:
    """The folder of results that is read where none is named."""
    return fill(RunOptions, {}).out


# --- words: "msra,he2015", "20..56", "3" ---

MOST_NUMBERS = 1000  # in a list of seeds
MOST_PIXELS = 9999


def parse_words(text: str) -> tuple[str, ...]:
    """ "a,b" -> ("a", "b"), each once. Raises UserError."""
    words = [word.strip() for word in text.split(",")]
    refuse({"expected a comma-separated list without empty items, as in a,b": not all(words)})
    return tuple(dict.fromkeys(words))


def parse_numbers(text: str, fault: Callable[[int], str] = lambda _: "") -> tuple[int, ...]:
    """ "7,3..5" -> (7, 3, 4, 5), each once; of a range those that have no fault. Raises UserError."""
    numbers = list[int]()
    for word in parse_words(text):
        ends = re.fullmatch(r"(\d{1,9})(?:\s*\.\.\s*(\d{1,9}))?", word)
        low, high = (int(ends[1]), int(ends[2] or ends[1])) if ends else (0, -1)
        known = f"a whole number nor an ascending range of at most {MOST_NUMBERS} numbers, as in 20..56"
        refuse({f"{word!r} is neither {known}": not low <= high < low + MOST_NUMBERS})
        chosen = [n for n in range(low, high + 1) if low == high or not fault(n)]
        refuse({f"no number from {low} to {high} is allowed: {fault(high)}": not chosen})
        numbers += chosen
    return tuple(dict.fromkeys(numbers))


def parse_variants(text: str) -> tuple[str, ...]:
    """ "msra,he2015" -> ("msra", "he2015"); "all": every one."""
    return tuple(VARIANTS) if text.strip() == "all" else parse_words(text)


def parse_depths(text: str, variants: Sequence[str] = ()) -> tuple[int, ...]:
    """ "20,32" -> (20, 32); "20..32" -> those from 20 to 32 that all the variants allow, of which each has its own."""

    def fault(depth: int) -> str:
        try:
            all(function(depth) for function in map(find_variant, variants) if default_depth(function))
        except ValueError as error:
            return str(error)
        return ""

    return parse_numbers(text, fault)


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "3" -> (0, 1, 2), a count; "0,7" -> (0, 7), the seeds themselves; "7," -> (7,); "3..5" -> (3, 4, 5)."""
    if not text.strip().isdecimal():
        return parse_numbers(text.rstrip(","))
    known = f"expected a count from 1 to {MOST_NUMBERS}, or a list of seeds as in 0,7"
    refuse({known: not 1 <= int(text) <= MOST_NUMBERS})
    return tuple(range(int(text)))


def parse_scales(text: str) -> tuple[int, ...]:
    """ "96,112,128" -> (96, 112, 128), in pixels."""
    scales = parse_numbers(text)
    refuse({f"at most {MOST_PIXELS} pixels are allowed": max(scales) > MOST_PIXELS})
    return scales


def _parse_settings(texts: list[str]) -> dict[str, Any]:
    from harness.search_space import parse_settings

    return parse_settings(texts)


def parse_dataset(name: str) -> str:
    """ "folder:x/" -> "folder:/here/x": the name is in the key, and is to be found from any folder."""
    path = name.removeprefix("folder:")
    return name if path in ("", name) else f"folder:{os.path.abspath(os.path.expanduser(path))}"  # noqa: PTH100, PTH111


def _loaders() -> Collection[str]:
    from harness.loaders.loader import LOADERS

    return LOADERS


# --- options that several commands have ---

# fmt: off
Preset = Annotated[str | None, opt("A published table: cfmz, fattorib, mpmz, convnet or ladder.")]
Variant = opt("A network with its recipe: see `harness variants`.", "--variant", "--variants")
Depth = Annotated[int | None, opt("Default: the variant's own.", "--depth", "--depths")]
Dataset = Annotated[str, opt("cifar10, cifar2, cifar100, cifar100-coarse, digits, miniplaces or folder:PATH.", parse=parse_dataset)]
DataDir = Annotated[Path | None, opt("Folder of the images. Default: HARNESS_DATA_DIR, or a download, once.")]
Gpus = Annotated[int | None, opt("GPUs to use, 0 for the CPU. Default: all.", least=0)]
Workers = Annotated[int | None, opt(
    "DDP processes per run; gpus/workers runs train at the same time. Default: one per GPU (tune, CPU: 1).", least=1)]
RunsPerGpu = Annotated[int, opt(
    "Runs per GPU, where only errors matter: their seconds and energy are not reported.", least=1)]
Address = Annotated[str | None, opt("A running Ray cluster: HOST:PORT or auto.", variable="HARNESS_ADDRESS")]
Verbose = Annotated[bool, opt("Show Ray's own messages.")]
ExcludeOutliers = Annotated[bool, opt("Do not use a cluster's nodes that were measured to be slow.")]
Plugin = Annotated[tuple[str, ...], opt(
    "A file with networks, data sets, ... of your own: docs/extending.md. Repeatable.",
    parse=lambda paths: tuple(str(at_home(path).absolute()) for path in paths), repeatable=True)]
Until = Annotated[datetime | None, opt(
    "Stop after 9m or 2h30m, or at 18:00, as Ctrl-C would; what was stopped can be continued.", parse=parse_until)]
NoCheck = Annotated[bool, opt("Do not check a new GPU before training on it.")]
Settings = Annotated[Mapping[str, Any], opt(
    "Change a field of the recipe or network: FIELD=VALUE, as in lr=0.05. Repeatable.", "--set", parse=_parse_settings, repeatable=True)]
DryRun = Annotated[bool, opt("Print the plan and what is already done; train nothing.")]
Estimate = Annotated[bool, opt("Probe 30 steps, an epoch at most, of what is missing; predict hours, memory and energy.")]
Across = Annotated[tuple[str, ...], opt(
    "Fields to average over, as in workers,threads.", parse=parse_words)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of a command. Raises UserError for a value that an option does not allow."""

    def __post_init__(self) -> None:
        for name, option in options_of(type(self)).items():  # type: ignore[arg-type]
            option.check(getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class Training(Options):
    """How runs train: what `run` and `tune` share."""

    dataset: Dataset = "cifar10"
    data_dir: DataDir = None
    loader: Annotated[str, opt("dali, resident, dataloader or synthetic.", words=_loaders)] = "dali"
    epochs: Annotated[int | None, opt("Epochs, instead of the recipe's; its schedule is stretched or shrunk.", least=1)] = None
    batch_size: Annotated[int | None, opt("Global batch size, over all workers. Default: the recipe's.", least=1)] = None
    batch_norm: Annotated[str | None, opt(
        "Batch statistics: local (over each worker's images) or sync (over all workers' images).",
        words=("local", "sync"))] = None
    precision: Annotated[str, opt("fp32, tf32, bf16 or fp16.", words=PRECISIONS)] = "fp32"
    engine: Annotated[str | None, opt(
        "eager, compile or graph. Default: graph on GPUs, eager on the CPU.", words=ENGINES)] = None
    deterministic: Annotated[bool, opt(
        "Use deterministic algorithms on GPUs too: slower, with rows of their own.")] = False
    val: Annotated[int | None, opt("Training images to hold out and evaluate on.", least=0)] = None
    limit_train: Annotated[int | None, opt("Train on this many images only; marked in tables.", least=1)] = None
    plugin: Plugin = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid(Training):
    """The runs of a command: variants × depths × seeds, or `networks` × seeds, or `specs`."""

    depths: Annotated[tuple[int, ...], opt(  # read by `plan.make_grid`: ranges depend on the variants
        "As in 20,32 or 20..56. Default: each variant's own.", "--depths", "--depth")] = ()
    variants: Annotated[tuple[str, ...], opt(
        "As in msra,he2015, or all: see `harness variants`. Default: he2015.", "--variants", "--variant",
        parse=parse_variants)] = ("he2015",)
    seeds: Annotated[tuple[int, ...], opt(
        "A count (3 is seeds 0,1,2) or the seeds themselves (0,7 or 3..6). Default: 1.", parse=parse_seeds)] = (0,)
    specs: Annotated[tuple[RunSpec, ...], opt(
        "Train the run of this record.json or spec.json, as changed by other options. Repeatable.", "--spec",
        parse=load_specs, repeatable=True)] = ()
    settings: Settings = field(default_factory=dict)
    limit_test: Annotated[int | None, opt("Evaluate on this many test images only; marked in tables.", least=1)] = None
    networks: tuple[tuple[str, int], ...] = ()  # variants and depths: a preset's
    groups: tuple[Grid, ...] = ()  # of a grid file, in place of all this


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources(Options):
    """What a command may use."""

    gpus: Gpus = None
    workers: Workers = None
    runs_per_gpu: RunsPerGpu = 1
    placement: Annotated[Placement, opt(
        "Where a run's workers are placed: pack (on one node if possible), strict-pack (only on one node), spread.", words=PLACEMENTS)] = "pack"
    address: Address = None
    launcher: Annotated[str, opt(
        "ray; local: in this process; auto: local for one run with one worker.",
        words=("auto", "ray", "local"))] = "auto"
    exclude_outliers: ExcludeOutliers = False
    verbose: Verbose = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions(Resources):
    """How a grid is carried out; nothing here changes what a run computes."""

    preset: Preset = None  # whose table is printed
    data_dir: DataDir = None
    out: Annotated[str, opt(
        "Folder of results, or s3://, gs://; runs that it holds are not repeated.", variable="HARNESS_OUT")] = "runs"
    until: Until = None
    until_ci: Annotated[float | None, opt(
        "Add seeds until the 95 % interval of the error is ± this many points.")] = None
    max_seeds: Annotated[int | None, opt("For --until-ci: the most seeds per row. Default: 10.")] = None
    elastic: Annotated[int | None, opt(
        "Train with fewer workers, at least this many, while a cluster has no room for all; marked in tables.")] = None
    checkpoint_every: Annotated[int, opt("Epochs between checkpoints.", least=1)] = 1
    stall_seconds: Annotated[int, opt(
        "A run that makes no step for this long is ended and retried, and the rank that hangs is named.", least=10)] = 300
    format: Annotated[str, opt(
        "table; jsonl: a JSON object per event, for programs; jsonl-convnet: per epoch, with the keys of the convnet's log.",
        words=("table", "jsonl", "jsonl-convnet"))] = "table"
    no_check: NoCheck = False
    dry_run: DryRun = False
    estimate: Estimate = False
    profile: Annotated[bool, opt("Time the parts of a training step of what is missing: data, forward, ...")] = False
    tensorboard: Annotated[bool, opt("Write each run's event file beside its record.")] = False
    scan: Annotated[bool, opt(
        "Decode every image file first; if any is corrupt, name it and train nothing.")] = False
    force: Annotated[bool, opt("Train finished runs again; the old results are kept.")] = False
    fail_fast: Annotated[bool, opt("Stop at the first run that fails.")] = False
    save: Annotated[Path | None, opt("Write these options as a grid file, which `harness run FILE` takes.")] = None
    print_config: Annotated[bool, opt("Print all options in effect as a grid file, and exit.")] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Search(Training):
    """A hyperparameter search, as sweep.json keeps it."""

    search: Annotated[tuple[str, ...], opt(
        "FIELD=loguniform(a,b), or uniform, randint, choice, grid; a field of recipe or network, or variant or loader. Repeatable.",
        parse=tuple, repeatable=True)] = ()
    settings: Settings = field(default_factory=dict)
    variant: Annotated[str, Variant] = "he2015"
    depth: Depth = None
    samples: Annotated[int | None, opt("Number of trials, or of trials per grid point. Default: 16; with a grid 1.", least=1)] = None
    search_algorithm: Annotated[str, opt(
        "random, tpe or gp (a Gaussian process).", words=("random", "tpe", "gp"))] = "random"
    scheduler: Annotated[str, opt(
        "How poor trials are stopped early: asha, hyperband, median or none.", words=SCHEDULERS)] = "asha"
    metric: Annotated[str, opt("Metric to minimise: error, top5_error, loss or epoch_seconds.")] = "error"
    seed: Annotated[int, opt("Seed of the search and of every trial.", least=0)] = 0
    val: Annotated[int | None, opt(
        "Training images held out to judge trials on; 0: judge on the test set. Default: 5000, at most a tenth.", least=0)] = None
    gpus: Gpus = None
    workers: Workers = None  # None: 1
    runs_per_gpu: RunsPerGpu = 1
    concurrent: Annotated[int | None, opt("Trials that train at the same time. Default: as many as fit.", least=1)] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneOptions(Options):
    """How a search is carried out."""

    out: Annotated[str, opt(
        "Folder of results, or s3://, gs://; trials are runs in it like any other.", variable="HARNESS_OUT")] = "runs"
    until: Until = None
    resume: Annotated[str | None, opt("Continue the sweep of that name in --out.")] = None
    dry_run: DryRun = False
    estimate: Estimate = False
    address: Address = None
    exclude_outliers: ExcludeOutliers = False
    no_check: NoCheck = False
    verbose: Verbose = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportOptions(Options):
    """How a table is printed."""

    format: Annotated[str | None, opt(
        "table, markdown, csv, json, latex or html. Default: what the ending of --output says, or table.",
        words=("table", "markdown", "csv", "json", "latex", "html"))] = None
    sort: Annotated[str | None, opt("Column to sort by, as in error; -error: largest first.")] = None
    columns: Annotated[tuple[str, ...], opt("Columns to show, as in variant,depth,error.", parse=parse_words)] = ()
    preset: Preset = None  # the rows and columns of that source's table, in their order
    across: Across = ()
    output: Annotated[Path | None, opt("Write to this file; -: print. Default of html: report.html.")] = None
    curves: Annotated[Path | None, opt("Draw the charts into this folder, as SVG and PNG.")] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareOptions(Options):
    """What is compared, and when that fails."""

    by: Annotated[str | None, opt(
        "Compare runs that differ in this field, as in loader or precision=fp32,bf16; the first value is A.")] = None
    fail_on: Annotated[str | None, opt(
        "Exit with code 1 if this holds, as in 'error>+0.3,epoch_seconds>5%'.")] = None
    strict: Annotated[bool, opt("Also exit with code 1 if the runs cannot tell.")] = False
    across: Across = ()
    format: Annotated[str, opt("table, markdown or json.", words=("table", "markdown", "json"))] = "table"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalOptions(Options):
    """What to evaluate, and on which images."""

    weights: Annotated[str, opt("A run's weights.safetensors, or a torch checkpoint; or its URI.")]
    variant: Annotated[str | None, opt(
        "Needed for weights that do not name theirs: see `harness variants`.", "--variant", "--variants")] = None
    depth: Depth = None
    dataset: Annotated[str | None, opt("Default: what the weights were trained on, or cifar10.", parse=parse_dataset)] = None
    data_dir: DataDir = None
    scales: Annotated[tuple[int, ...], opt(  # none: images as in training's evaluation, one centre crop
        "Average over these image sizes in pixels, as in 96,112,128, and over mirror images.", parse=parse_scales)] = ()
    average: Annotated[str, opt(
        "With --scales: average logits or probabilities.", words=("logits", "probabilities"))] = "logits"
    mirror: Annotated[bool, opt("With --scales: use mirror images too (default).", "--mirror/--no-mirror")] = True
    pool_window: Annotated[int | None, opt(
        "Pool over whole windows of this side only, as neon does with 7. For miniplaces and mpmz.", least=1)] = None
    save_probabilities: Annotated[Path | None, opt(
        "With --scales: write the classes' probabilities at each scale (.npz).")] = None
    mean: Annotated[str | None, opt("R,G,B of images in 0..1. Default: the recipe's.")] = None
    std: Annotated[str | None, opt("R,G,B of images in 0..1. Default: the recipe's.")] = None
    predictions: Annotated[Path | None, opt("Write each image's most likely classes (CSV).")] = None
    batch_size: Annotated[int | None, opt("Images per batch. Default: 1000, as in training's evaluation; fewer for large scales.", least=1)] = None
    limit: Annotated[int | None, opt(
        "Evaluate this many images only, the same number of each class.", least=1)] = None
    plugin: Plugin = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckOptions(Options):
    """What a user wants to run with."""

    quick: Annotated[bool, opt("Look at what is installed; measure nothing.")] = False
    gpus: Gpus = None
    out: Annotated[str, opt("Where results would go.", variable="HARNESS_OUT")] = "runs"
    data_dir: Annotated[Path | None, opt("Where the images are.")] = None
    address: Address = None
