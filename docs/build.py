"""Render the book as a web site, without any network: python docs/build.py, or make site.

Every notebook of nbs/ becomes a page; for those that run, the report of a run. Every module gets a page of
API reference. All of them are written in Markdown to a temporary folder, and zensical renders them to
_site/; a link that leads nowhere ends the build. The page that draws in the browser is in _site/page/."""
import argparse
import ast
import configparser
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import yaml
from PIL import Image

from links import broken_links
from reference import lazy_names, read_module, render_module, render_overview

ROOT = Path(__file__).resolve().parents[1]
MAX_CODE = 12   # lines of code above a picture; more are folded
MAX_TEXT = 15   # lines of printed text; more are folded

# The report that stands in for a page that runs. That of `evaluate` is made by the build.
REPORTS = dict(
    train="outputs/toy/train.ipynb", evaluate="outputs/toy/evaluation/site/evaluate.ipynb",
    settings="outputs/pets64/settings/settings.ipynb",
    ablation="outputs/ablation/heads64/ablation.ipynb", bench="outputs/bench/bench.ipynb")
FURTHER = dict(  # reports that are pages of their own, beside those above
    pets64_train="outputs/pets64/train.ipynb",
    further_ablation="outputs/ablation/heads64_further/ablation.ipynb")
NAVIGATION = {
    "The book": {
        "The network": "00_data 01_dit 02_flow 03_ema",
        "Training": "04_checkpoint 05_trainer 10_params 11_runs 12_pages 09_cloud",
        "Larger runs": "16_prefetch 17_parallel 20_tracking",
        "Your own pictures": "14_folder 15_recipe",
        "Images and sharing": "06_viz 07_metrics 08_explorer 13_export 19_hub 18_cli",
        "Appendices": "a1_util a2_core a3_toy a4_package references"},
    "Runs and studies": {
        "Pages that run": "train evaluate compare_ema explore sweep",
        "Studies": "real_cats pets64_train settings ablation further_ablation bench scaling"}}
TITLES = dict(
    train="Train: toy cats", pets64_train="Train: real cats",
    ablation="Ablation: from random weights", further_ablation="Ablation: from trained weights")

LINK = re.compile(r'(!?\[[^\]]*\]\(|(?:src|href)=")(?![a-z]+:|/)([^)"\s]*)')
CLAIM = re.compile(r"^\s*(assert\b|assert_close|test_(eq|ne|close|fail|is|eq_type|stdout)\()", re.M)
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\(([^)]*)\)")  # an image of another host
LIST_ITEM = re.compile(r"([-*+]|\d+\.) ")
ANSI = re.compile(r"\x1b\[[0-9;]*m")
IMPORTS = '??? setup "Imports"'
IMAGES = {"image/png": "png", "image/jpeg": "jpg", "image/svg+xml": "svg"}


def settings():
    "The section DEFAULT of settings.ini."
    parser = configparser.ConfigParser()
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def source(cell):
    return "".join(cell["source"])


def read_cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def slug(anchor):
    "The anchor that mkdocs gives a heading, from the one that Jupyter gives it."
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", anchor).strip().lower())


def fence(text, language="", title=""):
    "A block of code; its fence is longer than any inside."
    marks = "`"*max(3, *(len(found) + 1 for found in re.findall("`{3,}", text)), 3)
    heading = f' title="{title}"' if title else ""
    return f"{marks}{language}{heading}\n{text.rstrip()}\n{marks}"


def folded(kind, title, text):
    "A block that opens on a click."
    indented = "\n".join("    " + line if line else "" for line in text.splitlines())
    return f'??? {kind} "{title}"\n\n{indented}'


def store_picture(
    data,   # bytes of a PNG, JPEG or SVG file
    path,   # where the site keeps it, as far as the suffix
):
    "Write a picture, a PNG as a lossless WebP (the same pixels in two thirds of the bytes); the path."
    if path.suffix == ".png":
        smaller = BytesIO()
        Image.open(BytesIO(data)).save(smaller, "WEBP", lossless=True, quality=50)
        if smaller.tell() < len(data):
            path, data = path.with_suffix(".webp"), smaller.getvalue()
    path.write_bytes(data)
    return path


