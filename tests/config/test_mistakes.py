"""Each mistake in a run file is one line: where, which key, what is allowed, the nearest name."""

import re
import time

import pytest

from dskd.config.errors import UserError
from dskd.config.load import load_run

VALUES = {
    "student": "{path: /m/student}",
    "teacher": "{path: /m/teacher}",
    "data": "{train: /d/train.jsonl, dev: /d/dev.jsonl}",
    "method": "{kind: kd}",
}


def run_text(**sections: str | None) -> str:
    return "".join(f"{key}: {value}\n" for key, value in (VALUES | sections).items() if value is not None)


@pytest.fixture
def error_of(tmp_path):
    """The message for a run file's text and overrides, its file name as RUN."""

    def message(text: str = "", *overrides: str) -> str:
        file = tmp_path / "run.yaml"
        file.write_text(text or run_text(), encoding="utf-8")
        with pytest.raises(UserError) as raised:
            load_run(file, overrides)
        assert len(str(raised.value).splitlines()) == 1
        return str(raised.value).replace(str(file), "RUN")

    return message


WRONG = [
    # unknown keys
    ("trian.lr=3", "trian: unknown key; allowed: checkpoint, data, description, .*; nearest: train$"),
    ("train.learning=3", "train.learning: unknown key; allowed: clip, epochs, .*weight_decay"),
    ("train.epoch=3", "train.epoch: unknown key; .*; nearest: epochs$"),
    ("eval.generation.topp=1", "eval.generation.topp: unknown key; .*; nearest: top_p$"),
    ("student.lora.rnk=1", "student.lora.rnk: unknown key; allowed: alpha, dropout, rank, targets; nearest: rank$"),
    ("method.divergenc=js", "method.divergenc: unknown key; .*; nearest: divergence$"),
    ("extends=a.yaml", "extends: unknown key; "),
    # keys of another section
    ("lr=3", r"lr: unknown key; allowed: .*; did you mean train.lr\?$"),
    ("kd_rate=1", r"kd_rate: unknown key; .*; did you mean method.kd_rate\?$"),
    ("max_length=9", r"max_length: unknown key; .* data.max_length or eval.generation.max_length\?$"),
    ("train.zero_stage=1", r"train.zero_stage: unknown key; .*; did you mean engine.zero_stage\?$"),
    ("student.rank=1", r"student.rank: unknown key; .*; did you mean student.lora.rank\?$"),
    # types
    ("train.epochs=many", "train.epochs: a whole number is expected, got 'many'$"),
    ("train.epochs=true", "train.epochs: a whole number is expected, got True$"),
    ("train.epochs=1.5", "train.epochs: a whole number is expected, got 1.5$"),
    ("train.epochs=1e3", "train.epochs: a whole number is expected, got 1000.0$"),
    ("train.max_steps=x", "train.max_steps: a whole number is expected, got 'x'$"),
    ("train.lr=fast", "train.lr: a number is expected, got 'fast'$"),
    ("train.lr=true", "train.lr: a number is expected, got True$"),
    ("train.lr=", "train.lr: a number is expected, got None$"),
    ("train.lr.x=3", "train.lr: a number is expected, got {'x': 3}$"),
    ("output.name=3", "output.name: text is expected, got 3$"),
    ("output.name=2024-01-01", "output.name: text is expected, got datetime.date"),
    ("student.path=3", "student.path: a path is expected, got 3$"),
    ("teacher.adapter=[a]", r"teacher.adapter: a path is expected, got \['a'\]$"),
    ("data.bos=1", "data.bos: true or false is expected, got 1$"),
    ("data.bos=yes", "data.bos: true or false is expected, got 'yes'$"),
    ("train=5", "train: a section with keys is expected, got 5$"),
    ("teacher=/m/t", "teacher: a section with keys is expected, got '/m/t'$"),
    ("method=kd", "method: a section with keys is expected, got 'kd'$"),
    ("method=", "method: a section with keys is expected, got None$"),
    ("student.lora=4", "student.lora: a section with keys is expected, got 4$"),
    ("student.lora.targets=q_proj", "student.lora.targets: a list is expected, got 'q_proj'$"),
    ("student.lora.targets=[1]", "student.lora.targets: text is expected, got 1$"),
    # choices
    ("engine.zero_stage=4", "engine.zero_stage: unknown value 4; allowed: 0, 1, 2, 3$"),
    ("engine.zero_stage=true", "engine.zero_stage: unknown value True; allowed: 0, 1, 2, 3$"),
    ("engine.precision=bf61", "engine.precision: unknown value 'bf61'; allowed: bf16, fp32; nearest: bf16$"),
    ("train.schedule=3", "train.schedule: unknown value 3; allowed: cosine, linear, constant$"),
    ("method.divergence=forward", "method.divergence: unknown value 'forward'; allowed: .*; nearest: forward_kl$"),
    ("method.kind=kdd", "method.kind: unknown method 'kdd'; allowed: .*dskd_cma, .*kd, .*sft.*; nearest: kd$"),
    # ranges
    ("train.lr=0", "train.lr: must be above 0, got 0.0$"),
    ("train.lr=.nan", "train.lr: a number is expected, got nan$"),
    ("train.max_steps=0", "train.max_steps: must be above 0, got 0$"),
    ("train.warmup_ratio=1", r"train.warmup_ratio: must be in \[0, 1\), got 1.0$"),
    ("train.clip=-1", "train.clip: must not be negative, got -1.0$"),
    ("data.workers=-1", "data.workers: must not be negative, got -1$"),
    ("data.max_prompt_length=0", "data.max_prompt_length: must be above 0, got 0$"),
    ("method.kd_rate=1.1", r"method.kd_rate: must be in \[0, 1\], got 1.1$"),
    ("method.skew=1", r"method.skew: must be in \(0, 1\), got 1.0$"),
    ("method.temperature=0", "method.temperature: must be above 0, got 0.0$"),
    ("student.lora.dropout=1", r"student.lora.dropout: must be in \[0, 1\), got 1.0$"),
    ("student.lora.rank=0", "student.lora.rank: must be above 0, got 0$"),
    ("eval.generation.top_p=0", r"eval.generation.top_p: must be in \(0, 1\], got 0.0$"),
    ("eval.every_epochs=0", "eval.every_epochs: must be above 0, got 0$"),
    ("checkpoint.keep_best=0", "checkpoint.keep_best: must be above 0, got 0$"),
    ("engine.loss_memory_mb=0", "engine.loss_memory_mb: must be above 0, got 0$"),
    ("launch.processes=0", "launch.processes: must be above 0, got 0$"),
    ("output.name=a/b", "output.name: must be a folder name of at most 200 bytes, got 'a/b'$"),
    ("output.name=..", "output.name: must be a folder name of at most 200 bytes, got '..'$"),
    (f"output.name={'é' * 101}", "output.name: must be a folder name of at most 200 bytes, got 'é+.*é+'$"),
    (
        f"student.path={'a' * 256}",
        "student.path: a path of at most 1024 bytes, 255 for each name, is expected, got 'a+",
    ),
    (f"data.train={'/a' * 600}", "data.train: a path of at most 1024 bytes, 255 for each name, is expected, got '/a"),
    # numbers that no run can have
    ("train.seed=-1", "train.seed: must be from 0 to 4294967295, got -1$"),
    ("train.seed=4294967296", "train.seed: must be from 0 to 4294967295, got 4294967296$"),
    ("train.lr=1e30", r"train.lr: must be at most 1.0, got 1e\+30$"),
    ("train.projector_lr=2", "train.projector_lr: must be at most 1.0, got 2.0$"),
    ("train.epochs=2147483648", "train.epochs: must be at most 2147483647, got 2147483648$"),
    ("train.max_steps=1000000000000", "train.max_steps: must be at most 2147483647, got 1000000000000$"),
    ("train.global_batch_size=2147483648", "train.global_batch_size: must be at most 2147483647, got"),
    ("train.micro_batch_size=2147483648", "train.micro_batch_size: must be at most 2147483647, got"),
    ("eval.generation.batch_size=2147483648", "eval.generation.batch_size: must be at most 2147483647, got"),
    ("data.max_length=2147483648", "data.max_length: must be at most 2147483647, got"),
    ("data.workers=257", "data.workers: must be at most 256, got 257$"),
    ("launch.processes=1025", "launch.processes: must be at most 1024, got 1025$"),
    ("launch.hours=1e9", "launch.hours: must be at most 8784, got 1000000000.0$"),
    ("student.lora.rank=2147483648", "student.lora.rank: must be at most 2147483647, got"),
    ("train.epochs=9223372036854775808", "train.epochs: a whole number of at most 64 bits is expected, got 9223372036"),
    (f"train.lr=1{'0' * 400}", "train.lr: a number of at most 64 bits is expected, got 1000.* ... .*000$"),
    (
        f"train.epochs=0x{'f' * 10_000}",
        "train.epochs: a whole number of at most 64 bits is expected, got something too",
    ),
    # settings that do not go together
    ("train.micro_batch_tokens=2147483648", "train.micro_batch_tokens: must be at most 2147483647, got"),
    (
        "train.micro_batch_tokens=511",
        r"train.micro_batch_tokens: must be at least data.max_length \(512\), .*, got 511$",
    ),
    ("data.max_length=256", r"data.max_prompt_length: must be below max_length \(256\) .*, got 256$"),
    ("data.max_prompt_length=512", r"data.max_prompt_length: must be below max_length \(512\) .*, got 512$"),
    ("eval.generation.max_length=9", r"eval.generation.max_prompt_length: .* below max_length \(9\), got 256$"),
    ("engine.offload=optimizer", "engine.offload: optimizer needs zero_stage 1, 2 or 3, got 0$"),
    ("engine={offload: all, zero_stage: 2}", "engine.offload: all needs zero_stage 3$"),
    ("checkpoint.best_by=rougel", "checkpoint.best_by: rougel needs eval.generate=true$"),
    ("teacher=null", "teacher: method kd needs one$"),
    ("teacher.path=/m/student", "teacher.path: is the student's path too"),
]


