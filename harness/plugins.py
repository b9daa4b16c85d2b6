"""Plug-ins: files and installed packages whose networks, data sets, loaders and so on stand beside the built-in ones.

`load_plugins` enters what they note (`harness.plugin`) into the tables that the built-in ones are entries of, so nothing else
knows which is which. What a run uses of them is in its key by the hash of their source, which travels to its workers
(`load_sources`) and is kept beside its record.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from harness.loaders.cache import cache_dir
from harness.loaders.datasets import DATASETS
from harness.loaders.loader import LOADERS
from harness.loaders.own import load_own
from harness.models import variants
from harness.models.variants import NETWORKS, ROWS, VARIANTS, Network, Recipe, call, own_fields, parameters_of
from harness.plugin import NOTES, Note
from harness.results.store import write_atomic
from harness.spec import RunPaths, RunSpec, Source, UserError, check_word
from harness.training.optim import AUGMENTATIONS, CAPTURABLE, OPTIMIZERS, SCHEDULES

GROUP = "resnet_harness.plugins"
TABLES: dict[str, dict[str, Any]] = {
    "network": NETWORKS, "variant": VARIANTS, "dataset": DATASETS, "loader": LOADERS, "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES, "augmentation": AUGMENTATIONS,
}  # fmt: skip
"""Everything that has a name: where it is looked up. A file lists its own as NETWORKS = {name: function}, and so on."""
_RECIPE = {each.name for each in fields(Recipe)}
FILLED = {
    "network": {"num_classes", "image_size", "depth", "network"}, "dataset": {"root"}, "augmentation": {"images", "draws"},
    "optimizer": {"groups", *_RECIPE}, "schedule": {"moment", *_RECIPE},
}  # fmt: skip
"""The parameters that are filled by name, by kind; a loader is called by place."""


class PluginError(UserError):
    """A plug-in that cannot be used: file, line, and what is wrong."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A plug-in of this process."""

    source: Source
    folder: Path  # in which its files lie
    shown: Path  # the same as the user named it
    owned: dict[tuple[str, str], Note] = field(default_factory=dict)  # by kind and name

    @property
    def files(self) -> set[str]:
        return {str(self.folder / file) for file, _ in self.source.files}

    def place(self, file: str, line: int | None) -> str:
        """ "my.py:12" """
        return f"{self.shown / Path(file).relative_to(self.folder)}:{line}"

    def place_of(self, note: Note) -> str:
        """Where it was noted."""
        return self.place(note.file, note.line)

    def explain(self, error: BaseException, where: str) -> PluginError:
        """By the innermost line of the plug-in's own, or else `where`."""
        if isinstance(error, PluginError):
            return error
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in self.files]
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, SyntaxError) and error.filename in self.files:
            where, text = self.place(error.filename, error.lineno), f"syntax error: {error.msg}"
        elif frames:
            where = self.place(frames[-1].filename, frames[-1].lineno)
            text = f"{type(error).__name__}: {text}"
        return PluginError(f"{where}: {text}")


LOADED: dict[str, Loaded] = {}
"""By name."""


# --- what a run uses ---


def names_of(spec: RunSpec) -> list[tuple[str, str]]:
    """Everything that a run looks up: kind and name."""
    recipe = spec.recipe
    found = [("network", spec.network.architecture), ("dataset", spec.dataset), ("loader", spec.loader)]
    found += [("optimizer", recipe.optimizer), ("schedule", recipe.schedule)]
    return found + [("augmentation", name) for name in recipe.augmentations]


def used_by(names: Iterable[tuple[str, str]]) -> list[Loaded]:
    """The plug-ins that these kinds and names are of."""
    wanted = set(names)
    return [loaded for _, loaded in sorted(LOADED.items()) if wanted & loaded.owned.keys()]


def identify(spec: RunSpec) -> RunSpec:
    """The run with the plug-ins that it uses. Raises UserError where it names what is not there."""
    for kind, name in names_of(spec):
        folder = kind == "dataset" and ":" in name
        if spec.plugins and not folder and name not in TABLES[kind]:
            owner = " or ".join(spec.plugins)
            raise UserError(f"{kind} {name!r} of {spec.title} is of plug-in {owner}: --plugin names its file")
        if not folder:
            check_word(name, TABLES[kind], kind)
    plugins = tuple(loaded.source.identity for loaded in used_by(names_of(spec)))
    return replace(spec, plugins=plugins) if plugins != spec.plugins else spec


