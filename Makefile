# `make run` and `make test` set up everything they need in .venv; the second time that takes no time.
#
#   make run     environment, then the quickstart (data, teacher, student, distillation, table)
#   make test    environment, then ruff, mypy and every test that this machine can run
#   make lint    environment, then ruff and mypy
#   make env     environment only
#
# PYTHON=python3.11 names the interpreter, EXTRAS=gpu,dev the extras of pyproject.toml. Where the package index serves
# CUDA builds of torch and the machine has no GPU, add PyTorch's own CPU index through PIP_EXTRA_INDEX_URL.

PYTHON ?= python3.11
EXTRAS ?= cpu,dev
BIN := .venv/bin
comma := ,
STAMP := .venv/.installed-$(subst $(comma),-,$(EXTRAS))
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

.PHONY: run test lint env

run: env
	$(BIN)/python -m nemo_opd.quickstart

test: lint
	$(BIN)/python -m pytest

lint: env
	$(BIN)/ruff check
	$(BIN)/mypy

env: $(STAMP)

# torch first and by itself: with the other requirements beside it, pip may settle on a CUDA build.
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
	@$(PIP) install "$(TORCH)"
	@$(PIP) install --editable ".[$(EXTRAS)]"
	@touch $@