@pytest.mark.parametrize(("setting", "expected"), WRONG, ids=[setting[:60] for setting, _ in WRONG])
def test_a_setting_that_is_wrong(error_of, setting, expected):
    assert re.search(f"^command line: {expected}", error_of("", setting))


@pytest.mark.parametrize(("setting", "expected"), WRONG, ids=[setting[:60] for setting, _ in WRONG])
def test_a_setting_that_is_wrong_in_the_file(error_of, tmp_path, setting, expected):
    """The same, written into a file that extends a right one."""
    if setting.startswith("extends"):
        pytest.skip("is a key of files")
    (tmp_path / "base.yaml").write_text(run_text())
    key, _, value = setting.partition("=")
    outer, *inner = key.split(".")
    for part in reversed(inner):
        value = f"{{{part}: {value}}}"
    assert re.search(f"^RUN: {expected}", error_of(f"extends: base.yaml\n{outer}: {value}\n"))


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"data": None}, "RUN: data: is missing"),
        ({"method": None}, "RUN: method: is missing"),
        ({"student": "{}"}, "RUN: student.path: is missing"),
        ({"data": "{train: /d/train.jsonl}"}, "RUN: data.dev: is missing"),
        ({"teacher": "{adapter: /a}"}, "RUN: teacher.path: is missing"),
        ({"method": "{temperature: 1.0}"}, "RUN: method.kind: unknown method None; allowed: .*"),
        ({"teacher": None}, "RUN: teacher: method kd needs one"),
    ],
)
def test_a_key_that_is_missing(error_of, sections, expected):
    assert re.fullmatch(expected, error_of(run_text(**sections)))


