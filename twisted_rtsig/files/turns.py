"""
The common part of open files of bytes and of text: operations at the position are done
one after the other, and ``close`` waits for all of them.
"""

from __future__ import annotations

import io
import os
import warnings
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from twisted_rtsig.coro.closing import ClosedAtExit
from twisted_rtsig.coro.operations import Done, Operation, Wait
from twisted_rtsig.files.workers import Job, Workers, finish

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class OpenFile(ClosedAtExit):
    """
    The base class of open files.

    :ivar name: the path that the file was opened with.
    :ivar mode: the mode that it was opened with.
    """

    def __init__(self, name: Path, mode: str, workers: Workers) -> None:
        self.name: Path = name
        self.mode: str = mode
        self._workers = workers
        # The pending operations at the position.  The first one may be under way.
        self._turns: deque[Turn[Any]] = deque()
        self._under_way = False
        self._taking_turns = False
        self._closing: _Close | None = None
        self._closers: dict[Operation[None], None] = {}

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closing is not None

    def fileno(self) -> int:
        """The descriptor; -1 once the file is closed."""
        raise NotImplementedError

    def close(self) -> Operation[None]:
        """
        Close the file, when all pending operations are done.

        :raises OSError: (when awaited) if written data is lost.  The file is closed
            then, too.
        """
        if self._closing is not None and self._closing.ended:
            closed: Operation[None] = Done()
            return closed
        closing: Operation[None] = Wait()
        closing.owner = self
        self._closers[closing] = None
        if self._closing is None:
            self._closing = _Close(self)
            self._close_if_idle()
        return closing

    def _close_if_idle(self) -> None:
        closing = self._closing
        if closing is not None and self._is_idle():
            closing.begin()

    def _is_idle(self) -> bool:
        """Whether no operation is under way or waits for its turn."""
        return not self._turns

    def _close_at_exit(self) -> Operation[None]:
        return self.close()

    def _closes_at_once(self) -> bool:
        """Whether closing the file cannot block."""
        return False

    def _close_file(self) -> None:
        """Close the descriptor.  Called in a thread, if that can block."""
        raise NotImplementedError

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``: the file is closed anyway."""
        # end() has taken the operations out before it finishes them.
        self._closers.pop(operation, None)

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        return f"the end of {self!r}"

    async def __aenter__(self) -> Self:
        return self

    def __del__(self) -> None:
        if self.fileno() >= 0:
            self._close_file()
            warnings.warn(
                f"{self!r} was not closed", ResourceWarning, stacklevel=2, source=self
            )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {os.fspath(self.name)!r}, {self.mode}>"

    def _check_open(self) -> None:
        if self._closing is not None:
            raise ValueError(f"{self!r} is closed")

    def _check_readable(self) -> None:
        self._check_open()
        if "r" not in self.mode and "+" not in self.mode:
            raise io.UnsupportedOperation(f"{self!r} is not open for reading")

    def _check_writable(self) -> None:
        self._check_open()
        if "r" in self.mode and "+" not in self.mode:
            raise io.UnsupportedOperation(f"{self!r} is not open for writing")

    # Turns

    def _in_turn(self, turn: Turn[T]) -> Operation[T]:
        self._turns.append(turn)
        self._take_turns()
        return turn.operation

    def _take_turns(self) -> None:
        if self._taking_turns:
            # An operation that ends at once calls this again.  The loop further up the
            # stack goes on, since many such calls would recurse too deep.
            return
        self._taking_turns = True
        turns = self._turns
        while turns and not self._under_way:
            if turns[0].operation.called:
                # It was cancelled before its turn.
                turns.popleft()
            else:
                self._under_way = True
                turns[0].begin()
        self._taking_turns = False
        self._close_if_idle()


class Turn(Job[T]):
    """An operation of an open file, which begins when its turn comes."""

    __slots__ = ("_file",)

    def __init__(self, what: str, file: OpenFile) -> None:
        super().__init__(f"{what} {file!r}")
        self._file = file

    def begin(self) -> None:
        """Begin the operation, since its turn has come."""
        raise NotImplementedError

    def drop(self) -> None:
        """See ``Job.drop``."""
        self._leave()
        self._file._take_turns()

    def _leave(self) -> None:
        self._file._turns.popleft()
        self._file._under_way = False

    def _finish(self, result: Any, error: BaseException | None) -> None:
        self._leave()
        finish(self.operation, result, error)
        self._file._take_turns()


class Call(Turn[T]):
    """A function that runs in a thread when its turn comes."""

    __slots__ = ("_function",)

    def __init__(self, what: str, file: OpenFile, function: Callable[[], T]) -> None:
        super().__init__(what, file)
        self._function = function

    def begin(self) -> None:
        """See ``Turn.begin``."""
        self._file._workers.run(self, self._function)

    def end(self, result: Any, error: BaseException | None) -> None:
        """See ``Job.end``."""
        self._finish(result, error)


class _Close(Job[None]):
    """
    Closes a file, once.

    :ivar ended: whether the file is closed.
    """

    __slots__ = ("_begun", "_file", "ended")

    def __init__(self, file: OpenFile) -> None:
        super().__init__(f"the end of {file!r}")
        self._file = file
        self._begun = False
        self.ended = False

    def begin(self) -> None:
        """Close the file, since no other operation is under way."""
        if self._begun:
            return
        self._begun = True
        file = self._file
        if file._closes_at_once():
            file._close_file()
            self.end(None, None)
        else:
            file._workers.run(self, file._close_file)

    def end(self, result: Any, error: BaseException | None) -> None:
        """See ``Job.end``."""
        self.ended = True
        # The file refers to this.
        file = self._file
        del self._file
        self.operation.owner = None
        closers, file._closers = file._closers, {}
        for operation in closers:
            finish(operation, None, error)
