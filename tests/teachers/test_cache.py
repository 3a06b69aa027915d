"""A teacher's hidden states on disk: what is in the files, what is made and what not, and how damage is told."""

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import struct
import time
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file
from support.disks import disk_of
from support.tiny import varied_records, write_records
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd.assemble import assemble
from dskd.config.errors import UserError
from dskd.config.load import load_run, to_yaml
from dskd.data.shard import Shard
from dskd.data.tokenization import tokenize
from dskd.rundir.layout import RunDirectory
from dskd.rundir.shard import read_shard, settings_sum, write_shard
from dskd.teachers.cache import read, write
from dskd.teachers.cache.pieces import open_piece, write_piece

FORK = multiprocessing.get_context("fork")
CACHED = "teacher.backend=cache"


@pytest.fixture
def run_file(make_run, tmp_path):
    return make_run(tmp_path)


@pytest.fixture
def make(ranks, capsys):
    """`make(run file, *overrides, shard="0/1")`: write a cache; the folder, and how many records are in it and made."""

    def cache(run_file, *overrides, shard="0/1"):
        write.write_cache(load_run(run_file, list(overrides)), Shard.parse(shard), ranks)
        said = capsys.readouterr().out.splitlines()[-1]
        found = re.fullmatch(r"shard (\S+): (\d+) records, (\d+) of them .* made in .* s: (.*)", said)
        assert found[1] == shard
        return Path(found[4]), int(found[2]), int(found[3])

    return cache


def pieces(folder: Path) -> dict[str, int]:
    """Inode of each piece."""
    return {file.name: file.stat().st_ino for file in folder.glob("states-*")}


def flip(file: Path, place: int) -> None:
    """Change one bit of a file that stays where it is."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def small_pieces(monkeypatch) -> None:
    """A piece for each batch, and batches of few records."""
    monkeypatch.setattr(write, "PIECE_BYTES", 1)


def tokens_of(teacher: Path, record: dict, longest: int, longest_prompt: int) -> tuple[list[int], list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    prompt = tokenizer.encode(record["prompt"], add_special_tokens=False)[-longest_prompt:]
    output = record["output"] if isinstance(record["output"], str) else record["output"][0]
    response = [*tokenizer.encode(output, add_special_tokens=False), tokenizer.eos_token_id]
    return prompt, response[: longest - len(prompt)]


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_the_files_hold_what_transformers_gives_for_each_record_alone(family, tiny, make_run, make, tmp_path):
    """Read without this package's reader, as the README describes them."""
    teacher = tiny(family)
    run_file = make_run(tmp_path, teacher={"path": str(teacher)})
    folder, there, made = make(run_file)
    assert (there, made) == (40, 40)
    (file,) = folder.glob("states-00000-of-00001-*.safetensors")
    piece, ends = load_file(file), load_file(folder / "ends.safetensors")
    keys = {bytes(key.tolist()): i for i, key in enumerate(piece["keys"])}
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    for record in varied_records(40):
        prompt, response = tokens_of(teacher, record, 64, 32)
        ids = [len(prompt), *prompt, *response]
        row = keys.pop(hashlib.sha256(struct.pack(f"<{len(ids)}q", *ids)).digest())
        first, last = piece["offsets"][row : row + 2].tolist()
        with torch.no_grad():
            output = model(torch.tensor([prompt + response]), output_hidden_states=True)
        expected = output.hidden_states[-1][0, len(prompt) - 1 : -1]
        own = piece["states"][first:last]
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)
        assert zlib.crc32(own.numpy().tobytes()) == piece["checksums"][row]
        logits = float(ends["scale"]) * own @ ends["head.weight"].T
        if "softcap" in ends:
            logits = ends["softcap"] * torch.tanh(logits / ends["softcap"])
        expected = output.logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4, check_dtype=False)
    assert keys == {}
    ids = torch.arange(5)
    embedded = ends.get("embeddings", ends["head.weight"])[ids]
    torch.testing.assert_close(embedded, model.get_input_embeddings()(ids).detach(), atol=0, rtol=0)


def test_what_is_there_is_not_made_again(run_file, make, tmp_path):
    folder, *_ = make(run_file)
    before = pieces(folder)
    assert make(run_file) == (folder, 40, 0)
    records = varied_records(45)
    random.Random(0).shuffle(records)
    write_records(tmp_path / "train.jsonl", [records[7], *records[5:], records[7]])
    folder_now, there, made = make(run_file)
    new = sum(int(record["prompt"].split()[1][:-1]) >= 40 for record in records[5:])
    assert (folder_now, there, made) == (folder, 40, new)
    assert before.items() < pieces(folder).items()


