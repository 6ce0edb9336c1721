"""
Conformance: no test of CPython's own asyncio suite fails on the event loop of this
package while it passes on ``asyncio.SelectorEventLoop``, on the same Python.

It takes minutes, and is left out unless ``TEST_ASYNCIO`` is set, as .ci/run does.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.asyncio_suite import Outcomes, is_installed
from tests.suites import end_of, start_suite

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("TEST_ASYNCIO"), reason="TEST_ASYNCIO=1 runs asyncio's suite"
    ),
    pytest.mark.skipif(
        sys.platform == "win32", reason="the loop is for Linux, BSD and macOS"
    ),
    pytest.mark.skipif(not is_installed(), reason="this Python has no tests installed"),
]

# If the suite were not found, many fewer tests would run.
FEWEST_TESTS = 2000


def start(loop: str, *options: str) -> subprocess.Popen[str]:
    """Run asyncio's tests; see tests/asyncio_suite.py."""
    return start_suite("tests.asyncio_suite", loop, *options)


def outcomes_of(suite: subprocess.Popen[str]) -> tuple[Outcomes, str]:
    """The outcomes, and the failures that the suite has printed."""
    return end_of(suite, 1200)


def passed(outcomes: Outcomes) -> set[str]:
    return {test for test, outcome in outcomes.items() if outcome == "success"}


def test_the_loop_passes_the_tests_that_asyncios_loop_passes() -> None:
    """
    A test counts as a failure if it passes on asyncio's loop and fails here three times
    in three runs: some of these tests depend on time.
    """
    suites = [start("stock"), start("engine")]
    (theirs, _), (ours, errors) = map(outcomes_of, suites)
    assert set(ours) == set(theirs)
    assert len(passed(ours)) >= FEWEST_TESTS
    # A skipped test counts as a failure.
    suspects = passed(theirs) - passed(ours)
    for _ in range(2):
        if suspects:
            again, errors = outcomes_of(start("engine", "--only", *sorted(suspects)))
            suspects -= passed(again)
    assert suspects == set(), errors
