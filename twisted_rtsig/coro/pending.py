"""
The pending operations of a stream, which all wait for one event; and the error that
ends them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Final

from twisted_rtsig.coro.operations import Operation

Operations = dict[Operation[None], None]
"""Operations in their order, each of which can be dropped in constant time."""

# An empty dictionary takes 64 bytes, and each stream would have two.
NO_OPERATIONS: Final[Operations] = {}


def succeed(operations: Iterable[Operation[None]]) -> None:
    """Finish those that were not cancelled."""
    for operation in operations:
        if not operation.called:
            operation.succeed(None)


def fail(operations: Iterable[Operation[None]], error: Exception) -> None:
    """Let those fail that were not cancelled."""
    for operation in operations:
        if not operation.called:
            operation.fail(again(error), quietly=True)


def again(error: Exception) -> Exception:
    """A copy of an error, since each raise adds to the traceback of an exception."""
    try:
        copied = copy.copy(error).with_traceback(None)
        copied.__cause__ = error.__cause__
        return copied
    except Exception:
        # Its class takes other arguments than ``args`` has.
        return error.with_traceback(None)
