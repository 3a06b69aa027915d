"""Records in other forms than lines of prompt and output: such lines are made of them once, which all else reads.

Parquet, CSV, JSON arrays, and conversations, which a model's chat template turns into prompts.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dskd.config.data import form_of
from dskd.config.errors import UserError, one_line, shown
from dskd.data.records import (
    LOOKED_AT,
    Record,
    Records,
    check_records,
    json_line,
    objects,
    opened,
    read_records,
    record_of,
    told,
)
from dskd.rundir.files import as_user_error, sha256, written

if TYPE_CHECKING:  # it knows numpy, and the first look at a file needs none
    from dskd.data.tokenization import Tokenizer

VERSION = 1
"""Of what is made of a source: another one has another name."""
Row = tuple[str, Mapping[str, Any]]
"""Where a row stands, and its fields."""


def lines_of(file: Path, tokenizer: "Tokenizer", folder: Path) -> Path:
    """A file of lines with the records of a file in any form: itself, or one that is made of it and kept.

    Args:
        tokenizer: the student's, whose chat template makes prompts of conversations.
        folder: where that file is kept, by a name that tells what it was made of.
    """
    if is_plain(file):
        return file
    made = folder / f"records-{key_of(file, tokenizer)}.jsonl"
    if not made.is_file():
        with as_user_error(made, "data.cache_dir"):
            folder.mkdir(parents=True, exist_ok=True)
            write_lines(file, tokenizer, made)
    return made


def read_source(file: Path, tokenizer: "Callable[[], Tokenizer]") -> Records:
    """The records of a file in any form, without a run and its cache: lines that are made of it end with the process.

    Args:
        tokenizer: asked for where the file is in another form than lines; of the model that reads the records.

    Raises:
        UserError: as `read_records` does, and for a conversation that the template does not take.
    """
    if is_plain(file):
        return read_records(file)
    with as_user_error(file, "TMPDIR"), TemporaryDirectory(prefix="dskd-") as folder:
        made = Path(folder) / "records.jsonl"
        write_lines(file, tokenizer(), made)
        return read_records(made)  # which stays open when its name is gone


def write_lines(file: Path, tokenizer: "Tokenizer", made: Path) -> None:
    with written(made) as temporary, temporary.open("w", encoding="utf-8") as out:
        for where, row in rows(file):
            out.writelines(json_line(record) for record in records_of(row, tokenizer, where))


def check_source(file: Path) -> None:
    """Raise `UserError` for a mistake in the first records of a file, whatever its form."""
    if is_plain(file):
        return check_records(file)
    found = 0
    for where, row in islice(rows(file), LOOKED_AT):
        found += 1
        if is_conversation(row):
            check_messages(row["messages"], where)
        else:
            record_of(row, where)
    if not found:
        raise UserError(f"{file}: is empty; at least one record is expected")


def is_plain(file: Path) -> bool:
    """Whether a file is read as it is: lines, the first of which is no conversation."""
    with told(file):
        if form_of(file) != "lines":
            return False
    try:
        return not is_conversation(next(objects(file), ("", {}))[1])
    except UserError:
        return True  # whoever reads it tells what is wrong


def is_conversation(row: Mapping[str, Any]) -> bool:
    return row.get("messages") is not None and row.get("prompt") is None


def key_of(file: Path, tokenizer: "Tokenizer") -> str:
    with told(file):
        content = sha256(file)
    about = [VERSION, content, form_of(file), tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(about, default=str, sort_keys=True).encode()).hexdigest()[:16]


def rows(file: Path) -> Iterator[Row]:
    """The rows of a file. Raises `UserError` for one that is not what its name says."""
    with told(file):
        form = form_of(file)
    if form == "lines":
        yield from objects(file)
    elif form == "array":
        yield from array_rows(file)
    elif form == "csv":
        yield from csv_rows(file)
    else:
        yield from parquet_rows(file)


def array_rows(file: Path) -> Iterator[Row]:
    with told(file), opened(file) as content:
        try:
            values = json.loads(content.read())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: broken JSON: {error}") from None
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise UserError(f"{file}: record {number}: an object is expected, got {shown(value)}")
        yield f"{file}: record {number}", value


def csv_rows(file: Path) -> Iterator[Row]:
    csv.field_size_limit(2**26)
    with told(file), opened(file), file.open(encoding="utf-8-sig", newline="") as content:
        try:
            reader = csv.DictReader(content, strict=True)
            for value in reader:
                where = f"{file}:{reader.line_num}"
                if None in value or None in value.values():
                    raise UserError(f"{where}: has not as many fields as the first line")
                yield where, value
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: is not UTF-8 text ({error.reason})") from None
        except csv.Error as error:
            raise UserError(f"{file}: is no CSV: {error}") from None


def parquet_rows(file: Path) -> Iterator[Row]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise UserError(f"{file}: Parquet needs the package pyarrow; run: pip install pyarrow") from None
    with told(file), opened(file):
        try:
            whole = parquet.ParquetFile(file)
            batches = whole.iter_batches(batch_size=1024)
            found = (row for batch in batches for row in batch.to_pylist())
            for number, value in enumerate(found):
                yield f"{file}: record {number}", value
        except Exception as error:  # Arrow's own, Python's for what no text or date is, and OSError without a number
            if isinstance(error, OSError) and error.strerror:
                raise
            raise UserError(f"{file}: is no Parquet that can be read: {one_line(str(error), 200)}") from None


def records_of(row: Mapping[str, Any], tokenizer: "Tokenizer", where: str) -> Iterator[Record]:
    """The record that a row is, or those that its conversation makes."""
    if is_conversation(row):
        yield from conversation(row["messages"], tokenizer, where)
    else:
        yield record_of(row, where)


def conversation(messages: Any, tokenizer: "Tokenizer", where: str) -> Iterator[Record]:
    """A record for each turn of the assistant: its text is the response, and what was said before it the prompt.

    The prompt is what the tokenizer's template makes of that, with its call for an answer; transformers renders it in a
    sandbox. EOS ends a response as it ends any other.
    """
    check_messages(messages, where)
    if tokenizer.chat_template is None:
        raise UserError(f"{where}: is a conversation, and {tokenizer.name_or_path} has no chat template for it")
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    for index, message in enumerate(plain):
        if message["role"] == "assistant":
            prompt = rendered(tokenizer, plain[:index], where)
            yield record_of({"prompt": prompt, "output": message["content"]}, where)


def rendered(tokenizer: "Tokenizer", messages: list[dict[str, str]], where: str) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises what it likes
        problem = one_line(str(error) or type(error).__name__, 200)
        raise UserError(f"{where}: the chat template of {tokenizer.name_or_path} does not take it: {problem}") from None
    return text


def check_messages(messages: Any, where: str) -> None:
    expected = f'{where}: "messages": a list of objects with texts "role" and "content" is expected'
    if not isinstance(messages, list) or not messages:
        raise UserError(expected)
    for message in messages:
        texts = [message.get(field) for field in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{expected}, got {shown(message)}")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        raise UserError(f'{where}: "messages" has no answer of the assistant to anything; roles: {", ".join(roles)}')
