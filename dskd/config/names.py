"""Names that are not known: what is allowed, the nearest one, and where else a key of that name stands."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from dskd.config.methods import MethodConfig


def unknown(what: str, name: str, allowed: Iterable[object], keys: Iterable[str] = ()) -> str:
    """One line on a name that is not among `allowed`; `keys` are all dotted keys of the file that it stands in."""
    names = [str(a) for a in allowed]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    elsewhere = [key for key in dict.fromkeys(keys) if key.endswith(f".{name}")]
    hint = f"; nearest: {nearest[0]}" if nearest else ""
    if elsewhere:
        hint = f"; did you mean {' or '.join(elsewhere)}?"
    return f"unknown {what}; allowed: {', '.join(names)}{hint}"


def keys_of(kind: type, path: str = "") -> Iterator[str]:
    """All dotted keys of a file of settings, those of every kind of method included."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        type_: Any = hints[field.name]
        inner = next((t for t in (type_, *get_args(type_)) if is_dataclass(t)), None)
        for section in MethodConfig.kinds.values() if inner is MethodConfig else [inner]:
            if isinstance(section, type):
                yield from keys_of(section, f"{path}{field.name}.")
            else:
                yield f"{path}{field.name}"
