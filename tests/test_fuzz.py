"""A small pass of `make fuzz`, and that it would find what it looks for."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from fuzz import run
from fuzz.__main__ import fuzz, keep
from fuzz.mutations import of_bytes, of_json, of_yaml, spliced
from fuzz.run import Harm, Playground, Target, check_script, run_target


@pytest.fixture
def playground(tmp_path) -> Playground:
    found = Playground(tmp_path)
    found.prepare()
    return found


def test_three_hundred_inputs_are_accepted_or_refused_in_one_line(tmp_path, capfd):
    results = fuzz(tmp_path, 300, seed=1)
    assert [(result.target, failure.index, failure.reason) for result in results for failure in result.failures] == []
    assert sum(result.accepted + result.refused for result in results) == 300
    assert sum(result.accepted for result in results) > 30
    assert sum(result.refused for result in results) > 100


def raising(error: BaseException) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        raise error

    return read


class Panic(BaseException):
    """As Rust's."""


BROKEN = {
    "an error of its own": (raising(KeyError("key")), "KeyError: \"'key'\""),
    "a panic": (raising(Panic("Rust")), "Panic: 'Rust'"),
    "two lines": (raising(ValueError("two\nlines")), "not one line: 'two\\nlines'"),
    "a long line": (raising(ValueError("x" * 601)), "not one line: 'xxx"),
    "no word": (raising(ValueError()), "not one line: ''"),
    "a slow one": (lambda data: time.sleep(60), "took longer than 0 s"),
}


@pytest.mark.parametrize(("read", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_reader_that_is_wrong_is_told_with_its_input(playground, monkeypatch, read, reason):
    monkeypatch.setattr(run, "SECONDS", 0.2)
    monkeypatch.setattr(tempfile, "tempdir", str(playground.folder))
    result = run_target(Target("broken", [b"valid"], of_bytes, read, ValueError), 1, 1, playground)
    assert [failure.index for failure in result.failures] == [-1, 0]
    assert all(failure.reason.startswith(reason) for failure in result.failures)
    (told, _) = keep([result], 1)
    assert Path(told.partition("(")[2].partition(")")[0]).read_bytes() == b"valid"


def test_a_valid_input_that_is_refused_is_told(playground):
    (failure,) = run_target(
        Target("t", [b"v"], of_bytes, raising(ValueError("x")), ValueError), 9, 1, playground
    ).failures
    assert (failure.index, failure.reason) == (-1, "a valid input is refused")


@pytest.mark.parametrize("harm", ["marker.touch()", "victim.write_text('changed')", "victim.unlink()"])
def test_what_changes_around_the_folder_is_told(playground, harm):
    def read(data: bytes) -> None:
        if data != b"valid":
            exec(f"playground.{harm}", {"playground": playground})

    result = run_target(Target("harmful", [b"valid"], of_bytes, read), 1, 1, playground)
    assert [failure.reason for failure in result.failures] == ["something around the folder has changed"]


PLAIN = "#!/bin/bash\n#SBATCH --qos=plain\nexport A='plain'\n"


@pytest.mark.parametrize(
    "script",
    [
        "#!/bin/bash\n#SBATCH --qos=a\n#SBATCH --wrap=b\nexport A='plain'\n",
        "#!/bin/bash\n#SBATCH --uid=a\nexport A='plain'\n",
        "#!/bin/bash\n#SBATCH --qos=a\nexport A='plain\n",
        "#!/bin/bash\n#SBATCH --qos=a\nexport A='plain'\ntouch marker\n",
    ],
)
def test_a_script_that_says_more_is_told(script):
    check_script(PLAIN.replace("plain", "$(touch marker)"), PLAIN)
    with pytest.raises(Harm):
        check_script(script, PLAIN)


@pytest.mark.parametrize("mutate", [of_bytes, of_json, of_yaml])
def test_inputs_depend_on_the_seed_alone(mutate):
    seeds = [b'{"a": [1, {"b": "c"}], "d": null}', b'{"e": 1.5}']
    first, again, other = ([spliced(Random(f"{s} {i}"), seeds, mutate) for i in range(200)] for s in (1, 1, 2))
    assert first == again
    assert len({*first, *other}) > 300
