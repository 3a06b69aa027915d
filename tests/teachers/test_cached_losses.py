"""Every method learns the same from a cache as from the resident teacher."""

import pytest
from support.compare import MEASURED

from dskd.assemble import assemble, plan_of
from dskd.config.load import load_run
from dskd.data.loader import Steps, load_steps
from dskd.data.records import read_records
from dskd.data.shard import Shard
from dskd.losses import METHODS
from dskd.teachers.cache import write
from dskd.train import train, train_step

TAUGHT = [kind for kind in METHODS if kind != "sft"]


def figures(run, ranks, workers=0, steps=3):
    """What the first steps of a run tell."""
    training = assemble(run, ranks)
    batches = load_steps(Steps(training.plan, training.train, 0, 1), 0, steps, workers, pin_memory=False)
    found = [train_step(training, step, micro_batches) for step, micro_batches in enumerate(batches, start=1)]
    return [{name: value for name, value in step.items() if name not in MEASURED} for step in found]


@pytest.fixture
def as_trained(ranks, monkeypatch):
    """`dskd teacher cache` in exactly the micro-batches of a run's first epoch."""

    def cache(run):
        plan = plan_of(run, read_records(run.data.train))
        trained = [part for step in range(plan.steps_per_epoch) for part in plan.micro_batches(step, 0, 1)]

        def batches_of(wanted, budget):
            by_record = {each.record: each for each in wanted}
            return [[by_record.pop(record) for record in part] for part in trained]

        with monkeypatch.context() as patch:
            patch.setattr(write, "batches_of", batches_of)
            write.write_cache(run, Shard(), ranks)

    return cache


@pytest.mark.parametrize("kind", TAUGHT)
def test_the_losses_are_the_resident_teacher_s(kind, make_run, tmp_path, ranks, as_trained):
    run_file = make_run(tmp_path, method={"kind": kind})
    expected = figures(load_run(run_file), ranks)

    as_trained(load_run(run_file, [f"data.cache_dir={tmp_path}/same"]))
    same = load_run(run_file, ["teacher.backend=cache", f"data.cache_dir={tmp_path}/same"])
    assert figures(same, ranks, workers=1) == expected

    write.write_cache(load_run(run_file), Shard(), ranks)
    found = figures(load_run(run_file, ["teacher.backend=cache"]), ranks)
    for step, (own, whole) in enumerate(zip(found, expected, strict=True)):
        assert own["loss"] == pytest.approx(whole["loss"], rel=1e-5), step
        assert own["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3), step


def test_in_bf16_fifty_steps_follow_the_same_curve(make_run, tmp_path, ranks):
    sizes = {"epochs": 10, "micro_batch_size": 8}
    run_file = make_run(tmp_path, method={"kind": "kd"}, engine={"precision": "bf16"}, train=sizes)
    write.write_cache(load_run(run_file), Shard(), ranks)
    expected, found = (
        [step["loss"] for step in figures(load_run(run_file, [f"teacher.backend={backend}"]), ranks, steps=50)]
        for backend in ("resident", "cache")
    )
    differences = [abs(own - whole) / whole for own, whole in zip(found, expected, strict=True)]
    assert max(differences) < 1e-2
    assert expected[-1] < 0.9 * expected[0]


@pytest.mark.parametrize("teacher", ["gemma2", "gpt2"])
def test_tied_heads_and_soft_caps_come_from_the_files(teacher, tiny, make_run, tmp_path, ranks, as_trained):
    run_file = make_run(tmp_path, teacher={"path": str(tiny(teacher, tokenizer="bytes"))})
    as_trained(load_run(run_file))
    assert figures(load_run(run_file, ["teacher.backend=cache"]), ranks) == figures(load_run(run_file), ranks)


def test_a_whole_run_has_no_teacher_in_memory(make_run, tmp_path, ranks, monkeypatch):
    run_file = make_run(tmp_path)
    write.write_cache(load_run(run_file), Shard(), ranks)
    monkeypatch.setattr("dskd.teachers.backends.load_resident", None)
    directory = train(load_run(run_file, ["teacher.backend=cache", "data.workers=1"]), ranks)
    assert (directory / "metrics.jsonl").read_text().count('"loss"') == 5
