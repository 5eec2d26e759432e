"""Suites of pytest-benchmark: the files bench_*.py, each a table of cases.

Other folders may import problem.py: an attention problem, the ways to solve it, and its check.
"""
