"""Two steps of the real engine against AdamW's formula, on the gradient that autograd gives for the dense loss.

What the engine did is read from its saved pieces: the fp32 weights and both moments after each step. Nothing here is
compared with another run of the same code, so that a mistake which all ranks and stages share is seen as well.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.dense import dense_loss
from support.heads import Weights
from support.two_steps import two_steps
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from dskd.assemble import assemble
from dskd.config.load import load_run
from dskd.launch.ranks import free_port, rank_environment
from dskd.losses.tensors import Tokens

WORKER = Path(__file__).parents[1] / "support" / "two_steps.py"
LR, PROJECTOR_LR, DECAY = 1e-3, 4e-3, 0.5
RATE_OF_STEP = {1: 1.0, 2: 0.75}  # a linear way down over four steps
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
KD_RATE = 0.3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    stage: int
    precision: str
    ranks: int
    clip: float = 0.01
    """Far below the norm of any gradient here."""
    kind: str = "dskd"

    @property
    def name(self) -> str:
        return f"{self.kind}-zero{self.stage}-{self.precision}-{self.ranks}-clip{self.clip:g}"


UNDER_THE_CLIP, NO_CLIP = 1e4, 0.0
CASES = [
    *(Case(stage, precision, ranks) for ranks in (1, 2) for stage in range(4) for precision in ("fp32", "bf16")),
    *(Case(stage, "fp32", 1, clip) for stage in (0, 2) for clip in (UNDER_THE_CLIP, NO_CLIP)),
    *(Case(stage, "fp32", ranks, kind="sft") for stage, ranks in ((0, 1), (3, 1), (2, 2))),
    Case(0, "fp32", 1, kind="kd"),
]
NAMES = [case.name for case in CASES]


def run_of(case: Case, make_run, tiny, folder: Path) -> Path:
    """The run file of a case. The student has biases, norms and a tied head; nothing is dropped out."""
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    folder.mkdir(parents=True)
    return make_run(
        folder,
        student={"path": tiny("gpt2", "pieces", **still)},
        teacher={"path": tiny("mistral", hidden_size=48)},
        method={"kind": case.kind} | ({} if case.kind == "sft" else {"kd_rate": KD_RATE}),
        train={
            "max_steps": 4,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "schedule": "linear",
            "lr": LR,
            "projector_lr": PROJECTOR_LR,
            "weight_decay": DECAY,
            "clip": case.clip,
        },
        engine={"precision": case.precision, "zero_stage": case.stage, "persistence_threshold": 0},
    )


def run_two_ranks(root: Path) -> None:
    port = free_port()
    ranks = [
        subprocess.Popen([sys.executable, str(WORKER), str(root)], env=os.environ | rank_environment(rank, 2, port))
        for rank in range(2)
    ]
    assert [rank.wait(300) for rank in ranks] == [0, 0]


@pytest.fixture(scope="module")
def two_ranks(make_run, tiny, tmp_path_factory) -> Path:
    """A folder in which a pair of processes has run all that is for two ranks."""
    root = tmp_path_factory.mktemp("two")
    for case in CASES:
        if case.ranks == 2:
            run_of(case, make_run, tiny, root / "steps" / case.name)
    student = tiny("gpt2", "pieces", resid_pdrop=0.5, embd_pdrop=0.0, attn_pdrop=0.0)
    for name, seed in (("start", 1), ("again", 1), ("other", 100)):
        (root / "dropout" / name).mkdir(parents=True)
        make_run(root / "dropout" / name, student={"path": student}, method={"kind": "sft"}, train={"seed": seed})
    run_two_ranks(root)
    return root


class Engine:
    """What the engine left of two steps."""

    def __init__(self, case: Case, file: Path) -> None:
        self.case, self.file = case, file
        self.run = load_run(file)

    def saved(self, key: str, step: int) -> dict[str, Tensor]:
        """A parameter's "weight", "exp_avg" or "exp_avg_sq" after a step, flat, by name: put together of all ranks."""
        found: dict[str, list[tuple[int, Tensor]]] = {}
        for rank in range(self.case.ranks):
            with safe_open(self.file.with_name(f"pieces{step}.rank{rank}"), "pt") as pieces:
                for name, (start, _, _) in json.loads(pieces.metadata()["notes"])["pieces"].items():
                    found.setdefault(name, []).append((start, pieces.get_tensor(f"{key}:{name}")))
        return {
            name: torch.cat([part for _, part in sorted(parts, key=lambda p: p[0])]) for name, parts in found.items()
        }

    def steps(self, step: int) -> set[int]:
        """How many steps the optimizer has counted for its parameters, after a step."""
        found = set()
        for rank in range(self.case.ranks):
            with safe_open(self.file.with_name(f"pieces{step}.rank{rank}"), "pt") as pieces:
                found |= {count for _, _, count in json.loads(pieces.metadata()["notes"])["pieces"].values()}
        return found

    def held(self, step: int, rank: int) -> dict[str, Tensor]:
        """The weights with which a rank computes, after a step."""
        return load_file(self.file.with_name(f"weights{step}.rank{rank}"))

    def figures(self, step: int, rank: int = 0) -> dict[str, float]:
        return json.loads(self.file.with_name(f"figures{step}.rank{rank}").read_text())

    def gradient(self, step: int) -> dict[str, Tensor]:
        """What AdamW was given: m = beta1 m + (1 - beta1) g."""
        now = self.saved("exp_avg", step)
        before = self.saved("exp_avg", step - 1) if step > 1 else {name: torch.zeros(()) for name in now}
        return {name: (m.double() - BETA1 * before[name].double()) / (1 - BETA1) for name, m in now.items()}


