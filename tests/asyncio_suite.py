"""
CPython's own tests of asyncio, on ``asyncio.SelectorEventLoop`` or on the event loop of
this package in its place, in a process of their own.

    python -m tests.asyncio_suite {stock,engine} [--only TEST_ID...]

The program prints one JSON object: the outcome ("success", "skip", "fail") of each test
by its id.  A test that is expected to fail counts as a success when it fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib.util
import io
import json
import os
import sys
import tempfile
import unittest
from collections.abc import Iterator
from typing import Any

Outcomes = dict[str, str]

PACKAGE = "test.test_asyncio"


def is_installed() -> bool:
    """Whether this Python has its tests installed."""
    try:
        return importlib.util.find_spec(PACKAGE) is not None
    except ImportError:
        return False


def replace_loops() -> None:
    """Replace ``asyncio.SelectorEventLoop`` by the loop of this package everywhere."""
    from twisted_rtsig.asyncio_support.loop import EngineEventLoop
    from twisted_rtsig.asyncioreactor import AsyncioReactor

    class Loop(EngineEventLoop):
        def __init__(self, selector: Any = None) -> None:
            super().__init__(selector)
            AsyncioReactor(self)

    unix_events: Any = asyncio.unix_events
    stock = unix_events.SelectorEventLoop
    for module in (asyncio, unix_events):
        for name, value in list(vars(module).items()):
            if value is stock:
                setattr(module, name, Loop)
    for value in vars(unix_events).values():
        if isinstance(value, type) and vars(value).get("_loop_factory") is stock:
            value._loop_factory = Loop  # type: ignore[attr-defined]


class Result(unittest.TestResult):
    """The outcome of each test, which is the worst of its subtests."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: Outcomes = {}

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.outcomes[test.id()] = "success"

    def _failed(self, test: Any, error: Any) -> None:
        # This may also be a failure of setUpClass, which is not a test.
        self.outcomes[test.id()] = "fail"
        print(f"{test.id()}: {self._exc_info_to_string(error, test)}", file=sys.stderr)  # type: ignore[attr-defined]

    def addError(self, test: Any, error: Any) -> None:
        self._failed(test, error)

    def addFailure(self, test: Any, error: Any) -> None:
        self._failed(test, error)

    def addSubTest(self, test: Any, subtest: Any, error: Any) -> None:
        if error is not None:
            self._failed(test, error)

    def addUnexpectedSuccess(self, test: Any) -> None:
        self.outcomes[test.id()] = "fail"

    def addSkip(self, test: Any, reason: str) -> None:
        self.outcomes[test.id()] = "skip"


def _tests(suite: Any) -> Iterator[unittest.TestCase]:
    for each in suite:
        if isinstance(each, unittest.TestSuite):
            yield from _tests(each)
        else:
            yield each


def run(only: set[str]) -> Outcomes:
    """
    The outcome of each test.

    :param only: the ids of the tests to run; empty for all.
    """
    tests = _tests(unittest.defaultTestLoader.loadTestsFromName(PACKAGE))
    suite = unittest.TestSuite(each for each in tests if not only or each.id() in only)
    del tests
    # Most tests collect garbage, which takes longer with more objects to look through.
    gc.collect()
    gc.freeze()
    result = Result()
    suite.run(result)
    return result.outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loop", choices=["stock", "engine"])
    parser.add_argument("--only", nargs="*", default=[], metavar="TEST_ID")
    options = parser.parse_args()
    if options.loop == "engine":
        replace_loops()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            outcomes = run(set(options.only))
        os.chdir("/")
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
