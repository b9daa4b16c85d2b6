"""Plug-ins: files and installed packages whose networks, data sets, loaders and so on stand beside the built-in ones.

`load_plugins` enters what they note (`harness.plugin`) into the tables that the built-in ones are entries of, so nothing else
knows which is which. What a run uses of them is in its key by the hash of their source, which travels to its workers
(`load_sources`) and is kept beside its record.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from harness.models.variants import (
    NETWORKS,
    ROWS,
    VARIANTS,
    Architecture,
    Network,
    Recipe,
    call,
    make_variant,
    own_fields,
    parameters_of,
    read_extra,
)  # fmt: skip
from harness.plugin import NOTES, Note
from harness.results.store import write_atomic
from harness.spec import RunPaths, RunSpec, Source, UserError, check_word
from harness.training.optim import CAPTURABLE, OPTIMIZERS, SCHEDULES

GROUP = "resnet_harness.plugins"
LISTED = {
    "NETWORKS": "network", "DATASETS": "dataset", "LOADERS": "loader", "OPTIMIZERS": "optimizer",
    "SCHEDULES": "schedule", "AUGMENTATIONS": "augmentation", "VARIANTS": "variant",
}  # fmt: skip
"""What a plug-in's file may list, {name: function}; of VARIANTS {name: row}."""
_RECIPE = {each.name for each in fields(Recipe)}
GIVEN = {
    "network": {"num_classes", "image_size", "depth", "network"}, "dataset": {"root"}, "augmentation": {"images", "draws"},
    "loader": {"split", "plan", "config"}, "optimizer": {"groups", *_RECIPE}, "schedule": {"moment", *_RECIPE},
}  # fmt: skip
"""The parameters that are filled."""


class PluginError(UserError):
    """A plug-in that cannot be used: file, line, and what is wrong."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A plug-in of this process."""

    source: Source
    folder: Path  # in which its files lie
    shown: Path  # its folder as the user named it
    owned: dict[tuple[str, str], Note] = field(default_factory=dict)  # by kind and name

    def place(self, file: str, line: int) -> str:
        """ "my.py:12" """
        with suppress(ValueError):
            file = str(self.shown / Path(file).relative_to(self.folder))
        return f"{file}:{line}"


LOADED: dict[str, Loaded] = {}
"""By name."""


def tables() -> dict[str, dict[str, Any]]:
    """Of all kinds of things that have names: where they are looked up."""
    from harness.loaders.datasets import DATASETS
    from harness.loaders.loader import LOADERS
    from harness.training.augment import AUGMENTATIONS

    return {
        "network": NETWORKS, "variant": VARIANTS, "dataset": DATASETS, "loader": LOADERS, "optimizer": OPTIMIZERS,
        "schedule": SCHEDULES, "augmentation": AUGMENTATIONS,
    }  # fmt: skip


# --- what a run uses ---


def names_of(spec: RunSpec) -> list[tuple[str, str]]:
    """Everything that a run looks up: kind and name."""
    recipe = spec.recipe
    single = {
        "network": spec.network.architecture, "dataset": spec.dataset, "loader": spec.loader,
        "optimizer": recipe.optimizer, "schedule": recipe.schedule,
    }  # fmt: skip
    return [*single.items(), *(("augmentation", name) for name in recipe.augmentations)]


def used_by(names: Iterable[tuple[str, str]]) -> tuple[Loaded, ...]:
    """The plug-ins that these kinds and names are of."""
    wanted = set(names)
    return tuple(loaded for _, loaded in sorted(LOADED.items()) if wanted & loaded.owned.keys())


def identify(spec: RunSpec) -> RunSpec:
    """The run with the plug-ins that it uses. Raises UserError where it names what is not there."""
    known = tables()
    for kind, name in names_of(spec):
        if name not in known[kind] and kind != "dataset":  # of which folder:PATH is one
            hint = (
                f": it is of plug-in {' or '.join(spec.plugins)}, whose file --plugin names"
                if spec.plugins
                else ""
            )
            if hint:
                raise UserError(f"{kind} {name!r} of {spec.title} is not known{hint}")
            check_word(name, known[kind], kind)
    plugins = tuple(loaded.source.identity for loaded in used_by(names_of(spec)))
    return spec if plugins == spec.plugins else replace(spec, plugins=plugins)


