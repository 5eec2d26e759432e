"""Reads the code to paste and the commands to type out of README and the pages of docs/."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, NamedTuple

from places import ROOT

from clinattn.backends import select
from clinattn.explain.attribute import METHODS
from clinattn.operator.summary import REDUCTIONS

README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
PAGES = [README, *OTHERS, *sorted((ROOT / "docs").glob("*.md")), *GUIDES]
# A snippet may import the standard library, these two, and the packages of
# clinattn[integrations]. Their snippets run in tests/integrations/packages.
ALWAYS_THERE = {"clinattn", "torch"}
OF_INTEGRATIONS = {"accelerate", "opacus", "safetensors", "transformers"}
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")


class Block(NamedTuple):
    """A fenced block: the page, the line where its code begins, the word after the fence.

    not_run: the reason why no test runs it, from the comment `<!-- not run: REASON -->` above it.
    """

    page: Path
    line: int
    language: str
    code: str
    not_run: str | None = None

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def packages(self) -> set[str]:
        """The packages that the code imports, by their first name."""
        found = set()
        for node in ast.walk(ast.parse(self.code)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
        return found

    def run(self, namespace: dict[str, Any] | None = None) -> dict[str, Any]:
        """Runs the code in a namespace, by default one of its own, and returns that."""
        namespace = {"__name__": "__main__"} if namespace is None else namespace
        # As many lines above as on the page, so that a traceback names the line of the page.
        exec(compile("\n" * (self.line - 1) + self.code, self.page, "exec"), namespace)
        return namespace


def split(page: Path) -> tuple[list[Block], str]:
    """The fenced blocks of a page, and the page without them. Raises ValueError for an open one."""
    blocks, rest = [], [""]
    language, start, code, not_run = None, 0, [], None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = line.lstrip().startswith(("```", "~~~"))
        if fence and language is None:
            language, start, code = line.strip()[3:], number + 1, []
            above = NOT_RUN.fullmatch(rest[-1])
            not_run = above and above[1]
        elif fence:
            blocks.append(Block(page, start, language, "\n".join(code) + "\n", not_run))
            language = None
        else:
            (rest if language is None else code).append(line)
    if language is not None:
        raise ValueError(f"{page}: the block of line {start} has no end")
    return blocks, "\n".join(rest)


def blocks(page: Path, language: str) -> list[Block]:
    return [block for block in split(page)[0] if block.language == language]


def python_blocks(*, integrations: bool) -> list[Block]:
    """Returns the Python blocks that need clinattn[integrations], or the others.

    They are those of all pages but the guides, whose blocks build on each other (guides.py).
    """
    pages = [page for page in PAGES if page not in GUIDES]
    found = [block for page in pages for block in blocks(page, "python")]
    return [x for x in found if bool(x.packages() & OF_INTEGRATIONS) == integrations]


def indented(page: Path) -> list[str]:
    """The lines that Markdown shows as code because they are indented by four spaces."""
    return [line[4:] for line in split(page)[1].splitlines() if line.startswith("    ")]


def commands(page: Path) -> list[str]:
    """The lines of shell blocks, without comments, and the code within sentences."""
    lines = [line for block in blocks(page, "sh") for line in block.code.splitlines()]
    text = split(page)[1]
    spans = (" ".join(span.split()) for span in SPAN.findall(text))
    return [line.split(" #")[0].strip() for line in [*lines, *indented(page)]] + list(spans)


def support_table() -> str:
    """Arguments x backends in Markdown, as docs/operator.md shows it."""
    rows = [("argument", *select.NAMES), ("---",) * (len(select.NAMES) + 1)]
    always = ["fwd, bwd"] * len(select.NAMES)
    rows.append(("masks, causal, windows, lengths, packed sequences", *always))
    for feature in select.FEATURES:
        cells = []
        for name in select.NAMES:
            served = select.SERVES[name]
            passes = [
                word
                for word, known in (("fwd", served.forward), ("bwd", served.backward))
                if feature in known and not (feature in select.GRADIENTS and word == "fwd")
            ]
            cells.append(", ".join(passes) or "reference")
        rows.append((feature, *cells))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# The passes of attention that explanations need. attribute takes gradients for all but rollout,
# and METHODS says which of them read attention.
FORWARD, BACKWARD, SUMMARY = "forward", "backward", "summaries"
OF_GRADIENTS = ("gradient", "relevance")  # reductions that are parts of methods of attribute


def explanation_table() -> str:
    """Explanations x backends in Markdown, as README shows it; methods of equal needs share a row.
    """
    needs = {name: (FORWARD, SUMMARY) for name in REDUCTIONS if name not in OF_GRADIENTS}
    needs |= {
        name: (FORWARD, *([BACKWARD] if name != "rollout" else []), *([SUMMARY] if reads else []))
        for name, reads in METHODS.items()
    }
    rows = [("explanation", "what attention computes", *select.NAMES)]
    for passes in dict.fromkeys(needs.values()):
        names = ", ".join(f"`{name}`" for name, needed in needs.items() if needed == passes)
        rows.append((names, ", ".join(passes), *(_kernels_for(passes, x) for x in select.NAMES)))
    head, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, f"|{'---|' * len(rows[0])}", *others])


def _kernels_for(passes: tuple[str, ...], backend: str) -> str:
    if backend == "reference":
        return "plain torch"
    served = select.SERVES[backend]
    own = {FORWARD: served.forward, BACKWARD: served.backward}
    own[SUMMARY] = [x for x in served.forward if x == select.SUMMARIES]
    missing = [x for x in passes if not own[x]]
    return "kernels" + "".join(f", {x} in plain torch" for x in missing)
