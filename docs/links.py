"""Find links of a built site that lead nowhere: files and anchors of its own, and anything that a page would
load from another host. Links to other hosts are not followed."""
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
NO_LOAD = {"canonical", "prev", "next", "alternate"}  # what a <link> may name without loading it


class Page(HTMLParser):
    "The anchors, links and loaded files of an HTML page."
    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loaded = {"", "top"}, [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.update(attrs[key] for key in ("id", "name") if attrs.get(key))
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        elif attrs.get(LOADED.get(tag)) and attrs.get("rel") not in NO_LOAD:
            self.loaded.append(attrs[LOADED[tag]])


def is_external(link):
    return bool(urlsplit(link).scheme or urlsplit(link).netloc)


def broken_links(site, base="/", absent=()):
    """Lines `page: link (what is wrong)`. The site is meant to be served at the path `base`; files in the
    folders `absent` may be missing."""
    site = Path(site).resolve()
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        where = path.relative_to(site).as_posix()
        found += [f"{where}: {link} (from another host)" for link in page.loaded
                  if is_external(link) and not link.startswith("data:")]
        for link in [link for link in page.links + page.loaded if not is_external(link)]:
            parts = urlsplit(link)
            place = unquote(parts.path)
            if place.startswith(base):
                target = site/place[len(base):]
            else:
                target = (path.parent/place).resolve() if place else path
            target = target/"index.html" if target.is_dir() else target
            if any(target.is_relative_to(site/folder) for folder in absent):
                continue
            if not target.is_file():
                found.append(f"{where}: {link} (no such file)")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{where}: {link} (no such anchor)")
    return found
