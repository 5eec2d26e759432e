"""Importing this makes hypothesis draw the same cases in every process.

It takes some of its numbers from the source of whatever local modules are loaded, which depends on
the tests that ran before. There is no setting for that; where its inside has another name, the
test in packaging/test_same_draws.py fails.
"""

from hypothesis.internal.conjecture import providers

providers._get_local_constants = providers.Constants
