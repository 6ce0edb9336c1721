"""Futures and coroutines of asyncio as Deferreds."""

from __future__ import annotations

import asyncio
import inspect
from asyncio import Future
from collections.abc import Awaitable
from typing import TypeVar

from twisted.internet import defer
from twisted.internet.defer import Deferred

from twisted_rtsig.coro.awaiting_asyncio import cancellation_of, loop_for, no_loop
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.scheduler import scheduler_for
from twisted_rtsig.coro.tracebacks import WholeFailure

T = TypeVar("T")


class _OfFuture(Deferred[T]):
    """
    Fires when a future of asyncio is done, and not before that, even if the Deferred
    was cancelled.
    """

    def __init__(self, future: Future[T]) -> None:
        super().__init__()
        self._future: Future[T] | None = future
        future.add_done_callback(self._done)

    def cancel(self) -> None:
        """See ``Deferred.cancel``."""
        if self._future is None:
            super().cancel()
        else:
            self._future.cancel()

    def _done(self, future: Future[T]) -> None:
        self._future = None
        cancellation = cancellation_of(future)
        if cancellation is not None:
            error: BaseException = defer.CancelledError(*cancellation.args)
            error.__cause__ = cancellation
        else:
            raised = future.exception()
            if raised is None:
                self.callback(future.result())
                return
            error = raised
        try:
            self.errback(WholeFailure(error))
        finally:
            # Break a circle: the error's traceback refers to this frame.
            del self, future, error, cancellation

    def __repr__(self) -> str:
        if self._future is None:
            return super().__repr__()
        return f"the end of {self._future!r}"


@must_be_awaited
def from_asyncio(awaitable: Awaitable[T]) -> Deferred[T]:
    """
    Make a Deferred of a future, coroutine or other awaitable of asyncio, for code that
    is not in a task: for ``inlineCallbacks``, ``Deferred.fromCoroutine`` and
    callbacks::

        @inlineCallbacks
        def fetch(url):
            response = yield from_asyncio(session.get(url))

    A coroutine runs in a task of asyncio of its own.  Cancelling the Deferred cancels
    the awaitable, and the Deferred fires when the awaitable has ended.  If the
    awaitable was cancelled, by any code, then the Deferred fails with Twisted's
    ``CancelledError``.

    A task does not need this: it awaits the future or coroutine itself.

    :raises RuntimeError: if no event loop of asyncio runs in this thread.
    """
    loop = loop_for(scheduler_for(None))
    if loop is None:
        if inspect.iscoroutine(awaitable):
            # Otherwise Python warns that the coroutine was never awaited.
            awaitable.close()
        raise no_loop(f"{awaitable!r} is awaited by asyncio")
    return _OfFuture(asyncio.ensure_future(awaitable, loop=loop))
