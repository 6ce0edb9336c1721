"""
Libraries with blocking sockets: single modules get the sockets of the reactor.

See ``docs/stackful.md``.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import select
import selectors
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, Final

from twisted_rtsig.coro.blocking_connecting import getaddrinfo
from twisted_rtsig.coro.blocking_errors import unsupported
from twisted_rtsig.coro.blocking_sockets import (
    BlockingSocket,
    ClientSocket,
    create_connection,
)
from twisted_rtsig.coro.polling import BlockingPoll, BlockingSelector, blocking_select
from twisted_rtsig.coro.sleeping import sleep
from twisted_rtsig.coro.stacks import wait
from twisted_rtsig.coro.threads import in_thread

# The innermost block that the running code is in, or was spawned in.
_inside: contextvars.ContextVar[_Block | None] = contextvars.ContextVar(
    "patched_modules", default=None
)


@contextlib.contextmanager
def patched(*modules: types.ModuleType) -> Iterator[None]:
    """
    Make the code of a library use sockets of the reactor within the block::

        def send(message: EmailMessage) -> None:
            with patched(smtplib), smtplib.SMTP("localhost", timeout=10) as server:
                server.send_message(message)

    In these modules the names ``socket``, ``ssl``, ``select``, ``selectors`` and
    ``time`` stand for replacements.  These have :func:`create_connection`,
    :class:`ClientSocket`, functions that resolve names without blocking, contexts whose
    ``wrap_socket`` takes a :class:`BlockingSocket`, and a ``sleep`` that makes the task
    wait.  Everything else they have from the standard library.  Names that a module has
    imported from these modules are replaced as well.

    Only code that runs in the block sees the replacements: the task, and the tasks that
    it spawns there, until they end.  Other tasks and threads that use the same modules
    have the sockets of the operating system, and so have other modules.  Blocks may be
    nested, and several tasks may be in blocks with the same module.

    :param modules: the modules to patch; for a package all of its modules that are
        imported so far.
    :raises TypeError: if one of them is not a module.
    """
    patches = [patch for module in modules for patch in _patches_of(module)]
    token = _inside.set(_Block(patches, _inside.get()))
    try:
        yield
    finally:
        # The garbage collector runs this in another context, and reset() fails.  The
        # context of the block is collected as well, so nothing has to be reset.
        with contextlib.suppress(ValueError):
            _inside.reset(token)
        # The traceback of an error refers to this frame.
        del token


class _Block:
    """
    A block in which modules are patched.  The contexts of the code that runs in it, and
    of the tasks that were spawned there, refer to this object.  When it is collected,
    the modules are restored.

    :param outer: the block around this one.
    """

    def __init__(self, patches: list[_Patch], outer: _Block | None) -> None:
        # A function that in_thread() runs has the context of its task too, but is in
        # another thread, where the replacements do not work.
        self._thread = threading.get_ident()
        self._outer = outer
        self._installed: list[_Patch] = []
        for patch in patches:
            patch.install()
            self._installed.append(patch)

    def patches(self, patch: _Patch) -> bool:
        """Whether the code that runs in this block has this patch."""
        if self._thread != threading.get_ident():
            return False
        outer = self._outer
        return patch in self._installed or (outer is not None and outer.patches(patch))

    def __del__(self) -> None:
        for patch in reversed(self._installed):
            patch.uninstall()


class _Patch:
    """The replaced names of one module."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module
        # The number of blocks with this patch; and while there are any, the replaced
        # names with their old and new values.
        self._blocks = 0
        self._replaced: dict[str, tuple[Any, Any]] = {}

    def inside(self) -> bool:
        """Whether the running code is in a block with this module."""
        block = _inside.get()
        return block is not None and block.patches(self)

    def install(self) -> None:
        """Install the patch for one more block."""
        with _lock:
            if not self._blocks:
                for name, value in list(vars(self._module).items()):
                    replacement = self._replacement(value)
                    if replacement is not None:
                        self._replaced[name] = value, replacement
                for name, (_, replacement) in self._replaced.items():
                    setattr(self._module, name, replacement)
            self._blocks += 1

    def uninstall(self) -> None:
        """Uninstall the patch for a block that ends."""
        with _lock:
            self._blocks -= 1
            if self._blocks:
                return
            for name, (value, replacement) in self._replaced.items():
                # The program may have set the name to something else meanwhile.
                if vars(self._module).get(name) is replacement:
                    setattr(self._module, name, value)
            self._replaced.clear()

    def _replacement(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            members = _members().get(value)
            return None if members is None else _Module(value, members, self.inside)
        ours = _by_id().get(id(value))
        return None if ours is None else _either(value, ours, self.inside)


# Reentrant, since a block may be collected while the lock is held.
_lock: Final = threading.RLock()
_patches: Final[dict[types.ModuleType, _Patch]] = {}


def _patches_of(module: types.ModuleType) -> list[_Patch]:
    if not isinstance(module, types.ModuleType):
        raise TypeError(f"patched() takes modules, and {module!r} is not one")
    found = [module]
    if hasattr(module, "__path__"):
        prefix = module.__name__ + "."
        found += [
            each
            for name, each in sorted(sys.modules.items())
            if name.startswith(prefix) and isinstance(each, types.ModuleType)
        ]
    with _lock:
        return [_patches.setdefault(each, _Patch(each)) for each in found]


class _Module(types.ModuleType):
    """
    A replacement of a module of the standard library.  All names that are not replaced
    come from the real module.
    """

    def __init__(
        self,
        real: types.ModuleType,
        members: dict[str, Any],
        inside: Callable[[], bool],
    ) -> None:
        super().__init__(real.__name__)
        # Setting attributes of this object sets those of the real module.
        vars(self).update(_real=real, _members=members, _inside=inside, _made={})

    def __getattribute__(self, name: str) -> Any:
        own = types.ModuleType.__getattribute__(self, "__dict__")
        if name == "__dict__":
            return own
        real = getattr(own["_real"], name)
        ours = own["_members"].get(name)
        if ours is None or not own["_inside"]():
            return real
        made = own["_made"]
        if name not in made:
            made[name] = _either(real, ours, own["_inside"])
        return made[name]

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_real"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(vars(self)["_real"], name)

    def __dir__(self) -> list[str]:
        return dir(vars(self)["_real"])

    def __repr__(self) -> str:
        return f"<{vars(self)['_real']!r}, with sockets of the reactor>"


def _either(real: Any, ours: Any, inside: Callable[[], bool]) -> Any:
    """A function or class that is ``ours`` in a block, and ``real`` elsewhere."""
    if isinstance(real, type):
        return _EitherClass(real.__name__, (), {"choice": (real, ours, inside)})

    @functools.wraps(real)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (ours if inside() else real)(*args, **kwargs)

    return call


class _EitherClass(type):
    """
    The type of classes that make instances of one class in a block, and of another one
    elsewhere.
    """

    choice: tuple[type, Any, Callable[[], bool]]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        real, ours, inside = cls.choice
        return (ours if inside() else real)(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        real = cls.choice[0]
        return isinstance(instance, (real, _INSTANCES.get(real, real)))

    def __subclasscheck__(cls, kind: type) -> bool:
        real = cls.choice[0]
        return issubclass(kind, (real, _INSTANCES.get(real, real)))

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.choice[0], name)


# For each class, another one whose instances isinstance() accepts as well.
_INSTANCES: Final[dict[type, Any]] = {socket.socket: BlockingSocket}


def _threaded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that asks the resolver in a thread of the reactor."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return wait(in_thread(function, *args, **kwargs))

    return call


def _create_server(*args: Any, **kwargs: Any) -> Any:
    raise unsupported("a socket of the reactor does not listen: use serve()")


def _sleep(seconds: float, /) -> None:
    wait(sleep(seconds))


@functools.cache
def _members() -> dict[types.ModuleType, dict[str, Any]]:
    """The replacements for each module of the standard library."""
    members: dict[types.ModuleType, dict[str, Any]] = {
        socket: {
            "create_connection": create_connection,
            "create_server": _create_server,
            "getaddrinfo": getaddrinfo,
            "socket": ClientSocket,
            **{
                name: _threaded(getattr(socket, name))
                for name in (
                    "getfqdn",
                    "gethostbyaddr",
                    "gethostbyname",
                    "gethostbyname_ex",
                    "getnameinfo",
                )
            },
        },
        select: {"select": blocking_select, "poll": BlockingPoll},
        selectors: dict.fromkeys(
            ("DefaultSelector", "PollSelector", "SelectSelector"), BlockingSelector
        ),
        time: {"sleep": _sleep},
    }
    if importlib.util.find_spec("_ssl") is not None:
        import ssl

        from twisted_rtsig.coro.blocking_tls import (
            BlockingSSLSocket,
            allow_blocking_sockets,
        )

        def allowing(make: Callable[..., ssl.SSLContext]) -> Callable[..., Any]:
            return lambda *args, **kwargs: allow_blocking_sockets(make(*args, **kwargs))

        _INSTANCES[ssl.SSLSocket] = BlockingSSLSocket
        members[ssl] = {"SSLSocket": BlockingSSLSocket} | {
            name: allowing(getattr(ssl, name))
            for name in (
                "SSLContext",
                "create_default_context",
                "_create_default_https_context",
                "_create_stdlib_context",
                "_create_unverified_context",
            )
        }
    for module, replaced in members.items():
        for name in [name for name in replaced if not hasattr(module, name)]:
            del replaced[name]
    return members


@functools.cache
def _by_id() -> dict[int, Any]:
    """
    The replacements by the ``id`` of the real object, for names that a module has
    imported.  Comparing these objects with the values of a module would run the methods
    of those values.
    """
    return {
        id(getattr(module, name)): ours
        for module, members in _members().items()
        for name, ours in members.items()
    }
