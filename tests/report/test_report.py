"""Reports: what stands in their tables, that nothing of a run is taken for more than text, and what is refused."""

import json
import re
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.run_directories import Maker, write_evaluation

from dskd.cli import main
from dskd.config.errors import UserError
from dskd.report.write import write_report

GOLDEN = Path(__file__).parents[1] / "golden" / "run_format_1" / "outputs" / "student" / "dskd_cma" / "cut"
BAD = 'x</p></td><script>alert(1)</script><img src=x onerror="alert(2)">|**\x00\u202e`\ud800'


@pytest.fixture
def maker(tmp_path):
    return Maker(tmp_path / "made")


class Page(HTMLParser):
    """A page's tables as rows of texts, its tags, and the attributes that could run or load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.bold: list[str] = []
        self.tags: set[str] = set()
        self.active: list[str] = []
        self.cell = self.is_bold = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.active += [f"{tag} {name}" for name, value in attrs if name.startswith("on") or name in ("src", "srcset")]
        self.active += [f"{tag} {name}={value}" for name, value in attrs if name == "href" and value[:1] != "#"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell, self.is_bold = True, "best" in (dict(attrs).get("class") or "")
        elif tag == "small":
            self.tables[-1][-1][-1] += " / "

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = False

    def handle_data(self, data):
        if self.cell:
            self.tables[-1][-1][-1] += data
            if self.is_bold:
                self.bold.append(data)

    def table(self, head: str) -> list[list[str]]:
        return next(table for table in self.tables if table[0][0] == head)


def made(tmp_path: Path, runs: list[Path], *more: str | None) -> tuple[Page, str]:
    out, beside = write_report(runs, tmp_path / "report.html", *(more or (None, None)))
    return Page(out.read_text(encoding="utf-8")), beside.read_text(encoding="utf-8")


@pytest.fixture
def experiment(maker):
    """sft and dskd_cma, two training seeds each, on two sets with two sampling seeds."""
    runs = [maker(kind, seed) for kind in ("dskd_cma", "sft") for seed in (10, 20)]
    for number, run in enumerate(runs):
        better = 8.0 if "dskd_cma" in run.parts else 0.0
        for name in ("dolly", "vicuna"):
            scores = {seed: [10.0 + i % 5 + better + number + seed / 10 for i in range(20)] for seed in (1, 2)}
            write_evaluation(run, name, scores)
    return runs


def test_scores_over_training_and_sampling_seeds_with_the_best_in_bold(tmp_path, experiment):
    page, text = made(tmp_path, experiment)
    head, sft, cma = page.table("ROUGE-L")
    assert head == ["ROUGE-L", "seeds", "dolly", "vicuna", "average"]
    scores = [12.0 + number + seed / 10 for number in (2, 3) for seed in (1, 2)]
    expected = f"{statistics.fmean(scores):.2f} ± {statistics.stdev(scores):.2f}"
    assert sft == ["sft", "2 × 2", *[f"{expected} / training 0.71, sampling 0.07"] * 3]
    assert cma[:2] == ["dskd_cma", "2 × 2"]
    assert all(cell.startswith("20.65 ± ") for cell in cma[2:])
    assert page.bold.count("20.65 ± 0.58") == 3
    assert "| dskd\\_cma | 2 × 2 | **20.65 ± 0.58** (training 0.71, sampling 0.07) |" in text


def test_differences_to_the_baseline_are_paired_by_record(tmp_path, experiment):
    page, _ = made(tmp_path, experiment)
    (row,) = next(table for table in page.tables if table[1][0] == "dskd_cma − sft")[1:]
    assert row[1:3] == ["+6.00 / +6.00 to +6.00"] * 2  # every record differs by 6, so the interval has no width
    assert row[3] == "+6.00 / 10.3 deviations"
    page, _ = made(tmp_path, experiment, "dskd_cma", None)
    assert page.table("ROUGE-L")[1][0] == "dskd_cma"
    assert [table for table in page.tables if table[1][0] == "sft − dskd_cma"]


def test_runs_that_differ_in_more_than_the_seed_are_groups_of_their_own(tmp_path, maker):
    runs = [maker("kd", name=f"rate{rate}", method={"kind": "kd", "kd_rate": rate}) for rate in (0.3, 0.7)]
    runs.append(maker("kd", 30, name="other", method={"kind": "kd", "kd_rate": 0.3}, eval={"generate": True}))
    page, _ = made(tmp_path, runs)
    settings = {row[0]: row[1:] for row in page.table("setting")}
    assert settings["setting"] == ["kd kd_rate=0.3", "kd kd_rate=0.7"]
    assert settings["train.seed"] == ["10 · 30", "10"]
    assert settings["method.kd_rate"] == ["0.3", "0.7"]
    assert settings["eval.generate"] == ["False · True", "False"]
    assert set(settings) == {"setting", "train.seed", "method.kd_rate", "eval.generate"}


def test_models_of_runs_are_named_where_they_differ(tmp_path, maker):
    runs = [maker("sft", name=name, student={"path": f"/models/{name}"}) for name in ("small", "large")]
    page, _ = made(tmp_path, runs)
    assert [row[1] for row in page.table("run")[1:]] == ["sft small / seed 10", "sft large / seed 10"]


def test_a_teacher_s_scores_stand_beside_and_compete_with_none(tmp_path, experiment):
    teacher = tmp_path / "qwen"
    (teacher / "best").mkdir(parents=True)
    write_evaluation(teacher, "dolly", {1: [90.0] * 20}, ["The teacher's answer."])
    page, text = made(tmp_path, [*experiment, teacher / "best", tmp_path])
    assert [row[0] for row in page.table("ROUGE-L")] == ["ROUGE-L", "best", "sft", "dskd_cma"]
    assert page.table("ROUGE-L")[1][1:] == ["1 × 1", "90.00", "–", "–"]
    assert "90.00" not in page.bold
    assert "The teacher's answer." in text


def test_the_best_model_of_a_run_has_the_name_of_its_student(tmp_path, maker):
    teachers = [{"path": f"/outputs/{name}/sft/default/best"} for name in ("qwen", "llama")]
    page, _ = made(tmp_path, [maker("kd", name=t["path"].split("/")[2], teacher=t) for t in teachers])
    assert [row[1] for row in page.table("run")[1:]] == ["kd from qwen / seed 10", "kd from llama / seed 10"]


def test_evaluations_of_single_seeds_in_a_run_directory_count_too(tmp_path, maker):
    run = maker("sft")
    for seed in (1, 2):
        folder = write_evaluation(run, f"seed{seed}", {seed: [float(seed)] * 4})
        shutil.move(folder, run / "eval" / "dolly" / f"seed{seed}")
    page, _ = made(tmp_path, [run])
    assert page.table("ROUGE-L")[:2] == [["ROUGE-L", "seeds", "dolly"], ["sft", "1 × 2", "1.50 ± 0.71"]]


def test_other_metrics_have_tables_of_their_own(tmp_path, experiment):
    """Such as a judge's scores in the same file, and a set that has accuracy and no answers."""
    for run in experiment:
        file = next(run.glob("epoch*/eval/dolly/results.json"))
        file.write_text(json.dumps(json.loads(file.read_text()) | {"judge": {"by_seed": [6.0, 7.0], "model": "m"}}))
        task = file.parents[1] / "lm-eval" / "arc"
        task.mkdir(parents=True)
        (task / "results.json").write_text(json.dumps({"records": 9, "seeds": [0], "acc": {"by_seed": [0.5]}}))
    page, text = made(tmp_path, experiment)
    assert page.table("Judge, 1 to 10")[1:] == [[name, "2 × 2", "6.50 ± 0.58 / training 0.00, sampling 0.71"]
                                                for name in ("sft", "dskd_cma")]  # fmt: skip
    assert page.table("acc")[:2] == [["acc", "seeds", "lm-eval/arc"], ["sft", "2 × 1", "0.50 ± 0.00"]]
    assert page.table("ROUGE-L")[0] == ["ROUGE-L", "seeds", "dolly", "vicuna", "average"]
    assert "Highest ROUGE-L over 2 sets: dskd\\_cma" in text


