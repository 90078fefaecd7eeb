# Everything a user needs: `make train`, `make test`. The virtual environment is made on first use.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Processes of `make train`: every GPU where there are any, else 2 on the CPU.
GPUS      := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
PROCESSES ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)
RUN       ?= runs/demo
# Where they meet: DeepSpeed's own 29500 may be taken by another training.
PORT      ?= $(shell $(PYTHON) -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

.PHONY: install train test lint types test-systems clean

install: $(READY)

# torch comes first and alone: pinned by version only, so that each machine gets its own build of it (CPU or CUDA).
$(READY): pyproject.toml constraints.txt src/gfrnn/nn/cpu_kernels.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "installing into $(VENV): about 4 GB (more with CUDA), some minutes without a word" >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: $(READY)
	DS_ACCELERATOR=$(if $(filter-out 0,$(GPUS)),cuda,cpu) $(BIN)/deepspeed --quiet --num_gpus $(PROCESSES) --master_port $(PORT) src/train.py --deepspeed ds_configs/z2.json --preset demo --output-dir $(RUN)

# What measures by the clock has the machine to itself. The rest, whatever waits for something to happen included, runs
# two files at a time, those that take longest first, so that none is left alone at the end.
BY_THE_CLOCK := tests/training/test_overhead.py tests/benchmarks/test_overlap.py
LONGEST := $(patsubst %,tests/%.py,training/test_train scaling/test_measure nn/test_fused training/test_train_settings \
  training/test_invariance test_bad_input training/test_shards export/test_shipped benchmarks/test_paper_tables \
  scaling/test_volume training/test_program_task training/test_tracking training/test_memory export/test_serve_limits \
  training/test_preflight benchmarks/test_ablations training/test_compression training/test_learning)
SIDE_BY_SIDE := $(LONGEST) \
  $(filter-out $(LONGEST) $(BY_THE_CLOCK) tests/systems/%,$(sort $(wildcard tests/test_*.py tests/*/test_*.py)))

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(SIDE_BY_SIDE)
	$(BIN)/pytest $(BY_THE_CLOCK)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)
	$(BIN)/mypy

# What needs root and Debian packages: real file systems that fill up, slow links, a browser, an older CPU, a cluster
# under SLURM; and a long soak.
SYSTEMS := chromium qemu-x86_64 slurmctld slurmd srun munged shellcheck ip
PACKAGES := chromium qemu-user slurmctld slurmd slurm-client munge shellcheck iproute2

test-systems: $(READY)
	for program in $(SYSTEMS); do command -v $$program >/dev/null || missing=1; done; [ -z "$$missing" ] || { apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(PACKAGES) >/dev/null; }
	$(BIN)/pytest tests/systems

clean:
	rm -rf $(VENV) src/gfrnn/nn/_cpu_kernels*
