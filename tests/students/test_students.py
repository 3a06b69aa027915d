"""A student is its model where nothing was taken away, and what is left of it is chosen by what is used."""

import json
from itertools import pairwise

import pytest
import torch
from support.forms import as_file, chatting, conversations
from support.tiny import varied_records, write_records
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from dskd.cli import main
from dskd.config.errors import UserError
from dskd.data.alignment import vocabulary_bytes
from dskd.rundir.files import damage, read_manifest
from dskd.students.make import make_student
from dskd.students.narrow import mean_inputs, smaller_model
from dskd.students.refit import RIDGE, last_linear, least_squares, outputs_at, refit
from dskd.students.shape import Shape, evenly, layers_of, sizes_of
from dskd.students.vocabulary import segment, token_sources, transplant

IDS = torch.arange(5, 45)[None]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids, use_cache=False).logits


@pytest.fixture(scope="module")
def deep(tiny):
    """Models of five layers by family, new at each call."""
    return lambda family, **fields: load(tiny(family, **({"num_hidden_layers": 5} | fields)))


@pytest.fixture
def jsonl(tmp_path):
    return write_records(tmp_path / "records.jsonl", varied_records(40))


@pytest.mark.parametrize("layers", range(2, 33))
def test_layers_are_spread_evenly_from_the_first_to_the_last(layers):
    for count in range(2, layers + 1):
        found = evenly(layers, count)
        steps = {after - before for before, after in pairwise(found)}
        assert (len(found), found[0], found[-1]) == (count, 0, layers - 1)
        assert min(steps) >= 1
        assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "mistral", "gemma2"])
def test_a_student_computes_what_its_layers_do_in_the_model(deep, family):
    model = deep(family)
    student, columns = smaller_model(model, [0, 2, 4], {}, [])
    name, layers = layers_of(model)
    if "layer_types" in model.config.to_dict():
        assert student.config.layer_types == [model.config.layer_types[index] for index in (0, 2, 4)]
    for index in (1, 3):  # what is left out gives on what it is given
        layers[index].forward = lambda hidden, *_, **__: hidden
    torch.testing.assert_close(logits(student), logits(model))
    assert columns is None
    assert student.config.num_hidden_layers == len(layers_of(student)[1]) == 3
    assert layers_of(student)[0] == name


def test_what_nothing_uses_is_what_goes(deep):
    """Heads whose values are zero and parts of the MLP whose gate is: without them the model is the same."""
    model = deep("llama", num_attention_heads=8, num_key_value_heads=4, hidden_size=32, intermediate_size=24)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            unused = slice(4 * (number % 4), 4 * (number % 4) + 4)  # another pair of heads in each layer
            layer.self_attn.v_proj.weight[unused] = 0
            layer.mlp.gate_proj.weight[number : number + 8] = 0
    sizes = sizes_of(model.config, Shape(heads=6, mlp=16))
    assert sizes == {"heads": (8, 6), "mlp": (24, 16), "key_value_heads": (4, 3)}
    student, _ = smaller_model(model, range(5), sizes, [IDS])
    assert student.model.layers[0].self_attn.k_proj.weight.shape == (12, 32)
    assert student.model.layers[0].mlp.down_proj.weight.shape == (32, 16)
    torch.testing.assert_close(logits(student), logits(model), rtol=1e-4, atol=1e-4)


def test_width_is_that_of_the_largest_inputs_in_all_layers(deep):
    model = deep("llama")
    student, columns = smaller_model(model, [0, 4], sizes_of(model.config, Shape(width=20)), [IDS])
    readers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.in_features == 32]
    readers = [name for name in readers if not name.endswith("o_proj")]
    inputs = mean_inputs(model, readers, [IDS])
    expected = sum(each / each.mean() for each in inputs.values()).topk(20).indices.sort().values
    assert columns.tolist() == expected.tolist()
    embeddings = model.get_input_embeddings().weight[:, columns]
    torch.testing.assert_close(student.get_input_embeddings().weight, embeddings)
    last = model.model.layers[4].mlp.down_proj.weight[columns]
    torch.testing.assert_close(student.model.layers[1].mlp.down_proj.weight, last)
    assert logits(student).isfinite().all()


