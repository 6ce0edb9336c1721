"""Makes ``./dev test-quick`` quick: fewer examples, and no programs."""

from __future__ import annotations

import functools
import inspect
import subprocess
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

from hypothesis import settings

PROFILE = "quick"
"""The profile of hypothesis that is chosen by ``--hypothesis-profile=quick``."""

settings.register_profile(PROFILE, max_examples=10)


def examples(usual: int) -> int:
    """Return how many examples to try, a tenth of the usual number in a quick run."""
    return usual * settings().max_examples // 100


@functools.cache
def starts_programs(function: Callable[..., Any]) -> bool:
    """
    Whether a function uses :mod:`subprocess`, directly or by the functions and classes
    of these tests that it names.

    Such a program is mostly a Python that imports all of Twisted, which takes longer
    than a hundred other tests.
    """
    return any(each is subprocess for each in _used_by(function))


def _used_by(function: Callable[..., Any]) -> Iterator[object]:
    """Yield the global objects that a function may use."""
    found: set[object] = set()
    to_visit: list[Any] = [function]
    while to_visit:
        visited = inspect.unwrap(to_visit.pop())
        if not isinstance(visited, FunctionType) or visited in found:
            continue
        found.add(visited)
        for name in _names(visited.__code__):
            used = visited.__globals__.get(name)
            yield used
            if str(getattr(used, "__module__", "")).startswith("tests."):
                made_by = vars(used).get("__init__") if isinstance(used, type) else used
                to_visit.append(made_by)


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names in a function and in the functions within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
