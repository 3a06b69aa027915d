"""A whole dskd_cma step, bodies and optimizer included: `python -m bench.training_step FORM [FILES]`.

FORM `streamed` is dskd's: padded to the longest of the micro-batch, logits of response tokens in chunks. `dense` pads
to max_length and makes full logits of all positions, as the original does. The student is a gpt2 of 4 layers x 256,
the teacher a qwen2 of 4 x 512, with the vocabularies of GPT-2 and Qwen1.5. FILES: records, the student's and the
teacher's tokenizer; without them, random tokens in the lengths of Dolly.
"""

import json
import sys
from pathlib import Path

import torch
from support.dense import dense_loss
from support.heads import Weights, means
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from bench.measure import measured, one_thread
from dskd.config.engine import EngineConfig
from dskd.config.methods import DskdCmaConfig
from dskd.data.batch import Side, collate
from dskd.data.loader import Collator
from dskd.data.records import read_records
from dskd.data.tokenization import Limits, Sample
from dskd.losses.dskd_cma import DskdCma
from dskd.losses.tensors import MethodContext, Tokens
from dskd.models.load import load_tokenizer
from dskd.models.views import ModelView, response_tokens

LENGTH, PROMPT, MICRO_BATCH, STEPS = 512, 256, 4, 4
# Tokens of (prompt, response), at the deciles of Dolly.
DOLLY = [(40, 12), (46, 25), (52, 40), (60, 58), (72, 76), (96, 96), (130, 124), (190, 160), (256, 256), (50, 200)]


def batches(files: list[str]) -> list[tuple[Side, Side]]:
    """Micro-batches of both sides."""
    if files:
        records, student, teacher = files
        tokenizers = [load_tokenizer(Path(folder), "tokenizer") for folder in (student, teacher)]
        collator = Collator(read_records(Path(records)), *tokenizers, Limits(LENGTH, PROMPT))
        made = [collator(range(first, first + MICRO_BATCH)) for first in range(0, STEPS * MICRO_BATCH, MICRO_BATCH)]
        return [(batch.student, batch.teacher) for batch in made]

    def sample(index: int, vocabulary: int) -> Sample:
        return Sample(*(torch.randint(vocabulary, (n,)).numpy() for n in DOLLY[index % len(DOLLY)]))

    return [
        tuple(collate([sample(3 * step + i, width) for i in range(MICRO_BATCH)]) for width in (50257, 151646))
        for step in range(STEPS)
    ]


def whole(view: ModelView, side: Side) -> Tokens:
    """All positions of a batch that is padded to LENGTH, as tokens."""
    ids, mask = (pad(each, (0, LENGTH - each.shape[1])) for each in (side.input_ids, side.attention_mask))
    labels = pad(ids[:, 1:], (0, 1))
    return Tokens(view.body.hidden(ids, mask).flatten(0, 1), ids.flatten(), labels.flatten(), (LENGTH,) * len(ids))


def weights(view: ModelView) -> Weights:
    return Weights(view.ends.embeddings.weight.detach(), view.ends.output.weight)


def main(form: str, files: list[str]) -> None:
    one_thread()
    torch.set_grad_enabled(True)
    student = ModelView(AutoModelForCausalLM.from_config(GPT2Config(n_layer=4, n_embd=256, n_head=4)), "student")
    shape = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = Qwen2Config(vocab_size=151936, intermediate_size=1408, tie_word_embeddings=False, **shape)
    teacher = ModelView(AutoModelForCausalLM.from_config(config).eval().requires_grad_(False), "teacher")
    method = DskdCma(DskdCmaConfig(), MethodContext(student.ends, teacher.ends, EngineConfig().loss_memory_mb))
    optimizer = torch.optim.AdamW([*student.causal.parameters(), *method.parameters()])
    made = batches(files)

    def step(own: Side, other: Side) -> None:
        if form == "streamed":
            with torch.no_grad():
                target = response_tokens(teacher.body.states(other), other)
            method(response_tokens(student.body.states(own), own), target, means(method)).loss.backward()
        else:
            with torch.no_grad():
                target = whole(teacher, other)
            parts = dense_loss(method, weights(student), weights(teacher), whole(student, own), target)
            sum(method.weights[name] * value / count for name, (value, count) in parts.items()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(*made[0])  # the optimizer's state is made
    found = measured(lambda: [step(*batch) for batch in made[1:]])
    response = sum(len(own.labels) for own, _ in made[1:])
    print(json.dumps(found | {"steps": len(made) - 1, "response_tokens": response}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
