"""Answers of a model to prompts of token ids, whatever shards it and whatever its folder says about generation.

Prompts of like length stand in a batch, rows that have ended leave it, and each answer draws its random numbers from a
stream of its own. So a batch is as full as its memory allows, and what is answered follows from the prompts, the
settings and the seed alone.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, TopPLogitsWarper

from dskd.config.errors import UserError
from dskd.config.training import GenerationConfig
from dskd.data.tokenization import Limits, Tokenizer, tokenize_prompt
from dskd.engine.distributed import Ranks
from dskd.models.compilation import as_written

FIRST_TOKENS = 64
"""Tokens of an answer that a batch has room for from its start; most answers end before, and their rows leave."""
CACHE_NAMES = ("past_key_values", "cache", "cache_params")
"""What models call the cache that they are given: transformers before 5.24, since then, and state-space models."""


@dataclass(frozen=True)
class Prompt:
    index: int
    """Number of its record: with the seed it decides the random numbers of the answer."""
    ids: tuple[int, ...]
    budget: int
    """Tokens of the answer at most, EOS included."""


def make_prompt(tokenizer: Tokenizer, index: int, text: str, limits: Limits) -> Prompt:
    """A record's prompt; one without any token starts from one EOS."""
    ids = tokenize_prompt(tokenizer, text, limits) or [tokenizer.eos_token_id]
    return Prompt(index, tuple(ids), max(1, limits.max_length - len(ids)))


def room_of(settings: GenerationConfig) -> int:
    """Tokens of prompts and answers, padding included, that a process holds at a time."""
    return settings.batch_size * settings.max_length


def token_batches(prompts: Sequence[Prompt], settings: GenerationConfig) -> list[list[Prompt]]:
    """Batches of prompts of like length, as many as there is room for; the longest first, which need the most memory.

    A pure function of its arguments: the answers depend on the batches a little, by rounding, and must not depend on
    who answers them.
    """
    batches: list[list[Prompt]] = []
    answer = 0
    for prompt in sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.index)):
        answer = max(answer, min(prompt.budget, FIRST_TOKENS))
        if not batches or (len(batches[-1]) + 1) * (len(batches[-1][0].ids) + answer) > room_of(settings):
            batches.append([])
            answer = min(prompt.budget, FIRST_TOKENS)
        batches[-1].append(prompt)
    return batches


@dataclass
class Row:
    """A prompt, and its answer so far."""

    prompt: Prompt
    uniforms: NDArray[np.float64]  # [budget], in [0, 1): one for each token
    answer: list[int] = field(default_factory=list)

    def is_open(self, eos: int) -> bool:
        return len(self.answer) < self.prompt.budget and self.answer[-1:] != [eos]


@torch.no_grad()
@as_written()
def generate(
    model: Any, prompts: Sequence[Prompt], settings: GenerationConfig, seed: int, eos: int, ranks: Ranks
) -> list[list[int]]:
    """Token ids of the answers to a batch of prompts, with the EOS that ends them. A collective call under ZeRO-3.

    Where the batch outgrows its room, half of its rows wait and are run again after the others, from the tokens that
    they have. After a request to stop the answers are cut short, and must not be used.
    """
    rows = [Row(prompt, uniform_numbers(seed, prompt)) for prompt in prompts]
    waiting = [rows]
    running: Running | None = None
    together = ranks.world_size > 1 and is_partitioned(model)
    while any_rank(bool(running or waiting), ranks) if together else running or waiting:
        ranks.flags.moved()
        if ranks.flags.stop_requested:
            waiting, running = [], None
        if running is None:
            # Under ZeRO-3 a rank that has nothing to do runs a token along with the others.
            running = Running(model, waiting.pop() if waiting else [Row(Prompt(0, (eos,), 1), np.zeros(1))], ranks)
        tokens = choose(running.logits(), running.uniforms(), settings)
        for row, token in zip(running.rows, tokens.tolist(), strict=True):
            row.answer.append(token)
        still = [number for number, row in enumerate(running.rows) if row.is_open(eos)]
        if len(still) * (running.width + 1) > room_of(settings):
            half = (len(still) + 1) // 2
            waiting.append([running.rows[number] for number in still[half:]])
            still = still[:half]
        if still:
            running.go_on(still, tokens)
        else:
            running = None
    return [row.answer for row in rows]


