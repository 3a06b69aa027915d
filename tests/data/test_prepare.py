"""Public sets become records by template, filters and splits; the card tells the truth about them."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from support.outside import outside
from transformers import AutoTokenizer

from dskd.config.errors import UserError
from dskd.data.prepare import CARD, Preparing, prepare
from dskd.data.public import read_dolly
from dskd.data.records import Record, read_records
from dskd.data.tokenization import tokenize_response

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "dolly_gpt2.json"
# Written out here once more: the code puts them together from parts.
WITHOUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a fish.\n\n### Response:\n"
)
WITH = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nName a fish.\n\n### Input:\nTope or rope"
    "\n\n### Response:\n"
)
LONG = "one two three four five six seven eight nine ten eleven"


def words(record: Record) -> tuple[int, int]:
    """In the place of a tokenizer's lengths."""
    return len(record.prompt.split()), len(record.outputs[0].split()) + 1


def write_lines(file: Path, *values: object) -> Path:
    file.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return file


def dolly(tmp_path: Path, count: int = 40) -> Path:
    rows = [{"instruction": f"Say {i}.", "context": "", "response": f"It is {i}."} for i in range(count)]
    return write_lines(tmp_path / "dolly.jsonl", *rows)


def made(folder: Path, split: str = "valid") -> list[Record]:
    return list(read_records(folder / f"{split}.jsonl"))


def test_the_template_with_input_and_without(tmp_path):
    rows = [{"instruction": "Name a fish.", "context": given, "response": "Tope"} for given in ("", "Tope or rope")]
    found = [record for record, _ in read_dolly(write_lines(tmp_path / "d.jsonl", *rows), None)]
    assert found == [Record(WITHOUT, ("Tope",)), Record(WITH, ("Tope",))]


def test_dolly_is_split_at_random_and_alike_for_one_seed(tmp_path):
    source = dolly(tmp_path)
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (10, 10, 11), strict=True):
        prepare("dolly", source, None, Preparing({}, dev=10, test=5, seed=seed), folder)
    first, again, other = ({split: made(f, split) for split in ("train", "dev", "valid")} for f in folders)
    assert first == again != other
    assert [len(records) for records in first.values()] == [25, 10, 5]
    everything = [record for records in first.values() for record in records]
    assert sorted(r.prompt for r in everything) == sorted(r.prompt for r, _ in read_dolly(source, None))


def test_what_is_dropped_is_counted(tmp_path):
    rows = [
        {"instruction": "Say it.", "response": "It"},
        {"instruction": "Say it.", "response": " \n"},
        {"instruction": "word " * 20, "response": "It"},
    ]
    source = write_lines(tmp_path / "d.jsonl", *rows)
    card = prepare("dolly", source, None, Preparing({"words": words}, 25, dev=0, test=0), tmp_path / "out")
    assert card["dropped"] == {"empty answer": 1, "long prompt": 1}
    assert [record.outputs for record in made(tmp_path / "out", "train")] == [("It",)]


def test_the_card_tells_counts_lengths_and_sums(tmp_path):
    source, folder = dolly(tmp_path), tmp_path / "out"
    prepare("dolly", source, None, Preparing({"words": words}, dev=10, test=5), folder)
    card = json.loads((folder / CARD).read_text())
    assert card["licence"] == "CC BY-SA 3.0"
    assert card["sources"][str(source)]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    for split, about in card["splits"].items():
        assert about["sha256"] == hashlib.sha256((folder / f"{split}.jsonl").read_bytes()).hexdigest()
        records = made(folder, split)
        lengths = sorted(words(record)[1] for record in records)
        told = about["tokens"]["words"]["response"]
        assert about["records"] == len(records)
        assert (told["total"], told["longest"], told["median"]) == (sum(lengths), lengths[-1], 4)


def test_self_instruct_and_vicuna_and_their_references(tmp_path):
    instances = [{"input": "Tope or rope", "output": "Tope"}, {"input": "", "output": "Cod"}]
    source = write_lines(tmp_path / "s.jsonl", {"instruction": "Name a fish.", "instances": instances})
    prepare("self-inst", source, None, Preparing({}), tmp_path / "self")
    assert made(tmp_path / "self") == [Record(WITH, ("Tope",)), Record(WITHOUT, ("Cod",))]
    questions = write_lines(
        tmp_path / "q.jsonl",
        {"question_id": 1, "text": "Name a fish."},
        {"question_id": 2, "turns": ["Name a fish.", "Another."]},
    )
    answers = write_lines(
        tmp_path / "a.jsonl",
        {"question_id": 2, "choices": [{"turns": ["Cod", "Eel"]}]},
        {"question_id": 1, "text": "Tope"},
    )
    prepare("vicuna", questions, answers, Preparing({}), tmp_path / "vicuna")
    assert made(tmp_path / "vicuna") == [Record(WITHOUT, ("Tope",)), Record(WITHOUT, ("Cod",))]
    with pytest.raises(UserError, match="--references: is needed"):
        prepare("vicuna", questions, None, Preparing({}), tmp_path / "none")


