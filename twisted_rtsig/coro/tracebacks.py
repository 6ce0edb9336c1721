"""
Errors in logs: with stack traces that show the user's code and not the code that
drives it, and with everything that Python itself prints of an error.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import IO, Any

from twisted.logger import Logger
from twisted.python.failure import Failure

if sys.version_info < (3, 11):
    import exceptiongroup
    from exceptiongroup import BaseExceptionGroup

_MACHINERY = (
    *("twisted_rtsig.coro.", "twisted_rtsig.runner"),
    *("twisted.internet.defer", "twisted.python.failure"),
)


def without_machinery(error: BaseException) -> BaseException:
    """
    Take this package's and Twisted's drivers of coroutines out of the tracebacks of
    ``error``, of its causes and contexts, and of the errors in a group; return
    ``error``.

    If all of a traceback is machinery, then its last entry stays.  An error that passes
    through many tasks is filtered by each of them, which looks only at the entries that
    were added since the last time.
    """
    seen: set[int] = set()
    rest: list[BaseException | None] = [error]
    while rest:
        each = rest.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__, filtered_before = _filtered(each.__traceback__)
            if not filtered_before:
                rest += [each.__cause__, each.__context__]
                if isinstance(each, BaseExceptionGroup):
                    rest += each.exceptions
    return error


def _filtered(traceback: TracebackType | None) -> tuple[TracebackType | None, bool]:
    """
    A traceback without machinery, and whether a part of it was filtered before.

    The filtered part is marked by an odd ``tb_lasti``.  Instructions are at even
    offsets, and all code that looks up the position of an instruction rounds down.
    """
    entries = []
    while traceback is not None and not traceback.tb_lasti & 1:
        entries.append(traceback)
        traceback = traceback.tb_next
    filtered_before = traceback is not None
    kept = [each for each in entries if not is_machinery(each.tb_frame)]
    if not (kept or filtered_before):
        kept = entries[-1:]
    for each in reversed(kept):
        traceback = TracebackType(
            traceback, each.tb_frame, each.tb_lasti | 1, each.tb_lineno
        )
    return traceback, filtered_before


def drop_machinery_above(error: BaseException) -> BaseException:
    """Take the outermost entries that are machinery out of the traceback."""
    traceback = error.__traceback__
    while traceback is not None and is_machinery(traceback.tb_frame):
        traceback = traceback.tb_next
    return error.with_traceback(traceback)


def is_machinery(frame: FrameType) -> bool:
    """Whether the code is a driver of coroutines: of this package, or of Twisted."""
    module = frame.f_globals.get("__name__", "")
    return isinstance(module, str) and module.startswith(_MACHINERY)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """``error`` itself; or if it is a group, the errors in it and in nested groups."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from causes(each)
    elif error is not None:
        yield error


class WholeFailure(Failure):
    """
    A failure that is printed and logged as Python prints its error: with the error's
    causes and notes, and with all errors of a group.  Twisted's own failures print the
    outermost error alone.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)  # type: ignore[no-untyped-call]

    def printTraceback(
        self,
        file: IO[str] | None = None,
        elideFrameworkCode: bool = False,
        detail: str = "default",
    ) -> None:
        """See ``Failure.printTraceback``, which serves any other ``detail``."""
        error = self.value
        if file is None or detail != "default" or not isinstance(error, BaseException):
            super().printTraceback(  # type: ignore[no-untyped-call]
                file, elideFrameworkCode, detail
            )
            return
        # The Deferreds of older versions of Twisted take the traceback away from the
        # error, and the failure keeps a copy.
        where = self.getTracebackObject()  # type: ignore[no-untyped-call]
        file.write("".join(_formatted(error, where)))


def _formatted(error: BaseException, where: TracebackType | None) -> list[str]:
    """The lines that Python itself prints for ``error``."""
    if sys.version_info < (3, 11) and isinstance(error, BaseExceptionGroup):
        # format_exception() of the backport takes the traceback from the error alone.
        return exceptiongroup.format_exception(error)
    return traceback.format_exception(type(error), error, where)


def log_failure(log: Logger, message: str, error: BaseException, **fields: Any) -> None:
    """Log an error; a group is logged once, with all errors in it."""
    log.failure(message, WholeFailure(error), **fields)
