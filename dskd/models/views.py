"""A model's body and ends (embeddings and head) through the Hugging Face API; no switch on any model type."""

from typing import Any

import numpy as np
import torch
from deepspeed.runtime.zero import GatheredParameters
from peft import PeftModel
from torch import Tensor, nn

from dskd.config.errors import UserError, one_line
from dskd.data.batch import Side, collate
from dskd.data.tokenization import Sample
from dskd.losses.streaming import StreamedLogits
from dskd.losses.tensors import Head, Tokens
from dskd.models.packing import PACKED, packed_inputs


class ModelEnds:
    """Head and input embeddings of a model (implements `dskd.losses.tensors.Model`)."""

    def __init__(self, output: nn.Linear, embeddings: nn.Embedding, scale: float, softcap: float | None) -> None:
        self.output, self.embeddings, self.scale, self.softcap = output, embeddings, scale, softcap
        self.hidden_size, self.vocab_size = output.in_features, output.out_features

    def head(self) -> Head:
        """The head as it is now; under ZeRO-3 only inside a module's forward, where DeepSpeed gathers it."""
        return Head(self.output.weight, self.output.bias, self.scale, self.softcap)

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [N, D] of ids [N], without gradient."""
        with torch.no_grad():
            embedded: Tensor = self.embeddings(ids)
        return embedded


class ModelBody:
    """Everything between embeddings and head."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states [B, S, D]: what the head is applied to."""
        output = self.module(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states

    def states(self, side: Side) -> Tensor:
        """Hidden states [N, D] of a micro-batch's response tokens."""
        if side.places is None:
            hidden = self.hidden(side.input_ids, side.attention_mask)
        else:
            inputs = packed_inputs(side.places, *side.attention_mask.shape)
            hidden = self.module(input_ids=side.input_ids, use_cache=False, **inputs).last_hidden_state
        return hidden.flatten(0, 1)[side.positions]


class ModelView:
    """A causal language model as its body and its ends.

    Args:
        model: as transformers or PEFT gives it.
        key: the run file's key of the model, for messages.
    """

    def __init__(self, model: nn.Module, key: str) -> None:
        causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        head, embeddings = causal.get_output_embeddings(), causal.get_input_embeddings()
        if not isinstance(head, nn.Linear) or not isinstance(embeddings, nn.Embedding):
            raise UserError(
                f"{key}: {type(causal).__name__} is not supported: its output layer is a {type(head).__name__} and its "
                f"input embeddings are a {type(embeddings).__name__}; a plain Linear and Embedding are expected"
                " (LoRA on the output layer is not)"
            )
        config = causal.config.get_text_config()
        # Cohere multiplies the logits by logit_scale, Granite divides them by logits_scaling.
        multiplied = float(getattr(config, "logit_scale", None) or 1.0)
        divided = float(getattr(config, "logits_scaling", None) or 1.0)
        self.key, self.causal = key, causal
        self.body = ModelBody(causal.base_model)
        self.ends = ModelEnds(head, embeddings, multiplied / divided, getattr(config, "final_logit_softcapping", None))


def response_tokens(states: Tensor, side: Side, pairs: Tensor | None = None) -> Tokens:
    """The response tokens of one side of a micro-batch with their hidden states [N, D]."""
    return Tokens(states, side.inputs, side.labels, side.lengths, pairs)


@torch.no_grad()
def check_view(view: ModelView) -> None:
    """Compare head(hidden) with the model's own logits on a small batch, so that no unusual head is missed.

    Raises:
        UserError: naming the model and the difference, where the two are not the same.
    """
    training, device = view.causal.training, view.ends.embeddings.weight.device
    view.causal.eval()
    ids = torch.arange(24, device=device).reshape(2, 12) % view.ends.embeddings.num_embeddings
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    expected = view.causal(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()].float()
    hidden = view.body.hidden(ids, mask)[mask.bool()]
    with GatheredParameters([view.ends.output.weight]):
        logits = StreamedLogits(hidden, view.ends.head()).logits(slice(None))
    view.causal.train(training)
    if not expected.isfinite().all():
        raise UserError(
            f"{view.key}: its logits are not finite: its weights hold NaN or infinity, or are far too large"
        )
    name = f"{view.key}: {type(view.causal).__name__} is not supported"
    if logits.shape != expected.shape:
        raise UserError(f"{name}: its logits are {expected.shape[-1]} wide, its output layer {logits.shape[-1]}")
    width, hidden_size = view.ends.embeddings.embedding_dim, view.ends.hidden_size
    if width != hidden_size:
        raise UserError(f"{name}: embeddings are {width} wide, hidden states {hidden_size}")
    difference = float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 3e-2
    if not difference < tolerance:
        raise UserError(
            f"{name}: its logits are not its output layer times its last hidden state (relative difference "
            f"{difference:.1e}, allowed {tolerance:.0e}); it scales or shifts them in a way that is not known here"
        )


def try_packing(view: ModelView, longest: int) -> str | None:
    """Let a body run packed micro-batches; why it cannot, where it then gives other hidden states or fails.

    Compares records of up to `longest` tokens with the same ones padded. Collective under ZeRO-3.
    """
    causal, before = view.causal, view.causal.config.get_text_config()._attn_implementation
    if before != "sdpa":
        return f"its attention is {before}, and only sdpa is packed"
    training = causal.training
    causal.eval().set_attn_implementation(PACKED)
    try:
        problem = packing_problem(view, longest)
    except Exception as error:  # whatever a model makes of a mask that it does not know
        problem = f"it fails ({one_line(f'{type(error).__name__}: {error}', 200)})"
    causal.train(training)
    if problem is not None:
        causal.set_attn_implementation(before)
    return problem


@torch.no_grad()
def packing_problem(view: ModelView, longest: int) -> str | None:
    """What differs between the hidden states of a packed and of a padded micro-batch, if too much does."""
    embeddings = view.ends.embeddings
    lengths = (longest, max(2, longest // 2), 2)
    ids = np.arange(sum(lengths)) * 7 % embeddings.num_embeddings
    records = [Sample(own[:1], own[1:]) for own in np.split(ids, np.cumsum(lengths)[:-1])]
    expected, found = (
        view.body.states(collate(records, packed=packed).to(embeddings.weight.device)).float()
        for packed in (False, True)
    )
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    tolerance = 1e-4 if embeddings.weight.dtype == torch.float32 else 3e-2
    if difference < tolerance:
        return None
    return f"its hidden states are then others (relative difference {difference:.1e}, allowed {tolerance:.0e})"


def check_vocabulary(view: ModelView, tokenizer: Any) -> None:
    """Raise `UserError` where a tokenizer has ids for which the model has no embedding."""
    check_rows(view.ends.embeddings.num_embeddings, tokenizer, view.key)


def check_rows(rows: int, tokenizer: Any, key: str) -> None:
    """The same of so many rows of embeddings."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise UserError(f"{key}: its tokenizer has ids up to {highest}, its embeddings {rows} rows")
