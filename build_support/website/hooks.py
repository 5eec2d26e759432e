"""Hooks of MkDocs: pages from files outside docs/, and links that work here as they do in the tree.

README becomes the first page. The pages of the API are made from the names that packages export, so
that no list of names has to be kept.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# Places in the site of files of the tree; other files of docs/ stand where they are.
MOVED = {
    "README.md": "index.md",
    "README.zh-CN.md": "zh-cn.md",
    "docs/README.md": "pages.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "bench/NOTES.md": "notes.md",
    "examples": "examples.md",
}
ASSETS = ("style.css", "iframe-worker.js")
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
HEADING = re.compile(r"^# (.+)$", re.MULTILINE)
# Pages of the API: file, heading, and the modules whose exported names it shows.
API = (
    ("api/operator.md", "The operator", ("clinattn",)),
    ("api/encoder.md", "Encoders and heads", ("clinattn.encoder",)),
    ("api/workloads.md", "Data", ("clinattn.workloads",)),
    (
        "api/integrations.md",
        "Integrations",
        (
            "clinattn.integrations.transformers",
            "clinattn.integrations.sdpa",
            "clinattn.integrations.flash_attn",
            "clinattn.integrations.xformers",
        ),
    ),
)
# Names that users need and that no package exports.
ALSO = {
    "clinattn": ("clinattn.ranges.recording", "clinattn.integrations.replace.Replacement"),
    "clinattn.workloads": ("clinattn.training.settings.TrainingSettings",),
}
# Names that are modules to a reader of sources: what they stand for.
RENAMED = {
    "clinattn.backends": "clinattn.backends.select.backends",
    "clinattn.integrations.flash_attn.install": "clinattn.integrations.flash_attn.install.install",
    "clinattn.integrations.xformers.install": "clinattn.integrations.xformers.install.install",
}
# Modules whose docstring says what the arguments of their functions have in common.
SHARED = {"clinattn.integrations.flash_attn": "clinattn.integrations.flash_attn.functions"}
DOCSTRING_ALONE = "options: {members: [], show_root_heading: false, show_root_toc_entry: false}"
LEFT_OUT = {"clinattn.ranges"}  # a module; what it is used for is in ALSO


def exported(module: str) -> list[str]:
    """The names in a module's `__all__`, with the module before them, without importing it."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = [f"{module}.{name}" for name in ast.literal_eval(node.value)]
            return [RENAMED.get(name, name) for name in names if name not in LEFT_OUT]
    raise ValueError(f"{path}: expected a list __all__")


def api_page(heading: str, modules: tuple[str, ...]) -> str:
    """A page of the names of some modules, below a heading for each module where they are many."""
    parts = [f"# {heading}"]
    level = 2 if len(modules) == 1 else 3
    for module in modules:
        parts += [f"## {module}"] * (level - 2)
        parts.append(f"```python\nimport {module}\n```")
        if module in SHARED:
            parts.append(f"::: {SHARED[module]}\n    {DOCSTRING_ALONE}")
        functions_first = lambda name: name.split(".")[-1][0].isupper()
        names = sorted(exported(module), key=functions_first)
        options = f"    options: {{heading_level: {level}}}"
        parts += [f"::: {name}\n{options}" for name in (*names, *ALSO.get(module, ()))]
    return "\n\n".join(parts) + "\n"


def examples_page() -> str:
    parts = ["# Examples", "Each program runs as it stands: `python examples/NAME.py`."]
    for path in sorted((ROOT / "examples").glob("*.py")):
        parts += [f"## {path.name}", f"```python\n{path.read_text(encoding='utf-8')}```"]
    return "\n\n".join(parts) + "\n"


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that do not lie in docs/."""
    for path, uri in MOVED.items():
        if present := files.get_file_from_path(path.removeprefix("docs/")):
            if path.startswith("docs/"):
                files.remove(present)
        text = examples_page() if path == "examples" else (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, uri, content=text))
    for uri, heading, modules in API:
        files.append(File.generated(config, uri, content=api_page(heading, modules)))
    for name in ASSETS:
        own = Path(__file__).with_name(name)
        files.append(File.generated(config, name, abs_src_path=str(own)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links between files of the tree into links between pages.

    A link whose text is a path gets the title of its page. A link to a file that is no page, such
    as a source, becomes its text.
    """
    at = {uri: path for path, uri in MOVED.items()}
    uri = page.file.src_uri
    path = at.get(uri, f"docs/{uri}")

    def link(found: re.Match[str]) -> str:
        text, (target, hash_, anchor) = found[1], found[2].partition("#")
        if ":" in target or not target:
            return found[0]
        named = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        to = MOVED.get(named, named.removeprefix("docs/"))
        if files.get_file_from_path(to) is None:
            if not (ROOT / named).exists():
                raise ValueError(f"{path}: the link to {found[2]} leads nowhere")
            return text
        if target.endswith(f"{text}") and named.endswith(".md"):
            (text, *_) = HEADING.findall((ROOT / named).read_text(encoding="utf-8"))
        return f"[{text}]({posixpath.relpath(to, posixpath.dirname(uri) or '.')}{hash_}{anchor})"

    return LINK.sub(link, markdown)
