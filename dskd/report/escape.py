"""Texts of runs as HTML shows them: names, settings, questions and answers are whatever somebody or a model wrote."""

import unicodedata
from html import escape

TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that let a text be read in another order than it has."""


def html(text: str) -> str:
    """A text between tags or inside of an attribute's quotes, where it is nothing but text."""
    return escape("".join(c if is_shown(c) else "\ufffd" for c in text))


def is_shown(character: str) -> bool:
    if character in "\n\t":
        return True
    return unicodedata.category(character) not in ("Cc", "Cs") and character not in TURNS
