"""The real command, as typed: help, listings, and mistakes; and that these need no torch."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from dskd import __version__
from dskd.cli import app, join_numbers
from dskd.config.load import load_run
from dskd.config.recipes import find_recipes
from dskd.config.settings import list_settings

ROOT = Path(__file__).resolve().parents[2]
LOGIN = ROOT / ".venv-login" / "bin" / "dskd"
VERBS = typer.main.get_command(app).commands
WORDS = {
    "train": ("RUN.yaml", "KEY=VALUE", "student", "--force", "75"),
    "resume": ("RUN_DIR", "KEY=VALUE", "--force"),
    "collect": ("RUN_DIR", "--to"),
    "evaluate": ("--data", "--seeds", "--greedy", "--processes", "ROUGE-L"),
    "align": ("TEACHER", "STUDENT", "--cache-dir", "nearest"),
    "settings": ("prefix", "default"),
    "teacher": ("cache",),
    "recipes": ("jobs",),
    "quickstart": ("outputs/quickstart", "teacher"),
}
login = pytest.mark.skipif(not LOGIN.is_file(), reason="no environment without torch: make .venv-login/ready")


def dskd(*arguments: object, program: tuple = (sys.executable, "-m", "dskd"), cwd: Path = ROOT):
    command = [*map(str, program), *map(str, arguments)]
    outside = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "FORCE_COLOR", "GITHUB_ACTIONS")}
    plain = outside | {"COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=plain, timeout=60, check=False)


def output_of(*arguments: object, **where: object) -> str:
    done = dskd(*arguments, **where)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def mistake_of(*arguments: object) -> str:
    """The one line on stderr of a command that ends with code 2."""
    done = dskd(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    return line


def test_help_lists_every_verb():
    shown = output_of("--help")
    assert all(verb in shown for verb in VERBS)
    assert "Distil" in shown


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself(verb):
    shown = output_of(verb, "--help")
    assert f"dskd {verb}" in shown
    assert VERBS[verb].help.split("\n")[0].split(", ")[0][:40] in " ".join(shown.replace("│", " ").split())
    assert all(word in shown for word in WORDS.get(verb, ()))


def test_the_version():
    assert output_of("--version") == f"dskd {__version__}\n"


def test_settings_are_listed_whole():
    shown = output_of("settings")
    assert all(setting.key in shown for setting in list_settings())
    assert "required" in shown


def test_recipes_are_listed_from_anywhere(tmp_path):
    shown = output_of("recipes", cwd=tmp_path)
    header, *lines = shown.splitlines()
    assert header.split() == ["recipe", "method", "student", "teacher", "description"]
    for line, recipe in zip(lines, find_recipes(), strict=True):
        told = (recipe.method, recipe.student, recipe.teacher, recipe.description)
        file, rest = line.split(maxsplit=1)
        assert Path(file) == recipe.file.absolute()
        assert rest.split() == " ".join(told).split()


def test_recipes_fit_a_terminal_of_100_columns(monkeypatch):
    """A line each; what does not fit is cut from the description, never from the path that is to be copied."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(ROOT)
    app(["recipes"], standalone_mode=False)
    plain = re.sub(r"\x1b\[\d*m", "", terminal.getvalue())
    _, *lines = plain.splitlines()
    assert max(map(len, lines)) <= 100
    for line, recipe in zip(lines, find_recipes(), strict=True):
        assert line.split()[0] == str(recipe.file)
        assert line.rstrip().endswith("…") or line.rstrip().endswith(recipe.description)


def test_a_wrong_key_is_one_line(make_run, tmp_path):
    run = make_run(tmp_path)
    assert mistake_of("train", run, "train.learning_rate=1").startswith(
        "dskd: command line: train.learning_rate: unknown key; allowed: "
    )
    run.write_text(run.read_text().replace("micro_batch_size", "micro_batch"))
    assert mistake_of("train", run).startswith(f"dskd: {run}: train.micro_batch: unknown key; ")


def test_what_does_not_fit_this_machine_is_told_before_torch_is_loaded(make_run, tmp_path):
    run = make_run(tmp_path)
    assert mistake_of("train", run, "launch.processes=3").startswith(
        "dskd: train.global_batch_size: 8 does not divide into 3 rank(s) x train.micro_batch_size 2; "
    )
    assert mistake_of("train", run, "teacher.path=/none").startswith("dskd: teacher.path: no such folder: /none")
    assert mistake_of("teacher", "cache", run, "--shard", "4/4").startswith(
        "dskd: --shard: I/N is expected, such as 0/4"
    )


