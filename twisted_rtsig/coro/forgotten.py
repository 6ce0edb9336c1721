"""
Forgotten awaits: a debug mode that warns of operations that nothing has waited for.

See ``docs/coroutines.md``.  While the mode is off, nothing is checked.
:func:`set_debug` replaces the code of the functions that :func:`must_be_awaited` has
decorated, so it also reaches names that were imported earlier.  The new code gives the
operation that a function returns a class that notices how the operation is used.  At
the first use the operation gets its own class back, and from then on behaves as if the
mode was off.
"""

from __future__ import annotations

import functools
import os
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar

from twisted.internet.defer import Deferred

from twisted_rtsig.coro.errors import UnawaitedWarning
from twisted_rtsig.coro.operations import Done, Finished, Operation, Wait
from twisted_rtsig.coro.scheduler import HANDOVER, WAITS, Handover
from twisted_rtsig.coro.tasks import Task

F = TypeVar("F", bound=Callable[..., Any])

_PACKAGE: Final = __name__.split(".", maxsplit=1)[0] + "."


class _Mode:
    """Whether the debug mode is on."""

    on = False


_mode: Final = _Mode()

# The functions that were decorated; and, while the mode is on, by function a copy of it
# with its own code.
_functions: Final[list[types.FunctionType]] = []
_originals: Final[dict[types.FunctionType, types.FunctionType]] = {}


def must_be_awaited(function: F) -> F:
    """
    Decorate a function that is useless unless its caller waits for the operation that
    it returns, for a result or for a point in time.  In debug mode there is a warning
    if nothing waits for the operation.

    Do not decorate a function such as ``Stream.write``, which does its work even if
    nothing waits for it.
    """
    assert isinstance(function, types.FunctionType)
    # The code of a closure cannot be replaced by code without free variables.
    assert function.__closure__ is None
    _functions.append(function)
    if _mode.on:
        _watch(function)
    return function


def get_debug() -> bool:
    """Whether the debug mode is on: see :func:`set_debug`."""
    return _mode.on


def set_debug(enabled: bool) -> None:
    """
    Turn the debug mode on or off, for all of the process.

    While it is on, each operation that is called for its result has to be awaited,
    yielded, given callbacks or cancelled.  If an operation is garbage collected before
    that, then Python shows an :class:`UnawaitedWarning` with the line of the call.

    The environment variable ``TWISTED_RTSIG_DEBUG=1`` turns the mode on from the start,
    and so does Python's development mode (``-X dev``), unless ``TWISTED_RTSIG_DEBUG=0``
    is set.
    """
    if enabled == _mode.on:
        return
    _mode.on = enabled
    for function in _functions:
        (_watch if enabled else _restore)(function)
    task: Any = Task
    if enabled:
        _saved.wait_for = task._wait_for
        task._wait_for = _wait_for
    else:
        task._wait_for = _saved.wait_for


def wanted_by_environment(default: bool = sys.flags.dev_mode) -> bool:
    """
    Whether the mode is to be on from the start: see :func:`set_debug`.

    :param default: the answer if the environment variable is not set.
    """
    wanted = None
    if not sys.flags.ignore_environment:
        wanted = os.environ.get("TWISTED_RTSIG_DEBUG")
    return default if wanted is None else wanted not in ("", "0")


# Calls


class _Call(NamedTuple):
    """The place where a function was called."""

    function: str
    file: str
    line: int
    module: str

    def warn(self) -> None:
        """Warn that nothing has waited for the operation that the call returned."""
        warnings.warn_explicit(
            f"{self.function}() was never awaited: write await before the call (in a "
            "generator yield), or cancel() what it returns if that is not needed",
            UnawaitedWarning,
            self.file,
            self.line,
            self.module,
            # By these Python shows a warning only once for each line, by default.
            _registries.setdefault(self.file, {}),
        )


_registries: Final[dict[str, dict[Any, Any]]] = {}


def _watch(function: types.FunctionType) -> None:
    """Watch what the function returns, whatever name it is called by."""
    original = types.FunctionType(
        function.__code__, function.__globals__, function.__name__
    )
    for name in (
        *("__qualname__", "__module__", "__doc__", "__annotations__"),
        *("__defaults__", "__kwdefaults__"),
    ):
        setattr(original, name, getattr(function, name))
    _originals[function] = original
    # For inspect.signature.
    vars(function)["__wrapped__"] = original
    call = functools.partial(_call_and_watch, original)
    function.__code__ = _replacement.__code__.replace(co_name=function.__name__)
    function.__defaults__ = None
    # The code runs with the globals of the function, and cannot use those of this
    # module.
    function.__kwdefaults__ = {"_call": call}


def _restore(function: types.FunctionType) -> None:
    original = _originals.pop(function)
    function.__code__ = original.__code__
    function.__defaults__ = original.__defaults__
    function.__kwdefaults__ = original.__kwdefaults__
    del vars(function)["__wrapped__"]


def _replacement(*args: Any, _call: Callable[..., Any], **kwargs: Any) -> Any:
    return _call(*args, **kwargs)