# -- Pages -------------------------------------------------------------------------------------------------

class Book:
    "Which page stands for which file of the repository, and where the names of the package are documented."
    def __init__(self, folder, executed):
        self.docs = folder/"docs"
        self.blob = settings()["git_url"] + "/blob/" + settings()["branch"]
        self.pages = {path.stem: path for path in sorted((ROOT/"nbs").glob("*.ipynb"))}
        self.by_file = {f"nbs/{name}.ipynb": name for name in self.pages}
        for name, report in (REPORTS | FURTHER).items():
            if name == "evaluate" and not executed:
                continue
            self.pages[name] = ROOT/report
            self.by_file[report] = name
        self.modules = [read_module(path) for path in sorted((ROOT/"tinycats").glob("[a-z]*.py"))]
        self.documented = self._documented()

    def _documented(self):
        "{public name: its place in the reference}, for names that only one module has."
        places = {}
        for module in self.modules:
            for entry in module.entries:
                places.setdefault(entry.name, []).append(f"reference/{module.name}.md#{entry.name}")
        return {name: found[0] for name, found in places.items() if len(found) == 1}

    def target(self, link, folder):
        "Where a link of a notebook in `folder` leads on the site."
        file, _, anchor = link.partition("#")
        anchor = f"#{anchor if file.endswith('references.ipynb') else slug(anchor)}" if anchor else ""
        if not file:
            return anchor
        path = posixpath.normpath(posixpath.join(folder, file))
        if path in self.by_file:
            return f"{self.by_file[path]}.md{anchor}"
        if Path(path).suffix in (".png", ".jpg", ".svg"):
            kept = store_picture((ROOT/path).read_bytes(), self.docs/"files"/path.replace("/", "_"))
            return f"files/{kept.name}"
        return f"{self.blob}/{path}"


