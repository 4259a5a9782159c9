# make demo   creates an environment, makes the embedded model's pictures under every cache, and reports quality and speed
# make test   creates an environment, then runs lint, types, docs and tests, on two workers
# make test-all   the same without the docs, but with the tests that are marked long
# make docs   builds the documentation in out/site
# make quality   compares the caches with other libraries' on the embedded models, with a few settings of each
# make validate-ascend   lowers every kernel with Ascend's compilers, fetched by pip, and computes it from their IR;
#             needs no NPU
# make train MODEL=emoji-z-image   trains one of the embedded models from scratch, in out/
# make gpu    runs the kernel tests and microbenchmarks on an NVIDIA GPU, then blocks, forwards and requests, and writes
#             benchmarks/results; after a missed target (exit code 1), the later ones are still measured
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out/demo
MODEL ?= emoji-qwen-image

.PHONY: demo test test-all check docs gpu bench quality validate-ascend train clean

# The stamp file records that the environment is installed; it is remade when a file below changes.
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

# In a folder of its own: where diffusers, transformers or bitsandbytes can import `kernels`, they load from the hub.
$(VENV)/.kernels: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
	  --target $(VENV)/kernels kernels
	touch $@

test: check docs $(VENV)/.quantised $(VENV)/.kernels
	$(BIN)/python -m pytest --durations=20

test-all: check $(VENV)/.quantised $(VENV)/.kernels
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
