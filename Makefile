# The environment is made on first use. Clones may share one: make VENV=/path/to/venv test
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

# This clone's code runs, whatever is installed in the environment.
export PYTHONPATH := $(CURDIR)
# nbdev_export silently does nothing where IN_TEST is set.
unexport IN_TEST

.DEFAULT_GOAL := help
.PHONY: help venv demo test lab export readme bench bench-gpu teacher scenes text2image reference claims test-slurm report site clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: .installed ## make the environment, or bring it up to date with pyproject.toml

demo: .installed ## the main job: distil two teachers, with and without DDIL, into runs/demo
	$(call experiment,ddil,runs/demo)

test: .installed ## run all tests (a choice: make test ARGS="-k rollin")
	$(BIN)/python -m pytest $(ARGS)

lab: .installed ## open the notebooks of the library in JupyterLab
	$(BIN)/python -m jupyterlab nbs

export: .installed ## make ddil/ and README.md anew from the notebooks, and clean these
	mkdir -p ddil
	find ddil -name '*.py' ! -path ddil/__init__.py -delete
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_clean --fname index.ipynb
	$(BIN)/nbdev_clean --fname experiments
	$(BIN)/python tools/readme.py

readme: .installed ## make README.md anew from the stored outputs of index.ipynb
	$(BIN)/python tools/readme.py

bench: .installed ## measure speed into runs/bench.json
	mkdir -p runs
	$(BIN)/python -m ddil.benchmarks.bench --output runs/bench.json

bench-gpu: .installed ## measure a Stable-Diffusion-sized U-Net on a GPU into runs/bench-gpu.json
	mkdir -p runs
	$(BIN)/python -m ddil.benchmarks.bench_gpu --output runs/bench-gpu.json

teacher: .installed ## train the teacher and its classifier anew into runs/teacher (6 minutes)
	$(call experiment,teacher,runs/teacher)

scenes: .installed ## train the text-to-image model of captioned scenes anew into runs/scenes (an hour)
	$(call experiment,scenes,runs/scenes)

text2image: .installed ## distil the scenes model by every method into runs/text2image (another model: make text2image ARGS="-p preset sd15-coco -p model …")
	$(call experiment,text2image,runs/text2image,$(ARGS))

reference: .installed ## make the reference results of experiments/reference anew (hours of runs, two at a time; which they are and what each takes: make reference ARGS=--dry-run)
	$(BIN)/python -m ddil.cli batch experiments/batches/reference.yaml $(ARGS)
	$(BIN)/nbdev_clean --fname experiments

claims: .installed ## say which sentences of README and results their kept results do not carry (write the new numbers: make claims ARGS=--mend)
	$(BIN)/python tools/claims.py $(ARGS)

test-slurm: .installed ## try batches on a real SLURM of two nodes, on this machine (needs Debian's slurm-wlm and munge)
	tests/slurm/run.sh $(BIN)/python

report: .installed ## tables, curves and pages of the results below a folder (make report ARGS="runs/mine --output runs/report")
	$(BIN)/python -m ddil.cli report $(or $(ARGS),runs)

site: .installed ## build the documentation, with all notebooks and results, into runs/site
	$(BIN)/python -m ddil.cli site --output runs/site

clean: ## remove caches and build products (keeps runs/ and the environment)
	rm -rf build dist *.egg-info .pytest_cache .installed
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# $(call experiment,NAME,FOLDER,PARAMETERS): run experiments/NAME.ipynb with FOLDER as its output
define experiment
mkdir -p $(2)
DDIL_PROGRESS=log $(BIN)/python -m papermill experiments/$(1).ipynb $(2)/$(1).ipynb --kernel python3 --cwd . --log-output -p output $(2) $(3)
endef

# .installed says for which environment the dependencies were last seen to; another one, or none, means again.
ifneq ($(shell cat .installed 2>/dev/null):$(wildcard $(BIN)/python),$(abspath $(VENV)):$(BIN)/python)
.PHONY: .installed
endif

.installed: pyproject.toml | $(BIN)/python
	@echo "seeing to what ddil needs in $(VENV) (minutes, the first time)"
	@$(install)
	@$(install_k_diffusion)
	@echo "$(abspath $(VENV))" > $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("ddil needs Python 3.10 or newer, but $(PYTHON) is %d.%d. Name another: make PYTHON=python3.11 venv" % v[:2])'
	$(PYTHON) -m venv $(VENV)

# A shared environment gets the dependencies only: an editable install in it would point to one of its clones.
ifeq ($(VENV),.venv)
install = $(BIN)/python -m pip install --quiet --editable ".[dev]"
else
install = $(BIN)/python -c "$$install_dependencies"
endif

# The tests compare with k-diffusion's samplers. What it asks for (numpy<2, wandb, CLIP) would break the environment, and its samplers
# need only torchdiffeq and torchsde, which pyproject.toml names.
install_k_diffusion = $(BIN)/python -m pip install --quiet --no-deps k-diffusion==0.1.1.post1

define install_dependencies
import subprocess, sys
try: import tomllib
except ImportError: from pip._vendor import tomli as tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
names = project["dependencies"] + project["optional-dependencies"]["dev"]
sys.exit(subprocess.call([sys.executable, "-m", "pip", "install", "--quiet", *names]))
endef
export install_dependencies
