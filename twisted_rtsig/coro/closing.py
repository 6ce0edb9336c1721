"""The ends of ``async with`` blocks: what they do to the object of the block."""

from __future__ import annotations

from collections.abc import Coroutine
from types import TracebackType
from typing import Any

from twisted.internet.defer import Deferred

from twisted_rtsig.coro.operations import ignore


class AsyncBlock:
    """An object of an ``async with`` block, which is told how the block ends."""

    __slots__ = ()

    async def _end_block(self, error: BaseException | None) -> None:
        """
        The block ends.

        :param error: the exception that ends it.  After a ``GeneratorExit`` nothing can
            be awaited: the coroutine is closed, and nothing resumes it any more.
        """
        raise NotImplementedError

    # No coroutine of its own, so that an error has one frame less.
    def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Coroutine[Any, Any, None]:
        return self._end_block(error)


class ClosedAtExit(AsyncBlock):
    """An object that is closed, or removed, at the end of the block."""

    __slots__ = ()

    def _close_at_exit(self) -> Deferred[None]:
        """Begin to close it.  That ends even if its operation is cancelled."""
        raise NotImplementedError

    async def _end_block(self, error: BaseException | None) -> None:
        closing = self._close_at_exit()
        # A coroutine that is garbage cannot wait; the object is closed all the same.
        if not isinstance(error, GeneratorExit):
            await closing


class AbortedOnError(AsyncBlock):
    """
    An object that is closed at the end of the block, and aborted if an exception ends
    the block, or the wait until it is closed.
    """

    __slots__ = ()

    def close(self) -> Deferred[None]:
        """Close it, when all is done that was begun."""
        raise NotImplementedError

    def abort(self) -> Deferred[None]:
        """Close it at once."""
        raise NotImplementedError

    async def _end_block(self, error: BaseException | None) -> None:
        closing = self.close() if error is None else self.abort()
        if isinstance(error, GeneratorExit):
            # Nothing can resume this any more.
            closing.addErrback(ignore)
            return
        try:
            await closing
        except BaseException:
            # Nothing waits any more until the peer has taken what is left.
            self.abort().addErrback(ignore)
            raise
