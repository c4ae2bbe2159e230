"""The API reference, read from the text of the package: nothing is imported, so annotations and defaults
stand as they are written. A parameter is documented by the comment on its line, as nbdev does it."""
import ast
import io
import re
import tokenize
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

CODE_SPAN = re.compile(r"(`[^`]+`)")
CELL = re.compile(r"^# %% \.\./nbs/(\w+)\.ipynb #(\w+)$")

OVERVIEW = """# API reference

> Every public name of the package, with what its source says of each parameter.

## `import tinycats`

These names are found without knowing the modules:

<div class="parameters names" markdown="1">

| | |
|---|---|
{names}

</div>

## Modules

<div class="parameters names" markdown="1">

| | |
|---|---|
{modules}

</div>
"""


@dataclass
class Parameter:
    "A parameter of a function, or a field of a class; all of it as it is written."
    name: str
    annotation: str = ""
    default: str = ""
    comment: str = ""

    def declaration(self):
        "Such as `steps: int = 12`."
        annotation = f": {self.annotation}" if self.annotation else ""
        default = f" = {self.default}" if self.default else ""
        return self.name + annotation + default


@dataclass
class Entry:
    "A public name of a module."
    name: str                     # such as sample, or Trainer.fit
    kind: str                     # function, class, method or constant
    line: int                     # in the file of the module
    signature: str = ""           # as one would call it, or the text of a constant
    text: str = ""                # the docstring
    parameters: list = field(default_factory=list)
    returns: Parameter | None = None
    members: list = field(default_factory=list)  # the public methods of a class


class Source:
    "A Python source, its tree, and the comments at the ends of its lines."
    def __init__(self, text):
        self.text, self.tree = text, ast.parse(text)
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments = [token for token in tokens if token.type == tokenize.COMMENT]
        self.comments = {token.start[0]: token.string.lstrip("# ").strip() for token in comments}

    def written(self, node):
        "The text of a node, or nothing for None."
        return "" if node is None else " ".join(ast.get_source_segment(self.text, node).split())

    def comment(self, line):
        return self.comments.get(line, "")


@dataclass
class Module:
    "A module of the package, and the notebook that it is exported from."
    name: str
    notebook: str
    text: str
    entries: list


def public_names(tree):
    "What `__all__` of a module lists."
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return ast.literal_eval(node.value)
    return []


def function_parameters(node, source):
    "Each `Parameter` but self; * and ** belong to the name."
    args = node.args
    positional = args.posonlyargs + args.args
    defaults = [None]*(len(positional) - len(args.defaults)) + args.defaults
    found = [("", arg, default) for arg, default in zip(positional, defaults)]
    if args.vararg:
        found.append(("*", args.vararg, None))
    found += [("", arg, default) for arg, default in zip(args.kwonlyargs, args.kw_defaults)]
    if args.kwarg:
        found.append(("**", args.kwarg, None))
    found = [entry for entry in found if entry[1].arg not in ("self", "cls")]
    lines = {arg.lineno for _, arg, _ in found}
    one_a_line = len(lines) == len(found) and node.lineno not in lines
    parameters = []
    for stars, arg, default in found:
        comment = source.comment((default or arg).end_lineno) if one_a_line else ""
        annotation = source.written(arg.annotation)
        parameters.append(Parameter(stars + arg.arg, annotation, source.written(default), comment))
    return parameters


def returned(node, source):
    "What a function returns, with the comment on the line where its head ends; None if neither is there."
    end = node.returns.end_lineno if node.returns else node.body[0].lineno - 1
    comment = source.comment(end) if node.returns or end > node.lineno else ""
    annotation = source.written(node.returns)
    return Parameter("", annotation, comment=comment) if annotation or comment else None


def call_signature(name, parameters, returns=None):
    "As one would write the call: sample(model, y, num_steps=12) -> Tensor."
    words = [f"{p.name}={p.default}" if p.default else p.name for p in parameters]
    line = f"{name}({', '.join(words)})"
    if len(line) > 80:
        line = f"{name}(\n    " + ",\n    ".join(words) + ")"
    return line + (f" -> {returns.annotation}" if returns and returns.annotation else "")


