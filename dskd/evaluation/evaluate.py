"""A saved model's answers to files of records, and their scores, written beside it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cattrs

from dskd.config.training import GenerationConfig
from dskd.data.records import Records
from dskd.data.sources import read_source
from dskd.data.tokenization import Limits, Tokenizer, check_tokenizer
from dskd.engine.distributed import Ranks
from dskd.engine.metrics import progress_bar
from dskd.evaluation.answers import Answering, mean_scores, scored_rounds
from dskd.evaluation.kept import add, begin, identity_of, read_finished, read_kept
from dskd.evaluation.scores import summary
from dskd.models.load import load_checkpoint, load_tokenizer
from dskd.rundir.content import model_content, sum_of
from dskd.rundir.evaluations import Answer
from dskd.rundir.files import as_user_error, read_json, write_json, write_text
from dskd.rundir.layout import ANSWERS, PARTIAL_ANSWERS, RESULTS

BySeed = dict[int, dict[int, Answer]]
"""Answers by seed and index of the record."""


@dataclass(frozen=True)
class Asked:
    """How a saved model is asked."""

    checkpoint: Path
    seeds: tuple[int, ...]
    settings: GenerationConfig
    precision: str
    bos: bool = False

    @property
    def used_seeds(self) -> tuple[int, ...]:
        """Greedy answers do not depend on a seed, so the first alone is used for them."""
        return self.seeds[:1] if self.settings.greedy else self.seeds

    def identity(self, data: Path) -> str:
        """Of the answers to a file of records, by the content of both."""
        content = {"model": model_content(self.checkpoint).files, "records": sum_of(data)}
        how = {"generation": asdict(self.settings), "precision": self.precision, "bos": self.bos}
        return identity_of(content | how)


@dataclass(frozen=True)
class Evaluation:
    """A model on some ranks, asked; it is loaded for the first answer that is not there."""

    asked: Asked
    ranks: Ranks

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.asked.checkpoint, str(self.asked.checkpoint))

    @cached_property
    def answering(self) -> Answering:
        asked, key = self.asked, str(self.asked.checkpoint)
        limits = Limits(asked.settings.max_length, asked.settings.max_prompt_length, asked.bos)
        check_tokenizer(self.tokenizer, limits, key)
        model = load_checkpoint(asked.checkpoint, asked.precision, self.ranks.device)
        return Answering(model, self.tokenizer, asked.settings, self.ranks, asked.bos)

    def evaluate(self, data: Path, output: Path) -> dict[str, Any]:
        """Answer a file of records once with each seed, and score; write answers.jsonl and results.json to `output`.

        What is in `output`, or below it of a single seed, and was asked alike is not answered again. Returns what
        results.json holds.
        """
        records, asked = read_source(data, lambda: self.tokenizer), self.asked
        identity = self.ranks.together(lambda: asked.identity(data))[0]
        found = self.known(records, output, identity)
        if any(len(found[seed]) < len(records) for seed in asked.used_seeds):
            for made in self.missing(records, found, data.stem):
                if self.ranks.is_main:
                    with as_user_error(output, "--output"):
                        output.mkdir(parents=True, exist_ok=True)
                        begin(output / PARTIAL_ANSWERS, identity)
                        add(output / PARTIAL_ANSWERS, map(asdict, made))
        by_seed = [[answers[i] for i in range(len(records))] for seed, answers in found.items()]
        results: dict[str, Any] = {"checkpoint": str(asked.checkpoint), "data": str(data), "records": len(records)}
        results |= {"seeds": list(asked.used_seeds), "generation": asdict(asked.settings)}
        results |= {"precision": asked.precision, "bos": asked.bos, "identity": identity}
        results |= summary([mean_scores(answers) for answers in by_seed])
        if self.ranks.is_main:
            with as_user_error(output, "--output"):
                write_results(output, by_seed, results)
        self.ranks.barrier()
        return results

    def known(self, records: Records, output: Path, identity: str) -> BySeed:
        """What earlier calls have answered, on all ranks as the main one finds it."""
        found: BySeed = {seed: {} for seed in self.asked.used_seeds}
        read = self.ranks.together(lambda: list(kept_in(output, identity)) if self.ranks.is_main else [])[0]
        for line in read:
            with suppress(cattrs.BaseValidationError, TypeError, ValueError, KeyError):  # a damaged line is none
                answer = cattrs.structure(line, Answer)
                if answer.seed in found and 0 <= answer.index < len(records):
                    found[answer.seed][answer.index] = answer
        return found

    def missing(self, records: Records, found: BySeed, name: str) -> Iterator[list[Answer]]:
        """Answer what is not found, and add it to that, round by round."""
        with progress_bar(f"answers {name}") as show:
            for index, (seed, answers) in enumerate(found.items()):
                for made, part in scored_rounds(self.answering, records, seed, set(answers)):
                    answers |= {answer.index: answer for answer in made}
                    show(round((index + part) * len(records)), len(found) * len(records))
                    yield made


def kept_in(output: Path, identity: str) -> Iterator[Mapping[str, Any]]:
    """The answers of a folder: those of a finished evaluation, of one under way, and of jobs for single seeds."""
    for folder in (*sorted(output.glob("seed*")), output):
        yield from read_finished(folder / ANSWERS, folder / RESULTS, identity)
        yield from read_kept(folder / PARTIAL_ANSWERS, identity)


def write_results(output: Path, by_seed: Sequence[Sequence[Answer]], results: dict[str, Any]) -> None:
    """What others have added to the results of the same answers stays."""
    output.mkdir(parents=True, exist_ok=True)
    before = read_json(output / RESULTS) or {}
    same = all(before.get(name) == results[name] for name in ("identity", "seeds"))
    lines = [json.dumps(asdict(answer), ensure_ascii=False) for answers in by_seed for answer in answers]
    write_text(output / ANSWERS, "\n".join(lines) + "\n")
    write_json(output / RESULTS, before | results if same else results)
    (output / PARTIAL_ANSWERS).unlink(missing_ok=True)
