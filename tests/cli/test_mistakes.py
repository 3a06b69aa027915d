"""Hundreds of commands with a mistake, as typed (mistakes.txt): code 2, one line, no traceback, and the right words.

All run in this process. Those that a model has to be loaded for are in tests/models/test_nonsense.py.
"""

import json
import shlex
import shutil
from pathlib import Path

import pytest

import dskd.start
from dskd.cli import main
from dskd.config.load import load_run, to_yaml
from dskd.plan.machine import GB

LINES = [
    line for line in (Path(__file__).parent / "mistakes.txt").read_text().splitlines() if line[:1] not in ("", "#")
]
CASES = [tuple(line.split(" => ")) for line in LINES]
RUN = """student: {path: student}
teacher: {path: teacher}
data: {train: train.jsonl, dev: dev.jsonl}
method: {kind: dskd_cma}
train: {global_batch_size: 2, micro_batch_size: 2}
launch: {processes: 1}
"""
SHAPE = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
TEXTS = {
    "run.yaml": RUN,
    "other.yaml": RUN,
    "empty.yaml": "",
    "list.yaml": "- student\n- teacher\n",
    "text.yaml": "train this\n",
    "cut.yaml": "student: {path: student\n",
    "tabs.yaml": "student:\n\tpath: student\n",
    "twice.yaml": RUN + "train: {lr: 3}\n",
    "circle.yaml": "extends: circle.yaml\n",
    "orphan.yaml": "extends: none.yaml\n",
    "extends-number.yaml": "extends: 3\n",
    "nodata.yaml": RUN.replace("data: {train: train.jsonl, dev: dev.jsonl}\n", ""),
    "nostudent.yaml": RUN.replace("student: {path: student}\n", ""),
    "nomethod.yaml": RUN.replace("method: {kind: dskd_cma}\n", ""),
    "noteacher.yaml": RUN.replace("teacher: {path: teacher}\n", ""),
    "upper.yaml": RUN.replace("\ntrain:", "\nTrain:"),
    "typo.yaml": RUN.replace("global_batch_size", "learning_rate"),
    "flat.yaml": RUN + "lr: 3\n",
    "slurm.yaml": "partition: gpu\nhours: 3\n",
    "gpus.yaml": "gpus_per_node: four\n",
    "time.yaml": "time: 24\n",
    "pipe.yaml": "stages: {first: {run: run.yaml}}\n",
    "pipe-empty.yaml": "stages: {}\n",
    "pipe-circle.yaml": "stages: {a: {run: run.yaml, student: b}, b: {run: run.yaml, student: a}}\n",
    "pipe-typo.yaml": "stages: {first: {run: run.yaml}, b: {run: run.yaml, student: frist}}\n",
    "pipe-both.yaml": "stages: {first: {run: run.yaml, evaluate: first}}\n",
    "pipe-nodata.yaml": "stages: {first: {run: run.yaml}, b: {evaluate: first}}\n",
    "pipe-nomodel.yaml": "stages: {a: {generate: {data: train.jsonl, out: texts.jsonl}}}\n",
    "pipe-notaught.yaml": "settings: [method.kind=sft, teacher=null]\nstages: {a: {run: run.yaml}, b: {analyze: a}}\n",
    "pipe-norun.yaml": "stages: {first: {run: none.yaml}}\n",
    "pipe-setting.yaml": "stages: {first: {run: run.yaml, settings: [lr=3]}}\n",
    "train.jsonl": '{"prompt": "p", "output": "o"}\n' * 4,
    "dev.jsonl": '{"prompt": "p", "output": ["o", "q"]}\n',
    "empty.jsonl": "",
    "cut.jsonl": '{"prompt": "p", "output": "o"}\n{"prompt": "p", "outp\n',
    "list.jsonl": '["p", "o"]\n',
    "noprompt.jsonl": '{"instruction": "p", "output": "o"}\n',
    "nooutput.jsonl": '{"prompt": "p", "response": "o"}\n',
    "number.jsonl": '{"prompt": 3, "output": "o"}\n',
    "numbers.jsonl": '{"prompt": "p", "output": [3]}\n',
    "noanswer.jsonl": '{"prompt": "p", "output": " "}\n',
    "table.csv": "prompt,output\np,o\np\n",
    "array.json": '[\n{"prompt": "p", "output": "o"}, {"prompt": "p", "output": ""}\n]\n',
    "chat.jsonl": '{"messages": [{"role": "user", "content": "p"}]}\n',
    "chats.jsonl": '{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "o"}]}\n'
    '{"messages": [{"role": "user", "content": "p"}, {"role": "assistant"}]}\n',
    "fake.parquet": "PAR1",
    "student/tokenizer.json": "{}",
    "adapter/adapter_config.json": "{}",
    "adapter/adapter_model.safetensors": "",
    "nothing/README.md": "a model to come\n",
    "pickled/config.json": "{}",
    "pickled/pytorch_model.bin": "",
    "broken/config.json": "[]",
    "broken/model.safetensors": "",
    "outputs/cache/a/b/map.safetensors": "",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with all that the commands name, models without weights among it."""
    root = tmp_path_factory.mktemp("mistakes")
    texts = dict(TEXTS)
    for model, positions in (("student", 1024), ("teacher", 2048), ("small", 64)):
        texts[f"{model}/config.json"] = json.dumps(SHAPE | {"max_position_embeddings": positions})
        texts[f"{model}/model.safetensors"] = "\x02\0\0\0\0\0\0\0{}"
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "pixels.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    for name in ("latin.yaml", "latin.jsonl"):
        (root / name).write_bytes('{"prompt": "Zürich", "output": "o"}\n'.encode("latin-1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run = load_run(root / "run.yaml", ["method.kind=sft", "output.name=done"])
    run.directory.mkdir(parents=True)
    (run.directory / "run.yaml").write_text(to_yaml(run))
    shutil.copytree(run.directory, root / "moved")
    return root


@pytest.fixture
def typed(inputs, monkeypatch, capfd):
    """`typed(arguments)`: exit code, and what the command wrote to stdout and stderr."""

    def taken(*arguments: object) -> None:
        raise AssertionError("the command was taken for right")

    monkeypatch.chdir(inputs)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(inputs / "hub"))
    for name in ("RANK", "WORLD_SIZE", "FORCE_COLOR", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("run_processes", "free_port"):
        monkeypatch.setattr(f"dskd.launch.ranks.{name}", taken)
    monkeypatch.setattr("dskd.plan.machine.memory_of_this_machine", lambda: 32 * GB)
    monkeypatch.setattr(dskd.start, "gpus", lambda: 1)

    def run(arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dskd", *shlex.split(arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code, *capfd.readouterr())

    return run


def test_there_are_300():
    assert len({arguments for arguments, _ in CASES}) >= 300


@pytest.mark.parametrize(("arguments", "words"), CASES, ids=[line[:70] for line in LINES])
def test_a_mistake_is_told(typed, arguments, words):
    code, out, error = typed(arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in error
    assert words in " ".join(error.split()) + " "
    if "╭─ Error" not in error:  # the form of whatever stands in the wrong place, or is missing
        (line,) = error.splitlines()
        assert line.startswith("dskd: ")
        assert len(line) < 620
