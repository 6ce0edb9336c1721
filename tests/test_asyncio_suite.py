"""
Conformance: no test of CPython's own asyncio suite fails on the event loop of this
package while it passes on ``asyncio.SelectorEventLoop``, on the same Python.

It takes minutes, so that it is left out unless ``TEST_ASYNCIO`` is set, as by .ci/run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import cast

import pytest

from tests.asyncio_suite import Outcomes, is_installed

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


def start_suite(loop: str, *options: str) -> subprocess.Popen[str]:
    """Run asyncio's tests in a process of their own; see tests/asyncio_suite.py."""
    return subprocess.Popen(
        [
            *(sys.executable, "-W", "ignore"),
            *("-m", "tests.asyncio_suite", loop, *options),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcomes_of(suite: subprocess.Popen[str]) -> tuple[Outcomes, str]:
    """The outcomes, and what the suite has printed about failures."""
    with suite:
        try:
            output, errors = suite.communicate(timeout=1200)
        finally:
            suite.kill()
    assert suite.returncode == 0, errors
    return cast(Outcomes, json.loads(output)), errors


def passed(outcomes: Outcomes) -> set[str]:
    return {test for test, outcome in outcomes.items() if outcome == "success"}


def test_as_good_as_asyncios() -> None:
    """
    A test counts against the loop if it passes on asyncio's and does not here, three
    times of three: some of these tests depend on time.
    """
    suites = [start_suite("stock"), start_suite("engine")]
    (theirs, _), (ours, errors) = map(outcomes_of, suites)
    assert set(ours) == set(theirs)
    assert len(passed(ours)) >= FEWEST_TESTS
    # A skip is no way around.
    suspects = passed(theirs) - passed(ours)
    for _ in range(2):
        if suspects:
            again, errors = outcomes_of(
                start_suite("engine", "--only", *sorted(suspects))
            )
            suspects -= passed(again)
    assert suspects == set(), errors
