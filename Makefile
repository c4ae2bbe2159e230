# Every target sets up all it needs by itself: the environment in .venv is made on first use and again when
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

.PHONY: help demo evaluate ablation settings test lab explore data pull readme book toy soak browser sabotage bench constraints

help: ## say what there is (this list)
	@awk -F':.*## ' '/^[a-z]*:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: $(READY) ## train on toy cats and draw a page of them; another run: run=longer args="-p steps 9000"
	@case '$(run)' in ''|.*|*/*|*' '*) echo "run=$(run): give the plain name of a folder" >&2; exit 1;; esac
	@mkdir -p outputs/$(run)
	@$(RUNS) nbs/train.ipynb outputs/$(run)/train.ipynb $(args) -p run $(run)

evaluate: $(READY) ## draw cats with a run and judge them: run=toy args="-p cfg_scale 3"; of one breed: args="-p breeds Siamese"
	@test -d 'outputs/$(run)' || { echo "run=$(run): there is no folder outputs/$(run); train it with make demo run=$(run), or try run=toy" >&2; exit 1; }
	@mkdir -p outputs/$(run)/evaluation
	@$(RUNS) nbs/evaluate.ipynb outputs/$(run)/evaluation/evaluate.ipynb $(args) -p run $(run)

ablation: $(READY) ## train a recipe several times, one thing changed each time: run=heads64 args="-f nbs/params/ablation64.yaml"
	@mkdir -p outputs/ablation/$(run)
	@$(RUNS) nbs/ablation.ipynb outputs/ablation/$(run)/ablation.ipynb $(args) -p run $(run)

settings: $(READY) ## draw with a run in many ways and judge each: run=toy
	@test -d 'outputs/$(run)' || { echo "run=$(run): there is no folder outputs/$(run); train it with make demo run=$(run), or try run=toy" >&2; exit 1; }
	@mkdir -p outputs/$(run)/settings
	@$(RUNS) nbs/settings.ipynb outputs/$(run)/settings/settings.ipynb $(args) -p run $(run)

test: $(READY) ## run every test of the book, then those of tests/; for pytest: args="-k house"
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests $(args)

lab: $(READY) ## open the book in JupyterLab
	@$(BIN)/jupyter-lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb $(args)

explore: $(READY) ## open the explorer alone, without code, in the browser
	@$(BIN)/voila nbs/explore.ipynb $(args)

data: $(READY) ## fetch the Oxford-IIIT Pet pictures once, into data/
	@$(BIN)/python -c 'from tinycats.data import load_pets; [load_pets(split=s, size=144, download=True) for s in ("trainval", "test")]'

pull: $(READY) ## bring a run home from Modal: run=big; with what is needed to train on: args=checkpoints=True
	@$(BIN)/python -c 'import sys; from tinycats.cloud import in_one_line, pull; print(in_one_line(pull, "$(run)", $(args)))'

book: $(READY) ## write the package and the clean notebooks from nbs/
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean

readme: $(READY) ## write README.md from nbs/index.ipynb
	@$(BIN)/python tests/readme.py

toy: $(READY) ## train the small published model again, into outputs/toy
	@mkdir -p outputs/toy
	@$(RUNS) nbs/train.ipynb outputs/toy/train.ipynb -f nbs/params/toy.yaml $(args)
	@$(BIN)/python -c 'import torch; from tinycats.dit import load_model, save_model; m = load_model("outputs/toy"); \
	  save_model(m, "outputs/toy/ema.safetensors", torch.bfloat16, **m.facts)'

sabotage: $(READY) ## break the book on purpose, one idea at a time: a test has to notice each
	@$(BIN)/python tests/sabotage.py $(args)

soak: $(READY) ## kill a run more than a thousand times
	TINYCATS_KILLS=1000 $(BIN)/python -m pytest tests/test_checkpoint.py tests/test_runs.py -k killed_at_any_moment $(args)
	TINYCATS_LONG=1 $(BIN)/python -m pytest tests/test_cloud.py -k evaluated $(args)

bench: $(READY) ## race tinycats against other code, turn by turn, into outputs/bench; in a hurry: quick=1
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@mkdir -p outputs/bench
	@$(RUNS) nbs/bench.ipynb outputs/bench/bench.ipynb -p quick $(if $(filter-out 0 no false False,$(quick)),True,False) $(args)

browser: $(READY) ## try the explorer in JupyterLab and voila with a real chromium, ten times in a row
	@for i in 1 2 3 4 5 6 7 8 9 10; do $(BIN)/python -m pytest -q -x -s tests/test_browser.py $(args) || exit 1; done

constraints: $(READY) ## pin the newest versions of everything (in an environment of the oldest Python)
	@$(BIN)/python -c '$(CHECK)' $(firstword $(VERSIONS))
	$(BIN)/python -m pip install -q -U --upgrade-strategy eager -e '.[dev,bench,fid]'
	@{ grep '^#' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable \
	  | grep -Eiv '^(nvidia|cuda|triton|tinycats|setuptools|wheel|#)' | sed 's/+.*//' | sort -f; } > constraints.new
	@mv constraints.new constraints.txt

# The stamp comes last, so a set-up cut short is taken up again. An environment of another Python is made anew.
$(READY): settings.ini setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here. Name a Python of $(VERSIONS): make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c '$(CHECK)' $(VERSIONS)
	@echo "Setting up $(VENV) (the first time takes some minutes, most of them for torch)"
	@test "$$($(BIN)/python -m pip -V 2>/dev/null | sed 's/.*(//')" = "$$($(PYTHON) -c 'import sys; print("python %d.%d)" % sys.version_info[:2])')" \
	  || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
