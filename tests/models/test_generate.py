"""Answers token by token, against their definition: alone, in batches, and in batches that outgrow their room."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dskd.config.errors import UserError
from dskd.config.training import GenerationConfig
from dskd.data.tokenization import Limits
from dskd.engine.distributed import Ranks
from dskd.engine.preemption import Flags
from dskd.models.generate import Prompt, choose, generate, make_prompt, token_batches, uniform_numbers
from dskd.models.load import load_checkpoint, load_tokenizer

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
TEXTS = ("Where is Lima?", "", "Question 1: Where is Paris and where is the old dog?\nAnswer:", "a", "Answer: a cat.")
SHORT = {"max_length": 32, "max_prompt_length": 24}


def plain_answer(model, prompt: Prompt, settings: GenerationConfig, seed: int, eos: int) -> list[int]:
    """The definition: one token at a time from all that stands before it, until EOS or the budget."""
    ids, uniforms = list(prompt.ids), np.random.Generator(np.random.Philox(key=[seed, prompt.index]))
    for u in uniforms.random(prompt.budget):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy()
        if settings.greedy:
            ids.append(int(logits.argmax()))
        else:
            ids.append(sampled(logits, u, settings))
        if ids[-1] == eos:
            break
    return ids[len(prompt.ids) :]


def sampled(logits: np.ndarray, u: float, settings: GenerationConfig) -> int:
    """The token in whose part of [0, 1) u lies, the parts in the order of the ids; unlikely tokens have none."""
    weights = np.exp((logits - logits.max()) / settings.temperature)
    weights /= weights.sum()
    likely_first = np.argsort(-weights)
    before = np.cumsum(weights[likely_first]) - weights[likely_first]
    weights[likely_first[before >= settings.top_p]] = 0.0
    return int(np.searchsorted(np.cumsum(weights), u * weights.sum(), side="right"))


@pytest.fixture(scope="module", params=["gpt2", "gemma2"])  # gemma2: sliding windows, shorter than the prompts
def asked(request, tiny):
    """A model, its EOS and some prompts."""
    model, tokenizer = load_checkpoint(tiny(request.param), "fp32", CPU), load_tokenizer(tiny(request.param), "student")
    limits = Limits(SHORT["max_length"], SHORT["max_prompt_length"])
    return model, tokenizer.eos_token_id, [make_prompt(tokenizer, i, text, limits) for i, text in enumerate(TEXTS)]


SETTINGS = [{"greedy": True}, {"temperature": 0.5, "top_p": 0.8}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_answers_are_those_of_the_definition_whatever_else_is_in_the_batch(asked, settings):
    model, eos, prompts = asked
    settings = GenerationConfig(**settings, **SHORT)
    expected = [plain_answer(model, prompt, settings, 7, eos) for prompt in prompts]
    assert len(set(map(len, expected))) > 1
    alone = [generate(model, [prompt], settings, 7, eos, ALONE)[0] for prompt in prompts]
    assert alone == expected
    assert generate(model, prompts, settings, 7, eos, ALONE) == expected
    shuffled = random.Random(3).sample(prompts, len(prompts))
    crowded = replace(settings, batch_size=2)  # has no room for five that go on
    assert generate(model, shuffled, crowded, 7, eos, ALONE) == [expected[prompt.index] for prompt in shuffled]


def test_rows_that_have_ended_are_not_run_any_more(asked):
    model, eos, prompts = asked
    rows = []
    hook = model.register_forward_pre_hook(lambda *call: rows.append(len(call[2]["input_ids"])), with_kwargs=True)
    with hook:
        answers = generate(model, prompts, GenerationConfig(**SHORT), 7, eos, ALONE)
    assert sum(rows) == sum(map(len, answers))
    assert len(rows) == max(map(len, answers))


def test_a_full_batch_holds_no_more_tokens_than_it_has_room_for(asked):
    model, eos, prompts = asked
    held = []
    hook = model.register_forward_pre_hook(
        lambda *call: held.append(call[2]["attention_mask"].numel()), with_kwargs=True
    )
    settings = GenerationConfig(batch_size=2, greedy=True, **SHORT)
    prompts = [replace(prompts[0], index=i) for i in range(12)]
    assert len(token_batches(prompts, settings)) > 1
    with hook:
        for batch in token_batches(prompts, settings):
            generate(model, batch, settings, 1, eos, ALONE)
    assert max(held) <= 2 * SHORT["max_length"]


def test_a_stop_ends_a_batch_at_the_next_token(asked):
    model, eos, prompts = asked
    flags = Flags(stop_requested=True)
    answers = generate(model, prompts, GenerationConfig(**SHORT), 7, eos, Ranks(0, 1, CPU, flags))
    assert answers == [[]] * len(prompts)


def test_a_model_without_a_cache_is_told():
    model = SimpleNamespace(forward=lambda input_ids: None, config=None, parameters=lambda: ())
    with pytest.raises(UserError, match="takes no cache"):
        generate(model, [Prompt(0, (1,), 3)], GenerationConfig(**SHORT), 1, 0, ALONE)


@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([(1.0, 1.0), (0.7, 0.6), (2.0, 0.9)]))
def test_each_token_is_chosen_as_often_as_it_is_probable(tokens, seed, how):
    logits = torch.randn(tokens, generator=torch.Generator().manual_seed(seed)) * 3
    settings = GenerationConfig(temperature=how[0], top_p=how[1])
    grid = torch.arange(2000, dtype=torch.float64).add(0.5) / 2000
    found = choose(logits.expand(2000, -1), grid, settings).bincount(minlength=tokens)
    probabilities = (logits.double() / settings.temperature).softmax(0)
    ordered, order = probabilities.sort(descending=True)
    probabilities[order[ordered.cumsum(0) - ordered >= settings.top_p]] = 0
    expected = 2000 * probabilities / probabilities.sum()
    assert (found - expected).abs().max() <= 1


def test_the_ends_of_the_random_numbers_choose_a_token():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for u, token in ((0.0, 1), (0.5 - 1e-9, 1), (0.5, 3), (1 - 2**-53, 3)):
        assert choose(logits, torch.tensor([u], dtype=torch.float64), GenerationConfig()).tolist() == [token]


def test_random_numbers_follow_from_seed_and_record_alone():
    prompt = Prompt(5, (1, 2), 100)
    assert (uniform_numbers(3, prompt) == uniform_numbers(3, Prompt(5, (7,), 100))).all()
    assert (uniform_numbers(3, prompt)[:10] == uniform_numbers(3, replace(prompt, budget=10))).all()
    others = [
        uniform_numbers(4, prompt),
        uniform_numbers(3, replace(prompt, index=6)),
        uniform_numbers(5, Prompt(3, (), 100)),
    ]
    assert all((uniform_numbers(3, prompt) != other).all() for other in others)


PROMPTS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 90)), min_size=1, max_size=80)


@given(PROMPTS, st.integers(1, 6), st.randoms())
def test_batches_hold_each_prompt_once_ordered_by_length_with_room_for_a_first_part_of_the_answers(
    lengths, batch_size, random
):
    prompts = [Prompt(i, (1,) * length, budget) for i, (length, budget) in enumerate(lengths)]
    settings = GenerationConfig(max_length=160, max_prompt_length=60, batch_size=batch_size)
    batches = token_batches(prompts, settings)
    assert sorted(p.index for batch in batches for p in batch) == list(range(len(prompts)))
    in_order = [len(p.ids) for batch in batches for p in batch]
    assert in_order == sorted(in_order, reverse=True)
    for batch in batches:
        widest = max(len(p.ids) for p in batch) + max(min(p.budget, 64) for p in batch)
        assert len(batch) * widest <= batch_size * 160
    shuffled = list(prompts)
    random.shuffle(shuffled)
    assert token_batches(shuffled, settings) == batches
