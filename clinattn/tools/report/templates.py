"""Templates of pages: those of this folder, which pages of other folders share."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import jinja2

from clinattn.tools.report.colors import DARK, LIGHT
from clinattn.tools.report.words import word_of

HERE = "clinattn.tools.report"


@cache
def template(name: str, package: str = HERE) -> jinja2.Template:
    """The template of that name in a package, which may include those here; it escapes texts.

    It knows the colours, `light` and `dark`.
    """

    def read(name: str) -> str | None:
        for folder in (files(package), files(HERE)):
            if (path := folder.joinpath(name)).is_file():
                return path.read_text(encoding="utf-8")
        return None

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"word_of": word_of}
    environment.globals |= {"light": LIGHT, "dark": DARK}
    return environment.get_template(name)
