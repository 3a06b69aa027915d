"""Commands whose mistake shows only once models are loaded: one line, code 2, and nothing is left of them."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from support.starts import Start, end_all

CASES = [
    ("train run.yaml method.kind=kd", "method.kind: kd needs one vocabulary"),
    ("train run.yaml student.path=mute", "student.path: no tokenizer loads from"),
    ("train run.yaml student.path=endless", "student.path: its tokenizer has no EOS token"),
    (
        "train run.yaml data.bos=true student.path=teacher teacher.path=student",
        "data.bos: the tokenizer of student.path",
    ),
    ("train run.yaml student.path=wild", "student.path: its logits are not finite"),
    ("train run.yaml teacher.path=wild student.path=teacher", "teacher.path: its logits are not finite"),
    ("train run.yaml student.path=hollow", "student.path: "),
    ("train run.yaml student.lora.targets=[q_porj]", "student.lora.targets: no module of the student ends in 'q_porj'"),
    ("train run.yaml train.global_batch_size=64", "train.global_batch_size: 64 is more than the 40 records"),
    ("train run.yaml method.projectors_from=student", "method.projectors_from: no projectors.safetensors in"),
    ("train run.yaml output.name=foreign", "output.name: "),
    (
        "evaluate wild --data dev.jsonl --max-length 64 --max-prompt-length 32",
        "wild: its weights are not finite, first ",
    ),
    ("evaluate mute --data dev.jsonl --max-length 64 --max-prompt-length 32", "mute: no tokenizer loads from mute"),
]


@pytest.fixture(scope="module")
def inputs(tiny, make_run, tmp_path_factory):
    root = tmp_path_factory.mktemp("mistakes")
    make_run(root)
    for name, family in {"student": "llama", "teacher": "qwen2"}.items():
        shutil.copytree(tiny(family), root / name)
    for name in ("mute", "endless", "wild", "hollow"):
        shutil.copytree(root / "student", root / name)
    (root / "mute" / "tokenizer.json").unlink()
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        path = root / "endless" / file
        if path.is_file():
            values = json.loads(path.read_text())
            values.pop("eos_token", None)
            path.write_text(json.dumps(values))
    weights = load_file(root / "wild" / "model.safetensors")
    for weight in weights.values():
        weight.fill_(float("nan"))
    save_file(weights, root / "wild" / "model.safetensors", {"format": "pt"})
    weights.pop("model.norm.weight")
    save_file(weights, root / "hollow" / "model.safetensors", {"format": "pt"})
    foreign = root / "outputs" / "llama-pieces-untied" / "dskd_cma" / "foreign"
    foreign.mkdir(parents=True)
    (foreign / "notes.txt").write_text("mine")
    return root


def own_name(words: list[str], number: int) -> list[str]:
    """All run at once, and two runs of one name, or that make a folder for both, would be in each other's way."""
    own = [f"output.name=run{number}", *([] if "output.name=foreign" in words else [f"output.root=outputs{number}"])]
    return [*words[:2], *own, *words[2:]] if words[0] == "train" else words


def test_each_is_told_in_one_line_and_leaves_nothing(inputs, monkeypatch, tmp_path):
    there = sorted(inputs.rglob("*"))
    monkeypatch.chdir(inputs)
    try:
        starts = [Start(tmp_path / str(i), *own_name(words.split(), i)) for i, (words, _) in enumerate(CASES)]
        told = {words: (start.wait(), start.text()) for (words, _), start in zip(CASES, starts, strict=True)}
    finally:
        end_all()
    for words, expected in CASES:
        codes, text = told[words]
        assert codes == [2], f"{words}: {text}"
        *_, line = text.splitlines()
        assert line.startswith("dskd: "), words
        assert expected in line, words
        assert "Traceback" not in text, words
    assert sorted(inputs.rglob("*")) == there
