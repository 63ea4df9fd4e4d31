# `make demo` and `make test` set everything up by themselves: an own .venv with pinned versions, then the job.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN ?= runs/demo
# Workers of the test run; each uses one thread.
JOBS ?= 2

CSRC := csrc/build.py $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)

.PHONY: demo docs test test-all test-gpu test-versions test-old-cpu test-doors gpu aot lint bench certificates step-table sanitize clean

demo: .venv/demo
	$(BIN)/ov3fast data demo
	$(BIN)/ov3fast train --recipe demo --run-dir $(RUN) --resume
	$(BIN)/ov3fast evaluate $(RUN) --data demo

# The working loop, in minutes: the widest instruction set, each Triton kernel once in the interpreter, a compiled one. What it leaves out
# is marked `full` (the markers in pyproject.toml say which tests are).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)
test: .venv/dev lint
	$(PYTEST) -m "not full"
	TRITON_INTERPRET=1 $(PYTEST) -m "not full" tests/ops tests/kernels

# Everything: besides, all instruction sets, the operators' tests in the interpreter, compiled GPU code and its gate, packaging, and the
# tests of what executes the compiled code. The tile unit's kernels run on its model.
test-all: test
	$(BIN)/python csrc/build.py ov3fast/_native --only amx_emulated
	$(PYTEST) -m full
	TRITON_INTERPRET=1 $(PYTEST) -m full tests/ops tests/kernels
	$(PYTEST) tools/ptxrun

# What only a GPU can tell: real sizes, graph capture, determinism, compute-sanitizer.
test-gpu: .venv/dev
	$(BIN)/python -m pytest tests/gpu -rs

# The same and times, in half an hour and with nothing to install: see docs/gpu.md.
GPU_OUT ?= runs/gpu
gpu:
	test -f ov3fast/_native/cuda.json || OV3FAST_CUDA=1 $(PYTHON) csrc/build.py ov3fast/_native
	for plan in correct time diagnose; do $(PYTHON) tools/gpu_run.py $$plan --out $(GPU_OUT) || failed=1; done; test -z "$$failed"

# The oldest and the newest torch and Triton that pyproject.toml allows, each in an environment of its own.
test-versions:
	$(PYTHON) tools/versions.py 2.11.0 3.6.0 2.3.5
	$(PYTHON) tools/versions.py 2.14.1 3.8.0 2.4.6

# A processor without AVX (qemu-user-static of Debian emulates it): a wheel that was built here runs there, with its portable kernels.
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

# timm and open_clip need torchvision, so that the doors are tried beside them in an environment of its own; gigabytes the first time.
test-doors:
	$(PYTHON) tools/doors.py

# What an export's outputs differ by from the model's, in every format: exports a demo-size model anew.
certificates: .venv/dev
	$(BIN)/python tools/certificates.py

# Compiles every GPU kernel for every chip, without one; the table of the README's kernel page.
aot: .venv/dev
	$(BIN)/python -m ov3fast.kernels.aot --csv benches/results/kernels-aot.csv --markdown benches/results/kernels-aot.md
	$(BIN)/python -m benches.kernel_page

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

# The documentation site, build/site/index.html; without network. A dead link ends it.
docs: .venv/dev
	$(BIN)/python tools/doc_tables.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# The operator table of this chip, benches/results/operators-cpu-CHIP.csv, the choice of backends made from it, and the pages that show
# them; `make step-table` is that of a demo run's parts.
bench: .venv/dev
	$(BIN)/python -m benches.operators
	$(BIN)/python tools/doc_tables.py
	$(BIN)/python -m benches.kernel_page

step-table: demo
	$(BIN)/python -m benches.step $(RUN)

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on two threads; any finding ends the run.
SANITIZED := build/sanitized
sanitize: .venv/dev
	$(BIN)/python csrc/build.py --sanitize $(SANITIZED)
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OV3FAST_NATIVE=$(SANITIZED) OMP_NUM_THREADS=2 \
	$(BIN)/python -m pytest -n $(JOBS) -p no:cacheprovider tests/ops --implementations portable,avx512_bf16 \
	-m "not backend_independent and not large"

# A torch built for GPUs depends on its own Triton; beside a CPU build, constraints-cpu.txt pins one.
CONSTRAIN := --constraint constraints.txt
NO_TRITON := $(BIN)/python -m pip show torch | grep -q '^Requires:.*triton' || echo --constraint constraints-cpu.txt

.venv/torch: constraints.txt | .venv
	$(PIP) install --quiet $(CONSTRAIN) torch
	touch $@

.venv/demo: pyproject.toml setup.py constraints-cpu.txt $(CSRC) .venv/torch
	$(PIP) install --quiet $(CONSTRAIN) --editable '.[demo]'
	touch $@

.venv/dev: pyproject.toml setup.py constraints-cpu.txt $(CSRC) .venv/torch
	$(PIP) install --quiet $(CONSTRAIN) $$($(NO_TRITON)) --editable '.[dev]'
	touch $@

.venv:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv build dist *.egg-info runs