def blame(kind: str, name: str, error: BaseException) -> PluginError | None:
    """The error of what has this name, as one line with the line of the plug-in; None where it is of none."""
    for loaded in used_by([(kind, name)]):
        return _explain(loaded, error, f"{_place(loaded, loaded.owned[kind, name])}: {kind} {name!r}")
    return None


@contextmanager
def blaming(kind: str, name: str) -> Iterator[None]:
    """What is raised inside is PluginError where the name is of a plug-in."""
    try:
        yield
    except Exception as error:
        raise (blame(kind, name, error) or error) from None


def _explain(loaded: Loaded, error: BaseException, where: str) -> PluginError:
    """By the innermost line of the plug-in's own, or else `where`."""
    if isinstance(error, PluginError):
        return error
    own = {str(loaded.folder / file) for file, _ in loaded.source.files} | {loaded.source.path}
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in own]
    text = (str(error).strip() or "no message").splitlines()[0]
    if isinstance(error, SyntaxError) and error.filename in own:
        where, text = loaded.place(error.filename, error.lineno or 1), f"syntax error: {error.msg}"
    elif frames:
        where, text = loaded.place(frames[-1].filename, frames[-1].lineno or 1), f"{type(error).__name__}: {text}"
    return PluginError(f"{where}: {text}")


# --- loading ---


def load_plugins(paths: Iterable[str | Path] = ()) -> None:
    """Load installed plug-ins and these files, each once; again where a file has changed. Raises UserError."""
    for entry in entry_points(group=GROUP):
        if entry.name not in LOADED:
            _load_installed(entry)
    for path in paths:
        load_file(Path(path))


def load_file(path: Path) -> Loaded:
    """Import a file as a plug-in of its name, and enter what it notes and lists. Raises PluginError."""
    file = path.expanduser().absolute()
    if file.suffix != ".py" or not file.is_file():
        raise PluginError(f"--plugin {path}: {'a Python file is needed' if file.exists() else 'no such file'}")
    empty = Loaded(Source(name=file.stem, path=str(file), files=()), file.parent, path.parent)
    try:
        files = collect(file)
    except (OSError, ValueError, SyntaxError) as error:  # ValueError: not UTF-8, or null bytes
        raise _explain(empty, error, empty.place(str(file), 1)) from None
    loaded = replace(empty, source=replace(empty.source, files=files))
    if known := LOADED.get(file.stem):
        if known.source.identity == loaded.source.identity:
            return known
        if known.source.path != str(file):
            raise PluginError(f"--plugin {path}: another plug-in has this name, {known.source.path}: rename one")
        unload(file.stem)
    for name, own in _modules(loaded):
        other = getattr(sys.modules[name], "__file__", None) if name in sys.modules else str(own)
        if other != str(own):
            raise PluginError(f"{own}: a module {name} is imported already, of {other or 'Python'}: rename one")
    module = ModuleType("harness_plugin_" + re.sub(r"\W", "_", file.stem))
    module.__file__ = str(file)
    sys.modules[module.__name__] = module
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    importlib.invalidate_caches()
    text = dict(files)[file.name]

    def execute() -> ModuleType:
        exec(compile(text, str(file), "exec"), module.__dict__)
        return module

    own_files = {str(file.parent / name) for name, _ in files}
    return _enter(loaded, execute, lambda note: note.file in own_files, ast.parse(text))


