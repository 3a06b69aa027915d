"""Run files: layers, overrides, and one line for every mistake."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dskd.config.errors import UserError
from dskd.config.load import load_run, merge, nest, parse_override, parse_seeds, read_layers, structure, to_yaml
from dskd.config.methods import DskdCmaConfig, KdConfig, SftConfig
from dskd.config.run import RunConfig

BASE = """\
student: {path: /m/student}
teacher: {path: /m/teacher}
data: {train: /d/train.jsonl, dev: /d/dev.jsonl}
method: {kind: kd, temperature: 3.0}
output: {root: /o}
"""


@pytest.fixture
def write(tmp_path):
    """Write a YAML file under the test's folder."""

    def write_file(name: str, text: str = BASE) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    return write_file


def error_of(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        load_run(file, overrides)
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    return message


# Layers


def test_a_file_lies_over_those_it_extends_each_relative_to_its_own_folder(write):
    write("base.yaml", BASE + "train: {lr: 1.0e-3, epochs: 5, seed: 1}\n")
    write("more/middle.yaml", "extends: ../base.yaml\ntrain: {lr: 2.0e-3, epochs: 6}\n")
    run = load_run(write("more/deep/top.yaml", "extends: ../middle.yaml\ntrain: {lr: 3.0e-3}\n"))
    assert (run.train.lr, run.train.epochs, run.train.seed) == (3e-3, 6, 1)
    assert run.student.path == Path("/m/student")


def test_the_origin_of_each_value_is_the_file_that_set_it(write):
    base = write("base.yaml", BASE + "train: {lr: fast, epochs: many}\n")
    top = write("top.yaml", "extends: base.yaml\ntrain: {epochs: few}\n")
    assert error_of(top) == f"{top}: train.epochs: a whole number is expected, got 'few'"
    assert error_of(top, "train.epochs=1") == f"{base}: train.lr: a number is expected, got 'fast'"


@pytest.mark.parametrize("links", [("a.yaml", "a.yaml"), ("a.yaml", "b.yaml", "a.yaml")])
def test_a_circle_is_told_with_its_way(write, links):
    for name, target in pairwise(links):
        write(name, f"extends: {target}\n")
    message = error_of(write(links[0], f"extends: {links[1]}\n"))
    assert "extends: goes in a circle" in message
    assert re.sub(r"\S*/", "", message.partition("(")[2]) == " -> ".join(links) + ")"


def test_a_circle_through_another_folder_is_told(write):
    assert "goes in a circle" in error_of(write("jobs/a.yaml", "extends: ../jobs/a.yaml\n"))


@pytest.mark.parametrize("target", ["5", "[base.yaml]", "{a: 1}"])
def test_extends_takes_one_file_name(write, target):
    assert "extends: one file name is expected" in error_of(write("run.yaml", f"extends: {target}\n{BASE}"))


# Overrides


def test_overrides_lie_over_the_file_and_the_last_one_counts(write):
    run = load_run(
        write("run.yaml"),
        ["train.lr=1e-4", "eval.generation.top_p=0.9", "student.lora.rank=4", "train.epochs=2", "train.epochs=3"],
    )
    assert run.train.lr == 1e-4
    assert run.eval.generation.top_p == 0.9
    assert (run.student.lora.rank, run.student.lora.alpha) == (4, 8)
    assert run.train.epochs == 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1e-4", 1e-4),
        ("a=1E5", 1e5),
        ("a=-2", -2),
        ("a=true", True),
        ("a=no", "no"),
        ("a=", None),
        ("a=[x, y]", ["x", "y"]),
        ("a={b: 1}", {"b": 1}),
        ("a=b=c", "b=c"),
        ("a='1'", "1"),
    ],
)
def test_an_override_is_a_yaml_value(text, value):
    key, found = parse_override(text)
    assert key == "a"
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["train.lr", "=3", "", "train.lr=[1", "train.lr={", "train.lr=\0"])
def test_what_is_no_override_is_told(write, text):
    assert error_of(write("run.yaml"), text).startswith("command line: ")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method.kind=sft"], SftConfig()),
        (["method.kind=dskd_cma"], DskdCmaConfig(temperature=3.0)),
        (["method.kind=sft", "method.kind=kd"], KdConfig()),
        (["method.kind=kd"], KdConfig(temperature=3.0)),
        (["method={kind: sft}"], SftConfig()),
    ],
)
def test_another_kind_of_method_drops_the_settings_that_it_lacks(write, overrides, expected):
    assert load_run(write("run.yaml"), overrides).method == expected


