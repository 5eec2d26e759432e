"""`make docs`: the site builds without a warning, shows every public name, and fetches nothing."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documentation import PAGES
from places import ROOT

for package in ("material", "mkdocs", "mkdocstrings", "mkdocstrings_handlers"):
    pytest.importorskip(package)

# What a page can load. A link that a reader may follow is none of it.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*?\bsrc=["']([^"']+)"""
    r"""|<link\b[^>]*?\brel=["'](?!canonical|next|prev)[^"']*["'][^>]*?\bhref=["']([^"']+)"""
    r"""|url\(["']?([^)"']+)|@import\s+["']([^"']+)"""
)
SHOWN = {
    "api/operator.html": ("clinattn", {"ranges", "backends"}),
    "api/encoder.html": ("clinattn.encoder", set()),
    "api/workloads.html": ("clinattn.workloads", set()),
}


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "-d", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    # No process may reach a network: a proxy that is not there stands in front of it.
    environment |= {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")}
    return subprocess.run(
        [*command, "-f", str(root / "build_support" / "website" / "mkdocs.yml")],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return out


def test_every_page_is_there_and_in_the_menu(site):
    menu = (site / "index.html").read_text(encoding="utf-8")
    named = {"README.md": "index", "CONTRIBUTING.md": "contributing", "SECURITY.md": "security"}
    for page in PAGES:
        path = page.relative_to(ROOT).as_posix()
        path = {**named, "docs/README.md": "pages"}.get(
            path, path.removeprefix("docs/").removesuffix(".md")
        )
        assert (site / f"{path}.html").is_file(), path
        assert path == "index" or f'href="{path}.html"' in menu, path
    assert (site / "zh-cn.html").is_file() and (site / "examples.html").is_file()


def test_every_public_name_has_its_entry(site):
    for page, (module, elsewhere) in SHOWN.items():
        text = (site / page).read_text(encoding="utf-8")
        names = set(importlib.import_module(module).__all__) - elsewhere
        assert len(names) >= 6
        for name in names:
            assert re.search(rf'id="{re.escape(module)}\.{name}"', text), f"{page}: {name}"
    text = (site / "api" / "integrations.html").read_text(encoding="utf-8")
    for module in ("flash_attn", "xformers", "sdpa"):
        names = importlib.import_module(f"clinattn.integrations.{module}").__all__
        for name in names:
            assert re.search(rf'id="clinattn.integrations.{module}\.(install\.)?{name}"', text), (
                name
            )


def test_arguments_are_a_list(site):
    text = (site / "api" / "operator.html").read_text(encoding="utf-8")
    for name in ("attn_mask", "window", "time_decay", "theta"):
        assert re.search(rf"<li>\s*(<p>)?<code>{name}</code>:", text), name


def test_nothing_is_fetched(site):
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 30
    for page in pages:
        for found in LOADED.findall(page.read_text(encoding="utf-8")):
            (target,) = filter(None, found)
            assert not re.match(r"(https?:)?//", target), f"{page}: {target}"


def test_no_table_is_broken(site):
    """A blank line ends a table, and the rows after it are then shown as text."""
    torn = [
        f"{page.relative_to(site)}: {found[0]}"
        for page in site.rglob("*.html")
        for found in re.finditer(r"<p>\s*\|[^<]*", page.read_text(encoding="utf-8"))
    ]
    assert not torn


def test_links_of_the_pages_lead_to_files(site):
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # its links begin at the root of a server
            continue
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r'href="([^"]+)"', text):
            path = target.partition("#")[0]
            if path and ":" not in path:
                assert (page.parent / path).exists(), f"{page.name}: {target}"


def test_search_knows_the_guides(site):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    places = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert {"guides/without-gpu.html", "numerics.html", "api/operator.html"} <= places


@pytest.mark.parametrize(
    "link, broken",
    [
        ("numerics.md#edges", False),
        ("nowhere.md", True),
        ("numerics.md#no-such-section", True),
        ("../nothing.py", True),
    ],
)
def test_a_broken_link_fails(tmp_path, link, broken):
    """In a copy of what the site is made of."""
    for name in ("docs", "build_support/website", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "clinattn", tmp_path / "clinattn", ignore=_but_python)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    for path in [*ROOT.glob("*.md"), ROOT / "LICENSE", ROOT / "bench" / "NOTES.md"]:
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    with (tmp_path / "docs" / "rotary.md").open("a", encoding="utf-8") as page:
        page.write(f"\nSee [this]({link}).\n")
    done = build(tmp_path, tmp_path / "site")
    assert (done.returncode != 0) == broken, done.stderr
    assert ("rotary.md" in done.stderr) == broken


def _but_python(folder, names):
    """What a copy of the package leaves out: libraries, caches, and the link to kernels/."""
    keep = lambda name: name.endswith(".py") or (Path(folder) / name).is_dir()
    return [name for name in names if not keep(name) or name in ("kernels", "__pycache__")]
