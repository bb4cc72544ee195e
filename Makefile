# make demo: train and evaluate the demo model.   make test: the whole test suite.   make lint: what CI checks first.
# make gpu-check: what only a GPU can tell, by .venv or else by the PYTHON that has torch; exits 2 where there is none.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
NATIVE := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*/*.h tests/cuda/*.h tests/cuda/*.cpp \
	tests/cuda/*/*.cpp)
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/* csrc/*/*/*)

.PHONY: demo test lint gpu-check clean

demo: .venv/.demo
	$(BIN)/longcat demo $(ARGS)

test: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -k triton $(INTERPRETED)

# Triton kernels without a GPU: the interpreter must be on before they are loaded, hence a process of its own.
INTERPRETED := tests/interpreter tests/test_contract.py $(patsubst %,tests/test_%.py,prepared rvq_encode rvq_decode ema_update ngram_embedding)
# Of depth_decode's tests those of few calls, as the interpreter takes a second for one.
INTERPRETED += $(patsubst %,tests/test_depth_decode.py::test_%,forced_levels_are_kept_and_leave_the_other_draws_alone \
	a_history_is_the_rows_own_and_each_id_counts_once ends_may_be_had_by_row_and_level pairs_draw_from_the_mixed_logits)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

gpu-check: WITH := $(or $(wildcard $(BIN)/python),$(PYTHON))
gpu-check:
	@$(WITH) -c "import torch" 2>/dev/null || { echo "gpu-check: $(WITH) has no torch: make gpu-check PYTHON=..." >&2; exit 2; }
	$(WITH) benchmarks/gpu_check.py $(ARGS)

# One torch version for everybody: newer ones have not been tried, and CI measures with this one.
.venv/.%: .venv/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -e ".[$*]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info longcat_kernels/_C*.so longcat_kernels/cubins
