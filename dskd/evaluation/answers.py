"""One answer of a model to each record, the same however the work is split."""

import statistics
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import cattrs
from rouge_score.rouge_scorer import RougeScorer

from dskd.config.training import GenerationConfig
from dskd.data.records import Record
from dskd.data.shard import Shard
from dskd.data.tokenization import Limits, Tokenizer
from dskd.engine.distributed import Ranks
from dskd.evaluation.scores import score
from dskd.models.generate import Prompt, generate, make_prompt, token_batches
from dskd.rundir.evaluations import Answer

WHOLE = Shard()
Make = Callable[[int, str, bool], dict[str, Any]]
"""What becomes of an answer: index of the record, text, whether it ended by itself and was not cut by the limit."""


@dataclass(frozen=True)
class Answering:
    """A model, and how it is asked."""

    model: Any
    tokenizer: Tokenizer
    settings: GenerationConfig
    ranks: Ranks
    bos: bool = False

    def answer(self, batch: Sequence[Prompt], seed: int) -> list[list[int]]:
        """Token ids of the answers to a batch, with the EOS that ends them."""
        return generate(self.model, batch, self.settings, seed, self.tokenizer.eos_token_id, self.ranks)

    def rounds(
        self,
        records: Sequence[Record],
        seed: int,
        make: Make,
        done: Container[int] = (),
        shard: Shard = WHOLE,
    ) -> Iterator[tuple[list[dict[str, Any]], float]]:
        """What `make` makes of the answers of all ranks, round by round, with the part of the work that is done.

        A round is a batch for each rank. The batches follow from the records and settings alone, so that it does not
        matter how many ranks or tasks there are, nor which records were answered before: a batch counts as a whole.
        All ranks take part in every round, since under ZeRO-3 a forward is a collective; what a rank without a batch of
        its own repeats is thrown away.
        """
        limits = Limits(self.settings.max_length, self.settings.max_prompt_length, self.bos)
        prompts = [make_prompt(self.tokenizer, i, record.prompt, limits) for i, record in enumerate(records)]
        batches = token_batches(prompts, self.settings)[shard.index :: shard.count]
        missing = [batch for batch in batches if not all(prompt.index in done for prompt in batch)]
        for count, (own, number) in enumerate(rounds(missing, self.ranks), start=1):
            self.ranks.stop_if_asked()
            batch = missing[number]
            answers = self.answer(batch, seed)
            self.ranks.stop_if_asked()  # what was generated may be cut short
            texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
            ended = [answer[-1:] == [self.tokenizer.eos_token_id] for answer in answers]
            made = [make(prompt.index, *said) for prompt, *said in zip(batch, texts, ended, strict=True)] if own else []
            part = min(1.0, count * self.ranks.world_size / len(missing))
            yield [line for lines in self.ranks.gather(made) for line in lines], part


def rounds(batches: Sequence[Any], ranks: Ranks) -> Iterator[tuple[bool, int]]:
    """(whether it counts, batch index) of each round of this rank; every rank has equally many rounds."""
    for first in range(0, len(batches), ranks.world_size):
        own = first + ranks.rank
        yield (True, own) if own < len(batches) else (False, 0)


def scored_rounds(
    answering: Answering, records: Sequence[Record], seed: int, done: Container[int] = ()
) -> Iterator[tuple[list[Answer], float]]:
    """The same as scored answers."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)

    def make(index: int, text: str, ended: bool) -> dict[str, Any]:
        record = records[index]
        scores = score(text, record.outputs, scorer)
        return asdict(Answer(index, seed, record.prompt, text, record.outputs, *scores))

    for made, part in answering.rounds(records, seed, make, done):
        yield [cattrs.structure(line, Answer) for line in made], part


def answer_all(answering: Answering, records: Sequence[Record], seed: int) -> list[Answer]:
    """One scored answer for each record, in record order, on every rank."""
    with for_evaluation(answering.model):
        found = [answer for made, _ in scored_rounds(answering, records, seed) for answer in made]
    assert len({a.index for a in found}) == len(found) == len(records)
    return sorted(found, key=lambda answer: answer.index)


@contextmanager
def for_evaluation(model: Any) -> Iterator[None]:
    """Inside, the model has no dropout; afterwards it trains again where it did."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def mean_scores(answers: Sequence[Answer]) -> tuple[float, float]:
    """Mean ROUGE-L and exact match."""
    return statistics.fmean(a.rougel for a in answers), statistics.fmean(a.exact_match for a in answers)
