"""
The end of asynchronous generators that are left early.

One that is left in the middle, by C{break} for example, may have to wait in its
C{finally}.  Python hands it to the hook that was set when it was first iterated over
(PEP 525), and a task closes it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import AsyncGenerator
from typing import Any, Final

from twisted_rtsig.coro.tracebacks import is_machinery

# In the local variables of a generator that was begun outside of tasks.
_FOREIGN = "@begun outside of tasks"


class _Installed:
    """
    The hooks of this package that are set.

    To set them takes as long as to resume a task.  So they stay, and are set only if
    the tasks of another reactor ran before.

    :ivar of: which; C{None} if none are.
    """

    __slots__ = ("of",)

    def __init__(self) -> None:
        self.of: GeneratorHooks | None = None


INSTALLED: Final = _Installed()


class GeneratorHooks:
    """
    The hooks for the asynchronous generators that the tasks of a reactor begin.

    :ivar shared: whether the reactor is asyncio's, whose hooks must be there while no
        task runs.
    """

    __slots__ = ("_others", "_reactor", "_thread", "shared")

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._thread = 0
        self._others: Any = (None, None)
        module = sys.modules.get("twisted.internet.asyncioreactor")
        asyncio_reactor = getattr(module, "AsyncioSelectorReactor", ())
        self.shared = isinstance(reactor, asyncio_reactor)

    def install(self) -> None:
        """Tasks are about to run."""
        if self.shared:
            self._others = sys.get_asyncgen_hooks()
        else:
            INSTALLED.of = self
        sys.set_asyncgen_hooks(self._begin, self._finalize)

    def uninstall(self) -> None:
        """Tasks of a shared reactor have run."""
        sys.set_asyncgen_hooks(*self._others)

    def _begin(self, generator: Any) -> None:
        from twisted_rtsig.coro.scheduler import running

        if running.task is None:
            # A weak set would have lost it before it is finalized.
            generator.ag_frame.f_locals[_FOREIGN] = True
        else:
            self._thread = threading.get_ident()

    def _finalize(self, generator: Any) -> None:
        """No reference to a generator is left, and it has not come to its end."""
        frame = generator.ag_frame
        if generator.ag_running:
            # It waits, and the task that it waits in was dropped with it: until Python
            # 3.13 it takes no aclose() then, and nothing else can resume it.
            return
        if is_machinery(frame) or _FOREIGN in frame.f_locals:
            # That of stream.lines(), for example, has nothing to wait for.
            _close_at_once(generator)
        elif threading.get_ident() == self._thread:
            self._close(generator)
        else:
            # The garbage collector runs in any thread.
            self._reactor.callFromThread(self._close, generator)

    def _close(self, generator: Any) -> None:
        from twisted_rtsig.coro.scheduler import running
        from twisted_rtsig.coro.tasks import spawn

        def close() -> None:
            name = f"the end of {generator.__qualname__}"
            spawn(_close, generator, name=name, reactor=self._reactor)

        if running.task is None:
            # Not in the middle of what has dropped the last reference.
            self._reactor.callLater(0, close)
        else:
            close()


def _close_at_once(generator: AsyncGenerator[Any, Any]) -> None:
    """As Python does without hooks."""
    with contextlib.suppress(StopIteration):
        generator.aclose().send(None)
        raise RuntimeError("async generator ignored GeneratorExit")


async def _close(generator: AsyncGenerator[Any, Any]) -> None:
    await generator.aclose()
