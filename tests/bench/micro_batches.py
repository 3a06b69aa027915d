"""A kd step with micro-batches of so many records, and of so many tokens: `python -m bench.micro_batches [FILES]`.

The same global batches in turns, on one thread in fp32. FILES: records and a tokenizer; without them, made records in
the lengths of Dolly with a tokenizer of whole words. Student and teacher are Llamas of 16 layers x 256 with 32,000
tokens: as in large models, most of a step is in their bodies.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from support.tiny import write_records
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from bench.measure import one_thread
from bench.teacher_cache import made_records
from dskd.assemble import Training, assemble
from dskd.config.load import load_run
from dskd.config.run import RunConfig
from dskd.data.loader import Plan
from dskd.engine import distributed
from dskd.engine.distributed import Ranks
from dskd.launch.ranks import free_port, rank_environment
from dskd.models.load import load_tokenizer
from dskd.train import train_step

BATCH, STEPS, RECORDS = 32, 2, 640
FORMS = {"4 records": 4, "8 records": 8, "32 records": 32, "1024 tokens": 1024, "4096 tokens": 4096}
"""Of micro-batches: 4 records are the default, and 8 are the most that never have more than 4,096 tokens."""
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def words_tokenizer() -> PreTrainedTokenizerFast:
    words = {word for record in made_records(RECORDS) for text in record.values() for word in str(text).split()}
    vocabulary = {word: index for index, word in enumerate(["<unk>", "</s>", *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def make_run(root: Path, files: list[str]) -> RunConfig:
    tokenizer = load_tokenizer(Path(files[1]), "tokenizer") if files else words_tokenizer()
    for name in ("student", "teacher"):
        config = LlamaConfig(vocab_size=max(32000, len(tokenizer)), **SHAPE)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    data = Path(files[0]) if files else write_records(root / "records.jsonl", made_records(RECORDS))
    (root / "run.yaml").write_text(
        f"""
student: {{path: {root}/student}}
teacher: {{path: {root}/teacher}}
data: {{train: {data}, dev: {data}}}
method: {{kind: kd}}
train: {{global_batch_size: {BATCH}, micro_batch_tokens: 1024}}
engine: {{precision: fp32}}
output: {{root: {root}/outputs}}
"""
    )
    return load_run(root / "run.yaml")


def plan_of(training: Training, form: str) -> Plan:
    if form.endswith("records"):
        return replace(training.plan, budget=None, micro_batch_size=FORMS[form])
    assert training.plan.budget is not None
    return replace(training.plan, budget=replace(training.plan.budget, tokens=FORMS[form]))


def measure(run: RunConfig, ranks: Ranks) -> dict[str, dict[str, float]]:
    """Of each form: CPU seconds of a step, its share of padding, its micro-batches and the places of the largest."""
    training = assemble(run, ranks)
    assert training.train.packed
    found = {form: dict.fromkeys(("seconds", "padding", "micro_batches", "largest"), 0.0) for form in FORMS}
    for step in range(1 + STEPS):
        for form, own in found.items():
            plan = plan_of(training, form)
            training.train.packed = plan.budget is not None
            batches = [training.train(indices) for indices in plan.micro_batches(step, 0, 1)]
            begun = time.process_time()
            figures = train_step(training, 1, batches)
            taken = time.process_time() - begun
            if step:  # in the first the optimizer's state is made
                own["seconds"] += taken / STEPS
                own["padding"] += figures["padding"] / STEPS
                own["micro_batches"] += len(batches) / STEPS
                own["largest"] = max(own["largest"], *(batch.student.input_ids.numel() for batch in batches))
    return found


def main(files: list[str]) -> None:
    one_thread()
    os.environ |= rank_environment(0, 1, free_port())
    with tempfile.TemporaryDirectory() as root:
        found = measure(make_run(Path(root), files), distributed.start())
    distributed.stop()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
