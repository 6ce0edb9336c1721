"""
Errors as they are told: with stack traces that show what the user wrote, and not
what drives it, and groups of them one by one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from twisted.logger import Logger
from twisted.python.failure import Failure

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

_MACHINERY = ("twisted_rtsig.coro.", "twisted.internet.defer", "twisted.python.failure")


def without_machinery(error: BaseException) -> BaseException:
    """
    Take this package's and Twisted's drivers of coroutines out of the traceback
    of C{error} and of what led to it; return C{error}.

    An error that comes out of this package alone keeps its last line.
    """
    seen: set[int] = set()
    rest: list[BaseException | None] = [error]
    while rest:
        each = rest.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = _filtered(each.__traceback__)
            rest += [each.__cause__, each.__context__]
    return error


def _filtered(traceback: TracebackType | None) -> TracebackType | None:
    entries = []
    while traceback is not None:
        entries.append(traceback)
        traceback = traceback.tb_next
    kept = [each for each in entries if not is_machinery(each.tb_frame)] or entries[-1:]
    shown: TracebackType | None = None
    for each in reversed(kept):
        shown = TracebackType(shown, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return shown


def is_machinery(frame: FrameType) -> bool:
    """Whether the code is this package's, or Twisted's, which drives coroutines."""
    module = frame.f_globals.get("__name__", "")
    return isinstance(module, str) and module.startswith(_MACHINERY)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """C{error} itself, or if it is a group, all that are in it."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from causes(each)
    elif error is not None:
        yield error


def log_failure(log: Logger, message: str, failure: Failure, **fields: Any) -> None:
    """Log a failure; of a group, whose trace shows no more than that, each one."""
    for error in causes(failure.value):
        each = failure if error is failure.value else Failure(error)
        log.failure(message, each, **fields)
