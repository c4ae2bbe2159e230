"The rules of the house: who imports whom, what a notebook may carry, and that everything written twice says the same."
import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

import readme

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT/"nbs").glob("[0-9][0-9]_*.ipynb"))
RUNNABLE = [ROOT/"nbs"/f"{n}.ipynb" for n in ("train", "evaluate", "compare_ema", "explore", "sweep", "bench", "ablation", "settings")]
NOTEBOOKS = sorted((ROOT/"nbs").glob("*.ipynb"))
MODULES = sorted(p.stem for p in (ROOT/"tinycats").glob("*.py") if not p.stem.startswith("_"))

# Who may import whom, and what nobody here may bring along.
ARROWS = dict(data="", dit="", flow="", ema="", checkpoint="", params="", metrics="", trainer="flow ema checkpoint",
              gallery="data flow", explorer="data dit flow gallery", cloud="params",
              bench="data dit flow trainer")
TOOLS = "nbdev fastcore execnb nbformat nbconvert nbclient jupyter_client jupyter_core jupyterlab papermill modal".split()
LOOKS = "matplotlib IPython ipywidgets ipykernel".split()
FORBIDDEN = {name: TOOLS for name in ARROWS} | {name: TOOLS + LOOKS for name in "data dit flow ema checkpoint trainer".split()}
FORBIDDEN |= {"data": TOOLS + LOOKS + ["torchvision"], "params": TOOLS + LOOKS + ["torch", "numpy"],
              "cloud": [t for t in TOOLS if t != "modal"] + LOOKS + ["torch"]}


def ids(paths): return [p.stem for p in paths]


def cells_of(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


def outputs_of(path): return [o for c in cells_of(path) for o in c.get("outputs", [])]


def files():
    "What git keeps, or would keep once added."
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip("not a git checkout")
    return [p for p in map(ROOT.joinpath, sorted(set(listed.stdout.splitlines()))) if p.is_file()]


def ours_in(source):
    "The modules of tinycats that a source names, in whichever spelling, inside functions too."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("tinycats."))
        elif isinstance(node, ast.ImportFrom):
            module = ("tinycats." if node.level else "") + (node.module or "")
            if module.rstrip(".") == "tinycats": yield from (a.name for a in node.names)
            elif module.startswith("tinycats."): yield module.split(".")[1]


@pytest.mark.parametrize("name", MODULES)
def test_arrows(name):
    assert name in ARROWS, f"tinycats/{name}.py has no arrows: say in tests/test_house.py what it may import"
    stray = set(ours_in((ROOT/"tinycats"/f"{name}.py").read_text(encoding="utf-8"))) - set(ARROWS[name].split())
    assert not stray, f"{name} must not import {stray}"


@pytest.mark.parametrize("name", MODULES)
def test_imports_alone(name):
    code = f"import sys, tinycats.{name}; print(*{{m.split('.')[0] for m in sys.modules}})"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSTARTUP"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    brought = set(done.stdout.split()) & set(FORBIDDEN.get(name, TOOLS))
    assert not brought, f"importing tinycats.{name} brings along {brought}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids(NOTEBOOKS))
def test_title_and_subtitle(path):
    lines = "".join(next(c["source"] for c in cells_of(path) if c["cell_type"] == "markdown")).splitlines()
    assert lines[0].startswith("# ") and [l for l in lines[1:] if l.strip()][0].startswith("> ")
    assert not [l for l in lines if re.match(r"-\s+(?!skip_exec:)\S.*:.*\S", l)], "nbdev reads a list with colons below the title as settings"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids(NOTEBOOKS))
def test_outputs_are_clean(path):
    assert not any(c.get("execution_count") for c in cells_of(path)) and not any(o.get("execution_count") for o in outputs_of(path))
    assert not [o["evalue"] for o in outputs_of(path) if o["output_type"] == "error"]
    assert not [o for o in outputs_of(path) if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
    assert not [o for o in outputs_of(path) if o.get("name") == "stderr"], "a cell leaves a warning or a progress bar"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids(NOTEBOOKS))
def test_size(path):
    assert path.stat().st_size < (500_000 if path in CHAPTERS else 2_000_000)


@pytest.mark.parametrize("path", CHAPTERS, ids=ids(CHAPTERS))
def test_beat(path):
    "Prose, code and tests in balance; and pictures or values where the code is, no speeches."
    cells = cells_of(path)
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    tests = [s for s in code if re.search(r"^\s*(for .*:|if .*:|with .*:)?\s*(assert\b|assert_close)", s, re.M) and "#| export" not in s]
    assert .2 <= len([c for c in cells if c["cell_type"] == "markdown"])/len(cells) <= .6
    assert .15 <= len(tests)/len(code) <= .5
    assert any("#| export" in s for s in code)


