"""Models and tokenizers load whole, in the asked precision, from safetensors, or are refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dskd.config.errors import UserError
from dskd.config.models import LoraConfig, StudentConfig, TeacherConfig
from dskd.models.load import load_causal_lm, load_checkpoint, load_student, load_tokenizer
from dskd.models.views import ModelView, check_view
from dskd.teachers.resident import load_resident

CPU = torch.device("cpu")
IDS = torch.arange(20).reshape(2, 10)


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trainable(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def error_of(load, *arguments) -> str:
    with pytest.raises(UserError) as raised:
        load(*arguments)
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


# Students


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_student_trains_all_its_weights(tiny, precision):
    student = load_student(StudentConfig(tiny("gpt2")), precision, gradient_checkpointing=False)
    assert len(trainable(student)) == len(list(student.parameters()))
    assert {p.dtype for p in student.parameters()} == {{"fp32": torch.float32, "bf16": torch.bfloat16}[precision]}


@pytest.mark.parametrize("targets", [(), ("all-linear",), ("k_proj", "down_proj")])
def test_with_lora_only_the_adapter_is_trained(tiny, targets):
    settings = LoraConfig(rank=3, alpha=6, dropout=0.0, targets=targets)
    student = load_student(StudentConfig(tiny("llama"), settings), "fp32", False)
    names = trainable(student)
    assert names
    assert all("lora_" in name for name in names)
    assert not any("lm_head" in name for name in names)
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in names}
    everything = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted == {(): {"q_proj", "v_proj"}, ("all-linear",): everything}.get(targets, set(targets))
    config = student.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 6, 0.0)
    torch.testing.assert_close(logits_of(student), logits_of(load_causal_lm(tiny("llama"), "", "fp32", False)))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "mistral", "gemma2"])
def test_peft_chooses_targets_for_each_family(tiny, family):
    student = load_student(StudentConfig(tiny(family), LoraConfig(rank=2)), "fp32", False)
    assert trainable(student)


def test_lora_targets_that_the_model_lacks_are_told(tiny):
    settings = StudentConfig(tiny("llama"), LoraConfig(targets=("nope",)))
    message = error_of(load_student, settings, "fp32", False)
    assert message.startswith("student.lora.targets: ")
    assert "nope" in message


@pytest.mark.parametrize("targets", [("q_proj", "nope"), ("all-linear", "q_proj")])
def test_each_lora_target_must_be_in_the_model(tiny, targets):
    settings = StudentConfig(tiny("llama"), LoraConfig(targets=targets))
    assert error_of(load_student, settings, "fp32", False).startswith("student.lora.targets: ")


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, dropout=0.0)])
def test_gradient_checkpointing_changes_no_gradient(tiny, lora):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        student = load_student(StudentConfig(tiny("llama"), lora), "fp32", checkpointing).train()
        student(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.requires_grad})
    assert any(gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


# Teachers


def load_teacher(settings: TeacherConfig):
    """The module of a resident teacher."""
    return load_resident(settings, load_tokenizer(settings.path, "teacher.path"), "fp32", CPU).view.causal


def test_a_teacher_is_frozen(tiny):
    teacher = load_teacher(TeacherConfig(tiny("qwen2")))
    assert not trainable(teacher)
    assert not teacher.training


def test_a_teacher_s_adapter_is_merged(tiny, adapter):
    teacher = load_teacher(TeacherConfig(tiny("llama"), adapter))
    unmerged = PeftModel.from_pretrained(load_causal_lm(tiny("llama"), "teacher.path", "fp32", False), adapter)
    torch.testing.assert_close(logits_of(teacher), logits_of(unmerged), atol=1e-4, rtol=1e-4)
    without = logits_of(load_teacher(TeacherConfig(tiny("llama"))))
    assert (logits_of(teacher) - without).abs().max() > 0.1
    assert not trainable(teacher)
    assert not any("lora" in name for name, _ in teacher.named_parameters())


def test_an_adapter_of_another_model_is_refused(tiny, adapter):
    message = error_of(load_teacher, TeacherConfig(tiny("gpt2"), adapter))
    assert message.startswith(f"teacher.adapter: the adapter in {adapter} does not fit the model: ")
    assert error_of(load_teacher, TeacherConfig(tiny("llama", hidden_size=48), adapter))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("kept", [1, 0])
def test_an_adapter_without_all_its_weights_is_refused(tiny, adapter, tmp_path, kept):
    weights = sorted(load_file(adapter / "adapter_model.safetensors").items())
    broken = Path(shutil.copytree(adapter, tmp_path / "broken"))
    save_file(dict(weights[: kept * len(weights) // 2]), broken / "adapter_model.safetensors")
    assert error_of(load_teacher, TeacherConfig(tiny("llama"), broken)).startswith("teacher.adapter: ")


def test_a_pickled_adapter_is_not_read(tiny, adapter, tmp_path):
    pickled = Path(shutil.copytree(adapter, tmp_path / "pickled"))
    weights = pickled / "adapter_model.safetensors"
    torch.save(load_file(weights), pickled / "adapter_model.bin")
    weights.unlink()
    assert error_of(load_teacher, TeacherConfig(tiny("llama"), pickled)).startswith("teacher.adapter: ")


# Folders that do not hold a whole model


def test_weights_that_are_missing_are_told(copy):
    folder = copy()
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert error_of(load_student, StudentConfig(folder), "fp32", False) == (
        f"student.path: {folder} lacks 2 weight(s) of its architecture, first model.layers.1.mlp.up_proj.weight"
    )


def test_a_tied_head_is_not_missing(copy):
    folder = copy("gemma2")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert load_student(StudentConfig(folder), "fp32", False).lm_head.weight.any()


def test_weights_of_another_shape_are_told(copy):
    folder = copy()
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 48}
    (folder / "config.json").write_text(json.dumps(config))
    message = error_of(load_teacher, TeacherConfig(folder))
    assert message.startswith(f"teacher.path: no causal language model loads from {folder}: ")


def test_pickled_weights_are_not_read(copy):
    folder = copy()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    message = error_of(load_student, StudentConfig(folder), "fp32", False)
    assert message.startswith(f"student.path: no causal language model loads from {folder}: ")


@pytest.mark.parametrize("config", ["{", '{"model_type": "nope"}'])
def test_a_folder_of_no_causal_language_model(copy, config):
    folder = copy()
    (folder / "config.json").write_text(config)
    message = error_of(load_causal_lm, folder, "teacher.path", "fp32", False)
    assert message.startswith("teacher.path: no causal language")


@pytest.mark.parametrize("end", [0, -1000])
def test_weights_that_were_cut_off_are_told(copy, end):
    folder = copy()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:end])
    assert error_of(load_student, StudentConfig(folder), "fp32", False).startswith("student.path: ")


# Tokenizers and saved models


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_tokenizer_loads_as_it_was_saved(tiny, family):
    tokenizer = load_tokenizer(tiny(family), "student.path")
    assert tokenizer.get_vocab() == tiny.tokenizer({"gpt2": "bytes", "llama": "pieces"}[family]).get_vocab()


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "qwen2", "gemma2"])
def test_a_folder_without_tokenizer(copy, family):
    folder = copy(family)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert error_of(load_tokenizer, folder, "student.path").startswith("student.path: no tokenizer loads from ")


def test_a_broken_tokenizer(copy):
    folder = copy()
    (folder / "tokenizer.json").write_text("{")
    assert error_of(load_tokenizer, folder, "teacher.path").startswith("teacher.path: no tokenizer loads from ")


def test_a_checkpoint_is_a_whole_model_or_an_adapter_over_its_base(tiny, adapter, tmp_path):
    whole = load_checkpoint(tiny("llama"), "fp32", CPU)
    torch.testing.assert_close(logits_of(whole), logits_of(load_causal_lm(tiny("llama"), "", "fp32", False)))
    teacher = load_teacher(TeacherConfig(tiny("llama"), adapter))
    torch.testing.assert_close(logits_of(load_checkpoint(adapter, "fp32", CPU)), logits_of(teacher))
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    config = json.loads((moved / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/gone/llama"}
    (moved / "adapter_config.json").write_text(json.dumps(config))
    assert error_of(load_checkpoint, moved, "fp32", CPU) == f"{moved}: the adapter's base model is not at /gone/llama"


def test_no_code_of_a_model_s_folder_runs_unless_asked_for(copy):
    folder = copy()
    marker = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert error_of(load_student, StudentConfig(folder), "fp32", False).startswith("student.path: ")
    assert not marker.exists()


def test_weights_that_are_not_finite_are_refused(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    problem = error_of(load_checkpoint, folder, "fp32", CPU)
    assert problem.startswith(f"{folder}: its weights are not finite, first model.layers.1.mlp.up_proj.weight")
    view = ModelView(load_student(StudentConfig(folder), "fp32", False), "student.path")
    assert error_of(check_view, view).startswith("student.path: its logits are not finite: its weights hold NaN")
    teacher = TeacherConfig(folder), load_tokenizer(folder, "teacher.path"), "fp32", CPU
    assert error_of(load_resident, *teacher).startswith("teacher.path: its logits are not finite")
