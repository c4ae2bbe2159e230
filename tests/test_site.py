"""The web site of the book: every page is there, every link leads somewhere, formulas and diagrams are drawn,
and nothing comes from another host. Nothing is run here, so that the site is there in seconds."""
import ast
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import module_from_spec, spec_from_file_location
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from helpers import needs_chromium, slow

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"docs"))
from links import broken_links  # noqa: E402
from reference import lazy_names, read_module, render_module, render_overview  # noqa: E402

SPEC = spec_from_file_location("build_the_site", ROOT/"docs"/"build.py")  # `build` is another package's name
build = module_from_spec(SPEC)
SPEC.loader.exec_module(build)

NOTEBOOKS = sorted(p.stem for p in (ROOT/"nbs").glob("*.ipynb"))
MODULES = sorted(ROOT.glob("tinycats/[a-z]*.py"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The folder of the site."
    pytest.importorskip("zensical")
    there = tmp_path_factory.mktemp("site")/"_site"
    command = [sys.executable, ROOT/"docs"/"build.py", "--quick", "--to", there]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return there


@pytest.fixture(scope="module")
def address(site):
    "Where a server of the site answers."
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


# -- The site ----------------------------------------------------------------------------------------------

def test_every_notebook_and_module_has_a_page(site):
    missing = [name for name in NOTEBOOKS if not (site/f"{name}.html").exists()]
    missing += [path.stem for path in MODULES if not (site/"reference"/f"{path.stem}.html").exists()]
    assert not missing


def test_no_directive_is_left(site):
    found = [path.name for path in site.glob("*.html") if "#|" in path.read_text(encoding="utf-8")]
    assert not found


def test_pages_that_run_show_their_results(site):
    for name in ("train", "settings", "ablation", "bench", "compare_ema", "pets64_train", "further_ablation"):
        assert f'src="files/{name}_0.' in (site/f"{name}.html").read_text(encoding="utf-8"), name


def test_reports_of_one_notebook_differ_by_their_titles(site):
    runs = dict(ablation="heads64", further_ablation="heads64_further", pets64_train="pets64")
    for name, run in runs.items():
        text = (site/f"{name}.html").read_text(encoding="utf-8")
        assert re.search(rf"<h1[^>]*>{build.TITLES[name]}", text), name
        assert f"the run <code>{run}</code>" in text, name


def test_names_in_the_text_lead_to_the_reference(site):
    text = (site/"05_trainer.html").read_text(encoding="utf-8")
    assert 'href="reference/trainer.html#accumulate_grads"' in text
    assert 'id="code-accumulate_grads"' in text
    assert 'href="reference/trainer.html">API reference' in text
    assert '/nbs/05_trainer.ipynb">notebook' in text


@pytest.mark.parametrize("body, problem", [
    ('<a href="other.html#there">', None), ('<a href="/base/other.html">', None),
    ('<a href="https://example.org/x">', None), ('<a href="#">', None), ('<img src="data:,">', None),
    ('<link rel="canonical" href="https://example.org/">', None), ('<a href="page/x.html">', None),
    ('<a href="missing.html">', "no such file"), ('<a href="/other.html">', "no such file"),
    ('<img src="missing.png">', "no such file"), ('<a href="other.html#nowhere">', "no such anchor"),
    ('<a href="#nowhere">', "no such anchor"), ('<script src="https://example.org/x.js">', "another host"),
    ('<link rel="stylesheet" href="//example.org/x.css">', "another host")])
def test_broken_links_are_found(tmp_path, body, problem):
    (tmp_path/"other.html").write_text('<h2 id="there">')
    (tmp_path/"index.html").write_text(body)
    found = broken_links(tmp_path, base="/base/", absent=["page"])
    assert len(found) == bool(problem), found
    assert not problem or problem in found[0]


def test_the_workflow_publishes_what_make_builds():
    workflow = (ROOT/".github"/"workflows"/"site.yml").read_text(encoding="utf-8")
    assert "- run: make site\n" in workflow
    assert "path: _site\n" in workflow


def picture(kind, colour=(200, 90, 20)):
    "The bytes of a small picture."
    image = Image.new("RGB", (64, 64), colour)
    image.putpixel((3, 5), (1, 2, 3))
    data = BytesIO()
    image.save(data, kind)
    return data.getvalue()


def test_a_picture_keeps_its_pixels_and_takes_less(tmp_path):
    given = (ROOT/"nbs"/"images"/"pets64.png").read_bytes()
    kept = build.store_picture(given, tmp_path/"cats.png")
    assert kept == tmp_path/"cats.webp"
    assert kept.stat().st_size < .75*len(given)
    pixels = [Image.open(source).convert("RGB").tobytes() for source in (kept, BytesIO(given))]
    assert pixels[0] == pixels[1]
    photo = picture("JPEG")
    assert build.store_picture(photo, tmp_path/"photo.jpg").read_bytes() == photo


def test_the_book_stays_small(site):
    "Without the pages that draw, which hold ONNX Runtime and two networks; and nothing is there twice."
    files = [path for path in site.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 22e6
    large = [path for path in files if path.stat().st_size > 20_000]
    assert not [path.name for path in large if path.suffix == ".png"]
    contents = [sha256(path.read_bytes()).hexdigest() for path in large]
    doubled = [path.name for path, content in zip(large, contents) if contents.count(content) > 1]
    assert not [name for name in doubled if not name.endswith(".webp")], doubled


def test_both_pages_that_draw_are_reached(site):
    for name, page in (("index", "page/index.html"), ("real_cats", "page/pets64/index.html")):
        text = (site/f"{name}.html").read_text(encoding="utf-8")
        assert f'data-page="{page}"' in text
        assert f'href="{page}"' in text


def test_the_pages_that_draw_share_a_runtime(tmp_path):
    for there in (tmp_path/"page", tmp_path/"page"/"pets64"):
        shutil.copytree(ROOT/"nbs"/"page", there, dirs_exist_ok=True)
    below = tmp_path/"page"/"pets64"
    build.share_runtime(below)
    assert not (below/"vendor").exists()
    places = re.findall(r'"(\.[^"]*vendor/[^"]*)"', (below/"worker.js").read_text(encoding="utf-8"))
    assert len(places) == 2
    assert not [place for place in places if not (below/place).exists()]
    (below/"worker.js").write_text("import 'elsewhere/ort.mjs'")
    with pytest.raises(SystemExit, match="names vendor/ otherwise"):
        build.share_runtime(below)


# -- The reference -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", MODULES, ids=[p.stem for p in MODULES])
def test_every_public_name_is_in_the_reference(path):
    module = read_module(path)
    listed = next(n for n in ast.parse(path.read_text(encoding="utf-8")).body
                  if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
    public = set(ast.literal_eval(listed.value)) - {"Optional"}  # which is Python's
    assert {entry.name for entry in module.entries} == public
    page = render_module(module, "source")
    assert not [name for name in public if f"{{ #{name} }}" not in page]


def test_the_overview_has_what_import_tinycats_offers():
    import tinycats
    offered = lazy_names(ROOT/"tinycats"/"__init__.py")
    assert set(offered) == set(tinycats.__all__)
    page = render_overview(list(map(read_module, MODULES)), offered)
    assert "| [`flow_loss`](flow.md#flow_loss) | Flow-matching loss of a clean-image" in page
    assert "| [`tinycats.flow`](flow.md) | Mix an image with noise" in page


EXAMPLE = '''"Averages."

# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/03_ema.ipynb.

__all__ = ["LIMIT", "mean", "Tracker", "Settings"]

# %% ../nbs/03_ema.ipynb #c05
LIMIT = 1e-4 # the smallest weight

def mean(
    x:Tensor, # (b, n) values in [-1, 1]
    *axes:int, # over which
    keep:bool=False, # the axes that are left have <size> 1
) -> Tensor: # (b,) means
    "The mean."

def _private():
    "Not shown."

class Tracker:
    "Tracks a mean."
    def __init__(self,
        decay:float=1e-3, # in [0, 1)
    ):
        pass
    def update(self,
        x, # a value
    ):
        "One more value."

class Settings(Base):
    steps:int = 10_000 # how many
'''


def test_the_reference_has_what_stands_beside_a_parameter(tmp_path):
    (tmp_path/"ema.py").write_text(EXAMPLE)
    module = read_module(tmp_path/"ema.py")
    page = render_module(module, "source")
    assert module.notebook == "03_ema"
    assert "| `x: Tensor` | (b, n) values in \\[-1, 1\\] |" in page
    assert "| `*axes: int` | over which |" in page
    assert "| `keep: bool = False` | the axes that are left have &lt;size&gt; 1 |" in page
    assert "| *returns* `Tensor` | (b,) means |" in page
    assert "mean(x, *axes, keep=False) -> Tensor" in page
    assert "Tracker(decay=1e-3)" in page
    assert "### `update` { #Tracker.update }" in page
    assert "| `steps: int = 10_000` | how many |" in page
    assert "LIMIT = 1e-4" in page
    assert "the smallest weight" in page
    assert "[explained](../03_ema.md#code-mean) · [source](source#L10)" in page
    assert "_private" not in page


# -- In a browser ------------------------------------------------------------------------------------------

COUNT = """() => ({
    formulas: document.querySelectorAll('.arithmatex').length,
    drawn: document.querySelectorAll('.arithmatex .katex').length,
    wrong: [...document.querySelectorAll('.katex-error, [mathcolor="#cc0000"]')].map(e => e.textContent),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth})"""


@pytest.fixture(scope="module")
def telephone(browser, address):
    "A page of the browser, as wide as a telephone, and the requests it makes of other hosts."
    context = browser.new_context(viewport=dict(width=390, height=844), base_url=address)
    tab, foreign = context.new_page(), []

    def note(request):
        if not request.url.startswith((address, "data:", "blob:")):
            foreign.append(request.url)

    tab.on("request", note)
    yield tab, foreign
    context.close()


@needs_chromium
@pytest.mark.parametrize("name", NOTEBOOKS + ["pets64_train", "further_ablation", "reference/trainer"])
def test_formulas_are_drawn_and_a_page_fits_a_telephone(telephone, name):
    tab, foreign = telephone
    tab.goto(f"{name}.html", wait_until="domcontentloaded")
    found = tab.evaluate(COUNT)
    assert found["wrong"] == []
    assert found["drawn"] == found["formulas"]
    assert found["overflow"] <= 0
    assert foreign == []


@needs_chromium
def test_the_diagram_is_drawn_in_both_schemes(telephone):
    tab, foreign = telephone
    tab.goto("a4_package.html")
    tab.wait_for_selector(".diagram svg")
    before = tab.inner_html(".diagram")
    assert "the training loop" in tab.inner_text(".diagram")
    tab.evaluate("document.body.dataset.mdColorScheme = 'slate'")
    tab.wait_for_function("html => document.querySelector('.diagram').innerHTML !== html", arg=before)
    assert foreign == []


@needs_chromium
def test_the_search_finds_a_function(telephone):
    tab, _ = telephone
    tab.set_viewport_size(dict(width=1280, height=800))
    tab.goto("index.html")
    tab.click(".md-search__button")
    tab.locator("input:visible").last.fill("accumulate_grads")
    found = tab.locator("a:visible", has_text="Gradient accumulation").first
    assert "05_trainer.html" in found.get_attribute("href")
    tab.set_viewport_size(dict(width=390, height=844))


@needs_chromium
def test_a_click_embeds_the_page_that_draws(telephone):
    tab, _ = telephone
    tab.goto("index.html")
    tab.click(".draw-here a.md-button")
    assert tab.get_attribute(".draw-here iframe", "src") == "page/index.html"


@needs_chromium
@slow("a minute")
def test_both_pages_that_draw_do(site, telephone):
    pytest.importorskip("onnxruntime")
    build.write_browser_page(site)
    assert len(list(site.rglob("*.wasm"))) == 1
    tab, foreign = telephone
    for page in ("page", "page/pets64"):
        tab.goto(f"{page}/index.html")
        tab.wait_for_selector("#status[data-state=done]", timeout=120_000)
    assert foreign == []
