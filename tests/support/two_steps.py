"""Two optimizer steps of several runs, and all that they leave: in this process, or as one rank of several.

As a program it does so for every run file in FOLDER/steps/*/ and takes dropout's draw for those in FOLDER/dropout/*/.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from dskd.assemble import assemble
from dskd.checkpoint.shards import pieces_file
from dskd.config.load import load_run
from dskd.engine import distributed
from dskd.engine.zero import gathered
from dskd.rundir.files import write_hashed
from dskd.train import train_step


def two_steps(file: Path, ranks: distributed.Ranks) -> None:
    """Write beside a run file, for steps 0 to 2: pieces (masters and moments), whole weights, figures, records."""
    training = assemble(load_run(file), ranks)
    module = training.engine.module

    def keep(step: int) -> None:
        pieces = pieces_file(training.engine, torch.clone, {}, {})
        write_hashed(file.with_name(f"pieces{step}.rank{ranks.rank}"), pieces)
        with gathered(module):
            weights = {name: p.detach().clone() for name, p in module.named_parameters()}
        save_file(weights, file.with_name(f"weights{step}.rank{ranks.rank}"))

    keep(0)
    for step in (1, 2):
        indices = training.plan.micro_batches(step - 1, ranks.rank, ranks.world_size)
        figures = train_step(training, step, [training.train(own) for own in indices])
        keep(step)
        file.with_name(f"figures{step}.rank{ranks.rank}").write_text(json.dumps(figures))


def draw(file: Path, ranks: distributed.Ranks) -> None:
    """Write what the student makes of the same micro-batch on every rank: as it trains, twice, and as it is tested."""
    training = assemble(load_run(file), ranks)
    batch, body = training.train([0, 1]), training.distiller.body
    with torch.no_grad():
        hidden = {name: body.states(batch.student).clone() for name in ("first", "second")}
        training.engine.eval()
        hidden["without"] = body.states(batch.student).clone()
    save_file(hidden, file.with_name(f"hidden.rank{ranks.rank}"))


if __name__ == "__main__":
    here = distributed.start()
    for name, do in (("steps", two_steps), ("dropout", draw)):
        for run_file in sorted(Path(sys.argv[1]).glob(f"{name}/*/run.yaml")):
            do(run_file, here)
    distributed.stop()
