"""The functions of ``tempfile``, run in threads."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Operation
from twisted_rtsig.files.making import Making
from twisted_rtsig.files.workers import workers_of

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    # Without an argument the names are text.
    Name = TypeVar("Name", str, bytes, default=str)


@must_be_awaited
def mkstemp(
    suffix: Name | None = None,
    prefix: Name | None = None,
    dir: Name | os.PathLike[Name] | None = None,
    text: bool = False,
    *,
    reactor: Any | None = None,
) -> Operation[tuple[int, Name]]:
    """
    As ``tempfile.mkstemp``: make a file, which you have to remove.

    :param reactor: the reactor whose threads are used; by default that of the task.
    :return: the descriptor and the path of the file.
    :raises OSError: (when awaited) if the file cannot be made.
    """
    make = functools.partial(tempfile.mkstemp, suffix, prefix, dir, text)
    return _make("to make a temporary file", reactor, _remove_file, make)


def _remove_file(made: tuple[int, Any]) -> None:
    os.close(made[0])
    os.remove(made[1])


@must_be_awaited
def mkdtemp(
    suffix: Name | None = None,
    prefix: Name | None = None,
    dir: Name | os.PathLike[Name] | None = None,
    *,
    reactor: Any | None = None,
) -> Operation[Name]:
    """
    As ``tempfile.mkdtemp``: make a directory, which you have to remove.

    :param reactor: the reactor whose threads are used; by default that of the task.
    :return: the path of the directory.
    :raises OSError: (when awaited) if the directory cannot be made.
    """
    make = functools.partial(tempfile.mkdtemp, suffix, prefix, dir)
    return _make("to make a temporary directory", reactor, os.rmdir, make)


def _make(
    what: str,
    reactor: Any | None,
    undo: Callable[[Any], object],
    make: Callable[[], Any],
) -> Operation[Any]:
    workers = workers_of(reactor)
    making: Making[Any] = Making(what, workers, lambda made: made, undo)
    workers.run(making, make)
    return making.operation


@must_be_awaited
def gettempdir(*, reactor: Any | None = None) -> Operation[str]:
    """
    As ``tempfile.gettempdir``: the directory of temporary files.  The first call
    searches for it.

    :param reactor: the reactor whose threads are used; by default that of the task.
    :raises FileNotFoundError: (when awaited) if no directory can be used.
    """
    return workers_of(reactor).call("to find a directory", tempfile.gettempdir)


@must_be_awaited
def gettempdirb(*, reactor: Any | None = None) -> Operation[bytes]:
    """As :func:`gettempdir`, in bytes."""
    return workers_of(reactor).call("to find a directory", tempfile.gettempdirb)
