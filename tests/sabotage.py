"""Break the code on purpose, one idea at a time, and check that a test notices:

    python tests/sabotage.py [words of titles]

A test that cannot fail proves nothing. Each row of sabotages.yaml changes the text of exported code in a
copy of the repository, exports, and runs the notebook (or pytest file) that has to notice. It must fail, in
the very assertion that is named. First, all of them have to pass as they are."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
FILES = """nbs tinycats tests settings.ini setup.py README.md CITATION.cff constraints.txt MANIFEST.in
           LICENSE Makefile .gitignore .github CONTRIBUTING.md CHANGELOG.md SECURITY.md .devcontainer
           .pre-commit-config.yaml""".split()


def copy_repository(there):
    "A working copy of the repository, without its history, environment and runs."
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in FILES:
        if (ROOT/name).is_dir():
            shutil.copytree(ROOT/name, there/name, ignore=skip)
        else:
            shutil.copy(ROOT/name, there/name)
    (there/"outputs").mkdir()
    for name in ("outputs/toy", "outputs/pets64", "data"):
        if (ROOT/name).exists():
            (there/name).symlink_to(ROOT/name)


def apply_changes(path, changes):
    """Change exported code. Every text must occur exactly once, so that a stale row is noticed: returns
    what is wrong."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code" and "#| export" in "".join(c["source"])]
    for old, new in changes.items():
        matching = [c for c in cells if old in "".join(c["source"])]
        count = sum("".join(c["source"]).count(old) for c in matching)
        if count != 1:
            return f"{path.name} has {count} times, not once: {old}"
        matching[0]["source"] = "".join(matching[0]["source"]).replace(old, new).splitlines(True)
    path.write_text(json.dumps(notebook), encoding="utf-8")


def run(there, *command):
    "Exit code and output of a Python command in the copy."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    env |= {"PYTHONPATH": str(there), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *command], cwd=there, env=env, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def run_tests(there, name):
    "Run the notebook or test file that has to notice."
    if name.startswith("tests/"):
        return run(there, "-m", "pytest", "-q", "-p", "no:cacheprovider", name)
    return run(there, str(Path(sys.executable).with_name("nbdev_test")), "--path", f"nbs/{name}.ipynb")


def try_unbroken(name):
    "None if the tests pass as they are, else their output."
    with tempfile.TemporaryDirectory() as folder:
        copy_repository(Path(folder))
        code, output = run_tests(Path(folder), name)
    return output if code else None


def try_row(row):
    "None where the sabotage is noticed as it should be, else what went wrong."
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        copy_repository(there)
        stale = apply_changes(there/"nbs"/f"{row['notebook']}.ipynb", row["changes"])
        if stale:
            return stale
        code, output = run(there, str(Path(sys.executable).with_name("nbdev_export")))
        if code:
            return f"does not export:\n{output}"
        code, output = run_tests(there, row["noticed_by"])
    if not code:
        return f"{row['noticed_by']} passes and does not notice"
    if row["assertion"] not in output:
        return f"{row['noticed_by']} fails, but not in `{row['assertion']}`:\n{output[-3000:]}"


def main(words):
    table = yaml.safe_load((ROOT/"tests"/"sabotages.yaml").read_text(encoding="utf-8"))
    rows = [row for row in table if not words or any(w in row["title"] + row["notebook"] for w in words)]
    names = list(dict.fromkeys(row["noticed_by"] for row in rows))
    start = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        broken = {name: output for name, output in zip(names, pool.map(try_unbroken, names)) if output}
        for name in names:
            verdict = "WRONG" if name in broken else "ok"
            print(f"{verdict:6}{name} as it is: {broken.get(name, 'passes')}", flush=True)
        usable = [row for row in rows if row["noticed_by"] not in broken]
        wrong = len(rows) - len(usable)
        for row, problem in zip(usable, pool.map(try_row, usable)):
            verdict = problem or f"noticed by {row['noticed_by']}"
            print(f"{'WRONG' if problem else 'ok':6}{row['title']}: {verdict}", flush=True)
            wrong += bool(problem)
    print(f"{len(rows) - wrong} of {len(rows)} sabotages were noticed ({time.monotonic() - start:.0f} s)")
    return bool(wrong or not rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
