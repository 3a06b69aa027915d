"""Compiles kernels for a GPU that need not be there: `python compiling.py 90 [whole]` prints a line of JSON for each.

Kernels get the arguments of real launches: `fused` runs over small tensors of each kind, with its launches replaced.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dskd.config.methods import Divergence
from dskd.losses.distances import Carried, Sorted, Tempered, ToLabel
from dskd.losses.kernels import Block, Scales, Terms, fused
from dskd.losses.tensors import Head

ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}
WIDTH = 41
ALIGNED = [["tt.divisibility", 16]]


def source(kernel, arguments):
    """As Triton specializes a launch: a 1 is a constant; tensors and whole multiples of 16 are known to be aligned."""
    assert set(arguments) == {parameter.name for parameter in kernel.params}  # the interpreter ignores what it lacks
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[index,] = TYPES[value.dtype], ALIGNED
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if type(value) is int and value % 16 == 0:
                attributes[index,] = ALIGNED
    return ASTSource(kernel, signature, constants, attributes)


def assembled(ptx, architecture):
    """Registers of a thread, and bytes that it spills."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"-arch={architecture}", str(file), "-o", f"{folder}/kernel"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", told)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", told)
    assert len(spills) == 2
    return int(registers), sum(map(int, spills))


def show(kernel, arguments, capability, seen):
    made = source(kernel, arguments)
    if (key := str((kernel.__name__, made.signature, made.constants, made.attrs))) in seen:
        return
    seen.add(key)
    compiled = triton.compile(made, GPUTarget("cuda", capability, 32), {"num_warps": fused.WARPS})
    registers, spills = assembled(compiled.asm["ptx"], ARCHITECTURES[capability])
    found = {
        "kernel": kernel.__name__,
        "kind": arguments.get("KIND", ""),
        "pointers": sorted({each for each in made.signature.values() if each.startswith("*")}),
        "capped": arguments.get("CAPPED", False),
        "registers": registers,
        "spilled bytes": spills,
    }
    print(json.dumps(found), flush=True)


def ask(block, distance, everything):
    """One launch of all that a distance needs, alone or with all other terms."""
    n = len(block.logits)
    labels = torch.zeros(n, dtype=torch.int64)
    terms = Terms(labels, distance=distance, smoothing=0.1)
    if everything:
        terms = Terms(labels, True, 0.1, distance, True, labels)
    alone = distance is None or isinstance(distance, ToLabel)
    found = fused.measure(block, None if alone else block, terms)
    found.write(Scales(learn=torch.ones(n) if everything else None))


def blocks():
    for dtype in (torch.bfloat16, torch.float32):
        for softcap in (None, 30.0):
            weight = torch.zeros(WIDTH, 8, dtype=dtype)
            yield Block(fused.buffer(3, weight), Head(weight, softcap=softcap), trained=True)


def main(capability, whole):
    """All kernels for bf16 logits without soft-cap, and the largest for fp32 with one; with `whole`, all for all."""
    seen = set()
    fused.launch = lambda kernel, grid, **arguments: show(kernel, arguments, capability, seen)
    tempered = [Tempered(kind, 2.0) for kind in get_args(Divergence)]
    ids = torch.arange(WIDTH)
    carried = Carried(tempered[0], ids[:2], ids, torch.tensor([1, WIDTH - 1]))
    for index, block in enumerate(blocks()):
        if index and not whole:
            if index == 3:
                ask(block, Tempered("adaptive_kl", 2.0), everything=True)
            continue
        ranked = [Sorted()] if block.logits.dtype == torch.bfloat16 else []
        for distance in [None, ToLabel(2.0), carried, *ranked, *(tempered if whole else [])]:
            ask(block, distance, everything=False)
        for distance in tempered:
            ask(block, distance, everything=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), whole=sys.argv[2:] == ["whole"])
