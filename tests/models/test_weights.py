"""Weights read in pieces are what transformers and PEFT load whole, or they are refused."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dskd.config.errors import UserError
from dskd.models.load import DTYPES, load_causal_lm, merge_adapter
from dskd.models.weights import adapter_updates, empty_causal_lm, find_pieces, weight_names

FAMILIES = ["gpt2", "llama", "qwen2", "mistral", "gemma2"]
PARTS = 3


def read_in_parts(folder, precision="fp32", adapter=None) -> dict[str, torch.Tensor]:
    """All weights of a folder, put together of the rows that each of some ranks would read."""
    model = empty_causal_lm(folder, "teacher.path", precision, False)
    updates = {} if adapter is None else adapter_updates(model, adapter, "teacher.adapter")
    names, found = weight_names(model), {}
    pieces = find_pieces(model, names, folder, "teacher.path", updates)
    for name in names:
        count = len(model.get_parameter(name))
        ends = [count * part // PARTS for part in range(PARTS + 1)]
        own = [slice(*between) for between in pairwise(ends)]
        found[name] = torch.cat([pieces.rows(name, rows, DTYPES[precision]) for rows in own])
    return found


def assert_all_equal(found, model):
    expected = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_are_the_weights_that_transformers_loads(tiny, family, precision):
    assert_all_equal(read_in_parts(tiny(family), precision), load_causal_lm(tiny(family), "", precision, False))


def test_weights_in_several_files_are_found_by_the_index(tiny, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny("llama")).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_all_equal(read_in_parts(tmp_path), load_causal_lm(tiny("llama"), "", "fp32", False))


def test_a_body_saved_alone_has_a_tied_head(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny("gpt2"))
    model.base_model.save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    assert_all_equal(read_in_parts(tmp_path), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_model_has_its_buffers(tiny, family):
    model, whole = empty_causal_lm(tiny(family), "", "bf16", False), load_causal_lm(tiny(family), "", "bf16", False)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert not any(p.requires_grad for p in model.parameters())
    expected = dict(whole.named_buffers())
    found = dict(model.named_buffers())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], buffer) for name, buffer in expected.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])  # gpt2's weights are transposed
def test_an_adapter_is_merged_as_peft_merges_it(tiny, family, precision, tmp_path):
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 7, "init_lora_weights": False, "use_rslora": True, "alpha_pattern": {"v_proj": 3}}
    base = load_causal_lm(tiny(family), "", "fp32", False)
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)).save_pretrained(tmp_path)
    merged = dict(merge_adapter(load_causal_lm(tiny(family), "", precision, False), tmp_path, "").named_parameters())
    found = read_in_parts(tiny(family), precision, tmp_path)
    before = dict(load_causal_lm(tiny(family), "", precision, False).named_parameters())
    changed = [name for name in merged if not torch.equal(merged[name], before[name])]
    assert len(changed) == (2 if family == "gpt2" else 4)
    assert found.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6 if precision == "fp32" else 1e-2, atol=1e-6)


@pytest.mark.parametrize(
    "more",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"], "tied": True},
    ],
)
def test_an_adapter_of_another_kind_is_refused(tiny, more, tmp_path):
    base = tiny("llama", tied=more.pop("tied", False))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **more)
    get_peft_model(load_causal_lm(base, "", "fp32", False), config).save_pretrained(tmp_path)
    model = empty_causal_lm(base, "", "fp32", False)
    with pytest.raises(UserError, match=r"^teacher\.adapter: teacher\.backend=sharded merges low-rank updates .*resid"):
        adapter_updates(model, tmp_path, "teacher.adapter")


def test_tied_weights_that_were_saved_twice_must_be_the_same(tiny, copy):
    folder = copy("gpt2")
    saved = load_file(folder / "model.safetensors")
    saved["lm_head.weight"] = saved["transformer.wte.weight"].clone()
    save_file(saved, folder / "model.safetensors", {"format": "pt"})
    assert_all_equal(read_in_parts(folder), load_causal_lm(tiny("gpt2"), "", "fp32", False))
    saved["lm_head.weight"][-1, -1] += 1
    save_file(saved, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"^transformer\.wte\.weight and lm_head\.weight are one weight of the model"):
        read_in_parts(folder)


@pytest.mark.parametrize("shape", [None, (31,), (32, 1)])
def test_a_weight_that_is_not_in_the_files_as_it_is_is_told(shape, copy):
    folder = copy("llama")
    saved = load_file(folder / "model.safetensors")
    del saved["model.norm.weight"]
    if shape is not None:
        saved["model.norm.weight"] = torch.ones(shape)
    save_file(saved, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"^teacher\.backend: sharded .*model\.norm\.weight.*teacher\.backend=resident"):
        read_in_parts(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "/model.safetensors"])
def test_an_index_names_no_file_elsewhere(file, copy):
    folder = copy("llama")
    names = dict.fromkeys(load_file(folder / "model.safetensors"), file)
    (folder / "model.safetensors").unlink()
    (folder / "model-1.safetensors").write_bytes(bytes(10**5))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match=r"^teacher\.path: .*no file of this folder"):
        read_in_parts(folder)


def test_quantized_weights_are_refused(copy):
    folder = copy("llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"^teacher\.backend: sharded reads no quantized weights"):
        empty_causal_lm(folder, "teacher.path", "bf16", False)


def test_weights_that_transformers_puts_together_are_refused(tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "vocab_size": 50}
    config = CONFIG_MAPPING["qwen2_moe"](**shape, **experts, shared_expert_intermediate_size=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^teacher\.backend: sharded does not support Qwen2MoeForCausalLM, whose"):
        empty_causal_lm(tmp_path, "teacher.path", "bf16", False)


def test_a_broken_file_is_told_in_one_line(copy):
    folder = copy("llama")
    weights = folder / "model.safetensors"
    shutil.copy(weights, folder / "whole")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"^teacher\.path: no weights load from "):
        read_in_parts(folder)
