"""Mistakes that the tests must notice: one line of the project that says something else, and where that shows."""

from mutants.around import AROUND
from mutants.training import TRAINING

MUTANTS = (*TRAINING, *AROUND)
