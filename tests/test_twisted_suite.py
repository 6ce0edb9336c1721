"""
Conformance: no test of Twisted's own reactor suite fails on one of our
reactors while it passes on Twisted's epoll reactor in the same environment, or
on its select reactor where there is no epoll.
"""

from __future__ import annotations

import select
import subprocess
import sys

import pytest

import twisted
from tests import libkqueue
from tests.suites import end_of, start_suite
from tests.twisted_suite import Outcomes

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        not twisted.__file__.isascii(),
        reason="Twisted's tests are imported from ASCII paths only: "
        + str(twisted.__file__),
    ),
]

LINUX = sys.platform.startswith("linux")
# What ours are held to, and whatever else passes there.
YARDSTICKS = [
    "twisted.internet.epollreactor.EPollReactor"
    if LINUX
    else "twisted.internet.selectreactor.SelectReactor"
]

# One more dotted name here tests one more reactor.  With each, the tests that
# its kernel interface cannot pass.
ON_LINUX = {
    "twisted_rtsig.rtsigreactor.RealtimeSignalReactor": set[str](),
    "twisted_rtsig.epollreactor.EdgeEPollReactor": {
        # Epoll is silent about a descriptor that is closed while it is watched.
        # The test knows that, and skips Twisted's epoll reactor by its name.
        "twisted.internet.test.test_fdset.ReactorFDSetTestsBuilder"
        ".test_lostFileDescriptor",
    },
}
ON_LINUX["twisted_rtsig.asyncioreactor.AsyncioReactor"] = ON_LINUX[
    "twisted_rtsig.epollreactor.EdgeEPollReactor"
]
REACTORS: dict[str, set[str]] = {}
if LINUX:
    REACTORS.update(ON_LINUX)
    # Where it is missing, test_kqueue.py skips and says so, once for all.
    if libkqueue.path() is not None:
        REACTORS["tests.libkqueue.KQueueReactor"] = set()
elif hasattr(select, "kqueue"):
    REACTORS["twisted_rtsig.kqreactor.KQueueReactor"] = {
        # As with epoll; Twisted's kqueue reactor, which it skips, has this name.
        "twisted.internet.test.test_fdset.ReactorFDSetTestsBuilder"
        ".test_lostFileDescriptor",
    }
elif sys.platform == "win32":
    REACTORS["twisted_rtsig.iocpreactor.CompletionPortReactor"] = set()
    # It has less than the select reactor, and passes what that does not.
    YARDSTICKS.append("twisted.internet.iocpreactor.reactor.IOCPReactor")

# Far more than there would be if the suite had not been found.
FEWEST_TESTS = 200 if sys.platform != "win32" else 190


def start(reactor: str, *options: str) -> subprocess.Popen[str]:
    """Run Twisted's tests; see tests/twisted_suite.py."""
    return start_suite("tests.twisted_suite", reactor, *options)


def outcomes_of(suite: subprocess.Popen[str]) -> Outcomes:
    by_reactor: dict[str, Outcomes]
    by_reactor, _ = end_of(suite, 600)
    (outcomes,) = by_reactor.values()
    return outcomes


@pytest.fixture(scope="module")
def outcomes_by_reactor() -> dict[str, Outcomes]:
    """Of all reactors; their suites wait most of the time, so all run at once."""
    suites = {
        **{reactor: start(reactor) for reactor in YARDSTICKS},
        **{
            reactor: start(reactor, "--skip", *cannot)
            for reactor, cannot in REACTORS.items()
        },
    }
    try:
        return {reactor: outcomes_of(suite) for reactor, suite in suites.items()}
    finally:
        for suite in suites.values():
            suite.kill()
            suite.communicate()


def failed(outcomes: Outcomes) -> set[str]:
    return {test for test, outcome in outcomes.items() if outcome == "fail"}


@pytest.mark.skipif(not REACTORS, reason="no reactor of this package runs here")
@pytest.mark.parametrize("reactor", REACTORS)
def test_as_good_as_twisteds(
    reactor: str, outcomes_by_reactor: dict[str, Outcomes]
) -> None:
    """
    A test counts against us if it passes on one of Twisted's reactors and fails
    here, three times of three: some of Twisted's tests are flaky by themselves.
    """
    ours = outcomes_by_reactor[reactor]
    first, *others = (outcomes_by_reactor[each] for each in YARDSTICKS)
    assert set(ours) == set(first) - REACTORS[reactor]
    assert list(ours.values()).count("success") >= FEWEST_TESTS
    passed = {
        test
        for theirs in (first, *others)
        for test, outcome in theirs.items()
        if outcome == "success"
    }
    # What Twisted's can run, we can: a skip is no way around.
    skipped = {test for test, outcome in ours.items() if outcome == "skip"}
    assert skipped & passed == set()
    suspects = failed(ours) - (failed(first) - passed)
    for _ in range(2):
        if suspects:
            again = start(reactor, "--only", *sorted(suspects))
            suspects &= failed(outcomes_of(again))
    assert suspects == set()
