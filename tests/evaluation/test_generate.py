"""`dskd generate`: the same records in one piece, in shares and after a stop, in the form that training takes."""

import json
from dataclasses import replace

import pytest
from support.forms import as_file, chatting, conversations
from support.tiny import varied_records, write_records

from dskd.config.errors import UserError
from dskd.config.training import GenerationConfig
from dskd.data.records import read_records
from dskd.data.shard import Shard
from dskd.evaluation.answers import Answering, answer_all
from dskd.evaluation.asked import Generation
from dskd.evaluation.generate import Generated, answering_of, generate_records
from dskd.evaluation.kept import add, begin

SETTINGS = GenerationConfig(max_length=40, max_prompt_length=30, batch_size=2)


@pytest.fixture(scope="module")
def asked(tiny, tmp_path_factory):
    """Of ten prompts; the files go to a folder of their own."""
    folder = tmp_path_factory.mktemp("generated")
    data = write_records(folder / "data.jsonl", varied_records(10))
    return Generation(tiny("llama"), data, folder / "out.jsonl", 7, SETTINGS, "fp32")


@pytest.fixture(scope="module")
def whole(asked, ranks):
    """The file, made in one piece."""
    assert generate_records(asked, Shard(), ranks) == f"10 records of 10 prompts: {asked.out}"
    return asked.out.read_bytes()


def test_the_records_are_prompts_with_the_answers_of_the_model(asked, whole, ranks):
    records = read_records(asked.out)
    expected = answer_all(answering_of(asked, ranks), read_records(asked.data), 7)
    assert [(r.prompt, r.outputs) for r in records] == [(a.prompt, (a.answer,)) for a in expected]
    card = json.loads(asked.card.read_text())
    assert (card["prompts"], card["records"], card["empty_answers"], card["seed"]) == (10, 10, 0, 7)
    assert sorted(path.name for path in asked.out.parent.iterdir()) == [
        "data.jsonl",
        "out.jsonl",
        "out.jsonl.card.json",
    ]


def test_what_is_complete_is_not_made_again(asked, whole, ranks):
    assert generate_records(asked, Shard(), ranks) == f"{asked.out}: is complete already"


def test_shares_make_the_same_file_whoever_is_last(asked, whole, ranks, tmp_path):
    own = replace(asked, out=tmp_path / "new" / "out.jsonl")
    for index in (2, 0):
        said = generate_records(own, Shard(index, 3), ranks)
        assert said.endswith(f"of 10 answers; {own.out} is written by the task that finds all of them")
        assert not own.out.exists()
    generate_records(own, Shard(1, 3), ranks)
    assert own.out.read_bytes() == whole
    assert own.parts == []


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet"])
def test_conversations_are_asked_as_the_template_of_the_model_renders_them(asked, tiny, tmp_path, ranks, form):
    chats, plain = conversations(4)
    own = replace(asked, model=chatting(tiny, "llama", tmp_path), data=as_file(tmp_path, form, chats))
    same = replace(own, data=write_records(tmp_path / "plain.jsonl", plain), out=tmp_path / "plain-out.jsonl")
    own = replace(own, out=tmp_path / "out.jsonl")
    for each in (own, same):
        generate_records(each, Shard(), ranks)
    assert own.out.read_bytes() == same.out.read_bytes()
    assert [record.prompt for record in read_records(own.out)] == [record["prompt"] for record in plain]


def test_after_a_stop_only_what_is_missing_is_answered(asked, whole, ranks, tmp_path, monkeypatch):
    own = replace(asked, out=tmp_path / "out.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        answered, answer = [], Answering.answer

        def interrupted(self, batch, seed):
            if len(answered) == 2:
                raise KeyboardInterrupt
            answered.append(batch)
            return answer(self, batch, seed)

        patch.setattr(Answering, "answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate_records(own, Shard(), ranks)
    with own.part(Shard()).open("a") as torn:
        torn.write('{"index": 3, "ans')
    before, again = [prompt.index for batch in answered for prompt in batch], []
    monkeypatch.setattr(Answering, "answer", lambda *given: again.extend(given[1]) or answer(*given))
    generate_records(own, Shard(), ranks)
    assert sorted([*before, *(prompt.index for prompt in again)]) == list(range(10))
    assert own.out.read_bytes() == whole


def test_a_file_that_was_made_otherwise_is_left_alone(asked, whole, ranks, tmp_path):
    for own in (replace(asked, seed=8), replace(asked, out=tmp_path / "mine.jsonl")):
        (tmp_path / "mine.jsonl").write_text("my own")
        with pytest.raises(UserError, match=f"--out: {own.out} is there already, made otherwise"):
            generate_records(own, Shard(), ranks)
    assert asked.out.read_bytes() == whole
    assert (tmp_path / "mine.jsonl").read_text() == "my own"


@pytest.mark.parametrize(("only_whole", "kept"), [(False, [0, 2, 4, 5, 6, 7, 8, 9]), (True, [0, 4, 5, 6, 7, 8, 9])])
def test_empty_answers_are_no_records_nor_are_cut_ones_where_asked(asked, ranks, tmp_path, only_whole, kept):
    own = replace(asked, out=tmp_path / "out.jsonl", whole=only_whole)
    answers = {1: Generated(1, " \n", True), 2: Generated(2, "cut off", False), 3: Generated(3, "", True)}
    part = own.part(Shard(1, 5))
    begin(part, own.identity())
    add(part, [vars(answers.get(i, Generated(i, f"answer {i}", True))) for i in range(10)])
    generate_records(own, Shard(), ranks)
    prompts = [record.prompt for record in read_records(asked.data)]
    assert [record.prompt for record in read_records(own.out)] == [prompts[i] for i in kept]
    card = json.loads(own.card.read_text())
    assert (card["records"], card["empty_answers"], card["cut_answers"]) == (len(kept), 2, 1)
