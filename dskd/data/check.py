"""What is in the records of a run, as its tokenizers see them: lengths, repeated prompts, alignment, what differs."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from dskd.data.alignment import exact_pairs, token_bytes
from dskd.data.records import Record
from dskd.data.tokenization import Limits, Tokenizer, tokenize, tokenize_response

EDGES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Upper ends of a histogram's bins, in tokens; the last bin is open."""
MARK = "\u2042"
"""Stands for a message's text, where a template is looked at."""


@dataclass(frozen=True)
class Side:
    """One of the two models, as far as its tokenizer is concerned."""

    name: str
    """student or teacher"""
    tokenizer: Tokenizer


def histogram(lengths: Iterable[int]) -> list[int]:
    """How many lengths are in each bin of `EDGES`."""
    bins = [0] * (len(EDGES) + 1)
    for length in lengths:
        bins[bisect_left(EDGES, length)] += 1
    return bins


def spread(count: int, most: int) -> range:
    """Indices of at most `most` of so many records, evenly spread."""
    return range(0, count, -(-count // most))


def prompt_key(prompt: str) -> bytes:
    """The same for prompts that differ in spaces and capitals alone."""
    return blake2b(" ".join(prompt.split()).casefold().encode(), digest_size=16).digest()


def repeated(keys: Sequence[bytes], others: Sequence[bytes] = ()) -> list[int]:
    """The indices whose key stands in `others`, or before in `keys` itself where there are none."""
    seen, found = set(others), []
    for index, key in enumerate(keys):
        if key in seen:
            found.append(index)
        elif not others:
            seen.add(key)
    return found


@dataclass(frozen=True)
class Coverage:
    """How many response tokens stand for the same bytes as one token of the other side, EOS left out."""

    pairs: int
    student: int
    teacher: int


def coverage(records: Iterable[Record], student: Tokenizer, teacher: Tokenizer) -> Coverage:
    pairs = students = teachers = 0
    for record in records:
        own, other = (
            token_bytes(tokenizer, tokenize_response(tokenizer, record.outputs[0])) for tokenizer in (student, teacher)
        )
        pairs, students, teachers = pairs + len(exact_pairs(other, own)), students + len(own), teachers + len(other)
    return Coverage(pairs, students, teachers)


def example(record: Record, side: Side, limits: Limits) -> tuple[str, str, str]:
    """(what is counted, the prompt as the model reads it, the response with its tokens between bars)."""
    sample = tokenize(side.tokenizer, record, limits)
    unlabelled = 0 if len(sample.prompt) else 1  # nothing predicts the first token of all
    pieces = [side.tokenizer.decode([index]) for index in sample.response.tolist()]
    labels = len(pieces) - unlabelled
    counted = (
        f"{side.name}: {len(sample.prompt)} prompt tokens, {labels} response tokens with a label, between the bars"
    )
    return (
        counted,
        side.tokenizer.decode(sample.prompt),
        f"{''.join(pieces[:unlabelled])}|{'|'.join(pieces[unlabelled:])}|",
    )


def warnings(student: Side, teacher: Side | None, prompts: Sequence[str], bos: bool) -> list[str]:
    """What one model would read otherwise than it is used to, or otherwise than the other."""
    sides = [student] if teacher is None else [student, teacher]
    found = [
        warning for side in sides for warning in [*template_warnings(side, prompts), *bos_warnings(side, prompts, bos)]
    ]
    if teacher is not None:
        found += different_warnings(student, teacher, prompts)
    return found


def template_warnings(side: Side, prompts: Sequence[str]) -> list[str]:
    opening, closing = chat_ends(side.tokenizer)
    if not opening:
        return []
    fitting = sum(prompt.lstrip().startswith(opening) for prompt in prompts)
    if fitting < len(prompts):
        return [
            f"the {side.name} has a chat template, whose prompts begin with {opening!r}; "
            f"{len(prompts) - fitting} of {len(prompts)} prompts do not"
        ]
    if closing and side.tokenizer.eos_token not in closing:
        return [
            f"the {side.name}'s chat template ends an answer with {closing.strip()!r}, and training with its EOS token "
            f"{side.tokenizer.eos_token!r}"
        ]
    return []


def chat_ends(tokenizer: Tokenizer) -> tuple[str, str]:
    """What a tokenizer's chat template begins a prompt with, BOS left out, and what it ends an answer with."""
    if tokenizer.chat_template is None:
        return "", ""
    asked = [{"role": "user", "content": MARK}]
    try:
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        answered = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        whole = tokenizer.apply_chat_template(answered, tokenize=False)
    except Exception:  # a template raises what it likes; what it refuses it cannot be compared with
        return "", ""
    bos = tokenizer.bos_token or ""
    if bos and prompt.count(bos) == 1:  # else it begins every message
        prompt = prompt.removeprefix(bos)
    before = prompt.partition(MARK)[0].lstrip()
    special = [token for token in special_tokens(tokenizer) if before.startswith(token)]
    return max(special, key=len, default=before.split()[0] if before else ""), whole.rpartition(MARK)[2]


def special_tokens(tokenizer: Tokenizer) -> set[str]:
    return {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}


def bos_warnings(side: Side, prompts: Sequence[str], bos: bool) -> list[str]:
    token = side.tokenizer.bos_token
    if token is None:
        return []
    own = sum(prompt.startswith(token) for prompt in prompts)
    if bos and own:
        return [f"data.bos=true puts {token!r} before {own} prompts that begin with it, as the {side.name} reads them"]
    usual = side.tokenizer.encode("a")[:1] == [side.tokenizer.bos_token_id]
    if usual and not bos and own < len(prompts):
        return [f"the {side.name}'s tokenizer usually puts {token!r} before a text, and data.bos is false"]
    return []


def different_warnings(student: Side, teacher: Side, prompts: Sequence[str]) -> list[str]:
    """Where both sides do not read the same prompt alike."""
    found = []
    templates = [side.tokenizer.chat_template for side in (student, teacher)]
    if all(templates) and templates[0] != templates[1]:
        found.append("the chat templates of student and teacher differ; both read a prompt as it is in the records")
    for own, other in ((student, teacher), (teacher, student)):
        for token in sorted(special_tokens(own.tokenizer) - special_tokens(other.tokenizer)):
            count = sum(token in prompt for prompt in prompts)
            if count:
                found.append(
                    f"{token!r}, in {count} prompts, is one token to the {own.name} and plain text to the {other.name}"
                )
    return found
