"""Records in any form become the same lines, once; conversations as the student's template renders them."""

import json
import tempfile

import pytest
from support.forms import CHAT, as_file, said
from support.tiny import varied_records, write_records

from dskd.assemble import assemble
from dskd.config.errors import UserError
from dskd.config.load import load_run
from dskd.data.records import Record, read_records
from dskd.data.sources import check_source, lines_of, read_source
from dskd.plan.workload import workload_of

CONVERSATION = said("Be kind.", "Where is Lima?", "In Peru.", "And Paris?", "In France.")
TURNS = [
    Record("<system>Be kind.</s><user>Where is Lima?</s><assistant>", ("In Peru.",)),
    Record(
        "<system>Be kind.</s><user>Where is Lima?</s><assistant>In Peru.</s><user>And Paris?</s><assistant>",
        ("In France.",),
    ),
]


@pytest.fixture
def tokenizer(tiny):
    made = tiny.tokenizer("pieces")
    made.chat_template, made.name_or_path = CHAT, "/models/student"
    return made


@pytest.fixture
def read(tmp_path, tokenizer):
    def read_file(file):
        check_source(file)
        return list(read_records(lines_of(file, tokenizer, tmp_path / "cache")))

    return read_file


@pytest.mark.parametrize("form", ["json", "csv", "parquet", "jsonl"])
def test_every_form_holds_the_same_records(tmp_path, read, form):
    values = [
        {"id": i, "prompt": v["prompt"] + ',"\n', "output": f"a{i} 東京"} for i, v in enumerate(varied_records(30))
    ]
    assert read(as_file(tmp_path, form, values)) == [Record(v["prompt"], (v["output"],)) for v in values]


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_several_answers(tmp_path, read, form):
    assert read(as_file(tmp_path, form, [{"prompt": "p", "output": ["a", "b"]}])) == [Record("p", ("a", "b"))]


@pytest.mark.parametrize("form", ["json", "parquet", "jsonl"])
def test_each_turn_of_the_assistant_is_a_record(tmp_path, read, form):
    assert read(as_file(tmp_path, form, [CONVERSATION])) == TURNS


def test_lines_of_prompts_are_read_where_they_are(tmp_path, tokenizer):
    file = write_records(tmp_path / "r.json", varied_records(3))  # whatever its name
    assert lines_of(file, tokenizer, tmp_path / "cache") == file
    assert not (tmp_path / "cache").exists()


def test_what_was_made_is_kept_until_source_or_template_change(tmp_path, tokenizer):
    file = write_records(tmp_path / "r.jsonl", [CONVERSATION])
    first = lines_of(file, tokenizer, tmp_path / "cache")
    stamp = first.stat().st_mtime_ns
    assert lines_of(file, tokenizer, tmp_path / "cache") == first
    assert first.stat().st_mtime_ns == stamp
    tokenizer.chat_template = CHAT.replace("</s>", "\n")
    second = lines_of(file, tokenizer, tmp_path / "cache")
    write_records(file, [CONVERSATION] * 2)
    third = lines_of(file, tokenizer, tmp_path / "cache")
    assert len({first, second, third}) == 3
    assert [len(read_records(made)) for made in (first, second, third)] == [2, 2, 4]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], '"messages": a list of objects'),
        ([{"role": "user", "content": 3}], '"messages": a list of objects'),
        (said("", "q")["messages"], "no answer of the assistant"),
        ([{"role": "assistant", "content": "hello"}], "no answer of the assistant"),
        (said("", "q", " ")["messages"], '"output" is empty'),
        (
            [*said("", "q")["messages"], {"role": "tool", "content": "x"}, {"role": "assistant", "content": "a"}],
            "no tools here",
        ),
    ],
)
def test_a_conversation_that_is_none(tmp_path, read, messages, problem):
    file = write_records(tmp_path / "r.jsonl", [CONVERSATION, {"messages": messages}])
    with pytest.raises(UserError, match=rf"r\.jsonl:2: .*{problem}"):
        read(file)
    assert not list((tmp_path / "cache").glob("*"))