def test_another_kind_in_the_extending_file_drops_them_too(write):
    write("base.yaml")
    assert load_run(write("top.yaml", "extends: base.yaml\nmethod: {kind: sft}\n")).method == SftConfig()


def test_a_section_may_be_empty_or_absent(write):
    run = load_run(write("run.yaml"), ["teacher=null", "method.kind=sft", "student.lora={}"])
    assert run.teacher is None
    assert run.student.lora.rank == 256


# Back to YAML

UNPRINTED = ("Cc", "Cs", "Zl", "Zp")  # control characters and line breaks
letters = st.characters(codec="utf-8", exclude_characters="/", exclude_categories=UNPRINTED)
names = st.text(letters, min_size=1, max_size=50).filter(lambda name: name not in (".", ".."))


@settings(max_examples=25, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "output.name": names,
            "description": st.text(letters),
            "train.lr": st.floats(1e-12, 1.0),
            "train.max_steps": st.none() | st.integers(1, 2**31 - 1),
            "engine.zero_stage": st.integers(0, 3),
            "data.bos": st.booleans(),
            "student.lora.targets": st.lists(st.text("abc_1e-. ", min_size=1)),
            "method.kind": st.sampled_from(["sft", "kd", "dskd_cma"]),
        }
    )
)
def test_a_run_survives_yaml(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("yaml")
    file = folder / "run.yaml"
    file.write_text(BASE)
    layers, origins = read_layers(file)
    for key, value in values.items():
        merge(layers, nest(key, value), "test", origins)
    run = structure(layers, origins, "test", RunConfig)
    file.write_text(to_yaml(run), encoding="utf-8")
    assert load_run(file) == run


@pytest.mark.parametrize("name", ["\U00010000" * 8 + "0 0", "a " * 100 + "b", "\ue000 " * 30 + "x"])
def test_a_long_text_with_spaces_survives_yaml(write, name):
    run = load_run(write("run.yaml"), [f"description={json.dumps(name, ensure_ascii=False)}"])
    assert run.description == name
    assert load_run(write("resolved.yaml", to_yaml(run))) == run


def test_a_run_with_defaults_alone_survives_yaml(write):
    run = load_run(write("run.yaml", BASE.replace("output: {root: /o}\n", "")))
    assert load_run(write("resolved.yaml", to_yaml(run))) == run


def test_seeds():
    assert parse_seeds("10 20,30") == parse_seeds("10, 20 30") == [10, 20, 30]
    for wrong in ("", "a", "1 1", "1.5", "-1", "4294967296", "9" * 10_000):
        with pytest.raises(UserError, match=r"^--seeds: different whole numbers are expected"):
            parse_seeds(wrong)


def test_layers_of_a_single_file(write):
    values, origins = read_layers(write("run.yaml"))
    assert values["method"] == {"kind": "kd", "temperature": 3.0}
    assert origins["method.temperature"] == origins["student"] == str(write("run.yaml"))


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\x00", "a\u2028b", "a\x85b", "a\x1b[31m"])
@pytest.mark.parametrize("key", ["output.name", "output.root", "description", "data.train"])
def test_line_breaks_and_control_characters_are_refused(write, key, text):
    """They could end a line of a batch script, or of a log, and begin another."""
    write("run.yaml", BASE)
    section, _, name = key.rpartition(".")
    line = f"{section}: {json.dumps({name: text})}" if section else f"{name}: {json.dumps(text)}"
    file = write("over.yaml", f"extends: run.yaml\n{line}\n")
    with pytest.raises(UserError, match=f"{key}: .* without line breaks and control characters is expected") as raised:
        load_run(file)
    assert len(str(raised.value).splitlines()) == 1


def test_the_home_folder_may_be_written_short(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = load_run(write("run.yaml"), ["data.train=~/a.jsonl", "output.root=~none/b"])
    assert run.data.train == tmp_path / "a.jsonl"
    assert run.output.root == Path.cwd() / "~none/b"  # no such user