def test_a_key_of_another_kind_of_method(error_of):
    message = error_of(run_text(method="{kind: sft, temperature: 2.0}"))
    assert message.startswith("RUN: method.temperature: unknown key; allowed: ")
    assert error_of("", "method.kind=sft", "method.skew=0.1").startswith("command line: method.skew: unknown key; ")


def test_a_method_without_settings_says_that_kind_is_allowed(error_of):
    assert error_of("", "method.kind=sft", "method.skew=0.1").partition("allowed: ")[2].startswith("kind")


def test_a_method_takes_only_its_settings_and_no_attribute_of_its_class(error_of):
    assert "method.teacher: unknown key" in error_of("", "method.teacher=none")
    assert "method.kinds: unknown key" in error_of("", "method.kinds={}")


def nested(levels: int) -> str:
    return "".join(f"{' ' * i}a:\n" for i in range(levels))


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)
)
"""Nine to the power of twenty values, in a thousand characters."""
MONSTROUS = [
    ("a: " + "[" * 100_000, "RUN: not valid YAML: more than 20000 values, or values in more than 32 others"),
    ("a: " + "{a: " * 5_000, "RUN: not valid YAML: more than 20000 values, or values in more than 32 others"),
    (nested(600), "RUN: not valid YAML: more than 20000 values, or values in more than 32 others"),
    ("- " * 5_000, "RUN: not valid YAML: more than 20000 values, or values in more than 32 others"),
    (BOMB, "RUN: not valid YAML: more than 20000 values, or values in more than 32 others"),
    ("a: &a [*a]", r"RUN: not valid YAML: \*a stands for nothing, or for what it is a part of"),
    ("a: [" + "x, " * 30_000 + "]", "RUN: not valid YAML: more than 20000 values, or values in more than 32 others"),
    ("#" * 1_000_001, "RUN: not valid YAML: more than 1000000 bytes"),
    (f"a: {'1' * 10_000}", r"RUN: not valid YAML: Exceeds the limit \(4300 digits\) .*"),
    ("a: 2024-13-45", "RUN: not valid YAML: month must be in 1..12"),
    ("a: !!int ''", "RUN: not valid YAML: string index out of range"),
    ("a: !!bool x", "RUN: not valid YAML: 'x'"),
    (f"{'k' * 5_000}: 1", "RUN: not valid YAML: mapping values are not allowed here .*"),
    (f"{'k' * 1_000}: 1\n{run_text()}", "RUN: k+ ... k*: unknown key; allowed: .*train"),
    ("extends: " + "x" * 5_000, ".*/x+ ... x+.*cannot be read: File name too long"),
    ('extends: "a\\0b"', "RUN: extends: one file name is expected, got .*"),
]


