"""Distances to the teacher: against plain numpy on what transformers gives, and through the command line."""

import json

import numpy as np
import pytest
import torch
from support.forms import as_file, chatting, conversations
from support.tiny import write_records
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd.analyze import Task, analyze, check, structure_distances
from dskd.cli import main
from dskd.config.errors import UserError
from dskd.config.load import load_run
from dskd.config.models import TeacherConfig
from dskd.data.records import read_records
from dskd.data.tokenization import Limits, tokenize
from dskd.report.write import write_report
from dskd.rundir.analysis import read_analysis
from dskd.rundir.layout import ModelName, RunDirectory

CPU = torch.device("cpu")
LIMITS = Limits(64, 32)


def outputs(folder, sample):
    """Hidden states [N, D] and logits [N, V] at the places that predict a response token, by transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.from_numpy(np.concatenate([sample.prompt, sample.response]))[None]
    with torch.no_grad():
        found = model(input_ids=ids, output_hidden_states=True)
    rows = slice(len(sample.prompt) - 1, ids.shape[1] - 1)
    return found.hidden_states[-1][0, rows].double().numpy(), found.logits[0, rows].double().numpy()


def structures(hidden):
    """Cosines, and inner products in shares of their row, one pair of tokens at a time."""
    count = len(hidden)
    products = np.array([[hidden[i] @ hidden[j] for j in range(count)] for i in range(count)])
    lengths = np.sqrt(np.diag(products))
    return products / np.outer(lengths, lengths), products / products.sum(1)[:, None]


def log_softmax(logits):
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


@pytest.fixture
def records(make_run, tmp_path):
    make_run(tmp_path)
    return tmp_path / "dev.jsonl"


def test_all_measures_are_those_of_numpy_where_the_vocabulary_is_one(tiny, records):
    teacher, student = tiny("mistral"), tiny("llama")
    found = analyze(Task(TeacherConfig(teacher), student, teacher, records, LIMITS, 4), "fp32", CPU, lambda *_: None)
    tokenizer, expected, tokens = AutoTokenizer.from_pretrained(student), [], 0
    for record in read_records(records)[:4]:
        sample = tokenize(tokenizer, record, LIMITS)
        (own, own_logits), (target, target_logits) = outputs(student, sample), outputs(teacher, sample)
        (cosine, inner), (teacher_cosine, teacher_inner) = structures(own), structures(target)
        width = min(own_logits.shape[1], target_logits.shape[1])
        p, q = log_softmax(own_logits[:, :width]), log_softmax(target_logits[:, :width])
        middle = np.log((np.exp(p) + np.exp(q)) / 2)
        js = ((np.exp(p) * (p - middle)).sum(1) + (np.exp(q) * (q - middle)).sum(1)) / 2
        distances = abs(cosine - teacher_cosine).mean(), abs(inner - teacher_inner).sum(1).mean()
        expected.append([*distances, (np.exp(q) * (q - p)).sum(1).mean(), js.mean()])
        tokens += len(sample.response)
    measures = list(found.after.measures().values())
    assert [m.mean for m in measures] == pytest.approx(np.mean(expected, 0).tolist(), rel=1e-3)
    assert [m.middle for m in measures] == pytest.approx(np.median(expected, 0).tolist(), rel=1e-3)
    assert [m.low for m in measures] == pytest.approx(np.quantile(expected, 0.25, 0).tolist(), rel=1e-3)
    assert (found.records, found.tokens, found.aligned) == (4, tokens, False)
    assert [m.mean for m in found.before.measures().values()] == pytest.approx([0] * 4, abs=1e-5)  # itself


def test_conversations_are_compared_as_their_lines(tiny, tmp_path):
    chats, plain = conversations(3)
    student = chatting(tiny, "llama", tmp_path)
    files = as_file(tmp_path, "json", chats), write_records(tmp_path / "plain.jsonl", plain)
    found = []
    for file in files:
        task = Task(TeacherConfig(tiny("mistral")), student, None, file, LIMITS, 4)
        check(task)
        found.append(analyze(task, "fp32", CPU, lambda *_: None))
    assert found[0].after == found[1].after
    assert (found[0].records, found[0].tokens) == (3, found[1].tokens)


def test_a_structure_does_not_see_turns_of_the_space_and_knows_other_widths():
    states = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)) + 1
    turn = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(2)))[0][:5]
    assert structure_distances(states @ turn, states)["cosine"] == pytest.approx(0, abs=1e-5)
    assert structure_distances(3 * states @ turn, states)["inner_product"] == pytest.approx(0, abs=1e-4)
    assert structure_distances(states.flip(0), states)["cosine"] > 0.05


def test_two_vocabularies_are_compared_on_aligned_tokens_by_the_command(tiny, make_run, tmp_path, monkeypatch, capsys):
    run = load_run(make_run(tmp_path))
    place = RunDirectory.of(run)
    place.path.mkdir(parents=True)
    place.settings.write_text((tmp_path / "run.yaml").read_text())
    place.model(ModelName(1, 5, 2.0)).symlink_to(tiny("llama", hidden_size=64))
    place.best.symlink_to(str(ModelName(1, 5, 2.0)))
    monkeypatch.setattr("sys.argv", ["dskd", "analyze", str(place.path), "--records", "6", "--precision", "fp32"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "aligned tokens of 6 records" in capsys.readouterr().out
    found = read_analysis(place.path)
    assert (found.records, found.aligned, found.before.model) == (6, True, str(tiny("llama")))
    assert found.after.forward_kl is None
    assert 0 < found.after.cosine.mean != found.before.cosine.mean
    page, text = write_report([place.path], tmp_path / "report.html", None, None)
    html = page.read_text()
    assert f"{found.before.cosine.mean:.4f} → {found.after.cosine.mean:.4f}" in html
    assert [html.count(f'class="range f{style}"') for style in (34, 0)] == [2, 2]  # before and after, two measures
    assert "## Nearness to the teacher" in text.read_text()


def test_what_is_missing_is_told(tiny, records, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dskd.cli.leave", lambda code: None)
    for arguments, words in (
        ([], "--teacher: "),
        (["--teacher", tiny("mistral")], "--data: "),
        (["--teacher", tiny("mistral"), "--data", "none.jsonl"], "none.jsonl"),
        (["--teacher", tiny("mistral"), "--data", records], "--max-length: 512 is more than the 128 positions"),
    ):
        monkeypatch.setattr("sys.argv", ["dskd", "analyze", str(tiny("llama")), *map(str, arguments)])
        main()
        error = capsys.readouterr().err
        assert words in error
        assert len(error.splitlines()) == 1
    (tmp_path / "analysis.json").write_text(json.dumps({"teacher": 3}))
    with pytest.raises(UserError, match="is damaged: no analysis"):
        read_analysis(tmp_path)
