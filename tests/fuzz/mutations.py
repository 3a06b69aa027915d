"""Inputs out of valid ones: bytes that are flipped, cut, spliced, and values that nobody expects. Seeded."""

import json
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from dskd.config.load import parse_yaml

Mutate = Callable[[Random, bytes], bytes]
DIGITS = "9" * 5_000
HUGE = "HUGE-NUMBER"
"""Stands for a number of 5000 digits, which Python itself would not write."""
MARKER = "MARKER"
"""Stands for a file that no input may make."""
VICTIM = "VICTIM"
"""Stands for a file outside of the fuzzer's folder."""

COMMANDS = (
    f"$(touch {MARKER})",
    f"`touch {MARKER}`",
    f"; touch {MARKER};",
    f"' ; touch {MARKER} ; '",
    f"| touch {MARKER}",
)
LINES = (
    f"a\ntouch {MARKER}\n",
    f"a\r\n#SBATCH --wrap=touch {MARKER}",
    "a\n#SBATCH --uid=0",
    "a\x85b",
    "a\u2028b",
    "a\x0bb",
)
PATHS = (
    *("../", "../../../../../../etc/passwd", f"../{VICTIM}", VICTIM, "/", "/dev/null", "/proc/self/mem", "~", "~root"),
    *(".", "..", "a/../b", "a//b", "C:\\x", "a" * 300, "/a" * 3000, "a\x00b", "-rf", "--help", "*", "a b", " a "),
)
TEXTS = (
    *(
        "",
        " ",
        "\x00",
        "\x1b[31m",
        "\ud800",
        "\udfff",
        "\ufeff",
        "é",
        "e\u0301",
        "ǅ",
        "ß",
        "\u202ereversed",
        "🐋",
        "😀" * 50,
    ),
    *(
        "null",
        "true",
        "yes",
        "nan",
        ".inf",
        "1e999",
        "0x10",
        "1_000",
        "2024-01-01",
        "!!python/object:os.system",
        "&a",
        "*a",
    ),
    *("{}", "[]", "{{", "%s%n", "${HOME}", "$HOME", "\\", '"', "'", "\\'", "#", ": ", "- ", "%d", "x" * 10_000),
)
NUMBERS = (0, -1, 1, 2, 0.5, -0.0, 1e308, 1e-308, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**30, HUGE)
NUMBERS += (float("nan"), float("inf"), float("-inf"))
VALUES = (None, True, False, [], {}, [[]], {"": 1}, [None], {"a": {"b": {"c": 1}}}, *NUMBERS)


def text(random: Random) -> str:
    """A text that may do harm where it is not kept as text."""
    found = random.choice(random.choice((COMMANDS, LINES, PATHS, TEXTS)))
    return found + random.choice(("", random.choice(TEXTS)[:20])) if random.random() < 0.3 else found


def value(random: Random) -> Any:
    return text(random) if random.random() < 0.5 else random.choice(VALUES)