def test_inputs_are_those_of_the_module(deep):
    model = deep("llama")
    found = mean_inputs(model, ["lm_head"], [IDS, IDS[:, :7]])["lm_head"]
    with torch.no_grad():
        states = torch.cat([model.model(ids).last_hidden_state[0] for ids in (IDS, IDS[:, :7])])
    torch.testing.assert_close(found, states.abs().mean(0))


@pytest.mark.parametrize(
    ("family", "shape", "problem"),
    [
        ("gpt2", Shape(heads=2), "--heads: no weight of the model gets shorter"),
        ("gpt2", Shape(width=16), "--width: transformer.h.0.attn.c_attn.weight is [32, 96]"),
        ("llama", Shape(heads=3), "--heads: 2 heads share a key and a value"),
        ("llama", Shape(width=33), "--width: 1 to 32 is allowed, got 33"),
        ("llama", Shape(mlp=0), "--mlp: 1 to 64 is allowed, got 0"),
        ("gpt2", Shape(mlp=8), "--mlp: the model's configuration has no number"),
    ],
)
def test_what_cannot_get_narrower(deep, family, shape, problem):
    model = deep(family)
    with pytest.raises(UserError) as error:
        smaller_model(model, range(5), sizes_of(model.config, shape), [IDS])
    assert str(error.value).startswith(problem)