def _call_and_watch(
    original: types.FunctionType, /, *args: Any, **kwargs: Any
) -> Deferred[Any]:
    operation: Any = original(*args, **kwargs)
    # Frame 1 is that of the replacement; frame 2 is the caller.
    frame: Any = sys._getframe(2)
    if _is_of_package(frame):
        # A call within this package is not a user's mistake.  If a function of the
        # package returns the operation to a user, then that function watches it.
        return operation  # type: ignore[no-any-return]
    name = original.__qualname__
    if "." in name:
        # A subclass may have inherited the method: use the name of that class.
        name = f"{type(args[0]).__name__}.{original.__name__}"
    call = _Call(
        name,
        frame.f_code.co_filename,
        frame.f_lineno,
        str(frame.f_globals.get("__name__")),
    )
    if operation is HANDOVER:
        transfer = _WatchedTransfer()
        transfer.target, HANDOVER.target = HANDOVER.target, None
        transfer.value, HANDOVER.value = HANDOVER.value, None
        operation = transfer
        operation._call = call
    elif not isinstance(operation, _Watched):
        _be_watched(operation, call)
    return operation  # type: ignore[no-any-return]


def _is_of_package(frame: types.FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith(_PACKAGE)


# Operations


class _Watched:
    """
    The methods of an operation that was not used yet.

    :ivar _call: the call that has returned the operation.
    """

    _call: _Call
    own_class: type

    def _be_used(self) -> Any:
        """Note a use: the result was asked for, or the operation was cancelled."""
        del vars(self)["_call"]
        self.__class__ = self.own_class
        return self

    def __await__(self) -> Any:
        return self._be_used().__await__()

    __iter__ = __await__

    # Twisted reads this attribute if a callback has returned the operation.
    @property
    def result(self) -> Any:
        return self._be_used().result

    @result.setter
    def result(self, result: Any) -> None:
        vars(self)["result"] = result

    def __del__(self) -> None:
        self._call.warn()


# A bound method may be called late, by a timer for example.  By then the operation may
# have been used, and have its own class.


def _uses(name: str) -> Callable[..., Any]:
    """A method that uses the operation."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, _Watched):
            self._be_used()
        return getattr(type(self), name)(self, *args, **kwargs)

    return method


def _does_not_use(name: str) -> Callable[..., Any]:
    """
    A method that finishes the operation without using it.

    The operation may change its class by that, so it is watched anew.
    """

    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        call = self._call if isinstance(self, _Watched) else None
        if call is not None:
            self._be_used()
        getattr(type(self), name)(self, *args, **kwargs)
        if call is not None:
            _be_watched(self, call)

    return method


for _name in ("addCallbacks", "addCallback", "addErrback", "addBoth", "cancel"):
    setattr(_Watched, _name, _uses(_name))
# Called if a callback of another Deferred has returned the operation.
_become_deferred = _uses("_become_deferred")
for _name in ("succeed", "fail", "callback", "errback"):
    setattr(_Watched, _name, _does_not_use(_name))


class _WatchedOperation(_Watched):
    """As :class:`_Watched`, for an ``Operation``."""

    _become_deferred = _become_deferred


# By class of an operation: its class until the operation is used.
_classes: Final[dict[type, type]] = {}


def _watched(own_class: type) -> type:
    watched = _classes.get(own_class)
    if watched is None:
        mixin = _WatchedOperation if issubclass(own_class, Operation) else _Watched
        # CPython does not let __class__ be set to a class that has another first base.
        # So the class of the operation comes first, and the methods of the mixin are
        # copied: if they were inherited, then those of the operation would come before.
        methods = {
            name: value
            for each in reversed(mixin.__mro__[:-1])
            for name, value in vars(each).items()
            if name not in ("__dict__", "__weakref__")
        }
        bases = (own_class, mixin)
        attributes = {**methods, "own_class": own_class}
        watched = type(own_class)(own_class.__name__, bases, attributes)
        _classes[own_class] = watched
    return watched


def _be_watched(operation: Any, call: _Call) -> None:
    operation._call = call
    operation.__class__ = _watched(type(operation))


class _WatchedTransfer(Handover):
    """The handover of one transfer, which does not begin before it is awaited."""

    _call: _Call | None

    def begin(self) -> Any:
        """Begin the transfer: it is awaited."""
        self._call = None
        HANDOVER.target, HANDOVER.value = self.target, self.value
        return HANDOVER

    def __await__(self) -> Any:
        return self.begin().__await__()

    __iter__ = __await__

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        return self.begin()._refuse(*args, **kwargs)

    addCallbacks = addBoth = _refuse

    def __del__(self) -> None:
        if self._call is not None:
            self._call.warn()


# Tasks


class _Saved:
    """:ivar wait_for: the original ``Task._wait_for``, while the mode is on."""

    wait_for: Any


_saved: Final = _Saved()


def _wait_for(task: Task[Any], awaited: Any) -> Any:
    """Replaces ``Task._wait_for``: a generator that yields an operation uses it."""
    if isinstance(awaited, _WatchedTransfer):
        value = task._transfer(awaited.target, awaited.value)
        awaited.begin()
        HANDOVER.target = HANDOVER.value = None
        return value
    if isinstance(awaited, _Watched):
        # As in the scheduler, which tells its operations apart by their class.
        used = awaited._be_used()
        kind = type(used)
        if kind in (Finished, Done):
            return used.result
        if kind in (Operation, Wait) and used.waiter is None:
            used.waiter = task
            task._waiting_on = used
            if task._cancels:
                task._interrupt()
            return WAITS
    return _saved.wait_for(task, awaited)
