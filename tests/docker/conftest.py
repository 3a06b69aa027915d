"""A docker engine, the image built by the project's own Dockerfile, and containers of it.

engine    session fixture: `engine(*arguments)` runs docker; an engine of its own where none answers (needs root).
image     session fixture: the built image; how long it took is in it.
train     session fixture: `train(run_file, *flags)` gives the command of a training container.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
USER = 1000
# A distribution's docker brings BuildKit itself; another one earlier on PATH may need a plug-in for it.
DOCKER = next((path for path in ("/usr/bin/docker", shutil.which("docker")) if path and Path(path).exists()), "docker")

Engine = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """`engine("images")` runs `docker images`; it raises where docker fails, unless check=False."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(DOCKER).parent}:{os.environ['PATH']}")
        patch.setenv("DOCKER_BUILDKIT", "1")
        if docker("info", check=False).returncode == 0:
            yield docker
            return
        folder = Path(tempfile.mkdtemp(prefix="dskd-docker-", dir="/var/tmp"))
        patch.setenv("DOCKER_HOST", f"unix://{folder}/socket")
        options = ["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-masq=false", "--ip-forward=false"]
        roots = [f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--pidfile={folder}/pid"]
        log = (folder / "log").open("w")
        daemon = subprocess.Popen(
            ["dockerd", *options, *roots, "-H", f"unix://{folder}/socket"], stdout=log, stderr=log
        )
        try:
            wait_for(lambda: docker("info", check=False).returncode == 0, 30, (folder / "log").read_text)
            yield docker
        finally:
            daemon.terminate()
            daemon.wait(60)
            log.close()
            shutil.rmtree(folder)


def docker(*arguments: object, check: bool = True, timeout: float = 590) -> subprocess.CompletedProcess[str]:
    command = [DOCKER, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    assert not check or done.returncode == 0, (
        f"{command}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done


def wait_for(condition: Callable[[], bool], seconds: float, explain: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {explain()}"
        time.sleep(0.1)


@dataclass(frozen=True)
class Image:
    name: str
    base: tuple[str, ...]
    """The build arguments."""
    seconds: float
    """The time that the build took."""


def build(engine: Engine, name: str, base: tuple[str, ...], source: Path = ROOT) -> Image:
    started = time.monotonic()
    labels = ("--build-arg=VERSION=1.2.3", "--build-arg=REVISION=abc")
    engine("build", "--network=host", *base, *labels, "--tag", name, source)
    return Image(name, base, time.monotonic() - started)


@pytest.fixture(scope="session")
def image(engine: Engine) -> Image:
    if engine("image", "inspect", "dskd-base:build", check=False).returncode:
        subprocess.run([Path(__file__).with_name("local_base.sh"), "dskd-base"], check=True)
    base = ("--build-arg=BASE_IMAGE=dskd-base:build", "--build-arg=RUNTIME_IMAGE=dskd-base:runtime")
    return build(engine, "dskd:test", base)


@pytest.fixture(scope="session")
def train(image: Image, tiny) -> Callable[..., list[str]]:
    """`train(run_file, *flags, user=1000)`: docker's arguments that train it with as few rights as can be."""

    def command(run_file: Path, *flags: str, user: int = USER) -> list[str]:
        folder, models = run_file.parent, tiny.root
        subprocess.run(["chown", "-R", f"{user}:{user}", folder], check=True)
        subprocess.run(["chmod", "-R", "a+rX", models], check=True)
        rights = (f"--user={user}:{user}", "--network=none", "--read-only", "--cap-drop=ALL")
        mounts = (f"--volume={models}:{models}:ro", f"--volume={folder}:{folder}")
        return ["run", "--rm", *rights, *mounts, *flags, image.name, "train", str(run_file)]

    return command
