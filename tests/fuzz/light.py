"""What is read without torch: run files, overrides, profiles, pipelines, records, and a run directory's files."""

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from dskd.config.cluster import ClusterConfig
from dskd.config.load import load, load_run, parse_yaml, to_yaml
from dskd.config.run import RunConfig, check_model_folder
from dskd.data.records import check_records, read_records
from dskd.launch.pipeline import read_pipeline
from dskd.launch.request import Request, train_request
from dskd.launch.submit import batch_executor
from dskd.rundir import lock
from dskd.rundir.collect import collect, read_index
from dskd.rundir.files import read_manifest
from dskd.rundir.jobs import Job, Jobs, Meeting, Start
from dskd.rundir.layout import RunDirectory, StateName
from dskd.rundir.read import newest_state, read_evaluations, read_length, read_rougel, read_steps
from dskd.rundir.train_state import SavedModel, Scores, TrainState, read_state
from fuzz.mutations import of_bytes, of_json, of_json_lines, of_texts, of_yaml
from fuzz.reports import report_targets
from fuzz.run import Harm, Target, check_script

RUN = b"""\
student: {path: /m/student, lora: {rank: 4, targets: [q_proj, v_proj]}}
teacher: {path: /m/teacher, adapter: /m/adapter}
data: {train: /d/train.jsonl, dev: /d/dev.jsonl, workers: 2, cache_dir: /cache}
method: {kind: dskd_cma, temperature: 2.0, kd_rate: 0.5, projectors_from: /m/first}
train: {epochs: 3, lr: 5.0e-4, schedule: linear, seed: 7, max_steps: 100, global_batch_size: 32}
eval: {generate: true, generation: {top_p: 0.9, batch_size: 4}}
checkpoint: {keep_best: 2, best_by: rougel, every_minutes: 5}
engine: {zero_stage: 3, offload: all, precision: bf16}
launch: {processes: 4, nodes: 2, hours: 1.5}
output: {root: /o, name: first}
description: A run.
"""
SHORT = b"student: &s {path: /m/s}\nteacher: {path: /m/t}\ndata: {train: /d/a, dev: /d/a}\nmethod: {kind: kd}\n"
EXTENDS = b"""\
extends: ./plain.yaml
train: {lr: 1, clip: 0.5, schedule: constant}
student: {lora: {targets: [k_proj], alpha: 2}}
method: {kind: sft, label_smoothing: 0.1}
data: {bos: true}
output: {name: second}
description: Another.
"""
PROFILE = b"""\
description: A cluster
partition: gpu
account: my-project
qos: normal
constraint: a100
sbatch: {mail-type: FAIL, comment: some words}
gpus_per_node: 4
cpus_per_node: 48
memory_gb: 500
hours: 12
signal_seconds: 600
scratch: /tmp
modules: [cuda, python]
environment: {NCCL_DEBUG: WARN, TOKEN: some words}
"""
CONTAINER = b"""\
gpus_per_node: 2
environment: {NCCL_DEBUG: WARN}
container:
  {runtime: RUNTIME, image: registry/dskd, mounts: [/a, "/b:/c:ro"], arguments: [--shm-size=16g], command: [dskd]}
"""
PIPELINE = b"""\
stages:
  teacher: {run: stage.yaml, settings: [train.lr=1e-4, train.seed=3, method.kind=sft]}
  student: {run: stage.yaml, teacher: teacher, hours: null}
  texts: {generate: {data: d.jsonl, out: t.jsonl, seed: 4, whole: true}, teacher: teacher, shards: 2, bos: true}
  near: {analyze: student, records: 9, precision: fp32}
  scores: {evaluate: student, data: [d.jsonl, ./e.jsonl], seeds: [1, 2], hours: 1, parallel: 3, after: [teacher]}
description: Five stages.
"""
OVERRIDES = (
    b"train.lr=1e-4",
    b"output.name=first",
    b"student.lora.targets=[q_proj]",
    b"method={kind: sft}",
    b"data.bos=true",
)
RECORDS = b"""\
{"prompt": "Where is Lima?", "output": "By the sea."}
{"prompt": "", "output": ["\\u00e9\\ud83d\\ude00", "b"], "id": 7}
{"output": "o", "prompt": "p"}
"""
JOB = Job("local", ("python", "-m", "dskd", "train", "run.yaml"), 2, 4, 60, 300, 50, "12_3", 1.5)
STATE = TrainState(900, False, (SavedModel("epoch1_step900_loss2.5000", Scores(2.5, 0.4, 24.5, 3.0)),), 1234, False)