@pytest.fixture(scope="module")
def inputs(make_run, tmp_path_factory) -> Path:
    """A folder with a run, a saved model, and things that are wrong."""
    folder = tmp_path_factory.mktemp("inputs")
    run = make_run(folder)
    shutil.copytree(load_run(run).student.path, folder / "model")
    (folder / "missing.jsonl").write_text('{"prompt": "p", "output": "o"}\n{"prompt": "p"}\n')
    (folder / "deep.jsonl").write_text("[" * 100_000)
    (folder / "nul.jsonl").write_bytes(b"\0")
    shutil.copytree(folder / "model", folder / "broken")
    (folder / "broken" / "config.json").write_text("[]")
    return folder


EARLY = [
    (("train", "run.yaml", "data.train=missing.jsonl"), 'missing.jsonl:2: field "output" is missing; found: prompt'),
    (("train", "run.yaml", "data.dev=deep.jsonl"), "deep.jsonl:1: JSON that is not read: maximum recursion depth"),
    (("train", "run.yaml", "data.train=nul.jsonl"), "nul.jsonl:1: broken JSON: Expecting value at column 1"),
    (("train", "run.yaml", "data.train=model"), "data.train: no such file: "),
    (("train", "run.yaml", "output.root=run.yaml"), "output.root: cannot write "),
    (("train", "run.yaml", "data.cache_dir=run.yaml/cache"), "data.cache_dir: cannot write "),
    (("train", "run.yaml", "checkpoint.scratch_dir=run.yaml"), "checkpoint.scratch_dir: cannot write "),
    (("train", "run.yaml", "student.path=broken"), "student.path: "),
    (("train", "run.yaml", f"train.seed={'9' * 5000}"), "command line: train.seed: '999"),
    (("train", "run.yaml", f"train.lr={'[' * 5000}"), "command line: train.lr: '[[["),
    (("evaluate", "model", "--data", "missing.jsonl"), 'missing.jsonl:2: field "output" is missing; found: prompt'),
    (("evaluate", "model", "--data", "model"), "model: cannot be read: Is a directory"),
    (("evaluate", "model", "--data", "none.jsonl"), "none.jsonl: cannot be read: No such file or directory"),
    (("evaluate", "broken", "--data", "dev.jsonl"), "broken: broken/config.json holds no JSON object"),
    (("evaluate", "model", "--data", "dev.jsonl", "--output", "run.yaml"), "--output: cannot write "),
    (("evaluate", "model", "--data", "dev.jsonl", "--seeds", "9" * 5000), "--seeds: different whole numbers are expec"),
    (
        ("evaluate", "model", "--data", "dev.jsonl", "--batch-size", "9" * 20),
        "--batch-size: must be at most 2147483647",
    ),
    (("align", "model", "model", "--cache-dir", "run.yaml"), "--cache-dir: cannot write "),
    (("collect", "outputs", "--to", "run.yaml"), "--to: cannot write "),
]


@pytest.mark.parametrize(("arguments", "expected"), EARLY, ids=[" ".join(words)[:50] for words, _ in EARLY])
def test_a_mistake_is_told_before_torch_is_loaded(inputs, arguments, expected):
    without = "import sys; sys.modules |= {'torch': None, 'numpy': None}; from dskd.cli import main; main()"
    done = dskd(*arguments, program=(sys.executable, "-c", without), cwd=inputs)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert expected in line
    assert line.startswith("dskd: ")
    assert len(line) < 600


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("train", "none.yaml"), "dskd: none.yaml: cannot be read: No such file or directory"),
        (("resume", "tests"), f"dskd: {ROOT}/tests: no run.yaml: a run directory is expected"),
        (("collect", "tests", "--to", "/none"), "dskd: tests: no run.yaml: a run directory is expected"),
        (("settings", "trian"), "dskd: settings: no key begins with 'trian'; areas: student, data, "),
        (("recipes", "tests/golden/scripts"), "dskd: recipes: no run files (*.yaml) under tests/golden/scripts"),
        (("evaluate", "/none", "--data", "x.jsonl"), "dskd: /none: no such folder: /none"),
        (("evaluate", "/none", "--data", "x", "--seeds", "1 1"), "dskd: --seeds: different whole numbers are expected"),
        (("evaluate", "/none", "--data", "x", "--precision", "fp16"), "dskd: --precision: allowed: bf16, fp32; got"),
    ],
)
def test_mistakes_are_one_line(arguments, expected):
    assert mistake_of(*arguments).startswith(expected)


def test_an_unknown_verb_or_option_has_code_2():
    assert dskd("trian").returncode == 2
    done = dskd("evaluate", "--nope")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("arguments", "code"), [(["settings", "train.lr"], 0), (["settings", "trian"], 2)])