@pytest.mark.parametrize("path", [p for p in RUNNABLE if p.exists()], ids=ids([p for p in RUNNABLE if p.exists()]))
def test_runnable_notebooks_are_papermills(path):
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    assert NBProcessor(path, procs=FrontmatterProc, process=True).nb.frontmatter_.get("skip_exec") is True, \
        "nbdev_test would run it: give it a raw cell of three lines, ---, skip_exec: true and ---"
    source = "\n".join("".join(c["source"]) for c in cells_of(path) if c["cell_type"] == "code")
    if path.stem in ("train", "evaluate"):
        tagged = [c for c in cells_of(path) if "parameters" in c["metadata"].get("tags", [])]
        assert len(tagged) == 1
        assert all(isinstance(n, ast.AnnAssign) for n in ast.parse("".join(tagged[0]["source"])).body), "declare every parameter with its type"
        assert not [n.name for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.ClassDef))], "definitions belong in a chapter"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "The notebooks in a tree of their own, after nbdev_export from nothing and nbdev_clean."
    there = tmp_path_factory.mktemp("house")
    shutil.copytree(ROOT/"nbs", there/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py", "README.md"): shutil.copy(ROOT/name, there)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    for tool in ("nbdev_export", "nbdev_clean"):
        done = subprocess.run([Path(sys.executable).with_name(tool)], cwd=there, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return there


def tree(folder, pattern): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.glob(pattern))}


def test_package_is_what_the_notebooks_export(copy):
    ours, theirs = tree(ROOT, "tinycats/*.py"), tree(copy, "tinycats/*.py")
    assert set(ours) == set(theirs), "a module without a notebook, or a notebook not exported: run make book"
    assert not [n for n in ours if ours[n] != theirs[n]], "edited by hand, or not exported: change the notebook and run make book"
    assert {p.name for p in copy.iterdir()} == {"nbs", "tinycats", "settings.ini", "setup.py", "README.md"}


def test_notebooks_are_clean(copy):
    ours, theirs = tree(ROOT, "nbs/*.ipynb"), tree(copy, "nbs/*.ipynb")
    assert not [n for n in ours if ours[n] != theirs[n]], "run make book"


@pytest.mark.skipif(not (ROOT/"nbs"/"index.ipynb").exists(), reason="nbs/index.ipynb is not written yet")
def test_readme_is_the_index():
    text, pictures = readme.render(ROOT)
    assert (ROOT/"README.md").read_text(encoding="utf-8") == text, "run make readme"
    assert all((ROOT/path).read_bytes() == data for path, data in pictures.items()), "run make readme"
    links = re.findall(r'\]\((?![a-z]+:|#)([^)\s#]+)|(?:src|href)="(?![a-z]+:|#)([^"#]+)', text)
    assert not [a or b for a, b in links if not (ROOT/(a or b)).exists()], "the README points at nothing"


def test_no_place_is_named():
    "No file names a package registry or a folder of somebody's machine; only the tests' helper knows where shared files lie."
    registries = ["py" + "pi.org", "python" + "hosted", "download." + "pytorch", "--index" + "-url", "--find" + "-links"]
    machines = ["/" + f + "/" for f in ("root", "home", "work", "Users", "opt")] + ["/tmp" + "/book"]
    found = []
    for path in files():
        text = path.read_bytes().decode("utf-8", errors="ignore") if path.suffix not in (".png", ".safetensors") else ""
        wanted = registries + machines + ([] if path.name == "helpers.py" else ["../" + "shared"])
        if path.suffix == ".ipynb":   # the text of a notebook; its pictures are letters that may spell anything
            text = re.sub(r'"image/png": "[^"]*"', "", text)
        found += [f"{path.relative_to(ROOT)}: {w}" for w in wanted if w in text]
    assert not found


def test_python_versions_agree():
    "settings.ini, the workflow and nbdev's own key name the same Pythons."
    ini = dict(re.findall(r"^(\w+) *= *(.*)$", (ROOT/"settings.ini").read_text(encoding="utf-8"), re.M))
    versions = ini["python_versions"].split()
    assert versions[0] == ini["min_python"]
    assert json.dumps(versions) in (ROOT/".github"/"workflows"/"ci.yml").read_text(encoding="utf-8")