def _load_installed(entry: EntryPoint) -> Loaded:
    """A package's plug-in: a module that notes and lists, or a function of it that does when it is called."""
    top = entry.module.partition(".")[0]
    found = importlib.util.find_spec(top)
    if found is None or found.origin is None:
        raise PluginError(f"plug-in {entry.name} of the installed packages: there is no module {top}")
    origin = Path(found.origin)
    files = sorted(origin.parent.rglob("*.py")) if found.submodule_search_locations else [origin]
    hashes = [(p.relative_to(origin.parent).as_posix(), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]
    version = entry.dist.version if entry.dist else ""
    source = Source(name=entry.name, path=entry.module, files=(("version", version), *hashes), installed=True)

    def execute() -> ModuleType:
        made = entry.load()
        if callable(made):
            made()
        return importlib.import_module(entry.module)

    where = importlib.util.find_spec(entry.module)
    tree = ast.parse(Path(where.origin).read_text() if where and where.origin else "")
    own_files = {str(file) for file in files}
    return _enter(Loaded(source, origin.parent, origin.parent), execute, lambda note: note.file in own_files, tree)


def _enter(
    loaded: Loaded, execute: Callable[[], ModuleType], is_own: Callable[[Note], bool], tree: ast.Module
) -> Loaded:
    """Execute the plug-in, and enter all that it has, or nothing of it."""
    name = loaded.source.name
    LOADED[name] = loaded
    where = loaded.place(loaded.source.path, 1)
    try:
        module = execute()
        notes = [note for note in NOTES if is_own(note)]
        for note in [*notes, *_read_lists(module, tree)]:
            _enter_one(loaded, note)
        for kind, variant in list(loaded.owned):
            if kind == "variant":
                _check_variant(loaded, variant)
    except (Exception, SystemExit) as error:
        unload(name)
        raise _explain(loaded, error, where) from None
    if not loaded.owned:
        unload(name)
        raise PluginError(
            f"{where}: it registers nothing: `from harness import plugin` and @plugin.network, or a list"
        )
    return loaded


def unload(name: str) -> None:
    """Take a plug-in's entries back, and its modules, so that it can be loaded again."""
    loaded, known = LOADED.pop(name), tables()
    for kind, entry in loaded.owned:
        known[kind].pop(entry, None)
        if kind == "variant":
            ROWS.pop(entry, None)
        if kind == "optimizer":
            CAPTURABLE.discard(entry)
    if not loaded.source.installed:
        files = {str(loaded.folder / file) for file, _ in loaded.source.files}
        NOTES[:] = [note for note in NOTES if note.file not in files]
        for module in [module for module, own in _modules(loaded) if module in sys.modules]:
            del sys.modules[module]
        sys.modules.pop("harness_plugin_" + re.sub(r"\W", "_", name), None)


def _modules(loaded: Loaded) -> Iterator[tuple[str, Path]]:
    """The modules that a file imports from its folder, by name."""
    for file, _ in loaded.source.files:
        parts = Path(file).with_suffix("").parts
        if file != Path(loaded.source.path).name:
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), loaded.folder / file


def _read_lists(module: ModuleType, tree: ast.Module) -> Iterator[Note]:
    """What a file lists itself, not what it imports."""
    for node in tree.body:
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        for target in targets:
            kind = LISTED.get(target.id) if isinstance(target, ast.Name) else None
            if kind is None or not isinstance(target, ast.Name):
                continue
            listed, file = getattr(module, target.id), str(module.__file__)
            if not isinstance(listed, Mapping):
                raise TypeError(f"{target.id} is no dictionary of names")
            keys = (
                node.value.keys
                if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict)
                else ()
            )
            lines = {key.value: key.lineno for key in keys if isinstance(key, ast.Constant)}
            for name, made in listed.items():
                options = dict(made) if kind == "variant" else {}
                yield Note(kind, name, None if options else made, file, lines.get(name, node.lineno), options)


# --- entering ---


