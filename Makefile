# `make demo` and `make test` set everything up: they create .venv with pinned versions, then run.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN ?= runs/demo
# Workers of the test run; each uses one thread.
JOBS ?= 2

CSRC := csrc/build.py $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)

.PHONY: demo demo-generate demo-understand docs test test-all test-gpu test-versions test-old-cpu test-aarch64 test-doors gpu aot lint bench certificates step-table sanitize clean

demo: .venv/demo
	$(BIN)/ov3fast data demo
	$(BIN)/ov3fast train --recipe demo --run-dir $(RUN) --resume
	$(BIN)/ov3fast evaluate $(RUN) --data demo

# A generator over the tokens of a finished `make demo`: statistics, training, a report with pictures, a grid with a row per class; a quarter of an hour.
# GENERATE holds further flags of the training: `make demo-generate GENERATE="--steps 60"` tries the whole path in a minute or two.
GENERATOR ?= runs/generate-demo
demo-generate: .venv/demo
	$(BIN)/ov3fast train --recipe generate-demo --model $(RUN) --run-dir $(GENERATOR) $(GENERATE) --resume
	$(BIN)/ov3fast generate $(GENERATOR) --class all --count 12 --precision bf16 --out $(GENERATOR)/grid.png

# Questions about held-out pictures, answered from the tokens of a finished `make demo`; understand.html at the end.
UNDERSTAND ?= runs/understand-demo
demo-understand: .venv/understand
	$(BIN)/ov3fast train --recipe understand-demo --tower $(RUN) --run-dir $(UNDERSTAND) --resume

# The quick tests: the widest instruction set, each Triton kernel once in the interpreter, one compiled kernel. Other tests
# are marked `full` (see the markers in pyproject.toml).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
test: .venv/dev lint
	$(PYTEST) -m "not full"
	TRITON_INTERPRET=1 $(PYTEST) -m "not full" tests/ops tests/kernels

# Everything: also all instruction sets, the operators' tests in the interpreter, compiled GPU code and its checks, packaging, and the
# tests of ptxrun. The AMX kernels run on an emulated tile unit.
test-all: test
	$(BIN)/python csrc/build.py ov3fast/_native --only amx_emulated
	$(PYTEST) -m full
	TRITON_INTERPRET=1 $(PYTEST) -m full tests/ops tests/kernels
	$(PYTEST) tools/ptxrun

# Tests that need a GPU: real sizes, graph capture, determinism, compute-sanitizer.
test-gpu: .venv/dev
	$(BIN)/python -m pytest tests/gpu -rs

# The same plus timings, in half an hour and without installation: see docs/gpu.md.
GPU_OUT ?= runs/gpu
gpu:
	test -f ov3fast/_native/cuda.json || OV3FAST_CUDA=1 $(PYTHON) csrc/build.py ov3fast/_native
	for plan in correct time diagnose; do $(PYTHON) tools/gpu_run.py $$plan --out $(GPU_OUT) || failed=1; done; test -z "$$failed"

# The oldest and the newest torch and Triton that pyproject.toml allows, each in a separate environment.
test-versions:
	$(PYTHON) tools/versions.py 2.11.0 3.6.0 2.3.5
	$(PYTHON) tools/versions.py 2.14.1 3.8.0 2.4.6

# A processor without AVX, emulated with Debian's qemu-user-static: a wheel built here runs there, with its portable kernels.
OLD_CPU := OMP_NUM_THREADS=1 qemu-x86_64-static -cpu Nehalem
WHEEL := build/old-cpu
test-old-cpu: .venv/dev
	rm -rf $(WHEEL)
	$(BIN)/python -m pip wheel . --no-deps --wheel-dir $(WHEEL)
	$(BIN)/python -m pip install --no-deps --target $(WHEEL)/installed $(WHEEL)/*.whl
	python=$$(realpath -s $(BIN)/python) && cd $(WHEEL)/installed && $(OLD_CPU) $$python -c "import torch; from ov3fast import ops; \
	assert ops.cpu.isa() == 'portable', ops.cpu.isa(); x, w = torch.ones(9, 7), torch.ones(5, 7); assert (ops.linear(x, w, impl='cpu') == 7).all()"
	OV3FAST_NATIVE=$(WHEEL)/installed/ov3fast/_native $(OLD_CPU) $(BIN)/python -m pytest -p no:cacheprovider tests/ops/test_linear.py tests/ops/test_layer_norm.py \
	--implementations portable -k "not compile and not hypothesis"

# Another architecture, cross-compiled and emulated: Debian's g++-aarch64-linux-gnu, qemu-user-static and debootstrap, as root the first time.
test-aarch64: .venv/dev
	$(BIN)/python tools/aarch64.py

# Tests of ov3fast.interop against timm and open_clip, in a separate environment since they need torchvision; downloads gigabytes the first time.
test-doors:
	$(PYTHON) tools/doors.py

# The certificates of every export format: exports a demo-size model again.
certificates: .venv/dev
	$(BIN)/python tools/certificates.py

# Compiles every GPU kernel for every chip, without a GPU, and updates the tables of docs/kernels.md.
aot: .venv/dev
	$(BIN)/python -m ov3fast.kernels.aot --csv benches/results/kernels-aot.csv --markdown benches/results/kernels-aot.md
	$(BIN)/python -m benches.kernel_page

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

# The documentation site, build/site/index.html, built without network. A dead link is an error.
docs: .venv/dev
	$(BIN)/python tools/doc_tables.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# The operator table of this chip, benches/results/operators-cpu-CHIP.csv, the choice of backends derived from it, and the pages that show
# them; `make step-table` updates the breakdown of a demo run's steps.
bench: .venv/dev
	$(BIN)/python -m benches.operators
	$(BIN)/python tools/doc_tables.py
	$(BIN)/python -m benches.kernel_page

step-table: demo
	$(BIN)/python -m benches.step $(RUN)

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on two threads; any finding aborts the run.
SANITIZED := build/sanitized
sanitize: .venv/dev
	$(BIN)/python csrc/build.py $(SANITIZED) --sanitize --only portable avx2 avx512 avx512_bf16 amx_emulated
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OV3FAST_NATIVE=$(SANITIZED) OMP_NUM_THREADS=2 \
	$(BIN)/python -m pytest -n $(JOBS) -p no:cacheprovider tests/ops --implementations portable,avx2,avx512,avx512_bf16,amx_emulated \
	-m "not backend_independent and not large"

# A torch built for GPUs depends on its own Triton; for a CPU build, constraints-cpu.txt pins one.
CONSTRAIN := --constraint constraints.txt
NO_TRITON := $(BIN)/python -m pip show torch | grep -q '^Requires:.*triton' || echo --constraint constraints-cpu.txt

.venv/torch: constraints.txt | .venv
	$(PIP) install --quiet $(CONSTRAIN) torch
	touch $@

.venv/demo: pyproject.toml setup.py constraints-cpu.txt $(CSRC) .venv/torch
	$(PIP) install --quiet $(CONSTRAIN) --editable '.[demo]'
	touch $@

.venv/understand: .venv/demo
	$(PIP) install --quiet $(CONSTRAIN) --editable '.[demo,transformers]'
	touch $@

.venv/dev: pyproject.toml setup.py constraints-cpu.txt $(CSRC) .venv/torch
	$(PIP) install --quiet $(CONSTRAIN) $$($(NO_TRITON)) --editable '.[dev]'
	touch $@

.venv:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv build dist *.egg-info runs
