"""Tiny real models and tokenizers, and runs on them.

tiny       session fixture: `tiny(family, ...)` gives the folder of a small saved model.
make_run   session fixture: `make_run(folder, **overrides)` writes records and a run file.
ranks      session fixture: the process group of one process, this one.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from ruamel.yaml import YAML
from support.tiny import Tiny, varied_records, write_records
from transformers.utils import logging as hf_logging

from dskd.config.methods import MethodConfig
from dskd.engine import distributed
from dskd.launch.ranks import free_port, rank_environment

hf_logging.disable_progress_bar()
settings.register_profile("untimed", deadline=None)  # machines are noisy
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """`tiny(family, tokenizer=None, tied=None, **config fields)`: the folder of a tiny real model; see `Tiny`."""
    return Tiny(tmp_path_factory.mktemp("tiny"))


MakeRun = Callable[..., Path]


@pytest.fixture(scope="session")
def make_run(tiny: Tiny) -> MakeRun:
    """`make_run(folder, **sections)` writes folder/{train.jsonl, dev.jsonl, run.yaml} and returns the run file.

    Args:
        folder: an existing folder; the run's output.root is folder/outputs.
        sections: laid over the defaults section by section, such as train={"max_steps": 2}, method={"kind": "kd"},
            student={"path": ...}, teacher=None.

    The defaults: 40 training and 10 dev records; the student a llama with the tokenizer "pieces"; the teacher a qwen2
    with "bytes", or for methods of one vocabulary a mistral with "pieces" (the same, padded to another width); method
    dskd_cma; one epoch, global batch 8 of micro-batches of 2; at most 64 tokens, 32 of them in the prompt; fp32; one
    process and no data worker.
    """

    def make(folder: Path, **sections: object) -> Path:
        write_records(folder / "train.jsonl", varied_records(40))
        write_records(folder / "dev.jsonl", varied_records(10, start=100))
        method = sections.get("method")
        kind = method.get("kind", "dskd_cma") if isinstance(method, dict) else "dskd_cma"
        config = MethodConfig.kinds.get(kind)  # a test may make one up
        one_vocabulary = config is not None and config.teacher == "same_vocabulary"
        values: dict[str, object] = {
            "student": {"path": str(tiny("llama"))},
            "teacher": {"path": str(tiny("mistral" if one_vocabulary else "qwen2"))},
            "data": {
                "train": str(folder / "train.jsonl"),
                "dev": str(folder / "dev.jsonl"),
                "max_length": 64,
                "max_prompt_length": 32,
                "workers": 0,
            },
            "method": {"kind": kind},
            "train": {"epochs": 1, "global_batch_size": 8, "micro_batch_size": 2},
            "engine": {"precision": "fp32"},
            "launch": {"processes": 1},
            "output": {"root": str(folder / "outputs")},
        }
        for name, section in sections.items():
            base = values.get(name)
            values[name] = base | section if isinstance(base, dict) and isinstance(section, dict) else section
        file = folder / "run.yaml"
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.dump(json.loads(json.dumps(values, default=str)), file)
        return file

    return make


@pytest.fixture(scope="session")
def ranks() -> Iterator[distributed.Ranks]:
    """The process group of a run on one process, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in rank_environment(0, 1, free_port()).items():
            patch.setenv(name, value)
        yield distributed.start()
        distributed.stop()
