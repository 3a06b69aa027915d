"""The image that the project's own Dockerfile builds: what is in it, and runs that end, stop, are killed, go on."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import pytest

from dskd.launch.container import engine_command

pytestmark = pytest.mark.image
ROOT = Path(__file__).resolve().parents[2]
USER = 1000
TIMES = ("seconds", "tokens_per_second")
# A driver as the NVIDIA runtime would put it into a container: its version, and the GPUs that it sees.
DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuDeviceGetCount(int *count) { *count = GPUS; return 0; }
"""


@pytest.fixture(scope="module")
def long_run(make_run, tmp_path_factory):
    """`long_run()` writes a run of 60 steps on two ranks into a folder of its own: the run file."""

    def make() -> Path:
        sections = {
            "train": {"epochs": 12},
            "eval": {"every_epochs": 6},
            "checkpoint": {"every_steps": 5},
            "launch": {"processes": 2},
            "data": {"workers": 1},
        }
        return make_run(tmp_path_factory.mktemp("run"), **sections)

    return make


@pytest.fixture(scope="module")
def uninterrupted(engine, train, long_run):
    file = long_run()
    done = engine(*train(file))
    assert "finished" in done.stderr
    return file


def directory(run_file: Path) -> Path:
    return run_file.parent / "outputs" / "llama-pieces-untied" / "dskd_cma" / "default"


