"""A saved model's answers to a file of records, and their scores, written beside it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dskd.config.training import GenerationConfig
from dskd.data.records import read_records
from dskd.data.tokenization import Limits, check_tokenizer
from dskd.engine.distributed import Ranks
from dskd.engine.metrics import progress_bar
from dskd.evaluation.answers import Answer, Answering, mean_scores, scored_rounds
from dskd.evaluation.scores import summary
from dskd.models.load import load_checkpoint, load_tokenizer
from dskd.rundir.files import as_user_error, write_json, write_text
from dskd.rundir.layout import ANSWERS, RESULTS


def evaluate(
    checkpoint: Path,
    data: Path,
    seeds: Sequence[int],
    settings: GenerationConfig,
    precision: str,
    output: Path,
    ranks: Ranks,
    bos: bool = False,
) -> dict[str, Any]:
    """Generate and score with a saved model, once for each seed; write answers.jsonl and results.json to `output`.

    Greedy answers do not depend on a seed, so the first alone is used for them. Returns what results.json holds.
    """
    records = read_records(data)
    tokenizer = load_tokenizer(checkpoint, str(checkpoint))
    check_tokenizer(tokenizer, Limits(settings.max_length, settings.max_prompt_length, bos), str(checkpoint))
    answering = Answering(load_checkpoint(checkpoint, precision, ranks.device), tokenizer, settings, ranks, bos)
    used = list(seeds[:1]) if settings.greedy else list(seeds)
    by_seed: list[list[Answer]] = []
    with progress_bar("answers") as show:
        for index, seed in enumerate(used):
            found: list[Answer] = []
            for made, part in scored_rounds(answering, records, seed):
                found += made
                show(round((index + part) * len(records)), len(used) * len(records))
            by_seed.append(sorted(found, key=lambda answer: answer.index))
    results = {"checkpoint": str(checkpoint), "data": str(data), "records": len(records), "seeds": used}
    results |= {"generation": asdict(settings)} | summary([mean_scores(answers) for answers in by_seed])
    if ranks.is_main:
        with as_user_error(output, "--output"):
            output.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(asdict(answer), ensure_ascii=False) for answers in by_seed for answer in answers]
            write_text(output / ANSWERS, "\n".join(lines) + "\n")
            write_json(output / RESULTS, results)
    ranks.barrier()
    return results
