"""README.md from nbs/index.ipynb: `make readme` writes it, a test compares it.

Cells that begin with `#| hide` or `#| default_exp` stay out, `#| echo: false` leaves a cell's code out, and every other
`#|` line goes. Links are as right from the root as they are from nbs/. A page on the web shows no embedded pictures, so
those that cells have drawn become files, nbs/images/index_<cell>.png."""
import posixpath, re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

_LINK = re.compile(r'(!?\[[^\]]*\]\(|(?:src|href)=")(?![a-z]+:|#|/)([^)"\s]+)')


def _prepared(nb):
    "The cells a reader of the page should see."
    for cell in nb.cells:
        lines = cell.source.splitlines()
        directives = [line.replace("#|", "").strip() for line in lines if line.startswith("#|")]
        if cell.cell_type == "raw" or any(d.startswith(("hide", "default_exp")) for d in directives): continue
        if cell.cell_type == "code":
            cell.source = "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")
            if "echo: false" in directives: cell.metadata["transient"] = {"remove_source": True}
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for o in cell.outputs:
                if "image/png" in o.get("data", {}): o.data.pop("image/jpeg", None)   # Pillow offers both
        yield cell


def render(root):
    "The text of README.md, and the pictures it shows as {path below root: bytes}."
    nb = nbformat.read(Path(root)/"nbs"/"index.ipynb", as_version=4)
    nb.cells, nb.metadata["language_info"] = list(_prepared(nb)), {"name": "python"}
    exporter = MarkdownExporter(config=Config({"ExtractOutputPreprocessor": {
        "output_filename_template": "images/{unique_key}_{cell_index}{extension}"}}))
    text, resources = exporter.from_notebook_node(nb, resources={"unique_key": "index"})
    text = _LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join("nbs", m[2])), text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"^ +$", "", text, flags=re.M)).strip() + "\n", {f"nbs/{k}": v for k, v in resources["outputs"].items()}


def main(root=Path(__file__).resolve().parents[1]):
    if not (root/"nbs"/"index.ipynb").exists(): sys.exit("There is no nbs/index.ipynb to write README.md from.")
    text, pictures = render(root)
    for path, data in pictures.items():
        (root/path).parent.mkdir(exist_ok=True)
        (root/path).write_bytes(data)
    (root/"README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__": main()