class PageWriter:
    "Turns the cells of one notebook into Markdown."
    def __init__(self, book, name):
        self.book, self.name, self.path = book, name, book.pages[name]
        self.folder = posixpath.dirname(self.path.relative_to(ROOT).as_posix())
        self.blocks, self.module = [], ""
        self.mentioned, self.images = set(), 0
        if name not in book.by_file.values() or not self.folder.startswith("nbs"):
            self.folder = "nbs"  # a report is a copy of a page in nbs/, and so are its links

    def write(self):
        "The page, as Markdown."
        for cell in read_cells(self.path):
            self.blocks += [block for block in getattr(self, cell["cell_type"])(cell) if block]
        return "\n\n".join(self.blocks) + "\n"

    def raw(self, cell):
        return []

    def markdown(self, cell):
        text = re.sub(r"<!--.*?-->", "", source(cell), flags=re.S)
        text = BADGE.sub(r"[Open in Colab](\1)", text)
        parts = re.split(r"^(```.*?^```)", text, flags=re.M | re.S)  # prose, code, prose, ...
        return ["".join(self.prose(part) if n % 2 == 0 else part for n, part in enumerate(parts))]

    def prose(self, text):
        "Links lead to pages of the site, names to the reference; lists begin with an empty line."
        text = LINK.sub(lambda m: m[1] + self.book.target(m[2], self.folder), text)
        text = re.sub(r"(\[[^\]]*\]\([^)]*\))|`(\w+)(\(\))?`", self.mention, text)
        lines = []
        for line in text.split("\n"):
            before = lines[-1] if lines else ""
            in_list = before.startswith(" ") or LIST_ITEM.match(before)
            if LIST_ITEM.match(line) and before.strip() and not in_list:
                lines.append("")
            lines.append(line)
        return "\n".join(lines)

    def mention(self, match):
        "The first mention of a public name on a page is a link to the reference, but not in a heading."
        name, before = match[2], match.string[:match.start()]
        in_heading = before.rpartition("\n")[2].startswith("#")
        if name not in self.book.documented or name in self.mentioned or in_heading:
            return match[0]
        self.mentioned.add(name)
        return f"[{match[0]}]({self.book.documented[name]})"

    def code(self, cell):
        "Code and what it has put out, as a reader needs it: tests and preparations are folded."
        lines = source(cell).splitlines()
        directives = [line[2:].strip() for line in lines if line.startswith("#|")]
        for directive in directives:
            if directive.startswith("default_exp"):
                self.module = directive.split()[1].replace("__init__", "")
        text = "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")
        outputs = list(self.outputs(cell.get("outputs", [])))
        if not text or "hide" in directives:
            return []
        if any(d.startswith("export") for d in directives):
            return [*self.exported(text), *outputs]
        drawn = any(block.startswith("![") for block in outputs)
        block = fence(text, "python")
        if "echo: false" in directives:
            block = ""
        elif mostly_imports(text) and not drawn:
            return [*self.imports(block), *outputs]
        elif CLAIM.search(text) and not drawn:
            block = folded("test", "Test", block)
        elif drawn and len(text.splitlines()) > MAX_CODE:
            block = folded("setup", "Code of the picture", block)
        return [block, *outputs]

    def imports(self, block):
        "A folded cell of imports; one that follows another goes into its fold."
        if self.blocks and self.blocks[-1].startswith(IMPORTS):
            self.blocks[-1] += "\n\n" + folded("setup", "Imports", block).split("\n\n", 1)[1]
            return []
        return [folded("setup", "Imports", block)]

    def exported(self, text):
        "A cell of the package, with an anchor for each name that it defines."
        names = []
        for node in ast.parse(text).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node]
            names += [getattr(t, "name", getattr(t, "id", None)) for t in targets]
        anchors = "".join(f'<span id="code-{name}"></span>' for name in names if name)
        anchors = [f"<div>{anchors}</div>"] if anchors else []
        if mostly_imports(text):
            return anchors + self.imports(fence(text, "python"))
        title = f"tinycats.{self.module}".rstrip(".")
        return [*anchors, fence(text, "python", title)]

    def outputs(self, outputs):
        "What a cell has put out, as Markdown: pictures become files."
        printed = ""
        for output in outputs:
            if output["output_type"] == "stream":
                printed += "".join(output["text"]) if output["name"] == "stdout" else ""
                continue
            data = output.get("data", {})
            kind = next((kind for kind in IMAGES if kind in data), None)
            if kind:
                yield self.image(kind, data[kind])
            elif "text/markdown" in data:
                yield self.prose("".join(data["text/markdown"]))
            elif "text/plain" in data and "text/html" not in data:
                printed += "".join(data["text/plain"]) + "\n"
        if printed.strip():
            lines = [ANSI.sub("", line.split("\r")[-1]) for line in printed.strip("\n").split("\n")]
            block = fence("\n".join(lines), " { .text .printed }")
            yield folded("setup", f"Printed: {len(lines)} lines", block) if len(lines) > MAX_TEXT else block

    def image(self, kind, data):
        path = self.book.docs/"files"/f"{self.name}_{self.images}.{IMAGES[kind]}"
        self.images += 1
        text = "".join(data)
        kept = store_picture(text.encode() if kind == "image/svg+xml" else b64decode(text), path)
        return f"![What the code above draws](files/{kept.name}){{ .output loading=lazy }}"


