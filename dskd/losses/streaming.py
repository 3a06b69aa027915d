"""Loss of a huge vocabulary in token chunks: at most chunk x V logits live at once.

The gradients of hidden states and head are computed in the forward pass, chunk by chunk, while the chunk's logits
exist; `attach_gradients` hands them to autograd. Of size V, only the head's gradient is kept for the backward pass,
summed in the type that `sum_type` says.

The matrix products run over whole chunks. Everything between them is `kernels`' and runs over blocks of a chunk; a
block's gradient is written over its logits.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from dskd.losses.kernels import Block, Kernels, plain
from dskd.losses.products import multiply
from dskd.losses.tensors import Head


class StreamedLogits:
    """Logits of N tokens, a slice at a time, and the gradients that come back for them.

    Gradients are collected where they are wanted: for `hidden` if it requires one, for the head (of a student) if
    `head_memory_mb` is given and the head is trained; a frozen head costs nothing.

    Args:
        hidden: [N, D]; `head` weight [V, D].
        head_memory_mb: what the head's gradient may take to be summed in fp32.
        overwrite: write the gradient of `hidden` over it; for what no one reads again, autograd included.
    """

    def __init__(
        self, hidden: Tensor, head: Head, *, head_memory_mb: int | None = None, overwrite: bool = False
    ) -> None:
        # Detached, so that autograd records nothing of what is done with them.
        self.source, self.hidden, self.head, self.weight = hidden, hidden.detach(), head, head.weight.detach()
        self.bias = None if head.bias is None else head.bias.detach()
        train = torch.is_grad_enabled()
        self.grad_hidden = None
        if train and hidden.requires_grad:
            self.grad_hidden = self.hidden if overwrite else torch.zeros_like(self.hidden)
        self.grad_weight = self.grad_bias = None
        if train and head_memory_mb is not None:
            if head.weight.requires_grad:
                self.grad_weight = torch.zeros_like(self.weight, dtype=sum_type(self.weight, head_memory_mb))
            if head.bias is not None and head.bias.requires_grad:
                self.grad_bias = torch.zeros(len(self.weight), device=hidden.device)

    @property
    def is_trained(self) -> bool:
        """Whether any gradient is wanted."""
        return any(grad is not None for grad in (self.grad_hidden, self.grad_weight, self.grad_bias))

    def product(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """Product [n, V] of the tokens in `rows` with the head, bias included; into `out` where that is given."""
        hidden = self.hidden[rows]
        if out is None or out.dtype != self.weight.dtype:
            made = torch.nn.functional.linear(hidden, self.weight, self.bias)
            return made if out is None else out.copy_(made)
        if self.bias is not None:
            return torch.addmm(self.bias, hidden, self.weight.T, out=out)
        multiply(hidden, self.weight.T, out)
        return out

    def logits(self, rows: slice) -> Tensor:
        """fp32 logits [n, V] of the tokens in `rows`."""
        logits = self.product(rows).float()
        plain.shape(logits, self.head)
        return logits

    def backward(self, rows: slice, grad: Tensor) -> None:
        """Take the gradient [n, V] of the product of the tokens in `rows`."""
        if not self.is_trained:
            return
        if self.grad_bias is not None:
            self.grad_bias += grad.sum(0, dtype=torch.float32)
        grad = grad.to(self.weight.dtype)
        if self.grad_weight is not None:
            add_product(self.grad_weight, grad.T, self.hidden[rows])
        if self.grad_hidden is not None:  # last, since it may be written over the hidden states
            multiply(grad, self.weight, self.grad_hidden[rows])

    def gradients(self, scale: float = 1.0) -> list[tuple[Tensor, Tensor]]:
        """(tensor, gradient times scale) pairs for `attach_gradients`."""
        pairs = [
            (self.source, self.grad_hidden),
            (self.head.weight, self.grad_weight),
            (self.head.bias, self.grad_bias),
        ]
        kept = [(t, g) for t, g in pairs if t is not None and g is not None]
        return [(t, (g if scale == 1.0 else g.mul_(scale)).to(t.dtype)) for t, g in kept]


def stream(
    tokens: range, memory_mb: int, kernels: Kernels, *streams: StreamedLogits
) -> Iterator[tuple[slice, list[Block]]]:
    """Go over `tokens` a block at a time: the block's place, and its logits from each of the streams.

    Before the next block is asked for, the gradient has to be written over the logits of each stream that wants one.
    """
    one = [kernels.buffer(1, each.weight) for each in streams]
    row_bytes = sum(each.stride(0) * each.itemsize for each in one)
    size = chunk_size(len(tokens), memory_mb, row_bytes, kernels.chunk_tokens())
    buffers = [kernels.buffer(size, each.weight) for each in streams]
    step = kernels.block_tokens(streams[0].hidden.device, max(each.shape[1] for each in buffers))
    for start in range(tokens.start, tokens.stop, size):
        rows = slice(start, min(start + size, tokens.stop))
        made = [s.product(rows, b[: rows.stop - start]) for s, b in zip(streams, buffers, strict=True)]
        for each, chunk in zip(streams, made, strict=True):
            kernels.shape(chunk, each.head)
        for first in range(start, rows.stop, step):
            block = slice(first, min(first + step, rows.stop))
            inside = slice(block.start - start, block.stop - start)
            yield block, [Block(c[inside], s.head, s.is_trained) for s, c in zip(streams, made, strict=True)]
        for each, chunk in zip(streams, made, strict=True):
            each.backward(rows, chunk)


def chunk_size(tokens: int, memory_mb: int, row_bytes: int, most: int) -> int:
    """Tokens at a time, at most `most`, such that their logits, `row_bytes` for each, fit into `memory_mb`."""
    return max(1, min(tokens, most, memory_mb * 2**20 // row_bytes))


def sum_type(weight: Tensor, memory_mb: int) -> torch.dtype:
    """Type that the gradient of a head [V, D] is summed in over the chunks: fp32 where that fits into `memory_mb`.

    A larger one is summed in the weight's own type, as fused losses elsewhere do it: half as much memory, and none for
    its conversion. Each chunk's product is added inside of the product, which sums in fp32, so that a sum over n chunks
    is rounded n times instead of once. Partial sums are smaller than the last, so that the error is that of one
    rounding (in bf16 at most 2**-9 of a value) times sqrt(n / 3) where the chunks' gradients are alike, and times
    sqrt(n / 2) where they have nothing in common.
    """
    return torch.float32 if weight.numel() * torch.float32.itemsize <= memory_mb * 2**20 else weight.dtype


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in the type of `total`, which may be fp32 beside bf16."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.device.type != "cpu" and total.dtype == torch.float32:  # inside of the product
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


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
