"""
Conformance: no test of Twisted's own reactor suite fails on one of our
reactors while it passes on Twisted's epoll reactor in the same environment.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import cast

import pytest

from tests.twisted_suite import Outcomes

EPOLL = "twisted.internet.epollreactor.EPollReactor"

# One more dotted name here tests one more reactor.  With each, the tests that
# its kernel interface cannot pass.
REACTORS = {
    "twisted_rtsig.rtsigreactor.RealtimeSignalReactor": set[str](),
    "twisted_rtsig.epollreactor.EdgeEPollReactor": {
        # Epoll is silent about a descriptor that is closed while it is watched.
        # The test knows that, and skips Twisted's epoll reactor by its name.
        "twisted.internet.test.test_fdset.ReactorFDSetTestsBuilder"
        ".test_lostFileDescriptor",
    },
}

# Far more than there would be if the suite had not been found.
FEWEST_TESTS = 200


def start_suite(reactor: str, *options: str) -> subprocess.Popen[str]:
    """Run Twisted's tests in a process of their own; see tests/twisted_suite.py."""
    return subprocess.Popen(
        [
            *(sys.executable, "-W", "ignore"),
            *("-m", "tests.twisted_suite", reactor, *options),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcomes_of(suite: subprocess.Popen[str]) -> Outcomes:
    with suite:
        try:
            output, errors = suite.communicate(timeout=600)
        finally:
            suite.kill()
    assert suite.returncode == 0, errors
    (outcomes,) = json.loads(output).values()
    return cast(Outcomes, outcomes)


@pytest.fixture(scope="module")
def outcomes_by_reactor() -> dict[str, Outcomes]:
    """Of all reactors; their suites wait most of the time, so all run at once."""
    suites = {
        EPOLL: start_suite(EPOLL),
        **{
            reactor: start_suite(reactor, "--skip", *cannot)
            for reactor, cannot in REACTORS.items()
        },
    }
    return {reactor: outcomes_of(suite) for reactor, suite in suites.items()}


def failed(outcomes: Outcomes) -> set[str]:
    return {test for test, outcome in outcomes.items() if outcome == "fail"}


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="compares with epoll, for Linux only"
)
@pytest.mark.parametrize("reactor", REACTORS)
def test_as_good_as_epoll(
    reactor: str, outcomes_by_reactor: dict[str, Outcomes]
) -> None:
    """
    A test counts against us if it passes on epoll and fails here, three times
    of three: some of Twisted's tests are flaky by themselves.
    """
    ours, epolls = outcomes_by_reactor[reactor], outcomes_by_reactor[EPOLL]
    assert set(ours) == set(epolls) - REACTORS[reactor]
    assert list(ours.values()).count("success") >= FEWEST_TESTS
    # What epoll can run, we can: a skip is no way around.
    skipped = {test for test, outcome in ours.items() if outcome == "skip"}
    assert {test for test in skipped if epolls[test] == "success"} == set()
    suspects = failed(ours) - failed(epolls)
    for _ in range(2):
        if suspects:
            again = start_suite(reactor, "--only", *sorted(suspects))
            suspects &= failed(outcomes_of(again))
    assert suspects == set()
