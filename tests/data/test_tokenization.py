"""Records become token ids: what is cut, what is added, and which tokens stay text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dskd.config.errors import UserError
from dskd.data.records import Record
from dskd.data.tokenization import (
    Limits,
    check_tokenizer,
    count_cut,
    tokenize,
    tokenize_prompt,
    tokenize_response,
)

PROMPT, ANSWER = "Question: Where is Zürich?\nAnswer:", "Zürich lies by the sea, and the tiny ant sleeps."
WIDE = Limits(max_length=500, max_prompt_length=200)


@pytest.fixture(scope="session", params=["bytes", "pieces"])
def tokenizer(request, tiny):
    return tiny.tokenizer(request.param)


def plain(tokenizer, text: str, **settings: bool) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, **settings)


def test_prompt_and_response_are_tokenized_on_their_own_and_eos_ends_it(tokenizer):
    sample = tokenize(tokenizer, Record(PROMPT, (ANSWER, "another")), WIDE)
    assert sample.prompt.tolist() == plain(tokenizer, PROMPT)
    assert sample.response.tolist() == [*plain(tokenizer, ANSWER), tokenizer.eos_token_id]
    assert sample.prompt.dtype == sample.response.dtype == np.int64


@pytest.mark.parametrize("limit", [1, 3, 8])
def test_a_long_prompt_keeps_its_end(tokenizer, limit):
    found = tokenize_prompt(tokenizer, PROMPT, Limits(100, limit))
    assert found == plain(tokenizer, PROMPT)[-limit:]
    assert len(found) == limit


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.data(), st.text(max_size=40), st.text(min_size=1, max_size=40), st.booleans())
def test_limits_hold_whatever_the_text(tiny, length, data, prompt, answer, bos):
    tokenizer = tiny.tokenizer("pieces")
    limits = Limits(length, data.draw(st.integers(1, length - 1)), bos)
    sample = tokenize(tokenizer, Record(prompt, (answer,)), limits)
    whole = [*tokenize_response(tokenizer, answer), tokenizer.eos_token_id]
    assert len(sample.prompt) <= limits.max_prompt_length
    assert 1 <= len(sample.response) <= limits.max_length - len(sample.prompt)
    assert sample.response.tolist() == whole[: len(sample.response)]
    assert len(sample.response) == min(len(whole), limits.max_length - len(sample.prompt))


def test_a_response_that_is_cut_off_has_no_eos(tokenizer):
    sample = tokenize(tokenizer, Record(PROMPT, (ANSWER,)), Limits(8, 5))
    assert (len(sample.prompt), len(sample.response)) == (5, 3)
    assert sample.response.tolist() == plain(tokenizer, ANSWER)[:3]


def test_bos_only_where_asked_for_and_within_the_limit(tiny):
    tokenizer = tiny.tokenizer("pieces")
    bos, ids = tokenizer.bos_token_id, plain(tokenizer, PROMPT)
    assert bos not in tokenize_prompt(tokenizer, PROMPT, WIDE)
    assert tokenize_prompt(tokenizer, PROMPT, Limits(500, 200, bos=True)) == [bos, *ids]
    assert tokenize_prompt(tokenizer, PROMPT, Limits(500, 4, bos=True)) == [bos, *ids[-3:]]
    assert tokenize_prompt(tokenizer, PROMPT, Limits(500, 1, bos=True)) == [bos]
    assert tokenize_prompt(tokenizer, "", Limits(500, 4, bos=True)) == [bos]


def test_a_special_token_is_a_token_in_a_prompt_and_text_in_a_response(tokenizer):
    text = f"to{tokenizer.eos_token}kens"
    assert tokenizer.eos_token_id in tokenize_prompt(tokenizer, text, WIDE)
    response = tokenize(tokenizer, Record("p", (text,)), WIDE).response.tolist()
    assert response.count(tokenizer.eos_token_id) == 1
    assert response[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(response[:-1]) == text


def test_an_empty_prompt_is_no_token(tokenizer):
    assert len(tokenize(tokenizer, Record("", ("a",)), WIDE).prompt) == 0


def test_a_tokenizer_needs_eos(tiny):
    tokenizer = tiny.tokenizer("pieces")
    assert check_tokenizer(tokenizer, WIDE, "student.path") is None
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"^student\.path: its tokenizer has no EOS token"):
        check_tokenizer(tokenizer, WIDE, "student.path")


def test_a_tokenizer_needs_bos_only_where_it_is_asked_for(tiny):
    asked = Limits(20, 10, bos=True)
    assert check_tokenizer(tiny.tokenizer("pieces"), asked, "teacher.path") is None
    assert check_tokenizer(tiny.tokenizer("bytes"), WIDE, "teacher.path") is None
    with pytest.raises(
        UserError, match=r"^data\.bos: the tokenizer of teacher\.path has no BOS token; allowed: false$"
    ):
        check_tokenizer(tiny.tokenizer("bytes"), asked, "teacher.path")


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("limits", [(24, 8), (40, 30), (500, 200), (12, 11)])
def test_what_is_counted_as_cut_is_what_is_cut(tokenizer, limits, bos):
    """Against the samples themselves: a prompt that is shorter than it would be, a response without its EOS."""
    if bos and tokenizer.bos_token_id is None:
        pytest.skip("has no BOS")
    records = [Record(PROMPT * (i % 3), (ANSWER[: 7 * i + 1],)) for i in range(8)]
    narrow, wide = Limits(*limits, bos), Limits(10_000, 5_000, bos)
    samples = [(tokenize(tokenizer, record, narrow), tokenize(tokenizer, record, wide)) for record in records]
    prompts = sum(len(cut.prompt) < len(whole.prompt) for cut, whole in samples)
    responses = sum(len(cut.response) < len(whole.response) for cut, whole in samples)
    assert count_cut(tokenizer, records, narrow) == (prompts, responses)