def _enter_one(loaded: Loaded, note: Note) -> None:
    """Check a note and put it into its table. Raises PluginError."""
    kind, name, known = note.kind, note.name, tables()
    for table in dict.fromkeys((kind, "variant" if kind == "network" else kind)):
        if name in known[table]:
            owners = used_by([(table, name)])
            by = "built in" if not owners else f"by {_place(owners[0], owners[0].owned[table, name])}"
            raise PluginError(f"{_place(loaded, note)}: {table} {name!r} is registered already, {by}")
    loaded.owned[kind, name] = note
    if kind == "variant":
        _enter_variant(loaded, note, {"summary": name, **note.options})
        return
    _check_parameters(loaded, note)
    if kind == "network":
        _enter_network(loaded, note, **note.options)
    elif kind == "dataset":
        from harness.loaders.own import load_own

        known[kind][name] = partial(load_own, partial(call, note.made), **note.options)
    else:
        known[kind][name] = note.made
        if note.options.get("capturable"):
            CAPTURABLE.add(name)


def _place(loaded: Loaded, note: Note) -> str:
    return loaded.place(note.file, note.line)


def _enter_network(
    loaded: Loaded,
    note: Note,
    depth: int | None = None,
    smallest_image: int = 1,
    row: Mapping[str, Any] | None = None,
) -> None:
    """A network and its variant, whose recipe is he2015's but for `row`."""
    parameter = parameters_of(note.made).get("depth")
    default = depth if depth is not None else 0 if parameter is None else parameter.default
    if not isinstance(default, int):
        raise PluginError(
            f"{_place(loaded, note)}: network {note.name!r} needs a default depth: depth: int = 20, say"
        )
    depths = (default,) if parameter is None else ()
    NETWORKS[note.name] = Architecture(make=note.made, smallest_image=smallest_image, depths=depths)
    summary = (inspect.getdoc(note.made) or note.name).splitlines()[0]
    own = {"base": "he2015", "architecture": note.name, "depth": default, "summary": summary}
    _enter_variant(loaded, note, own | dict(row or {}))


def _enter_variant(loaded: Loaded, note: Note, row: dict[str, Any]) -> None:
    if row.get("base") not in ROWS:
        raise PluginError(f"{_place(loaded, note)}: variant {note.name!r}: base {row.get('base')!r} is no variant")
    loaded.owned["variant", note.name] = note
    ROWS[note.name] = {"source": Path(note.file).name, **row}
    VARIANTS[note.name] = make_variant(note.name, ROWS)


def _check_variant(loaded: Loaded, name: str) -> None:
    """Once all of a file is entered: whether a variant's fields are there, with the types that they have."""
    where = _place(loaded, loaded.owned["variant", name])
    try:
        variant = VARIANTS[name]()  # type: ignore[call-arg]
        recipe, known = variant.recipe, tables()
        for kind, word in (("optimizer", recipe.optimizer), ("schedule", recipe.schedule)):
            check_word(word, known[kind], kind)
        for word in recipe.augmentations:
            check_word(word, known["augmentation"], "augmentation")
        of_recipe = {n: hint for make in recipe_makers(recipe) for n, (hint, _) in own_fields(make).items()}
        check_fields(read_extra(recipe.extra), of_recipe)
        of_network = {n: hint for n, (hint, _) in own_fields(NETWORKS[variant.network.architecture].make).items()}
        check_fields(read_extra(variant.network.extra), of_network)
        for part in (variant.network, recipe):
            check_fields({f.name: getattr(part, f.name) for f in fields(part)}, get_type_hints(type(part)))
    except (ValueError, TypeError, UserError) as error:
        raise PluginError(f"{where}: variant {name!r}: {error}") from None


def recipe_makers(recipe: Recipe) -> list[Callable[..., Any]]:
    """Whose own fields `Recipe.extra` holds."""
    known = tables()
    named = [("optimizer", recipe.optimizer), ("schedule", recipe.schedule)]
    named += [("augmentation", name) for name in recipe.augmentations]
    return [known[kind][name] for kind, name in named if name in known[kind]]


