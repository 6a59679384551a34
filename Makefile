# The developer interface. `make demo` and `make test` do everything from a clean clone.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: native demo test test-long lint types mutants readme accuracy bench sanitize cuda-check gpu gpu-full test-fast tune clean

# torch first and by its exact version, so that a wheel on disk or a mirror is taken and nothing resolves to another one
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	DFQ_BUILD_NATIVE=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

# in place, so that a change in csrc compiles what depends on it and nothing else
.venv/native: .venv/installed setup.py $(shell find csrc -type f)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

native: .venv/native           ## the C++ and CUDA kernels of these sources

demo: .venv/native             ## quantize the embedded network to W4A4 without data and judge it on real images
	rm -rf runs/demo
	$(BIN)/dfq quantize --preset W4A4 --recipe default --steps 200 --seed 0 --out runs/demo

# what takes long comes first, so that no process waits for another's last file; amx and cuda share a module that one builds
SLOW := conformance engine_operators native engine_exported processes execution trainer cli onnx \
  layer_chains layers benchmarks end_to_end quant
FIRST := $(SLOW:%=tests/test_%.py)
TESTS := $(FIRST) $(filter-out $(FIRST),$(sort $(wildcard tests/test_*.py)))
# a thread that spins while it waits would take its core from the other process's tests
test: .venv/native             ## lint, types, tests but the long ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy & types=$$!; \
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	  --durations=50 -m 'not long' $(TESTS); tests=$$?; \
	wait $$types || { echo 'types: failed, see mypy above'; exit 1; }; exit $$tests

test-long: .venv/native        ## the other tests: compilers for every GPU, emulators, a dry GPU check, a source distribution
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	  --durations=20 -m long tests/test_triton.py $(filter-out tests/test_triton.py,$(TESTS))

FAST := architecture arguments checkpoint dispatch gpu_settings integers losses makefile pool quantizers reference \
  run_folder steps tensor_cores tiles
test-fast: .venv/native        ## lint, types, and the test files that are quick and that most changes break: two minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(FAST:%=tests/test_%.py)

lint: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/installed
	$(BIN)/mypy

mutants: .venv/native          ## applies every listed fault to the references; the tests must notice each
	$(BIN)/python -m tests.mutants

accuracy: .venv/native         ## the README's accuracy table and ablation: hours on two cores
	$(BIN)/python -m benchmarks.accuracy

readme: .venv/installed        ## builds the README's tables from benchmarks/results
	$(BIN)/python -m benchmarks.readme

bench: .venv/native            ## kernels, steps and integer networks against what users have, into benchmarks/results: 30 minutes
	$(BIN)/python -m benchmarks.run --compiled
	$(BIN)/python -m benchmarks.end_to_end --compiled
	$(BIN)/python -m benchmarks.layers
	$(BIN)/python -m benchmarks.integer

SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all
RUNTIMES = $(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libstdc++.so)
sanitize: .venv/installed      ## the CPU kernels of every level under AddressSanitizer and UndefinedBehaviorSanitizer
	CXX="g++ $(SANITIZERS) -g1" DFQ_BUILD_NATIVE=cpu $(BIN)/python setup.py -q build_ext \
	  --build-lib build/sanitized --build-temp build/sanitized-objects
	for level in baseline v2 v3 v4 v4_vnni; do DFQ_CPU=$$level LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 \
	  $(BIN)/python -m tests.with_module build/sanitized/dfq_kernels/_native*.so tests/test_conformance.py \
	  tests/test_native.py tests/test_calls.py tests/test_fake_quant_conv2d.py tests/test_tiles.py tests/test_engine.py tests/test_engine_io.py -s \
	  -k "not instruction_set and not elements and not triton and not whole_test_set" || exit 1; done

cuda-check: .venv/native       ## the CUDA kernels without a GPU: spills, loads, PTX, and the whole suite on an emulator
	DFQ_EMULATED_TESTS=test_ $(BIN)/python -m pytest -v tests/test_cuda.py

# BUDGET=455 seconds, OUT=an empty folder (the next one in build/gpu-check), DRY=1: on a CPU with stand-ins
gpu:                           ## with a GPU: builds in place, checks and measures in eight minutes, what says most first
	$(PYTHON) -m tools.gpu_check

gpu-full:                      ## with a GPU: the whole suite, compute-sanitizer, every benchmark: an hour
	$(PYTHON) -m tools.gpu_check --full

tune:                          ## with a GPU: launch configurations of the Triton kernels for its architecture
	$(PYTHON) -m benchmarks.tune

clean:
	rm -rf .venv build runs *.egg-info
