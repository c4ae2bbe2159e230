"""The rules of this repository: the style of the code, which module may import which, what a notebook may
store, and that everything that is written down twice says the same in both places."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from io import StringIO
from pathlib import Path

import pytest

import colab
import readme

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT/"nbs").glob("*.ipynb"))
CHAPTERS = sorted((ROOT/"nbs").glob("[0-9a][0-9]_*.ipynb"))
PAGES = "train evaluate compare_ema explore sweep settings ablation bench".split()
MODULES = ["__main__", *sorted(p.stem for p in (ROOT/"tinycats").glob("[a-z]*.py"))]
TESTS = [*sorted((ROOT/"tests").glob("*.py")), *sorted((ROOT/"docs").glob("*.py")), ROOT/"setup.py"]

# Which module may import which.
ARROWS = dict(
    util="", core="", params="", flow="", ema="",
    toy="core", data="util core folder", folder="util metrics", prefetch="data util", dit="util core hub",
    checkpoint="util", parallel="util",
    trainer="util core params flow ema checkpoint parallel",
    viz="util core flow", metrics="util core",
    runs="util core params data folder toy dit ema checkpoint metrics viz",
    recipe="util core params dit flow folder runs",
    explorer="util core dit flow viz runs parallel", pages="util params recipe runs",
    export="util params flow runs pages", cloud="util params pages checkpoint folder recipe",
    __main__="util params pages dit runs viz data export cloud hub tracking", hub="util",
    tracking="util params runs viz")

# What importing a module must not load.
TOOLS = """nbdev fastcore execnb nbformat nbconvert nbclient jupyter_client jupyter_core jupyterlab
           papermill""".split()
DISPLAY = "matplotlib IPython ipywidgets ipykernel torchvision".split()
UNWANTED = {name: [*TOOLS, "modal"] for name in ARROWS}
for name in "core data folder prefetch toy dit flow ema checkpoint trainer metrics parallel".split():
    UNWANTED[name] += DISPLAY
for name in ("util", "params", "pages", "hub", "__main__"):
    UNWANTED[name] += [*DISPLAY, "torch", "numpy"]
UNWANTED["cloud"] = [*TOOLS, *DISPLAY, "torch", "numpy"]

BINARY = (".png", ".safetensors", ".wasm")
MAX_COLUMNS = 110
MAX_CELL = 40
MAX_CLASS = 100
LONG_CLASSES = {}  # name: why it is longer than MAX_CLASS lines
VARIADIC = """reshape view permute expand repeat randn rand zeros ones drag run column
              arrow paint_fur""".split()  # these take any number of equal arguments
EVAL_ALLOWED = {"page.py"}  # it runs the cells of a notebook, which is what exec and eval are for

# Words of a private language that this book once spoke, and that the field has a term for (what follows the
# slash).
PRIVATE_WORDS = {
    r"\broads?\b": "path, trajectory", r"\btold\b": "conditioning; callback", r"\bheed": "catch signals",
    r"\bjudges?\b": "classifier, evaluation", r"\bjudged\b": "evaluated", r"\bby heart\b": "memorised",
    r"\bwhisper": "low amplitude", r"\bpainters?\b": "worker thread", r"\bwish(es)?\b": "request",
    r"\bknobs?\b": "control", r"\bseal(ed|s)?\b": "checksum", r"\basked for\b": "requested",
    r"\blistener": "callback", r"\btwins?\b": "near-duplicates"}


def stems(paths):
    return [p.stem for p in paths]


def notebook_cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def notebook_outputs(path):
    outputs = []
    for cell in notebook_cells(path):
        outputs += cell.get("outputs", [])
    return outputs


def python_sources():
    "All Python code as (where, text): code cells of notebooks, and the tests."
    for path in NOTEBOOKS:
        for number, cell in enumerate(notebook_cells(path)):
            if cell["cell_type"] == "code":
                lines = source(cell).splitlines()
                text = "\n".join("" if line.startswith(("%", "!")) else line for line in lines)
                yield f"{path.name} cell {number}", text
    for path in TESTS:
        yield path.name, path.read_text(encoding="utf-8")


def tracked_files():
    "What git keeps, or would keep once added."
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [p for p in map(ROOT.joinpath, sorted(set(listed.stdout.splitlines()))) if p.is_file()]


# -- Style -------------------------------------------------------------------------------------------------
# ------------

def test_lines_are_short():
    long = []
    for where, text in python_sources():
        long += [f"{where}: {line}" for line in text.splitlines() if len(line) > MAX_COLUMNS]
    for path in NOTEBOOKS:
        for cell in notebook_cells(path):
            if cell["cell_type"] != "markdown":
                continue
            rows = [line for line in source(cell).splitlines() if len(line) > MAX_COLUMNS]
            free = ("|", "![", "- <a id", "$$", "<", "[")  # tables, pictures, the bibliography, formulas
            long += [f"{path.name}: {line}" for line in rows if not line.lstrip().startswith(free)]
    assert not long, "\n".join(long)


def one_line_blocks(tree):
    "Compound statements whose body stands on the line of their head."
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list) or not isinstance(node, (ast.stmt, ast.ExceptHandler)):
            continue
        head = node.lineno
        decorated = getattr(node, "decorator_list", None)
        if body[0].lineno == head and not decorated:
            yield node.lineno


def called_name(call):
    "The last name of what is called: `view` of x.view(...)."
    return getattr(call.func, "attr", getattr(call.func, "id", None))


def style_faults(text):
    "Each violation of the style rules in one source, as (line, rule)."
    tree = ast.parse(text)
    for token in tokenize.generate_tokens(StringIO(text).readline):
        if token.type == tokenize.OP and token.string == ";":
            yield token.start[0], "two statements in a line (;)"
    for line in one_line_blocks(tree):
        yield line, "a block begins on the line of its head"
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        if isinstance(node, (ast.Assign, ast.For, ast.comprehension)):
            if any(isinstance(t, ast.Tuple) and len(t.elts) > 3 for t in targets):
                yield line, "more than three names unpacked at once"
        named = isinstance(node, ast.Assign) and isinstance(targets[0], ast.Name)
        if named and isinstance(node.value, ast.Lambda):
            yield line, "a lambda with a name: write a function"
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            if len(node.generators) > 1:
                yield line, "a comprehension with more than one for"
        claim = getattr(node, "test", None) if isinstance(node, ast.Assert) else None
        if isinstance(claim, ast.BoolOp) and isinstance(claim.op, ast.And):
            yield line, "two claims in one assertion"
        if isinstance(claim, ast.Constant):
            yield line, "an assertion of a constant: use test_fail or pytest.raises"
        if isinstance(node, ast.Call) and len(node.args) > 4 and called_name(node) not in VARIADIC:
            if not any(isinstance(a, ast.Starred) for a in node.args):
                yield line, "more than four positional arguments: name them"


def test_style_faults_are_found():
    "The rules themselves: each example breaks one."
    examples = ["a = 1; b = 2", "if a: b()", "a, b, c, d = e", "f = lambda x: x", "[a for b in c for a in b]",
                "assert a and b", "assert False", "f(1, 2, 3, 4, 5)", "class A: 'one line'",
                "for a in b: c()"]
    missed = [example for example in examples if len(list(style_faults(example))) != 1]
    assert not missed
    assert not list(style_faults("def f(a):\n    return [g(x) for x in a]\n\nf(1, 2, 3, b=4, c=5)"))


def test_style():
    faults = []
    for where, text in python_sources():
        faults += [f"{where}, line {line}: {rule}" for line, rule in style_faults(text)]
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults)


STARTS_PROCESSES = """Process Pool Manager ProcessPoolExecutor DataLoader LaunchConfig start_processes
                      spawn""".split()
NAMES_A_METHOD = "mp_context multiprocessing_context start_method method".split()


def unnamed_start_methods(text):
    """Lines that leave the start method of processes to Python: on Linux that was fork until 3.13, and
    is forkserver from 3.14. psutil.Process starts nothing."""
    tree = ast.parse(text)
    contexts = {"psutil"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            if called_name(node.value) == "get_context" and node.value.args:
                contexts.add(node.targets[0].id)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or called_name(node) not in STARTS_PROCESSES:
            continue
        owner = getattr(node.func, "value", None)
        named = contexts & {getattr(owner, "id", None)} or any(k.arg in NAMES_A_METHOD for k in node.keywords)
        if called_name(node) == "DataLoader":  # without workers there are no processes
            named = named or not any(k.arg == "num_workers" for k in node.keywords)
        if not named:
            yield node.lineno


def test_unnamed_start_methods_are_found():
    wrong = ["multiprocessing.Process(target=f)", "Pool(2)", "with ProcessPoolExecutor() as pool:\n    pass",
             "DataLoader(data, num_workers=2)", "LaunchConfig(min_nodes=1)", "mp.spawn(f)"]
    right = ["mp = get_context('spawn')\nmp.Process(target=f)", "psutil.Process(3)", "DataLoader(data)",
             "ProcessPoolExecutor(mp_context=context)", "LaunchConfig(start_method='spawn')"]
    assert not [text for text in wrong if list(unnamed_start_methods(text)) != [1]]
    assert not [text for text in right if list(unnamed_start_methods(text))]


def test_start_methods_are_named():
    found = []
    for where, text in python_sources():
        found += [f"{where}, line {line}" for line in unnamed_start_methods(text)]
    assert not found, f"name the start method: {found}"


def test_no_eval():
    found = []
    for where, text in python_sources():
        calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
        calls = [n for n in calls if isinstance(n.func, ast.Name)]
        if where not in EVAL_ALLOWED:
            found += [f"{where}: {n.func.id}" for n in calls if n.func.id in ("eval", "exec")]
    assert not found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stems(NOTEBOOKS))
def test_export_cells_are_short(path):
    long = []
    for cell in notebook_cells(path):
        text = source(cell)
        if cell["cell_type"] != "code" or "#| export" not in text:
            continue
        classes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ClassDef)]
        long += [f"class {n.name}: {n.end_lineno - n.lineno + 1} lines" for n in classes
                 if n.end_lineno - n.lineno >= MAX_CLASS and n.name not in LONG_CLASSES]
        if not classes and len(text.splitlines()) > MAX_CELL:
            long.append(f"{len(text.splitlines())} lines: {text.splitlines()[1]}")
    assert not long


@pytest.mark.parametrize("name", MODULES)
def test_importing_has_no_side_effect(name):
    "At the top level of a module: imports, definitions, constants."
    tree = ast.parse((ROOT/"tinycats"/f"{name}.py").read_text(encoding="utf-8"))
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        optional_import = isinstance(node, ast.Try) and isinstance(node.body[0], (ast.Import, ast.ImportFrom))
        guard = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        assert docstring or optional_import or guard or isinstance(node, allowed), ast.unparse(node)


def test_the_language_is_the_fields():
    "No word of the private language in names and prose."
    found = []
    for path in [*NOTEBOOKS, ROOT/"README.md", ROOT/"Makefile", *(ROOT/"nbs"/"params").glob("*.yaml")]:
        if path.suffix == ".ipynb":
            text = "\n".join(source(cell) for cell in notebook_cells(path))
        else:
            text = path.read_text(encoding="utf-8")
        for word, term in PRIVATE_WORDS.items():
            lines = [line.strip() for line in text.splitlines() if re.search(word, line, re.I)]
            found += [f"{path.name}: {word} ({term}): {line}" for line in lines]
    assert not found, "\n".join(found)


# -- Modules -----------------------------------------------------------------------------------------------
# ------------

def imported_modules(text):
    "The modules of tinycats that a source names, in whichever spelling, inside functions too."
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("tinycats."))
        elif isinstance(node, ast.ImportFrom):
            module = ("tinycats." if node.level else "") + (node.module or "")
            if module.rstrip(".") == "tinycats":
                yield from (a.name for a in node.names)
            elif module.startswith("tinycats."):
                yield module.split(".")[1]


@pytest.mark.parametrize("name", MODULES)
def test_arrows(name):
    assert name in ARROWS, f"tinycats/{name}.py has no arrows: say in tests/test_rules.py what it may import"
    text = (ROOT/"tinycats"/f"{name}.py").read_text(encoding="utf-8")
    stray = set(imported_modules(text)) - set(ARROWS[name].split())
    assert not stray, f"{name} must not import {stray}"


IMPORT_EACH = """
import importlib, os, sys
for name in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module(f"tinycats.{name}")
        print(name, *{module.split(".")[0] for module in sys.modules}, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, name
"""


def test_imports_alone():
    "Each module in a process of its own, where nothing but PyTorch was imported before; or not even that."
    without_torch = [name for name in MODULES if "torch" in UNWANTED[name]]
    groups = [(IMPORT_EACH, without_torch), ("import torch" + IMPORT_EACH, set(MODULES) - set(without_torch))]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSTARTUP"} | {"PYTHONPATH": str(ROOT)}
    for code, names in groups:
        command = [sys.executable, "-c", code, *names]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = {line.split()[0]: set(line.split()[1:]) for line in done.stdout.splitlines()}
        assert found.keys() == set(names)
        for name, loaded in found.items():
            unwanted = loaded & set(UNWANTED[name])
            assert not unwanted, f"importing tinycats.{name} also loads {unwanted}"


# -- Notebooks
# ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", NOTEBOOKS, ids=stems(NOTEBOOKS))
def test_title_and_subtitle(path):
    lines = source(next(c for c in notebook_cells(path) if c["cell_type"] == "markdown")).splitlines()
    assert lines[0].startswith("# ")
    assert [line for line in lines[1:] if line.strip()][0].startswith("> ")
    settings = [line for line in lines if re.match(r"-\s+(?!skip_exec:|<a id)\S.*:.*\S", line)]
    assert not settings, "nbdev reads a list with colons below the title as settings"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stems(NOTEBOOKS))
def test_outputs_are_clean(path):
    outputs = notebook_outputs(path)
    assert not any(c.get("execution_count") for c in notebook_cells(path))
    assert not any(o.get("execution_count") for o in outputs)
    assert not [o["evalue"] for o in outputs if o["output_type"] == "error"]
    assert not [o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
    assert not [o for o in outputs if o.get("name") == "stderr"], "a cell leaves a warning or a progress bar"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stems(NOTEBOOKS))
def test_size(path):
    assert path.stat().st_size < (500_000 if path in CHAPTERS else 2_000_000)


@pytest.mark.parametrize("path", CHAPTERS, ids=stems(CHAPTERS))
def test_prose_code_and_tests_are_balanced(path):
    cells = notebook_cells(path)
    code = [source(c) for c in cells if c["cell_type"] == "code"]
    claim = re.compile(r"^\s*(assert\b|assert_close|test_(eq|ne|close|fail|is|eq_type|stdout)\()", re.M)
    tests = [text for text in code if claim.search(text) and "#| export" not in text]
    assert .2 <= (len(cells) - len(code))/len(cells) <= .6
    assert .15 <= len(tests)/len(code) <= .5
    assert any("#| export" in text for text in code)


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_papermills(name):
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    path = ROOT/"nbs"/f"{name}.ipynb"
    frontmatter = NBProcessor(path, procs=FrontmatterProc, process=True).nb.frontmatter_
    needed = "nbdev_test would run it: give it a raw cell of three lines, ---, skip_exec: true and ---"
    assert frontmatter.get("skip_exec") is True, needed
    if name not in ("train", "evaluate"):
        return
    cells = [c for c in notebook_cells(path) if c["cell_type"] == "code"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    declarations = ast.parse(source(tagged[0])).body
    assert all(isinstance(n, ast.AnnAssign) for n in declarations), "declare every parameter with its type"
    nodes = ast.walk(ast.parse("\n".join(map(source, cells))))
    defined = [n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert not defined, "definitions belong in a chapter"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "The notebooks in a tree of their own, after nbdev_export from nothing and nbdev_clean."
    there = tmp_path_factory.mktemp("rules")
    shutil.copytree(ROOT/"nbs", there/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py", "README.md"):
        shutil.copy(ROOT/name, there)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    for tool in ("nbdev_export", "nbdev_clean"):
        command = [Path(sys.executable).with_name(tool)]
        done = subprocess.run(command, cwd=there, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return there


def contents(folder, pattern):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.glob(pattern))}


def test_package_is_what_the_notebooks_export(exported):
    ours = contents(ROOT, "tinycats/*.py")
    theirs = contents(exported, "tinycats/*.py")
    assert set(ours) == set(theirs), "a module without a notebook, or not exported: run nbdev_export"
    changed = [name for name in ours if ours[name] != theirs[name]]
    assert not changed, "edited by hand, or not exported: change the notebook and run nbdev_export"
    files = {"nbs", "tinycats", "settings.ini", "setup.py", "README.md"}
    assert {p.name for p in exported.iterdir()} == files


def test_notebooks_are_clean(exported):
    ours = contents(ROOT, "nbs/*.ipynb")
    theirs = contents(exported, "nbs/*.ipynb")
    assert not [name for name in ours if ours[name] != theirs[name]], "run nbdev_clean"


# -- What is written twice
# ---------------------------------------------------------------------------------------------

def test_readme_is_the_index():
    text, images = readme.render(ROOT)
    assert (ROOT/"README.md").read_text(encoding="utf-8") == text, "run python tests/readme.py"
    changed = [path for path, data in images.items() if (ROOT/path).read_bytes() != data]
    assert not changed, "run python tests/readme.py"
    links = re.findall(r'\]\((?![a-z]+:|#)([^)\s#]+)|(?:src|href)="(?![a-z]+:|#)([^"#]+)', text)
    assert not [a or b for a, b in links if not (ROOT/(a or b)).exists()], "the README points at nothing"


def test_readme_is_short():
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1500


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stems(NOTEBOOKS))
def test_links_between_pages(path):
    "A link to another file of the repository finds it."
    text = "\n".join(source(c) for c in notebook_cells(path) if c["cell_type"] == "markdown")
    links = re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", text)
    missing = [link for link in links if not (path.parent/link).exists()]
    assert not missing


def test_no_place_is_named():
    "No file names a package registry or a folder of a machine; only tests/helpers.py knows the shared files."
    registries = ["py" + "pi.org", "python" + "hosted", "download." + "pytorch"]
    registries += ["--index" + "-url", "--find" + "-links"]
    machines = ["/" + f + "/" for f in ("root", "home", "work", "Users", "opt")] + ["/tmp" + "/book"]
    found = []
    for path in tracked_files():
        if path.suffix in BINARY or "vendor" in path.parts:
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        wanted = registries + machines + ([] if path.name == "helpers.py" else ["../" + "shared"])
        if path.suffix == ".ipynb":  # base64 of pictures may spell anything
            text = re.sub(r'"image/png": "[^"]*"', "", text)
        found += [f"{path.relative_to(ROOT)}: {w}" for w in wanted if w in text]
    assert not found


def test_no_file_is_orphaned():
    "Every parameter file, picture and script is referred to somewhere."
    texts = {}
    for path in tracked_files():
        if path.suffix not in BINARY:
            texts[path] = path.read_text(encoding="utf-8", errors="ignore")
    for path in tracked_files():
        if path.parent not in (ROOT/"nbs"/"params", ROOT/"nbs"/"images", ROOT/"tests"):
            continue
        if path.stem.startswith("test_") or path.name == "conftest.py":
            continue
        name = path.stem if path.suffix == ".py" else path.name
        users = [other for other, text in texts.items() if other != path and re.search(rf"\b{name}\b", text)]
        assert users, f"{path.relative_to(ROOT)} is referred to by nothing"


def test_python_versions_agree():
    "settings.ini, the workflow and nbdev's own key name the same Pythons."
    ini = dict(re.findall(r"^(\w+) *= *(.*)$", (ROOT/"settings.ini").read_text(encoding="utf-8"), re.M))
    versions = ini["python_versions"].split()
    assert versions[0] == ini["min_python"]
    assert json.dumps(versions) in (ROOT/".github"/"workflows"/"ci.yml").read_text(encoding="utf-8")


def test_the_citation_agrees_with_settings():
    ini = dict(re.findall(r"^(\w+) *= *(.*)$", (ROOT/"settings.ini").read_text(encoding="utf-8"), re.M))
    citation = (ROOT/"CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {ini['version']}" in citation
    assert f"repository-code: {colab.owner()[0]}\n" in citation
    assert f"name: {ini['author']}" in citation


@pytest.mark.parametrize("path", colab.pages(), ids=stems(colab.pages()))
def test_pages_open_in_colab(path):
    "The badge names this repository, and the cell below it installs tinycats on Colab alone."
    cells = notebook_cells(path)
    assert colab.sources(cells) == colab.sources(colab.render(path)), "run python tests/colab.py"


def test_owner_values_are_in_one_place():
    "User and repository are written out where CONTRIBUTING.md says, and nowhere else."
    address, place = colab.owner()
    written = {ROOT/"settings.ini", ROOT/"CITATION.cff", ROOT/"tinycats"/"_modidx.py", *colab.pages()}
    name = place.partition("/blob/")[0]
    found = [path for path in tracked_files() if path.suffix not in BINARY and "outputs" not in path.parts
             and re.search(rf"github(\.com|\.io|/)[/:]?{name}\b", path.read_text("utf-8", "ignore"))]
    assert not set(found) - written


def test_actions_are_pinned_by_commit():
    "A tag can be moved to other code, a commit cannot."
    for path in (ROOT/".github"/"workflows").glob("*.yml"):
        uses = re.findall(r"uses: (\S+)(.*)", path.read_text(encoding="utf-8"))
        assert uses
        for action, comment in uses:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), f"{path.name}: {action}"
            assert re.fullmatch(r" # v[\d.]+", comment), f"{path.name}: say the version of {action}"


def test_the_habits_name_what_exists():
    "Files and commands that CONTRIBUTING.md and the hooks name are there."
    import yaml
    text = (ROOT/"CONTRIBUTING.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert not [link for link in links if not (ROOT/link).exists()]
    assert not [name for name in re.findall(r"(tests/\w+\.\w+)", text) if not (ROOT/name).exists()]
    hooks = yaml.safe_load((ROOT/".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"nbdev-export", "nbdev-clean", "rules"}
    version = re.search(r"^version *= *(.*)$", (ROOT/"settings.ini").read_text(), re.M)[1]
    changes = (ROOT/"CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {version}" in changes or f"{version} will be" in changes
    for path in [ROOT/".github"/"dependabot.yml", *(ROOT/".github").glob("ISSUE_TEMPLATE/*.yml")]:
        assert yaml.safe_load(path.read_text(encoding="utf-8"))
    assert json.loads((ROOT/".devcontainer"/"devcontainer.json").read_text())["onCreateCommand"]
