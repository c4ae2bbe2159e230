"""Write README.md from nbs/index.ipynb: python tests/readme.py (a test compares the two).

Cells that begin with `#| hide` or `#| default_exp` are left out, `#| echo: false` leaves out a cell's code,
and every other `#|` line is dropped. Links are adapted from nbs/ to the root. GitHub shows no embedded
pictures, so pictures that cells have drawn become files, nbs/images/index_<cell>.png."""
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

LINK = re.compile(r'(!?\[[^\]]*\]\(|(?:src|href)=")(?![a-z]+:|#|/)([^)"\s]+)')
FILES = "images/{unique_key}_{cell_index}{extension}"


def visible_cells(notebook):
    "The cells that a reader of the page should see, without nbdev's directives."
    for cell in notebook.cells:
        lines = cell.source.splitlines()
        directives = [line.replace("#|", "").strip() for line in lines if line.startswith("#|")]
        if cell.cell_type == "raw" or any(d.startswith(("hide", "default_exp")) for d in directives):
            continue
        if cell.cell_type == "code":
            cell.source = "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")
            if "echo: false" in directives:
                cell.metadata["transient"] = {"remove_source": True}
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data.pop("image/jpeg", None)  # Pillow offers both
        yield cell


def render(root):
    "The text of README.md, and the pictures it shows as {path below root: bytes}."
    notebook = nbformat.read(Path(root)/"nbs"/"index.ipynb", as_version=4)
    notebook.cells = list(visible_cells(notebook))
    notebook.metadata["language_info"] = {"name": "python"}
    config = Config({"ExtractOutputPreprocessor": {"output_filename_template": FILES}})
    exporter = MarkdownExporter(config=config)
    text, resources = exporter.from_notebook_node(notebook, resources={"unique_key": "index"})
    text = LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join("nbs", m[2])), text)
    text = re.sub(r"^ +$", "", text, flags=re.M)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return text, {f"nbs/{name}": data for name, data in resources["outputs"].items()}


def main(root=Path(__file__).resolve().parents[1]):
    if not (root/"nbs"/"index.ipynb").exists():
        sys.exit("There is no nbs/index.ipynb to write README.md from.")
    text, images = render(root)
    for path, data in images.items():
        (root/path).parent.mkdir(exist_ok=True)
        (root/path).write_bytes(data)
    (root/"README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