@contextmanager
def blaming(kind: str, name: str) -> Iterator[None]:
    """What is raised inside is raised as PluginError, with a line of the plug-in, where the name is of one."""
    try:
        yield
    except Exception as error:
        for loaded in used_by([(kind, name)]):
            raise loaded.explain(error, f"{loaded.place_of(loaded.owned[kind, name])}: {kind} {name!r}") from None
        raise


def makers_of(part: Recipe | Network) -> list[Callable[..., Any]]:
    """Whose own fields `part.extra` holds."""
    if isinstance(part, Network):
        return [NETWORKS[part.architecture].make] if part.architecture in NETWORKS else []
    named = [("optimizer", part.optimizer), ("schedule", part.schedule)]
    named += [("augmentation", name) for name in part.augmentations]
    return [TABLES[kind][name] for kind, name in named if name in TABLES[kind]]


def own_values(part: Recipe | Network) -> dict[str, Any]:
    """The fields of plug-ins' own that it has, by name."""
    defaults = {name: default for make in makers_of(part) for name, (_, default) in own_fields(make).items()}
    return defaults | {name: value for name, value in variants.read_extra(part.extra).items() if name in defaults}


def own_hints() -> dict[str, Any]:
    """The types of all fields that networks, optimizers, schedules and augmentations have of their own, by name."""
    makers: list[Callable[..., Any]] = [architecture.make for architecture in NETWORKS.values()]
    makers += [*OPTIMIZERS.values(), *SCHEDULES.values(), *AUGMENTATIONS.values()]
    return {name: hint for make in makers for name, (hint, _) in own_fields(make).items()}


# --- loading ---


def load_plugins(paths: Iterable[str | Path] = ()) -> None:
    """Load installed plug-ins and these files, each once; again where a file has changed. Raises UserError."""
    for entry in entry_points(group=GROUP):
        if entry.name not in LOADED:
            _load_installed(entry)
    for path in paths:
        load_file(Path(path))


def load_file(path: Path) -> Loaded:
    """Import a file as a plug-in of its name. Raises PluginError."""
    file = path.expanduser().absolute()
    if file.suffix != ".py" or not file.is_file():
        raise PluginError(f"--plugin {path}: {'a Python file is needed' if file.exists() else 'no such file'}")
    loaded = Loaded(Source(name=file.stem, path=str(file), files=((file.name, ""),)), file.parent, path.parent)
    try:
        files = collect(file)
    except (OSError, ValueError, SyntaxError) as error:  # ValueError: not UTF-8
        raise loaded.explain(error, f"{path}:1") from None
    return _load(replace(loaded, source=replace(loaded.source, files=files)))


