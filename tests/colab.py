"""Write the badge "Open in Colab", and the cell that installs tinycats there, into every page that runs by
itself:

    python tests/colab.py

The address follows from settings.ini. Elsewhere than on Colab the cell does nothing."""
import json
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["train", "evaluate", "explore"]
MARK = "# on Colab alone"
COLAB = "https://colab.research.google.com"


def owner():
    "What settings.ini says: the address of the repository, and the same without its host, with the branch."
    ini = ConfigParser()
    ini.read(ROOT/"settings.ini", encoding="utf-8")
    settings = ini["DEFAULT"]
    return settings["git_url"], f"{settings['user']}/{settings['repo']}/blob/{settings['branch']}"


def pages():
    return sorted((ROOT/"nbs").glob("[0-9a][0-9]_*.ipynb")) + [ROOT/"nbs"/f"{name}.ipynb" for name in PAGES]


def with_badge(source, name):
    "The title cell with the badge below its subtitle."
    _, place = owner()
    badge = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({COLAB}/github/{place}/nbs/{name})"
    lines = [line for line in source.splitlines() if not line.startswith("[![Open in Colab]")]
    end = max(number for number, line in enumerate(lines[:6]) if line.startswith(">")) + 1
    rest = "\n".join(lines[end:]).strip("\n")
    parts = ["\n".join(lines[:end]), badge] + ([rest] if rest else [])
    return "\n\n".join(parts)


def install_source():
    address, _ = owner()
    return f"""#| hide
import os
if "COLAB_RELEASE_TAG" in os.environ: {MARK}
    get_ipython().system("pip install -q fastcore 'tinycats[all] @ git+{address}'")"""


def render(path):
    "The cells of a page with badge and installation, written anew."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    cells = [cell for cell in cells if MARK not in "".join(cell["source"])]
    first = next(number for number, cell in enumerate(cells) if cell["cell_type"] == "markdown")
    title = "".join(cells[first]["source"])
    cells[first] = cells[first] | dict(source=with_badge(title, path.name).splitlines(True))
    install = dict(cell_type="code", execution_count=None, id="colab", metadata={}, outputs=[],
                   source=install_source().splitlines(True))
    return cells[:first + 1] + [install] + cells[first + 1:]


def sources(cells):
    return ["".join(cell["source"]) for cell in cells]


if __name__ == "__main__":
    for path in pages():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["cells"] = render(path)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
