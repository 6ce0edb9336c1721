"""Suites of other projects, each run in a process of its own that prints JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def start_suite(module: str, *arguments: str) -> subprocess.Popen[str]:
    """Run a module of the tests as a program, without its warnings."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_of(suite: subprocess.Popen[str], seconds: float) -> tuple[Any, str]:
    """
    Wait for a suite, which must end with status 0.

    :param seconds: the longest time that it may take.
    :return: its output, which is JSON, and its errors.
    """
    with suite:
        try:
            output, errors = suite.communicate(timeout=seconds)
        finally:
            suite.kill()
    assert suite.returncode == 0, errors
    return json.loads(output), errors
