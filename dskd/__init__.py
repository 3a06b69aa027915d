"""Distils a large language model into a small one, white-box, whatever the two vocabularies are."""

__version__ = "0.1.0"
