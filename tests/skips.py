"""Skipped tests are listed with their reasons; in CI a skip fails, unless what it needs really is missing."""

import os
import shutil

import pytest


def needs(program: str) -> pytest.MarkDecorator:
    """Skip a test on a machine without `program`, and nowhere else."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs {program}")


def pytest_terminal_summary(terminalreporter, config):
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    terminalreporter.section("skipped tests and their reasons")
    for report in skipped:
        terminalreporter.line(f"{report.nodeid}: {_reason(report)}")


def pytest_sessionfinish(session, exitstatus):
    is_worker = hasattr(session.config, "workerinput")  # of pytest-xdist: what it skips is reported by its controller
    if not os.environ.get("CI") or exitstatus or is_worker:
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    for report in reporter.stats.get("skipped", []):
        word, _, missing = _reason(report).partition(" ")
        if word != "needs" or " " in missing or shutil.which(missing) is not None:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            reporter.line(f"skipped, although nothing is missing: {report.nodeid}: {_reason(report)}", red=True)


def _reason(report) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")
