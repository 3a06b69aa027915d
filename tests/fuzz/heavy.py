"""What needs torch and its neighbours to be read: models, tokenizers, adapters, projectors, states, vocabulary maps."""

import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors import SafetensorError
from safetensors.torch import save_file
from support.tiny import Tiny

from dskd.checkpoint.shards import NOTES, WEIGHT, PieceReader
from dskd.config.errors import UserError
from dskd.data.shard import Shard
from dskd.data.vocabulary_map import VocabularyMap, load, save
from dskd.models.load import load_causal_lm, load_checkpoint, load_projectors, load_tokenizer, merge_adapter
from dskd.models.views import ModelView
from dskd.teachers.cache.ends import read_ends, tensors_of, write_ends
from dskd.teachers.cache.folder import CacheFolder
from dskd.teachers.cache.pieces import damage, open_piece, write_piece
from dskd.teachers.cache.precision import encode
from fuzz.forms import form_targets
from fuzz.mutations import Mutate, of_bytes, of_json, of_safetensors
from fuzz.run import Target

HASHES = ("a" * 64, "b" * 64)
CPU = torch.device("cpu")


def heavy_targets(folder: Path) -> list[Target]:
    """Targets that work in `folder`, on tiny models."""
    tiny = Tiny(folder / "tiny")
    llama, gpt2 = (Path(shutil.copytree(tiny(family), folder / family)) for family in ("llama", "gpt2"))
    adapter = made_adapter(llama, folder / "adapter")
    method = torch.nn.ModuleDict({"s2t": torch.nn.Linear(4, 6), "t2s": torch.nn.Linear(6, 4)})
    projectors, state, maps = (folder / name for name in ("projectors.safetensors", "rank0.safetensors", "map.npz"))
    save_file(dict(method.state_dict()), projectors)
    save_file({f"{WEIGHT}:a": torch.ones(6)}, state, {NOTES: json.dumps({"pieces": {"a": [0, 6, 3]}})})
    cache, piece = made_cache(gpt2, folder / "cache")
    save(maps, VocabularyMap(np.array([0, 1, -1], np.int32), np.array([0, 2, -1], np.int16), *HASHES))

    def into(file: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
        """Read with a file changed, which is put back afterwards."""
        whole = file.read_bytes()

        def changed(content: bytes) -> object:
            file.write_bytes(content)
            try:
                return read()
            finally:
                file.write_bytes(whole)

        return changed

    def target(name: str, file: Path, mutate: Mutate, read: Callable[[], object], refusal: Any = UserError) -> Target:
        return Target(name, [file.read_bytes()], mutate, into(file, read), refusal)

    def merged() -> object:
        return merge_adapter(load_causal_lm(llama, "teacher.path", "fp32", False), adapter, "teacher.adapter")

    return [
        *(
            target(
                f"{base.name} {name}", base / f"{name}.json", of_json, partial(load_causal_lm, base, "k", "fp32", False)
            )
            for base in (llama, gpt2)
            for name in ("config", "generation_config")
        ),
        target(
            "weights", llama / "model.safetensors", of_safetensors, lambda: load_causal_lm(llama, "k", "fp32", False)
        ),
        target("tokenizer.json", llama / "tokenizer.json", of_json, lambda: load_tokenizer(llama, "k")),
        target("tokenizer_config", llama / "tokenizer_config.json", of_json, lambda: load_tokenizer(llama, "k")),
        target("adapter", adapter / "adapter_config.json", of_json, merged),
        target(
            "saved adapter", adapter / "adapter_config.json", of_json, lambda: load_checkpoint(adapter, "fp32", CPU)
        ),
        target("adapter weights", adapter / "adapter_model.safetensors", of_safetensors, merged),
        target("projectors", projectors, of_safetensors, lambda: load_projectors(method, projectors.parent)),
        target("state file", state, of_safetensors, lambda: read_pieces(state)),
        target("teacher cache: states", piece, of_safetensors, lambda: damage(open_piece(piece))),
        target("teacher cache: ends", cache.ends, of_safetensors, lambda: read_ends(cache.ends, torch.float32)),
        target("vocabulary map", maps, of_arrays, lambda: load(maps, HASHES), ValueError),
        *form_targets(folder),
    ]


def read_pieces(file: Path) -> None:
    """As `dskd.checkpoint.state.load` does it."""
    try:
        with PieceReader([file]) as saved:
            for name in saved.table:
                saved.step(name)
                saved.read(WEIGHT, name, 0, 6)
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{file}: the state does not fit this run: {error}") from None


def of_arrays(random: Random, data: bytes) -> bytes:
    """One of a map's arrays has other values, another type or shape, or is missing."""
    try:
        with np.load(io.BytesIO(data)) as whole:
            arrays = dict(whole)
    except (ValueError, OSError, BadZipFile):
        arrays = {}
    if not arrays or random.random() < 0.4:
        return of_bytes(random, data)
    name = random.choice(list(arrays))
    others = (
        np.arange(3),
        np.zeros((2, 2)),
        np.array("x"),
        np.array(["a", "b", "c"]),
        np.array([]),
        arrays[name].astype(str),
    )
    arrays[name] = random.choice(others)
    if random.random() < 0.2:
        del arrays[name]
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def made_cache(base: Path, path: Path) -> tuple[CacheFolder, Path]:
    """A teacher's cache of two records, and its piece."""
    path.mkdir()
    folder = CacheFolder(path)
    view = ModelView(load_causal_lm(base, "teacher.path", "fp32", False), "teacher.path")
    write_ends(folder.ends, tensors_of(view.ends))
    records = [encode(torch.ones(count, 32), "int8") for count in (3, 2)]
    return folder, write_piece(folder, Shard(), [b"a" * 32, b"b" * 32], records, {"data.bos": False})


def made_adapter(base: Path, folder: Path) -> Path:
    model = load_causal_lm(base, "teacher.path", "fp32", False)
    settings = PeftLoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        get_peft_model(model, settings).save_pretrained(folder)
    return folder
