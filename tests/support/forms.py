"""Records in every form that dskd reads, and a chat template."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from support.tiny import Tiny, write_records

CHAT = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def said(*texts: str) -> dict[str, object]:
    """A conversation: what the system says, and then user and assistant in turn."""
    roles = ["system", *["user", "assistant"] * len(texts)]
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}


def as_file(folder: Path, form: str, values: list[dict[str, object]]) -> Path:
    """A file of these objects, in the form of that suffix."""
    file = folder / f"r.{form}"
    if form == "json":
        file.write_text("\n " + json.dumps(values, indent=1), encoding="utf-8")
    elif form == "jsonl":
        write_records(file, values)
    elif form == "csv":
        with file.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(values[0]))
            writer.writeheader()
            writer.writerows(values)
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs it")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(values), file)
    return file


def chatting(tiny: Tiny, family: str, folder: Path, **fields: object) -> Path:
    """A copy of a tiny model, with `CHAT` as its template."""
    model = shutil.copytree(tiny(family, **fields), folder / f"chatting-{family}")
    (model / "chat_template.jinja").write_text(CHAT)
    return model


def conversations(count: int) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """So many conversations of one question, and the same records as `CHAT` makes prompts of them."""
    asked = [(f"Where is the number {i}?", f"After {i - 1} 東京.") for i in range(count)]
    plain = [{"prompt": f"<system>Hm.</s><user>{q}</s><assistant>", "output": a} for q, a in asked]
    return [said("Hm.", *pair) for pair in asked], plain
