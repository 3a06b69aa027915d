"""Pipeline files: the order of their stages, and mistakes in one line."""

import pytest

from dskd.config.errors import UserError
from dskd.config.load import load
from dskd.config.pipeline import PipelineConfig


def read(tmp_path, text: str) -> PipelineConfig:
    file = tmp_path / "pipeline.yaml"
    file.write_text(text)
    return load(file, PipelineConfig)


def test_stages_come_after_those_that_they_need(tmp_path):
    pipeline = read(
        tmp_path,
        """
stages:
  scores: {evaluate: student, data: [a.jsonl]}
  student: {run: b.yaml, teacher: teacher, after: [other]}
  teacher: {run: a.yaml}
  other: {run: c.yaml}
""",
    )
    assert list(pipeline.ordered()) == ["teacher", "other", "student", "scores"]
    assert pipeline.stages["student"].needs == ("teacher", "other")


def test_a_report_waits_for_trainings_and_their_scores(tmp_path):
    pipeline = read(
        tmp_path,
        """
stages:
  page: {report: report.html}
  half: {report: half.html, runs: [a]}
  scores_a: {evaluate: a, data: [a.jsonl]}
  scores_b: {evaluate: b, data: [a.jsonl]}
  near_b: {analyze: b}
  a: {run: a.yaml}
  b: {run: b.yaml, after: [a]}
""",
    )
    assert pipeline.needs("page") == ("a", "b", "scores_a", "scores_b", "near_b")
    assert pipeline.needs("half") == ("a", "scores_a")
    assert list(pipeline.ordered())[-1] == "page"


KEYS = """
run: a run that trains; settings, teacher, student, train_seeds, parallel
cache: a run; settings, teacher, student, shards, parallel
generate: an object; teacher, shards, generation, bos, precision, processes, hours, parallel
evaluate: b; data, suite, data_root, seeds, together, generation, bos, precision, processes, hours, parallel
analyze: b; records, precision, hours, parallel
make: an object; hours
report: a page; runs, hours
"""
GIVEN = {
    **{"run": "x", "cache": "x", "evaluate": "b", "analyze": "b", "report": "p.html", "make": "{model: x, out: y}"},
    **{"settings": "[train.lr=1]", "teacher": "b", "student": "b", "train_seeds": "[1]", "shards": "2", "data": "[y]"},
    **{"suite": "paper", "data_root": "z", "seeds": "[3]", "together": "true", "generation": "{greedy: true}"},
    **{
        "bos": "true",
        "precision": "fp32",
        "processes": "2",
        "records": "5",
        "runs": "[b]",
        "hours": "1",
        "parallel": "2",
    },
}


