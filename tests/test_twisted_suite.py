"""
Conformance: no test of Twisted's own reactor suite fails on one of our
reactors while it passes on Twisted's epoll reactor in the same environment.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.twisted_suite import Outcomes

EPOLL = "twisted.internet.epollreactor.EPollReactor"

# One more dotted name here tests one more reactor.
REACTORS = ["twisted_rtsig.rtsigreactor.RealtimeSignalReactor"]

# Far more than there would be if the suite had not been found.
FEWEST_TESTS = 200


def outcomes_of(reactors: list[str], only: list[str]) -> dict[str, Outcomes]:
    """Run Twisted's tests in a process of their own; see tests/twisted_suite.py."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.twisted_suite", *reactors]
    if only:
        command += ["--only", *only]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    outcomes: dict[str, Outcomes] = json.loads(done.stdout)
    return outcomes


def failed(outcomes: Outcomes) -> set[str]:
    return {test for test, outcome in outcomes.items() if outcome == "fail"}


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="compares with epoll, for Linux only"
)
@pytest.mark.parametrize("reactor", REACTORS)
def test_as_good_as_epoll(reactor: str) -> None:
    """
    A test counts against us if it passes on epoll and fails here, three times
    of three: some of Twisted's tests are flaky by themselves.
    """
    outcomes = outcomes_of([reactor, EPOLL], [])
    ours, epolls = outcomes[reactor], outcomes[EPOLL]
    assert set(ours) == set(epolls)
    assert list(ours.values()).count("success") >= FEWEST_TESTS
    # What epoll can run, we can: a skip is no way around.
    skipped = {test for test, outcome in ours.items() if outcome == "skip"}
    assert {test for test in skipped if epolls[test] == "success"} == set()
    suspects = failed(ours) - failed(epolls)
    for _ in range(2):
        if suspects:
            suspects &= failed(outcomes_of([reactor], sorted(suspects))[reactor])
    assert suspects == set()
