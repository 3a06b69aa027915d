"""Every key of the run file with type, default and help, read from the dataclasses themselves."""

import ast
import inspect
import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dskd.config.load import to_plain
from dskd.config.methods import MethodConfig
from dskd.config.run import RunConfig


@dataclass(frozen=True)
class Setting:
    key: str
    """Dotted key as in the run file."""
    type: str
    default: str
    help: str


def list_settings(prefix: str = "", kind: type = RunConfig) -> list[Setting]:
    """All settings of a run file, or of another `kind` of file, whose key starts with `prefix`, in their order."""
    return [setting for setting in walk(kind) if setting.key.startswith(prefix)]


def walk(kind: type, path: str = "") -> Iterator[Setting]:
    hints, helps = get_type_hints(kind), field_help(kind)
    for field in fields(kind):
        key, type_ = f"{path}{field.name}", hints[field.name]
        inner = next((t for t in (type_, *get_args(type_)) if is_dataclass(t)), None)
        if inner is MethodConfig:
            yield Setting(f"{key}.kind", " | ".join(MethodConfig.kinds), "required", helps[field.name])
            for name, chosen in MethodConfig.kinds.items():
                yield from walk(chosen, f"{key}({name}).")
        elif isinstance(inner, type):
            yield from walk(inner, f"{key}.")
        else:
            yield Setting(key, type_name(type_), default_of(field), helps[field.name])


def default_of(field: Any) -> str:
    if field.default is MISSING and field.default_factory is MISSING:
        return "required"
    value = to_plain(field.default if field.default is not MISSING else field.default_factory())
    if value is None or value in ("", {}):
        return "empty"
    return str(value).lower() if isinstance(value, bool) else str(value)


@cache
def field_help(kind: type) -> dict[str, str]:
    """The string under each field, for a dataclass and the dataclasses it builds on."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if is_dataclass(base):
            body = ast.parse(inspect.getsource(base).strip()).body[0]
            assert isinstance(body, ast.ClassDef)
            for statement, after in zip(body.body, body.body[1:], strict=False):
                if (
                    isinstance(statement, ast.AnnAssign)
                    and isinstance(statement.target, ast.Name)
                    and isinstance(after, ast.Expr)
                    and isinstance(after.value, ast.Constant)
                ):
                    found[statement.target.id] = " ".join(str(after.value.value).split())
    return found


def type_name(kind: Any) -> str:
    """A field's type in words."""
    if get_origin(kind) in (Union, types.UnionType):
        inner = [type_name(k) for k in get_args(kind) if k is not type(None)]
        return f"{' or '.join(inner)} or empty"
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"list of {type_name(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"{type_name(get_args(kind)[1])} by name"
    names = {bool: "true | false", int: "whole number", float: "number", str: "text", Path: "path"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))
