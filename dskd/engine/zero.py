"""DeepSpeed: its configuration, the engine around student and projectors, and whole weights out of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from dskd.config.run import RunConfig


def deepspeed_config(run: RunConfig, world_size: int, accumulation: int) -> dict[str, Any]:
    """What DeepSpeed is told; everything it is not told follows its defaults."""
    engine, train = run.engine, run.train
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = engine.persistence_threshold
    return {
        "train_batch_size": train.global_batch_size,
        # Where micro-batches are of so many tokens, a step has fewer than it is told here; it divides losses by this.
        "train_micro_batch_size_per_gpu": train.global_batch_size // (world_size * accumulation),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.clip,
        "zero_optimization": zero,
        "bf16": {"enabled": engine.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


@contextmanager
def partitioned_loading(config: dict[str, Any]) -> Iterator[None]:
    """Inside, transformers loads models sharded over the ranks where the configuration says ZeRO-3."""
    keep_alive = HfDeepSpeedConfig(config) if config["zero_optimization"]["stage"] == 3 else None
    yield
    del keep_alive


def build_engine(module: nn.Module, projectors: nn.Module, run: RunConfig, config: dict[str, Any]) -> Any:
    """The DeepSpeed engine around `module`, whose part `projectors` has a learning rate of its own.

    AdamW; on a GPU with offloading DeepSpeed's compiled version for the CPU.
    """
    if run.engine.precision == "bf16":
        # DeepSpeed casts nothing of a model that was loaded in partitions, and refuses a mixture.
        for p in module.parameters():
            if not hasattr(p, "ds_id"):
                p.data = p.data.to(torch.bfloat16)
    own = {id(p) for p in projectors.parameters()}
    trained = [p for p in module.parameters() if p.requires_grad]
    by_rate = {"lr": [p for p in trained if id(p) not in own], "projector_lr": [p for p in trained if id(p) in own]}
    groups = []
    for lr_key, chosen in by_rate.items():
        for weight_decay, matrices in ((run.train.weight_decay, True), (0.0, False)):
            # Biases and norms are vectors; under ZeRO-3 only ds_shape still tells.
            params = [p for p in chosen if (len(getattr(p, "ds_shape", p.shape)) > 1) is matrices]
            if params:
                groups.append({"params": params, "weight_decay": weight_decay, "lr_key": lr_key})
    lr = run.train.lr
    if run.engine.offload != "none" and torch.cuda.is_available():
        optimizer: Any = DeepSpeedCPUAdam(groups, lr=lr, adamw_mode=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        # Stage 0 in bf16: to make its state, it has taken a step on gradients of 0, which decays and counts.
        for low, high in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            for weight, master in zip(low, high, strict=True):
                master.data.copy_(weight.data)
        optimizer.state.clear()
    if engine.zero_optimization_stage() == 0 and engine.dp_world_size == 1:
        engine.enable_backward_allreduce = False  # nothing to sum, and DeepSpeed would copy all gradients for it
    return engine


def gathered(*modules: nn.Module) -> Any:
    """A context in which the weights of `modules` are whole on every rank. A collective call under ZeRO-3."""
    return deepspeed.zero.GatheredParameters([p for module in modules for p in module.parameters()])


def set_learning_rates(engine: Any, rates: dict[str, float]) -> None:
    """Give each parameter group its rate for the next step; a function of the step, so that resuming needs no state."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rates[group["lr_key"]]


def accumulate(engine: Any, is_last: bool) -> None:
    """Say before the forward of a micro-batch whether it is the last of its step; DeepSpeed would count to a number."""
    engine.set_gradient_accumulation_boundary(is_last)


def step_at_boundary(engine: Any) -> float:
    """The optimizer step after the last micro-batch; returns the gradient's norm before clipping."""
    if isinstance(engine.optimizer, torch.optim.Optimizer):  # stage 0 in fp32: DeepSpeed clips but does not tell
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        engine.step()
        return norm
    engine.step()
    return float(engine.get_global_grad_norm())


def whole_state(module: nn.Module, is_main: bool, copy: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """All parameters and saved buffers of `module`, each as `copy` gives it, on the main rank (empty elsewhere).

    A collective call. Gathers module by module, so that no rank ever holds more than one layer beside its shard.
    """
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        own = [(n, p) for n, p in part.named_parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for _, p in own)
        with deepspeed.zero.GatheredParameters([p for _, p in own]):
            if is_main:
                state |= {join(prefix, n): copy(p) for n, p in own}
        if is_main:
            kept = part._non_persistent_buffers_set
            state |= {join(prefix, n): copy(b) for n, b in part.named_buffers(recurse=False) if n not in kept}
    return state


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
