"""
Twisted's own black-box tests of a reactor, on one or more reactors one after the other,
in a process of their own.

    python -m tests.twisted_suite REACTOR... [--only TEST_ID...] [--skip TEST_ID...]

A reactor is given by its dotted class name.  The program prints one JSON object: for
each reactor, the outcome ("success", "skip", "fail") of each test by its id.  A test
that is expected to fail counts as a success when it fails.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import pkgutil
import sys
import tempfile
from typing import Any

from twisted.trial.reporter import TestResult
from twisted.trial.runner import TestLoader
from twisted.trial.unittest import TestSuite

Outcomes = dict[str, str]

# Seconds for one test; trial's own limit is 120.  A few of Twisted's tests hang now and
# then on any reactor: on a busy machine a child may end before the reactor runs which
# its end should stop.
TIMEOUT = 20


def reactor_test_cases(reactors: list[str]) -> list[type[Any]]:
    """Every test case class that Twisted's ReactorBuilder makes for the reactors."""
    from twisted.internet.test import reactormixins

    # makeTestCaseClasses() reads this.  Test modules call it when they are imported.
    reactormixins.ReactorBuilder._reactors = list(reactors)
    import twisted.internet.test

    names = {each.rsplit(".", 1)[-1] for each in reactors}
    cases = []
    for module_info in pkgutil.iter_modules(twisted.internet.test.__path__):
        if not module_info.name.startswith("test_"):
            continue
        try:
            module = importlib.import_module(
                f"twisted.internet.test.{module_info.name}"
            )
        except ImportError as error:
            print(f"not run: {module_info.name}: {error}", file=sys.stderr)
            continue
        for name, value in vars(module).items():
            if (
                isinstance(value, type)
                and issubclass(value, reactormixins.ReactorBuilder)
                and any(name.endswith(f"_{each}Tests") for each in names)
            ):
                cases.append(value)
    return cases


def run(reactors: list[str], only: set[str], skip: set[str]) -> dict[str, Outcomes]:
    """
    The outcome of each test on each reactor.

    :param only: the ids of the tests to run; empty for all.
    :param skip: the ids of the tests not to run.
    """
    outcomes: dict[str, Outcomes] = {each: {} for each in reactors}
    loader = TestLoader()
    for case in reactor_test_cases(reactors):
        reactor = next(
            each
            for each in reactors
            if case.__name__.endswith(f"_{each.rsplit('.', 1)[-1]}Tests")
        )
        suffix = f"_{reactor.rsplit('.', 1)[-1]}Tests"
        case.timeout = TIMEOUT
        base = f"{case.__module__}.{case.__name__.removesuffix(suffix)}"
        for name in loader.getTestCaseNames(case):
            # The loader of trial gives names without their prefix.
            test_id = f"{base}.test{name}"
            if test_id in skip or (only and test_id not in only):
                continue
            result = TestResult()
            TestSuite([case(f"test{name}")]).run(result)
            if result.failures or result.errors or result.unexpectedSuccesses:
                outcome = "fail"
                for _, why in result.failures + result.errors:
                    print(f"{reactor}: {test_id}: {why}", file=sys.stderr)
            elif result.skips:
                outcome = "skip"
            else:
                outcome = "success"
            outcomes[reactor][test_id] = outcome
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reactors", nargs="+", metavar="REACTOR")
    parser.add_argument("--only", nargs="*", default=[], metavar="TEST_ID")
    parser.add_argument("--skip", nargs="*", default=[], metavar="TEST_ID")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            outcomes = run(options.reactors, set(options.only), set(options.skip))
        os.chdir("/")
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
