"""`dskd student`: a smaller model out of a larger one, with its vocabulary or another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from dskd.config.errors import UserError
from dskd.config.hub import find_model
from dskd.config.run import check_folder, check_model_folder, require_folder
from dskd.data.records import Record, Records
from dskd.data.sources import read_source
from dskd.data.tokenization import Limits, Tokenizer, check_tokenizer, tokenize
from dskd.models.load import load_causal_lm, load_tokenizer
from dskd.rundir.files import as_user_error, published, refuse_filled
from dskd.students.narrow import smaller_model
from dskd.students.refit import refit
from dskd.students.shape import Shape, evenly, layers_of, sizes_of
from dskd.students.vocabulary import transplant

ROW = 256
"""Tokens that are read at a time, of records one after the other."""
MEASURED = 32
"""Records that a loss is measured on."""
PROBE = "A word, 2 words;\n  three – 四.\t<b>"
LIMITS = Limits(512, 256)


@dataclass(frozen=True)
class Made:
    """What a student became."""

    layers: list[int]
    """Of the model, those that it has."""
    parameters: tuple[int, int]
    """Of the model and of the student."""
    left: list[float] | None
    """What `refit` leaves of each layer's distance; None where nothing was refitted."""
    losses: tuple[float, float, float] | None
    """Cross-entropy a response token of the model, of the student, and of a random model of the student's shape."""


def make_student(
    model_folder: Path,
    folder: Path,
    shape: Shape,
    records: Path | None = None,
    tokens: int = 8192,
    tokenizer: Path | None = None,
    dev: Path | None = None,
) -> Made:
    """Write a student of `shape` to `folder`: whole or not at all.

    Args:
        records: in any form; what is used most is chosen, and layers are refitted, on their first `tokens` tokens.
        tokenizer: a folder whose vocabulary the student gets.
        dev: records to measure losses on; nothing is learned from them.

    Raises:
        UserError: for a model that cannot be made smaller so, and a folder that holds something.
    """
    refuse_filled(folder)
    if shape.narrower and records is None:
        raise UserError("--records: is needed with --width, --heads and --mlp, to choose what is used most")
    own_tokenizer = load_tokenizer(model_folder, "MODEL")
    dev_records, learned = (
        None if file is None else read_source(file, lambda: own_tokenizer) for file in (dev, records)
    )
    new_tokenizer = own_tokenizer if tokenizer is None else load_tokenizer(tokenizer, "--tokenizer")
    for each, key in ((own_tokenizer, "MODEL"), (new_tokenizer, "--tokenizer")):
        check_tokenizer(each, LIMITS, key)
    rows = [] if learned is None else list(islice(token_rows(own_tokenizer, learned), -(-tokens // ROW)))
    model = load_causal_lm(model_folder, "MODEL", "auto", False).eval()
    _, all_layers = layers_of(model)
    layers = evenly(len(all_layers), shape.layers or len(all_layers))
    sizes = sizes_of(model.config, shape)
    student, columns = smaller_model(model, layers, sizes, rows)
    left = refit(model, student, layers, columns, rows) if rows and len(layers) < len(all_layers) else None
    parameters = model.num_parameters(), 0
    before = None if dev_records is None else loss_on(model, own_tokenizer, dev_records)
    del model
    if tokenizer is not None:
        transplant(student, own_tokenizer, new_tokenizer)
    losses = None
    if dev_records is not None and before is not None:
        random = AutoModelForCausalLM.from_config(student.config, dtype=student.dtype).eval()
        after, at_random = (loss_on(each, new_tokenizer, dev_records) for each in (student, random))
        losses = before, after, at_random
    with as_user_error(folder, "OUT"), published(folder) as temporary:
        student.save_pretrained(temporary)
        new_tokenizer.save_pretrained(temporary)
        check_reloaded(temporary, new_tokenizer)
    return Made(layers, (parameters[0], student.num_parameters()), left, losses)


def show_student(
    model: Path,
    folder: Path,
    shape: Shape,
    records: Path | None,
    tokens: int,
    tokenizer: Path | None,
    dev: Path | None,
) -> None:
    """`dskd student`."""
    model, other = find_model(model), None if tokenizer is None else find_model(tokenizer)
    check_model_folder("MODEL", model)
    check_folder("OUT", folder)
    if other is not None:
        require_folder("--tokenizer", other)
    made = make_student(model, folder, shape, records, tokens, other, dev)
    before, after = (f"{count / 1e6:.1f} M" for count in made.parameters)
    print(f"{folder}: {before} -> {after} parameters, layers {', '.join(map(str, made.layers))}")
    if made.left:
        print(f"refitted: of the model's hidden states {100 * made.left[-1]:.1f} % (squared) are missed at the end")
    elif records is not None and shape.layers is not None:
        print("not refitted: its layers do not end in a linear module that is added to the hidden states")
    if made.losses:
        names = "model", "student", "random model of its shape"
        told = ", ".join(f"{name} {loss:.3f}" for name, loss in zip(names, made.losses, strict=True))
        print(f"dev loss: {told}")


def token_rows(tokenizer: Tokenizer, records: Records) -> Iterator[Tensor]:
    """Records one after the other as token ids [1, ROW]; what is left over is a row only where there is no other."""
    rest: list[int] = []
    full = False
    for record in records:
        sample = tokenize(tokenizer, record, LIMITS)
        rest += [*sample.prompt.tolist(), *sample.response.tolist()]
        while len(rest) >= ROW:
            yield torch.tensor([rest[:ROW]])
            rest, full = rest[ROW:], True
    if not full:
        yield torch.tensor([rest])


@torch.no_grad()
def loss_on(model: Any, tokenizer: Tokenizer, records: Sequence[Record]) -> float:
    """Mean cross-entropy of the response tokens of the first records."""
    total, tokens = 0.0, 0
    for record in islice(records, MEASURED):
        sample = tokenize(tokenizer, record, LIMITS)
        prompt, response = torch.from_numpy(sample.prompt), torch.from_numpy(sample.response)
        ids = torch.cat([prompt, response])
        first = max(1, len(prompt))  # nothing predicts the first token of all
        logits = model(ids[None], use_cache=False).logits[0, first - 1 : -1]
        total += float(cross_entropy(logits.float(), ids[first:], reduction="sum"))
        tokens += len(ids) - first
    return total / tokens


def check_reloaded(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise `UserError` where transformers makes another tokenizer of what was saved, as it does for some families."""
    found = load_tokenizer(folder, "OUT")
    spelled = [each.encode(PROBE, add_special_tokens=False) for each in (tokenizer, found)]
    if found.get_vocab() != tokenizer.get_vocab() or spelled[0] != spelled[1]:
        raise UserError(
            f"--tokenizer: transformers loads a model of this family with a {type(found).__name__} that is another "
            "tokenizer than the one asked for; take a model of another family, or a tokenizer of this one"
        )
