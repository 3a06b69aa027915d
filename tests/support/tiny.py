"""Tiny real models, tokenizers and records."""

import json
import zlib
from pathlib import Path

import torch
from ruamel.yaml import YAML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from dskd.config.methods import MethodConfig

# Rows of embeddings beyond the tokenizer's: no two families are equally wide.
PADDING = {"gpt2": 5, "llama": 11, "qwen2": 24, "mistral": 8, "gemma2": 16}
CITIES = ("Paris", "Berlin", "Zürich", "Kraków", "東京", "New York", "Lima", "Москва")
ANIMALS = ("cat", "old dog", "bird", "whale 🐋", "tiny ant")
CORPUS = [
    f"Question: Where is {city}?\nAnswer: {city} lies by the sea, and the {a} sleeps."
    for city in CITIES
    for a in ANIMALS
]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Like GPT-2's: byte-level BPE; <|endoftext|> is EOS and nothing else is special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama's: BPE over text with U+2581 for spaces and byte fallback; <s> is BOS, </s> is EOS."""
    spaces = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = spaces
    ascii_corpus = [text.encode("ascii", "ignore").decode() for text in CORPUS]
    trained.train_from_iterator(ascii_corpus, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(learned["vocab"], key=learned["vocab"].get)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in learned["merges"]]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"bytes": byte_level_tokenizer, "pieces": pieces_tokenizer}


def tiny_config(family: str, tokenizer: PreTrainedTokenizerFast, tied: bool, **fields: object):
    """A configuration of hidden size 32, 2 layers, 4 heads, 128 positions."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    if family == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    else:
        shape |= {"intermediate_size": 64, "num_key_value_heads": 2}
    if family == "gemma2":
        shape |= {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 16, "final_logit_softcapping": 3.0}
        shape |= {"attn_logit_softcapping": 5.0}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    width = {"vocab_size": len(tokenizer) + PADDING[family], "initializer_range": 0.2, "tie_word_embeddings": tied}
    return CONFIG_MAPPING[family](**(shape | width | ids | fields))


class Tiny:
    """Folders of tiny models, each made on its first use in the session. Tests must not write into them."""

    families = tuple(PADDING)

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: dict[str, Path] = {}

    def __call__(self, family: str, tokenizer: str | None = None, tied: bool | None = None, **fields: object) -> Path:
        """The folder of a model with random weights (logits of about unit size, no bias or norm at its start value).

        Args:
            family: gpt2, llama, qwen2, mistral or gemma2 (soft-capped logits).
            tokenizer: "bytes" (byte-level BPE, EOS <|endoftext|>, no BOS) or "pieces" (U+2581 and byte fallback, BOS
                <s>, EOS </s>); by default gpt2 and qwen2 have the first, the others the second. qwen2 has no choice:
                transformers gives it a byte-level tokenizer, whatever is saved.
            tied: whether head and embeddings are one; by default those of gpt2 and gemma2 are.
            fields: fields of the Hugging Face configuration, such as hidden_size=64.
        """
        tokenizer = tokenizer or ("bytes" if family in ("gpt2", "qwen2") else "pieces")
        assert (family, tokenizer) != ("qwen2", "pieces")
        tied = family in ("gpt2", "gemma2") if tied is None else tied
        name = "-".join([family, tokenizer, "tied" if tied else "untied", *(f"{k}={v}" for k, v in fields.items())])
        if name not in self.made:
            self.made[name] = self.save(self.root / name, family, tokenizer, tied, fields)
        return self.made[name]

    def save(self, folder: Path, family: str, tokenizer: str, tied: bool, fields: dict[str, object]) -> Path:
        words = self.tokenizer(tokenizer)
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(folder.name.encode()))  # the same whatever was made before
            model = AutoModelForCausalLM.from_config(tiny_config(family, words, tied, **fields), dtype=torch.float32)
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        return folder

    def tokenizer(self, name: str) -> PreTrainedTokenizerFast:
        """A new copy of the tokenizer "bytes" or "pieces"."""
        return TOKENIZERS[name]()


def varied_records(count: int, start: int = 0) -> list[dict[str, object]]:
    """Records of 1 to about 60 tokens: several scripts, newlines, some with more than one answer."""
    records: list[dict[str, object]] = []
    for i in range(start, start + count):
        city, animal = CITIES[i % len(CITIES)], ANIMALS[i % len(ANIMALS)]
        answer = f"{city} lies by the sea" + f", and the {animal} sleeps" * (i % 4) + "."
        output = [answer, f"In {city}.\n"] if i % 3 == 0 else answer
        records.append({"prompt": f"Question {i}: Where is {city}?\nAnswer:", "output": output})
    return records


def write_records(file: Path, records: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return file


def write_run(tiny: Tiny, folder: Path, **sections: object) -> Path:
    """Write folder/{train.jsonl, dev.jsonl, run.yaml}; returns the run file.

    Args:
        folder: an existing folder; the run's output.root is folder/outputs.
        sections: laid over the defaults section by section, such as train={"max_steps": 2}, method={"kind": "kd"},
            student={"path": ...}, teacher=None.

    The defaults: 40 training and 10 dev records; the student a llama with the tokenizer "pieces"; the teacher a qwen2
    with "bytes", or for methods of one vocabulary a mistral with "pieces" (the same, padded to another width); method
    dskd_cma; one epoch, global batch 8 of micro-batches of 2; at most 64 tokens, 32 of them in the prompt; fp32; one
    process and no data worker.
    """
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
