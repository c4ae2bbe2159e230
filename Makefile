# Every target sets up what it needs by itself: the environment in .venv is made on first use, and again when
# settings.ini, setup.py or constraints.txt change. Another Python: make PYTHON=python3.12 demo

PYTHON ?= python3
VENV   ?= .venv
run    ?= demo
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
RUNS   := $(BIN)/papermill --no-progress-bar --log-level WARNING --stdout-file - --stderr-file -

VERSIONS := $(shell sed -n 's/^python_versions *= *//p' settings.ini)
CHECK    := import sys; found = "%d.%d" % sys.version_info[:2]; \
            found in sys.argv[1:] or sys.exit("This is Python %s, and tinycats runs on %s. Name one of them: \
            make PYTHON=python%s ..." % (found, " ".join(sys.argv[1:]), sys.argv[len(sys.argv)//2]))
NO_RUN   := run=$(run): there is no folder outputs/$(run); train it with make demo run=$(run), or try run=toy

.PHONY: help demo evaluate explore lab test data pull bench

help: ## list the targets (this list)
	@awk -F':.*## ' '/^[a-z]*:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: $(READY) ## train on toy cats and generate a sheet of them; another run: run=longer args="-p steps 9000"
	@case '$(run)' in ''|.*|*/*|*' '*) echo "run=$(run): give the plain name of a folder" >&2; exit 1;; esac
	@mkdir -p outputs/$(run)
	@$(RUNS) nbs/train.ipynb outputs/$(run)/train.ipynb $(args) -p run $(run)

evaluate: $(READY) ## generate with a run and score it: run=toy args="-p cfg_scale 3"; one class: args="-p classes Siamese"
	@test -d 'outputs/$(run)' || { echo "$(NO_RUN)" >&2; exit 1; }
	@mkdir -p outputs/$(run)/evaluation
	@$(RUNS) nbs/evaluate.ipynb outputs/$(run)/evaluation/evaluate.ipynb $(args) -p run $(run)

explore: $(READY) ## open the explorer alone, without code, in the browser
	@$(BIN)/voila nbs/explore.ipynb $(args)

lab: $(READY) ## open the book in JupyterLab
	@$(BIN)/jupyter-lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb $(args)

test: $(READY) ## run every test of the book, then those of tests/; for pytest: args="-k rules"
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests $(args)

data: $(READY) ## download the Oxford-IIIT Pet pictures once, into data/
	@$(BIN)/python -c 'from tinycats import load_pets; \
	  [load_pets(split=s, size=144, download=True) for s in ("trainval", "test")]'

pull: $(READY) ## download a run from Modal: run=big; with what is needed to train on: args=--checkpoints
	@$(BIN)/python -m tinycats.cloud pull $(run) $(args)

bench: $(READY) ## time tinycats against other code, interleaved, into outputs/bench; in a hurry: quick=1
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@mkdir -p outputs/bench
	@$(RUNS) nbs/bench.ipynb outputs/bench/bench.ipynb -p quick $(if $(filter-out 0 no false False,$(quick)),True,False) $(args)

# The stamp comes last, so that an interrupted set-up is resumed. An environment of another Python is made anew.
$(READY): settings.ini setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || \
	  { echo "There is no $(PYTHON) here. Name a Python of $(VERSIONS): make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c '$(CHECK)' $(VERSIONS)
	@echo "Setting up $(VENV) (the first time takes some minutes, most of them for torch)"
	@test "$$($(BIN)/python -m pip -V 2>/dev/null | sed 's/.*(//')" = \
	  "$$($(PYTHON) -c 'import sys; print("python %d.%d)" % sys.version_info[:2])')" || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
