"""A pytest plugin for a visit to a GPU: ``pytest -p perf.pytest_visit --visit tests.json tests``.

It picks the tests that run kernels, the most telling first, and leaves out those that passed before with
the same sources. Each result is in the file, and each failure printed, as soon as it is there: nothing
is lost where the run is stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

__all__ = ["fingerprint", "read", "runs_kernels"]

ROOT = Path(__file__).parent.parent

#: Test files and words of test names, the most telling first; the rest follow in their order.
FIRST = (
    "test_gpu.py",
    "test_launch.py",
    "streamed",
    "test_ops.py",
    "test_modules.py",
    "test_functional.py",
)

#: What the driver says of a context in which nothing works from then on.
BROKEN = ("AcceleratorError", "CUDA error", "illegal memory access", "HIP error")


def fingerprint() -> str:
    """A hash of the sources that a test's result depends on: package, tests, versions, GPU."""
    import torch
    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    digest = hashlib.sha256(f"{torch.__version__} {triton.__version__} {gpu}".encode())
    for folder in ("triton_bn", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def read(path: Path) -> list[dict[str, Any]]:
    """The results in a file, a JSON object a line; one that was cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def runs_kernels(item: pytest.Item) -> bool:
    """Whether a test puts tensors on the GPU and is not about the plain-torch path."""
    if item.get_closest_marker("gpu"):
        return True
    arguments = item.callspec.params if hasattr(item, "callspec") else {}
    if "reference" in [value for value in arguments.values() if isinstance(value, str)]:
        return False
    return "device" in getattr(item, "fixturenames", ()) or arguments.get("path") == "kernels"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("visit")
    group.addoption("--visit", type=Path, required=True, help="the file of results")
    group.addoption("--visit-seconds", type=float, default=0.0, help="so long a run starts tests")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reporter(config), "visit reporter")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """xdist: every worker leaves out the same tests, whatever is written meanwhile."""
    node.workerinput["visit_passed"] = node.config.pluginmanager.get_plugin("visit reporter").passed


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        passed = {*config.workerinput["visit_passed"]}
    else:
        passed = {*config.pluginmanager.get_plugin("visit reporter").passed}
    chosen = [item for item in items if runs_kernels(item) and item.nodeid not in passed]
    chosen.sort(
        key=lambda item: next((i for i, word in enumerate(FIRST) if word in item.nodeid), 99)
    )
    config.hook.pytest_deselected(items=[item for item in items if item not in {*chosen}])
    items[:] = chosen


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A worker whose GPU context is broken ends: its other tests go to a new one."""
    if "PYTEST_XDIST_WORKER" in os.environ and report.failed:
        text = report.longreprtext
        if any(word in text for word in BROKEN):
            os._exit(3)


class Reporter:
    """The one process that sees every result."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.path: Path = config.getoption("--visit")
        self.fingerprint = fingerprint()
        rows = [row for row in read(self.path) if row["fingerprint"] == self.fingerprint]
        outcomes = {row["test"]: row["outcome"] for row in rows}
        self.passed = sorted(test for test, outcome in outcomes.items() if outcome == "passed")
        seconds = config.getoption("--visit-seconds")
        self.deadline = time.monotonic() + seconds if seconds else float("inf")
        self.failures = 0
        self.stopped = False

    def write(self, test: str, outcome: str, seconds: float, detail: str) -> None:
        row = {
            "test": test, "outcome": outcome, "seconds": round(seconds, 2), "detail": detail[-2000:],
            "fingerprint": self.fingerprint,
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if outcome == "failed":
            self.failures += 1
            lines = [line for line in detail.strip().splitlines() if line.startswith("E ")]
            reason = (lines or detail.strip().splitlines() or ["no message"])[0].removeprefix("E ")
            print(f"\nFAILED {test}: {reason.strip()[:300]}", flush=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.write(report.nodeid, "failed", report.duration, report.longreprtext)
        elif report.when == "call" or report.skipped:
            self.write(report.nodeid, report.outcome, report.duration, "")
        if report.when == "teardown" and time.monotonic() > self.deadline and not self.stopped:
            self.stopped = True
            reason = "the time of the visit is over; what was not run is left for the next"
            session = getattr(self, "session", None)
            if session is not None:
                session.shouldstop = reason

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(report.nodeid or "collection", "failed", 0.0, report.longreprtext)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(
            f"visit: {len(self.passed)} tests passed before and were left out, {self.failures} failures"
        )
