"""What the losses see of a model is what the model itself computes, or the model is refused."""

import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import linear
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dskd.config.errors import UserError
from dskd.data.batch import collate
from dskd.data.tokenization import Sample
from dskd.models import views
from dskd.models.load import DTYPES, load_causal_lm
from dskd.models.views import ModelView, check_view, check_vocabulary, response_tokens, try_packing

FAMILIES = ["gpt2", "llama", "qwen2", "mistral", "gemma2"]
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "initializer_range": 0.2}
UNUSUAL = {  # heads that none of the tiny families has
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "phi": {},  # a bias
}


def sample(rng: np.random.Generator, prompt: int, response: int) -> Sample:
    return Sample(rng.integers(0, 50, prompt), rng.integers(0, 50, response))


@pytest.fixture
def side():
    rng = np.random.default_rng(0)
    return collate([sample(rng, 3, 6), sample(rng, 0, 4), sample(rng, 7, 1)], pad_id=9)


def own_logits(model, side) -> torch.Tensor:
    with torch.no_grad():
        output = model(input_ids=side.input_ids, attention_mask=side.attention_mask)
    return output.logits.flatten(0, 1)[side.positions]


def from_view(view, side) -> torch.Tensor:
    """Logits by the definition of a head, the plain way."""
    head = view.ends.head()
    with torch.no_grad():
        logits = linear(view.body.states(side), head.weight, head.bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_view_of_each_family_gives_its_logits(tiny, side, family, tied):
    model = load_causal_lm(tiny(family, tied=tied), "student.path", "fp32", False).eval()
    view = ModelView(model, "student.path")
    assert check_view(view) is None
    assert (view.ends.head().weight is view.ends.embeddings.weight) == tied
    assert view.ends.head().weight.shape == (view.ends.vocab_size, view.ends.hidden_size)
    expected = own_logits(model, side)
    assert expected.std() > 0.5
    torch.testing.assert_close(from_view(view, side), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_view_holds_in_bf16(tiny, side, family):
    model = load_causal_lm(tiny(family), "student.path", "bf16", False).eval()
    view = ModelView(model, "student.path")
    assert check_view(view) is None
    assert view.body.states(side).dtype == torch.bfloat16
    torch.testing.assert_close(from_view(view, side).float(), own_logits(model, side).float(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("family", UNUSUAL)
def test_scales_and_biases_of_other_families(side, family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**(SHAPE | IDS | UNUSUAL[family]))).eval()
    if family == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    view = ModelView(model, "teacher.path")
    assert check_view(view) is None
    assert view.ends.head().scale == (1.0 if family == "phi" else 0.25)
    torch.testing.assert_close(from_view(view, side), own_logits(model, side), atol=1e-5, rtol=1e-4)


def test_soft_capping_is_in_the_logits_that_are_compared(tiny):
    view = ModelView(load_causal_lm(tiny("gemma2"), "teacher.path", "fp32", False), "teacher.path")
    assert view.ends.softcap == 3.0
    view.ends.softcap = None
    with pytest.raises(UserError, match=r"^teacher\.path: Gemma2ForCausalLM is not supported"):
        check_view(view)


def test_tokens_are_those_of_the_batch(tiny, side):
    view = ModelView(load_causal_lm(tiny("llama"), "student.path", "fp32", False), "student.path")
    tokens = response_tokens(view.body.states(side), side)
    assert tokens.hidden.shape == (len(side.labels), view.ends.hidden_size)
    assert tokens.hidden.requires_grad
    assert torch.equal(tokens.labels, side.labels)
    assert torch.equal(tokens.inputs, side.inputs)
    assert tokens.lengths == side.lengths
    embedded = view.ends.embed(side.labels)
    assert torch.equal(embedded, view.ends.embeddings.weight[side.labels])
    assert not embedded.requires_grad


def test_padding_changes_no_hidden_state(tiny, side):
    view = ModelView(load_causal_lm(tiny("qwen2"), "student.path", "fp32", False).eval(), "student.path")
    row, length = 1, int(side.attention_mask[1].sum())
    padded = view.body.hidden(side.input_ids, side.attention_mask)[row, :length]
    alone = view.body.hidden(side.input_ids[row : row + 1, :length], side.attention_mask[row : row + 1, :length])[0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)


def scale_logits(model) -> None:
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    model.forward = scaled


def shift_hidden(model) -> None:
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 0.1,))


def cut_logits(model) -> None:
    model.lm_head.register_forward_hook(lambda _, inputs, output: output[..., :-3])


@pytest.mark.parametrize("tamper", [scale_logits, shift_hidden, cut_logits])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_does_something_else_to_its_logits_is_refused(tiny, tamper, training):
    model = load_causal_lm(tiny("llama"), "teacher.path", "fp32", False).train(training)
    tamper(model)
    with pytest.raises(
        UserError, match=r"^teacher\.path: LlamaForCausalLM is not supported: its logits are "
    ) as raised:
        check_view(ModelView(model, "teacher.path"))
    assert len(str(raised.value).splitlines()) == 1
    assert model.training == training


def test_embeddings_narrower_than_the_layers_are_what_the_head_takes():
    config = CONFIG_MAPPING["opt"](
        vocab_size=50, hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4
    )
    view = ModelView(AutoModelForCausalLM.from_config(config), "student.path")
    check_view(view)
    assert view.ends.hidden_size == view.ends.embeddings.embedding_dim == 16


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_lora_on_head_or_embeddings_is_refused(tiny, target):
    model = load_causal_lm(tiny("llama"), "student.path", "fp32", False)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", target]))
    with pytest.raises(
        UserError, match=r"^student\.path: LlamaForCausalLM is not supported: .*LoRA on the output layer"
    ):
        ModelView(adapted, "student.path")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_view_looks_through_lora(tiny, side, family):
    model = load_causal_lm(tiny(family), "student.path", "fp32", False)
    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, settings).eval()
    view = ModelView(adapted, "student.path")
    assert check_view(view) is None
    torch.testing.assert_close(from_view(view, side), own_logits(adapted, side), atol=1e-5, rtol=1e-4)


