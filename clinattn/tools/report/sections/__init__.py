"""The sections of the page by kind of results, and the cases that two runs are compared by.

Others import VIEWS, by the kinds of kinds.py, and section (a result's own).
"""

from __future__ import annotations

from clinattn.tools.report.kinds import kind_of
from clinattn.tools.report.section import Record, Section, View

from . import compared, encoder, encoders, engines, kernels, parity, pretrained, suites

VIEWS = {
    "encoder": View(encoder.section, encoder.cases, settings=encoder.settings),
    "suites": View(suites.section, suites.cases, suites.facts),
    "compare": View(compared.section, compared.cases, compared.facts),
    "against_transformers": View(encoders.section, encoders.cases),
    "engines": View(engines.section, engines.cases),
    "kernels": View(kernels.section, kernels.cases, kernels.facts),
    "parity": View(parity.section, parity.cases),
    "pretrained": View(pretrained.section, pretrained.cases),
}


def section(result: Record) -> Section:
    """Section on a result of a known kind."""
    kind = kind_of(result)
    assert kind is not None
    return VIEWS[kind].section(result)
