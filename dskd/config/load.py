"""YAML files with `extends` and `key=value` overrides -> RunConfig, and one line for whatever is wrong."""

import difflib
import io
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from cattrs import Converter
from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ForbiddenExtraKeysError,
    IterableValidationNote,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from dskd.config.errors import UserError
from dskd.config.methods import MethodConfig
from dskd.config.run import RunConfig

COMMAND_LINE = "command line"
T = TypeVar("T")


def load_run(file: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, what it extends, and the overrides of the command line; `load` says what is raised."""
    return load(file, RunConfig, overrides)


def load(file: Path, kind: type[T], overrides: Sequence[str] = ()) -> T:
    """Read a file of settings into the dataclass `kind`: a run file, a cluster profile.

    Raises:
        UserError: for anything wrong, in one line: file, key, what is allowed, nearest name.
    """
    values, origins = read_layers(file)
    for override in overrides:
        key, value = parse_override(override)
        merge(values, nest(key, value), COMMAND_LINE, origins)
    return structure(values, origins, str(file), kind)


def override(run: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A run with some settings changed. Raises `UserError`."""
    values: dict[str, Any] = to_plain(run)
    origins: dict[str, str] = {}
    for text in overrides:
        key, value = parse_override(text)
        merge(values, nest(key, value), COMMAND_LINE, origins)
    return structure(values, origins, "run.yaml", RunConfig)


def read_layers(file: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """The nested values of a YAML file over those it extends, and for each dotted key the file that set it."""
    if file.resolve() in [earlier.resolve() for earlier in seen]:
        raise UserError(f"{file}: extends: goes in a circle ({' -> '.join(map(str, (*seen, file)))})")
    values = read_yaml(file)
    parent = values.pop("extends", None)
    if parent is not None and not isinstance(parent, str):
        raise UserError(f"{file}: extends: one file name is expected, got {parent!r}")
    base, origins = read_layers(file.parent / parent, (*seen, file)) if parent else ({}, {})
    merge(base, values, str(file), origins)
    return base, origins


def read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = YAML(typ="safe", pure=True).load(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: a mapping of keys to values is expected")
    return text_keys(values)


def text_keys(values: dict[Any, Any]) -> dict[str, Any]:
    """Keys that YAML takes for numbers or lists become text, and are then unknown like any other wrong key."""
    return {str(key): text_keys(value) if isinstance(value, dict) else value for key, value in values.items()}


def parse_override(text: str) -> tuple[str, Any]:
    """`train.lr=1e-4` -> ("train.lr", 0.0001)."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{COMMAND_LINE}: {text!r}: key=value is expected, for example train.lr=1e-4")
    try:
        return key, YAML(typ="safe", pure=True).load(value)
    except YAMLError:
        raise UserError(f"{COMMAND_LINE}: {key}: {value!r} is not a YAML value") from None


def nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def merge(
    base: dict[str, Any], over: Mapping[str, Any], origin: str, origins: dict[str, str], prefix: str = ""
) -> None:
    """Lay `over` on `base` in place, key by key, and note where each value came from."""
    if not prefix and isinstance(over.get("method"), dict) and isinstance(base.get("method"), dict):
        # Another kind of method has other keys: nothing of the old one's settings that it lacks may leak into it.
        kind = over["method"].get("kind", base["method"].get("kind"))
        if kind != base["method"].get("kind") and isinstance(kind, str) and kind in MethodConfig.kinds:
            known = {f.name for f in fields(MethodConfig.kinds[kind])}
            base["method"] = {k: v for k, v in base["method"].items() if k in known}
    for key, value in over.items():
        origins[f"{prefix}{key}"] = origin
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value, origin, origins, f"{prefix}{key}.")
        elif isinstance(value, dict):
            base[key] = {}
            merge(base[key], value, origin, origins, f"{prefix}{key}.")
        else:
            base[key] = value


def structure(values: dict[str, Any], origins: Mapping[str, str], file: str, kind: type[T]) -> T:
    """Nested values -> `kind`. `origins` names the file of each dotted key, `file` the one for keys of no file."""
    try:
        return converter().structure(values, kind)
    except (BaseValidationError, UserError) as error:
        key, problem = next(problems(error))
        full = [key[:end] for end in range(len(key), 0, -1)]
        origin = next((origins[".".join(part)] for part in full if ".".join(part) in origins), file)
        raise UserError(f"{origin}: {'.'.join(key)}: {problem}" if key else f"{origin}: {problem}") from None


def problems(error: BaseException, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each leaf of a cattrs error as (key, problem)."""
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            key = (*key, note.name)
        elif isinstance(note, IterableValidationNote) and isinstance(note.index, str):
            key = (*key, note.index)
    if isinstance(error, BaseValidationError):
        for inner in error.exceptions:
            yield from problems(inner, key)
    elif isinstance(error, ForbiddenExtraKeysError):
        allowed = sorted(f.name for f in fields(error.cl))
        if issubclass(error.cl, MethodConfig):
            allowed = ["kind", *allowed]
        for extra in sorted(error.extra_fields):
            yield (*key, extra), unknown("key", extra, allowed)
    elif isinstance(error, KeyError):
        yield key, "is missing"
    elif isinstance(error, UserError):
        name, colon, problem = str(error).partition(": ")
        yield ((*key, *name.split(".")), problem) if colon else (key, name)
    else:
        yield key, str(error)


def unknown(what: str, name: str, allowed: Iterable[object]) -> str:
    """One line on a name that is not among `allowed`."""
    names = [str(a) for a in allowed]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; nearest: {nearest[0]}" if nearest else ""
    return f"unknown {what}; allowed: {', '.join(names)}{hint}"


def converter() -> Converter:
    """Strict: a number is no string, true is no number, 1.5 is no integer, and every key must be known."""
    strict = Converter(forbid_extra_keys=True)
    for kind, accepted, name in (
        (bool, (bool,), "true or false"),
        (int, (int,), "a whole number"),
        (float, (int, float), "a number"),
        (str, (str,), "text"),
    ):
        strict.register_structure_hook(kind, exactly(kind, accepted, name))
    strict.register_structure_hook(Path, lambda value, _: Path(exactly(str, (str,), "a path")(value, str)).absolute())
    strict.register_structure_hook_func(lambda t: origin_is(t, Literal), literal)
    strict.register_structure_hook_func(
        lambda t: origin_is(t, tuple),
        lambda value, t: tuple(strict.structure(v, get_args(t)[0]) for v in listed(value)),
    )
    strict.register_structure_hook_func(lambda t: is_dataclass(t) and t is not MethodConfig, mapping(strict))
    strict.register_structure_hook_func(lambda t: t is MethodConfig, lambda value, _: method(strict, value))
    return strict


def origin_is(kind: Any, origin: Any) -> bool:
    return get_origin(kind) is origin


def exactly(kind: type, accepted: tuple[type, ...], name: str) -> Any:
    def hook(value: Any, _: type) -> Any:
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{name} is expected, got {value!r}")
        if isinstance(value, str) and not all(map(is_plain, value)):
            raise ValueError(f"{name} without line breaks and control characters is expected, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is expected, got {value}")
        return kind(value)

    return hook


def is_plain(character: str) -> bool:
    """Whether a character can stand in a line of a script or a log: no control character, no line break of Unicode."""
    return unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")


def literal(value: Any, kind: Any) -> Any:
    allowed = get_args(kind)
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        raise ValueError(unknown(f"value {value!r}", str(value), allowed))
    return value


def listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"a list is expected, got {value!r}")
    return value


def mapping(strict: Converter) -> Any:
    """Wrap cattrs' own dataclass hook, which answers a text where a section belongs with an obscure error."""

    def hook(value: Any, kind: type) -> Any:
        if not isinstance(value, dict):
            raise TypeError(f"a section with keys is expected, got {value!r}")
        return strict.gen_structure_attrs_fromdict(kind)(value, kind)

    return hook


def method(strict: Converter, value: Any) -> MethodConfig:
    if not isinstance(value, dict):
        raise TypeError(f"a section with keys is expected, got {value!r}")
    kind = value.get("kind")
    kinds = MethodConfig.kinds
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"kind: {unknown(f'method {kind!r}', str(kind), sorted(kinds))}")
    chosen: MethodConfig = strict.structure({k: v for k, v in value.items() if k != "kind"}, kinds[kind])
    return chosen


def to_plain(value: Any) -> Any:
    """A dataclass of the run file as plain YAML/JSON values; the inverse of `structure`."""
    if isinstance(value, MethodConfig):
        return {"kind": value.kind} | {k: to_plain(v) for k, v in asdict(value).items()}
    if is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [to_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def to_yaml(settings: object) -> str:
    """Resolved settings, a run file or a cluster profile, as YAML."""
    text = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = False  # escapes: some line breaks of Unicode would not come back as they went
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(to_plain(settings), text)
    return text.getvalue()


def parse_seeds(text: str) -> list[int]:
    """ "10 20" or "10,20" -> [10, 20]."""
    try:
        seeds = [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds: different whole numbers are expected, got {text!r}")
    return seeds