@pytest.mark.parametrize(("text", "expected"), MONSTROUS, ids=[text[:12] for text, _ in MONSTROUS])
def test_a_monstrous_file_is_told_at_once_and_in_one_line(error_of, text, expected):
    began = time.monotonic()
    message = error_of(text)
    assert time.monotonic() - began < 5
    assert re.fullmatch(expected, message)
    assert len(message) <= 600
    assert message.isprintable()


def test_a_monstrous_override_is_told_in_one_line(error_of):
    too_deep = r"command line: train.lr: '\[\[\[.* ... .*' is not a YAML value"
    assert re.fullmatch(too_deep, error_of("", "train.lr=" + "[" * 100_000))
    assert re.fullmatch("command line: train.lr: '999.* is not a YAML value", error_of("", f"train.lr={'9' * 10_000}"))
    assert "a key of at most 32 parts is expected" in error_of("", f"{'a.' * 5_000}b=1")
    assert len(error_of("", f"description=[{'x' * 10_000}]")) < 300
    assert len(error_of("", f"{'x' * 10_000}=1")) <= 600


def test_aliases_that_stay_small_are_followed(error_of):
    shared = "description: &d text\noutput: {name: *d}\n"
    assert error_of(run_text() + shared, "train.lr=x").startswith("command line: train.lr: ")


def test_files_over_files_end(error_of, tmp_path):
    for number in range(50):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    assert error_of("extends: 0.yaml").endswith("/32.yaml: extends: at most 32 files over each other are allowed")


def test_a_warning_of_the_yaml_library_stands_beside_no_message(error_of, capfd):
    error_of("a: [&a x, &a y]\n")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: [1, 2", "RUN: not valid YAML: .*line 1.*"),
        ("train: {lr: 1}\ntrain: {lr: 2}\n", 'RUN: not valid YAML: .*duplicate key "train".*line 2.*'),
        ("train: {lr: 1, lr: 2}\n", 'RUN: not valid YAML: .*duplicate key "lr".*'),
        ("a: 1\n---\nb: 2\n", "RUN: not valid YAML: .*another document.*"),
        ("a: !!python/object:os.system {}", "RUN: not valid YAML: .*python/object.*"),
        ("a: \x07", "RUN: not valid YAML: .*special characters are not allowed.*"),
        ("[student, teacher]", "RUN: a mapping of keys to values is expected"),
        ("# nothing", "RUN: a mapping of keys to values is expected"),
    ],
)
def test_yaml_that_is_broken(error_of, text, expected):
    assert re.fullmatch(expected, error_of(text))


def test_a_file_that_is_not_utf8(error_of, tmp_path):
    (tmp_path / "latin.yaml").write_bytes("description: Zürich\n".encode("latin-1"))
    assert "latin.yaml: not valid YAML: " in error_of("extends: latin.yaml\n")


def test_a_file_that_is_missing(error_of, tmp_path):
    assert error_of("extends: none.yaml\n") == f"{tmp_path}/none.yaml: cannot be read: No such file or directory"
    (tmp_path / "folder.yaml").mkdir()
    assert error_of("extends: folder.yaml\n") == f"{tmp_path}/folder.yaml: cannot be read: Is a directory"


def test_a_file_below_a_file(error_of, tmp_path):
    (tmp_path / "base.yaml").write_text(run_text())
    assert "base.yaml/more.yaml" in error_of("extends: base.yaml/more.yaml\n")


@pytest.mark.parametrize("value", ["[kd]", "{kd: 1}"])
def test_a_kind_that_is_no_name(error_of, value):
    assert "method.kind: unknown method" in error_of("", f"method.kind={value}")


@pytest.mark.parametrize("key", ["1", "true", "null", "[a, b]"])
def test_a_key_that_is_not_text(error_of, key):
    assert "unknown key" in error_of(run_text() + f"? {key}\n: 3\n")
    assert "unknown key" in error_of(run_text(train=f"{{? {key} : 3}}"))


def test_a_choice_of_numbers_takes_no_other_type(error_of):
    assert "engine.zero_stage: unknown value 1.0" in error_of("", "engine.zero_stage=1.0")


@pytest.mark.parametrize("key", ["train.lr", "train.projector_lr", "method.temperature", "eval.generation.temperature"])
def test_a_rate_is_finite(error_of, key):
    assert key in error_of("", f"{key}=.inf")
