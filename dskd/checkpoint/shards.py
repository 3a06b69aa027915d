"""The trained weights and the optimizer's moments of this rank, whatever the ZeRO stage: read into files and back.

A parameter is kept as pieces: values `start..start + count` of the flattened fp32 weight and of AdamW's two moments.
Since AdamW works value by value, pieces written by any number of ranks under any stage make up the same parameter, and
any other number of ranks under any stage reads just what it holds.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from safetensors import safe_open
from torch import Tensor

from dskd.checkpoint.tensor_file import TensorFile
from dskd.config.errors import UserError
from dskd.engine.distributed import Ranks

WEIGHT, MOMENTS, FP32 = "weight", ("exp_avg", "exp_avg_sq"), 4
NOTES = "notes"


@dataclass(frozen=True)
class Piece:
    """Values `start..start + count` of the flattened parameter `name` are `master[offset : offset + count]`."""

    name: str
    master: Tensor
    """The fp32 tensor that the optimizer steps: one parameter, or many flattened into one."""
    offset: int
    start: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """The piece's values in a tensor of the master's shape, as a view [count]."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


def pieces(engine: Any) -> Iterator[Piece]:
    """What this rank holds of every trained parameter; under stage 0 that is all of it."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    masters = dict(lower_precision(engine)) if stage == 0 else {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 3:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = min(engine.global_rank * size, parameter.ds_numel)
            count = min(size, parameter.ds_numel - start)  # the last rank's part is padded
            yield Piece(name, optimizer.fp32_partitioned_groups_flat[group], offset, start, count)
        elif stage in (1, 2):
            held = parameter._hp_mapping
            if held is not None:
                master = optimizer.single_partition_of_fp32_groups[held.param_group_index]
                source, target = held.lp_fragment_address, held.hp_fragment_address
                yield Piece(name, master, target.start, source.start, source.numel)
        else:
            yield Piece(name, masters.get(parameter, parameter), 0, 0, parameter.numel())


def lower_precision(engine: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Under stage 0 in bf16: each parameter and its fp32 master."""
    optimizer = engine.optimizer
    for low, high in zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True):
        yield from zip(low, high, strict=True)


def inner_optimizer(engine: Any) -> Any:
    """The optimizer of torch's kind, whose state is keyed by master."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def own_share(piece: Piece, rank: int, world_size: int) -> Piece:
    """What `rank` writes of a piece that every rank holds."""
    first, last = piece.count * rank // world_size, piece.count * (rank + 1) // world_size
    return replace(piece, offset=piece.offset + first, start=piece.start + first, count=last - first)


def written_pieces(engine: Any) -> Iterator[Piece]:
    """What this rank writes of every trained parameter: all ranks together each value once."""
    for piece in pieces(engine):
        if engine.zero_optimization_stage() == 0:
            piece = own_share(piece, engine.global_rank, engine.world_size)
        if piece.count:
            yield piece


def check_pieces(engine: Any, ranks: Ranks) -> None:
    """Raise `UserError` unless the ranks' pieces make up every trained weight, each value once. A collective call.

    Where pieces lie is read from private fields of DeepSpeed: a version that means something else by them would lose
    weights without a word.
    """
    own, problem = [], None
    try:
        own = [(piece.name, piece.start, piece.count) for piece in written_pieces(engine)]
    except (AttributeError, KeyError, IndexError, TypeError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
    spans: dict[str, list[tuple[int, int]]] = {}
    for part, failure in ranks.gather((own, problem)):
        problem = problem or failure
        for name, start, count in part:
            spans.setdefault(name, []).append((start, count))
    for name, parameter in engine.module.named_parameters():
        if problem is None and parameter.requires_grad:
            problem = gap(name, spans.get(name, []), getattr(parameter, "ds_numel", parameter.numel()))
    if problem is not None:
        raise UserError(
            f"deepspeed {deepspeed.__version__} keeps its weights in a way that is not known here ({problem}), so that "
            "no state could be saved: pip install 'deepspeed>=0.18,<0.20'"
        )


def gap(name: str, spans: Sequence[tuple[int, int]], size: int) -> str | None:
    """Where (start, count) spans do not cover 0..size once each; None where they do."""
    end = 0
    for start, count in sorted(spans):
        if start != end:
            return f"{name}: value {min(start, end)} is held {'twice' if start < end else 'by no rank'}"
        end = start + count
    return None if end == size else f"{name}: {end} of its {size} values are held"


def state_bytes(engine: Any, room_of: Callable[[int], int]) -> int:
    """Bytes of what `pieces_file` will copy once the optimizer has stepped; `room_of` says what a tensor takes."""
    return (1 + len(MOMENTS)) * sum(room_of(FP32 * piece.count) for piece in written_pieces(engine))


def pieces_file(
    engine: Any, copy: Callable[[Tensor], Tensor], extra: dict[str, Tensor], notes: dict[str, Any]
) -> TensorFile:
    """This rank's pieces, each as `copy` gives it, `extra` tensors and `notes` (JSON)."""
    state, tensors, table = inner_optimizer(engine).state, dict(extra), {}
    for piece in written_pieces(engine):
        tensors[f"{WEIGHT}:{piece.name}"] = copy(piece.of(piece.master))
        moments = state.get(piece.master, {})  # none before a parameter's first gradient
        for key in MOMENTS:
            if key in moments:
                tensors[f"{key}:{piece.name}"] = copy(piece.of(moments[key]))
        table[piece.name] = [piece.start, piece.count, int(moments.get("step", 0))]
    return TensorFile(tensors, {NOTES: json.dumps(notes | {"pieces": table})})


