"""Whatever stands in a model's folder: it loads, or one line says what is wrong with it, soon."""

import json
import logging
import shutil
import struct
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dskd.config.errors import UserError
from dskd.config.models import StudentConfig
from dskd.models.load import (
    load_causal_lm,
    load_checkpoint,
    load_projectors,
    load_student,
    load_tokenizer,
    loading,
    merge_adapter,
)

CPU = torch.device("cpu")

TEXTS = {
    "list": "[]",
    "number": "3",
    "null": "null",
    "cut": '{"a": ',
    "empty": "",
    "deep": '{"a": ' + "[" * 100_000,
    "digits": '{"a": ' + "9" * 10_000 + "}",
    "nul": "\0",
}
CONFIGS = {
    "hidden_size": ["abc", -1, 0, 10**9, None, [1], 33, 1.5, 10**5000],
    "num_hidden_layers": ["2", -1, 0, 10**6, None],
    "vocab_size": ["x", -1, 10**12, 5],
    "num_attention_heads": ["x", 0, 5],
    "model_type": [3, None, "nope", ["llama"]],
    "max_position_embeddings": ["x"],
    "hidden_act": ["nope", 3],
    "rope_parameters": [3],
    "quantization_config": [3, {}],
    "dtype": ["abc"],
    "tie_word_embeddings": ["x"],
}
TOKENIZER_CONFIGS = {
    "tokenizer_class": [3],
    "eos_token": [3, [], {"a": 1}],
    "added_tokens_decoder": [3, {"x": 3}],
    "model_max_length": ["x"],
    "extra_special_tokens": [3],
    "auto_map": [3],
}
TOKENIZERS = {
    "model": [3, None, {}, {"type": "BPE"}, {"type": "X"}],
    "decoder": [3, {"type": "X"}],
    "pre_tokenizer": [3, {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}],
    # This one makes the library panic, which is no `Exception`.
    "normalizer": [3, {"type": "Precompiled", "precompiled_charsmap": "AAAA"}],
    "added_tokens": [3, [3], [{"id": -1, "content": "q"}]],
    "truncation": [3],
    "version": [3],
}
ADAPTERS = {
    "peft_type": [3, "NOPE", None],
    "r": ["x", 0, -1],
    "lora_alpha": ["x"],
    "target_modules": [3, "(", ["nope"]],
    "task_type": [3, "X"],
    "init_lora_weights": ["x"],
    "rank_pattern": [3],
    "modules_to_save": [3, ["lm_head"]],
}


def nonsense(table: dict[str, list[object]], **texts: str) -> list[object]:
    """What a JSON file is replaced by, or has one value replaced by."""
    values = [
        ({key: value}, f"{key}={str(value)[:20] if not is_huge(value) else 'huge'}")
        for key in table
        for value in table[key]
    ]
    return [pytest.param(text, id=name) for name, text in texts.items()] + [
        pytest.param(v, id=name) for v, name in values
    ]


def is_huge(value: object) -> bool:
    return isinstance(value, int) and abs(value) > 10**100


def spoil(file: Path, change: str | bytes | dict[str, object]) -> None:
    if isinstance(change, bytes):
        file.write_bytes(change)
    elif isinstance(change, str):
        file.write_text(change)
    else:
        whole = json.loads(file.read_text()) | {key: "HUGE" if is_huge(v) else v for key, v in change.items()}
        file.write_text(json.dumps(whole).replace('"HUGE"', "9" * 5_000))


def told(do, *arguments) -> str:
    """The one line of a `UserError`, within ten seconds."""
    began = time.monotonic()
    with pytest.raises(UserError) as raised:
        do(*arguments)
    message = str(raised.value)
    assert time.monotonic() - began < 10
    assert message.isprintable()
    assert len(message) <= 600
    return message


@pytest.mark.parametrize("change", nonsense(CONFIGS, **TEXTS))
def test_a_configuration_of_nonsense(copy, change):
    folder = copy()
    spoil(folder / "config.json", change)
    assert told(load_student, StudentConfig(folder), "fp32", False).startswith("student.path: ")


def test_a_configuration_that_leaves_all_out_asks_for_no_gigabytes(copy):
    """By itself it is one of 6.7 G weights, which transformers makes before it tells that they are missing."""
    folder = copy()
    spoil(folder / "config.json", '{"model_type": "llama"}')
    message = told(load_causal_lm, folder, "teacher.path", "fp32", False)
    assert message.startswith("teacher.path: ")
    assert "config.json describes at least" in message


@pytest.mark.parametrize("change", nonsense(TOKENIZER_CONFIGS, **TEXTS))
def test_a_tokenizer_s_configuration_of_nonsense(copy, change):
    folder = copy()
    spoil(folder / "tokenizer_config.json", change)
    assert told(load_tokenizer, folder, "student.path").startswith("student.path: ")


@pytest.mark.parametrize("change", nonsense(TOKENIZERS, **TEXTS))
def test_a_tokenizer_of_nonsense(copy, change):
    folder = copy()
    spoil(folder / "tokenizer.json", change)
    assert told(load_tokenizer, folder, "teacher.path").startswith("teacher.path: ")


