"""How near a student came to its teacher, as analysis.json holds it: written by `dskd analyze`, read by reports."""

from dataclasses import asdict, dataclass
from pathlib import Path

import cattrs

from dskd.config.errors import UserError
from dskd.rundir.files import read_json, write_json
from dskd.rundir.layout import analysis_of

LARGEST = 1e12
"""No distance is larger."""
MEASURES = {
    "cosine": "structure, cosine",
    "inner_product": "structure, inner product",
    "forward_kl": "forward KL",
    "js_divergence": "JS divergence",
}
"""By their names in the file; `dskd.analyze` says what they are."""


@dataclass(frozen=True)
class Spread:
    """A measure over records: its mean and quartiles."""

    mean: float
    low: float
    middle: float
    high: float

    def __post_init__(self) -> None:
        if not all(abs(value) <= LARGEST for value in (self.mean, self.low, self.middle, self.high)):
            raise ValueError("a finite distance is expected")


@dataclass(frozen=True)
class Compared:
    """One student beside the teacher."""

    model: str
    cosine: Spread
    inner_product: Spread
    forward_kl: Spread | None
    """This and the next one: of two models with one vocabulary alone."""
    js_divergence: Spread | None

    def measures(self) -> dict[str, Spread]:
        """Those that there are, by their titles."""
        found = {title: getattr(self, name) for name, title in MEASURES.items()}
        return {title: value for title, value in found.items() if value is not None}


@dataclass(frozen=True)
class Analysis:
    teacher: str
    data: str
    records: int
    """Those with two tokens at least to be compared."""
    tokens: int
    aligned: bool
    """Whether the vocabularies differ, so that only aligned tokens are compared."""
    after: Compared
    before: Compared | None
    """The model that the student was; None where only a model was given."""


def read_analysis(folder: Path) -> Analysis | None:
    """The analysis of a run or of a model; None where there is none. Raises `UserError` where it is damaged."""
    file = analysis_of(folder)
    found = read_json(file)
    try:
        return None if found is None else cattrs.structure(found, Analysis)
    except (cattrs.BaseValidationError, TypeError, ValueError, KeyError):
        raise UserError(f"{file}: is damaged: no analysis that `dskd analyze` wrote") from None


def write_analysis(folder: Path, analysis: Analysis) -> None:
    write_json(analysis_of(folder), asdict(analysis))