def data(values: Any) -> bytes:
    return json.dumps(values).encode()


def light_targets(folder: Path) -> list[Target]:
    """Targets that work in `folder`."""

    def into(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)

        def written(content: bytes) -> object:
            file.write_bytes(content)
            return read(file)

        return written

    (folder / "plain.yaml").write_bytes(RUN)
    directory = RunDirectory(folder / "run")
    jobs, state = Jobs(directory), directory.state(StateName(900))
    return [
        Target("run file", [RUN, SHORT], of_yaml, into("run.yaml", lambda file: to_yaml(load_run(file)))),
        Target(
            "extends",
            [EXTENDS, EXTENDS.replace(b"lr", b"seed")],
            of_yaml,
            into("a.yaml", load_run),
        ),
        Target("override", OVERRIDES, of_bytes, lambda text: overridden(folder / "plain.yaml", text)),
        Target(
            "profile",
            [PROFILE, *containers()],
            of_yaml,
            into("profile.yaml", lambda f: to_yaml(load(f, ClusterConfig))),
        ),
        Target("pipeline", [PIPELINE], of_yaml, into("pipeline.yaml", stages_of)),
        Target("script", scripts(folder), of_texts, lambda content: script_of(folder, content)),
        Target(
            "records",
            [RECORDS],
            of_json_lines,
            into("r.jsonl", lambda file: [check_records(file), *read_records(file)]),
        ),
        Target(
            "model folder", [b'{"hidden_size": 8}'], of_json, into("m/config.json", lambda f: check_folder(f.parent))
        ),
        Target(
            "manifest",
            [manifest_text()],
            of_json,
            into("model/MANIFEST.json", lambda f: read_manifest(f.parent)),
            ValueError,
        ),
        Target(
            "state",
            [data({"format": 1, "world_size": 2} | STATE.to_json())],
            of_json,
            into(f"{state.relative_to(folder)}/state.json", lambda f: read_state(f.parent)),
        ),
        Target(
            "LATEST",
            [b"step900\n", b"step900-before-evaluation\n"],
            of_bytes,
            into(str(directory.latest.relative_to(folder)), lambda _: newest_state(directory)),
        ),
        Target(
            "args.json",
            [data({"length": {"total_steps": 90, "steps_per_epoch": 9}})],
            of_json,
            into("run/args.json", lambda _: read_length(directory)),
        ),
        Target(
            "metrics",
            [b'{"step": 1, "tokens_per_second": 2.5, "seconds": 1.0}\n{"step": 1, "dev_loss": 2.5}\n'],
            of_json_lines,
            into("run/metrics.jsonl", lambda _: (read_steps(directory), read_evaluations(directory))),
        ),
        Target(
            "results",
            [data({"rougel": {"mean": 24.5}})],
            of_json,
            into("run/results.json", lambda file: read_rougel(file.parent)),
        ),
        Target("job.json", [data(asdict(JOB))], of_json, into("run/job/job.json", lambda _: jobs.read())),
        Target("starts", [starts()], of_json_lines, into("run/job/starts.jsonl", lambda _: jobs.starts())),
        Target(
            "ending", [data({"again": True, "reason": "a"})], of_json, into("run/job/ending", lambda _: jobs.ending())
        ),
        Target(
            "meeting", [data(asdict(Meeting(1, "s")))], of_json, into("run/job/meeting.json", lambda _: jobs.meeting())
        ),
        Target("holder", [data({"host": "h", "pid": 1, "beat": 2})], of_json, into("run/.lock/holder", lock.read)),
        Target("index", [index()], of_json, into("all/index.json", lambda file: read_index(file.parent))),
        Target("collect", [manifest_text()], of_json, lambda content: collected(folder, content)),
        *report_targets(folder / "report", folder / "plain.yaml"),
    ]


def containers() -> list[bytes]:
    return [CONTAINER.replace(b"RUNTIME", runtime) for runtime in (b"docker", b"podman", b"apptainer", b"pyxis")]


def overridden(file: Path, text: bytes) -> RunConfig:
    """As typed: the command line gives what is no UTF-8 as surrogates, and no NUL."""
    return load_run(file, [os.fsdecode(text.replace(b"\0", b""))])


def check_folder(folder: Path) -> None:
    (folder / "model.safetensors").touch()
    check_model_folder("student.path", folder)


