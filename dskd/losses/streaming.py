"""Loss of a huge vocabulary in token chunks: at most chunk x V logits live at once.

The gradients of hidden states and head are computed in the forward pass, chunk by chunk, while the chunk's logits
exist; `attach_gradients` hands them to autograd. Of size V, only the head's gradient is kept for the backward pass.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from dskd.losses.tensors import Head


class StreamedLogits:
    """Logits of N tokens, a slice at a time, and the gradients that come back for them.

    Args:
        hidden: [N, D]; `head` weight [V, D].
        grad_hidden, grad_head: which gradients to collect; a head that is not trained costs nothing.
    """

    def __init__(self, hidden: Tensor, head: Head, *, grad_hidden: bool = True, grad_head: bool = False) -> None:
        self.hidden, self.head, self.weight = hidden.detach(), head, head.weight.detach()
        self.grad_hidden = torch.zeros_like(self.hidden) if grad_hidden else None
        # Summed in fp32 over the chunks, whatever the weights are in.
        train = grad_head and head.weight.requires_grad
        self.grad_weight = torch.zeros_like(self.weight, dtype=torch.float32) if train else None
        train_bias = grad_head and head.bias is not None and head.bias.requires_grad
        self.grad_bias = torch.zeros(len(self.weight), device=hidden.device) if train_bias else None

    def logits(self, rows: slice) -> Tensor:
        """fp32 logits [n, V] of the tokens in `rows`: a new tensor, the caller may overwrite it."""
        logits = torch.nn.functional.linear(self.hidden[rows], self.weight, self.head.bias).float()
        if self.head.scale != 1.0:
            logits.mul_(self.head.scale)
        if self.head.softcap is not None:
            logits.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        return logits

    def backward(self, rows: slice, grad: Tensor, logits: Tensor | None = None) -> None:
        """Take the gradient [n, V] with respect to `logits(rows)`; it is overwritten.

        `logits` are needed, unchanged, where the head is soft-capped.
        """
        if self.head.softcap is not None:
            assert logits is not None
            grad.mul_(1 - (logits / self.head.softcap).square_())
        if self.head.scale != 1.0:
            grad.mul_(self.head.scale)
        if self.grad_bias is not None:
            self.grad_bias += grad.sum(0)
        grad = grad.to(self.weight.dtype)
        if self.grad_hidden is not None:
            torch.mm(grad, self.weight, out=self.grad_hidden[rows])
        if self.grad_weight is not None:
            if self.grad_weight.dtype == grad.dtype:
                self.grad_weight.addmm_(grad.T, self.hidden[rows])
            else:
                self.grad_weight += grad.T @ self.hidden[rows]

    def gradients(self, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(tensor, gradient) pairs for `attach_gradients`; `hidden` is the tensor before it was detached."""
        pairs = [(hidden, self.grad_hidden), (self.head.weight, self.grad_weight), (self.head.bias, self.grad_bias)]
        return [(t, g.to(t.dtype)) for t, g in pairs if t is not None and g is not None and t.requires_grad]


def chunks(tokens: int, memory_mb: int, widths: Sequence[int]) -> Iterator[slice]:
    """Slices over `tokens` such that fp32 tensors of these `widths` for one slice fit into `memory_mb`."""
    size = max(1, memory_mb * 2**20 // (4 * sum(widths)))
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def attach_gradients(loss: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`loss` (scalar) as a differentiable function of each tensor, whose gradient is known already."""
    if not pairs:
        return loss
    tensors, gradients = zip(*pairs, strict=True)
    attached: Tensor = _Attach.apply(loss, gradients, *tensors)  # type: ignore[no-untyped-call]
    return attached


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor, ...] = ctx.gradients  # type: ignore[attr-defined]
        del ctx.gradients  # type: ignore[attr-defined]
        # In place: these buffers are ours, and a copy of the head's would double its memory.
        return (None, None, *(g.mul_(grad.to(g.dtype)) for g in gradients))