def test_other_limits_share_the_cache(run_file, make):
    folder, *_ = make(run_file)
    assert make(run_file, "data.max_length=60") == (folder, 40, 0)  # no record is so long
    shared, there, made = make(run_file, "data.max_prompt_length=8")
    assert shared == folder
    assert 0 < made <= there == 40  # some have the same tokens now


def test_shards_divide_the_records(run_file, make, ranks):
    found = [make(run_file, shard=f"{i}/3") for i in range(3)]
    (folder,) = {folder for folder, _, _ in found}
    assert sum(there for _, there, _ in found) == sum(made for *_, made in found) == 40
    assert all(there for _, there, _ in found)
    assert make(run_file) == (folder, 40, 0)
    assert {name[:21] for name in pieces(folder)} == {f"states-{i:05}-of-00003-"[:21] for i in range(3)}
    training = assemble(load_run(run_file, [CACHED]), ranks)
    assert training.train([0, 1, 2]).states.shape[1] == 32


def test_it_tells_how_much_of_a_shard_is_made(run_file, ranks, tmp_path, monkeypatch):
    """After each piece, at the end, and where there was nothing to do."""
    small_pieces(monkeypatch)
    told, output = [], RunDirectory(tmp_path / "told")
    monkeypatch.setattr(write, "write_shard", lambda where, what: (told.append(what.made), write_shard(where, what)))
    written = tmp_path / "resolved.yaml"
    written.write_text(to_yaml(load_run(run_file)))  # as a pipeline gives it to its jobs
    write.write_cache(load_run(written), Shard(1, 2), ranks, output.path)
    found = read_shard(output)
    assert found.is_complete
    assert found.settings == settings_sum(written.read_text())
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0, found.wanted)
    assert len(set(told)) > 2
    told.clear()
    write.write_cache(load_run(written), Shard(1, 2), ranks, output.path)
    assert told == [found.wanted]


@pytest.mark.parametrize("text", ["4/4", "1", "-1/2", "a/b", "1/0", "0/1/2", ""])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(UserError, match="--shard: I/N is expected, such as 0/4 to 3/4, got "):
        Shard.parse(text)


def test_a_second_task_at_a_shard_is_refused_in_one_line(run_file, make, ranks):
    folder, *_ = make(run_file)
    ours, theirs = FORK.Pipe()

    def hold():
        with write.CacheFolder(folder).held(Shard(1, 4), print):
            theirs.send("held")
            theirs.poll(60)

    holder = FORK.Process(target=hold)
    holder.start()
    assert ours.poll(60)
    line = rf"^--shard: 1/4 of {folder} is in use by .* process {holder.pid} .*$"
    with pytest.raises(UserError, match=line):
        write.write_cache(load_run(run_file), Shard(1, 4), ranks)
    assert make(run_file, shard="2/4")[2] == 0
    ours.send("end")
    holder.join()
    assert make(run_file, shard="1/4")[2] == 0


@pytest.mark.parametrize("place", ["states", "index", "header", "cut"])
def test_a_damaged_piece_is_found_and_it_alone_made_again(place, run_file, make, ranks, monkeypatch):
    small_pieces(monkeypatch)
    folder, *_ = make(run_file)
    before = pieces(folder)
    assert len(before) > 5
    file = sorted(folder.glob("states-*"))[2]
    whole, (header,) = load(file.read_bytes()), struct.unpack("<Q", file.read_bytes()[:8])
    if place == "cut":
        os.truncate(file, file.stat().st_size - 3)
    else:
        offset = json.loads(file.read_bytes()[8 : 8 + header])["states" if place == "states" else "keys"]
        flip(file, 12 if place == "header" else 8 + header + offset["data_offsets"][0] + 5)
    run = load_run(run_file, [CACHED])
    line = rf"^teacher.backend: {file} is damaged: .*; `dskd teacher cache RUN.yaml` sets it aside .*$"
    with pytest.raises(UserError, match=line):
        assemble(run, ranks).train(range(40))
    _, there, made = make(run_file)
    assert (there, made) == (40, len(whole["keys"]))
    after = pieces(folder)
    assert {name: inode for name, inode in before.items() if name != file.name}.items() < after.items()
    assert [path.name for path in folder.glob("damaged-*")] == [f"damaged-{file.name}.1"]
    assert torch.equal(load_file(file)["states"], whole["states"])
    assert assemble(run, ranks).train(range(40)).states.isfinite().all()