def manifest_text() -> bytes:
    entry = {"size": 1, "sha256": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"}  # of "a"
    return data({"config.json": entry, "model.safetensors": entry, "sub/x.json": entry})


def starts() -> bytes:
    start = asdict(Start(1, "12", 1.5, "node[1-2]", "step900"))
    begun = {key: start[key] for key in ("number", "job", "time", "nodes", "state")}
    ended = {"number": 1, "outcome": "again", "reason": "preempted", "ended": 2.5}
    return b"\n".join(map(data, (begun, ended, begun | {"number": 2})))


def index() -> bytes:
    line = {"folder": "s/kd/a/epoch1_step9_loss2.5000", "run": "/o/s/kd/a", "step": 9, "dev_loss": 2.5, "rougel": None}
    return data([line | {"size": 7, "sha256": "0" * 64}])


def collected(folder: Path, content: bytes) -> None:
    """What is gathered from a run directory whose model has this manifest."""
    directory = folder / "student" / "sft" / "a"
    model = directory / "epoch1_step5_loss2.5000"
    for name in ("config.json", "model.safetensors", "sub/x.json"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("a")
    (directory / "run.yaml").touch()
    (model / "MANIFEST.json").write_bytes(content)
    collect([directory], folder / "gathered")


# Batch scripts


def scripts(folder: Path) -> list[bytes]:
    """A run of models that are there, and a profile, as one JSON text."""
    for model in ("student", "teacher"):
        (folder / "models" / model).mkdir(parents=True)
        (folder / "models" / model / "config.json").write_text("{}")
        (folder / "models" / model / "model.safetensors").write_bytes(b"x" * 100)
    (folder / "d.jsonl").write_bytes(RECORDS)
    run = {
        "student": {"path": str(folder / "models" / "student")},
        "teacher": {"path": str(folder / "models" / "teacher")},
        "data": {"train": str(folder / "d.jsonl"), "dev": str(folder / "d.jsonl"), "cache_dir": str(folder / "cache")},
        "method": {"kind": "dskd_cma"},
        "checkpoint": {"scratch_dir": str(folder / "scratch")},
        "output": {"root": str(folder / "outputs"), "name": "first"},
        "description": "words",
    }
    (folder / "stage.yaml").write_text(json.dumps(run))
    (folder / "e.jsonl").write_bytes(RECORDS)
    return [data({"run": run, "profile": parse_yaml(profile)}) for profile in (PROFILE, *containers())]


def stages_of(file: Path) -> None:
    """All jobs of a pipeline, none of which may lie outside of its run's folder."""
    for stage in read_pipeline(file, ClusterConfig(gpus_per_node=2)):
        for request in stage.requests:
            if ".." in request.directory.parts:
                raise Harm(f"a job writes to {request.directory}")
            check_script(script(request, ClusterConfig()), script(plain_job(request), ClusterConfig()))


def script_of(folder: Path, content: bytes) -> None:
    """Write both files, and compare the script with that of plain values."""
    try:
        values = json.loads(content)
        texts = values["run"], values["profile"]
    except (ValueError, KeyError, TypeError, RecursionError):
        texts = content.decode(errors="replace"), PROFILE.decode()
    for name, value in zip(("run", "profile"), texts, strict=True):
        (folder / f"{name}.script.yaml").write_text(
            value if isinstance(value, str) else json.dumps(value), errors="replace"
        )
    run, profile = load_run(folder / "run.script.yaml"), load(folder / "profile.script.yaml", ClusterConfig)
    request = train_request(run, profile)
    check_script(script(request, profile), script(plain_job(request), plain(profile)))
    if shlex.split(shlex.join(request.command)) != list(request.command):
        raise Harm("the command of a rank is not the same in a shell")


def plain_job(request: Request) -> Request:
    return replace(request, name="plain", directory=Path("/plain"))


def script(request: Request, profile: ClusterConfig) -> str:
    folder = RunDirectory(request.directory).job.submitit
    return batch_executor([request], profile, folder, None, ()).script(1)


def plain(settings: Any) -> Any:
    """Settings with every text and path replaced by a plain one, and nothing else."""
    found = {}
    for each in fields(settings):
        value = getattr(settings, each.name)
        if is_dataclass(value):
            found[each.name] = value  # a container stands in the command of a rank, not in the script
        elif isinstance(value, dict):
            found[each.name] = dict.fromkeys(value, "plain")
        elif isinstance(value, tuple):
            found[each.name] = tuple(Path("/plain") if isinstance(v, Path) else "plain" for v in value)
        elif isinstance(value, (str, Path)):
            found[each.name] = type(value)("/plain") if isinstance(value, Path) else "plain"
    return replace(settings, **found)