def function_entry(node, source, owner=""):
    parameters, returns = function_parameters(node, source), returned(node, source)
    name = f"{owner}.{node.name}" if owner else node.name
    is_property = "property" in [source.written(d) for d in node.decorator_list]
    signature = name if is_property else call_signature(name, parameters, returns)
    entry = Entry(name, "method" if owner else "function", node.lineno, signature)
    entry.text, entry.parameters, entry.returns = ast.get_docstring(node) or "", parameters, returns
    return entry


def class_entry(node, source):
    "A class: the parameters of its constructor, or its fields where it has annotated ones, and its methods."
    entry = Entry(node.name, "class", node.lineno, text=ast.get_docstring(node) or "")
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            entry.parameters = function_parameters(item, source)
        elif isinstance(item, ast.FunctionDef) and not item.name.startswith("_") and ast.get_docstring(item):
            entry.members.append(function_entry(item, source, owner=node.name))
    if not entry.parameters:
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        for item in fields:
            annotation, default = source.written(item.annotation), source.written(item.value)
            comment = source.comment(item.end_lineno)
            entry.parameters.append(Parameter(item.target.id, annotation, default, comment))
    bases = ", ".join(map(source.written, node.bases))
    entry.signature = call_signature(node.name, entry.parameters)
    if bases and not entry.parameters:
        entry.signature = f"{node.name}({bases})"
    return entry


def constant_entry(node, name, source):
    text = ast.get_source_segment(source.text, node)
    lines = text.splitlines()
    if len(lines) > 12:
        text = "\n".join([*lines[:10], "    ...", lines[-1]])
    comment = source.comment(node.end_lineno)
    return Entry(name, "constant", node.lineno, signature=text, text=comment)


def defined_names(node):
    "What a statement at the top level of a module defines."
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [target.id for target in targets if isinstance(target, ast.Name)]


def read_module(path):
    "A `Module`; its entries stand in the order of the source."
    source = Source(Path(path).read_text(encoding="utf-8"))
    cells = [CELL.match(line) for line in source.text.splitlines() if CELL.match(line)]
    public, entries = public_names(source.tree), []
    for node in source.tree.body:
        for name in [name for name in defined_names(node) if name in public]:
            if isinstance(node, ast.FunctionDef):
                entries.append(function_entry(node, source))
            elif isinstance(node, ast.ClassDef):
                entries.append(class_entry(node, source))
            else:
                entries.append(constant_entry(node, name, source))
    text = ast.get_docstring(source.tree) or ""
    return Module(Path(path).stem, cells[0][1] if cells else "", text, entries)


def plain(text):
    "Text of a comment in Markdown: < and * are meant as they are, but within backticks."
    parts = CODE_SPAN.split(" ".join(text.split()))
    for number, part in enumerate(parts):
        if not part.startswith("`"):
            parts[number] = re.sub(r"([*_|\[\]])", r"\\\1", escape(part, quote=False))
    return "".join(parts)


def parameter_table(entry):
    "A row for each parameter and what is returned; nothing where no row would say anything."
    rows = [(f"`{p.declaration()}`", p) for p in entry.parameters]
    if entry.returns:
        annotation = f" `{entry.returns.annotation}`" if entry.returns.annotation else ""
        rows.append((f"*returns*{annotation}", entry.returns))
    if not any(p.annotation or p.comment for _, p in rows):
        return ""
    lines = [f"| {title} | {plain(p.comment)} |" for title, p in rows]
    table = "\n".join(["| | |", "|---|---|", *lines])
    return f'<div class="parameters" markdown="1">\n\n{table}\n\n</div>'


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
    yield parameter_table(entry)
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


def lazy_names(path):
    "{name: module} of what `import tinycats` offers."
    for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        if "_LAZY" in defined_names(node):
            return {keyword.arg: keyword.value.value for keyword in node.value.keywords}
    return {}


def render_overview(modules, offered):
    "The first page of the reference: what the package offers, and its modules."
    by_name = {module.name: module for module in modules}
    names = []
    for name, module in offered.items():
        entry = next(entry for entry in by_name[module].entries if entry.name == name)
        names.append(f"| [`{name}`]({module}.md#{name}) | {plain(entry.text)} |")
    rows = [f"| [`tinycats.{module.name}`]({module.name}.md) | {plain(module.text)} |" for module in modules]
    return OVERVIEW.format(names="\n".join(names), modules="\n".join(rows))
