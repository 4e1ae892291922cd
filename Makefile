# make demo: trains, samples and draws on this machine.  make test: proves that it works.  Both install what they need into .venv first.
# make test-full: also the whole of the tables of which make test takes a part.  make soak: two minutes of faults at random moments.
# make bench: measures the trainers with what this machine has.  make documents: puts the results into the documents.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# what every phase folder has in common with nanoGPT/, byte for byte
COMMON := bench.py checkpoint.py configurator.py cuda_graph.py dataset.py distributed.py encoding.py errors.py hardware.py \
	out_dir.py output.py resume.py run_facts.py run_logs.py sample.py step_guard.py stop_signal.py training_logger.py \
	visualize_training.py config

.PHONY: demo test test-full soak lint sync bench documents clean
.DEFAULT_GOAL := demo

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[test]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python demo.py

# two files of tests at a time; the kernels by themselves, on the GPU or else in Triton's interpreter (tests/README.md)
test: $(VENV)/installed lint
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/kernels
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-full: $(VENV)/installed lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'full or not full' tests/kernels
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'full or not full'

soak: $(VENV)/installed
	$(BIN)/python tests/soak.py --minutes=2 --seed=1

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/installed
	$(BIN)/python benchmarks/bench_trainers.py --out=out-bench/trainers.json

documents: $(VENV)/installed
	$(BIN)/python benchmarks/report.py

# copies what a phase does not change; a test compares them
sync:
	for phase in phase1_zero1 phase2_triton phase3_fsdp; do \
		[ -d $$phase ] || continue; \
		for file in $(COMMON); do rm -rf $$phase/$$file; cp -R nanoGPT/$$file $$phase/; done; \
		ln -sfn ../nanoGPT/data $$phase/data; \
	done
	for phase in phase1_zero1 phase3_fsdp; do [ ! -d $$phase ] || cp nanoGPT/model.py $$phase/; done
	[ ! -d phase2_triton ] || cp nanoGPT/train.py phase2_triton/

clean:
	rm -rf $(VENV) out-demo out-bench *.egg-info
