PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
TORCH := 2.13.0
BIN := .venv/bin
# The stamp of an installed .venv: the CPU's stack unless `make cuda` has made it.
READY := .venv/$(if $(filter cuda,$(MAKECMDGOALS))$(wildcard .venv/cuda),cuda,ready)

# Where it is set, as in many containers, every process would compile thousands of imported modules again, which takes seconds.
export PYTHONDONTWRITEBYTECODE :=

PIP := $(BIN)/pip install --quiet
define VENV
$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "Python 3.11 or 3.12: make PYTHON=/path/to/python3.11")'
$(PYTHON) -m venv .venv
endef

ABLATION := top_20 all bottom_80 random_20

.PHONY: quickstart quickstart-moe cuda ablation test test-fast bench gpu lint format clean

quickstart: $(READY)  ## A tiny Qwen3, warm-started and then trained at its forking tokens: about five minutes on two cores.
	rm -rf runs/quickstart runs/quickstart-sft
	$(BIN)/python recipes/quickstart/countdown.py runs/quickstart-sft/task
	$(BIN)/megafork sft recipes/quickstart/sft.yaml
	$(BIN)/megafork train recipes/quickstart/train.yaml

quickstart-moe: $(READY)  ## Its twin with a tiny Qwen3-MoE, EP 2.
	rm -rf runs/quickstart-moe runs/quickstart-moe-sft
	$(BIN)/python recipes/quickstart/countdown.py runs/quickstart-moe-sft/task --experts 8
	$(BIN)/megafork sft recipes/quickstart_moe/sft.yaml
	$(BIN)/megafork train recipes/quickstart_moe/train.yaml

cuda: $(READY)  ## The stack for GPUs, then Transformer Engine and apex where they can be built: docs/install.md.
	tools/cuda_kernels.sh .venv

runs/quickstart-sft/hf: | $(READY)
	$(BIN)/python recipes/quickstart/countdown.py runs/quickstart-sft/task
	$(BIN)/megafork sft recipes/quickstart/sft.yaml

ablation: $(READY) runs/quickstart-sft/hf  ## Which tokens to learn from, three seeds each: docs/ablation.md. Resumes when called again.
	$(BIN)/megafork ablate $(ABLATION:%=recipes/ablation/%.yaml) --seeds 1,2,3

test: $(READY)  ## The whole suite.
	$(BIN)/pytest

test-fast: $(READY)  ## The fast tests, to run while working.
	$(BIN)/pytest -m "not slow"

bench: $(READY)  ## Ours against the peers' own code on this machine: half an hour; docs/benchmarks.md.
	$(BIN)/python -m benchmarks

gpu: $(READY)  ## What only a GPU can show, into benchmarks/results/gpu.json. Resumes when called again.
	$(BIN)/python tools/gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs build *.egg-info

# torch is installed first, with its own dependencies (the CPU or CUDA build that the registry offers), then everything else exactly as
# pinned, so that no resolver changes a version. A second call installs nothing. Modules are compiled when they are first imported; for GPUs
# all are compiled now, because a cluster's ranks would do it all at once.
.venv/ready: PIP += --no-compile
.venv/ready: requirements.txt pyproject.toml
	$(VENV)
	$(PIP) torch==$(TORCH)
	$(PIP) --no-deps -r requirements.txt
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

# An old stamp first, which an interrupted make keeps: the installation is still known to be CUDA's, and is taken up again.
.PRECIOUS: .venv/cuda
.venv/cuda: requirements-cuda.txt pyproject.toml
	@test ! -e .venv -o -e $@ || { echo "make cuda: .venv holds the CPU's stack; remove it first: rm -rf .venv" >&2; exit 1; }
	$(VENV)
	touch -d @0 $@
	$(PIP) --no-deps -r requirements-cuda.txt
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@
