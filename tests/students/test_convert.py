"""What was pickled becomes safetensors without running what a pickle says; else the way to do it is told."""

import json
import pickle
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd.cli import main
from dskd.config.errors import UserError
from dskd.students.convert import convert

IDS = torch.arange(20)[None]


class Payload:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('ran').touch()",)


@pytest.fixture
def pickled(tiny, tmp_path):
    """A folder as it was saved before safetensors: weights in one .bin file or in two with an index."""

    def make(family, shards=1):
        source, folder = tiny(family), tmp_path / f"{family}-{shards}"
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        state = AutoModelForCausalLM.from_pretrained(source).state_dict()
        names = sorted(state)
        if shards == 1:
            torch.save(state, folder / "pytorch_model.bin")
            return folder
        places = {name: f"pytorch_model-{index % 2 + 1:05}-of-00002.bin" for index, name in enumerate(names)}
        for file in set(places.values()):
            torch.save({name: state[name] for name in names if places[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        return folder

    return make


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()(IDS).logits


@pytest.mark.parametrize(("family", "shards"), [("gpt2", 1), ("llama", 1), ("llama", 2)])
def test_pickled_weights_become_safetensors(tiny, pickled, tmp_path, family, shards):
    convert(pickled(family, shards), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin"))
    assert (tmp_path / "out" / "MANIFEST.json").is_file()
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tiny(family)), rtol=0, atol=0)
    found, tokenizer = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", tiny(family)))
    assert found.get_vocab() == tokenizer.get_vocab()


def test_an_old_tokenizer_becomes_tokenizer_json(tiny, pickled, tmp_path):
    source = pickled("gpt2")
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (source / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (source / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    text = "Question 3: Where is Zürich?"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode(text) == tiny.tokenizer("bytes").encode(text)


def test_no_pickled_code_runs(pickled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = pickled("llama")
    for written in (
        lambda file: torch.save({"x": Payload()}, file),
        lambda file: file.write_bytes(pickle.dumps(Payload())),
    ):
        written(source / "pytorch_model.bin")
        with pytest.raises(UserError, match="does not load without running code of its own; where you trust it"):
            convert(source, tmp_path / "out")
        assert not (tmp_path / "ran").exists()
        assert not (tmp_path / "out").exists()


def test_a_pickled_adapter(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        expected = adapted.eval()(IDS).logits
    adapted.save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "adapter_model.safetensors").unlink()
    state = {n.replace(".default", ""): p for n, p in adapted.state_dict().items() if "lora_" in n}
    torch.save(state, tmp_path / "old" / "adapter_model.bin")
    convert(tmp_path / "old", tmp_path / "new")
    base = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, tmp_path / "new").eval()(IDS).logits
    torch.testing.assert_close(found, expected)


def test_no_code_of_a_pickled_adapter_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_config.json").write_text("{}")
    torch.save({"x": Payload()}, tmp_path / "old" / "adapter_model.bin")
    with pytest.raises(UserError, match="does not load without running code of its own"):
        convert(tmp_path / "old", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["../other.bin", "/etc/passwd", 3])
def test_an_index_that_leaves_its_folder(pickled, tmp_path, place):
    source = pickled("llama", 2)
    index = source / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": place}}))
    with pytest.raises(UserError, match="which is no file of its folder"):
        convert(source, tmp_path / "out")


def test_the_verb(pickled, tmp_path, monkeypatch, capsys):
    source = pickled("llama")
    monkeypatch.setattr(sys, "argv", ["dskd", "convert", str(source), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert "loads without pickle" in capsys.readouterr().out
