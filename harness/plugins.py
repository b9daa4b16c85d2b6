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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
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
from harness.spec import RunPaths, RunSpec, Source, UserError, at_home, check_word
from harness.training.recipe import AUGMENTATIONS, CAPTURABLE, OPTIMIZERS, SCHEDULES

GROUP = "resnet_harness.plugins"
TABLES: dict[str, dict[str, Any]] = {
    "network": NETWORKS, "variant": VARIANTS, "dataset": DATASETS, "loader": LOADERS, "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES, "augmentation": AUGMENTATIONS,
}  # fmt: skip
"""Everything that has a name: where it is looked up. A file lists its own as NETWORKS = {name: function}, and so on."""
PRIVATE = "harness_plugin_{}"
"""The module of a plug-in's file, by its name."""
NAMED = {
    "architecture": "network", "optimizer": "optimizer", "schedule": "schedule", "augmentations": "augmentation",
}  # fmt: skip
"""Fields of recipe and network that name something: of which table."""
LISTS = {f"{kind.upper()}S": kind for kind in TABLES}


class PluginError(UserError):
    """A plug-in that cannot be used: file, line, and what is wrong."""


def place(file: str, line: int | None = 1) -> str:
    """ "my.py:12", from the current folder where it is below it."""
    path, here = Path(file), Path.cwd()
    return f"{path.relative_to(here) if path.is_relative_to(here) else path}:{line}"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A plug-in of this process."""

    source: Source
    owned: dict[tuple[str, str], Note] = field(default_factory=dict)  # by kind and name

    @property
    def modules(self) -> dict[str, str]:
        """What it is made of, and their files. A file of its own has a name that no import finds."""
        found, source = {}, self.source
        for file, _ in source.files:
            name = ".".join(Path(file).with_suffix("").parts).removesuffix(".__init__")
            private = file == source.main and not source.module
            found[PRIVATE.format(source.name) if private else name] = str(Path(source.folder, file))
        return found

    def explain(self, error: BaseException, where: str) -> PluginError:
        """By the innermost line of the plug-in's own, or else `where`."""
        if isinstance(error, PluginError):
            return error
        files = set(self.modules.values())
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, SyntaxError) and error.filename in files:
            where, text = place(error.filename, error.lineno), f"syntax error: {error.msg}"
        elif frames:
            where = place(frames[-1].filename, frames[-1].lineno)
            text = f"{type(error).__name__}: {text}"
        return PluginError(f"{where}: {text}")


LOADED: dict[str, Loaded] = {}
"""By name."""


# --- what a run uses ---


def names_in(part: Recipe | Network) -> list[tuple[str, str]]:
    """What a recipe or network looks up: kind and name."""
    named = [(kind, getattr(part, field)) for field, kind in NAMED.items() if hasattr(part, field)]
    return [(kind, name) for kind, names in named for name in ([names] if isinstance(names, str) else names)]


def names_of(spec: RunSpec) -> list[tuple[str, str]]:
    """Everything that a run looks up: kind and name."""
    return [*names_in(spec.network), ("dataset", spec.dataset), ("loader", spec.loader), *names_in(spec.recipe)]


def used_by(names: Iterable[tuple[str, str]]) -> list[Loaded]:
    """The plug-ins that these kinds and names are of."""
    wanted = set(names)
    return [loaded for _, loaded in sorted(LOADED.items()) if wanted & loaded.owned.keys()]


def identify(spec: RunSpec) -> RunSpec:
    """The run with the plug-ins that it uses. Raises UserError where it names what is not there."""
    for kind, name in names_of(spec):
        if kind == "dataset" and ":" in name:  # a folder
            continue
        if spec.plugins and name not in TABLES[kind]:
            owner = " or ".join(spec.plugins)
            raise UserError(f"{kind} {name!r} of {spec.title} is of plug-in {owner}: --plugin names its file")
        check_word(name, TABLES[kind], kind)
    return replace(spec, plugins=tuple(loaded.source.identity for loaded in used_by(names_of(spec))))