def mostly_imports(text):
    "Whether a cell defines nothing, and has more imports than other statements."
    lines = ["" if line.startswith(("%", "!")) else line for line in text.splitlines()]
    body = ast.parse("\n".join(lines)).body
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    defined = [node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return not defined and len(imports) > len(body)/2


# -- The site ----------------------------------------------------------------------------------------------

def evaluate_report():
    "Run the page `evaluate` with its defaults, unless its report is newer than all that it needs."
    report = ROOT/REPORTS["evaluate"]
    needed = [ROOT/"nbs"/"evaluate.ipynb", ROOT/"outputs"/"toy"/"ema.safetensors"]
    needed += ROOT.glob("tinycats/*.py")
    if report.exists() and report.stat().st_mtime > max(path.stat().st_mtime for path in needed):
        return
    from tinycats.pages import run_page
    run_page(ROOT/"nbs"/"evaluate.ipynb", report, dict(name="site"))


def notes(book, name):
    "A line below the title: where the page comes from, and of a page that runs, which report this is."
    page = book.pages[name]
    notebook = f"[the notebook]({book.blob}/nbs/{page.name})"
    if ROOT/"outputs" in page.parents:
        parts = page.relative_to(ROOT/"outputs").parts
        run = parts[1] if parts[0] == "ablation" else parts[0]
        made = "made with this site" if name == "evaluate" else "with the code that it was made with"
        return f"!!! report \"The report of the run `{run}`, {made}. See {notebook}.\""
    if name == "explore":
        return ("!!! report \"The explorer needs a Python behind it: `make explore` opens it. Here is a "
                f"picture; see {notebook}.\"\n\n![]({book.target('images/explorer.png', 'nbs')})")
    if name == "sweep":
        return f"!!! report \"Shown without results: it compares runs of your own. See {notebook}.\""
    modules = [f"[API reference](reference/{m.name}.md)" for m in book.modules if m.notebook == name]
    line = " · ".join([notebook.replace("the ", "", 1), *modules])
    return f"{line}\n{{ .origin }}" if name != "index" else ""


def draw_here(page, content=""):
    "A button that puts a page that draws in its own place and in that of the content above it."
    return f"""<div class="draw-here" data-page="{page}" markdown="1">

{content}

[Draw here]({page}){{ .md-button .md-button--primary }}

</div>"""


def real_cats_page(text):
    "The page that draws real cats stands below their picture."
    picture = re.search(r"^!\[[^\]]*\]\(files/nbs_images_pets64\.\w+\)$", text, re.M)[0]
    return text.replace(picture, f"{picture}\n\n{draw_here('page/pets64/index.html')}")


def landing_page(text):
    "The page that draws takes the place of its picture."
    picture = re.search(r"!\[[^\]]*\]\(files/nbs_images_page\.\w+\)", text)[0]
    text = text.replace(picture, draw_here("page/index.html", picture))
    return re.sub(r"^(!\[.*\]\(.*\))$", r"\1{ .first }", text, count=1, flags=re.M)


DRAWING_PAGES = dict(index=landing_page, real_cats=real_cats_page)


def below_title(text, line):
    "A page with a line below its title and subtitle, which are its first two paragraphs."
    head = re.match(r"# .*\n\n(> .*\n)+", text)
    return text[:head.end()] + f"\n{line}\n" + text[head.end():] if line else text


def write_pages(book):
    "All pages as Markdown, in the book's folder."
    docs = book.docs
    (docs/"files").mkdir(parents=True)
    (docs/"reference").mkdir()
    shutil.copytree(ROOT/"docs"/"assets", docs/"assets")
    for name in book.pages:
        text = PageWriter(book, name).write()
        if name in TITLES:  # several reports of one notebook
            text = re.sub(r"^# .*", f"# {TITLES[name]}", text, count=1)
        text = below_title(text, notes(book, name))
        if name in DRAWING_PAGES:
            text = DRAWING_PAGES[name](text)
        (docs/f"{name}.md").write_text(text, encoding="utf-8")
    overview = render_overview(book.modules, lazy_names(ROOT/"tinycats"/"__init__.py"))
    (docs/"reference"/"index.md").write_text(overview, encoding="utf-8")
    for module in book.modules:
        url = f"{book.blob}/tinycats/{module.name}.py"
        (docs/"reference"/f"{module.name}.md").write_text(render_module(module, url), encoding="utf-8")


def write_config(book):
    "The settings of the site: docs/mkdocs.yml, the names in settings.ini, the table of contents."
    contents, listed = [{"Start": "index.md"}], ["index"]
    for tab, parts in NAVIGATION.items():
        sections = []
        for part, names in parts.items():
            listed += names.split()
            files = [{TITLES[n]: f"{n}.md"} if n in TITLES else f"{n}.md" for n in names.split()]
            sections.append({part: files})
        contents.append({tab: sections})
    if sorted(listed) != sorted(book.pages):
        stray = ", ".join(sorted(set(listed) ^ set(book.pages)))
        raise SystemExit(f"docs/build.py: NAVIGATION and nbs/ differ by {stray}: place it in NAVIGATION")
    ini = settings()
    modules = [{module.name: f"reference/{module.name}.md"} for module in book.modules]
    contents.append({"API reference": ["reference/index.md", *modules]})
    contents.append({"Source code": ini["git_url"]})
    source_code = dict(icon="fontawesome/brands/github", link=ini["git_url"], name="Source code")
    config = dict(
        site_name=ini["title"], site_description=ini["description"], copyright=f"© {ini['copyright']}",
        site_url=ini["doc_host"] + ini["doc_baseurl"] + "/", docs_dir="docs", site_dir="site",
        use_directory_urls=False, extra=dict(social=[source_code], generator=False), nav=contents)
    text = (ROOT/"docs"/"mkdocs.yml").read_text(encoding="utf-8")
    text += "\n" + yaml.safe_dump(config, sort_keys=False)
    (book.docs.parent/"mkdocs.yml").write_text(text, encoding="utf-8")


def write_browser_page(target):
    "The pages that draw: the toy cats, and the real ones below, with one ONNX Runtime (14 MB) for both."
    from tinycats import write_page
    shutil.copytree(write_page("toy"), target/"page")
    below = target/"page"/"pets64"
    shutil.copytree(write_page("pets64", cfg_scale=3, seed=1), below)
    share_runtime(below)


def share_runtime(
    page,   # a page that draws, in a folder of another one
):
    "The page uses the ONNX Runtime of the page above it, and loses its own."
    worker = (page/"worker.js").read_text(encoding="utf-8")
    shared = worker.replace('"./vendor/', '"../vendor/')
    if shared.count('"../vendor/') != 2:
        raise SystemExit("docs/build.py: worker.js names vendor/ otherwise than share_runtime expects")
    (page/"worker.js").write_text(shared, encoding="utf-8")
    shutil.rmtree(page/"vendor")


def build(target, quick=False):
    "The whole site, in the folder `target`."
    if not quick:
        evaluate_report()
    with tempfile.TemporaryDirectory() as folder:
        book = Book(Path(folder), executed=not quick)
        write_pages(book)
        write_config(book)
        command = [sys.executable, "-m", "zensical", "build", "-f", "mkdocs.yml"]
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(f"{done.stdout}\nzensical has not built the site")
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(Path(folder)/"site", target)
    if not quick:
        write_browser_page(target)
    base = settings()["doc_baseurl"] + "/"
    broken = broken_links(target, base, absent=["page"] if quick else [])
    if broken:
        raise SystemExit("\n".join(broken) + f"\n{len(broken)} links of the site lead nowhere")


def main():
    parser = argparse.ArgumentParser(description="Render the book as a web site.")
    parser.add_argument("--to", type=Path, default=ROOT/"_site", help="the folder of the site; _site")
    parser.add_argument("--quick", action="store_true", help="run nothing: no evaluation, no page that draws")
    args = parser.parse_args()
    build(args.to.resolve(), args.quick)
    shown = os.path.relpath(args.to)
    print(f"The site is in {shown}. To read it: python3 -m http.server -d {shown}")
    print("and then http://localhost:8000 in a browser")


if __name__ == "__main__":
    main()
