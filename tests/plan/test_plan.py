"""What a plan says: memory by backend, nodes, what to change, in one screen and in one line."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.published import QWEN_1_5B, QWEN_72B

from dskd.config.load import load_run
from dskd.config.recipes import recipes_folder
from dskd.config.run import RunConfig
from dskd.plan.advice import Verdict, judge, smaller_micro_batches, verdict_line
from dskd.plan.forecast import Forecast
from dskd.plan.machine import GB, Machine, assumed_machine
from dskd.plan.memory import phases
from dskd.plan.models import read_models
from dskd.plan.table import flops_told, show_plan
from dskd.plan.workload import workload_of

RUN = """
student: {path: Qwen2.5-1.5B}
teacher: {path: Qwen2.5-72B}
data: {train: train.jsonl, dev: train.jsonl}
method: {kind: dskd}
train: {epochs: 20, global_batch_size: 64, micro_batch_size: 8}
engine: {zero_stage: 1}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A run of 72B -> 1.5B of which only the configurations are there."""
    for name, config in (("Qwen2.5-72B", QWEN_72B), ("Qwen2.5-1.5B", QWEN_1_5B)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(*overrides: str, nodes: int = 1, memory: float = 80) -> Verdict:
    run = load_run(Path("run.yaml"), overrides)
    return judge(run, machine(run, nodes, memory), read_models(run))


def machine(run: RunConfig, nodes: int = 1, memory: float = 80) -> Machine:
    return replace(assumed_machine(run), nodes=nodes, memory=round(memory * GB))


def by_backend(found: Verdict) -> dict[str, Forecast]:
    return {forecast.backend: forecast for forecast in found.forecasts}


def test_a_plan_of_72b_needs_configurations_alone_and_no_torch(folder):
    program = (
        "import sys; sys.modules |= {'torch': None, 'numpy': None, 'transformers': None, 'safetensors': None};"
        " from dskd.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program, "plan", "run.yaml"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) < 24
    rows = {line.split()[0].rstrip("*"): line for line in lines if line.strip()}
    assert rows["resident"].split()[-1] == "none"  # on no number of nodes
    assert rows["cache"].split()[-1] == "1"
    assert "does not fit: " in done.stdout
    assert lines[-2] == "best: teacher.backend=cache"


def test_a_teacher_of_72b(folder):
    made = by_backend(planned())
    weights = 2 * 72_706_203_648
    assert made["resident"].memory.teacher == pytest.approx(weights, rel=0.01)
    assert not made["resident"].fits
    # A part of it on each of 8 ranks, and the head whole.
    assert weights / 8 < made["sharded"].memory.teacher < weights / 8 + 5 * GB
    head = 2 * 152064 * 8192
    assert made["cache"].memory.teacher == head
    assert made["cache"].making > weights / 8
    # Hidden states of 16.4 kB a token, and both ends.
    tokens = made["cache"].models.workload.response_tokens
    assert made["cache"].cache_bytes == tokens * 16384 + 2 * head
    # Twenty epochs with the teacher, or one.
    assert 4 < made["resident"].hours / made["cache"].hours < 20


def test_more_nodes_hold_less_each(folder):
    def sharded(nodes: int) -> Forecast:
        return by_backend(planned("train.micro_batch_size=1", nodes=nodes, memory=32))["sharded"]

    needed = sharded(1).nodes_needed
    assert needed is not None
    assert needed > 1
    assert [sharded(nodes).fits for nodes in (1, needed // 2, needed)] == [False, False, True]


def test_the_advice_fits_and_says_what_to_change(folder):
    plan = planned("engine.zero_stage=0", memory=28)
    assert plan.advice is not None
    assert plan.advice.forecast.fits
    changed = planned("engine.zero_stage=0", *plan.advice.changes, memory=28)
    assert changed.asked.fits
    assert verdict_line(changed).startswith("fits: ")
    assert changed.asked.memory == plan.advice.forecast.memory
    assert verdict_line(plan).startswith("does not fit: ")
    assert " ".join(plan.advice.changes) in verdict_line(plan)


def test_where_nothing_helps_that_is_said(folder):
    plan = planned(memory=4)
    assert plan.advice is None
    assert verdict_line(plan).endswith("nothing that fits was found on up to 64 nodes")


def test_a_batch_that_does_not_divide_is_told(folder):
    plan = planned("teacher.backend=cache", "train.global_batch_size=60", "train.micro_batch_size=5")
    assert not plan.asked.fits
    assert "train.global_batch_size=60 does not divide over 8 ranks" in verdict_line(plan)


def test_micro_batches_of_so_many_tokens_are_counted_and_halved(folder):
    """Records of 512 tokens: eight of them are 4,096."""
    records, tokens = (planned(f"train.micro_batch_{key}") for key in ("size=8", "tokens=4096"))
    assert tokens.asked.step == records.asked.step
    assert tokens.asked.hours == records.asked.hours
    assert planned("train.micro_batch_tokens=4096", "train.global_batch_size=60").asked.divides is False
    tried = smaller_micro_batches(tokens.asked.run)
    assert [train.micro_batch_tokens for train in tried] == [4096, 2048, 1024, 512]


@pytest.mark.parametrize(
    ("override", "phase", "part"),
    [
        ("engine.zero_stage=2", "update", "optimizer"),
        ("engine.zero_stage=3", "update", "weights"),
        ("engine.offload=optimizer", "update", "optimizer"),
        ("engine.gradient_checkpointing=true", "loss", "activations"),
        ("train.micro_batch_size=4", "loss", "activations"),
        ("train.micro_batch_tokens=2048", "loss", "activations"),
        ("engine.loss_memory_mb=64", "loss", "loss"),
        ("student.lora={}", "update", "optimizer"),
        ("method.projectors_only=true", "update", "optimizer"),
    ],
)
def test_what_takes_memory_from_a_part(folder, override, phase, part):
    base = "engine.zero_stage=0" if "zero_stage" in override else "engine.zero_stage=1"
    before, after = (phases(planned(base, *more).asked.step)[phase] for more in ((), (override,)))
    assert getattr(after, part) < getattr(before, part)


def test_the_length_of_records_is_estimated_from_their_characters(folder):
    record = {"prompt": "p" * 400, "output": "o" * 2000}
    (folder / "train.jsonl").write_text(f"{json.dumps(record)}\n" * 6000)
    found = workload_of(load_run(Path("run.yaml")))
    assert (found.records, found.steps, found.longest) == (6000, 20 * (6000 // 64), 512)
    assert found.response_tokens == 6000 * (512 - 101)
    (folder / "train.jsonl").write_text('{"prompt": "p"}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl:1: a record"):
        workload_of(load_run(Path("run.yaml")))


def test_a_student_alone_has_one_row(folder):
    plan = planned("method={kind: sft}", "teacher=null")
    (only,) = plan.forecasts
    assert only.memory.teacher == 0
    assert "teacher" not in verdict_line(plan)


def test_copies_are_of_a_node_s_part_of_the_state_and_of_the_model(folder, capsys):
    one, two = (planned("engine.zero_stage=2", nodes=nodes).asked for nodes in (1, 2))
    student = one.step.student.weights
    assert one.copies == 12 * one.step.trained + 2 * student
    assert two.copies == 6 * two.step.trained + 2 * student
    show_plan(planned())
    assert f"copies in {one.copies / 1e9:.1f} GB of a node's memory" in capsys.readouterr().out


def test_the_table_in_readme_is_what_it_prints(folder, monkeypatch, capsys):
    """From configurations in the hub's cache alone."""
    shown = (Path(__file__).parents[2] / "README.md").read_text().split("$ dskd plan ")[1].partition("```")[0]
    command, *lines = shown.splitlines()
    run_file, *overrides = shlex.split(command)
    for name in ("Qwen2.5-72B", "Qwen2.5-1.5B"):
        model = folder / f"hub/models--Qwen--{name}"
        for below in ("refs", "snapshots"):
            (model / below).mkdir(parents=True)
        (model / "refs/main").write_text("abc")
        (folder / name).rename(model / "snapshots/abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "hub"))
    run = load_run(recipes_folder().parent / run_file, overrides)
    show_plan(judge(run, assumed_machine(run), read_models(run)))
    printed = iter(capsys.readouterr().out.splitlines())
    for line in lines:
        assert line == "..." or line in printed, line  # in this order


def test_work_is_that_of_the_matrix_products(folder):
    made = by_backend(planned())
    tokens = 20 * made["cache"].models.workload.padded_tokens
    bodies = [2 * forecast.body_weights for forecast in (made["cache"].models.teacher, made["cache"].models.student)]
    least = tokens * (bodies[0] + 3 * bodies[1])
    assert least < made["resident"].flops < 1.2 * least
    assert made["sharded"].flops == made["resident"].flops
    assert made["resident"].flops - made["cache"].flops == pytest.approx(19 / 20 * tokens * bodies[0], rel=0.05)


@pytest.mark.parametrize(
    ("flops", "text"), [(3.4e18, "3.4 EFLOP"), (9.99e14, "999.0 TFLOP"), (1e15, "1.0 PFLOP"), (5e6, "0.0 GFLOP")]
)
def test_work_is_told_in_a_fitting_unit(flops, text):
    assert flops_told(flops) == text


def test_records_that_are_no_file_are_told(folder):
    (folder / "train.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"train\.jsonl: cannot be read: Is a directory"):
        planned()
