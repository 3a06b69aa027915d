"""Records in every form, and the chat templates that make prompts of conversations."""

import io
import json
import re
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random

from support.forms import CHAT, said
from support.tiny import byte_level_tokenizer

from dskd.config.errors import UserError
from dskd.data.sources import check_source, read_source
from fuzz.mutations import of_bytes, of_json, of_json_lines
from fuzz.run import Target

ROWS = [
    {"prompt": "Where is Lima?", "output": "By the sea.", "id": 7},
    {"prompt": 'p, "q"\n', "output": "東京", "id": 8},
]
LISTS = [{"prompt": "p", "output": ["a", "b"]}, {"prompt": "", "output": ["é"]}]
TALKS = [said("Be kind.", "Where is Lima?", "In Peru.", "And Paris?", "In France."), said("", "q", "a")]
CSV = b'\xef\xbb\xbfid,prompt,output\n1,Where is Lima?,By the sea.\n2,"p, ""q""\r\n",o\n'
SNIPPETS = (
    *(
        "{{ messages }}",
        "{{ messages[0] }}",
        "{{ nothing }}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ 10 ** 10 ** 6 }}",
    ),
    *(
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ 'x' * 10 ** 18 }}",
        "{% raw %}",
        "{% endfor %}",
        "{#",
        "{{",
        "%}",
    ),
    *(
        "{{ raise_exception('two\nlines') }}",
        "{{ raise_exception(messages) }}",
        "{{ '\\ud800' }}",
        "{{ strftime_now(1) }}",
    ),
    *("{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    *(
        "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
        "{% set messages = 3 %}",
        "{% break %}",
        "{% do x %}",
    ),
    *(
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{{ self }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    ),
)


def form_targets(folder: Path) -> list[Target]:
    """Targets that work in `folder`."""
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template, tokenizer.name_or_path = CHAT, "model"

    def read(file: Path) -> object:
        check_source(file)
        return list(read_source(file, lambda: tokenizer))

    def into(name: str, change: Callable[[bytes], bytes] = bytes) -> Callable[[bytes], object]:
        file = folder / name

        def written(content: bytes) -> object:
            file.write_bytes(change(content))
            return read(file)

        return written

    def rendered(template: bytes) -> object:
        """Conversations by a template, and one that the tokenizer has kept."""
        tokenizer.chat_template = template.decode(errors="replace")
        try:
            return read(talks)
        finally:
            tokenizer.chat_template = CHAT

    talks = folder / "talks.jsonl"
    talks.write_bytes(lines_of(TALKS))
    found = [
        Target("form: array", [json_of(ROWS), json_of(LISTS), json_of(TALKS)], of_json, into("r.json")),
        Target("form: CSV", [CSV], of_bytes, into("r.csv")),
        Target("form: conversations", [lines_of(TALKS)], of_json_lines, into("r.jsonl")),
        Target("form: chat template", [CHAT.encode()], of_template, rendered),
    ]
    if find_spec("pyarrow") is not None:
        values = [json_of(rows) for rows in (ROWS, LISTS, TALKS)]
        found += [
            Target("form: Parquet", [table_of(rows) for rows in values], of_table, into("r.parquet")),
            Target("form: columns", values, of_json, into("c.parquet", table_of)),
        ]
    return found


def json_of(rows: list[dict[str, object]]) -> bytes:
    return json.dumps(rows).encode()


def lines_of(rows: list[dict[str, object]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def table_of(rows: bytes) -> bytes:
    """A Parquet file of a JSON array, in the types that pyarrow finds. Raises `UserError` where there are none."""
    arrow, out = import_module("pyarrow"), io.BytesIO()
    try:
        table = arrow.Table.from_pylist(json.loads(rows))
        import_module("pyarrow.parquet").write_table(table, out, compression="none", store_schema=False)
    except Exception as error:
        raise UserError("no table can be made of it") from error
    return out.getvalue()


def of_table(random: Random, data: bytes) -> bytes:
    """A Parquet file of the same length, since the places of all that is in it stand at its end."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5))):
        changed[random.randrange(len(data))] = random.choice((0, 1, 127, 128, 255, random.randrange(256)))
    return bytes(changed)


def of_template(random: Random, data: bytes) -> bytes:
    """A template with one or two snippets between its tags that do harm, fail or are no template."""
    for _ in range(random.randint(1, 2)):
        place = random.choice([0, *(found.end() for found in re.finditer(rb"[%}]}", data))])
        data = data[:place] + random.choice(SNIPPETS).encode() + data[place:]
    return data