def test_a_template_runs_in_a_sandbox(tmp_path, read, tokenizer):
    tokenizer.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(UserError, match=r"the chat template of /models/student does not take it"):
        read(write_records(tmp_path / "r.jsonl", [CONVERSATION]))


def test_a_template_that_wants_more_memory_than_there_is(tmp_path, read, tokenizer):
    tokenizer.chat_template = "{{ 'x' * 10 ** 18 }}"
    with pytest.raises(UserError, match=r"the chat template of /models/student does not take it: MemoryError$"):
        read(write_records(tmp_path / "r.jsonl", [CONVERSATION]))


@pytest.mark.parametrize("damage", [b"Lim\xff", b"PAR1"])
def test_a_damaged_parquet_file_is_told_in_one_line(tmp_path, read, damage):
    """Text that is none, which pyarrow hands to Python as it is, and a file without its end."""
    arrow, parquet = (pytest.importorskip(name, reason="Parquet needs it") for name in ("pyarrow", "pyarrow.parquet"))
    table = arrow.Table.from_pylist([{"prompt": "Lima", "output": "a"}])
    parquet.write_table(table, tmp_path / "r.parquet", compression="none")
    content = (tmp_path / "r.parquet").read_bytes()
    (tmp_path / "r.parquet").write_bytes(content.replace(b"Lima", damage) if damage[-1] == 255 else content[:-4])
    with pytest.raises(UserError, match=r"r\.parquet: is no Parquet that can be read: .+") as error:
        read(tmp_path / "r.parquet")
    assert str(error.value).isprintable()


def test_a_tokenizer_without_a_template(tmp_path, read, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"r\.jsonl:1: .* /models/student has no chat template"):
        read(write_records(tmp_path / "r.jsonl", [CONVERSATION]))


@pytest.mark.parametrize("form", ["json", "parquet", "jsonl"])
def test_without_a_run_what_was_made_is_read_and_nothing_stays(tmp_path, monkeypatch, tokenizer, form):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    records = read_source(as_file(tmp_path, form, [CONVERSATION] * 3), lambda: tokenizer)
    assert list(records) == TURNS * 3
    assert records[-1] == TURNS[1]
    assert not list((tmp_path / "temporary").iterdir())


def test_lines_of_prompts_need_no_tokenizer(tmp_path):
    file = write_records(tmp_path / "r.jsonl", varied_records(3))
    assert list(read_source(file, lambda: pytest.fail("no tokenizer is needed"))) == list(read_records(file))


def test_where_no_lines_can_be_made(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"TMPDIR: cannot write .*none.*: No such file or directory"):
        read_source(write_records(tmp_path / "r.jsonl", [CONVERSATION]), lambda: tokenizer)


def test_a_run_on_another_form_has_the_batches_of_its_lines(make_run, tmp_path, ranks):
    run = load_run(make_run(tmp_path, method={"kind": "sft"}, teacher=None))
    values = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    array = load_run(tmp_path / "run.yaml", [f"data.train={as_file(tmp_path, 'json', values)}"])
    plain, other = (assemble(each, ranks) for each in (run, array))
    assert other.train.records.file.parent == array.cache_folder
    for indices in plain.plan.micro_batches(0, 0, 1):
        ids = [each.train(indices).student.input_ids.tolist() for each in (plain, other)]
        assert ids[0] == ids[1]


def test_a_plan_knows_conversations_and_assumes_lengths_of_other_forms(make_run, tmp_path):
    run = make_run(tmp_path, method={"kind": "sft"}, teacher=None)
    write_records(tmp_path / "chat.jsonl", [CONVERSATION] * 8)
    assert workload_of(load_run(run, [f"data.train={tmp_path / 'chat.jsonl'}"])).known
    array = as_file(tmp_path, "json", varied_records(8))
    assert not workload_of(load_run(run, [f"data.train={array}"])).known
