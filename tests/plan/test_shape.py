"""A model's shape from its config.json, against transformers' own models."""

import json

import pytest
import torch
from support.published import QWEN_1_5B, QWEN_72B
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dskd.config.errors import UserError
from dskd.plan.activations import Batch, kept_activations
from dskd.plan.shape import read_shape, shape_of

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3")


def test_the_published_numbers_of_weights():
    """All but the biases of queries, keys and values, 0.004 %."""
    assert shape_of(QWEN_72B, "config").weights == 72_706_203_648 - 80 * (8192 + 2 * 1024)
    assert shape_of(QWEN_1_5B, "config").weights == 1_543_714_304 - 28 * (1536 + 2 * 256)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_counted_from_a_configuration_are_those_of_the_model(family):
    config = CONFIG_MAPPING[family]()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = sum(p.numel() for p in model.parameters())
    assert shape_of(config.to_dict(), family).weights == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "gemma2"])
def test_where_weights_lie_beside_it_they_are_counted_exactly(tiny, family):
    folder = tiny(family)
    expected = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert read_shape(folder, "student.path").weights == expected


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "mistral"])
def test_activations_are_what_autograd_keeps(family, precision, checkpointing, tiny):
    """Of a batch with padding; all storages that are saved for the backward pass, each once, but for the weights."""
    wide = {"n_embd": 128} if family == "gpt2" else {"hidden_size": 128, "intermediate_size": 384}
    folder, batch = tiny(family, **wide), Batch(4, 96)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=precision).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.zeros(batch.records, batch.tokens, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, -8:] = 0
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    found = sum(storage.nbytes() for storage in kept.values())
    size = torch.finfo(precision).bits // 8
    assert kept_activations(read_shape(folder, ""), batch, size, checkpointing, False) == pytest.approx(found, rel=0.1)


def test_a_configuration_that_is_no_plain_decoder_is_told(tmp_path):
    file = tmp_path / "config.json"
    for config, expected in (
        (QWEN_72B | {"num_experts": 8}, "num_experts: the memory of a mixture of experts is not known"),
        (QWEN_72B | {"hidden_size": "wide"}, "hidden_size: a whole number above 0 is expected, got 'wide'"),
        ({"model_type": "llama"}, "hidden_size is missing"),
        ([], "holds no JSON object"),
    ):
        file.write_text(json.dumps(config))
        with pytest.raises(UserError, match=expected):
            read_shape(tmp_path, "teacher.path")
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    file.write_text(json.dumps(QWEN_72B))
    with pytest.raises(UserError, match=r"model\.safetensors: is no safetensors file"):
        read_shape(tmp_path, "teacher.path")


def test_a_decoder_inside_a_larger_model_is_found(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": QWEN_1_5B}))
    assert read_shape(tmp_path, "student.path") == shape_of(QWEN_1_5B, "")