def any_rank(works: bool, ranks: Ranks) -> bool:
    """Whether any rank works. A collective call."""
    return ranks.sum_int(int(works)) > 0


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 shards the model, so that every rank must run as many forwards as the slowest."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


class Running:
    """Rows whose tokens, but for the last, are in a model's cache; padded on the left, so that all end together."""

    def __init__(self, model: Any, rows: Sequence[Row], ranks: Ranks) -> None:
        causal = model.get_base_model() if isinstance(model, PeftModel) else model
        self.model, self.rows = model, list(rows)
        self.takes = inspect.signature(causal.forward).parameters
        if not set(CACHE_NAMES) & self.takes.keys():
            raise UserError(f"{type(causal).__name__} takes no cache, without which dskd does not generate")
        self.cache = DynamicCache(config=causal.config)
        texts = [(*row.prompt.ids, *row.answer) for row in rows]
        longest = max(map(len, texts))
        input_ids = torch.zeros(len(texts), longest, dtype=torch.int64)  # padding is masked, whatever its id
        mask = torch.zeros_like(input_ids)
        for number, text in enumerate(texts):
            input_ids[number, longest - len(text) :] = torch.tensor(text)
            mask[number, longest - len(text) :] = 1
        self.input_ids, self.mask = input_ids.to(ranks.device), mask.to(ranks.device)

    @property
    def width(self) -> int:
        return self.mask.shape[1]

    def logits(self) -> Tensor:
        """Logits [B, V] of each row's next token, fp32."""
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -self.input_ids.shape[1] :]
        # Some models know their place by other means.
        given = {"position_ids": positions, "logits_to_keep": 1} | dict.fromkeys(CACHE_NAMES, self.cache)
        options = {name: value for name, value in given.items() if name in self.takes}
        output = self.model(input_ids=self.input_ids, attention_mask=self.mask, use_cache=True, **options)
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def uniforms(self) -> Tensor:
        """The random number [B] of each row's next token."""
        numbers = [row.uniforms[len(row.answer)] for row in self.rows]
        return torch.tensor(numbers, dtype=torch.float64, device=self.mask.device)

    def go_on(self, still: Sequence[int], tokens: Tensor) -> None:
        """Take the new `tokens` [B] of all rows, and keep the rows `still` alone."""
        if len(still) < len(self.rows):
            kept = torch.tensor(still, device=tokens.device)
            self.cache.reorder_cache(kept)
            self.rows, self.mask, tokens = [self.rows[number] for number in still], self.mask[kept], tokens[kept]
        self.input_ids = tokens[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(self.input_ids)], dim=1)


def uniform_numbers(seed: int, prompt: Prompt) -> NDArray[np.float64]:
    """What the answer with this seed is sampled with, whatever else is answered beside or before it."""
    return np.random.Generator(np.random.Philox(key=[seed, prompt.index])).random(prompt.budget)


def choose(logits: Tensor, uniforms: Tensor, settings: GenerationConfig) -> Tensor:
    """Token ids [B] for logits [B, V]: the most probable, or the token at which the summed probability passes u [B]."""
    if settings.greedy:
        return logits.argmax(dim=-1)
    logits = logits / settings.temperature
    if settings.top_p < 1:
        logits = TopPLogitsWarper(settings.top_p)(None, logits)
    summed = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    found = torch.searchsorted(summed, (uniforms * summed[:, -1])[:, None], right=True)
    return found[:, 0].clamp(max=logits.shape[1] - 1)
