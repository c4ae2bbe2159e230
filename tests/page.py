"""Run the code cells of a page with plain Python, for machines that have PyTorch and no Jupyter:

    python tests/page.py nbs/train.ipynb data=heads image_size=64 "ema_decay=[0.999]"

Parameters are name=value as Python would write it, or plain words; `-f FILE` reads lines of `name: value`. Pictures that a
page would show are saved as page_<name>/<number>.png in the folder TINYCATS_PAGE (default: outputs)."""
import ast, json, os, sys
from pathlib import Path
from types import ModuleType, SimpleNamespace


def taken(text):
    "What a written value means: a Python or YAML scalar or list, else the words themselves."
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.strip().lower() in words: return words[text.strip().lower()]
    try: return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError): return text.strip()


def given(words):
    "{name: value} of the command line."
    found = {}
    while words:
        word = words.pop(0)
        if word == "-f":
            lines = [line.split("#")[0] for line in Path(words.pop(0)).read_text().splitlines()]
            found |= {k.strip(): taken(v) for k, _, v in (line.partition(":") for line in lines if line.strip())}
        else:
            name, _, value = word.partition("=")
            found[name] = taken(value)
    return found


def main(page, *words):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    page, folder = Path(page), Path(os.environ.get("TINYCATS_PAGE", "outputs"))/f"page_{Path(page).stem}"
    sys.path[:0] = [str(page.resolve().parents[1])]
    count = 0

    def show(*things):
        nonlocal count
        for x in things or [plt.figure(n) for n in plt.get_fignums()]:
            save = getattr(x, "savefig", None) or getattr(x, "save", None)
            if save is None: print(x, flush=True); continue
            folder.mkdir(parents=True, exist_ok=True)
            save(folder/f"{count:02d}.png"); count += 1
    plt.show = lambda: show()
    try: import IPython.display
    except ImportError:
        said = lambda data=None, *_, **__: data if isinstance(data, str) else None      # text is printed; a picture of bytes was saved elsewhere
        sys.modules |= {"IPython": ModuleType("IPython"), "IPython.display": SimpleNamespace(Image=said, Markdown=said, display=show, clear_output=lambda *_, **__: None)}
    space = {"__name__": "__main__", "display": show, "In": [""]}
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code": continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, str(page), "exec"), space)
        if last is not None and (value := eval(compile(ast.Expression(last.value), str(page), "eval"), space)) is not None: show(value)
        space["In"].append("".join(cell["source"]))
        if "parameters" in cell["metadata"].get("tags", []):
            space.update(told := given(list(words)))
            space["In"].append("# Parameters\n" + "\n".join(f"{k} = {v!r}" for k, v in told.items()))


if __name__ == "__main__": main(*sys.argv[1:])
