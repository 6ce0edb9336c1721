"""Blocking functions in threads, for tasks, and the way back."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.threads import blockingCallFromThread, deferToThreadPool

from twisted_rtsig.coro.tasks import scheduler_for, spawn

T = TypeVar("T")
P = ParamSpec("P")

# The reactor whose thread has called in_thread.
_home: contextvars.ContextVar[Any] = contextvars.ContextVar("home")


def in_thread(
    function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> Deferred[T]:
    """
    Run a function that blocks in a thread of the reactor's pool, with the context
    variables of the task that calls this.

    If the wait is cancelled, the thread goes on to the end of the function, and
    its result is dropped.
    """
    reactor = scheduler_for(None).reactor
    context = contextvars.copy_context()
    context.run(_home.set, reactor)
    call = functools.partial(context.run, function, *args, **kwargs)
    running: Deferred[T] = deferToThreadPool(reactor, reactor.getThreadPool(), call)
    return running


def from_thread(function: Callable[..., Any], *args: Any) -> Any:
    """
    From a function that :func:`in_thread` runs: run C{function(*args)} as a task
    in the reactor's thread, and wait for what it returns or raises.

    :param function: whatever :func:`spawn` takes.
    :raises RuntimeError: in any other thread.
    """
    reactor = _home.get(None)
    if reactor is None:
        raise RuntimeError(
            "from_thread() works only in a function that in_thread() runs: elsewhere "
            "use reactor.callFromThread"
        )

    def run() -> Deferred[Any]:
        return spawn(function, *args, reactor=reactor).as_deferred()

    return blockingCallFromThread(reactor, run)
