"""Settings of the training methods: one frozen dataclass for each `method.kind`.

A subclass of `MethodConfig` registers itself under its kind, so that a method defined elsewhere is found as well.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from dskd.config.errors import require

Divergence = Literal[
    "forward_kl", "reverse_kl", "js_divergence", "skewed_forward_kl", "skewed_reverse_kl", "adaptive_kl"
]
TeacherNeed = Literal["none", "same_vocabulary", "any"]
Alignment = Literal["none", "exact", "minimum_edit"]


@dataclass(frozen=True)
class MethodConfig:
    """What every method has: its kind, the teacher it needs, and how it aligns the tokens of two vocabularies."""

    kinds: ClassVar[dict[str, type["MethodConfig"]]] = {}
    kind: ClassVar[str]
    teacher: ClassVar[TeacherNeed]
    alignment: ClassVar[Alignment]

    label_smoothing: float = 0.0
    """Share of the label's probability that cross-entropy spreads evenly over the vocabulary."""

    def __init_subclass__(
        cls, kind: str | None = None, teacher: TeacherNeed = "none", alignment: Alignment = "none"
    ) -> None:
        if kind is not None:
            cls.kind, cls.teacher, cls.alignment = kind, teacher, alignment
            MethodConfig.kinds[kind] = cls

    def __post_init__(self) -> None:
        require(0 <= self.label_smoothing < 1, "label_smoothing", f"must be in [0, 1), got {self.label_smoothing}")


@dataclass(frozen=True)
class SftConfig(MethodConfig, kind="sft", teacher="none"):
    """Supervised fine-tuning: cross-entropy on the response."""


@dataclass(frozen=True)
class TeacherMethodConfig(MethodConfig):
    """Settings that all methods with a teacher share."""

    kd_rate: float = 0.5
    """Weight of distillation; cross-entropy has 1 - kd_rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.kd_rate <= 1, "kd_rate", f"must be in [0, 1], got {self.kd_rate}")


@dataclass(frozen=True)
class UldConfig(TeacherMethodConfig, kind="uld", teacher="any"):
    """Universal logit distillation: distance of the sorted probabilities (arXiv 2402.12030)."""


@dataclass(frozen=True)
class DistillationConfig(TeacherMethodConfig):
    """Settings of the methods that take a distance between two distributions."""

    divergence: Divergence = "forward_kl"
    """Distance between the student's and the teacher's distribution."""
    temperature: float = 2.0
    """Divides both sides' logits before the distance is taken."""
    teacher_temperature: float = 1.0
    """Divides the teacher's logits once more."""
    skew: float = 0.1
    """Share of the other distribution in skewed_forward_kl and skewed_reverse_kl."""
    adaptive_alpha: float = 0.5
    """Probability mass that counts as the head of the teacher's distribution in adaptive_kl."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("temperature", "teacher_temperature"):
            require(getattr(self, key) > 0, key, f"must be above 0, got {getattr(self, key)}")
        for key in ("skew", "adaptive_alpha"):
            require(0 < getattr(self, key) < 1, key, f"must be in (0, 1), got {getattr(self, key)}")


@dataclass(frozen=True)
class KdConfig(DistillationConfig, kind="kd", teacher="same_vocabulary"):
    """Vanilla distillation: distance of the two distributions over one shared vocabulary."""


@dataclass(frozen=True)
class MinedConfig(DistillationConfig, kind="mined", teacher="any", alignment="minimum_edit"):
    """Logit alignment by minimum edit distance, of tokens and of sequences (FuseLLM, arXiv 2401.10491)."""


@dataclass(frozen=True)
class DualSpaceConfig(DistillationConfig):
    """Settings of the methods with projectors between the two models' hidden states."""

    projectors_only: bool = False
    """Train the projectors alone, with the student frozen."""
    projectors_from: Path | None = None
    """A saved model whose projectors to begin with."""


@dataclass(frozen=True)
class DskdConfig(DualSpaceConfig, kind="dskd", teacher="same_vocabulary"):
    """Dual-space distillation for one vocabulary (arXiv 2406.17328, section 3.2)."""


@dataclass(frozen=True)
class DskdCmaConfig(DualSpaceConfig, kind="dskd_cma", teacher="any"):
    """Dual-space distillation with cross-model attention, for two vocabularies (arXiv 2406.17328, section 3.3)."""


@dataclass(frozen=True)
class DskdV2Config(DualSpaceConfig, kind="dskd_v2", teacher="same_vocabulary"):
    """The successor for one vocabulary: projectors from the heads' pseudo-inverse (arXiv 2504.11426)."""

    projector_init: Literal["pseudo_inverse", "random"] = "pseudo_inverse"
    """Where projectors come from; with pseudo_inverse, s2t is recomputed from both heads each step and not trained."""
    agreement_mask: bool = True
    """Learn in the student's space only from tokens where the projected teacher predicts what the teacher does."""


@dataclass(frozen=True)
class DskdV2EtaConfig(DskdV2Config, kind="dskd_v2_eta", teacher="any", alignment="exact"):
    """The successor for two vocabularies, on exactly aligned tokens (arXiv 2504.11426)."""