def steps(run_file: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, without those that tell the time."""
    file = directory(run_file) / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def start_and_end(engine, command, run_file: Path, *end: str) -> int:
    """Start a training, end it by docker's command `end` after some steps; the container's exit code."""
    name = f"dskd-test-{run_file.parent.name}"
    run, _, *rest = command
    engine(run, "--detach", f"--name={name}", *rest)
    try:
        deadline = time.monotonic() + 180
        while len(steps(run_file)) < 12:
            running = engine("inspect", "--format={{.State.Running}}", name).stdout.strip() == "true"
            assert running, engine("logs", name).stderr
            assert time.monotonic() < deadline, engine("logs", name).stderr
        started = time.monotonic()
        engine(*end, name)
        code = int(engine("wait", name).stdout)
        print(f"\n{' '.join(end)}: exit code {code} after {time.monotonic() - started:.1f} s", file=sys.stderr)
        return code
    finally:
        engine("rm", "--force", name)


def test_build_time_and_size(engine, image):
    size = int(engine("image", "inspect", "--format={{.Size}}", image.name).stdout)
    print(f"\nimage {size / 1e9:.2f} GB, built in {image.seconds:.0f} s", file=sys.stderr)
    assert size < 2.5e9  # without CUDA


def test_labels_user_and_entry(engine, image):
    (found,) = json.loads(engine("image", "inspect", image.name).stdout)
    labels, config = found["Config"]["Labels"], found["Config"]
    assert labels["org.opencontainers.image.version"] == "1.2.3"
    assert labels["org.opencontainers.image.revision"] == "abc"
    assert config["User"] == f"{USER}:{USER}"
    assert all(word.startswith(("/", "-")) for word in config["Entrypoint"])


def test_nothing_of_the_build_is_left(engine, image):
    program = """
    command -v c++ nvcc pip git && exit 1
    ls -d /opt/tools /opt/wheels /source /root/.cache /install && exit 1
    find / -xdev -name .git -o -name '*.whl' -o -name '*.deb' -o -path '/var/lib/apt/lists/*_*' | grep . && exit 1
    ls /opt/dskd/jobs/quickstart/sft.yaml /opt/dskd/sbom.cdx.json
    """
    done = engine("run", "--rm", "--network=none", "--user=0", image.name, "sh", "-c", program, check=False)
    assert done.returncode == 0, done.stdout


def test_what_triton_compiles_with_at_first_use_is_there_and_loads(engine, image):
    program = """
    printf '#include <Python.h>\\nint launch(void) { return 0; }\\n' >/tmp/launch.c
    headers=$(python -c 'import sysconfig; print(sysconfig.get_paths(scheme="posix_prefix")["include"])')
    gcc -shared -fPIC "-I$headers" /tmp/launch.c -o /tmp/launch.so
    python -c 'import ctypes; ctypes.CDLL("/tmp/launch.so")'
    """
    _, *command = engine_command("docker", image.name, [], ["--network=none"], ["sh", "-ec", program])
    done = engine(*command, check=False)
    assert done.returncode == 0, done.stderr


def test_the_bill_of_materials_is_complete(engine, image):
    bill = json.loads(engine("run", "--rm", image.name, "cat", "/opt/dskd/sbom.cdx.json").stdout)
    program = "ls -d /opt/dskd/lib/python3*/site-packages/*-info; dpkg-query -W"
    lines = engine("run", "--rm", image.name, "sh", "-c", program).stdout.splitlines()
    packages = {Path(line).name.partition("-")[0].replace(".", "_").lower() for line in lines if line.startswith("/")}
    system = {line.split()[0].partition(":")[0] for line in lines if not line.startswith("/")}
    references = {unquote(c["purl"].partition("@")[0]) for c in [*bill["components"], bill["metadata"]["component"]]}
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert {"torch", "deepspeed", "dskd"} < packages
    assert {f"pkg:pypi/{name.replace('_', '-')}" for name in packages} == {
        reference.replace(".", "-") for reference in references if reference.startswith("pkg:pypi/")
    }
    assert {f"pkg:deb/debian/{name}" for name in system} == {r for r in references if r.startswith("pkg:deb/")}


def test_a_change_of_the_source_rebuilds_quickly_and_no_secret_comes_along(engine, image, tmp_path):
    source, secret = tmp_path / "source", "hf_dskdTESTsecret0123456789"
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in kept:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    for name in (".env", ".netrc", ".git/config", "outputs/run/train.log", "docker/.env", "dskd/.env", "jobs/.env"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"HF_TOKEN={secret}\n")
    (source / "dskd" / "start.py").open("a").write("# changed\n")
    started = time.monotonic()
    engine("build", "--network=host", *image.base, "--tag=dskd:changed", source)
    seconds = time.monotonic() - started
    print(f"\nrebuilt after a change of the source in {seconds:.1f} s", file=sys.stderr)
    engine("save", "--output", tmp_path / "image.tar", "dskd:changed")
    # The layers lie uncompressed in the archive, and their files uncompressed in them.
    with (tmp_path / "image.tar").open("rb") as archive:
        blocks = iter(lambda: archive.read(2**24), b"")
        tail, changed = b"", False
        for block in blocks:
            assert secret.encode() not in tail + block
            changed |= b"# changed\n" in tail + block
            tail = block[-100:]
    assert changed  # what is searched for would be found
    assert secret not in engine("history", "--no-trunc", "dskd:changed").stdout
    assert seconds < 30


def test_help_answers_at_once(engine, image):
    tries = []
    for _ in range(3):  # the first one also reads the image from the disk
        started = time.monotonic()
        done = engine("run", "--rm", "--network=none", image.name, "--help")
        tries.append(time.monotonic() - started)
        assert "train" in done.stdout
    print(f"\n--help in {', '.join(f'{seconds:.1f}' for seconds in tries)} s", file=sys.stderr)
    assert min(tries) < 3


def test_a_training_ends_and_its_files_belong_to_the_caller(uninterrupted):
    files = list(directory(uninterrupted).rglob("*"))
    assert any(file.name == "model.safetensors" for file in files)
    assert {(file.stat().st_uid, file.stat().st_gid) for file in files} == {(USER, USER)}
    assert [line["step"] for line in steps(uninterrupted) if "loss" in line] == list(range(1, 61))
    assert json.loads((directory(uninterrupted) / "args.json").read_text())["git"] == "abc"


def test_a_stopped_training_goes_on_bit_identically(engine, train, long_run, uninterrupted):
    file = long_run()
    assert start_and_end(engine, train(file), file, "stop", "--time=60") == 75
    assert len(steps(file)) < len(steps(uninterrupted))
    engine(*train(file))
    assert steps(file) == steps(uninterrupted)


def test_a_killed_training_goes_on(engine, train, long_run, uninterrupted):
    file = long_run()
    assert start_and_end(engine, train(file), file, "kill", "--signal=KILL") == 128 + signal.SIGKILL
    engine(*train(file))
    assert steps(file) == steps(uninterrupted)


def test_the_composed_command_trains_from_a_relative_path_and_resumes(engine, image, make_run, tmp_path):
    file = make_run(tmp_path, train={"max_steps": 2}, launch={"processes": 1})
    command = [sys.executable, ROOT / "docker" / "run", "--gpus=none", f"--image={image.name}"]
    subprocess.run([*command, "train", file.name, "train.lr=1e-4"], cwd=tmp_path, check=True)
    saved = [folder.name for folder in directory(file).glob("epoch*")]
    assert len(saved) == 1
    subprocess.run([*command, "resume", directory(file), "train.max_steps=2"], cwd=tmp_path, check=True)
    assert [folder.name for folder in directory(file).glob("epoch*")] == saved
    records = (
        "--data",
        tmp_path / "dev.jsonl",
        "--processes=1",
        "--seeds=1",
        "--max-length=40",
        "--max-prompt-length=32",
    )
    model = directory(file) / saved[0]
    subprocess.run([*command, "evaluate", model, *records], cwd=tmp_path, check=True)
    assert (model / "eval" / "dev" / "results.json").is_file()


def test_any_user_any_folder_and_no_home_will_do(engine, train, make_run, tmp_path):
    file = make_run(tmp_path, train={"max_steps": 1}, launch={"processes": 1})
    engine(*train(file, "--workdir=/proc", "--env=HOME=/nonexistent", "--tmpfs=/tmp", user=4321))
    assert {path.stat().st_uid for path in directory(file).rglob("*")} == {4321}


def test_another_program_runs_instead(engine, image):
    assert engine("run", "--rm", image.name, "python", "-c", "print(6 * 7)").stdout == "42\n"
    assert engine("run", "--rm", image.name, "bash", "-c", "exit 3", check=False).returncode == 3


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """`driver(version, gpus)`: flags of docker that put such an NVIDIA driver into a container."""

    def make(version: int, gpus: int) -> tuple[str, str]:
        folder = tmp_path_factory.mktemp("driver")
        (folder / "driver.c").write_text(DRIVER)
        defined = (f"-DVERSION={version}", f"-DGPUS={gpus}")
        command = ["cc", "-shared", "-fPIC", *defined, "-o", folder / "libcuda.so.1", folder / "driver.c"]
        subprocess.run(command, check=True)
        folder.chmod(0o755)
        return f"--volume={folder}:/driver:ro", "--env=LD_LIBRARY_PATH=/driver"

    return make


@pytest.fixture(scope="module")
def said(engine, train):
    """`said(run_file, *flags, overrides=())`: code and lines of a training that fails, at the latest by its data."""

    def run(run_file: Path, *flags: str, overrides: tuple[str, ...] = ()) -> tuple[int, list[str]]:
        done = engine(*train(run_file, *flags), "data.train=/none", *overrides, check=False, timeout=60)
        return done.returncode, [line for line in done.stderr.splitlines() if "data.train" not in line]

    return run


def test_no_gpu(said, make_run, tmp_path):
    file = make_run(tmp_path, launch={"processes": None})
    code, (line,) = said(file, "--shm-size=1g")
    assert code == 2
    assert line.startswith("dskd: no GPU is visible in this container: start it with --gpus all, or set launch.proc")


def test_an_old_driver(said, driver, make_run, tmp_path):
    (tmp_path / "cuda-version").write_text("13.0\n")
    file = make_run(tmp_path, launch={"processes": None})
    mount = f"--volume={tmp_path}/cuda-version:/opt/dskd/cuda-version:ro"
    code, (line,) = said(file, "--shm-size=1g", mount, *driver(12040, 1))
    assert code == 2
    assert line.startswith("dskd: the NVIDIA driver is too old: it runs CUDA 12.4, and this image needs CUDA 13.0")


def test_fewer_gpus_than_processes(said, driver, make_run, tmp_path):
    file = make_run(tmp_path, launch={"processes": 4})
    code, lines = said(file, "--shm-size=1g", "--ulimit=memlock=65536:65536", *driver(13000, 2))
    assert code == 2
    assert lines[-1] == "dskd: launch.processes: 4, but 2 GPU(s) are visible in this container"


def test_small_shared_memory(said, make_run, tmp_path):
    file = make_run(tmp_path, launch={"processes": 2}, data={"workers": 1})
    _, lines = said(file, "--shm-size=64m")
    assert lines == [
        "dskd: warning: /dev/shm has 64 MiB, and 2 rank(s) with 1 worker(s) each may need 256 MiB: "
        "start with --shm-size 8g or --ipc host"
    ]
    assert said(file, "--shm-size=256m")[1] == []


def test_little_locked_memory(said, driver, make_run, tmp_path):
    file = make_run(tmp_path, launch={"processes": 2})
    _, lines = said(file, "--shm-size=1g", "--ulimit=memlock=65536:65536", *driver(13000, 2))
    assert lines == [
        "dskd: warning: memlock is limited to 64 KiB, which NCCL may exceed: start with --ulimit memlock=-1"
    ]


def test_a_mount_that_the_user_cannot_write(said, make_run, tmp_path):
    file = make_run(tmp_path)
    tmp_path.chmod(0o755)
    code, (line,) = said(file, "--user=4321:4321")
    assert code == 2
    assert line.startswith(
        f"dskd: {directory(file)}: cannot be written by user 4321:4321 (Permission denied): mount a "
    )
    code, lines = said(file, overrides=("output.root=/elsewhere",))
    assert code == 2
    assert "(Read-only file system)" in lines[-1]


def test_output_on_no_mount(engine, image, train, make_run, tmp_path):
    command = [word for word in train(make_run(tmp_path)) if word not in ("--read-only", f"--user={USER}:{USER}")]
    done = engine(*command, "data.train=/none", "output.root=/tmp/lost", check=False, timeout=60)
    assert "dskd: warning: /tmp/lost/" in done.stderr
    assert "vanishes with this container" in done.stderr
