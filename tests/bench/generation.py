"""Answers to prompts of Dolly, batched by tokens, against fixed batches in file order: `python -m bench.generation`.

A llama with random weights, GPT-2's vocabulary, the widths of SmolLM2-135M and 6 of its 30 layers. Each answer ends
after as many tokens as Dolly's own, up to 512 with the prompt, so that it is no model's habit that is measured. FILES:
records and a tokenizer of GPT-2's vocabulary; without them, random tokens in the lengths of Dolly.
"""

import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, StoppingCriteria, StoppingCriteriaList

from bench.measure import one_thread, seconds
from bench.training_step import DOLLY
from dskd.config.training import GenerationConfig
from dskd.data.records import read_records
from dskd.data.tokenization import Limits, tokenize
from dskd.engine.distributed import Ranks
from dskd.models.generate import Prompt, generate, token_batches
from dskd.models.load import load_tokenizer

RECORDS, REPEATS = 64, 2
SETTINGS = GenerationConfig()
VOCABULARY = 50257
EOS = VOCABULARY  # no token: answers end by their length alone


class OwnLengths(StoppingCriteria):
    """Ends each row after as many tokens as its answer has."""

    def __init__(self, start: int, prompts: list[Prompt]) -> None:
        self.ends = torch.tensor([start + prompt.budget for prompt in prompts])

    def __call__(self, input_ids, scores, **unused):
        return self.ends <= input_ids.shape[1]


def in_file_order(model, prompts: list[Prompt]) -> int:
    """Fixed batches through transformers' own loop, padded to their longest prompt; returns the tokens made."""
    made = 0
    for first in range(0, len(prompts), SETTINGS.batch_size):
        batch = prompts[first : first + SETTINGS.batch_size]
        longest = max(len(prompt.ids) for prompt in batch)
        input_ids, mask = (torch.zeros(len(batch), longest, dtype=torch.int64) for _ in range(2))
        for row, prompt in enumerate(batch):
            input_ids[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[row, longest - len(prompt.ids) :] = 1
        found = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=max(prompt.budget for prompt in batch),
            pad_token_id=0,
            eos_token_id=None,
            stopping_criteria=StoppingCriteriaList([OwnLengths(longest, batch)]),
        )
        assert found.shape[1] == longest + max(prompt.budget for prompt in batch)
        made += sum(prompt.budget for prompt in batch)
    return made


def by_tokens(model, prompts: list[Prompt], ranks: Ranks) -> int:
    batches = token_batches(prompts, SETTINGS)
    answers = [answer for batch in batches for answer in generate(model, batch, SETTINGS, 1, EOS, ranks)]
    return sum(map(len, answers))


def make_prompts(files: list[str]) -> list[Prompt]:
    if files:
        tokenizer = load_tokenizer(Path(files[1]), "tokenizer")
        limits = Limits(SETTINGS.max_length, SETTINGS.max_prompt_length)
        records = read_records(Path(files[0]))
        chosen = [records[i * len(records) // RECORDS] for i in range(RECORDS)]  # from all over the file
        samples = [tokenize(tokenizer, record, limits) for record in chosen]
        return [Prompt(i, tuple(s.prompt.tolist()), len(s.response)) for i, s in enumerate(samples)]
    lengths = random.Random(0).sample(DOLLY * 7, RECORDS)
    ids = torch.randint(VOCABULARY, (RECORDS, 256)).tolist()
    return [Prompt(i, tuple(ids[i][:prompt]), response) for i, (prompt, response) in enumerate(lengths)]


def main(files: list[str]) -> None:
    one_thread()
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=6, max_position_embeddings=512, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ranks, prompts = Ranks(0, 1, torch.device("cpu")), make_prompts(files)
    wanted = sum(prompt.budget for prompt in prompts)
    took: dict[str, list[float]] = {"fixed": [], "by_tokens": []}
    for _ in range(REPEATS):  # in turns
        for name, work in (("fixed", in_file_order), ("by_tokens", lambda *both: by_tokens(*both, ranks))):
            made: list[int] = []
            took[name].append(seconds(lambda work=work, made=made: made.append(work(model, prompts)), repeats=1))
            assert made == [wanted]
    best = {f"{name}_seconds": min(values) for name, values in took.items()}
    ratio = best["fixed_seconds"] / best["by_tokens_seconds"]
    print(json.dumps({"records": RECORDS, "tokens": wanted, **best, "fixed_over_by_tokens": ratio}))


if __name__ == "__main__":
    main(sys.argv[1:])