def _load_installed(entry: EntryPoint) -> Loaded:
    """A package's plug-in: a module of it that notes or lists, with all of the package's files."""
    found = find_spec(entry.module.partition(".")[0])
    if found is None or found.origin is None:
        raise PluginError(f"plug-in {entry.name} of the installed packages: module {entry.module} is not there")
    origin = Path(found.origin)
    folder = origin.parent.parent if found.submodule_search_locations else origin.parent
    paths = sorted(origin.parent.rglob("*.py")) if found.submodule_search_locations else [origin]
    files = tuple((path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")) for path in paths)
    source = Source(name=entry.name, path=str(origin), files=files, module=entry.module)
    return _load(Loaded(source, folder, folder))


def _load(loaded: Loaded) -> Loaded:
    """Execute a plug-in and enter all that it has, or nothing of it; one that is loaded already is kept."""
    source, where = loaded.source, f"{loaded.shown / Path(loaded.source.path).name}:1"
    if known := LOADED.get(source.name):
        if known.source.identity == source.identity:
            return known
        if known.source.path != source.path:
            raise PluginError(f"{where}: another plug-in has this name, {known.source.path}: rename one")
        unload(source.name)
    for name, file in _modules(loaded):
        if name in sys.modules and (other := getattr(sys.modules[name], "__file__", None)) != str(file):
            raise PluginError(f"{file}: a module {name} is imported already, of {other or 'Python'}: rename one")
    if str(loaded.folder) not in sys.path:
        sys.path.insert(0, str(loaded.folder))
    importlib.invalidate_caches()
    LOADED[source.name] = loaded
    try:
        module = _execute(loaded)
        taken = [note for other in LOADED.values() for note in other.owned.values()]  # of a module that two import
        notes = [note for note in NOTES if note.file in loaded.files and note not in taken]
        for note in [*notes, *_read_lists(loaded, module)]:
            _enter(loaded, note)
        for kind, name in loaded.owned:
            if kind == "variant":
                _check_variant(loaded, name)
        if not loaded.owned:
            raise PluginError(f"{where}: it registers nothing, by `from harness import plugin` or by a list")
    except (Exception, SystemExit) as error:
        unload(source.name)
        raise loaded.explain(error, where) from None
    return loaded


def _execute(loaded: Loaded) -> ModuleType:
    source = loaded.source
    if source.module:
        return importlib.import_module(source.module)
    module = sys.modules[_private(source)] = ModuleType(_private(source))
    module.__file__ = source.path
    text = dict(source.files)[Path(source.path).name]  # what the hash is of
    exec(compile(text, source.path, "exec"), module.__dict__)
    return module


def _private(source: Source) -> str:
    return f"harness_plugin_{source.name}"


def unload(name: str) -> None:
    """Take a plug-in's entries back, and its modules, so that it can be loaded again."""
    loaded = LOADED.pop(name)
    for kind, entry in loaded.owned:
        TABLES[kind].pop(entry, None)
        if kind == "variant":
            ROWS.pop(entry, None)
        if kind == "optimizer":
            CAPTURABLE.discard(entry)
    NOTES[:] = [note for note in NOTES if note.file not in loaded.files]
    for module in (_private(loaded.source), *(module for module, _ in _modules(loaded))):
        sys.modules.pop(module, None)


def _modules(loaded: Loaded) -> Iterator[tuple[str, Path]]:
    """The modules that a plug-in is made of, by name, but for a file of its own."""
    for file, _ in loaded.source.files:
        parts = Path(file).with_suffix("").parts
        if loaded.source.module or file != Path(loaded.source.path).name:
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), loaded.folder / file


def _read_lists(loaded: Loaded, module: ModuleType) -> Iterator[Note]:
    """What a module lists itself: a list that it imports is another's."""
    file = Path(str(module.__file__))
    text = dict(loaded.source.files)[file.relative_to(loaded.folder).as_posix()]
    for node in ast.parse(text).body:
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            kind = getattr(target, "id", "").lower().removesuffix("s")
            if kind not in TABLES or not getattr(target, "id", "").isupper():
                continue
            listed = getattr(module, target.id)
            if not isinstance(listed, Mapping):
                raise PluginError(
                    f"{loaded.shown / file.name}:{node.lineno}: {target.id} is no dictionary of names"
                )
            for name, made in listed.items():
                own = (None, dict(made)) if kind == "variant" else (made, {})
                yield Note(kind, name, own[0], str(file), node.lineno, own[1])


# --- entering ---


def _enter(loaded: Loaded, note: Note) -> None:
    """Check a note and put it into its table. Raises PluginError."""
    kind, name, options = note.kind, note.name, note.options
    for table in ("network", "variant") if kind == "network" else (kind,):
        if name in TABLES[table]:
            owner = next(iter(used_by([(table, name)])), None)
            by = f"by {owner.place_of(owner.owned[table, name])}" if owner else "built in"
            raise PluginError(f"{loaded.place_of(note)}: {table} {name!r} is registered already, {by}")
    loaded.owned[kind, name] = note
    if kind == "variant":
        _enter_variant(loaded, note, {"summary": name, **options})
        return
    _check_parameters(loaded, note)
    if kind == "network":
        _enter_network(loaded, note, **options)
    elif kind == "dataset":
        DATASETS[name] = partial(load_own, partial(call, note.made), **options)
    else:
        TABLES[kind][name] = note.made
        CAPTURABLE.update([name] * options.get("capturable", False))


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
        raise PluginError(f"{loaded.place_of(note)}: network {note.name!r} needs a default depth: depth=20, say")
    depths = (default,) if parameter is None else ()
    NETWORKS[note.name] = variants.Architecture(make=note.made, smallest_image=smallest_image, depths=depths)
    summary = (inspect.getdoc(note.made) or note.name).splitlines()[0]
    own = {"base": "he2015", "architecture": note.name, "depth": default, "summary": summary}
    _enter_variant(loaded, note, own | dict(row or {}))


def _enter_variant(loaded: Loaded, note: Note, row: dict[str, Any]) -> None:
    if row.get("base") not in ROWS:
        raise PluginError(
            f"{loaded.place_of(note)}: variant {note.name!r}: base {row.get('base')!r} is no variant"
        )
    loaded.owned["variant", note.name] = note
    ROWS[note.name] = {"source": Path(note.file).name, **row}
    VARIANTS[note.name] = variants.make_variant(note.name, ROWS)


def _check_variant(loaded: Loaded, name: str) -> None:
    """Once all of a file is entered: whether a variant's fields are there, of the types that they have."""
    where = f"{loaded.place_of(loaded.owned['variant', name])}: variant {name!r}"
    try:
        variant = VARIANTS[name]()  # type: ignore[call-arg]
        recipe = variant.recipe
        for kind, word in (("optimizer", recipe.optimizer), ("schedule", recipe.schedule)):
            check_word(word, TABLES[kind], kind)
        for word in recipe.augmentations:
            check_word(word, AUGMENTATIONS, "augmentation")
        for word in variants.read_extra(recipe.extra):
            check_word(word, [*_RECIPE, *own_values(recipe)], "field")
        for part in (variant.network, recipe):
            TypeAdapter(type(part)).validate_python(asdict(part))
    except ValidationError as error:
        raise PluginError(f"{where}: {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from None
    except (ValueError, TypeError, UserError) as error:
        raise PluginError(f"{where}: {error}") from None


def _check_parameters(loaded: Loaded, note: Note) -> None:
    """Whether what is noted can be called as its kind is. Raises PluginError."""
    what = f"{loaded.place_of(note)}: {note.kind} {note.name!r}"
    if not callable(note.made):
        raise PluginError(f"{what} is no function or class but {note.made!r}"[:200])
    parameters = parameters_of(note.made)
    filled = FILLED.get(note.kind, set(parameters))
    for name, p in parameters.items():
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in filled:
            allowed = ", ".join(sorted(filled - _RECIPE))
            raise PluginError(
                f"{what}: nothing fills its parameter {name}: it needs a default (filled: {allowed})"
            )
    known, fixed = own_hints(), {each.name for each in fields(Network)}
    for name, (hint, _) in own_fields(note.made).items():
        if name in fixed or known.get(name, hint) != hint:
            raise PluginError(f"{what}: its field {name} has the name of a field of another meaning: rename it")


# --- travelling ---


def collect(file: Path) -> tuple[tuple[str, str], ...]:
    """A file and all that it imports from its own folder, anywhere in it: (path below the folder, text), sorted by path."""
    root, found, waiting = file.parent, dict[str, str](), [file]
    while waiting:
        path = waiting.pop()
        inside = path.relative_to(root)
        if inside.as_posix() in found:
            continue
        found[inside.as_posix()] = text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text, str(path))):
            names = [alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)]
            modules = [name.split(".") for name in names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                package = inside.parts[: len(inside.parts) - node.level] if node.level else ()
                base = [*package, *(node.module.split(".") if node.module else ())]
                modules = [[*base, name] for name in names]
            for parts in modules:
                ends = [root.joinpath(*parts[:n]) for n in range(1, len(parts) + 1) if parts[0] != "harness"]
                waiting += [
                    p for end in ends for p in (end.with_suffix(".py"), end / "__init__.py") if p.is_file()
                ]
    return tuple(sorted(found.items()))


def sources() -> tuple[Source, ...]:
    """Of all plug-ins of this process."""
    return tuple(loaded.source for loaded in LOADED.values())


def load_sources(identities: Sequence[str], paths: RunPaths) -> None:
    """In any process: load these plug-ins, from their own files where they are the same here, or else from a copy in the
    cache. Raises RuntimeError for one that was not sent."""
    known = {source.identity: source for source in paths.plugins}
    for identity in identities:
        name = identity.partition(":")[0]
        if name in LOADED and LOADED[name].source.identity == identity:
            continue
        if (source := known.get(identity)) is None:
            raise RuntimeError(f"plug-in {identity} was not sent here: --plugin names its file")
        if name in LOADED:
            unload(name)
        main = next(file for file, _ in source.files if Path(source.path).as_posix().endswith(file))
        folder = Path(source.path.removesuffix(main))
        with suppress(OSError, UnicodeDecodeError):
            if any((folder / file).read_text(encoding="utf-8") != text for file, text in source.files):
                raise FileNotFoundError
            _load(Loaded(source, folder, folder))
            continue
        folder = (paths.cache_dir or cache_dir()) / "plugins" / identity.replace(":", "-")
        write_source(source, folder)
        _load(Loaded(replace(source, path=str(folder / main)), folder, folder))


def write_source(source: Source, folder: Path) -> None:
    """Write a plug-in's files into a folder."""
    for name, text in source.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, text)
