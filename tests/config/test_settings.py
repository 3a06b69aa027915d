"""Every setting explains itself."""

from dataclasses import fields
from pathlib import Path

import pytest

from dskd.config.load import load_run
from dskd.config.methods import MethodConfig
from dskd.config.run import RunConfig
from dskd.config.settings import list_settings

BY_KEY = {setting.key: setting for setting in list_settings()}


@pytest.mark.parametrize("key", BY_KEY)
def test_each_setting_has_a_type_a_default_and_a_help(key):
    setting = BY_KEY[key]
    assert len(setting.help) > 10
    assert setting.type
    assert "<" not in setting.type
    assert setting.default


def test_every_area_and_every_kind_of_method_is_there():
    areas = {key.partition(".")[0].partition("(")[0] for key in BY_KEY}
    assert areas == {field.name for field in fields(RunConfig)}
    for kind, config in MethodConfig.kinds.items():
        assert {f"method({kind}).{field.name}" for field in fields(config)} <= set(BY_KEY)
        assert kind in BY_KEY["method.kind"].type


@pytest.mark.parametrize(
    ("key", "type_", "default"),
    [
        ("student.path", "path", "required"),
        ("teacher.adapter", "path or empty", "empty"),
        ("student.lora.targets", "list of text", "[]"),
        ("train.lr", "number", "0.0005"),
        ("train.max_steps", "whole number or empty", "empty"),
        ("data.bos", "true | false", "false"),
        ("engine.zero_stage", "0 | 1 | 2 | 3", "0"),
        ("output.root", "path", "outputs"),
        ("description", "text", "empty"),
    ],
)
def test_types_and_defaults_in_words(key, type_, default):
    assert (BY_KEY[key].type, BY_KEY[key].default) == (type_, default)


@pytest.mark.parametrize(
    ("prefix", "some"),
    [("train.lr", {"train.lr"}), ("checkpoint", {"checkpoint.keep_best", "checkpoint.best_by"}), ("nothing", set())],
)
def test_a_prefix_chooses(prefix, some):
    found = {setting.key for setting in list_settings(prefix)}
    assert some <= found
    assert found == {key for key in BY_KEY if key.startswith(prefix)}


def test_defaults_that_are_told_are_accepted(tmp_path):
    """Each default, written out as told, gives the run that leaving it out gives."""
    file = tmp_path / "run.yaml"
    file.write_text("student: {path: /s}\nteacher: {path: /t}\ndata: {train: /a, dev: /b}\nmethod: {kind: kd}\n")
    told = [
        s for s in list_settings() if s.default not in ("required", "empty") and ("(" not in s.key or "(kd)" in s.key)
    ]
    overrides = [f"{s.key.replace('(kd)', '')}={s.default}" for s in told]
    plain = ["student.lora={}", f"output.root={Path('outputs').absolute()}"]
    assert load_run(file, overrides) == load_run(file, plain)