@pytest.fixture(scope="module")
def engine_of(make_run, tiny, ranks, tmp_path_factory, request):
    """`engine_of(name)`: what the engine left in a case; each is run once."""
    root, done = tmp_path_factory.mktemp("one"), {}

    def run(name: str) -> Engine:
        case = next(case for case in CASES if case.name == name)
        if name not in done and case.ranks == 2:
            done[name] = Engine(case, request.getfixturevalue("two_ranks") / "steps" / name / "run.yaml")
        elif name not in done:
            file = run_of(case, make_run, tiny, root / name)
            two_steps(file, ranks)
            done[name] = Engine(case, file)
        return done[name]

    return run


@pytest.fixture(scope="module")
def batches(make_run, tiny, ranks, tmp_path_factory):
    """The whole global batch of steps 1 and 2, as one batch. It is the same in all cases."""
    file = run_of(Case(0, "fp32", 1), make_run, tiny, tmp_path_factory.mktemp("data") / "run")
    training = assemble(load_run(file), ranks)
    return {step: training.train(training.plan.global_batch(step - 1)) for step in (1, 2)}


def dense_gradient(engine: Engine, step: int, batch: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of a step by name, flat, from a dense loss of models of our own in fp32.

    The weights are those that the engine held before the step.
    """
    run, weights = engine.run, engine.held(step - 1, 0)
    student = AutoModelForCausalLM.from_pretrained(run.student.path, dtype=torch.float32).eval()
    named = {f"student.{name}": p for name, p in student.named_parameters()}
    projectors: dict[str, Any] = {}
    if engine.case.kind == "dskd":
        for name in ("t2s", "s2t"):
            projectors[name] = nn.Linear(*reversed(weights[f"method.{name}.weight"].shape))
            named |= {f"method.{name}.{part}": p for part, p in projectors[name].named_parameters()}
    assert named.keys() == weights.keys()
    for name, parameter in named.items():
        parameter.data.copy_(weights[name])
    side = batch.student
    if engine.case.kind == "sft":
        logits = student(input_ids=side.input_ids, attention_mask=side.attention_mask).logits
        loss = cross_entropy(logits.flatten(0, 1)[side.positions], side.labels)
    else:
        loss = distillation_loss(run, student, projectors, side, batch.teacher)
    loss.backward()
    return float(loss.detach()), {name: p.grad.double().flatten() for name, p in named.items()}


def distillation_loss(run: Any, student: Any, projectors: dict[str, Any], side: Any, teacher_side: Any) -> Tensor:
    """Of kd and dskd, arXiv 2406.17328, equations 2 and 3 to 6, as means over all response tokens."""
    dtype = DTYPES[run.engine.precision]
    teacher = AutoModelForCausalLM.from_pretrained(run.teacher.path, dtype=dtype).float().eval()
    with torch.no_grad():
        teacher_tokens = tokens_of(teacher, teacher_side)
    ends = [
        Weights(m.get_input_embeddings().weight.detach(), m.get_output_embeddings().weight) for m in (student, teacher)
    ]
    method = SimpleNamespace(settings=run.method, **projectors)
    parts = dense_loss(method, *ends, tokens_of(student, side), teacher_tokens)
    means = {name: value / len(side.labels) for name, (value, _) in parts.items()}
    assert set(means) == {"ce", *({"kd"} if run.method.kind == "kd" else {"t2s_ce", "t2s_kd", "s2t_kd"})}
    return (1 - KD_RATE) * means.pop("ce") + KD_RATE * sum(means.values())


def tokens_of(model: Any, side: Any) -> Tokens:
    states = model.base_model(input_ids=side.input_ids, attention_mask=side.attention_mask).last_hidden_state
    return Tokens(states.flatten(0, 1)[side.positions], side.inputs, side.labels, side.lengths)


def norm_of(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))


def rates(name: str) -> tuple[float, float]:
    """Learning rate and weight decay that a parameter is to have, by its name."""
    lr = PROJECTOR_LR if name.startswith("method.") else LR
    return lr, 0.0 if name.endswith(".bias") or ".ln_" in name else DECAY


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_the_dense_loss_clipped_by_its_norm(name, step, engine_of, batches):
    engine = engine_of(name)
    loss, expected = dense_gradient(engine, step, batches[step])
    figures, norm = engine.figures(step), norm_of(expected)
    exact, clip = engine.case.precision == "fp32", engine.case.clip
    assert figures["loss"] == pytest.approx(loss, rel=1e-5 if exact else 1e-2)
    assert figures["grad_norm"] == pytest.approx(norm, rel=1e-4 if exact else 2e-2)  # before it is clipped
    scale = min(1.0, clip / norm) if clip else 1.0
    assert (scale < 0.1) == (clip == 0.01)
    actual = engine.gradient(step)
    assert actual.keys() == expected.keys()
    for key, own in expected.items():
        error = (actual[key] - scale * own).norm() / (scale * own).norm().clamp_min(1e-3 * scale * norm)
        assert float(error) < (1e-3 if exact else 0.1), key


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_adamw_s_with_the_rate_and_decay_of_each_parameter(name, step, engine_of):
    """Decoupled weight decay, arXiv 1711.05101, algorithm 2: in fp64, from the gradient that the test before has."""
    engine = engine_of(name)
    gradient, second = engine.gradient(step), engine.saved("exp_avg_sq", step)
    first, before, after = (
        engine.saved(key, s) for key, s in (("exp_avg", step), ("weight", step - 1), ("weight", step))
    )
    second_before = engine.saved("exp_avg_sq", 1) if step == 2 else {key: torch.zeros(()) for key in second}
    assert engine.steps(step) == {step}
    kinds = set()
    for key, weight in before.items():
        v = BETA2 * second_before[key].double() + (1 - BETA2) * gradient[key].square()
        torch.testing.assert_close(second[key].double(), v, rtol=1e-4, atol=1e-5 * float(v.max()))
        lr, decay = rates(key)
        kinds.add((lr, decay))
        m_hat, v_hat = first[key].double() / (1 - BETA1**step), second[key].double() / (1 - BETA2**step)
        change = -RATE_OF_STEP[step] * lr * (m_hat / (v_hat.sqrt() + EPSILON) + decay * weight.double())
        # A weight of fp32 near 1 knows 1e-7; the decay of a weight of 0.1 is 5e-5 here.
        torch.testing.assert_close(after[key].double() - weight.double(), change, rtol=1e-4, atol=3e-7)
    assert len(kinds) == (4 if engine.case.kind == "dskd" else 2)


@pytest.mark.parametrize("name", NAMES)
def test_training_begins_with_the_weights_of_the_folder(name, engine_of):
    engine = engine_of(name)
    dtype = DTYPES[engine.case.precision]
    student = AutoModelForCausalLM.from_pretrained(engine.run.student.path, dtype=dtype)
    saved = engine.saved("weight", 0)
    for key, weight in student.named_parameters():
        assert torch.equal(saved[f"student.{key}"], weight.detach().float().flatten()), key


@pytest.mark.parametrize("name", NAMES)
def test_each_rank_computes_with_the_masters_rounded_to_its_precision(name, engine_of):
    engine = engine_of(name)
    dtype = DTYPES[engine.case.precision]
    for step in range(3):
        masters = engine.saved("weight", step)
        for rank in range(engine.case.ranks):
            held = engine.held(step, rank)
            assert held.keys() == masters.keys()
            for key, weight in held.items():
                assert weight.dtype == dtype
                assert torch.equal(weight.flatten(), masters[key].to(dtype)), (step, rank, key)
    last, first = engine.saved("weight", 2), engine.saved("weight", 0)
    assert all(not torch.equal(last[key], first[key]) for key in last)


@pytest.mark.parametrize("name", [name for name in NAMES if "-2-" in name])
def test_all_ranks_tell_the_same_figures(name, engine_of):
    measured = ("seconds", "tokens_per_second")
    for step in (1, 2):
        told = [engine_of(name).figures(step, rank) for rank in range(2)]
        own = [{key: value for key, value in figures.items() if key not in measured} for figures in told]
        assert own[0] == own[1]


def hidden(folder: Path, rank: int) -> dict[str, Tensor]:
    return load_file(folder / f"hidden.rank{rank}")


def test_what_is_dropped_out_differs_between_ranks_and_draws_and_seeds(two_ranks):
    start, other = ([hidden(two_ranks / "dropout" / name, rank) for rank in range(2)] for name in ("start", "other"))
    assert torch.equal(start[0]["without"], start[1]["without"])  # the same model and the same batch
    drawn = [*(each[name] for each in (*start, *other) for name in ("first", "second")), start[0]["without"]]
    for i, one in enumerate(drawn):
        assert all(not torch.allclose(one, another, rtol=0.1) for another in drawn[:i])


def test_another_start_drops_out_the_same(two_ranks):
    for rank in range(2):
        start, again = (hidden(two_ranks / "dropout" / name, rank) for name in ("start", "again"))
        assert all(torch.equal(start[name], again[name]) for name in start)


@pytest.mark.parametrize("kind", ["sft", "dskd"])
@pytest.mark.parametrize("stage", range(4))
def test_an_adapter_is_trained_in_the_precision_of_the_run(stage, kind, make_run, tiny, ranks, tmp_path):
    """PEFT makes adapters in fp32, whatever the model is in."""
    engine = {"precision": "bf16", "zero_stage": stage, "persistence_threshold": 0}
    file = make_run(tmp_path, student={"lora": {"rank": 4}}, method={"kind": kind}, engine=engine)
    two_steps(file, ranks)
    before, after = (load_file(file.with_name(f"weights{step}.rank0")) for step in (0, 1))
    trained = [name for name in after if "lora_B" in name or name.startswith("method.")]
    assert len(trained) == (8 if kind == "dskd" else 4)  # four modules have an adapter
    assert {after[name].dtype for name in after} == {torch.bfloat16}
    assert {name for name in after if not after[name].equal(before[name])} >= set(trained)