def test_least_squares_with_a_ridge():
    inputs, wanted = torch.randn(50, 6), torch.randn(50, 3)
    ridge = RIDGE * inputs.square().sum(0).mean()
    more = torch.cat([inputs, ridge.sqrt() * torch.eye(6)]), torch.cat([wanted, torch.zeros(6, 3)])
    torch.testing.assert_close(least_squares(inputs, wanted), torch.linalg.lstsq(*more).solution)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_refitted_layers_come_nearer_to_the_model(deep, family):
    model = deep(family)
    rows = [torch.randint(0, 200, (1, 60), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    left = {}
    for refitted in (False, True):
        student, columns = smaller_model(model, [0, 2, 4], {}, [])
        told = refit(model, student, [0, 2, 4], columns, rows) if refitted else None
        parts = []
        with torch.no_grad():
            for row in rows:  # where layers 2 and 4 begin, and at the end
                wanted, own = outputs_at(model, [1, 3, 4], row, None), outputs_at(student, [0, 1, 2], row, None)
                ways = [(w - o) / w.norm(dim=1, keepdim=True) for w, o in zip(wanted, own, strict=True)]
                parts.append(torch.stack([way.square().sum(1) for way in ways]))
        left[refitted] = torch.cat(parts, 1).mean(1)
    assert (left[True] < 0.7 * left[False]).all()
    assert told == pytest.approx(left[True].tolist(), rel=1e-3)  # what it tells is what the student then gives


def test_a_layer_that_norms_what_it_adds_is_left_as_it_is(deep):
    model = deep("gemma2")
    student, _ = smaller_model(model, [0, 4], {}, [])
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    assert last_linear(model, layers_of(model)[1][0], IDS) is None
    assert refit(model, student, [0, 4], None, [IDS]) is None
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_mixture_of_experts_has_no_last_linear_module():
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CONFIG_MAPPING["mixtral"](vocab_size=100, num_key_value_heads=2, num_local_experts=2, **shape)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert last_linear(model, layers_of(model)[1][0], IDS) is None


def test_pieces_are_the_longest_first():
    ids = {b"a": 1, b"ab": 2, b"abc": 3, b"d": 4, b"\xc3": 5, b"\xa9": 6}
    assert segment(b"abcd", ids, 3) == [3, 4]
    assert segment(b"abab", ids, 3) == [2, 2]
    assert segment("é".encode(), ids, 3) == [5, 6]
    assert segment(b"xaz", ids, 3) == [1]
    assert segment(b"", ids, 3) == []


def test_a_token_is_the_mean_of_its_bytes_pieces(tiny):
    folder = tiny("llama", tied=False)
    old, new = tiny.tokenizer("pieces"), tiny.tokenizer("bytes")
    model, given = load(folder), load(folder)
    transplant(given, old, new)
    old_bytes, new_bytes = vocabulary_bytes(old), vocabulary_bytes(new)
    sources = token_sources(old, new)
    several = 0
    for index, ids in enumerate(sources):
        if index == new.eos_token_id:
            assert ids == [old.eos_token_id]
        elif ids:
            assert b"".join(old_bytes[i] for i in ids) == new_bytes[index]
            several += len(ids) > 1
        for ends in ("get_input_embeddings", "get_output_embeddings"):
            table = getattr(model, ends)().weight
            expected = table[ids].mean(0) if ids else table.mean(0)
            torch.testing.assert_close(getattr(given, ends)().weight[index], expected)
    assert several > 10
    assert given.config.vocab_size == len(sources) == len(new)
    assert given.config.eos_token_id == given.generation_config.eos_token_id == new.eos_token_id
    assert given.config.bos_token_id is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_its_own_vocabulary_changes_nothing(tiny, family):
    folder = tiny(family)
    tokenizer, model, given = AutoTokenizer.from_pretrained(folder), load(folder), load(folder)
    transplant(given, tokenizer, tokenizer)
    ids = torch.tensor([tokenizer.encode("Question 3: Where is Zürich?\nAnswer: In Kraków.", add_special_tokens=False)])
    kept = [index for index, source in enumerate(token_sources(tokenizer, tokenizer)) if source == [index]]
    assert len(kept) > 0.5 * len(tokenizer)  # "A" and "<0x41>" are the same bytes, of which one is used
    torch.testing.assert_close(logits(given, ids)[..., kept], logits(model, ids)[..., kept])
    one = given.get_input_embeddings().weight is given.get_output_embeddings().weight
    assert one is model.config.tie_word_embeddings


def test_a_student_is_written_whole_with_its_tokenizer(tiny, jsonl, tmp_path):
    source, folder = tiny("llama", num_hidden_layers=5), tmp_path / "student"
    made = make_student(source, folder, Shape(3, mlp=40), records=jsonl, tokenizer=tiny("gpt2"), dev=jsonl, tokens=2000)
    assert made.layers == [0, 2, 4]
    assert len(made.losses) == 3
    assert made.parameters[1] == load(folder).num_parameters()
    manifest = read_manifest(folder)
    assert "model.safetensors" in manifest
    assert all(damage(folder / name, expected) is None for name, expected in manifest.items())
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny.tokenizer("bytes").get_vocab()
    with pytest.raises(UserError, match="is there already"):
        make_student(source, folder, Shape(3))


def test_a_student_learns_from_conversations_what_it_learns_from_their_lines(tiny, tmp_path):
    chats, plain = conversations(20)
    source = chatting(tiny, "llama", tmp_path, num_hidden_layers=5)
    files = as_file(tmp_path, "json", chats), write_records(tmp_path / "plain.jsonl", plain)
    losses = [make_student(source, tmp_path / file.stem, Shape(3, mlp=40), file, dev=file).losses for file in files]
    assert losses[0][:2] == losses[1][:2]
    weights = [load(tmp_path / file.stem).state_dict() for file in files]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.parametrize(
    ("family", "other", "shape", "problem"),
    [
        ("llama", None, Shape(6), "--layers: 2 to 5 are allowed"),
        ("llama", None, Shape(1), "--layers: 2 to 5 are allowed"),
        ("llama", None, Shape(mlp=8), "--records: is needed with"),
        ("qwen2", "llama", Shape(3), "--tokenizer: transformers loads a model of this family with"),
    ],
)
def test_what_is_no_student(tiny, tmp_path, family, other, shape, problem):
    source = tiny(family, num_hidden_layers=5)
    with pytest.raises(UserError) as error:
        make_student(source, tmp_path / "out", shape, tokenizer=None if other is None else tiny(other))
    assert str(error.value).startswith(problem)
    assert not (tmp_path / "out").exists()


def test_the_verb_tells_what_it_made(tiny, jsonl, tmp_path, monkeypatch, capsys):
    source = tiny("llama", num_hidden_layers=5)
    typed = ["student", source, tmp_path / "out", "--layers", 3, "--records", jsonl, "--dev", jsonl]
    monkeypatch.setattr("sys.argv", ["dskd", *map(str, typed)])
    with pytest.raises(SystemExit) as end:
        main()
    out = capsys.readouterr().out
    assert not end.value.code
    assert "layers 0, 2, 4" in out
    assert "refitted: " in out
    assert "dev loss: model " in out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3
