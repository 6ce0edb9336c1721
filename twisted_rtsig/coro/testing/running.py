"""Tests and conversations that are tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from twisted.internet.defer import Deferred

from twisted_rtsig.coro.handlers import Handler
from twisted_rtsig.coro.runnables import Runnable
from twisted_rtsig.coro.spawning import spawn
from twisted_rtsig.coro.streams import Stream
from twisted_rtsig.coro.tasks import Task

T = TypeVar("T")
P = ParamSpec("P")


def in_task(function: Callable[P, Runnable[T]]) -> Callable[P, Deferred[T]]:
    """
    Decorate a test, so that it runs as a task of the installed reactor and returns
    a Deferred.

    This is for trial: it runs ``async def`` tests itself, without a task, so that
    ``timeout`` for example cannot be used there.

    :param function: an ``async def`` or generator function.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        return spawn(
            function(*args, **kwargs), name=function.__qualname__
        ).as_deferred()

    return call


def converse(handler: Handler, stream: Stream, reactor: Any) -> Task[Any]:
    """Run a handler as a server does, but without log lines."""

    def ended(task: Task[Any]) -> None:
        if task.failed or task.cancelled:
            stream.abort()
        else:
            stream.close()

    task: Task[Any] = spawn(handler, stream, reactor=reactor)
    task._when_done(ended)
    return task
