"""Making something in a thread, which is removed again if it is not needed any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from twisted_rtsig.coro.operations import Operation
from twisted_rtsig.files.workers import Job, Workers, finish

T = TypeVar("T")


class Making(Job[T]):
    """
    Makes a file or a directory in a thread.

    :param found: called in the reactor's thread with the result of the thread; returns
        the result of the operation.
    :param undo: called in a thread with the result of the thread, if the operation was
        cancelled meanwhile.
    """

    __slots__ = ("_found", "_undo", "_workers")

    def __init__(
        self,
        what: str,
        workers: Workers,
        found: Callable[[Any], T],
        undo: Callable[[Any], object],
    ) -> None:
        super().__init__(what)
        self._workers = workers
        self._found = found
        self._undo = undo

    def end(self, result: Any, error: BaseException | None) -> None:
        """See ``Job.end``."""
        if error is None and self.operation.called:
            # It was cancelled too late.
            self._workers.run(Certain("to remove"), self._undo, result)
        elif error is None:
            finish(self.operation, self._found(result))
        else:
            finish(self.operation, None, error)


class Certain(Job[None]):
    """A job that runs even if the wait for it is cancelled."""

    __slots__ = ()

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``: the job runs anyway."""
        operation.owner = None