def test_natural_instructions_keep_test_tasks_long_answers_and_all_references(tmp_path):
    for folder in ("tasks", "splits/default"):
        (tmp_path / "ni" / folder).mkdir(parents=True)
    (tmp_path / "ni/splits/default/test_tasks.txt").write_text("task1\n")
    instances = [{"input": "Tope or rope", "output": [LONG, "Tope"]}, {"input": "", "output": ["Tope"]}]
    task = {"Definition": ["Name a fish."], "Instances": instances + [instances[0]] * 200}
    (tmp_path / "ni/tasks/task1.json").write_text(json.dumps(task, indent=1))
    (tmp_path / "ni/tasks/task2.json").write_text("no test task")
    card = prepare("sinst", tmp_path / "ni", None, Preparing({}), tmp_path / "out")
    assert made(tmp_path / "out") == [Record(WITH, (LONG, "Tope"))] * 99  # of the first hundred, one answer is short
    assert card["splits"]["valid"]["references"] == 198


def test_unnatural_instructions_are_a_sample(tmp_path):
    row = {"instruction": "Name a fish.", "instances": [{"input": f"{i}", "output": LONG} for i in range(10_005)]}
    card = prepare("uinst", write_lines(tmp_path / "u.jsonl", row), None, Preparing({}), tmp_path / "out")
    assert card["splits"]["valid"]["records"] == 10_000


def test_what_the_authors_processed_is_kept_byte_for_byte(tmp_path):
    (tmp_path / "dolly").mkdir()
    lines = {split: f'{{"output": "é", "prompt": "{split}", "input": ""}}\n' for split in ("train", "dev", "valid")}
    for split, line in lines.items():
        (tmp_path / "dolly" / f"{split}.jsonl").write_text(line)
    card = prepare("dolly", tmp_path / "dolly", None, Preparing({"words": words}), tmp_path / "out")
    assert {split: (tmp_path / "out" / f"{split}.jsonl").read_text() for split in lines} == lines
    assert {split: about["records"] for split, about in card["splits"].items()} == dict.fromkeys(lines, 1)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "SOURCE: holds no record"),
        ([{"instruction": "a"}], 'd.jsonl:1: field "response" is missing; found: instruction'),
        ([{"instruction": "a", "context": 3, "response": "b"}], 'd.jsonl:1: field "context" must be text'),
        ([{"instruction": "a", "response": " "}], "SOURCE: no record of 1 is left"),
        ([{"instruction": "a", "response": "b"}], "--dev, --test: 1000 and 500 of 1 records leave none"),
        ([{"instruction": "a", "response": "\ud83d"}], "d.jsonl:1: holds half a character"),
    ],
)
def test_a_source_that_is_something_else(tmp_path, rows, problem):
    with pytest.raises(UserError) as error:
        prepare("dolly", write_lines(tmp_path / "d.jsonl", *rows), None, Preparing({}), tmp_path / "out")
    assert problem in str(error.value)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="is there already"):
        prepare("dolly", dolly(tmp_path), None, Preparing({}), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_task_outside_of_its_folder_is_refused(tmp_path):
    (tmp_path / "splits" / "default").mkdir(parents=True)
    (tmp_path / "splits/default/test_tasks.txt").write_text("../../secret\n")
    with pytest.raises(UserError, match="which is no task"):
        prepare("sinst", tmp_path, None, Preparing({}), tmp_path / "out")


def test_dolly_under_gpt2_is_what_it_was():
    """Counts and sums of real records: whoever changes template or tokenization sees it here."""
    source, tokenizer = outside("data/dolly_6k.jsonl"), AutoTokenizer.from_pretrained(outside("tokenizers/gpt2"))
    records = [record for record, _ in read_dolly(source, None)]
    prompts = tokenizer([record.prompt for record in records], add_special_tokens=False)["input_ids"]
    answers = [record.outputs[0] for record in records]
    spelled = tokenizer(answers, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert spelled[:50] == [tokenize_response(tokenizer, answer) for answer in answers[:50]]
    responses = [[*ids, tokenizer.eos_token_id] for ids in spelled]
    found = {
        "records": len(records),
        "prompt_characters": sum(len(record.prompt) for record in records),
        "prompt_tokens": sum(map(len, prompts)),
        "longest_prompt": max(map(len, prompts)),
        "sum_of_prompt_ids": sum(map(sum, prompts)),
        "response_tokens": sum(map(len, responses)),
        "longest_response": max(map(len, responses)),
        "sum_of_response_ids": sum(map(sum, responses)),
    }
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=2) + "\n")
    assert found == json.loads(GOLDEN.read_text())
