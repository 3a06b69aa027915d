"""A public set -> a folder of jsonl records, with a card that tells what they are. No torch, no numpy."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean, quantiles
from typing import Any

from dskd.config.errors import UserError
from dskd.data.public import PUBLIC_SETS, Found, PublicSet, fill_template
from dskd.data.records import Record, json_line, read_records, record_of
from dskd.rundir.files import as_user_error, entry, published, refuse_filled, write_json

CARD = "card.json"
SPLITS = ("train", "dev", "valid")
"""`valid` is the set that is tested on, as the authors name it."""
Lengths = Callable[[Record], tuple[int, int]]
"""Tokens of a record's prompt and of its first answer, EOS included, whole."""


@dataclass(frozen=True)
class Preparing:
    """What is asked for beside the set."""

    tokenizers: Mapping[str, Lengths]
    """By name; the first decides which prompts are too long."""
    max_prompt_length: int = 256
    dev: int = 1000
    test: int = 500
    """Records of dev and valid, where a set is split."""
    seed: int = 10


def prepare(name: str, source: Path, references: Path | None, wanted: Preparing, folder: Path) -> dict[str, Any]:
    """Write the records of a public set, or those of a folder that the authors processed, and return the card.

    Raises `UserError` for a source that is something else, and for a folder that holds something.
    """
    refuse_filled(folder)
    chosen, processed = PUBLIC_SETS[name], processed_files(source)
    about: dict[str, Any] = {"set": chosen.origin, "licence": chosen.licence}
    with as_user_error(folder, "OUT"), published(folder) as temporary:
        if processed:
            about |= {"form": "as the authors processed it; kept byte for byte"}
            for split, file in processed.items():
                shutil.copyfile(file, temporary / f"{split}.jsonl")
            splits: Mapping[str, Sequence[Record]] = {split: read_records(file) for split, file in processed.items()}
        else:
            kept, dropped = filtered(chosen.read(source, references), chosen, wanted)
            splits = split_records(kept, wanted) if chosen.splits else {"valid": kept}
            about |= {
                "templates": [fill_template("{instruction}", ""), fill_template("{instruction}", "{input}")],
                "filters": filters(chosen, wanted),
                "seed": wanted.seed,
                "dropped": dropped,
            }
            for split, records in splits.items():
                write_records(temporary / f"{split}.jsonl", records)
        sources = [*processed.values()] or [file for file in (source, references) if file and file.is_file()]
        about["sources"] = {str(file): entry(file) for file in sources}
        about["splits"] = {
            split: entry(temporary / f"{split}.jsonl") | counts(records, wanted) for split, records in splits.items()
        }
        write_json(temporary / CARD, about)
    return about


def processed_files(source: Path) -> dict[str, Path]:
    """The splits of a folder such as dolly/ or sinst/11_/ as the authors have them; none of any other source."""
    found = {split: source / f"{split}.jsonl" for split in SPLITS}
    return {split: file for split, file in found.items() if file.is_file()}


def filters(chosen: PublicSet, wanted: Preparing) -> list[str]:
    """What was done to the records, in words."""
    done = ["records with an empty answer are dropped"]
    if wanted.tokenizers:
        done.append(f"so are those with a prompt of more than {wanted.max_prompt_length} tokens of {first(wanted)}")
    if chosen.sample:
        done.append(f"of {chosen.sample} that are drawn at random, where there are more")
    if chosen.least_words:
        done.append(f"those with a first answer of {chosen.least_words} words and more are kept")
    return done


def first(wanted: Preparing) -> str:
    return next(iter(wanted.tokenizers))


def filtered(found: Iterable[Found], chosen: PublicSet, wanted: Preparing) -> tuple[list[Record], dict[str, int]]:
    """The records that are kept, and how many are not, by reason."""
    candidates = list(found)
    if not candidates:
        raise UserError(f"SOURCE: holds no record; {chosen.expects} is expected")
    if chosen.sample and len(candidates) > chosen.sample:
        candidates = Random(wanted.seed).sample(candidates, chosen.sample)
    kept, dropped = [], Counter[str]()
    for record, where in candidates:
        outputs = tuple(output for output in record.outputs if output.strip())
        if not outputs:
            dropped["empty answer"] += 1
        elif len(outputs[0].split()) < chosen.least_words:
            dropped["short answer"] += 1
        elif wanted.tokenizers and wanted.tokenizers[first(wanted)](record)[0] > wanted.max_prompt_length:
            dropped["long prompt"] += 1
        else:
            kept.append(record_of({"prompt": record.prompt, "output": list(outputs)}, where))
    if not kept:
        raise UserError(f"SOURCE: no record of {len(candidates)} is left after the filters ({dict(dropped)})")
    return kept, dict(dropped)


def split_records(records: Sequence[Record], wanted: Preparing) -> dict[str, list[Record]]:
    """train, dev and valid: who is in which is drawn at random, the order stays that of the source."""
    held_out = wanted.dev + wanted.test
    if held_out >= len(records):
        raise UserError(
            f"--dev, --test: {wanted.dev} and {wanted.test} of {len(records)} records leave none to train on"
        )
    drawn = Random(wanted.seed).sample(range(len(records)), held_out)
    dev, test = set(drawn[: wanted.dev]), set(drawn[wanted.dev :])
    found: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for index, record in enumerate(records):
        found["dev" if index in dev else "valid" if index in test else "train"].append(record)
    return {split: chosen for split, chosen in found.items() if chosen}


def write_records(file: Path, records: Iterable[Record]) -> None:
    with file.open("w", encoding="utf-8") as out:
        out.writelines(map(json_line, records))


def counts(records: Sequence[Record], wanted: Preparing) -> dict[str, Any]:
    """How many records and references, and how long they are for each tokenizer."""
    lengths = {}
    for name, measure in wanted.tokenizers.items():
        prompts, responses = zip(*(measure(record) for record in records), strict=True)
        lengths[name] = {"prompt": summary(prompts), "response": summary(responses)}
    references = sum(len(record.outputs) for record in records)
    return {"records": len(records), "references": references, "tokens": lengths}


def summary(lengths: Sequence[int]) -> dict[str, float]:
    """Total, mean, median, 95th percentile and longest of so many tokens."""
    cuts = quantiles(lengths, n=20, method="inclusive") if len(lengths) > 1 else list(lengths) * 19
    return {
        "total": sum(lengths),
        "mean": round(fmean(lengths), 2),
        "median": cuts[9],
        "p95": round(cuts[18], 1),
        "longest": max(lengths),
    }
