"""What a type checker sees of tinycats: every public name with its type, signatures without contradictions,
and the mistakes of a user's program."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import slow

pytest.importorskip("mypy", reason="mypy is not installed")
ROOT = Path(__file__).resolve().parents[1]
USER = '''
from pathlib import Path
from tinycats import (
    ImageDataset, TinyDiT, TrainConfig, Trainer, class_sheet, generate, load_model, load_run, push_to_hub,
    sample, save_model, show, toy_cats, write_page)

images, labels = toy_cats(39, size=16)
data = ImageDataset(images, labels, size=None)
model = TinyDiT(16, patch_size=8, dim=32, depth=1, num_heads=2)
for record in Trainer(model, data, Path("outputs/mine"), TrainConfig(steps=2)).fit():
    print(record["loss"])
save_model(model, "a.safetensors", run="mine")
show(sample(load_model("user/cats", revision="v1"), ["Siamese"], cfg_scale=2, seed=1))
images, labels = generate(model, 2)
class_sheet(images, labels, model.classes)
reveal_type(load_model("toy"))
reveal_type(load_run("toy"))
reveal_type(sample(model, [0]))
reveal_type(push_to_hub("toy", "user/toy"))
reveal_type(write_page("toy"))
'''
WRONG = ['load_model(3)', 'sample(model, [0], num_steps="many")', 'TinyDiT(imagesize=16)',
         'write_page("toy", num_steps=None)', 'push_to_hub("toy")']


pytestmark = slow("half a minute")


@pytest.fixture(scope="module")
def mypy_lines(tmp_path_factory):
    "What mypy says about a user's program and about the package: {(file, line): [messages]}."
    there = tmp_path_factory.mktemp("types")
    (there/"user.py").write_text(USER + "\n".join(WRONG))
    command = [sys.executable, "-m", "mypy", "--implicit-optional", "--ignore-missing-imports",
               "--follow-imports=silent", "--cache-dir", there/"cache", "--no-error-summary",
               there/"user.py", ROOT/"tinycats"]
    done = subprocess.run(command, cwd=there, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert not done.stderr, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        place = re.match(r"(.*?):(\d+): (.*)", line)
        found.setdefault((Path(place[1]).name, int(place[2])), []).append(place[3])
    return found


def test_a_users_program(mypy_lines):
    said = {line: texts[0] for (file, line), texts in mypy_lines.items() if file == "user.py"}
    first_wrong = USER.count("\n") + 1
    revealed = [re.search(r'"(.*)"', text)[1] for text in said.values() if "Revealed type" in text]
    assert [kind.split(".")[-1] for kind in revealed] == ["TinyDiT", "TinyDiT", "Tensor", "str", "Path"]
    right = {line: text for line, text in said.items() if line < first_wrong and "Revealed" not in text}
    assert not right
    assert [line for line in said if line >= first_wrong] == [first_wrong + i for i in range(len(WRONG))]


def signature_lines(path):
    "The lines on which the signatures of public functions and methods stand."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
            yield from range(node.lineno, node.body[0].lineno)


def test_public_signatures(mypy_lines):
    faults = []
    for path in sorted((ROOT/"tinycats").glob("*.py")):
        for line in set(signature_lines(path)):
            said = [text for text in mypy_lines.get((path.name, line), []) if text.startswith("error")]
            faults += [f"{path.name}, line {line}: {text}" for text in said]
    assert not faults, "\n".join(faults)
