# Two commands do everything on a fresh machine with Python and make: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# glibc gives large blocks back to the kernel at once; getting them again costs more than the arithmetic on a CPU.
MALLOC := MALLOC_MMAP_THRESHOLD_=34359738368 MALLOC_TRIM_THRESHOLD_=34359738368 MALLOC_TOP_PAD_=67108864

# Modules with public names of their own, beside those of the package itself.
API := analysis cards criteria hankel metrics mixers modeling_compressm plots provenance record report_page

.DEFAULT_GOAL := help
.PHONY: help demo demo-checkpoint demo-lora test test-distributed fault-table readme-tables lint format bench bench-gpu bench-study bench-fitting bench-architectures dist api clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

demo: $(VENV)/.recipes  ## train a Mamba on digits, shrink its state from 128 to 12 on the way, write runs/demo/ (minutes)
	$(MALLOC) $(RUN) recipes/digits.py

demo-checkpoint: $(VENV)/.recipes  ## train a tiny model, cut it when it is finished, heal it, write runs/compressed/ (minutes)
	$(MALLOC) $(RUN) recipes/compress_checkpoint.py --overwrite_output_dir

demo-lora: $(VENV)/.recipes  ## fine-tune a small model with LoRA, cut it half-way, put the adapter back (minutes)
	$(MALLOC) $(RUN) recipes/lora.py

test: $(VENV)/.ready  ## run all tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile

test-distributed: $(VENV)/.ready  ## run the tests that start several processes, and all that `make test` leaves out
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile -m "distributed or long"

fault-table: $(VENV)/.ready  ## break a cut at every stage, resume it, and print what became of it (minutes)
	@PYTHONPATH=tests:tests/distributed:recipes OMP_NUM_THREADS=1 $(RUN) tests/distributed/faults.py 2>/dev/null

readme-tables: $(VENV)/.ready  ## write the README's tables of architectures and of results anew
	@PYTHONPATH=tests:recipes/bench $(RUN) tests/readme_tables.py

lint: $(VENV)/.ready  ## check style
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/.ready  ## put the code into style
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(VENV)/.recipes  ## measure step times, the cost of a cut and its memory; writes recipes/bench/results/
	$(MALLOC) $(RUN) recipes/bench/speed.py

bench-gpu: $(VENV)/.recipes  ## on a CUDA machine: build the kernels, measure training, cuts, decoding (half an hour)
	PYTHON=$(RUN) bash recipes/bench/build_kernels.sh
	$(RUN) recipes/bench/gpu.py

bench-study: $(VENV)/.recipes  ## does shrinking in training pay, and what does a cut cost; writes recipes/bench/results/ (hours)
	OMP_NUM_THREADS=1 $(MALLOC) $(RUN) recipes/bench/study.py --resume

bench-fitting: $(VENV)/.recipes  ## how much the knobs of the fits matter; writes recipes/bench/results/ (twenty minutes)
	OMP_NUM_THREADS=1 $(MALLOC) $(RUN) recipes/bench/fitting.py

bench-architectures: $(VENV)/.recipes  ## measure what one cut costs in each of the ten architectures; writes recipes/bench/results/
	OMP_NUM_THREADS=1 $(MALLOC) $(RUN) recipes/bench/architectures.py

dist: $(VENV)/.ready  ## build the source distribution and the wheel into dist/
	$(RUN) -m build --outdir dist

api: $(VENV)/.ready  ## write the API reference, from the docstrings, as HTML into build/api/
	$(RUN) -m pdoc --docformat google --output-directory build/api hf_compressm $(addprefix hf_compressm.,$(API))

clean:  ## remove what the other targets made
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A Linux machine without an NVIDIA driver gets torch's CPU build from its own index, where that can be reached: the
# default index would add gigabytes of CUDA.
$(VENV)/.recipes: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, not " + sys.version if sys.version_info < (3, 10) else 0)'
	@echo "setting up $(VENV) (about a minute and 2 GB) ..."
	@$(PYTHON) -m venv $(VENV)
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && \
	    $(RUN) -c "import urllib.request as r; r.urlopen('$(TORCH_CPU_INDEX)/torch/', timeout=5)" 2>/dev/null; then \
	    $(RUN) -m pip install --quiet --index-url $(TORCH_CPU_INDEX) --constraint constraints.txt torch; fi
	@$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[recipes]'
	@touch $@

$(VENV)/.ready: $(VENV)/.recipes
	@echo "adding what the tests need ..."
	@$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