@contextmanager
def blaming(kind: str, name: str) -> Iterator[None]:
    """What is raised inside is raised as PluginError, with a line of the plug-in, where the name is of one."""
    try:
        yield
    except Exception as error:
        for loaded in used_by([(kind, name)]):
            note = loaded.owned[kind, name]
            where = f"{place(note.file, note.line)}: {kind} {name!r}"
            raise loaded.explain(error, where) from None
        raise


def makers(names: Iterable[tuple[str, str]]) -> list[Callable[..., Any]]:
    """The functions of these kinds and names, whose own fields `Recipe.extra` and `Network.extra` hold."""
    made = [TABLES[kind][name] for kind, name in names if name in TABLES[kind]]
    return [getattr(each, "make", each) for each in made]


def own_values(part: Recipe | Network) -> dict[str, Any]:
    """The fields of plug-ins' own that it has, by name."""
    own = (own_fields(make) for make in makers(names_in(part)))
    defaults = {name: default for fields in own for name, (_, default) in fields.items()}
    return defaults | {name: value for name, value in variants.read_extra(part.extra).items() if name in defaults}


def own_hints() -> dict[str, Any]:
    """The types of all fields that networks, optimizers, schedules and augmentations have of their own, by name."""
    every = [(kind, name) for kind in NAMED.values() for name in TABLES[kind]]
    return {name: hint for make in makers(every) for name, (hint, _) in own_fields(make).items()}


# --- loading ---


def load_plugins(paths: Iterable[str | Path] = ()) -> None:
    """Load installed plug-ins and these files, each once, again where a file has changed; those that build on others after
    them. Raises UserError."""
    for entry in entry_points(group=GROUP):
        if entry.name not in LOADED:
            _load_installed(entry)
    waiting = [Path(path) for path in paths]
    while waiting:
        faults = list[str]()
        for path in waiting:
            try:
                load_file(path)
                break
            except PluginError as error:
                faults.append(str(error))
        else:
            raise PluginError("; ".join(faults))
        waiting.remove(path)


def load_file(path: Path) -> Loaded:
    """Import a file as a plug-in of its name. Raises PluginError."""
    file = at_home(path).absolute()
    if file.suffix != ".py" or not file.is_file():
        raise PluginError(f"plug-in {path}: {'a Python file is needed' if file.exists() else 'no such file'}")
    source = Source(name=file.stem, folder=str(file.parent), main=file.name, files=((file.name, ""),))
    try:
        files = collect(file)
    except (OSError, ValueError, SyntaxError) as error:  # ValueError: not UTF-8
        raise Loaded(source).explain(error, place(source.path)) from None
    return _load(replace(source, files=files))


