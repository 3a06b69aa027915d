"""YAML files with `extends` and `key=value` overrides -> RunConfig, and one line for whatever is wrong."""

import io
import math
import os
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent

from dskd.config.errors import LAST_SEED, UserError, shown
from dskd.config.hub import find_model
from dskd.config.methods import MethodConfig
from dskd.config.models import ModelPath
from dskd.config.names import keys_of, unknown
from dskd.config.run import RunConfig

COMMAND_LINE = "command line"
BYTES, NODES, DEPTH, FILES = 1_000_000, 20_000, 32, 32
"""Limits of a YAML file: its size, its values once aliases are followed, their depth, and the files that it extends."""
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
    if os.path.realpath(file) in map(os.path.realpath, seen):
        raise UserError(f"{file}: extends: goes in a circle ({' -> '.join(map(str, (*seen, file)))})")
    if len(seen) > FILES:
        raise UserError(f"{file}: extends: at most {FILES} files over each other are allowed")
    values = read_yaml(file)
    parent = values.pop("extends", None)
    if parent is not None and not (isinstance(parent, str) and all(map(is_plain, parent))):
        raise UserError(f"{file}: extends: one file name is expected, got {shown(parent)}")
    base, origins = read_layers(file.parent / parent, (*seen, file)) if parent else ({}, {})
    merge(base, values, str(file), origins)
    return base, origins


