"""The one exception that stands for a user's mistake."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LONGEST = 600
"""Characters of a message; what a file holds may be far longer."""
MOST = 2**31 - 1
"""The largest number of steps, records, tokens or processes."""
LAST_SEED = 2**32 - 1


class UserError(ValueError):
    """Wrong input: one line that says what, where, and what is allowed. The command line prints it and exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message, LONGEST))


def one_line(text: str, longest: int) -> str:
    """A text without line breaks and what else does not print, and without its middle where it is too long."""
    if len(text) > longest:
        end = longest // 3
        text = f"{text[: longest - end - 5]} ... {text[-end:]}"
    if text.isprintable():
        return text
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return one_line(escaped, longest)


def shown(value: Any, longest: int = 120) -> str:
    """A value as an error shows it, whatever it is and holds."""
    try:
        return one_line(repr(value), longest)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list in thousands of lists
        return f"something too long to show ({type(value).__name__})"


def require(condition: bool, key: str, problem: str) -> None:
    """Raise `UserError("key: problem")` unless `condition` holds."""
    if not condition:
        raise UserError(f"{key}: {problem}")


def require_at_most(settings: object, highest: float, *keys: str) -> None:
    """Raise `UserError` for the first of these settings that is higher."""
    for key in keys:
        value = getattr(settings, key)
        require(value is None or value <= highest, key, f"must be at most {highest}, got {shown(value)}")


@contextmanager
def as_options() -> Iterator[None]:
    """Inside, what is wrong with a key is told of the option that stands for it: max_length is --max-length."""
    try:
        yield
    except UserError as error:
        key, colon, problem = str(error).partition(":")
        raise UserError(f"--{key.replace('_', '-')}{colon}{problem}") from None
