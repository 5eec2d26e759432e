"""Explanations of whole models: one number for each token, code, word or visit.

Others import the names below. record.py listens to attention calls, tokens.py knows where tokens
stand in a batch, explanation.py has the methods that need attention alone, attribute.py those of
one answer; gradients.py, rules.py (AttnLRP) and groups.py are parts of it.
"""

from clinattn.explain.attribute import attribute
from clinattn.explain.explanation import Explanation, explain
from clinattn.explain.groups import words_of

__all__ = ["Explanation", "attribute", "explain", "words_of"]
