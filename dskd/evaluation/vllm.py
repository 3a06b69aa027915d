"""vLLM in the place of dskd's own generation, where it is installed. Its random numbers are its own."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dskd.config.errors import UserError
from dskd.config.training import GenerationConfig
from dskd.evaluation.answers import Answering
from dskd.models.generate import Prompt
from dskd.models.load import loading

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def load_vllm(model: Path, precision: str, settings: GenerationConfig) -> Any:
    """vLLM with a model on the GPUs of this machine. Raises `UserError` where it is missing, or for an adapter."""
    if (model / "adapter_config.json").is_file():
        raise UserError(f"--engine vllm: {model} is a LoRA adapter; a whole model is expected, or --engine dskd")
    try:
        vllm = import_module("vllm")
    except ImportError:
        raise UserError("--engine vllm: vLLM is not installed; pip install vllm, or use --engine dskd") from None
    with loading(f"--engine vllm: {model} does not load"):
        return vllm.LLM(
            model=str(model), dtype=DTYPES[precision], max_model_len=settings.max_length, generation_config="vllm"
        )


class VllmAnswering(Answering):
    """`model` is vLLM's; a batch may be as large as batch_size says."""

    def answer(self, batch: Sequence[Prompt], seed: int) -> list[list[int]]:
        parameters = import_module("vllm").SamplingParams
        sampling = {"temperature": self.settings.temperature, "top_p": self.settings.top_p}
        asked = [
            parameters(
                **({"temperature": 0.0} if self.settings.greedy else sampling),
                max_tokens=prompt.budget,
                stop_token_ids=[self.tokenizer.eos_token_id],
                seed=seed * 1_000_003 + prompt.index,
            )
            for prompt in batch
        ]
        outputs = self.model.generate([{"prompt_token_ids": list(prompt.ids)} for prompt in batch], asked)
        return [list(output.outputs[0].token_ids) for output in outputs]
