"""
Directories, read in threads: many entries at a time, and only as they are asked for.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import islice
from time import perf_counter
from typing import Any, AnyStr, Final, Generic, TypeVar, overload

from twisted_rtsig.coro.errors import BusyResourceError
from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Finished, Operation
from twisted_rtsig.files.workers import Job, Workers, workers_of

T = TypeVar("T")

# A thread passes entries to the reactor after this many, and after this many seconds.
_MOST: Final = 1000
_LONGEST: Final = 0.05

OnError = Callable[[OSError], object]


class Entries(Generic[T], AsyncIterator[T]):
    """
    The entries that are found in directories, one after the other::

        async for entry in scandir(path):

    Generators, which have no ``async for``, call :meth:`next_batch`.  If the wait for a
    batch is cancelled, no entry is lost.  Only one task at a time may wait.
    """

    def __init__(
        self,
        what: str,
        workers: Workers,
        iterate: Callable[[], Iterator[T | OSError]],
        most: int = _MOST,
        on_error: OnError | None = None,
    ) -> None:
        self._what = what
        self._workers = workers
        self._iterate = iterate
        # Made in the first thread.
        self._iterator: Iterator[T | OSError] | None = None
        self._most = most
        self._on_error = on_error
        self._found: deque[T] = deque()
        self._ended = False
        self._error: BaseException | None = None
        self._under_way = False
        self._waiting: Operation[list[T]] | None = None

    @must_be_awaited
    def next_batch(self) -> Operation[list[T]]:
        """
        The next entries: as many as a thread finds before it has to let others run.  An
        empty list at the end.

        :raises OSError: (when awaited) if a directory cannot be read.
        :raises BusyResourceError: if another task waits for the next batch already.
        """
        if self._waiting is not None:
            raise BusyResourceError(f"another task waits for {self._what} already")
        if self._found or self._ended:
            finished: Finished[list[T]] = Finished()
            finished.result = list(self._found)
            self._found.clear()
            if finished.result or self._error is None:
                return finished
        operation: Operation[list[T]] = Operation()
        error, self._error = self._error, None
        if error is not None:
            operation.fail(error)
            return operation
        operation.owner = self
        self._waiting = operation
        if not self._under_way:
            self._under_way = True
            self._workers.run(_Batch(self), self._find)
        return operation

    def __aiter__(self) -> Entries[T]:
        return self

    async def __anext__(self) -> T:
        if not self._found:
            self._found.extend(await self.next_batch())
            if not self._found:
                raise StopAsyncIteration
        return self._found.popleft()

    def _find(self) -> tuple[list[T | OSError], bool, BaseException | None]:
        """
        Called in a thread: find entries.

        :return: the entries and errors that were found, whether this is the end, and
            the error that has ended it, if one did.
        """
        found: list[T | OSError] = []
        end = perf_counter() + _LONGEST
        try:
            if self._iterator is None:
                self._iterator = self._iterate()
            for each in islice(self._iterator, self._most):
                found.append(each)
                if perf_counter() > end:
                    return found, False, None
        except OSError as error:
            # The frames of the traceback refer to this object.
            return found, True, error.with_traceback(None)
        except BaseException as error:
            return found, True, error
        return found, len(found) < self._most, None

    def _has_found(
        self, found: list[T | OSError], ended: bool, error: BaseException | None
    ) -> None:
        """Take the entries that a thread has found, and resume the waiting task."""
        self._under_way = False
        self._ended = ended
        self._error = error
        if ended:
            self._iterator = None
        for each in found:
            if isinstance(each, OSError):
                assert self._on_error is not None
                try:
                    self._on_error(each)
                except BaseException as raised:
                    self._ended, self._error = True, raised
                    self._iterator = None
                    break
            else:
                self._found.append(each)
        operation, self._waiting = self._waiting, None
        if operation is None:
            return
        operation.owner = None
        if self._found or self._error is None:
            batch = list(self._found)
            self._found.clear()
            if batch or self._ended:
                operation.succeed(batch)
            else:
                # The thread has found only errors, and there is more: go on.
                operation.owner = self
                self._waiting = operation
                self._under_way = True
                self._workers.run(_Batch(self), self._find)
        else:
            error, self._error = self._error, None
            operation.fail(error)

    def forget(self, operation: Operation[Any]) -> None:
        """See ``Owner.forget``: the entries are kept for the next wait."""
        operation.owner = None
        self._waiting = None

    def waits_for(self, operation: Operation[Any]) -> str:
        """See ``Owner.waits_for``."""
        return self._what


class _Batch(Job[None]):
    __slots__ = ("_entries",)

    def __init__(self, entries: Entries[Any]) -> None:
        super().__init__(entries._what)
        self._entries = entries

    def end(self, result: Any, error: BaseException | None) -> None:
        """See ``Job.end``."""
        entries = self._entries
        # The operation and the job refer to each other.
        self.operation.owner = None
        if error is None:
            entries._has_found(*result)
        else:
            entries._has_found([], True, error)


@overload
def scandir(
    path: None = None, *, reactor: Any | None = None
) -> Entries[os.DirEntry[str]]: ...


@overload
def scandir(
    path: AnyStr | os.PathLike[AnyStr], *, reactor: Any | None = None
) -> Entries[os.DirEntry[AnyStr]]: ...


def scandir(path: Any = None, *, reactor: Any | None = None) -> Entries[Any]:
    """
    The entries of a directory, in no particular order, as ``os.scandir``::

        async for entry in scandir("folder"):
            print(entry.name, entry.is_dir())

    The directory is never in memory as a whole, however large it is.

    :param path: the directory; by default the current one.
    :param reactor: the reactor whose threads are used; by default that of the task.
    :return: ``os.DirEntry`` objects.  Their ``name``, ``path`` and ``inode`` do not
        block, and on most file systems ``is_dir``, ``is_file`` and ``is_symlink`` do
        not.
    :raises OSError: (when awaited) if the directory cannot be read.
    """
    where: Any = "." if path is None else path
    return Entries(f"to list {where!r}", workers_of(reactor), lambda: scan(where))


def scan(path: Any) -> Iterator[Any]:
    """Yield the entries of a directory.  It blocks."""
    # The block closes it without a warning when this generator is collected.
    with os.scandir(path) as entries:
        yield from entries


def walk(
    top: AnyStr | os.PathLike[AnyStr],
    topdown: bool = True,
    onerror: OnError | None = None,
    followlinks: bool = False,
    *,
    reactor: Any | None = None,
) -> Entries[tuple[AnyStr, list[AnyStr], list[AnyStr]]]:
    """
    All directories below one, as ``os.walk``::

        async for folder, directories, files in walk("/etc"):

    A thread reads one directory at a time, when it is asked for.  So directories that
    you remove from ``directories`` are not visited.  With ``topdown=False`` that has no
    effect, and the thread reads as many as it can.

    :param topdown: whether a directory comes before its subdirectories.
    :param onerror: called with each ``OSError``; by default they are ignored.  An
        exception that it raises ends the walk.
    :param followlinks: whether to follow symbolic links to directories.
    :param reactor: the reactor whose threads are used; by default that of the task.
    :return: for each directory its path, the names of its subdirectories, and the names
        of its other entries.
    """

    def find(told: bool) -> Iterator[Any]:
        return _with_errors(top, topdown, told, followlinks)

    return walk_with(find, top, topdown, onerror, reactor)


def walk_with(
    find: Callable[[bool], Iterator[T | OSError]],
    top: object,
    top_down: bool,
    on_error: OnError | None,
    reactor: object = None,
) -> Entries[T]:
    """
    The directories that ``find`` yields.  From the top down it is one at a time, so
    that the caller can remove subdirectories before they are visited.

    :param find: called in a thread; its argument is whether to yield errors as well.
    """
    return Entries(
        f"to walk {top!r}",
        workers_of(reactor),
        lambda: find(on_error is not None),
        1 if top_down else _MOST,
        on_error,
    )


def _with_errors(
    top: Any, topdown: bool, told: bool, followlinks: bool
) -> Iterator[Any]:
    """``os.walk``, with its errors in between."""
    errors: list[OSError] = []
    for each in os.walk(top, topdown, errors.append if told else None, followlinks):
        yield from take_errors(errors)
        yield each
    yield from take_errors(errors)


def take_errors(errors: list[OSError]) -> list[OSError]:
    """Take all errors out of a list, without their tracebacks."""
    taken = [each.with_traceback(None) for each in errors]
    errors.clear()
    return taken
