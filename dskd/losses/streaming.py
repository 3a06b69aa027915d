"""Loss of a huge vocabulary in token chunks: at most chunk x V logits live at once.

The gradients of hidden states and head are computed in the forward pass, chunk by chunk, while the chunk's logits
exist; `attach_gradients` hands them to autograd. Of size V, only the head's gradient is kept for the backward pass.

The matrix products run over whole chunks. Everything between them runs over `blocks` of a chunk, a few rows that
stay in the processor's cache, and a block's gradient is written over its logits.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from dskd.losses.tensors import Head

CHUNK_TOKENS = 512  # matrix products gain nothing from more rows
BLOCK_CELLS = {"cpu": 2**19, "cuda": 2**25}  # logits of a block; on a CPU 2 MiB, which beats 64 MiB four times over


class StreamedLogits:
    """Logits of N tokens, a slice at a time, and the gradients that come back for them.

    Gradients are collected where they are wanted: for `hidden` if it requires one, for the head (of a student) if
    `grad_head` is set and the head is trained; a frozen head costs nothing.

    Args:
        hidden: [N, D]; `head` weight [V, D].
    """

    def __init__(self, hidden: Tensor, head: Head, *, grad_head: bool = False) -> None:
        # Detached, so that autograd records nothing of what is done with them.
        self.source, self.hidden, self.head, self.weight = hidden, hidden.detach(), head, head.weight.detach()
        self.bias = None if head.bias is None else head.bias.detach()
        train = torch.is_grad_enabled()
        self.grad_hidden = torch.zeros_like(self.hidden) if train and hidden.requires_grad else None
        # Summed in fp32 over the chunks, whatever the weights are in.
        train_head = train and grad_head and head.weight.requires_grad
        self.grad_weight = torch.zeros_like(self.weight, dtype=torch.float32) if train_head else None
        train_bias = train and grad_head and head.bias is not None and head.bias.requires_grad
        self.grad_bias = torch.zeros(len(self.weight), device=hidden.device) if train_bias else None

    @property
    def is_trained(self) -> bool:
        """Whether any gradient is wanted."""
        return any(grad is not None for grad in (self.grad_hidden, self.grad_weight, self.grad_bias))

    def logits(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """fp32 logits [n, V] of the tokens in `rows`, written into `out` where that is given."""
        if out is not None and out.dtype == self.weight.dtype and self.bias is None:
            logits = torch.mm(self.hidden[rows], self.weight.T, out=out)
        else:
            logits = torch.nn.functional.linear(self.hidden[rows], self.weight, self.bias)
            logits = logits.float() if out is None else out.copy_(logits)
        if self.head.scale != 1.0:
            logits.mul_(self.head.scale)
        if self.head.softcap is not None:
            logits.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        return logits

    def keep_gradient(self, logits: Tensor, grad: Tensor) -> None:
        """Overwrite a block of logits that `stream` gave by the gradient with respect to it.

        The gradient is carried through soft-cap and scale on the way; `grad` is overwritten too.
        """
        if self.head.softcap is not None:
            grad.mul_(logits.div_(self.head.softcap).square_().neg_().add_(1))
        if self.head.scale != 1.0:
            grad.mul_(self.head.scale)
        logits.copy_(grad)

    def backward(self, rows: slice, grad: Tensor) -> None:
        """Take the gradient [n, V] of the tokens in `rows`: their logits after `keep_gradient` on all blocks."""
        if not self.is_trained:
            return
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

    def gradients(self, scale: float = 1.0) -> list[tuple[Tensor, Tensor]]:
        """(tensor, gradient times scale) pairs for `attach_gradients`."""
        pairs = [
            (self.source, self.grad_hidden),
            (self.head.weight, self.grad_weight),
            (self.head.bias, self.grad_bias),
        ]
        kept = [(t, g) for t, g in pairs if t is not None and g is not None]
        return [(t, (g if scale == 1.0 else g.mul_(scale)).to(t.dtype)) for t, g in kept]


def stream(tokens: range, memory_mb: int, *streams: StreamedLogits) -> Iterator[tuple[slice, list[Tensor]]]:
    """Go over `tokens` a block at a time: the block's place, and its logits [n, V] from each of the streams.

    Before the next block is asked for, `keep_gradient` has to be called for each stream that wants gradients.
    """
    widths = [len(each.weight) for each in streams]
    size = chunk_size(len(tokens), memory_mb, widths)
    buffers = [torch.empty(size, width, device=s.hidden.device) for s, width in zip(streams, widths, strict=True)]
    step = max(1, BLOCK_CELLS[streams[0].hidden.device.type] // max(widths))
    for start in range(tokens.start, tokens.stop, size):
        rows = slice(start, min(start + size, tokens.stop))
        made = [s.logits(rows, b[: rows.stop - start]) for s, b in zip(streams, buffers, strict=True)]
        for first in range(start, rows.stop, step):
            block = slice(first, min(first + step, rows.stop))
            yield block, [chunk[block.start - start : block.stop - start] for chunk in made]
        for each, chunk in zip(streams, made, strict=True):
            each.backward(rows, chunk)


def chunk_size(tokens: int, memory_mb: int, widths: Sequence[int]) -> int:
    """Tokens at a time such that their fp32 logits of all `widths` fit into `memory_mb`."""
    return max(1, min(tokens, CHUNK_TOKENS, memory_mb * 2**20 // (4 * sum(widths))))


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
