# make demo: trains, samples and draws on this machine.  make test: proves that it works.  Each first installs what it
# needs into .venv.  make test-full: adds the rest of the long tables.  make soak: two minutes of random faults.
# make bench: measures the trainers on this machine.  make documents: puts code and results into the documents.
# PYTHON: the one to use, 3.11 or newer; by default python3, or with uv any that it finds
VENV := .venv
BIN := $(VENV)/bin
# uv where it is installed, else pip
UV := $(shell command -v uv)
MAKE_VENV := $(if $(UV),uv venv --quiet --python '$(or $(PYTHON),>=3.11)',$(or $(PYTHON),python3) -m venv)
PIP := $(if $(UV),uv pip install --python $(BIN)/python,$(BIN)/python -m pip install --quiet --disable-pip-version-check)

# `make sync` copies every file of nanoGPT/ except these: the two that phases change, and tools for checkpoints
NOT_COPIED := model.py train.py evaluate.py export_hf.py import_hf.py hf_format.py
COMMON := $(filter-out $(NOT_COPIED),$(notdir $(wildcard nanoGPT/*.py))) config

.PHONY: demo test test-full soak lint sync bench documents clean
.DEFAULT_GOAL := demo

# what training needs
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Installing PyTorch, Triton, NumPy, tiktoken and matplotlib into $(VENV), with $(if $(UV),uv,pip)."
	@echo "The download may take minutes."
	@[ -x $(BIN)/python ] || $(MAKE_VENV) $(VENV) || { rm -rf $(VENV); exit 1; }
	@$(BIN)/python -c "import sys; sys.version_info >= (3, 11) or sys.exit('error: Python 3.11 or newer is needed, but \
$(VENV) has ' + sys.version.split()[0] + ': rm -r $(VENV), then name another: make PYTHON=python3.12')"
	@$(PIP) -c constraints.txt -e .
	@du -sh $(VENV)
	@touch $@

# and what its tests need
$(VENV)/installed-test: $(VENV)/installed
	@echo "Installing what the tests need."
	@$(PIP) -c constraints.txt -e '.[test]'
	@touch $@

demo: $(VENV)/installed
	@$(BIN)/python demo.py

# two processes; the kernels separately, on the GPU or else in Triton's interpreter (tests/README.md)
test: $(VENV)/installed-test lint
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/kernels
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-full: $(VENV)/installed-test lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'full or not full' tests/kernels
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'full or not full'

soak: $(VENV)/installed-test
	$(BIN)/python tests/soak.py --minutes=2 --seed=1

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/installed
	$(BIN)/python benchmarks/bench_trainers.py --out=out-bench/trainers.json

documents: $(VENV)/installed
	$(BIN)/python docs/embed_diffs.py
	$(BIN)/python docs/pictures/triton_pictures.py
	$(BIN)/python benchmarks/report.py

# copies the files that a phase does not change; a test compares them
sync:
	for phase in phase1_zero1 phase2_triton phase3_fsdp; do \
		[ -d $$phase ] || continue; \
		for file in $(COMMON); do rm -rf $$phase/$$file; cp -R nanoGPT/$$file $$phase/; done; \
		ln -sfn ../nanoGPT/data $$phase/data; \
	done
	for phase in phase1_zero1 phase3_fsdp; do [ ! -d $$phase ] || cp nanoGPT/model.py $$phase/; done
	[ ! -d phase2_triton ] || cp nanoGPT/train.py phase2_triton/
	[ ! -d phase3_fsdp ] || cp nanoGPT/train.py phase3_fsdp/train_ddp.py

clean:
	rm -rf $(VENV) out-demo out-bench *.egg-info
