"""The API reference, read from the text of the package: nothing is imported, so annotations and defaults stand as
they are written. A parameter is documented by the comment on its line, as nbdev does it."""
import ast
import io
import re
import tokenize
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

CODE_SPAN = re.compile(r"(`[^`]+`)")
CELL = re.compile(r"^# %% \.\./nbs/(\w+)\.ipynb #(\w+)$")


@dataclass
class Entry:
    "A public name of a module."
    name: str                     # such as sample, or Trainer.fit
    kind: str                     # function, class, method or constant
    line: int                     # in the file of the module
    signature: str                # as one would call it, or the text of a constant
    text: str = ""                # the docstring
    parameters: list = field(default_factory=list)  # (name, annotation, default, comment)
    returns: tuple = ("", "")     # annotation and comment
    members: list = field(default_factory=list)     # the public methods of a class


@dataclass
class Module:
    "A module of the package, and the notebook that it is exported from."
    name: str
    notebook: str
    text: str
    entries: list


def line_comments(source):
    "{line: comment} of a Python source."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}


def public_names(tree):
    "What `__all__` of a module lists."
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return ast.literal_eval(node.value)
    return []


def unparse(node):
    return "" if node is None else ast.unparse(node)


def joined_comment(comments, first, last):
    "The comments on the lines first to last; those that continue one another stand on lines of their own."
    return " ".join(comments[n] for n in range(first, last + 1) if n in comments)


def function_parameters(node, comments):
    "(name, annotation, default, comment) of each parameter but self; * and ** belong to the name."
    args = node.args
    positional = args.posonlyargs + args.args
    defaults = [None]*(len(positional) - len(args.defaults)) + args.defaults
    found = list(zip(positional, [""]*len(positional), defaults))
    if args.vararg:
        found.append((args.vararg, "*", None))
    found += zip(args.kwonlyargs, [""]*len(args.kwonlyargs), args.kw_defaults)
    if args.kwarg:
        found.append((args.kwarg, "**", None))
    found = [entry for entry in found if entry[0].arg not in ("self", "cls")]
    lines = [arg.lineno for arg, *_ in found]
    documented = len(set(lines)) == len(lines) and node.lineno not in lines
    rows = []
    for arg, stars, default in found:
        comment = comments.get((default or arg).end_lineno, "") if documented else ""
        rows.append((stars + arg.arg, unparse(arg.annotation), unparse(default), comment))
    return rows


def returned(node, comments):
    "Annotation of what a function returns, and the comment on the line where its head ends."
    end = node.returns.end_lineno if node.returns else node.body[0].lineno - 1
    return unparse(node.returns), comments.get(end, "") if end > node.lineno or node.returns else ""


def call_signature(name, parameters, returns):
    "As one would write the call: sample(model, y, *, num_steps=12) -> Tensor."
    words, starred = [], False
    for parameter, _, default, _ in parameters:
        starred = starred or parameter.startswith("*")
        words.append(f"{parameter}={default}" if default else parameter)
    line = f"{name}({', '.join(words)})"
    if len(line) > 80:
        line = f"{name}(\n    " + ",\n    ".join(words) + ")"
    return line + (f" -> {returns}" if returns else "")


def function_entry(node, comments, owner=""):
    parameters = function_parameters(node, comments)
    returns = returned(node, comments)
    name = f"{owner}.{node.name}" if owner else node.name
    decorators = [unparse(d) for d in node.decorator_list]
    signature = call_signature(name, parameters, returns[0])
    if "property" in decorators:
        signature = f"{name}" + (f": {returns[0]}" if returns[0] else "")
    kind = "method" if owner else "function"
    return Entry(name, kind, node.lineno, signature, ast.get_docstring(node) or "", parameters, returns)


def class_entry(node, comments):
    "A class: the parameters of its constructor, or its fields where it has annotated ones, and its methods."
    entry = Entry(node.name, "class", node.lineno, "", ast.get_docstring(node) or "")
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            entry.parameters = function_parameters(item, comments)
        elif isinstance(item, ast.FunctionDef) and not item.name.startswith("_") and ast.get_docstring(item):
            entry.members.append(function_entry(item, comments, owner=node.name))
    if not entry.parameters:
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        entry.parameters = [(unparse(f.target), unparse(f.annotation), unparse(f.value),
                             comments.get(f.end_lineno, "")) for f in fields]
    base = f"({', '.join(map(unparse, node.bases))})" if node.bases and not entry.parameters else ""
    entry.signature = call_signature(node.name, entry.parameters, "") if not base else node.name + base
    return entry


def constant_entry(node, name, source, comments):
    text = ast.get_source_segment(source, node)
    if len(text.splitlines()) > 12:
        text = "\n".join([*text.splitlines()[:10], "    ...", text.splitlines()[-1]])
    return Entry(name, "constant", node.lineno, text, comments.get(node.end_lineno, ""))


def read_module(path):
    "A `Module`; its entries stand in the order of the source."
    source = Path(path).read_text(encoding="utf-8")
    tree, comments = ast.parse(source), line_comments(source)
    cells = [CELL.match(line) for line in source.splitlines() if CELL.match(line)]
    public, entries = set(public_names(tree)), []
    for node in tree.body:
        names = [getattr(node, "name", None)]
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [getattr(target, "id", None) for target in targets]
        for name in public.intersection(names):
            if isinstance(node, ast.FunctionDef):
                entries.append(function_entry(node, comments))
            elif isinstance(node, ast.ClassDef):
                entries.append(class_entry(node, comments))
            else:
                entries.append(constant_entry(node, name, source, comments))
    return Module(Path(path).stem, cells[0][1] if cells else "", ast.get_docstring(tree) or "", entries)


def plain(text):
    "Text of a comment in Markdown: < and * are meant as they are, but within backticks."
    parts = CODE_SPAN.split(" ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([*_|\[\]])", r"\\\1", escape(part, quote=False))
                   for part in parts)


def code(text):
    return f"`{text}`" if text else ""


def render_entry(entry, module, source_url):
    "An entry as Markdown."
    level = "###" if entry.kind == "method" else "##"
    title = entry.name.split(".")[-1] if entry.kind == "method" else entry.name
    yield f"{level} `{title}` {{ #{entry.name} }}"
    links = f"[source]({source_url}#L{entry.line})"
    if entry.kind != "method" and module.notebook:
        links = f"[explained](../{module.notebook}.md#code-{entry.name}) · " + links
    yield f"```python\n{entry.signature}\n```"
    yield f'{plain(entry.text)}\n{{ .entry-text }}' if entry.text else ""
    described = [p for p in entry.parameters if p[1] or p[3]]
    if described or entry.returns[1]:
        rows = ["| | |", "|---|---|"]
        for name, annotation, default, comment in entry.parameters:
            written = name + (f": {annotation}" if annotation else "") + (f" = {default}" if default else "")
            rows.append(f"| {code(written)} | {plain(comment)} |")
        if any(entry.returns):
            rows.append(f"| *returns* {code(entry.returns[0])} | {plain(entry.returns[1])} |")
        yield "\n".join(rows)
    yield f'<p class="entry-links" markdown="span">{links}</p>'
    for member in entry.members:
        yield from render_entry(member, module, source_url)


def render_module(module, source_url):
    "The page of a module as Markdown."
    chapter = f" Explained in [{module.notebook}](../{module.notebook}.md)." if module.notebook else ""
    blocks = [f"# tinycats.{module.name}", f"> {plain(module.text)}{chapter}"]
    for entry in module.entries:
        blocks += render_entry(entry, module, source_url)
    return "\n\n".join(block for block in blocks if block) + "\n"
