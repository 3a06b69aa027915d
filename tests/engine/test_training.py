"""`dskd train` from end to end on small real models: what it writes, and that what it writes loads."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from support.disks import disk_of
from support.starts import finish
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd.launch.ranks import rank_environment


def dskd(*arguments, processes=None, check=True, **environment):
    """Run the command as a user does."""
    command = [sys.executable, "-m", "dskd", *map(str, arguments)]
    if processes:
        command.append(f"launch.processes={processes}")
    clean = {k: v for k, v in os.environ.items() if k not in rank_environment(0, 1, 0)}
    done = subprocess.run(command, capture_output=True, text=True, env=clean | environment, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def only(folder, pattern):
    (found,) = folder.glob(pattern)
    return found


def logits_of(folder, model_class=AutoModelForCausalLM):
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(20).reshape(2, 10)).logits


@pytest.fixture(scope="module")
def by_stage(make_run, tmp_path_factory):
    """The same dskd_cma run on two ranks under each ZeRO stage: run directories by stage."""
    root = tmp_path_factory.mktemp("stages")
    generation = {"max_length": 48, "max_prompt_length": 32, "batch_size": 3}  # batches that do not divide by the ranks
    evaluation = {"generate": True, "generation": generation}
    train = {"max_steps": 5, "global_batch_size": 8}
    run = make_run(root, method={"kind": "dskd_cma"}, train=train, eval=evaluation)
    found = {}
    for stage in range(4):
        settings = [f"engine.zero_stage={stage}", f"output.name=zero{stage}", "engine.persistence_threshold=0"]
        finish(root / "log", "train", run, *settings, ranks=2)
        found[stage] = only(root, f"**/dskd_cma/zero{stage}")
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_zero_stages_train_to_the_same_losses(by_stage, stage):
    for expected, actual in zip(metrics(by_stage[0])[:5], metrics(by_stage[stage])[:5], strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_zero_stages_answer_the_dev_records_alike(by_stage, stage):
    expected, actual = ([m for m in metrics(by_stage[s]) if "dev_rougel" in m] for s in (0, stage))
    assert len(expected) == len(actual) == 1
    # Weights that differ in their last digits may choose another token now and then.
    assert actual[0]["dev_rougel"] == pytest.approx(expected[0]["dev_rougel"], abs=0.5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_zero_stages_save_the_same_whole_model(by_stage, stage):
    expected, actual = (only(by_stage[s], "epoch*") for s in (0, stage))
    torch.testing.assert_close(logits_of(actual), logits_of(expected), atol=1e-4, rtol=1e-4)
    projectors = [load_file(folder / "projectors.safetensors") for folder in (expected, actual)]
    assert sorted(projectors[0]) == sorted(f"{n}.{p}" for n in ("query", "s2t", "t2s") for p in ("bias", "weight"))
    torch.testing.assert_close(projectors[1], projectors[0], atol=1e-4, rtol=1e-4)


def test_a_saved_model_is_complete_and_verifiable(by_stage):
    folder = only(by_stage[3], "epoch*")
    listed = json.loads((folder / "MANIFEST.json").read_text())
    assert {f.name for f in folder.iterdir()} - {"MANIFEST.json"} == set(listed)
    assert all((folder / name).stat().st_size == entry["size"] for name, entry in listed.items())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("The cat", return_tensors="pt", add_special_tokens=False)
    assert model.generate(**prompt, max_new_tokens=3).shape[1] >= prompt["input_ids"].shape[1] + 1


def test_nothing_of_the_teacher_is_saved_or_trained(by_stage, tiny):
    teacher = json.loads((by_stage[3] / "args.json").read_text())["run"]["teacher"]["path"]
    width = AutoModelForCausalLM.from_pretrained(teacher).get_output_embeddings().out_features
    saved = load_file(only(by_stage[3], "epoch*") / "model.safetensors")
    assert all(width not in tensor.shape for tensor in saved.values())


def test_the_run_directory_tells_what_ran(by_stage):
    told = json.loads((by_stage[0] / "args.json").read_text())
    assert told["versions"]["torch"].startswith("2.")
    assert told["run"]["train"]["max_steps"] == 5
    steps = metrics(by_stage[0])
    assert [m["step"] for m in steps] == [1, 2, 3, 4, 5, 5]
    assert {"loss", "ce", "t2s_ce", "t2s_kd", "s2t_kd", "accuracy", "lr", "projector_lr", "tokens"} <= set(steps[0])
    assert steps[-1]["dev_loss"] > 0
    assert "finished" in (by_stage[0] / "train.log").read_text()


def test_a_run_directory_is_never_overwritten(by_stage):
    before = (by_stage[0] / "metrics.jsonl").read_bytes()
    again = dskd("train", by_stage[0] / "run.yaml", "launch.processes=1", "train.lr=1", check=False)
    assert again.returncode == 2
    assert "already holds a run with other settings (train.lr: 0.0005 -> 1" in again.stderr.splitlines()[-1]
    assert (by_stage[0] / "metrics.jsonl").read_bytes() == before


def test_lora_saves_an_adapter_that_peft_loads(make_run, tmp_path):
    run = make_run(tmp_path, method={"kind": "sft"}, train={"max_steps": 2, "global_batch_size": 8})
    settings = ["student.lora={}", "student.lora.rank=4", "engine.zero_stage=3", "engine.persistence_threshold=0"]
    dskd("train", run, *settings, processes=2)
    folder = only(tmp_path, "**/epoch*")
    assert not (folder / "model.safetensors").exists()
    adapter = load_file(folder / "adapter_model.safetensors")
    assert all(tensor.numel() for tensor in adapter.values())
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    assert logits_of(folder, AutoPeftModelForCausalLM).isfinite().all()


def test_bf16_with_offload_checkpointing_and_generation_runs(make_run, tmp_path):
    run = make_run(
        tmp_path,
        method={"kind": "dskd_cma"},
        train={"epochs": 2, "global_batch_size": 16},
        engine={"zero_stage": 2, "offload": "optimizer", "precision": "bf16", "gradient_checkpointing": True},
        eval={"generate": True, "generation": {"max_length": 48, "max_prompt_length": 32}},
        checkpoint={"best_by": "rougel", "keep_best": 1},
    )
    dskd("train", run)
    folder = only(tmp_path, "**/epoch*_rougel*")  # the better one of two
    evaluations = [m for m in metrics(folder.parent) if "dev_rougel" in m]
    assert len(evaluations) == 2
    best = max(e["dev_rougel"] for e in evaluations)
    assert f"rougel{best:.4f}" in folder.name
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_cpu_offload_of_weights_under_stage_3_runs(make_run, tmp_path):
    run = make_run(tmp_path, method={"kind": "sft"}, train={"max_steps": 2, "global_batch_size": 8})
    dskd("train", run, "engine.zero_stage=3", "engine.offload=all", "engine.persistence_threshold=0")
    assert len(metrics(only(tmp_path, "**/metrics.jsonl").parent)) == 3


def test_a_failed_rank_fails_the_command(make_run, tmp_path):
    run = make_run(tmp_path, method={"kind": "sft"}, train={"max_steps": 2, "global_batch_size": 8})
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "output": "b"}\n{"prompt": "a"}\n')
    done = dskd("train", run, processes=2, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == f'dskd: {tmp_path}/train.jsonl:2: field "output" is missing; found: prompt'


def test_no_permission_in_the_output_folder_is_one_line(make_run, tmp_path):
    run = make_run(tmp_path, method={"kind": "sft"}, train={"max_steps": 1, "global_batch_size": 8})
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = dskd("train", run, f"output.root={blocked}/out", check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"dskd: output.root: cannot write {blocked}")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB: room for the log, not for a model."""
    with disk_of("200k", tmp_path / "disk") as folder:
        yield folder


def test_a_full_disk_is_one_line_and_leaves_no_half_model(make_run, tmp_path, small_disk):
    run = make_run(tmp_path, method={"kind": "sft"}, train={"max_steps": 1, "global_batch_size": 8})
    done = dskd("train", run, f"output.root={small_disk}", check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"dskd: output.root: cannot write {small_disk}")
    assert done.stderr.splitlines()[-1].endswith("No space left on device")
    assert [p.name for p in small_disk.rglob("*epoch*")] == []
    assert [line["step"] for line in metrics(only(small_disk, "**/metrics.jsonl").parent)] == [1, 1]
