PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
TORCH := 2.13.0
BIN := .venv/bin

ABLATION := top_20 all bottom_80 random_20

.PHONY: quickstart ablation test test-fast bench gpu lint format clean

quickstart: .venv/ready  ## A tiny Qwen3, warm-started and then trained at its forking tokens: about five minutes on two cores.
	rm -rf runs/quickstart runs/quickstart-sft
	$(BIN)/python recipes/quickstart/countdown.py runs/quickstart-sft/task
	$(BIN)/megafork sft recipes/quickstart/sft.yaml
	$(BIN)/megafork train recipes/quickstart/train.yaml

runs/quickstart-sft/hf: | .venv/ready
	$(BIN)/python recipes/quickstart/countdown.py runs/quickstart-sft/task
	$(BIN)/megafork sft recipes/quickstart/sft.yaml

ablation: .venv/ready runs/quickstart-sft/hf  ## Which tokens to learn from, three seeds each: docs/ablation.md. Resumes when called again.
	$(BIN)/megafork ablate $(ABLATION:%=recipes/ablation/%.yaml) --seeds 1,2,3

test: .venv/ready  ## The whole suite.
	$(BIN)/pytest

test-fast: .venv/ready  ## The fast tests, to run while working.
	$(BIN)/pytest -m "not slow"

bench: .venv/ready  ## Ours against the peers' own code on this machine: half an hour; docs/benchmarks.md.
	$(BIN)/python -m benchmarks

gpu: .venv/ready  ## What only a GPU can show, into benchmarks/results/gpu.json. Resumes when called again.
	$(BIN)/python tools/gpu

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs build *.egg-info

# torch is installed first, with its own dependencies (the CPU or CUDA build that the registry offers), then everything else exactly as
# pinned, so that no resolver changes a version. A second call installs nothing.
.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "megafork needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile torch==$(TORCH)
	$(BIN)/pip install --quiet --no-compile --no-deps -r requirements.txt
	$(BIN)/pip install --quiet --no-compile --no-deps --no-build-isolation -e .
	touch .venv/ready