@pytest.mark.parametrize("change", [*TEXTS.values(), {"max_new_tokens": -1}, {"cache_implementation": "x"}])
def test_generation_settings_of_nonsense_do_not_count_or_are_told(copy, change, tmp_path):
    folder = copy()
    spoil(folder / "generation_config.json", change)
    problem = None
    try:
        load_student(StudentConfig(folder), "fp32", False).save_pretrained(tmp_path / "saved")
    except UserError as error:
        problem = str(error)
    assert problem is None or problem.startswith(f"student.path: no causal language model loads from {folder}: ")


@pytest.mark.parametrize("change", nonsense(ADAPTERS, **TEXTS))
def test_an_adapter_s_configuration_of_nonsense(tiny, adapter, tmp_path, change):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    spoil(folder / "adapter_config.json", change)
    model = load_causal_lm(tiny("llama"), "teacher.path", "fp32", False)
    assert told(merge_adapter, model, folder, "teacher.adapter").startswith("teacher.adapter: ")
    assert told(load_checkpoint, folder, "fp32", CPU).startswith(f"{folder}: ")


def of_header(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with a header of one's own, which may lie about its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(**fields: object) -> bytes:
    """A file of one tensor of six values, or whatever its header says instead."""
    return of_header({"weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | fields}, bytes(24))


LIES = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "a header of exabytes": of_header({}, length=2**63),
    "a header longer than the file": of_header({}, length=10**7),
    "a header that is cut": of_header({"weight": {}}, length=5),
    "a list": of_header([]),
    "brackets": of_header(b"[" * 100_000),
    "no text": of_header(b"\xff\xfe"),
    "no tensor": of_header({"weight": 3}),
    "a larger shape": tensor(shape=[10**9]),
    "a shape that overflows": tensor(shape=[2**62, 2**62]),
    "a shape below zero": tensor(shape=[-2, -3]),
    "places outside": tensor(data_offsets=[0, 10**12]),
    "places that cross": tensor(data_offsets=[24, 0]),
    "a type of its own": tensor(dtype="X"),
    "another model's": tensor(),
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES)
def test_weights_that_lie(copy, tiny, adapter, tmp_path, content):
    folder = copy()
    (folder / "model.safetensors").write_bytes(content)
    assert told(load_student, StudentConfig(folder), "fp32", False).startswith("student.path: ")
    spoilt = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (spoilt / "adapter_model.safetensors").write_bytes(content)
    model = load_causal_lm(tiny("llama"), "teacher.path", "fp32", False)
    assert told(merge_adapter, model, spoilt, "teacher.adapter").startswith("teacher.adapter: ")
    (tmp_path / "projectors.safetensors").write_bytes(content)
    assert told(load_projectors, torch.nn.Linear(4, 5), tmp_path).startswith("method.projectors_from: ")


PROJECTORS = {
    "whole numbers": lambda weights: {k: v.long() for k, v in weights.items()},
    "truths": lambda weights: {k: v > 0 for k, v in weights.items()},
    "complex numbers": lambda weights: {k: v.to(torch.complex64) for k, v in weights.items()},
    "another shape": lambda weights: {k: v[:2].clone() for k, v in weights.items()},
    "one less": lambda weights: {"weight": weights["weight"]},
    "one more": lambda weights: weights | {"more": torch.ones(1)},
    "none": lambda weights: {},
}


@pytest.mark.parametrize("change", PROJECTORS.values(), ids=PROJECTORS)
def test_projectors_that_do_not_fit(tmp_path, change):
    method = torch.nn.Linear(4, 5)
    save_file(dict(method.state_dict()), tmp_path / "projectors.safetensors")
    load_projectors(method, tmp_path)
    save_file(change(dict(method.state_dict())), tmp_path / "projectors.safetensors")
    assert told(load_projectors, method, tmp_path).startswith("method.projectors_from: ")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), RuntimeError("Connection closed by peer [1]")])
def test_what_is_no_mistake_of_the_user_goes_through(error):
    """An interruption, and a rank that is gone: that one is started again."""
    with pytest.raises(type(error)) as raised, loading("student.path"):
        raise error
    assert raised.value is error


def test_an_error_without_words_has_a_name():
    with pytest.raises(UserError, match=r"^student\.path: AssertionError$"), loading("student.path"):
        raise AssertionError
    with pytest.raises(UserError, match=r"^student\.path: KeyError: 'x'$"), loading("student.path"):
        raise KeyError("x")
    with pytest.raises(UserError) as raised, loading("student.path"):
        raise ValueError("several\nlines " * 1000)
    assert len(str(raised.value)) < 300
    assert str(raised.value).startswith("student.path: several lines several lines ")


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What transformers logs, as it is shown."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    return found


def test_a_library_s_own_report_stands_beside_no_message(copy, said):
    folder = copy()
    spoil(folder / "config.json", {"num_hidden_layers": 3})
    message = told(load_student, StudentConfig(folder), "fp32", False)
    assert message.startswith("student.path: ")
    assert "lacks 9 weight(s)" in message
    assert said == []


def test_a_library_s_warnings_are_told_where_no_error_is(said):
    log = logging.getLogger("transformers.models.x")
    with loading("student.path"):
        log.warning("take care")
        assert said == []
    assert said == ["take care"]
    with pytest.warns(UserWarning, match="this is old"), loading("student.path"):
        warnings.warn("this is old", stacklevel=1)
