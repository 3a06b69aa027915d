"""Whatever names and paths a run and a profile have: the batch script stays what it is, for sbatch and for the shell.

`words_of` reads a line by the rules that sbatch has for it, which are not a shell's: a backslash is an escape even
within quotes, and what stands after a # outside of them is a comment.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from dskd.config.cluster import ClusterConfig
from dskd.config.errors import UserError
from dskd.config.load import load_run
from dskd.launch.request import Request, train_request
from dskd.launch.submit import batch_executor, submission_folder

# A run's folder may have almost any name; a value of a profile is a text without control characters.
names = st.text(st.sampled_from("ab '\"#$;&|`(){}<>*?!~=,:@%\\-ü\u00a0"), min_size=1, max_size=12)


def words_of(line: str) -> list[str]:
    """The words of what follows #SBATCH."""
    words: list[str] = []
    word: str | None = None
    quote, escaped = "", False
    for character in line:
        if escaped:
            word, escaped = (word or "") + character, False
        elif character == "\\":
            escaped = True
        elif quote:
            word, quote = (word or "", "") if character == quote else ((word or "") + character, quote)
        elif character in "'\"":
            word, quote = word or "", character
        elif character == "#":
            break
        elif character.isspace():
            words += [] if word is None else [word]
            word = None
        else:
            word = (word or "") + character
    assert not quote, f"unmatched quote: {line}"
    return words + ([] if word is None else [word])


def options_of(script: str) -> dict[str, str]:
    """What sbatch takes out of a script: it reads until the first line that is neither empty nor a comment."""
    found: dict[str, str] = {}
    for line in script.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            for word in words_of(line.removeprefix("#SBATCH")):
                name, _, value = word.removeprefix("--").partition("=")
                assert name not in found
                found[name] = value
    return found


def test_these_rules_are_not_a_shell_s():
    assert words_of(" --comment='a b' --x=\"c'd\" # --y") == ["--comment=a b", "--x=c'd"]
    assert words_of(f" --comment={shlex.quote('a')}") == ["--comment=a"]
    value = "a\\'\" --wrap=id #"  # one word for a shell; for sbatch its quotes end within it
    assert shlex.split(shlex.quote(value)) == [value]
    assert "--wrap=id" in words_of(f" --comment={shlex.quote(value)}")


def request_at(directory: Path, name: str = "x") -> Request:
    return Request(directory, name, ("true",), 1, 1, 1.0)


def script_of(request: Request, cluster: ClusterConfig) -> str:
    return batch_executor([request], cluster, submission_folder([request]), None, ()).script(1)


PLAIN = script_of(request_at(Path("/outputs/run")), ClusterConfig(hours=1))


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(["partition", "account", "qos", "constraint", "comment"]), names), names)
def test_the_values_of_a_profile_stay_the_values_of_their_options(values, name):
    comment = values.pop("comment", None)
    try:
        cluster = ClusterConfig(**values, sbatch={} if comment is None else {"comment": comment})
    except UserError:
        return
    found = options_of(script_of(request_at(Path("/outputs/run"), name), cluster))
    expected = values if comment is None else values | {"comment": comment}
    assert {key: found.pop(key) for key in expected} == expected
    assert found.keys() == options_of(PLAIN).keys()
    assert found["job-name"].startswith("dskd-")
    assert set(found["job-name"]) <= set("dskab_-")


@settings(max_examples=100)
@given(name=names)
def test_the_folder_of_a_run_is_where_its_logs_go_or_is_refused(make_run, tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("names")
    try:
        run = load_run(make_run(folder), [f"output.name={json.dumps(name)}"])
        request = train_request(run, ClusterConfig())
    except UserError:
        assert set(name) & set("%\\") or name.strip(".") == ""
        return
    found = options_of(script_of(request, ClusterConfig()))
    assert found["output"] == f"{request.directory}/job/submitit/%j_0_log.out"
    assert found["error"] == f"{request.directory}/job/submitit/%j_0_log.err"
    assert found.keys() == options_of(PLAIN).keys()


HOSTILE = "$(touch pwned) `touch pwned`; touch pwned & \"' || touch pwned #"


def told(name: str, folder: Path) -> str:
    """What writes a call down: a line of words that end with a zero byte."""
    return f'printf "%s\\0" {name} "$TOKEN" "$@" >>{folder}/calls; echo >>{folder}/calls'


def test_a_shell_runs_the_commands_of_the_script_and_no_others(tmp_path, monkeypatch):
    """Its programs are stand-ins that write down how they were called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("srun", "python"):
        program = programs / name
        program.write_text(f"#!/bin/sh\n{told(name, tmp_path)}\necho 1\n")
        program.chmod(0o755)
    module = f"module() {{ {told('module', tmp_path)}; }}\n"
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    directory = tmp_path / HOSTILE.replace("/", "")
    cluster = ClusterConfig(environment={"TOKEN": HOSTILE}, modules=("a;touch$IFS/pwned",), sbatch={"comment": HOSTILE})
    script = tmp_path / "script.sh"
    script.write_text(script_of(request_at(directory, HOSTILE), cluster).replace("# setup\n", f"# setup\n{module}"))
    (tmp_path / "work").mkdir()
    environment = {"PATH": f"{programs}:{os.defpath}", "SLURM_JOB_NUM_NODES": "1"}
    done = subprocess.run(["bash", script], cwd=tmp_path / "work", env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    assert list((tmp_path / "work").iterdir()) == []
    calls = [call.split("\0")[:-1] for call in (tmp_path / "calls").read_text().splitlines()]
    folder = str(directory / "job/submitit")
    begin, finish = ([*("-m", "dskd.launch.batch"), verb, folder] for verb in ("begin", "finish"))
    logs = ["--output", f"{folder}/%j_%t_log.out", "--error", f"{folder}/%j_%t_log.err"]
    ranks = ["--kill-on-bad-exit=1", str(programs / "python"), "-u", "-m", "submitit.core._submit", folder]
    assert calls == [
        ["module", "", "load", "a;touch$IFS/pwned"],
        ["srun", HOSTILE, "--ntasks=1", "--ntasks-per-node=1", "test", "-e", f"{folder}/runs.txt"],
        ["python", HOSTILE, *begin],
        ["srun", HOSTILE, "--unbuffered", *logs, *ranks],
        ["python", HOSTILE, *finish, "0"],
    ]
