"""Run the code cells of a page with plain Python, for machines that have PyTorch and no Jupyter:

    python tests/page.py nbs/train.ipynb data=heads image_size=64 "ema_decay=[0.999]"

Parameters are name=value as Python would write it, or plain words; `-f FILE` reads lines of `name: value`.
Pictures that a page would show are saved as page_<name>/<number>.png in the folder TINYCATS_PAGE (default:
outputs)."""
import ast, json, os, sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


def parse_value(text):
    "What a written value means: a Python or YAML scalar or list, else the text itself."
    words = {"true": True, "false": False, "null": None, "none": None}
    text = text.strip()
    try:
        return words[text.lower()] if text.lower() in words else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse_params(words):
    "{name: value} of the command line."
    params, words = {}, list(words)
    while words:
        word = words.pop(0)
        if word != "-f":
            name, _, value = word.partition("=")
            params[name] = parse_value(value)
            continue
        for line in Path(words.pop(0)).read_text().splitlines():
            name, _, value = line.split("#")[0].partition(":")
            if name.strip():
                params[name.strip()] = parse_value(value)
    return params


class Display:
    "Saves the pictures that a page shows, and prints its text."
    def __init__(self, folder):
        self.folder, self.count = Path(folder), 0

    def __call__(self, *things, display_id=None):
        if display_id: # a picture that changes later: the same file is written again
            handle = Display(self.folder)
            handle.count = self.count
            self(*things)
            return handle
        for thing in things:
            save = getattr(thing, "savefig", None) or getattr(thing, "save", None)
            if save is None:
                print(getattr(thing, "data", thing), flush=True)
                continue
            self.folder.mkdir(parents=True, exist_ok=True)
            save(self.folder/f"{self.count:02d}.png")
            self.count += 1

        return None

    def update(self, figure):
        "In place of `DisplayHandle.update`."
        figure.savefig(self.folder/f"{self.count:02d}.png")

    def show_figures(self):
        "In place of `plt.show()`."
        import matplotlib.pyplot as plt
        self(*map(plt.figure, plt.get_fignums()))
        plt.close("all")


def text_of(data=None, **_):
    "In place of IPython's Markdown and Image: text is printed, the bytes of a picture are not."
    return data if isinstance(data, str) else None


def ignore(*_, **__):
    "In place of `clear_output`."


def replace_ipython(display):
    "Where IPython is not installed: modules of its name with what the pages import from it."
    module = ModuleType("IPython.display")
    module.display, module.clear_output = display, ignore
    module.Image = module.Markdown = text_of
    sys.modules |= {"IPython": ModuleType("IPython"), "IPython.display": module}


def run_cell(source, name, namespace):
    "Run a cell; the value of a last expression is displayed, as in Jupyter."
    tree = ast.parse(source)
    is_expression = bool(tree.body) and isinstance(tree.body[-1], ast.Expr)
    last = ast.Expression(tree.body.pop().value) if is_expression else None
    exec(compile(tree, name, "exec"), namespace)
    value = eval(compile(last, name, "eval"), namespace) if last else None
    if value is not None:
        namespace["display"](value)
    namespace["In"].append(source)


def load_definitions(page):
    "The cells of a page that are tagged `definitions`, run as a module of their own."
    module = ModuleType(f"{Path(page).stem}_definitions")
    for cell in json.loads(Path(page).read_text(encoding="utf-8"))["cells"]:
        if "definitions" in cell["metadata"].get("tags", []):
            exec(compile("".join(cell["source"]), str(page), "exec"), vars(module))
    return module


def main(page, *words):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    page = Path(page)
    display = Display(Path(os.environ.get("TINYCATS_PAGE", "outputs"))/f"page_{page.stem}")
    plt.show = partial(Display.show_figures, display)
    if find_spec("IPython") is None:
        replace_ipython(display)
    sys.path.insert(0, str(page.resolve().parents[1]))
    namespace = {"__name__": "__main__", "display": display, "In": [""]}
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            run_cell("".join(cell["source"]), str(page), namespace)
        if "parameters" in cell["metadata"].get("tags", []):
            params = parse_params(words)
            injected = "\n".join(f"{name} = {value!r}" for name, value in params.items())
            run_cell(f"# Parameters\n{injected}", str(page), namespace)


if __name__ == "__main__":
    main(*sys.argv[1:])
