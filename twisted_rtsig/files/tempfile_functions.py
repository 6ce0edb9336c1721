"""The functions of ``tempfile``, run in threads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any, overload

from twisted_rtsig.coro.forgotten import must_be_awaited
from twisted_rtsig.coro.operations import Operation
from twisted_rtsig.files.making import Making
from twisted_rtsig.files.workers import workers_of


@overload
def mkstemp(
    suffix: str | None = None,
    prefix: str | None = None,
    dir: str | os.PathLike[str] | None = None,
    text: bool = False,
    *,
    reactor: Any | None = None,
) -> Operation[tuple[int, str]]: ...


@overload
def mkstemp(
    suffix: bytes | None = None,
    prefix: bytes | None = None,
    dir: bytes | os.PathLike[bytes] | None = None,
    text: bool = False,
    *,
    reactor: Any | None = None,
) -> Operation[tuple[int, bytes]]: ...


@must_be_awaited
def mkstemp(
    suffix: Any = None,
    prefix: Any = None,
    dir: Any = None,
    text: bool = False,
    *,
    reactor: Any | None = None,
) -> Operation[Any]:
    """
    As ``tempfile.mkstemp``: make a file, which you have to remove.

    :param reactor: the reactor whose threads are used; by default that of the task.
    :return: the descriptor and the path of the file.
    :raises OSError: (when awaited) if the file cannot be made.
    """
    return _make(
        *("to make a temporary file", reactor, _remove_file),
        *(tempfile.mkstemp, suffix, prefix, dir, text),
    )


def _remove_file(made: tuple[int, Any]) -> None:
    os.close(made[0])
    os.remove(made[1])


@overload
def mkdtemp(
    suffix: str | None = None,
    prefix: str | None = None,
    dir: str | os.PathLike[str] | None = None,
    *,
    reactor: Any | None = None,
) -> Operation[str]: ...


@overload
def mkdtemp(
    suffix: bytes | None = None,
    prefix: bytes | None = None,
    dir: bytes | os.PathLike[bytes] | None = None,
    *,
    reactor: Any | None = None,
) -> Operation[bytes]: ...


@must_be_awaited
def mkdtemp(
    suffix: Any = None,
    prefix: Any = None,
    dir: Any = None,
    *,
    reactor: Any | None = None,
) -> Operation[Any]:
    """
    As ``tempfile.mkdtemp``: make a directory, which you have to remove.

    :param reactor: the reactor whose threads are used; by default that of the task.
    :return: the path of the directory.
    :raises OSError: (when awaited) if the directory cannot be made.
    """
    return _make(
        *("to make a temporary directory", reactor, os.rmdir),
        *(tempfile.mkdtemp, suffix, prefix, dir),
    )


def _make(
    what: str,
    reactor: Any | None,
    undo: Callable[[Any], object],
    function: Callable[..., Any],
    *args: Any,
) -> Operation[Any]:
    workers = workers_of(reactor)
    making: Making[Any] = Making(what, workers, lambda made: made, undo)
    workers.run(making, function, *args)
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
