"""Prints the name of a test as soon as it fails: `pytest -q` keeps names for the end of the run."""

from __future__ import annotations

import pytest


class Failures:
    """A plugin of pytest; it prints where pytest prints, and so not in workers of pytest-xdist."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.write(f"\nFAILED {report.nodeid} ({report.when})\n", red=True)