def check_fields(values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Raise UserError for a name that has no type here, or a value of another type."""
    from pydantic import TypeAdapter, ValidationError

    for name, value in values.items():
        check_word(name, hints, "field")
        try:
            TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            raise UserError(f"{name} {value!r}: {error.errors()[0]['msg']}") from None


def own_hints() -> dict[str, Any]:
    """The types of all fields that networks, optimizers, schedules and augmentations have of their own, by name."""
    known = tables()
    makers = [architecture.make for architecture in NETWORKS.values()]
    makers += [make for kind in ("optimizer", "schedule", "augmentation") for make in known[kind].values()]
    return {name: hint for make in makers for name, (hint, _) in own_fields(make).items()}


def _check_parameters(loaded: Loaded, note: Note) -> None:
    """Whether what is noted can be called as its kind is. Raises PluginError."""
    what = f"{_place(loaded, note)}: {note.kind} {note.name!r}"
    if not callable(note.made):
        raise PluginError(f"{what} is no function or class but {note.made!r}"[:200])
    given, parameters = GIVEN[note.kind], parameters_of(note.made)
    if note.kind == "loader":
        return  # by place
    for name, p in parameters.items():
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in given:
            allowed = ", ".join(sorted(given - _RECIPE))
            raise PluginError(
                f"{what}: nothing fills its parameter {name}: give it a default (filled are {allowed})"
            )
    known, fixed = own_hints(), {each.name for each in fields(Network)}
    for name, (hint, _) in own_fields(note.made).items():
        if name in fixed or known.get(name, hint) != hint:
            raise PluginError(
                f"{what}: its field {name} has the name of another field, of another meaning: rename it"
            )


# --- travelling ---


def collect(file: Path) -> tuple[tuple[str, str], ...]:
    """A file and all that it imports from its own folder, anywhere in it: (path below the folder, text), sorted by path."""
    root, found, waiting = file.parent, dict[str, str](), [file]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(root).as_posix()
        if name in found:
            continue
        found[name] = path.read_text(encoding="utf-8")
        package = path.relative_to(root).parts[:-1]
        for node in ast.walk(ast.parse(found[name], str(path))):
            modules = [alias.name.split(".") for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                above = list(package[: len(package) + 1 - node.level]) if node.level else []
                base = above + (node.module.split(".") if node.module else [])
                modules = [base, *([*base, alias.name] for alias in node.names)]
            for parts in modules:
                if parts and parts[0] != "harness":
                    ends = [root.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)]
                    waiting += [
                        p for end in ends for p in (end.with_suffix(".py"), end / "__init__.py") if p.is_file()
                    ]
    return tuple(sorted(found.items()))


def sources() -> tuple[Source, ...]:
    """Of all plug-ins of this process."""
    return tuple(loaded.source for loaded in LOADED.values())


def load_sources(identities: Sequence[str], paths: RunPaths) -> None:
    """In any process: load these plug-ins, from their own files where they are the same here, or else from a copy in the
    cache. Raises RuntimeError where one cannot be had."""
    from harness.loaders.cache import cache_dir

    known = {source.identity: source for source in paths.plugins}
    for identity in identities:
        name = identity.partition(":")[0]
        if name in LOADED and LOADED[name].source.identity == identity:
            continue
        if (source := known.get(identity)) is None:
            raise RuntimeError(f"plug-in {identity} was not sent here: --plugin names its file")
        if name in LOADED:
            unload(name)
        if source.installed:
            load_plugins()
        else:
            load_file(_find_copy(source, paths.cache_dir or cache_dir()))
        if name not in LOADED or LOADED[name].source.identity != identity:
            raise RuntimeError(f"plug-in {identity} is another on this node, or not installed")


def _find_copy(source: Source, cache: Path) -> Path:
    """A file with these contents, and all that it imports beside it."""
    original = Path(source.path)
    with suppress(OSError, ValueError, SyntaxError):
        if collect(original) == source.files:
            return original
    folder = cache / "plugins" / source.identity.replace(":", "-")
    write_source(source, folder)
    return folder / original.name


def write_source(source: Source, folder: Path) -> None:
    """Write a plug-in's files into a folder; those of an installed package are not kept."""
    for name, text in () if source.installed else source.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, text)
