# Every target sets up what it needs by itself: the environment in .venv is made on first use, and again when
# settings.ini, setup.py or constraints.txt change. Another Python: make PYTHON=python3.12 demo

PYTHON ?= python3
VENV   ?= .venv
PYTHON_HERE := $(VENV)/bin/python
READY  := $(VENV)/ready

# Programs are started as modules, because scripts in $(VENV)/bin would not survive a move of this folder. The name of
# a run and the parameters go through the environment, so that no shell reads quotes and spaces in them.
PAGE   := $(PYTHON_HERE) -m tinycats.pages
export TINYCATS_ARGS = $(value args)
ifneq ($(origin run),undefined)
export TINYCATS_RUN = $(value run)
endif

# Threads that wait do not keep a busy computer's cores: see nbs/12_pages.ipynb.
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 1000
endif

VERSIONS := $(shell sed -n 's/^python_versions *= *//p' settings.ini)
CHECK    := import sys; here = sys.version_info[:2]; names = sys.argv[1:]; found = "%d.%d" % here; \
            known = [tuple(map(int, name.split("."))) for name in names]; \
            here < known[0] and sys.exit("This is Python %s, and tinycats needs %s or newer. Name one: \
            make PYTHON=python%s ..." % (found, names[0], names[len(names)//2])); \
            here > known[-1] and print("This is Python %s, and tinycats was tried with %s. Should something \
            fail: make PYTHON=python%s ..." % (found, " ".join(names), names[-1]), file=sys.stderr)

# Groups of files in a recipe need GNU make 3.82 or newer; macOS brings 3.81, which works too.
ifeq ($(filter oneshell order-only,$(.FEATURES)),)
$(error This is make $(MAKE_VERSION), and tinycats needs GNU make 3.81 or newer. Without make: pip install -e '.[lab]', then tinycats)
endif

.PHONY: help demo evaluate explore page site lab test data pull bench

help: ## list the targets (this list)
	@awk -F':.*## ' '/^[a-z]*:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: $(READY) ## train on toy cats and generate a sheet of them; another run: run=longer args="-p steps 9000"
	@$(PAGE) train

evaluate: $(READY) ## generate with a run and score it: run=toy args="-p cfg_scale 3"; one class: args="-p classes Siamese"
	@TINYCATS_RUN="$${TINYCATS_RUN-demo}" $(PAGE) evaluate

explore: $(READY) ## open the explorer alone, without code, in the browser
	@$(PYTHON_HERE) -m voila nbs/explore.ipynb --Voila.tornado_settings="{'allow_remote_access': False}" $(args)

page: $(READY) ## write a web page that draws in the browser: run=toy; other weights: args="--weights int8"
	@$(PYTHON_HERE) -m tinycats.export

site: $(READY) ## render the book as a web site into _site; in a hurry, without running anything: quick=1
	@$(PYTHON_HERE) docs/build.py $(if $(filter-out 0 no false False,$(quick)),--quick)

lab: $(READY) ## open the book in JupyterLab
	@$(PYTHON_HERE) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb $(args)

test: $(READY) ## run every test of the book, then those of tests/; for pytest: args="-k rules"
	OMP_NUM_THREADS=1 $(PYTHON_HERE) -c 'from nbdev.test import nbdev_test; nbdev_test()'
	OMP_NUM_THREADS=1 $(PYTHON_HERE) -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests $(args)

data: $(READY) ## download the Oxford-IIIT Pet pictures once, into data/
	@$(PYTHON_HERE) -m tinycats data

pull: $(READY) ## download a run from Modal: run=big; with what is needed to train on: args=--checkpoints
	@$(PYTHON_HERE) -m tinycats.cloud pull "$${TINYCATS_RUN-demo}" $$TINYCATS_ARGS

bench: $(READY) ## time tinycats against other code, interleaved, into outputs/bench; in a hurry: quick=1
	@$(PYTHON_HERE) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@$(PAGE) bench -p quick $(if $(filter-out 0 no false False,$(quick)),True,False)

# The stamp comes last, so that an interrupted set-up is resumed. An environment of another Python is made anew.
$(READY): settings.ini setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || \
	  { echo "There is no $(PYTHON) here. Name a Python of $(VERSIONS): make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c '$(CHECK)' $(VERSIONS)
	@echo "Setting up $(VENV) (the first time takes some minutes, most of them for torch)"
	@test "$$($(PYTHON_HERE) -m pip -V 2>/dev/null | sed 's/.*(//')" = \
	  "$$($(PYTHON) -c 'import sys; print("python %d.%d)" % sys.version_info[:2])')" || $(PYTHON) -m venv --clear $(VENV)
	@$(PYTHON_HERE) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[lab,cloud,dev]'
	@touch $@
