"""A plugin of pytest that writes what happens to each test, as it happens, so that a run cut off counts.

    pytest -p benchmarks.gpu_report       with MI_KERNELS_REPORT=FILE in the environment

Lines of JSON: {"collected": [ids]} once for each worker, {"id", "when", "outcome"} for each phase of a test.
"""

import json
import os

import pytest


def _write(config: pytest.Config, **line: object) -> None:
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers report to the process that started them
        with open(os.environ["MI_KERNELS_REPORT"], "a") as file:
            file.write(json.dumps(line) + "\n")


class Reporter:
    def __init__(self, config: pytest.Config):
        self.config = config

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        _write(self.config, collected=[item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        _write(self.config, collected=list(ids))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        _write(self.config, id=report.nodeid, when=report.when, outcome=report.outcome)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            _write(self.config, id=report.nodeid, when="collect", outcome="failed")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Reporter(config), "mi_kernels-report")