def test_a_damaged_head_is_found_and_made_again(run_file, make, ranks):
    folder, *_ = make(run_file)
    ends = folder / "ends.safetensors"
    whole = ends.read_bytes()
    flip(ends, len(whole) - 1)
    with pytest.raises(UserError, match=f"{ends} is damaged: it has another checksum"):
        assemble(load_run(run_file, [CACHED]), ranks)
    assert make(run_file)[2] == 0
    assert all(torch.equal(again, load(whole)[name]) for name, again in load_file(ends).items())


def test_killed_at_any_moment_it_goes_on(run_file, make, ranks, tmp_path, monkeypatch):
    write_records(tmp_path / "train.jsonl", varied_records(400))
    small_pieces(monkeypatch)
    run, chance, found = load_run(run_file), random.Random(3), 0

    def kept():
        return len(list(tmp_path.glob("outputs/cache/teacher-*/states-*")))

    for _ in range(3):
        process = FORK.Process(target=write.write_cache, args=(run, Shard(), ranks))
        process.start()
        while process.is_alive() and kept() == found:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.join()
        assert kept() > found
        found = kept()
    folder, there, made = make(run_file)
    assert (there, made < 400) == (400, True)
    assert not list(folder.glob(".states*"))
    keys = [bytes(key.tolist()) for file in folder.glob("states-*") for key in load_file(file)["keys"]]
    assert len(keys) == len(set(keys)) == 400
    assert make(run_file)[2] == 0


def test_a_full_disk_is_one_line_and_leaves_no_half_piece(run_file, ranks, make, tmp_path):
    with disk_of("150k", tmp_path / "disk") as disk:
        place = f"data.cache_dir={disk}"
        with pytest.raises(UserError, match=rf"^data.cache_dir: cannot write {disk}.*: No space left on device$"):
            write.write_cache(load_run(run_file, [place]), Shard(), ranks)
        assert [file.name for file in disk.rglob("*states*")] == []
        assert load_file(next(disk.rglob("ends.safetensors")))
        (tmp_path / "train.jsonl").write_text("".join((tmp_path / "dev.jsonl").read_text().splitlines(True)[:4]))
        assert make(run_file, place)[2] == 4  # there is room for these


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_byte_a_value_changes_the_states_a_little_and_says_what_that_does(precision, run_file, make, ranks, capsys):
    exact, *_ = make(run_file)
    chosen = f"teacher.cache_precision={precision}"
    write.write_cache(load_run(run_file, [chosen]), Shard(), ranks)
    said = capsys.readouterr().out.splitlines()
    told = re.fullmatch(rf"{precision}: .* on (.*) tokens becomes (.*) from (.*) \((.*) relative\), KL (.*)", said[0])
    assert 0 < float(told[4]) < 1e-2
    assert 0 < float(told[5]) < 1e-2
    small = Path(said[-1].rpartition(": ")[2])
    sizes = [next(folder.glob("states-*")).stat().st_size for folder in (exact, small)]
    assert sizes[1] < 0.5 * sizes[0]
    both = [assemble(load_run(run_file, [CACHED, *more]), ranks).train(range(40)).states for more in ([], [chosen])]
    steps = both[0].abs().amax(-1, keepdim=True) / (127 if precision == "int8" else 14)
    assert 0 < ((both[1] - both[0]).abs() / steps).max() <= 0.5 + 1e-4
    flip(next(small.glob("states-*")), -1)
    assert make(run_file, chosen)[2] == 40


def test_records_whose_texts_are_known_are_not_tokenized_to_find_them(run_file, make, ranks, tmp_path, monkeypatch):
    """But for the first, which tell whether the tokenizer still cuts texts as it did."""
    make(run_file)
    write_records(tmp_path / "train.jsonl", varied_records(43))
    tokenized = []
    for module in (read, write):
        monkeypatch.setattr(module, "tokenize", lambda *given: tokenized.append(given[1]) or tokenize(*given))
    monkeypatch.setattr(read, "LOOKED_AT", 2)
    with pytest.raises(UserError, match="3 of 43 records"):
        assemble(load_run(run_file, [CACHED]), ranks)
    assert len(tokenized) == 2 + 3
    tokenized.clear()
    assert make(run_file)[1:] == (43, 3)
    assert len(tokenized) == 2 + 3 + 3  # these three once more, to run the teacher


