"""How much there is to train on: steps and tokens of a run, estimated from the first records of its file."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from dskd.config.data import DataConfig, form_of
from dskd.config.errors import UserError
from dskd.config.run import RunConfig, tokens_at_a_time
from dskd.config.training import TrainConfig

CHARACTERS_PER_TOKEN = 4
"""Of English text, in vocabularies of 32,000 to 152,000 tokens; counting would need the tokenizers."""
LOOKED_AT = 5000
"""Records whose lengths stand for those of the whole file."""
UNKNOWN_RECORDS = 10_000
"""Assumed where there is no file; each is then as long as data.max_length."""
Lengths = tuple[int, int]
"""Tokens of a record's prompt and response."""


@dataclass(frozen=True)
class Workload:
    """What a run goes through. Tokens are those of one epoch on all ranks."""

    records: int
    steps: int
    epochs: float
    """Passes over the records that `steps` make."""
    padded_tokens: int
    """With padding to the longest of each micro-batch."""
    response_tokens: int
    longest: int
    """Tokens of the longest record with its response, at most data.max_length."""
    longest_responses: int
    """Most response tokens of a micro-batch."""
    known: bool
    """Whether the records were there to be looked at."""


def workload_of(run: RunConfig) -> Workload:
    """Raises `UserError` for a first record that is none."""
    lengths, records = lengths_of(run.data) if run.data.train.exists() else ([], UNKNOWN_RECORDS)
    known = bool(lengths)
    data, train = run.data, run.train
    if not known:
        at_once = tokens_at_a_time(run) // data.max_length
        lengths = [(data.max_prompt_length, data.max_length - data.max_prompt_length)] * at_once
    scale = records / len(lengths)
    per_epoch = max(1, records // train.global_batch_size)
    steps = min(per_epoch * train.epochs, train.max_steps or per_epoch * train.epochs)
    batches = list(micro_batches(lengths, train))
    return Workload(
        records=records,
        steps=steps,
        epochs=steps / per_epoch,
        padded_tokens=round(scale * sum(len(batch) * max(map(sum, batch)) for batch in batches)),
        response_tokens=round(scale * sum(response for _, response in lengths)),
        longest=max(map(sum, lengths)),
        longest_responses=max(sum(response for _, response in batch) for batch in batches),
        known=known,
    )


def micro_batches(lengths: Sequence[Lengths], train: TrainConfig) -> Iterator[Sequence[Lengths]]:
    """As training cuts them on one rank: in a global batch, records of like length stand together."""
    for start in range(0, len(lengths), train.global_batch_size):
        batch = sorted(lengths[start : start + train.global_batch_size], key=sum)
        part: list[Lengths] = []
        for each in batch:
            if part and is_full(part, each, train):
                yield part
                part = []
            part.append(each)
        yield part


def is_full(part: Sequence[Lengths], longer: Lengths, train: TrainConfig) -> bool:
    """Whether a micro-batch has no room for a record that is at least as long as those in it."""
    if train.micro_batch_tokens is None:
        return len(part) == train.micro_batch_size
    return (len(part) + 1) * sum(longer) > train.micro_batch_tokens


def lengths_of(data: DataConfig) -> tuple[list[Lengths], int]:
    """The lengths of the first records, cut as training cuts them, and about how many the whole file has.

    None of a file whose records are no lines.
    """
    try:
        if form_of(data.train) != "lines":
            return [], UNKNOWN_RECORDS
        with data.train.open("rb") as lines:
            first = [line for line in islice(lines, LOOKED_AT) if line.strip()]
        size = data.train.stat().st_size
    except OSError as error:
        raise UserError(f"{data.train}: cannot be read: {error.strerror}") from None
    lengths = [length_of(line, data, number) for number, line in enumerate(first, start=1)]
    return lengths, round(len(first) * size / max(1, sum(map(len, first))))


def length_of(line: bytes, data: DataConfig, number: int) -> Lengths:
    try:
        record = json.loads(line)
        if "prompt" not in record and "messages" in record:
            said = [message["content"] for message in record["messages"]]
            record = {"prompt": "".join(said[:-1]), "output": said[-1]}
        outputs = record["output"]
        texts = record["prompt"], outputs if isinstance(outputs, str) else outputs[0]
        prompt, response = (len(text) // CHARACTERS_PER_TOKEN + 1 for text in texts)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise UserError(f'{data.train}:{number}: a record {{"prompt": ..., "output": ...}} is expected') from None
    prompt = min(prompt, data.max_prompt_length)
    return prompt, min(response, data.max_length - prompt)
