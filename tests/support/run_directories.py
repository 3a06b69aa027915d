"""Run directories as dskd writes them, without a training: for what reads them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dskd.config.load import load_run, to_yaml
from dskd.evaluation.answers import mean_scores
from dskd.evaluation.scores import summary
from dskd.rundir.evaluations import Answer
from dskd.rundir.layout import ModelName, RunDirectory, evaluation_of


@dataclass(frozen=True)
class Maker:
    """Writes run directories below `root`."""

    root: Path

    def __call__(self, kind: str, seed: int = 10, steps: int = 20, name: str | None = None, **sections: object) -> Path:
        """The directory of a run of so many steps and two epochs; its best model is an empty folder."""
        values = {
            "student": {"path": str(self.root / "models" / "student")},
            "teacher": {"path": str(self.root / "models" / "teacher")},
            "data": {"train": str(self.root / "train.jsonl"), "dev": str(self.root / "dev.jsonl")},
            "method": {"kind": kind},
            "train": {"seed": seed},
            "output": {"root": str(self.root / "outputs"), "name": name or f"seed{seed}"},
        }
        for key, section in sections.items():
            values[key] = values.get(key, {}) | section
        self.root.mkdir(parents=True, exist_ok=True)
        file = self.root / "new.yaml"
        file.write_text(json.dumps(values))
        run = load_run(file)
        place = RunDirectory.of(run)
        earlier = len(list(self.root.glob("outputs/*/*/*")))
        place.path.mkdir(parents=True)
        place.settings.write_text(to_yaml(run))
        lines = [line for step in range(1, steps + 1) for line in figures(step, steps, earlier)]
        place.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        place.model(ModelName(2, steps, 1.5)).mkdir()
        place.best.symlink_to(str(ModelName(2, steps, 1.5)))
        return place.path


def figures(step: int, steps: int, earlier: int) -> list[dict[str, float]]:
    """The lines of a step, with an evaluation after half of the run and at its end; no two runs have the same loss."""
    loss = 4.0 / (1 + 0.1 * step) + 0.1 * earlier + 0.01 * (step % 3)
    names = {"loss": loss, "ce": loss / 2, "t2s_kd": loss / 3, "accuracy": 1 / (1 + loss), "aligned_tokens": 0.7}
    numbers = {"step": step, "epoch": 1 + 2 * step // (steps + 1), "seconds": 0.5, "tokens_per_second": 100.0 + step}
    found = [numbers | names | {"lr": 1e-3 * (1 - step / steps), "grad_norm": 10 / step, "gpu_gib": 3.5}]
    if step in (steps // 2, steps):
        found.append({"step": step, "dev_loss": loss + 0.1, "dev_accuracy": 0.5})
    return found


def write_evaluation(
    run: Path, name: str, scores: Mapping[int, Sequence[float]], texts: Sequence[str] = (), greedy: bool = False
) -> Path:
    """An evaluation of a run's best model: ROUGE-L of each record by sampling seed; `texts` are its answers."""
    folder = evaluation_of(run / "best", name)
    said = texts or ["an answer"]
    by_seed = [
        [
            Answer(i, seed, f"{name} question {i}?", said[i % len(said)], ("yes",), score, 0.0)
            for i, score in enumerate(own)
        ]
        for seed, own in scores.items()
    ]
    folder.mkdir(parents=True)
    lines = [json.dumps(asdict(answer)) for answers in by_seed for answer in answers]
    (folder / "answers.jsonl").write_text("\n".join(lines) + "\n")
    results = {"checkpoint": str(run / "best"), "data": f"{name}.jsonl", "records": len(next(iter(scores.values())))}
    results |= {"seeds": list(scores), "generation": {"greedy": greedy}}
    results |= summary([mean_scores(answers) for answers in by_seed])
    (folder / "results.json").write_text(json.dumps(results))
    return folder
