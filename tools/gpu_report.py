"""A pytest plugin that writes the result of each test immediately, so that interrupted runs count.

    pytest -p tools.gpu_report       with MI_KERNELS_REPORT=FILE in the environment

FILE gets lines of JSON:

    {"collected": [ids]}                       by each worker of pytest-xdist, or once without
    {"id", "when", "outcome", "seconds"}       for each phase of a test: when is setup, call or teardown, or
                                               collect of a file; outcome is passed, failed or skipped
    ... and "text"                             for a failure: the last lines of the error
    ... and "ruined": true                     the GPU was unusable afterwards
    {..., "when": "???", "outcome": "failed"}  a test during which the worker died; the text says how long it
                                               had run. It may follow a line of the worker itself.

After an illegal access, or a launch that timed out, every later CUDA call of the process fails. So a worker
whose GPU is unusable exits at once: pytest-xdist reports the current test as failed, starts another worker
(--max-worker-restart) and gives it the remaining tests. Hanging tests are ended in the same way by
pytest-timeout (--timeout=SECONDS --timeout-method=thread), also in C code.
"""

import importlib
import json
import os
import time
from collections.abc import Generator
from typing import Any

import pytest

LINES, LETTERS = 15, 3000  # kept of an error, from its end: the message, and where it was raised


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _append(**line: object) -> None:
    with open(os.environ["MI_KERNELS_REPORT"], "a") as file:
        file.write(json.dumps(line) + "\n")


def _line_of(report: pytest.TestReport | pytest.CollectReport, **more: object) -> dict[str, object]:
    line: dict[str, object] = {"id": report.nodeid, "when": getattr(report, "when", "collect")}
    line |= {"outcome": report.outcome, "seconds": round(getattr(report, "duration", 0.0), 3)}
    if report.failed:
        line["text"] = "\n".join(report.longreprtext.splitlines()[-LINES:])[-LETTERS:]
    return line | more


class Reporter:
    """In the main process, which receives all reports."""

    def __init__(self) -> None:
        self.started: dict[str, float] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            _append(collected=[item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        _append(collected=list(ids))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.started[nodeid] = time.monotonic()

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport) -> None:
        seconds = time.monotonic() - self.started.get(crashitem, time.monotonic())
        report.longrepr = f"{report.longrepr}, {seconds:.1f} s after it began"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        _append(**_line_of(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            _append(**_line_of(report))


class Guard:
    """In the process that runs the tests: checks the GPU after a failure."""

    def __init__(self, config: pytest.Config):
        self.is_worker = _is_worker(config)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        result = yield
        device = gpu_of(item)
        if device is not None:
            _devices().finish(device)  # attributes asynchronous errors to this test
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, Any]:
        report = yield
        device = gpu_of(item)
        if report.failed and device is not None and _devices().ruined(device):
            _append(**_line_of(report, ruined=True))
            if self.is_worker:
                os._exit(1)
            pytest.exit(f"{device} gives nothing but errors after {report.nodeid}", returncode=1)
        return report


def gpu_of(item: pytest.Item) -> str | None:
    """The GPU that a test runs on, by its parameter ``place``."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    device = str(getattr(parameters.get("place"), "device", "cpu"))
    return device if device.startswith("cuda") else None


def _devices() -> Any:
    """A lazy import: the process that only distributes the tests does not need torch."""
    return importlib.import_module("mi_kernels.testing.devices")


def pytest_configure(config: pytest.Config) -> None:
    if not _is_worker(config):
        config.pluginmanager.register(Reporter(), "mi_kernels-report")
    config.pluginmanager.register(Guard(config), "mi_kernels-guard")
