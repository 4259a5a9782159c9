# make demo  an environment, the embedded model's pictures under every cache, and the table of what it cost
# make test  an environment, then lint, types and the tests, on two workers
# make test-all  the same, and the tests that are marked long
# make docs  the documentation, in out/site
# make quality  the caches beside other libraries' on the embedded models, a few settings of each
# make validate-ascend  every kernel through Ascend's compilers, fetched by pip, and computed from their IR; no NPU is needed
# make train MODEL=emoji-z-image  one of the embedded models, from nothing, in out/
# make gpu   kernel tests and microbenchmarks on an NVIDIA GPU, then blocks, forwards and requests, written to
#            benchmarks/results; a missed target (exit code 1) does not keep the next from being measured
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out/demo
MODEL ?= emoji-qwen-image

.PHONY: demo test test-all check docs gpu bench quality validate-ascend train clean

# The stamp is remade when what it was made from changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/omni compare --out $(OUT)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.quantised: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[quantised]"
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: check docs $(VENV)/.quantised
	$(BIN)/python -m pytest --durations=20

test-all: check $(VENV)/.quantised
	$(BIN)/python -m pytest --durations=20 --all

bench: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks

quality: $(VENV)/.installed
	$(BIN)/python -m benchmarks.quality --quick

gpu: $(VENV)/.installed
	@code=0; \
	$(BIN)/python -m benchmarks.gpu || code=$$?; \
	if [ $$code -gt 1 ]; then exit $$code; fi; \
	$(BIN)/python -m benchmarks.bench_block --check || code=1; \
	$(BIN)/python -m benchmarks.bench_pipeline --check || code=1; \
	exit $$code

validate-ascend: $(VENV)/.installed
	TRITON_INTERPRET=0 $(BIN)/python -m omni_kernels.validation.ascend --out benchmarks/results/ascend-lowering.json

train: $(VENV)/.installed
	$(BIN)/python -m benchmarks.train_emoji --model $(MODEL) --out out/$(MODEL)

clean:
	rm -rf $(VENV) out build *.egg-info
