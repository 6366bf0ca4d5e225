# `make demo` trains a small model, `make test` tests; both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

FREE_PORT := import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])

# With a GPU, PyPI's torch, which brings CUDA. Without one, the build whose local version is +cpu:
# it can only come from PyTorch's own index, so that no CUDA package is ever pulled.
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
TORCH_VERSION := 2.13.0
ifeq ($(GPU)$(shell uname -s),0Linux)
# Triton 3.6 is what the kernels were checked with.
TORCH ?= torch==$(TORCH_VERSION)+cpu triton==3.6.0 --extra-index-url https://download.pytorch.org/whl/cpu
else
TORCH ?= torch==$(TORCH_VERSION)
endif

RUN := runs/samba_tiny
ifeq ($(GPU),0)
LAUNCH := DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 deepspeed --quiet --num_accelerators 2
else
# All GPUs, in pairs of sequence-parallel ranks where there are two or more.
RANKS := $(shell echo $$(($(GPU) > 1 ? $(GPU) / 2 * 2 : 1)))
LAUNCH := deepspeed --quiet --num_gpus $(RANKS)
SETTINGS := --deepspeed.torch_autocast.enabled true \
	--parallelism.sequence_parallel_size $(if $(filter 1,$(RANKS)),1,2) \
	--training.global_batch_tokens $(shell echo $$((4096 * (($(RANKS) + 1) / 2))))
endif

.PHONY: demo test test-all lint compile-check clean

demo: $(INSTALLED)
	export PATH="$(CURDIR)/$(BIN):$$PATH"; $(LAUNCH) --master_port $$(python -c '$(FREE_PORT)') \
		launch/pretrain.py --config configs/samba_tiny.json $(SETTINGS)
	$(BIN)/python launch/generate.py --checkpoint $(RUN)/checkpoints --prompt "The function returns"
	@echo
	@echo "checkpoints:        $(RUN)/checkpoints     ls $(RUN)/checkpoints"
	@echo "TensorBoard events: $(RUN)/tensorboard     $(BIN)/tensorboard --logdir $(RUN)/tensorboard"
	@echo "per-rank records:   $(RUN)/logs            tail -n 1 $(RUN)/logs/rank_*.jsonl"

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow"

test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

# The Triton kernels, compiled for GPUs that need not be here.
compile-check: $(INSTALLED)
	TRITON_CACHE_DIR="$(CURDIR)/build/triton" OMP_NUM_THREADS=1 \
		$(BIN)/python launch/benchmark.py compile-check

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed; set PYTHON=")'
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q "setuptools>=77" wheel
	$(BIN)/pip install -q --retries 1 --timeout 60 $(TORCH)
# DeepSpeed is published as source: its setup needs torch, and compiles nothing when told so.
	DS_BUILD_OPS=0 $(BIN)/pip install -q --no-build-isolation "deepspeed>=0.19.8"
	$(BIN)/pip install -q --no-build-isolation -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs build *.egg-info
