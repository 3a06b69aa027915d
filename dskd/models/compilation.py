"""Decoder layers compiled one by one: a GPU waits for none of a step's ten thousand small kernels then.

They are compiled where they are (`Module.compile`), so that names, hooks, states and saved models stay as they were.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dskd.config.errors import one_line
from dskd.models.views import ModelView

DEVICES = ("cuda",)  # types on which it is worth the minute that it takes
BACKEND = "inductor"
MOST_VARIANTS = 64
"""Of the one piece of code that all layers of both models share: with gradients and without, one sample or more."""


def decoder_layers(view: ModelView) -> list[nn.Module]:
    """The body's layers, by what its class says that no device may split; none where it does not say."""
    names = set(view.causal._no_split_modules or ())
    return [module for module in view.body.module.modules() if type(module).__name__ in names]


def compile_layers(view: ModelView) -> None:
    """Compile the decoder layers; equal ones share what was compiled.

    All sizes are symbols from the start, so that batches of other shapes compile nothing more, and so that a step
    computes the same whatever shapes came before it: a run that is resumed has not seen them.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = MOST_VARIANTS
    torch._dynamo.config.specialize_float = True  # only sizes change: an epsilon is the same number in each layer
    for layer in decoder_layers(view):
        layer.compile(backend=BACKEND, dynamic=True)


def problem(device: torch.device) -> str | None:
    """What keeps torch.compile from working on this device, in one line; None: nothing."""
    add: Callable[[Tensor], Tensor] = torch.compile(lambda x: x + x, backend=BACKEND)
    try:
        add(torch.ones(8, device=device))
    except Exception as error:  # its compilers raise what they like, first of all where there is no C compiler
        said = str(error).partition("\n\n")[0]  # what follows is advice about the compiler's log
        return one_line(" ".join(said.split()) or type(error).__name__, 200)
    return None


@contextmanager
def as_written() -> Iterator[None]:
    """Inside, nothing is compiled: in generation each token would bring another shape."""
    with torch.compiler.set_stance("force_eager"):
        yield
