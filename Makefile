# Two commands: `make bench` and `make test`. Each makes .venv, installs, builds and runs; a second
# call reuses all of it. `make help` lists the rest.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
# A folder in MEDS layout; `clinattn bench --help` says what is taken without one.
MEDS_DIR ?=
QUICK ?=
# OFFLINE=1 asks no registry: it takes torch and the tools from what $(PYTHON) already has.
OFFLINE ?=
# V=1 shows every command, of the compilers too, and all that pip says.
V ?=
# Those that the supported releases of torch bring, and the newest.
TRITON_VERSIONS ?= 3.6.0 3.7.1 3.8.0 3.9.0

# The oldest and the newest torch that is promised.
HEADERS ?= 2.11.0 2.15.0
# Each torch that is promised, and a Python for it.
COMPAT ?= 2.11.0:3.10 2.12.1:3.12 2.13.0:3.11 2.14.1:3.11 2.15.0:3.13
# Another torch and Python than the wheel is built with. Empty: it is built and not installed.
WHEEL_IN ?= 2.11.0:3.10
# Empty: every g++ and clang++ on PATH.
COMPILERS ?=

VENV ?= $(if $(OFFLINE),.venv-offline,.venv)
BIN  := $(VENV)/bin
AT   := $(if $(filter 1,$(V)),,@)
HUSH := $(if $(filter 1,$(V)),,--quiet)
PIP  := $(BIN)/python -m pip --disable-pip-version-check install $(HUSH)
EXT  := $(BIN)/python setup.py $(HUSH) build_ext --inplace
BUILD_SUPPORT := setup.py $(wildcard build_support/*.py)
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cpp csrc/cuda/*.h \
  csrc/cuda/*.cu csrc/cuda/*.cuh tests/lib/csrc/*.cpp tests/lib/csrc/*.h)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup ext bench bench-cpu bench-short bench-compare bench-engines test test-all test-elsewhere test-integrations triton-matrix cuda-headers compilers compat wheel sanitize lint format docs doctor gpu gpu-here gpu-plan gpu-pack gpu-adopt clean FORCE

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' Makefile
	@echo "  variables: PYTHON=$(PYTHON) TORCH=$(TORCH) MEDS_DIR=$(MEDS_DIR) QUICK= OFFLINE= V="

setup: $(VENV)/.built  ## make .venv, install, build the extension

bench: setup  ## time the encoder on clinical sequences: table, plot, report
	$(AT)MEDS_DIR="$(MEDS_DIR)" QUICK="$(QUICK)" $(BIN)/clinattn bench

bench-cpu: setup  ## time the CPU kernels, pass by pass (BENCH_ARGS="-k name --json FILE")
	$(AT)$(BIN)/python bench/cpu/run.py $(BENCH_ARGS)

bench-short: setup  ## time short and many sequences against torch, and show the worst (BENCH_ARGS=--long)
	$(AT)$(BIN)/python bench/cpu/short.py $(BENCH_ARGS)

bench-compare: setup  ## time the CPU kernels of BASE=REVISION against these (BENCH_ARGS="-k name")
	$(AT)$(BIN)/python bench/cpu/compare.py $(BENCH_ARGS) -- "$(BASE)"

bench-engines: setup $(VENV)/.engines  ## time torch, torch.compile, OpenVINO, ONNX Runtime and clinattn (BENCH_ARGS=--quick)
	$(AT)$(BIN)/python bench/models/engines/run.py $(BENCH_ARGS)

test: setup  ## every fast test and one in twelve of the others (PYTEST_ARGS="-k name")
	$(AT)$(BIN)/python tests/lib/suite.py $(PYTEST_ARGS)

test-all: setup $(VENV)/.integrations $(VENV)/.docs  ## every test, those that need transformers, opacus, ... too
	$(AT)$(BIN)/python tests/lib/suite.py --all $(PYTEST_ARGS)

test-elsewhere: setup  ## every compiler here, headers of promised torches, random calls sanitized
	@$(MAKE) --no-print-directory compilers cuda-headers
	@$(MAKE) --no-print-directory sanitize CALLS=500

test-integrations: setup $(VENV)/.integrations  ## run those that need transformers, opacus, ...
	$(AT)$(BIN)/python tests/lib/suite.py --all tests/integrations/packages $(PYTEST_ARGS)

triton-matrix: setup  ## test the Triton kernels under several Tritons (TRITON_VERSIONS="3.6.0 3.9.0")
	$(AT)$(BIN)/python tests/lib/triton_matrix.py $(TRITON_VERSIONS)

cuda-headers: setup  ## compile what includes torch, CUDA or not, against the oldest and newest torch
	$(AT)$(BIN)/python tests/lib/cuda_headers.py $(HEADERS)

compilers: setup  ## build with each compiler on PATH, without warnings, and test it (COMPILERS="clang++-16")
	$(AT)$(BIN)/python tests/lib/compilers.py $(COMPILERS)

compat: setup  ## test one library under each promised torch, in environments of 6 GB (COMPAT="2.15.0:3.13")
	$(AT)$(BIN)/python tests/lib/compat.py $(COMPAT) $(if $(PYTEST_ARGS),-- $(PYTEST_ARGS))

wheel: $(VENV)/.wheel  ## build a wheel with its kernels in dist/, test it under another torch (WHEEL_IN="2.15.0:3.13")
	$(AT)OFFLINE="$(OFFLINE)" $(BIN)/python tests/lib/wheels.py $(WHEEL_IN) $(if $(PYTEST_ARGS),-- $(PYTEST_ARGS))

sanitize: setup  ## make 20,000 random calls under sanitizers of memory (CALLS=500 SEED=0 FIRST=0)
	$(AT)$(BIN)/python tests/lib/sanitize.py $(if $(CALLS),--calls $(CALLS)) $(if $(SEED),--seed $(SEED)) \
	  $(if $(FIRST),--first $(FIRST))

doctor: setup  ## say what can run on this machine, and why the rest cannot
	$(AT)$(BIN)/clinattn doctor

lint: setup $(VENV)/.lint  ## ruff, mypy, clang-format
	$(AT)$(BIN)/ruff check .
	$(AT)$(BIN)/mypy
	$(AT)$(if $(CSRC),$(BIN)/clang-format --dry-run --Werror $(CSRC))

format: $(VENV)/.lint  ## sort imports, mend what ruff can, format the C++
	$(AT)$(BIN)/ruff check --fix .
	$(AT)$(if $(CSRC),$(BIN)/clang-format -i $(CSRC))

# Not --quiet: MkDocs would no longer count the warnings that make a strict build fail.
docs: $(VENV)/.docs  ## build the documentation as a site in build/site; warnings are errors
	$(AT)NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -f build_support/website/mkdocs.yml
	@echo "wrote build/site/index.html"

# A machine with its own CUDA torch keeps it: nothing is downloaded there.
gpu:  ## build, test and measure on the GPU of this machine (TUNE=1: try other tiles; GPU_ARGS="race speed")
	@export CLINATTN_GPU_STARTED=$$(date +%s); \
	if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; \
	then $(MAKE) --no-print-directory OFFLINE=1 gpu-here; \
	else $(MAKE) --no-print-directory gpu-here; fi

# The script builds for the card and times that; the dry run takes what is built for the rest.
gpu-here: $(if $(filter 1,$(CLINATTN_GPU_DRYRUN)),setup,$(VENV)/.installed)
	$(AT)$(BIN)/python bench/gpu/run.py $(if $(TUNE),--tune) $(GPU_ARGS)

gpu-plan:  ## print two commands for a GPU that is at hand for minutes
	@$(PYTHON) bench/gpu/plan.py

# Under the Python, torch and Triton of that machine: PYTHON=python3.12 TORCH=torch==2.11.0
# VENV=.venv-gpu GPU_ARGS="--extension clinattn/libclinattn.so", with the library that
# CLINATTN_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 make ext, of the same three variables, has built.
gpu-pack: $(VENV)/.installed  ## compile, without a GPU, the kernels that `make gpu` launches on one
	$(AT)$(BIN)/python bench/gpu/pack.py $(GPU_ARGS)

gpu-adopt:  ## put the tiles that a GPU run found better into kernels/configs.py (ROWS=FILE WRITE=1)
	@$(PYTHON) bench/gpu/adopt.py $(ROWS) $(if $(WRITE),--write)

ext: $(VENV)/.installed  ## rebuild the extension alone, loudly
	$(AT)$(EXT)

clean:  ## remove what was built, not the environment
	rm -rf build dist *.egg-info clinattn/*.so .pytest_cache .mypy_cache .ruff_cache
	rm -f $(VENV)/.built

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "clinattn: $(PYTHON) does not run as Python 3.10 or newer; choose one: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || [ -n "$(OFFLINE)" ] || { \
	  echo "clinattn: $(PYTHON) cannot make environments (on Debian: apt install python3-venv)" >&2; \
	  exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(if $(OFFLINE),--without-pip) $(VENV)
	@touch $@

# Holds the requirement, so that another TORCH= installs and builds anew.
$(VENV)/.torch: $(VENV)/.made FORCE
	$(AT)echo '$(TORCH)' | cmp -s - $@ || { $(get-torch) && echo '$(TORCH)' > $@; }

ifdef OFFLINE
# The packages of $(PYTHON) are seen through a path file, also where it is itself an environment.
get-torch = echo 'taking torch and the tools from $(PYTHON)' && \
  $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
  > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/offline.pth"
get-clinattn = CLINATTN_SKIP_EXT=1 PYTHONWARNINGS=ignore \
  $(PIP) --no-deps --no-build-isolation -e . && \
  printf '\#!%s\nimport sys, pytest\nsys.exit(pytest.main())\n' "$(abspath $(BIN)/python)" \
  > $(BIN)/pytest && chmod +x $(BIN)/pytest
else
get-torch = echo 'installing $(TORCH) into $(VENV), which takes minutes' && \
  $(PIP) --upgrade pip 'setuptools>=77' ninja && $(PIP) '$(TORCH)'
get-clinattn = echo 'installing clinattn[bench,test] into $(VENV)' && \
  CLINATTN_SKIP_EXT=1 PYTHONWARNINGS=ignore $(PIP) --no-build-isolation -e '.[bench,test]'
endif

# The extension is left to the next rule, which shows its progress and says what is missing.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(AT)$(get-clinattn)
	@touch $@

# A build that fails stops here: a benchmark or a test of the slow reference is not what was asked
# for. CLINATTN_SKIP_EXT=1 asks for it.
$(VENV)/.built: $(VENV)/.installed build/.in-place $(BUILD_SUPPORT) $(CSRC)
ifneq ($(CLINATTN_SKIP_EXT),1)
	$(AT)$(EXT)
	@touch $@
endif

# Whose library lies in clinattn/: that of another environment may lack CUDA, or need it.
build/.in-place: FORCE
	@mkdir -p build; echo '$(abspath $(VENV))' | cmp -s - $@ || echo '$(abspath $(VENV))' > $@

# Where OFFLINE takes all from $(PYTHON), so it does with these.
$(VENV)/.integrations: $(VENV)/.installed pyproject.toml
	$(AT)$(if $(OFFLINE),,echo 'installing clinattn[integrations] into $(VENV)' && \
	  CLINATTN_SKIP_EXT=1 PYTHONWARNINGS=ignore $(PIP) --no-build-isolation -e '.[integrations]')
	@touch $@

$(VENV)/.engines: $(VENV)/.installed pyproject.toml
	$(AT)$(if $(OFFLINE),,echo 'installing clinattn[engines] into $(VENV)' && \
	  CLINATTN_SKIP_EXT=1 PYTHONWARNINGS=ignore $(PIP) --no-build-isolation -e '.[engines]')
	@touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(AT)$(if $(OFFLINE),,echo 'installing mkdocs into $(VENV)' && $(PIP) --group docs)
	@touch $@

$(VENV)/.wheel: $(VENV)/.installed pyproject.toml
	$(AT)$(if $(OFFLINE),,echo 'installing auditwheel into $(VENV)' && $(PIP) --group wheel)
	@touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	@echo 'installing ruff, mypy and clang-format into $(VENV)'
	$(AT)$(PIP) --group lint
	@touch $@
