"""Cluster profiles: nothing in one may become another option of sbatch, another word of a script, or another image."""

import json

import pytest

from dskd.config.cluster import OWN_OPTIONS, ClusterConfig
from dskd.config.errors import LONGEST, UserError
from dskd.config.load import load


def error_of(tmp_path, values: dict[str, object]) -> str:
    file = tmp_path / "profile.yaml"
    file.write_text(json.dumps(values))
    with pytest.raises(UserError) as error:
        load(file, ClusterConfig)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"{file}: ")


@pytest.mark.parametrize("key", ["partition", "account", "qos", "constraint", "modules"])
@pytest.mark.parametrize("text", ["", "a b", "a\u00a0b", "--wrap=id", "a'b", 'a"b', "a\\", "-a"])
def test_what_is_one_word_for_slurm_is_one_word(tmp_path, key, text):
    line = error_of(tmp_path, {key: [text] if key == "modules" else text})
    assert line.startswith(f"{key}: one word without quotes and backslashes, and without a dash before it, is expected")


@pytest.mark.parametrize("text", ["gpu", "gpu,low", "[a100|h100]&ib", "a100*2", "cuda/12.6", "project_1@x+y"])
def test_words_that_clusters_use_are_taken(tmp_path, text):
    file = tmp_path / "profile.yaml"
    file.write_text(json.dumps({"partition": text, "constraint": text, "modules": [text]}))
    found = load(file, ClusterConfig)
    assert (found.partition, found.constraint, found.modules) == (text, text, (text,))


@pytest.mark.parametrize("name", ["A B", "1A", "A-B", "A;id", "A=1", "", "é", "A$(id)"])
def test_a_variable_has_a_name_that_a_shell_takes_for_one(tmp_path, name):
    line = error_of(tmp_path, {"environment": {name: "x"}})
    assert line.startswith("environment: a name of letters, digits and _ is expected, got ")


@pytest.mark.parametrize("value", [7, ["secret"], "secret\nline"])
def test_the_value_of_a_variable_is_not_told(tmp_path, value):
    line = error_of(tmp_path, {"environment": {"TOKEN": value}})
    assert line.startswith("environment.TOKEN: text ")
    assert "secret" not in line
    assert "7" not in line


@pytest.mark.parametrize("name", ["--mail-type", "-x", "Mail", "mail type", "mail_type", "a=b", "", "job_name"])
def test_an_option_of_sbatch_is_a_plain_name(tmp_path, name):
    assert error_of(tmp_path, {"sbatch": {name: "x"}}).startswith("sbatch: names like mail-type, without dashes ")


@pytest.mark.parametrize("name", [*OWN_OPTIONS, "wra", "outp", "arr", "dep", "export-f"])
def test_what_dskd_sets_itself_is_no_option_of_a_profile_not_even_cut_short(tmp_path, name):
    line = error_of(tmp_path, {"sbatch": {name: "x"}})
    assert line.startswith(f"sbatch: {name} is not for a profile to set; nor are account, array, ")
    assert line.endswith(", workdir, wrap")
    assert len(line) < LONGEST - 100  # with a path before it, all of them can still be read


@pytest.mark.parametrize(
    "name", ["mail-type", "reservation", "begin", "gres", "exclusive", "nodelist", "mem-per-cpu", "nice"]
)
def test_other_options_are_the_cluster_s_business(tmp_path, name):
    file = tmp_path / "profile.yaml"
    file.write_text(json.dumps({"sbatch": {name: "it's a value, #1"}}))
    assert load(file, ClusterConfig).sbatch == {name: "it's a value, #1"}


def test_the_value_of_an_option_has_no_backslash(tmp_path):
    line = error_of(tmp_path, {"sbatch": {"comment": "a\\' --wrap=id"}})
    assert line.startswith("sbatch: comment: text without backslashes is expected, got ")


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        ({"image": "--privileged"}, "container.image: the name of an image is expected, got '--privileged'"),
        ({"arguments": ["image:tag"]}, "container.arguments: --name or --name=value is expected, got 'image:tag'"),
        ({"arguments": ["-v"]}, "container.arguments: --name or --name=value is expected, got '-v'"),
        ({"arguments": ["--"]}, "container.arguments: --name or --name=value is expected, got '--'"),
        ({"arguments": ["--shm-size", "16g"]}, "container.arguments: --name or --name=value is expected, got '16g'"),
        ({"arguments": ["--detach"]}, "container.arguments: --detach would break the run's own containers"),
        ({"arguments": ["--name=x"]}, "container.arguments: --name would break the run's own containers"),
        ({"mounts": ["/a,target=/etc"]}, "container.mounts: /path or /host:/inside[:ro] is expected, without commas, "),
    ],
)
def test_what_a_container_is_given_cannot_become_another_image_or_mount(tmp_path, container, expected):
    assert error_of(tmp_path, {"container": {"runtime": "docker", "image": "x"} | container}).startswith(expected)