def test_greedy_answers_are_not_mixed_with_sampled_ones(tmp_path, maker):
    run = maker("sft")
    write_evaluation(run, "dolly", {1: [1.0, 2.0]})
    folder = write_evaluation(run, "other", {1: [5.0, 6.0]}, greedy=True)
    shutil.move(folder, run / "eval" / "dolly")
    page, _ = made(tmp_path, [run])
    assert page.table("ROUGE-L")[0] == ["ROUGE-L", "seeds", "dolly", "dolly (greedy)", "average"]


def test_published_averages_stand_beside_with_their_sources(tmp_path, experiment):
    page, text = made(tmp_path, experiment, None, "paper")
    table = page.table("ROUGE-L, average")
    assert "arXiv 2406.17328" in table[0][2]
    rows = {row[0].split(" / ")[0]: row[2:] for row in table}
    assert rows["dskd_cma"] == ["18.02", "16.68", "23.54"]
    assert rows["mined"] == ["17.46", "16.40", "23.05"]
    assert "arXiv 2602.21669" in text


def test_restarts_are_marked_in_curves_and_listed(tmp_path, maker):
    run = maker("sft")
    (run / "train.log").write_text("2026-01-01 00:00:00,000 going on after step 7\n")
    shutil.copytree(GOLDEN / "job", run / "job")
    page, _ = made(tmp_path, [run])
    assert page.table("restarted run")[1:] == [
        ["student/sft/seed10", "6", "preempted"],
        ["student/sft/seed10", "7", "–"],
    ]
    html = (tmp_path / "report.html").read_text()
    assert html.count("started again after step 7</title>") == html.count("started again after step 6</title>") > 5