def nested(random: Random) -> str:
    """Lists or mappings in each other, a few or very many, closed or not."""
    depth = random.choice((3, 30, 40, 300, 2_000, 100_000))
    opening, closing = random.choice(
        (("[", "]"), ('{"a": ', "}"), ("{a: ", "}"), ("- ", ""), ("[[],", "]"), ("(", ")"))
    )
    return opening * depth + random.choice(("", "1" + closing * depth, closing * (depth // 2)))


# Bytes


def of_bytes(random: Random, data: bytes) -> bytes:
    """One to four changes of bytes."""
    for _ in range(random.randint(1, 4)):
        data = random.choice((flipped, cut, without, doubled, with_token, with_digits, with_depth, with_noise))(
            random, data
        )
    return data[:2_000_000]


def place(random: Random, data: bytes) -> int:
    return random.randint(0, len(data))


def flipped(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 3, 20)) if data else 0):
        changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(changed)


def cut(random: Random, data: bytes) -> bytes:
    return data[: place(random, data)]


def without(random: Random, data: bytes) -> bytes:
    start = place(random, data)
    return data[:start] + data[start + random.choice((1, 1, 5, 50, 500)) :]


def doubled(random: Random, data: bytes) -> bytes:
    start, size = place(random, data), random.choice((1, 10, 100))
    return data[:start] + data[start : start + size] * random.choice((2, 3, 50)) + data[start:]


def with_token(random: Random, data: bytes) -> bytes:
    start = place(random, data)
    return data[:start] + text(random).encode("utf-8", "surrogatepass") + data[start:]


def with_digits(random: Random, data: bytes) -> bytes:
    numbers = list(re.finditer(rb"-?\d+", data))
    if not numbers:
        return data
    start, end = random.choice(numbers).span()
    number = random.choice((DIGITS, "1e999", "-1", "0", "1.5", "99999999999999999999", "0x" + "f" * 6_000, "1e", "--1"))
    return data[:start] + number.encode() + data[end:]


def with_depth(random: Random, data: bytes) -> bytes:
    start = place(random, data)
    return data[:start] + nested(random).encode() + data[start:]


def with_noise(random: Random, data: bytes) -> bytes:
    start = place(random, data)
    return data[:start] + random.randbytes(random.choice((1, 4, 100))) + data[start:]


# Values


def of_json(random: Random, data: bytes) -> bytes:
    """One to three values of a JSON text are replaced, removed or moved; sometimes its bytes are changed as well."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return of_bytes(random, data)
    for _ in range(random.randint(1, 3)):
        found = changed(random, found)
    return written(found)


def of_json_lines(random: Random, data: bytes) -> bytes:
    """One line of several is another."""
    lines = data.splitlines()
    index = random.randrange(len(lines))
    lines[index] = of_json(random, lines[index])
    return random.choice((b"\n", b"\n", b"\r\n", b"\n\n", b" ")).join(lines) + random.choice((b"\n", b""))


def of_yaml(random: Random, data: bytes) -> bytes:
    """The same for YAML; what is written is JSON, which YAML contains."""
    try:
        found = parse_yaml(data)
    except ValueError:
        return of_bytes(random, data)
    for _ in range(random.randint(1, 3)):
        found = changed(random, found)
    return written(found)


def written(found: Any) -> bytes:
    return json.dumps(found).replace(f'"{HUGE}"', DIGITS).encode()


def changed(random: Random, whole: Any) -> Any:
    """One place in nested values holds something else."""
    if not isinstance(whole, (dict, list)) or not whole or random.random() < 0.02:
        return value(random)
    whole = whole.copy()
    key = random.choice(list(whole)) if isinstance(whole, dict) else random.randrange(len(whole))
    if isinstance(whole[key], (dict, list)) and whole[key] and random.random() < 0.85:
        whole[key] = changed(random, whole[key])
        return whole
    match random.randrange(8):
        case 0:
            del whole[key]
        case 1 if isinstance(whole, dict):
            whole[text(random)] = whole.pop(key)
        case 2 if isinstance(whole, dict):
            whole[text(random)] = value(random)
        case 3 if isinstance(whole, list):
            whole *= random.choice((2, 30))
        case 4:
            whole[key] = json.loads(json.dumps(whole)) if len(str(whole)) < 2_000 else value(random)
        case _:
            whole[key] = value(random)
    return whole


def of_texts(random: Random, data: bytes) -> bytes:
    """One to three texts of a JSON text are others, or go on with others; everything else stays."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return of_bytes(random, data)
    for _ in range(random.randint(1, 3)):
        places = list(texts_in(found))
        if not places:
            return of_json(random, data)
        inside, key = random.choice(places)
        inside[key] = random.choice(("", inside[key])) + text(random)
    return written(found)


def texts_in(whole: Any) -> Iterator[tuple[Any, Any]]:
    """Each text in nested values, as what it stands in and its key there."""
    for key in whole if isinstance(whole, dict) else range(len(whole)):
        if isinstance(whole[key], str):
            yield whole, key
        elif isinstance(whole[key], (dict, list)):
            yield from texts_in(whole[key])


# safetensors


def of_safetensors(random: Random, data: bytes) -> bytes:
    """The header's values are changed; its length and what follows are kept, or lie as well."""
    if random.random() < 0.2:
        return of_bytes(random, data)
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = of_json(random, data[8 : 8 + size]), data[8 + size :]
    length = len(header) if random.random() < 0.8 else random.choice((0, 1, len(header) - 1, 10**6, 2**40, 2**63))
    return struct.pack("<Q", length) + header + (rest if random.random() < 0.8 else cut(random, rest))


def spliced(random: Random, seeds: Sequence[bytes], mutate: Mutate) -> bytes:
    """A mutation of one of the valid inputs, or of the beginning of one and the end of another."""
    chosen = random.choice(seeds)
    if random.random() < 0.05:
        other = random.choice(seeds)
        chosen = chosen[: place(random, chosen)] + other[place(random, other) :]
    if random.random() < 0.03:
        return random.choice((nested(random).encode(), random.randbytes(random.randrange(200)), b""))
    return (mutate if random.random() < 0.7 else of_bytes)(random, chosen)