def test_a_rank_ends_with_its_code_whatever_happens_at_the_end_of_the_interpreter(arguments, code):
    program = "import atexit, os; atexit.register(os.abort); from dskd.cli import main; main()"
    command = [sys.executable, "-c", program, *arguments]
    no_rank = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(command, capture_output=True, text=True, env=no_rank | {"RANK": "0"})
    assert done.returncode == code
    assert ("train.lr" if code == 0 else "dskd: settings: no key begins with") in done.stdout + done.stderr
    without = subprocess.run(command, capture_output=True, env=no_rank)
    assert without.returncode == -signal.SIGABRT  # what would have happened


def test_importing_the_command_line_imports_no_heavy_package():
    heavy = {"torch", "numpy", "transformers", "peft", "deepspeed", "rich.table", "cattrs", "ruamel.yaml"}
    program = "import sys, dskd.cli; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "typer" in done.stdout.split()
    assert not heavy & set(done.stdout.split())


@pytest.mark.parametrize("verb", ["recipes", "settings"])
def test_a_listing_imports_no_tensors(verb):
    program = f"import sys; from dskd.cli import app; app(['{verb}'], standalone_mode=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "transformers", "peft", "deepspeed"} & set(done.stdout.splitlines()[-1].split())


@login
@pytest.mark.parametrize("arguments", [("--help",), ("settings", "train"), ("recipes",)])
def test_where_torch_is_not_installed(arguments):
    found = subprocess.run([LOGIN.parent / "python", "-c", "import torch"], capture_output=True, check=False)
    assert found.returncode == 1
    shown = output_of(*arguments, program=(LOGIN,))
    assert shown.splitlines()[3:] == output_of(*arguments).splitlines()[3:]  # help begins with the program's name


@login
def test_a_mistake_in_a_run_file_is_told_where_torch_is_not_installed(tmp_path):
    (tmp_path / "run.yaml").write_text("student: 3\n")
    done = dskd("train", tmp_path / "run.yaml", program=(LOGIN,))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_seeds_are_typed_with_spaces():
    assert join_numbers(["evaluate", "m", "--seeds", "10", "20", "30", "--data", "5"]) == [
        *("evaluate", "m", "--seeds", "10,20,30", "--data", "5")
    ]
    assert join_numbers(["evaluate", "--seeds", "10 20", "7"]) == ["evaluate", "--seeds", "10 20,7"]
    assert join_numbers(["evaluate", "m", "--seeds", "--greedy", "3"]) == ["evaluate", "m", "--seeds", "--greedy", "3"]


def test_align_tells_how_many_tokens_match(tiny, tmp_path):
    folders = tiny("qwen2"), tiny("llama")
    shown = [output_of("align", *folders, "--cache-dir", tmp_path) for _ in range(2)]
    assert shown[0] == shown[1]
    counts = {line.split("match ")[1]: int(line.split()[0]) for line in shown[0].splitlines() if "match" in line}
    assert set(counts) == {"exactly", "nearly", "not at all"}
    assert counts["exactly"] > 90
    assert len(list(tmp_path.iterdir())) == 1
    assert mistake_of("align", tmp_path, folders[1]).startswith(f"dskd: TEACHER: no tokenizer loads from {tmp_path}")


@pytest.mark.parametrize(
    ("name", "own", "expected"),
    [
        ("OMP_WAIT_POLICY", None, "passive"),
        ("OMP_WAIT_POLICY", "active", "active"),
        ("THP_MEM_ALLOC_ENABLE", None, "1"),
        ("THP_MEM_ALLOC_ENABLE", "0", "0"),
    ],
)
def test_threads_wait_without_spinning_and_tensors_lie_on_huge_pages_unless_the_user_says_otherwise(
    name, own, expected
):
    program = "import os, sys; from dskd import cli; "
    program += f"cli.app = lambda **_: print(os.environ['{name}'], 'torch' in sys.modules); cli.main()"
    outside = {each: value for each, value in os.environ.items() if each != name}
    set_by_user = {} if own is None else {name: own}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=outside | set_by_user, check=True)
    assert done.stdout == f"{expected} False\n"


def test_collect_skips_what_is_no_run_and_says_so(tmp_path):
    run = tmp_path / "outputs" / "student" / "sft" / "default"
    run.mkdir(parents=True)
    (run / "run.yaml").touch()
    (tmp_path / "outputs" / "cache" / "a" / "b").mkdir(parents=True)
    found = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("outputs/*/*/*"))
    done = dskd("collect", *found, "--to", "all", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == "skipped, no run (no run.yaml in it): outputs/cache/a/b\n"


def test_settings_are_searched_by_a_word():
    lines = output_of("settings", "--search", "LoRA").splitlines()[1:]
    assert 2 <= len(lines) < 15
    assert any(line.startswith("student.lora.rank ") for line in lines)
    assert any(line.startswith("teacher.adapter ") for line in lines)
    assert mistake_of("settings", "--search", "qqq") == (
        "dskd: --search: no key has 'qqq' in its name, type, default or help"
    )
