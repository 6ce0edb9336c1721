"""
Conformance: no test of Twisted's own reactor suite fails on a reactor of this package
while it passes on Twisted's epoll reactor in the same environment, or on its select
reactor on systems without epoll.
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
# The reactors of Twisted with which those of this package are compared.
YARDSTICKS = [
    "twisted.internet.epollreactor.EPollReactor"
    if LINUX
    else "twisted.internet.selectreactor.SelectReactor"
]

# The reactors to test, by their dotted names, and for each the tests that its kernel
# interface cannot pass.
ON_LINUX = {
    "twisted_rtsig.rtsigreactor.RealtimeSignalReactor": set[str](),
    "twisted_rtsig.epollreactor.EdgeEPollReactor": {
        # epoll does not report a descriptor that is closed while it is watched.  The
        # test skips Twisted's epoll reactor by its name for this reason.
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
    # If libkqueue is missing, test_kqueue.py says so when it skips.
    if libkqueue.path() is not None:
        REACTORS["tests.libkqueue.KQueueReactor"] = set()
elif hasattr(select, "kqueue"):
    REACTORS["twisted_rtsig.kqreactor.KQueueReactor"] = {
        # As with epoll.  The test skips Twisted's kqueue reactor by its name.
        "twisted.internet.test.test_fdset.ReactorFDSetTestsBuilder"
        ".test_lostFileDescriptor",
    }
elif sys.platform == "win32":
    REACTORS["twisted_rtsig.iocpreactor.CompletionPortReactor"] = set()
    # It has fewer features than the select reactor, and passes other tests.
    YARDSTICKS.append("twisted.internet.iocpreactor.reactor.IOCPReactor")

# If the suite were not found, many fewer tests would run.
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
    """Run the suites of all reactors at once, since they wait most of the time."""
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
def test_a_reactor_passes_the_tests_that_twisteds_reactor_passes(
    reactor: str, outcomes_by_reactor: dict[str, Outcomes]
) -> None:
    """
    A test counts as a failure if it passes on a reactor of Twisted and fails here three
    times in three runs: some of Twisted's tests are flaky.
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
    # A test that is skipped here and passes there counts as a failure.
    skipped = {test for test, outcome in ours.items() if outcome == "skip"}
    assert skipped & passed == set()
    suspects = failed(ours) - (failed(first) - passed)
    for _ in range(2):
        if suspects:
            again = start(reactor, "--only", *sorted(suspects))
            suspects &= failed(outcomes_of(again))
    assert suspects == set()
