"""
The end of asynchronous generators that are left early.

A generator that is left in the middle, by ``break`` for example, may have to wait in
its ``finally``.  Python hands it to the hook that was set when it was first iterated
over (PEP 525), and a task closes it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from twisted_rtsig.coro.tracebacks import is_machinery

if TYPE_CHECKING:
    from twisted_rtsig.coro.tasks import Task

# The local variable that marks a generator that was begun outside of tasks.
_FOREIGN = "@begun outside of tasks"


class GeneratorHooks:
    """The hooks for the asynchronous generators that the tasks of a reactor begin."""

    __slots__ = ("_reactor", "_thread")

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._thread = 0

    def pair(self) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
        """The arguments of ``sys.set_asyncgen_hooks``."""
        return self._begin, self._finalize

    def _begin(self, generator: Any) -> None:
        from twisted_rtsig.coro.scheduler import running

        if running.task is None:
            # Mark the generator itself: a weak set would have lost it before
            # _finalize() is called.
            generator.ag_frame.f_locals[_FOREIGN] = True
        else:
            self._thread = threading.get_ident()

    def _finalize(self, generator: Any) -> None:
        """
        Close a generator to which no reference is left, and which has not come to its
        end.
        """
        frame = generator.ag_frame
        if generator.ag_running:
            # The generator waits, and the task that it waits in was dropped with it.
            # Up to Python 3.13 it refuses aclose() then, and nothing else can resume
            # it.
            return
        if is_machinery(frame) or _FOREIGN in frame.f_locals:
            # A generator of this package, stream.lines() for example, does not have to
            # wait at its end.
            _close_at_once(generator)
        elif sys.is_finalizing():
            # The process ends, and no task runs any more.
            pass
        elif threading.get_ident() == self._thread:
            self._close(generator)
        else:
            # The garbage collector may call this in any thread.
            self._reactor.callFromThread(self._close, generator)

    def _close(self, generator: Any) -> None:
        from twisted_rtsig.coro.scheduler import running
        from twisted_rtsig.coro.spawning import spawn

        def close() -> None:
            name = f"the end of {generator.__qualname__}"
            spawn(_close, generator, name=name, reactor=self._reactor)

        if running.task is None:
            # Not now, in the middle of the code that has dropped the last reference.
            self._reactor.callLater(0, close)
        else:
            close()


def restore(others: Any, nested: bool) -> None:
    """
    Set the hooks again that were set before tasks ran.

    To set hooks takes as long as to resume a task.  So the hooks of this package stay
    set if there were no hooks before, or other hooks of this package.

    :param others: the hooks before, from ``sys.get_asyncgen_hooks``.
    :param nested: whether the tasks ran within a step of a task of another reactor.
    """
    finalize = others[1]
    ours = isinstance(getattr(finalize, "__self__", None), GeneratorHooks)
    if nested or not (ours or (finalize is None and others[0] is None)):
        sys.set_asyncgen_hooks(*others)


def _close_at_once(generator: AsyncGenerator[Any, Any]) -> None:
    """Close a generator as Python does without hooks."""
    with contextlib.suppress(StopIteration):
        generator.aclose().send(None)
        raise RuntimeError("async generator ignored GeneratorExit")


async def _close(generator: AsyncGenerator[Any, Any]) -> None:
    await generator.aclose()


def closes_generator(task: Task[Any]) -> bool:
    """Whether a task only closes a generator that was left early."""
    return getattr(task._body, "cr_code", None) is _close.__code__
