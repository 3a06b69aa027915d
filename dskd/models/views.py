"""A model's body, embeddings and head through the Hugging Face API; no switch on any model type."""

from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters
from peft import PeftModel
from torch import Tensor, nn

from dskd.config.errors import UserError
from dskd.data.batch import Side
from dskd.losses.streaming import StreamedLogits
from dskd.losses.tensors import Head, Tokens


class ModelView:
    """Access to a causal language model for losses (implements `dskd.losses.tensors.Model`).

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
        self.key, self.causal = key, causal
        self.body: nn.Module = causal.base_model
        self.output, self.embeddings = head, embeddings
        self.hidden_size, self.vocab_size = head.in_features, head.out_features
        config = causal.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies the logits by logit_scale, Granite divides them by logits_scaling.
        self.scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )

    def head(self) -> Head:
        """The head as it is now; under ZeRO-3 only inside a module's forward, where DeepSpeed gathers it."""
        return Head(self.output.weight, self.output.bias, self.scale, self.softcap)

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [N, D] of ids [N], without gradient."""
        with torch.no_grad():
            embedded: Tensor = self.embeddings(ids)
        return embedded

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states [B, S, D]: what the head is applied to."""
        output = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states

    def tokens(self, side: Side) -> Tokens:
        """The response tokens of a micro-batch with their hidden states."""
        hidden = self.hidden(side.input_ids, side.attention_mask).flatten(0, 1)[side.positions]
        return Tokens(hidden, side.inputs, side.labels, side.lengths)


@torch.no_grad()
def check_view(view: ModelView) -> None:
    """Compare head(hidden) with the model's own logits on a small batch, so that no unusual head is missed.

    Raises:
        UserError: naming the model and the difference, where the two are not the same.
    """
    training, device = view.causal.training, view.embeddings.weight.device
    view.causal.eval()
    ids = torch.arange(24, device=device).reshape(2, 12) % view.embeddings.num_embeddings
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    expected = view.causal(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()].float()
    hidden = view.hidden(ids, mask)[mask.bool()]
    with GatheredParameters([view.output.weight]):
        logits = StreamedLogits(hidden, view.head()).logits(slice(None))
    view.causal.train(training)
    name = f"{view.key}: {type(view.causal).__name__} is not supported"
    if logits.shape != expected.shape:
        raise UserError(f"{name}: its logits are {expected.shape[-1]} wide, its output layer {logits.shape[-1]}")
    if view.embeddings.embedding_dim != view.hidden_size:
        raise UserError(
            f"{name}: embeddings are {view.embeddings.embedding_dim} wide, hidden states {view.hidden_size}"
        )
    difference = float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 3e-2
    if not difference < tolerance:
        raise UserError(
            f"{name}: its logits are not its output layer times its last hidden state (relative difference "
            f"{difference:.1e}, allowed {tolerance:.0e}); it scales or shifts them in a way that is not known here"
        )


def check_vocabulary(view: ModelView, tokenizer: Any) -> None:
    """Raise `UserError` where a tokenizer has ids for which the model has no embedding."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= view.embeddings.num_embeddings:
        raise UserError(
            f"{view.key}: its tokenizer has ids up to {highest}, its embeddings {view.embeddings.num_embeddings} rows"
        )