def test_the_same_records_are_answered_side_by_side(tmp_path, maker):
    runs = [maker(kind) for kind in ("sft", "uld")]
    for run, word in zip(runs, ("apple", "pear"), strict=True):
        write_evaluation(run, "dolly", {1: [5.0] * 9}, [f"{word} {i}" for i in range(9)])
    _, text = made(tmp_path, runs)
    parts = text.split("**dolly, record ")[1:]
    assert [part.split("**")[0] for part in parts] == ["1", "4", "7"]
    for number, part in zip((1, 4, 7), parts, strict=True):
        assert f"| prompt |  | dolly question {number}? |" in part
        assert f"| sft | 5.00 | apple {number} |" in part
        assert f"| uld | 5.00 | pear {number} |" in part


def test_nothing_of_a_run_is_taken_for_more_than_text(tmp_path, maker):
    name = "</h2><script>alert(0)<"
    run = maker("sft", name="a<b>&\"'|`", student={"path": "/models/<svg onload=alert(3)>"})
    run.joinpath("train.log").write_bytes(b"\xff going on after step 3\n")
    with run.joinpath("metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": 21, BAD: 1.0, "seconds": 1, "tokens_per_second": 1}) + "\n")
        metrics.write('{"step": NaN, "seconds": 1, "tokens_per_second": Infinity, "loss": 1e999}\n[[[\n')
    folder = write_evaluation(run, "set", {1: [1.0] * 4}, [BAD])
    shutil.move(folder, folder.with_name(name.replace("/", "")))
    (run / "args.json").write_text(json.dumps({"versions": {BAD: BAD}}))
    page, text = made(tmp_path, [run, maker("kd")], None, "paper")
    assert page.active == []
    assert page.tags.isdisjoint({"script", "img", "iframe", "object", "link"})
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "alert(1)&lt;/script&gt;" in html
    assert not re.search(r"[\x00-\x08\u202e\ud800]", html)
    assert "default-src 'none'" in html
    assert not re.search(r"<(?!!-- dskd report -->)", text)
    lines = [line for line in text.splitlines() if "alert" in line]
    assert lines
    for line in lines:
        assert "<script" not in line


def test_a_run_of_the_first_format_is_shown(tmp_path):
    run = tmp_path / "outputs" / "student" / "dskd_cma" / "cut"
    shutil.copytree(GOLDEN, run)
    page, _ = made(tmp_path, [run])
    assert page.table("run")[1][:3] == ["student/dskd_cma/cut", "dskd_cma / seed 10", "6"]
    assert page.table("restarted run")[1][1:] == ["6", "preempted"]


def test_a_run_that_has_not_begun_is_shown_as_one(tmp_path, maker):
    run = maker("sft", steps=1)
    (run / "metrics.jsonl").unlink()
    page, text = made(tmp_path, [run])
    assert page.table("run")[1][:3] == ["student/sft/seed10", "sft / seed 10", "0"]
    assert "No evaluation of these runs is finished yet" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["RUN", "--out", "report.txt"], "--out: a name that ends in .html is expected, got report.txt"),
        (["RUN", "--out", "other.html"], "--out: other.html is there and is no report; choose another name"),
        (["RUN", "--out", "notes.html"], "--out: notes.md is there and is no report; choose another name"),
        (["RUN", "--baseline", "mined"], "--baseline: 'mined' is none of the runs; allowed: sft, or one of the"),
        (["RUN", "--compare", "papers"], "--compare: allowed: paper; got 'papers'"),
        (["none"], "none: no run.yaml: a run directory is expected"),
        ([], "Missing argument 'RUN_DIR...'"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, maker, monkeypatch, capsys, arguments, words):
    run = maker("sft")
    monkeypatch.chdir(tmp_path)
    Path("other.html").write_text("<html>mine</html>")
    Path("notes.md").write_text("mine")
    monkeypatch.setattr("sys.argv", ["dskd", "report", *(str(run) if a == "RUN" else a for a in arguments)])
    monkeypatch.setattr("dskd.cli.leave", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert words in capsys.readouterr().err
    assert Path("other.html").read_text() == "<html>mine</html>"
    assert not Path("report.html").exists()


def test_damaged_scores_are_told(tmp_path, maker):
    run = maker("sft")
    folder = write_evaluation(run, "dolly", {1: [1.0]})
    for score in ('"much"', "1e308", "NaN"):
        text = f'{{"seeds": [1], "records": 1, "rougel": {{"by_seed": [{score}]}}}}'
        (folder / "results.json").write_text(text)
        with pytest.raises(UserError, match=r"results\.json: is damaged: no scores by seed in it"):
            made(tmp_path, [run])


def test_a_report_is_written_again(tmp_path, maker):
    run = maker("sft")
    first = made(tmp_path, [run])[1]
    assert made(tmp_path, [run, run.parent / ".." / "sft" / run.name])[1] == first
