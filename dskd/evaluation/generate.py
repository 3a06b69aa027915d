"""`dskd generate`: a model's answers to the prompts of records, as records that data.train takes."""

import json
from collections.abc import Collection, Container, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import cattrs

from dskd.config.errors import UserError
from dskd.data.records import Records
from dskd.data.shard import Shard
from dskd.data.sources import read_source
from dskd.data.tokenization import Limits, check_tokenizer
from dskd.engine.distributed import Ranks
from dskd.engine.metrics import progress_bar
from dskd.evaluation.answers import Answering
from dskd.evaluation.asked import Generation
from dskd.evaluation.kept import add, begin, read_kept
from dskd.models.load import load_checkpoint, load_tokenizer
from dskd.rundir.files import as_user_error, read_json, sha256, write_json, write_text


@dataclass(frozen=True)
class Generated:
    """One answer, as a part holds it."""

    index: int
    """Of the record."""
    answer: str
    ended: bool
    """Whether it ended by itself, and was not cut by the limit."""


Found = dict[int, Generated]


def generate_records(asked: Generation, shard: Shard, ranks: Ranks) -> str:
    """Answer a share of the records, and join the shares where no other is missing; returns what to tell.

    What was made before is not made again, in whatever shares. Raises `UserError` where the file is another one's.
    """
    identity = ranks.together(asked.identity)[0]
    if ranks.together(lambda: ranks.is_main and is_finished(asked, identity))[0]:
        return f"{asked.out}: is complete already"
    records = read_source(asked.data, lambda: load_tokenizer(asked.model, str(asked.model)))
    done = ranks.together(lambda: list(found_in(asked, identity)) if ranks.is_main else [])[0]
    for made in rounds_of(asked, records, shard, set(done), ranks):
        if ranks.is_main:
            with as_user_error(asked.out, "--out"):
                asked.out.parent.mkdir(parents=True, exist_ok=True)
                begin(asked.part(shard), identity)
                add(asked.part(shard), made)
    return str(ranks.together(lambda: finish(asked, identity, records) if ranks.is_main else "")[0])


def is_finished(asked: Generation, identity: str) -> bool:
    """Raises `UserError` where the file is there, and is not known to be this one."""
    if not asked.out.exists():
        return False
    if (read_json(asked.card) or {}).get("identity") == identity:
        return True
    if not any(read_kept(part, identity) for part in asked.parts):
        raise UserError(f"--out: {asked.out} is there already, made otherwise; choose another name, or remove it")
    return False


def found_in(asked: Generation, identity: str) -> Found:
    """The answers of all parts."""
    found: Found = {}
    for part in asked.parts:
        for line in read_kept(part, identity):
            with suppress(cattrs.BaseValidationError, TypeError, ValueError, KeyError):  # a damaged line is none
                generated = cattrs.structure(line, Generated)
                found[generated.index] = generated
    return found


def rounds_of(
    asked: Generation, records: Records, shard: Shard, done: Container[int], ranks: Ranks
) -> Iterator[list[dict[str, Any]]]:
    """What is missing of a share, round by round."""

    def make(index: int, answer: str, ended: bool) -> dict[str, Any]:
        return asdict(Generated(index, answer, ended))

    answering = answering_of(asked, ranks)
    with progress_bar("answers") as show:
        for made, part in answering.rounds(records, asked.seed, make, done, shard):
            show(round(part * 1000), 1000)
            yield made


def answering_of(asked: Generation, ranks: Ranks) -> Answering:
    tokenizer = load_tokenizer(asked.model, str(asked.model))
    limits = Limits(asked.settings.max_length, asked.settings.max_prompt_length, asked.bos)
    check_tokenizer(tokenizer, limits, str(asked.model))
    if asked.engine == "vllm":
        from dskd.evaluation.vllm import VllmAnswering, load_vllm

        engine = load_vllm(asked.model, asked.precision, asked.settings)
        return VllmAnswering(engine, tokenizer, asked.settings, ranks, asked.bos)
    model = load_checkpoint(asked.model, asked.precision, ranks.device)
    return Answering(model, tokenizer, asked.settings, ranks, asked.bos)


def finish(asked: Generation, identity: str, records: Records) -> str:
    """Write the file and its card where all answers are there."""
    found = found_in(asked, identity)
    if not found.keys() >= set(range(len(records))):
        if is_finished(asked, identity):  # another task was the last one
            return f"{asked.out}: is complete"
        return f"{len(found)} of {len(records)} answers; {asked.out} is written by the task that finds all of them"
    kept = [found[i] for i in range(len(records)) if found[i].answer.strip() and (found[i].ended or not asked.whole)]
    lines = [json.dumps({"prompt": records[g.index].prompt, "output": g.answer}, ensure_ascii=False) for g in kept]
    with as_user_error(asked.out, "--out"):
        write_text(asked.out, "".join(f"{line}\n" for line in lines))
        write_json(asked.card, card(asked, identity, list(found.values()), len(kept)))
        for part in asked.parts:
            part.unlink(missing_ok=True)
    return f"{len(kept)} records of {len(records)} prompts: {asked.out}"


def card(asked: Generation, identity: str, found: Collection[Generated], kept: int) -> dict[str, Any]:
    return {
        "identity": identity,
        "model": str(asked.model),
        "data": str(asked.data),
        "engine": asked.engine,
        "seed": asked.seed,
        "generation": asdict(asked.settings),
        "precision": asked.precision,
        "prompts": len(found),
        "records": kept,
        "empty_answers": sum(not generated.answer.strip() for generated in found),
        "cut_answers": sum(not generated.ended for generated in found),
        "sha256": sha256(asked.out),
    }