def read_notes(file: Any) -> dict[str, Any]:
    """What `pieces_file` noted in an open file. Raises `ValueError` where it holds no such notes."""
    try:
        notes = json.loads((file.metadata() or {})[NOTES])
    except (KeyError, ValueError, RecursionError):
        notes = None
    if not isinstance(notes, dict):
        raise ValueError("a file of it does not say what it holds")
    return notes


def read_table(file: Any) -> dict[str, tuple[int, int, int]]:
    """Start, count and step of each parameter's piece in an open file. Raises `ValueError` where it tells none."""
    notes = read_notes(file)
    try:
        found = {name: (start, count, step) for name, (start, count, step) in notes["pieces"].items()}
        if all(type(number) is int and 0 <= number < 2**63 for piece in found.values() for number in piece):
            return found
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    raise ValueError("a file of it does not say which parts of the parameters it holds")


@torch.no_grad()
def load_pieces(engine: Any, files: Sequence[Path]) -> None:
    """Set this rank's weights and moments from the files of all ranks that saved. Raises `ValueError` on a misfit."""
    inner, stage = inner_optimizer(engine), engine.zero_optimization_stage()
    fused = any(group.get("fused") for group in inner.param_groups)  # then torch counts steps on the device
    with PieceReader(files) as saved:
        own = list(pieces(engine))
        trained = {name for name, p in engine.module.named_parameters() if p.requires_grad}
        if trained != set(saved.table):
            other = sorted(trained ^ set(saved.table))
            raise ValueError(f"{len(other)} parameter(s) are in the state or in the model alone, first {other[0]}")
        for piece in own:
            piece.of(piece.master).copy_(saved.read(WEIGHT, piece.name, piece.start, piece.count))
            step = saved.step(piece.name)
            if step == 0:
                continue
            moments = inner.state[piece.master]
            for key in MOMENTS:
                if key not in moments:
                    moments[key] = torch.zeros_like(piece.master, dtype=torch.float32)
                piece.of(moments[key]).copy_(saved.read(key, piece.name, piece.start, piece.count))
            if isinstance(inner, DeepSpeedCPUAdam):
                moments["step"] = step
            else:
                device = piece.master.device if fused else "cpu"
                moments["step"] = torch.tensor(float(step), device=device)
        refresh = {0: refresh_copies, 1: refresh_whole, 2: refresh_whole, 3: refresh_partitions}
        refresh[stage](engine, own, saved)


def refresh_copies(engine: Any, own: Sequence[Piece], saved: "PieceReader") -> None:
    for low, master in lower_precision(engine):
        low.data.copy_(master)


def refresh_whole(engine: Any, own: Sequence[Piece], saved: "PieceReader") -> None:
    """Stages 1 and 2 hold every weight whole beside the master of one part."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(saved.read(WEIGHT, name, 0, parameter.numel()).view_as(parameter))


def refresh_partitions(engine: Any, own: Sequence[Piece], saved: "PieceReader") -> None:
    by_name = {piece.name: piece for piece in own}
    for name, parameter in engine.module.named_parameters():
        if name in by_name:
            piece = by_name[name]
            parameter.ds_tensor.data[: piece.count].copy_(piece.of(piece.master))
        if parameter.ds_status.name == "AVAILABLE":  # gathered with its old values
            parameter.partition([parameter])
    kept = engine.optimizer.persistent_parameters
    if kept:
        kept[0].all_gather(kept)


class PieceReader:
    """Parameters out of the pieces in several files; only what is asked for is read."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.table: dict[str, list[tuple[int, int, int, Any]]] = {}
        """For each parameter: start, count, step and open file of its pieces."""

    def __enter__(self) -> Self:
        self.stack = ExitStack()
        for path in self.files:
            file = self.stack.enter_context(safe_open(path, "pt"))
            for name, (start, count, step) in read_table(file).items():
                self.table.setdefault(name, []).append((start, count, step, file))
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def step(self, name: str) -> int:
        """Steps that the optimizer has made on a parameter."""
        return max(step for _, _, step, _ in self.table[name])

    def read(self, key: str, name: str, start: int, count: int) -> Tensor:
        """Values `start..start + count` of a parameter's weight or moment, fp32 [count]. Raises `ValueError`."""
        out, found = torch.empty(count), 0
        for at, size, _, file in self.table[name]:
            first, last = max(start, at), min(start + count, at + size)
            if first < last:
                part = file.get_slice(f"{key}:{name}")[first - at : last - at]
                if part.shape != (last - first,):
                    raise ValueError(f"{name}: another shape than its file tells")
                out[first - start : last - start] = part
                found += last - first
        if found != count:
            raise ValueError(f"{name}: {found} of {count} values are in the state")
        return out
