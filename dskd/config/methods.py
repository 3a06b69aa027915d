"""Settings of the training methods: one frozen dataclass for each `method.kind`.

A subclass of `MethodConfig` registers itself under its kind, so that a method defined elsewhere is found as well.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from dskd.config.errors import require

Divergence = Literal[
    "forward_kl", "reverse_kl", "js_divergence", "skewed_forward_kl", "skewed_reverse_kl", "adaptive_kl"
]
TeacherNeed = Literal["none", "same_vocabulary", "any"]


@dataclass(frozen=True)
class MethodConfig:
    """What every method has: its kind and the teacher it needs."""

    kinds: ClassVar[dict[str, type["MethodConfig"]]] = {}
    kind: ClassVar[str]
    teacher: ClassVar[TeacherNeed]

    def __init_subclass__(cls, kind: str | None = None, teacher: TeacherNeed = "none") -> None:
        if kind is not None:
            cls.kind, cls.teacher = kind, teacher
            MethodConfig.kinds[kind] = cls


@dataclass(frozen=True)
class SftConfig(MethodConfig, kind="sft", teacher="none"):
    """Supervised fine-tuning: cross-entropy on the response."""


@dataclass(frozen=True)
class DistillationConfig(MethodConfig):
    """Settings that all methods with a teacher's distribution share."""

    divergence: Divergence = "forward_kl"
    """Distance between the student's and the teacher's distribution."""
    temperature: float = 2.0
    """Divides both sides' logits before the distance is taken."""
    teacher_temperature: float = 1.0
    """Divides the teacher's logits once more."""
    kd_rate: float = 0.5
    """Weight of distillation; cross-entropy has 1 - kd_rate."""
    skew: float = 0.1
    """Share of the other distribution in skewed_forward_kl and skewed_reverse_kl."""
    adaptive_alpha: float = 0.5
    """Probability mass that counts as the head of the teacher's distribution in adaptive_kl."""

    def __post_init__(self) -> None:
        for key in ("temperature", "teacher_temperature"):
            require(getattr(self, key) > 0, key, f"must be above 0, got {getattr(self, key)}")
        require(0 <= self.kd_rate <= 1, "kd_rate", f"must be in [0, 1], got {self.kd_rate}")
        for key in ("skew", "adaptive_alpha"):
            require(0 < getattr(self, key) < 1, key, f"must be in (0, 1), got {getattr(self, key)}")


@dataclass(frozen=True)
class KdConfig(DistillationConfig, kind="kd", teacher="same_vocabulary"):
    """Vanilla distillation: distance of the two distributions over one shared vocabulary."""


@dataclass(frozen=True)
class DskdCmaConfig(DistillationConfig, kind="dskd_cma", teacher="any"):
    """Dual-space distillation with cross-model attention, for two vocabularies (arXiv 2406.17328, section 3.3)."""