def test_a_tokenizer_with_ids_beyond_the_embeddings_is_refused(tiny):
    view = ModelView(load_causal_lm(tiny("llama"), "student.path", "fp32", False), "student.path")
    tokenizer = tiny.tokenizer("pieces")
    rows = view.ends.embeddings.num_embeddings
    tokenizer.add_tokens([f"<new{i}>" for i in range(rows - len(tokenizer))])
    assert check_vocabulary(view, tokenizer) is None
    tokenizer.add_tokens(["<one more>"])
    with pytest.raises(UserError) as raised:
        check_vocabulary(view, tokenizer)
    assert str(raised.value) == f"student.path: its tokenizer has ids up to {rows}, its embeddings {rows} rows"


def test_the_precisions_are_those_of_the_settings():
    assert {"bf16": torch.bfloat16, "fp32": torch.float32, "auto": "auto"} == DTYPES


PACKABLE = {"gpt2": {}, "llama": {}, "qwen2": {}, "mistral": {"sliding_window": 6}}


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_records_have_the_states_and_gradients_of_padded_ones(tiny, family):
    """In a row of their own kind of length too, and whatever stands before them; padded ones run as before."""
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    model = load_causal_lm(tiny(family, **PACKABLE[family], **still), "student.path", "fp32", False).train()
    view, rng = ModelView(model, "student.path"), np.random.default_rng(1)
    records = [sample(rng, *lengths) for lengths in ((3, 9), (0, 4), (7, 1), (0, 1), (20, 5))]
    weight = torch.randn(sum(collate(records).lengths), 32)
    found = []
    for packed in (False, True, False):
        if packed:
            assert try_packing(view, 40) is None
            assert model.training
        states = view.body.states(collate(records, packed=packed))
        (states * weight).sum().backward()
        found.append([states.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    for own, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(own, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)
    assert all(torch.equal(own, expected) for own, expected in zip(found[2], found[0], strict=True))
    assert "packed" not in model.config.to_json_string()


def test_a_body_that_packing_would_change_is_left_as_it_is(tiny, monkeypatch):
    model = load_causal_lm(tiny("llama"), "student.path", "fp32", False)
    for wrong, problem in (
        (lambda places, *shape: {"position_ids": places[None]}, r"its hidden states are then others \(relative "),
        (lambda places, *shape: {"attention_mask": places.view(2, 3, -1)}, r"it fails \(\w+Error: "),
    ):
        monkeypatch.setattr(views, "packed_inputs", wrong)
        assert re.match(problem, try_packing(ModelView(model, "student.path"), 40))
        assert model.config._attn_implementation == "sdpa"