@pytest.mark.parametrize("line", KEYS.split("\n")[1:-1], ids=lambda line: line.partition(":")[0])
def test_each_kind_of_stage_takes_its_own_keys_and_refuses_all_others(tmp_path, line):
    kind, _, known = line.partition(": ")
    taken = {key.strip() for key in known.partition(";")[2].split(",")}
    kinds = {other.partition(":")[0] for other in KEYS.split("\n")}
    for key in GIVEN.keys() - kinds:
        own = {kind: GIVEN.get(kind, "{data: x, out: y}"), "after": "[b]", key: GIVEN[key]}
        own |= {"data": "[y]"} if kind == "evaluate" and key not in ("suite", "data_root") else {}
        own |= {"suite": "paper", "data_root": "z"} if key in ("suite", "data_root") else {}
        own |= {"teacher": "b"} if kind == "generate" else {}
        text = ", ".join(f"{name}: {value}" for name, value in own.items())
        file = f"stages: {{b: {{run: x}}, a: {{{text}}}}}\n"
        if key in taken:
            assert read(tmp_path, file).stages["a"].needs
        else:
            with pytest.raises(UserError, match=rf"stages\.a\.\w+: has no effect beside {kind}"):
                read(tmp_path, file)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ("{a: {}}", "stages.a.run: either run, cache, generate, evaluate, analyze, make or report is expected"),
        (
            "{a: {run: x, evaluate: a}}",
            "stages.a.run: either run, cache, generate, evaluate, analyze, make or report is expected",
        ),
        (
            "{a: {run: x, cache: x}}",
            "stages.a.run: either run, cache, generate, evaluate, analyze, make or report is expected",
        ),
        ("{a: {cache: x, shards: 0}}", "stages.a.shards: must be above 0, got 0"),
        ("{a: {run: x, shards: 2}}", "stages.a.shards: has no effect beside run"),
        ("{a: {cache: x, data: [y]}}", "stages.a.data: has no effect beside cache"),
        ("{a: {cache: x}, b: {run: x, teacher: a}}", "stages.b: a trains no model and makes none"),
        ("{a: {run: x, train_seeds: [1, 2]}, b: {run: x, teacher: a}}", "stages.b: a trains several models (train_"),
        ("{a: {run: x, train_seeds: [1, 1]}}", "stages.a.train_seeds: different whole numbers from 0 to "),
        ("{a: {make: {model: x, out: y}}, b: {evaluate: a, data: [y]}}", "stages.b: a trains no model"),
        ("{a: {make: {model: x, out: y, layers: 0}}}", "stages.a.make.layers: must be above 0, got 0"),
        ("{a: {make: {model: x, out: y}, train_seeds: [1]}}", "stages.a.train_seeds: has no effect beside make"),
        ("{a: {report: x.html, runs: [b]}}", "stages.a: 'b': unknown stage"),
        ("{a: {run: x}, b: {run: x, runs: [a]}}", "stages.b.runs: has no effect beside run"),
        ("{a: {run: x}, b: {evaluate: a}}", "stages.b.data: is missing; "),
        ("{a: {run: x, data: [y]}}", "stages.a.data: has no effect beside run"),
        ("{a: {run: x, teacher: bb}, b: {run: x}}", "stages.a: 'bb': unknown stage; allowed: a, b; nearest: b"),
        ("{a: {run: x, after: [b]}, b: {run: x, after: [a]}}", "stages: a, b wait for each other"),
        ("{a: {run: x}, b: {evaluate: a, data: [y]}, c: {run: x, teacher: b}}", "stages.c: b trains no model"),
        ("{}", "stages: at least one is expected"),
        ("{a: {generate: {data: x, out: y}}}", "stages.a.generate.model: either it or teacher, the stage whose best "),
        ("{b: {run: x}, a: {generate: {data: x, out: y, model: z}, teacher: b}}", "stages.a.generate.model: either it"),
        ("{a: {generate: {data: x, model: z}}}", "stages.a.generate.out: is missing"),
        ("{a: {generate: {data: x, out: y, model: z, shards: 2}}}", "stages.a.generate.shards: unknown key; "),
        ("{a: {generate: {data: x, out: y, model: z, seed: -1}}}", "stages.a.generate.seed: must be from 0 to "),
        ("{a: {generate: {data: x, out: y, model: z, engine: sglang}}}", "stages.a.generate.engine: unknown value "),
        ("{a: {generate: {data: x, out: y, model: z}, seeds: [1]}}", "stages.a.seeds: has no effect beside generate"),
        ("{a: {generate: {data: x, out: y, model: z}, student: a}}", "stages.a.student: has no effect beside generate"),
        ("{a: {run: x}, b: {analyze: a, records: 0}}", "stages.b.records: must be above 0, got 0"),
        ("{a: {run: x}, b: {analyze: a, data: [y]}}", "stages.b.data: has no effect beside analyze"),
        ("{a: {run: x, records: 5}}", "stages.a.records: has no effect beside run"),
        ("{a: {make: {model: x, out: y}}, b: {analyze: a}}", "stages.b: a trains no model"),
        ("{a: {run: x, generation: {greedy: true}}}", "stages.a.generation: has no effect beside run"),
        ("{a: {run: x, bos: true}}", "stages.a.bos: has no effect beside run"),
        ("{a: {run: x}, b: {evaluate: a, data: [y], teacher: a}}", "stages.b.teacher: has no effect beside evaluate"),
        ("{a: {run: x}, b: {evaluate: a, data: [y], bos: 1}}", "stages.b.bos: true or false is expected, got 1"),
        ("{a: {run: x}, b: {evaluate: a, data: [y], precision: fp16}}", "stages.b.precision: unknown value 'fp16'; "),
        ("{a: {run: x}, b: {evaluate: a, data: [y], processes: 0}}", "stages.b.processes: must be above 0, got 0"),
        ("{a: {run: x}, b: {evaluate: a, data: [y], hours: 0}}", "stages.b.hours: must be above 0, got 0"),
        ("{a: {run: x}, b: {evaluate: a, data: [y], seeds: []}}", "stages.b.seeds: different whole numbers from 0 to "),
        ("{a: {run: x}, b: {evaluate: a, data: [y], seeds: [1, 1]}}", "stages.b.seeds: different whole numbers from 0"),
        (
            "{a: {run: x}, b: {evaluate: a, data: [y], generation: {temperature: 0}}}",
            "stages.b.generation.temperature: must be above 0, got 0",
        ),
        (
            "{a: {run: x}, b: {evaluate: a, data: [y], generation: {tempratur: 2}}}",
            "stages.b.generation.tempratur: unknown key; allowed: ",
        ),
        (
            "{a: {run: x}, b: {evaluate: a, data: [y], options: [--tempratur, '2']}}",
            "stages.b.options: are settings now: generation (greedy, temperature, ",
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path, stages, expected):
    with pytest.raises(UserError) as error:
        read(tmp_path, f"stages: {stages}\n")
    assert str(error.value).startswith(f"{tmp_path}/pipeline.yaml: {expected}")