def test_a_tokenizer_that_cuts_otherwise_is_noticed(make_run, make, ranks, tiny, tmp_path):
    teacher = shutil.copytree(tiny("gpt2"), tmp_path / "teacher")
    run_file = make_run(tmp_path, teacher={"path": str(teacher)})
    make(run_file)
    file = teacher / "tokenizer.json"
    words = json.loads(file.read_text())
    words["model"]["merges"] = words["model"]["merges"][:20]
    file.write_text(json.dumps(words))
    with pytest.raises(UserError, match="40 of 40 records"):
        assemble(load_run(run_file, [CACHED]), ranks)
    assert make(run_file)[1:] == (40, 40)
    assemble(load_run(run_file, [CACHED]), ranks)


def test_pieces_without_texts_are_read(run_file, make, ranks):
    """As an earlier version wrote them, or another program does."""
    folder, *_ = make(run_file)
    (file,) = folder.glob("states-*")
    piece = open_piece(file)
    with file.open("rb") as data:
        records = [piece.read(data.fileno(), i) for i in range(40)]
    file.unlink()
    again = write_piece(write.CacheFolder(folder), Shard(), piece.keys, records, piece.made_with)
    assert open_piece(again).texts == ()
    assert make(run_file) == (folder, 40, 0)
    assert assemble(load_run(run_file, [CACHED]), ranks).train(range(40)).states.isfinite().all()
    flip(again, -1)
    assert make(run_file)[2] == 40


def test_what_is_missing_is_told_at_the_start(run_file, make, ranks, tmp_path):
    run = load_run(run_file, [CACHED])
    with pytest.raises(UserError, match=r"^teacher.backend: there is no cache of this teacher in \S+; run: dskd teac"):
        assemble(run, ranks)
    folder, *_ = make(run_file)
    write_records(tmp_path / "train.jsonl", varied_records(52))
    line = rf"^teacher.backend: 12 of 52 records of {run.data.train} are not in the cache {folder}; run: dskd teacher "
    with pytest.raises(UserError, match=line):
        assemble(run, ranks)


def test_what_changed_is_named(run_file, make, ranks, tiny):
    folder, *_ = make(run_file)
    for change, name in (
        ("engine.precision=bf16", "precision: fp32 -> bf16"),
        ("teacher.cache_precision=int8", "cache_precision: exact -> int8"),
        (f"teacher.path={tiny('qwen2', num_hidden_layers=1)}", "teacher: config.json, teacher: model.safetensors"),
    ):
        with pytest.raises(
            UserError, match=rf"no cache of this .* \({folder.name} has another {re.escape(name)}\); run"
        ):
            assemble(load_run(run_file, [CACHED, change]), ranks)
    line = r"40 of 40 records .*, which was made with another data.max_prompt_length: 32 -> 8; run: dskd teacher cache"
    with pytest.raises(UserError, match=line):
        assemble(load_run(run_file, [CACHED, "data.max_prompt_length=8"]), ranks)


def test_a_refused_one_leaves_no_cache(run_file, make, ranks, tmp_path):
    with pytest.raises(UserError, match=r"^teacher.quantize: int8 needs a GPU"):
        make(run_file, "teacher.quantize=int8")
    assert not (tmp_path / "outputs").exists()
    (tmp_path / "outputs/cache/teacher-none").mkdir(parents=True)
    (tmp_path / "outputs/cache/teacher-none/cache.json").write_text("{}")
    with pytest.raises(UserError, match=r"there is no cache of this teacher in \S+; run: "):
        assemble(load_run(run_file, [CACHED]), ranks)


def test_a_method_without_a_teacher_has_nothing_to_keep(make_run, tmp_path, ranks):
    run = load_run(make_run(tmp_path, method={"kind": "sft"}))
    with pytest.raises(UserError, match=r"^method.kind: sft learns from no teacher"):
        write.write_cache(run, Shard(), ranks)


def test_an_empty_prompt_leaves_out_the_first_token_of_a_response(run_file, make, ranks, tmp_path):
    write_records(tmp_path / "train.jsonl", [{"prompt": "", "output": "Lima."}] * 8 + varied_records(3))
    make(run_file)
    training = assemble(load_run(run_file, [CACHED]), ranks)
    batch = training.train([0, 9])
    assert len(batch.states) == len(batch.teacher.labels)


def test_a_reader_goes_to_processes_that_are_not_forked(run_file, make, ranks):
    make(run_file)
    training = assemble(load_run(run_file, [CACHED]), ranks)
    expected = training.train([3, 4]).states
    copy = pickle.loads(pickle.dumps(training.teacher.stored))
    samples = [training.train.sample(index)[1] for index in (3, 4)]
    assert torch.equal(copy(samples), expected)