def read_yaml(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as text:
            values = parse_yaml(text.read(BYTES + 1))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: a mapping of keys to values is expected")
    return text_keys(values)


def parse_yaml(text: bytes | str) -> Any:
    """What a YAML text holds. Raises `ValueError` where it is broken, or larger than a file of settings can be."""
    if len(text) > BYTES:
        raise ValueError(f"more than {BYTES} bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of anchors that are used twice, in several lines
        try:
            events = iter(YAML(typ="safe", pure=True).parse(text))
            for event in events:
                size_of(event, events, {})
            return YAML(typ="safe", pure=True).load(text)
        except Exception as error:  # a number, date or key that Python refuses comes as whatever Python raised
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def size_of(event: Any, events: Iterator[Any], anchors: dict[str, tuple[int, int]], level: int = 0) -> tuple[int, int]:
    """Number and depth of the values that begin with `event`, with what aliases stand for counted as often as used."""
    if isinstance(event, AliasEvent):
        if event.anchor not in anchors:
            raise ValueError(f"*{event.anchor} stands for nothing, or for what it is a part of")
        return anchors[event.anchor]
    nodes = depth = int(isinstance(event, NodeEvent))
    if isinstance(event, CollectionStartEvent) and level < DEPTH:
        while not isinstance(inner := next(events), CollectionEndEvent):
            more, deep = size_of(inner, events, anchors, level + 1)
            nodes, depth = nodes + more, max(depth, deep + 1)
            if nodes > NODES:
                break
    if nodes > NODES or level + depth > DEPTH:
        raise ValueError(f"more than {NODES} values, or values in more than {DEPTH} others")
    if getattr(event, "anchor", None):
        anchors[event.anchor] = nodes, depth
    return nodes, depth


def text_keys(values: dict[Any, Any]) -> dict[str, Any]:
    """Keys that YAML takes for numbers or lists become text, and are then unknown like any other wrong key."""
    return {str(key): text_keys(value) if isinstance(value, dict) else value for key, value in values.items()}


def parse_override(text: str) -> tuple[str, Any]:
    """`train.lr=1e-4` -> ("train.lr", 0.0001)."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{COMMAND_LINE}: {text!r}: key=value is expected, for example train.lr=1e-4")
    if key.count(".") > DEPTH:
        raise UserError(f"{COMMAND_LINE}: {key}: a key of at most {DEPTH} parts is expected")
    try:
        return key, parse_yaml(value)
    except ValueError:
        raise UserError(f"{COMMAND_LINE}: {key}: {shown(value)} is not a YAML value") from None


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
        key, problem = next(problems(error, kind))
        if "environment" in key[:-1]:
            problem = problem.partition(", got ")[0]  # the value of an environment variable may be a secret
        full = [key[:end] for end in range(len(key), 0, -1)]
        origin = next((origins[".".join(part)] for part in full if ".".join(part) in origins), file)
        raise UserError(f"{origin}: {'.'.join(key)}: {problem}" if key else f"{origin}: {problem}") from None


def problems(error: BaseException, kind: type, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each leaf of a cattrs error as (key, problem); `kind` is what the whole file should have been."""
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            key = (*key, note.name)
        elif isinstance(note, IterableValidationNote) and isinstance(note.index, str):
            key = (*key, note.index)
    if isinstance(error, BaseValidationError):
        for inner in error.exceptions:
            yield from problems(inner, kind, key)
    elif isinstance(error, ForbiddenExtraKeysError):
        allowed = sorted(f.name for f in fields(error.cl))
        if issubclass(error.cl, MethodConfig):
            allowed = ["kind", *allowed]
        for extra in sorted(error.extra_fields):
            yield (*key, extra), unknown("key", extra, allowed, keys_of(kind))
    elif isinstance(error, KeyError):
        yield key, "is missing"
    elif isinstance(error, UserError):
        name, colon, problem = str(error).partition(": ")
        yield ((*key, *name.split(".")), problem) if colon else (key, name)
    else:
        yield key, str(error)


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
    strict.register_structure_hook(Path, path)
    strict.register_structure_hook_func(lambda t: t == ModelPath, lambda value, t: find_model(path(value, t)))
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
            raise TypeError(f"{name} is expected, got {shown(value)}")
        if isinstance(value, str) and not all(map(is_plain, value)):
            raise ValueError(f"{name} without line breaks and control characters is expected, got {shown(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is expected, got {value}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} of at most 64 bits is expected, got {shown(value)}")
        return kind(value)

    return hook


def path(value: Any, _: type) -> Path:
    """Absolute; ~ is the home folder, which a shell leaves alone in the middle of a word."""
    typed: str = exactly(str, (str,), "a path")(value, str)
    found = Path(os.path.expanduser(typed)).absolute()  # noqa: PTH111 (Path raises where there is no such user)
    if len(os.fsencode(found)) > 1024 or any(len(os.fsencode(part)) > 255 for part in found.parts):
        raise ValueError(f"a path of at most 1024 bytes, 255 for each name, is expected, got {shown(value)}")
    return found


def is_plain(character: str) -> bool:
    """Whether a character can stand in a line of a script or a log: no control character, no line break of Unicode."""
    return unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")


def literal(value: Any, kind: Any) -> Any:
    allowed = get_args(kind)
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        raise ValueError(unknown(f"value {shown(value)}", shown(value), allowed))
    return value


def listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"a list is expected, got {shown(value)}")
    return value


def mapping(strict: Converter) -> Any:
    """Wrap cattrs' own dataclass hook, which answers a text where a section belongs with an obscure error."""

    def hook(value: Any, kind: type) -> Any:
        if not isinstance(value, dict):
            raise TypeError(f"a section with keys is expected, got {shown(value)}")
        return strict.gen_structure_attrs_fromdict(kind)(value, kind)

    return hook


def method(strict: Converter, value: Any) -> MethodConfig:
    if not isinstance(value, dict):
        raise TypeError(f"a section with keys is expected, got {shown(value)}")
    kind = value.get("kind")
    kinds = MethodConfig.kinds
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"kind: {unknown(f'method {shown(kind)}', shown(kind), sorted(kinds))}")
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
    yaml.width = 2**20  # no folded lines: a space where one was folded would not come back as it went
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
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed <= LAST_SEED for seed in seeds):
        raise UserError(f"--seeds: different whole numbers are expected, 0 to {LAST_SEED}, got {shown(text)}")
    return seeds
