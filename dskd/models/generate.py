"""Answers of a model to prompts of token ids, whatever shards it and whatever its folder says about generation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig as HfGenerationConfig
from transformers import StoppingCriteria, StoppingCriteriaList

from dskd.config.training import GenerationConfig
from dskd.data.tokenization import Tokenizer
from dskd.engine.distributed import Ranks


def generate(
    model: Any, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], settings: GenerationConfig, ranks: Ranks
) -> list[str]:
    """Answers to prompts of token ids, padded on the left so that all end where generation begins."""
    longest = max(1, *(len(p) for p in prompts))
    # Padding is masked, whatever its id; a prompt without any token starts from one EOS.
    pad = tokenizer.eos_token_id
    input_ids = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        if prompt:
            input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, longest - max(1, len(prompt)) :] = 1
    # max_length counts a prompt's own tokens, not its padding: each row is cut to what its prompt leaves.
    budgets = [max(1, settings.max_length - max(1, len(prompt))) for prompt in prompts]
    sampling = {} if settings.greedy else {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    wanted = HfGenerationConfig(
        max_new_tokens=max(budgets),
        do_sample=not settings.greedy,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
        use_cache=True,
        **sampling,
    )
    with own_generation_settings(model, wanted):
        generated = model.generate(
            input_ids=input_ids.to(ranks.device),
            attention_mask=attention_mask.to(ranks.device),
            synced_gpus=is_partitioned(model),
            stopping_criteria=StoppingCriteriaList([StopWhenAsked(ranks)]),
        )
    answers = generated[:, longest:].tolist()
    cut = [answer[:budget] for answer, budget in zip(answers, budgets, strict=True)]
    texts: list[str] = tokenizer.batch_decode(cut, skip_special_tokens=True)
    return texts


class StopWhenAsked(StoppingCriteria):  # type: ignore[misc]
    """Ends generation at the next token when this rank was asked to stop; the answers are not used then."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __call__(self, input_ids: Tensor, scores: Tensor, **unused: Any) -> Tensor:
        self.ranks.flags.moved()
        return torch.full((len(input_ids),), self.ranks.flags.stop_requested, device=input_ids.device)


@contextmanager
def own_generation_settings(model: Any, wanted: HfGenerationConfig) -> Iterator[None]:
    """Inside, nothing of the folder's generation_config.json counts: transformers fills what it is not told from it."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    before, causal.generation_config = causal.generation_config, wanted
    try:
        yield
    finally:
        causal.generation_config = before


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 shards the model, so that every rank must run as many forwards as the slowest."""
    return any(hasattr(p, "ds_id") for p in model.parameters())
