"""Records -> token ids, with one tokenizer."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dskd.config.errors import UserError
from dskd.data.records import Record

Tokenizer = Any  # transformers' PreTrainedTokenizerBase; this package does not need transformers to be typed


@dataclass(frozen=True)
class Limits:
    """How a record is cut, in tokens (see `DataConfig`)."""

    max_length: int
    max_prompt_length: int
    bos: bool = False


@dataclass(frozen=True)
class Sample:
    """Token ids of one record, for one model."""

    prompt: NDArray[np.int64]  # [P]
    response: NDArray[np.int64]  # [R], with EOS unless it was cut off


def tokenize(tokenizer: Tokenizer, record: Record, limits: Limits) -> Sample:
    """Prompt and response tokenized each on its own; EOS closes the response.

    The prompt keeps its end, where the call for an answer stands, and the response its beginning.
    """
    prompt = tokenize_prompt(tokenizer, record.prompt, limits)
    response = [*tokenize_response(tokenizer, record.outputs[0]), tokenizer.eos_token_id][
        : limits.max_length - len(prompt)
    ]
    return Sample(np.array(prompt, np.int64), np.array(response, np.int64))


def tokenize_prompt(tokenizer: Tokenizer, prompt: str, limits: Limits) -> list[int]:
    """Token ids of a prompt: at most `limits.max_prompt_length`, BOS included where it is asked for."""
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False)
    if not limits.bos:
        return ids[-limits.max_prompt_length :]
    keep = limits.max_prompt_length - 1
    return [tokenizer.bos_token_id, *(ids[-keep:] if keep else [])]


def tokenize_response(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a response, without EOS.

    A special token's name is plain text here: "</s>" inside an answer must not end it. (In a prompt it is the token, as
    chat templates need.)
    """
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return ids


def count_cut(tokenizer: Tokenizer, records: Iterable[Record], limits: Limits) -> tuple[int, int]:
    """How many records lose the beginning of their prompt, and how many the end of their response, EOS included."""
    return cut_of((whole_lengths(tokenizer, record) for record in records), limits)


def cut_of(lengths: Iterable[tuple[int, int]], limits: Limits) -> tuple[int, int]:
    """The same of the lengths that `whole_lengths` tells."""
    prompts = responses = 0
    for whole, response in lengths:
        prompt = whole + limits.bos
        prompts += prompt > limits.max_prompt_length
        responses += min(prompt, limits.max_prompt_length) + response > limits.max_length
    return prompts, responses


def whole_lengths(tokenizer: Tokenizer, record: Record) -> tuple[int, int]:
    """Tokens of a record's prompt, without BOS, and of its response with EOS, before anything is cut."""
    prompt = tokenizer.encode(record.prompt, add_special_tokens=False)
    return len(prompt), len(tokenize_response(tokenizer, record.outputs[0])) + 1


def check_tokenizer(tokenizer: Tokenizer, limits: Limits, key: str) -> None:
    """Raise `UserError` where a tokenizer lacks a special token that training needs."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{key}: its tokenizer has no EOS token, so a response could not end; set eos_token in its config"
        )
    if limits.bos and tokenizer.bos_token_id is None:
        raise UserError("data.bos: the tokenizer of " + key + " has no BOS token; allowed: false")
