"""
Conformance: no test of CPython's own asyncio suite fails on the event loop of this
package while it passes on ``asyncio.SelectorEventLoop``, on the same Python.

It takes minutes, so that it is left out unless ``TEST_ASYNCIO`` is set, as by .ci/run.
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

# Far more than there would be if the suite had not been found.
FEWEST_TESTS = 2000


def start(loop: str, *options: str) -> subprocess.Popen[str]:
    """Run asyncio's tests; see tests/asyncio_suite.py."""
    return start_suite("tests.asyncio_suite", loop, *options)


def outcomes_of(suite: subprocess.Popen[str]) -> tuple[Outcomes, str]:
    """The outcomes, and what the suite has printed about failures."""
    return end_of(suite, 1200)


def passed(outcomes: Outcomes) -> set[str]:
    return {test for test, outcome in outcomes.items() if outcome == "success"}


def test_as_good_as_asyncios() -> None:
    """
    A test counts against the loop if it passes on asyncio's and does not here, three
    times of three: some of these tests depend on time.
    """
    suites = [start("stock"), start("engine")]
    (theirs, _), (ours, errors) = map(outcomes_of, suites)
    assert set(ours) == set(theirs)
    assert len(passed(ours)) >= FEWEST_TESTS
    # A skip is no way around.
    suspects = passed(theirs) - passed(ours)
    for _ in range(2):
        if suspects:
            again, errors = outcomes_of(start("engine", "--only", *sorted(suspects)))
            suspects -= passed(again)
    assert suspects == set(), errors