def _load_installed(entry: EntryPoint) -> Loaded:
    """A package's plug-in: a module of it that notes or lists, with all of the package's files."""
    found = find_spec(entry.module.partition(".")[0])
    if found is None or found.origin is None:
        raise PluginError(f"plug-in {entry.name} of the installed packages: module {entry.module} is not there")
    origin, package = Path(found.origin), bool(found.submodule_search_locations)
    folder = origin.parent.parent if package else origin.parent
    paths = sorted(origin.parent.rglob("*.py")) if package else [origin]
    files = tuple((path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")) for path in paths)
    main = origin.relative_to(folder).as_posix()
    source = Source(name=entry.name, folder=str(folder), main=main, files=files, module=entry.module)
    return _load(source)


def _load(source: Source) -> Loaded:
    """Execute a plug-in and enter all that it has, or nothing of it; one that is loaded already is kept."""
    loaded, where = Loaded(source), place(source.path)
    if known := LOADED.get(source.name):
        if known.source.identity == source.identity:
            return known
        if known.source.path != source.path:
            raise PluginError(f"{where}: another plug-in has this name, {known.source.path}: rename one")
        unload(source.name)
    for name, file in loaded.modules.items():
        if name in sys.modules and (other := getattr(sys.modules[name], "__file__", None)) != file:
            raise PluginError(f"{file}: a module {name} is imported already, of {other or 'Python'}: rename one")
    if source.folder not in sys.path:
        sys.path.insert(0, source.folder)
    importlib.invalidate_caches()
    LOADED[source.name] = loaded
    try:
        module = _execute(source)
        taken = [note for other in LOADED.values() for note in other.owned.values()]  # of a module that two import
        notes = [note for note in NOTES if note.file in loaded.modules.values() and note not in taken]
        for note in [*notes, *_read_lists(loaded, module)]:
            where = place(note.file, note.line)
            _enter(loaded, note)
        for (kind, name), note in loaded.owned.items():
            if kind == "variant":
                where = f"{place(note.file, note.line)}: variant {name!r}"
                _check_variant(name)
        if not loaded.owned:
            raise UserError("it registers nothing, by `from harness import plugin` or by a list")
    except (Exception, SystemExit) as error:
        unload(source.name)
        raise loaded.explain(error, where) from None
    return loaded


def _execute(source: Source) -> ModuleType:
    if source.module:
        return importlib.import_module(source.module)
    name = PRIVATE.format(source.name)
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = source.path
    text = dict(source.files)[source.main]  # what the hash is of
    exec(compile(text, source.path, "exec"), module.__dict__)
    return module


def unload(name: str) -> None:
    """Take a plug-in's entries back, and its modules, so that it can be loaded again."""
    loaded = LOADED.pop(name)
    for kind, entry in loaded.owned:
        TABLES[kind].pop(entry, None)
        if kind == "variant":
            ROWS.pop(entry, None)
        if kind == "optimizer":
            CAPTURABLE.discard(entry)
    NOTES[:] = [note for note in NOTES if note.file not in loaded.modules.values()]
    for module in loaded.modules:
        sys.modules.pop(module, None)


def _read_lists(loaded: Loaded, module: ModuleType) -> Iterator[Note]:
    """What a module lists itself: a list that it imports is another's."""
    file = Path(str(module.__file__))
    text = dict(loaded.source.files)[file.relative_to(loaded.source.folder).as_posix()]
    for node in ast.parse(text).body:
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            word = getattr(target, "id", "")
            if (kind := LISTS.get(word)) is None:
                continue
            if not isinstance(listed := getattr(module, word), Mapping):
                raise PluginError(f"{place(str(file), node.lineno)}: {word} is no dictionary of names")
            for name, made in listed.items():
                row = dict(made) if kind == "variant" else {}
                yield Note(kind, name, made, str(file), node.lineno, row)


# --- entering ---


def _enter(loaded: Loaded, note: Note) -> None:
    """Check a note and put it into its table; with a network, its variant. Raises UserError."""
    kind, name, options = note.kind, note.name, note.options
    if name in TABLES[kind]:
        others = [owner.owned[kind, name] for owner in used_by([(kind, name)])]
        by = f"by {place(others[0].file, others[0].line)}" if others else "built in"
        raise UserError(f"{kind} {name!r} is registered already, {by}")
    loaded.owned[kind, name] = note
    if kind == "variant":
        if options.get("base") not in ROWS:
            raise UserError(f"variant {name!r}: base {options.get('base')!r} is no variant")
        ROWS[name] = {"source": Path(note.file).name, "summary": name, **options}
        VARIANTS[name] = variants.make_variant(name, ROWS)
        return
    _check_parameters(note)
    if kind == "network":
        _enter(loaded, replace(note, kind="variant", options=_enter_network(note, **options)))
    elif kind == "dataset":
        DATASETS[name] = partial(load_own, partial(call, note.made), **options)
    else:
        TABLES[kind][name] = note.made
        CAPTURABLE.update([name] * options.get("capturable", False))


def _enter_network(
    note: Note, depth: int | None = None, smallest_image: int = 1, row: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A network; the row of its variant, whose recipe is he2015's but for `row`."""
    parameter = parameters_of(note.made).get("depth")
    default = depth if depth is not None else 0 if parameter is None else parameter.default
    if not isinstance(default, int):
        raise UserError(f"network {note.name!r} needs a default depth: depth=20, say")
    depths = (default,) if parameter is None else ()
    read: dict[str, Any] = {} if "network" in parameters_of(note.made) else {"reads": {}}
    made = variants.Architecture(make=note.made, smallest_image=smallest_image, depths=depths, **read)
    NETWORKS[note.name] = made
    summary = (inspect.getdoc(note.made) or note.name).splitlines()[0]
    own = {"base": "he2015", "architecture": note.name, "depth": default, "summary": summary}
    return own | dict(row or {})


def _check_variant(name: str) -> None:
    """Once all of a file is entered: whether a variant's fields are there, of the types that they have."""
    variant = VARIANTS[name]()  # type: ignore[call-arg]
    for kind, word in names_in(variant.recipe):
        check_word(word, TABLES[kind], kind)
    for word in variants.read_extra(variant.recipe.extra):
        check_word(word, [*variants.OF_RECIPE, *own_values(variant.recipe)], "field")
    try:
        for part in (variant.network, variant.recipe):
            TypeAdapter(type(part)).validate_python(asdict(part))
    except ValidationError as error:
        raise UserError(f"{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from None


def _check_parameters(note: Note) -> None:
    """Whether what is noted can be called as its kind is. Raises UserError."""
    what = f"{note.kind} {note.name!r}"
    if not callable(note.made):
        raise UserError(f"{what} is no function or class but {note.made!r}"[:200])
    parameters = parameters_of(note.made)
    filled = variants.FILLED.get(note.kind, set(parameters))
    for name, p in parameters.items():
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in filled:
            allowed = ", ".join(sorted(filled - variants.OF_RECIPE))
            raise UserError(f"{what}: nothing fills its parameter {name}: it needs a default (filled: {allowed})")
    known = own_hints()
    for name, (hint, _) in own_fields(note.made).items():
        if name in variants.OF_NETWORK or known.get(name, hint) != hint:
            raise UserError(f"{what}: its field {name} has the name of a field of another meaning: rename it")


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
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            base = list[str]()
            if isinstance(node, ast.ImportFrom):
                base += inside.parts[: -node.level] if node.level else ()
                base += node.module.split(".") if node.module else ()
            for alias in node.names:
                parts = [*base, *alias.name.split(".")]
                for n in range(1, len(parts) + 1) if parts[0] != "harness" else ():
                    end = root.joinpath(*parts[:n])
                    waiting += [p for p in (end.with_suffix(".py"), end / "__init__.py") if p.is_file()]
    return tuple(sorted(found.items()))


def sources() -> tuple[Source, ...]:
    """Of all plug-ins of this process."""
    return tuple(loaded.source for loaded in LOADED.values())


def needed_by(identities: Sequence[str], sent: Sequence[Source]) -> Sequence[Source]:
    """These plug-ins and those loaded before them, on which they may build."""
    return sent[: max((n for n, source in enumerate(sent, 1) if source.identity in identities), default=0)]


def load_sources(identities: Sequence[str], paths: RunPaths) -> None:
    """In any process: load these plug-ins and those that they may build on, from their own files where they are the same
    here, or else from a copy in the cache. Raises RuntimeError for one that was not sent."""
    needed = needed_by(identities, paths.plugins)
    if missing := set(identities) - {source.identity for source in (*needed, *sources())}:
        raise RuntimeError(f"plug-in {min(missing)} was not sent here: --plugin names its file")
    for source in needed:
        if source.name in LOADED and LOADED[source.name].source.identity == source.identity:
            continue
        if source.name in LOADED:
            unload(source.name)
        try:
            same = all(Path(source.folder, file).read_text("utf-8") == text for file, text in source.files)
        except (OSError, UnicodeDecodeError):
            same = False
        if not same:
            copy = (paths.cache_dir or cache_dir()) / "plugins" / source.identity.replace(":", "-")
            write_source(source, copy)
            source = replace(source, folder=str(copy))
        _load(source)


def kept_files(folder: Path) -> list[Path]:
    """The plug-ins' files in a run's folder, of those that are no packages."""
    return [path for path in sorted(folder.glob("plugins/*/*.py")) if path.stem == path.parent.name]


def write_source(source: Source, folder: Path) -> None:
    """Write a plug-in's files into a folder."""
    for name, text in source.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, text)
