"""
The event loop that runs a reactor while it waits.

It is asyncio's own ``SelectorEventLoop``, with its transports, servers, TLS,
subprocesses and debug mode, except for five differences:

- It waits in the engine: see :mod:`twisted_rtsig.asyncio_support.selector`.
- It reads at most 64 KiB at a time.
- All that a TCP transport writes during one turn of the loop is sent at once, before
  the loop sleeps.
- Signals: a process has one wakeup descriptor, and it is that of the loop.  The loop
  tells the reactor of SIGCHLD.  When a handler is removed while the reactor runs, the
  handler of the reactor is restored.
- ``close()`` first stops the reactor in order.

An existing loop, even one that runs, is turned into such a loop by :func:`adopt`.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import signal
from asyncio import events, selector_events
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from twisted.internet.posixbase import unixEnabled

from twisted_rtsig.asyncio_support.children import fast_watcher, reap_for
from twisted_rtsig.asyncio_support.selector import EngineSelector, LoopStopped
from twisted_rtsig.asyncio_support.transports import (
    INTERNET,
    MOST_AT_ONCE,
    SocketTransport,
)
from twisted_rtsig.engine.reactor import LogContext
from twisted_rtsig.notifiers import UnsupportedReactorError

if unixEnabled:
    from twisted.internet import process

if TYPE_CHECKING:
    from twisted_rtsig.asyncioreactor import AsyncioEngineReactor


_new_object: Any = object.__new__

# Whether this module knows all attributes of a handle.
_HANDLES_ARE_KNOWN: Final = set(asyncio.Handle.__slots__) == {
    *("__weakref__", "_args", "_callback", "_cancelled", "_context", "_loop"),
    *("_repr", "_source_traceback"),
}


class EngineEventLoop(asyncio.SelectorEventLoop):
    """
    An event loop that runs a reactor while it waits.

    :ivar reactor: the reactor.
    """

    reactor: AsyncioEngineReactor
    # Of asyncio.
    _closed: bool
    _debug: bool
    _ready: Any
    _selector: Any
    _transports: Any

    def run_forever(self) -> None:
        """See ``BaseEventLoop.run_forever``; it sets the log context of a main loop."""
        self._check_closed()  # type: ignore[attr-defined]
        self._check_running()  # type: ignore[attr-defined]
        self.reactor._in_log_context(self._run_forever)

    def _run_forever(self, fields: LogContext) -> None:
        selector, reactor = self._selector, self.reactor
        selector.fields = fields
        reactor.in_plain_run = reactor.calls_protocols
        try:
            super().run_forever()
        except LoopStopped:
            pass
        finally:
            selector.fields = None
            reactor.in_plain_run = False
            reactor.send_collected()

    def set_debug(self, enabled: bool) -> None:
        """See ``AbstractEventLoop.set_debug``."""
        super().set_debug(enabled)
        reactor = getattr(self, "reactor", None)
        if reactor is not None:
            reactor.calls_protocols = not enabled
            # It stays so until the loop runs again.
            reactor.in_plain_run = False

    def close(self) -> None:
        """
        See ``BaseEventLoop.close``.  If the reactor runs, it is stopped first, and this
        waits for its shutdown events.
        """
        if self.is_running() or self.is_closed():
            super().close()
            return
        try:
            self.reactor.loop_closes()
        finally:
            super().close()
            self.reactor.loop_closed()

    def call_soon(  # type: ignore[override]
        self,
        callback: Callable[..., Any],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> Any:
        """See ``AbstractEventLoop.call_soon``."""
        if self._debug or self._closed or not _HANDLES_ARE_KNOWN:
            handle: Any = super().call_soon(callback, *args, context=context)
            if handle._source_traceback:
                # The traceback is to end with the caller of this method.
                del handle._source_traceback[-1]
            return handle
        # This repeats the constructor of asyncio.Handle, as each step of a task comes
        # here.
        handle = _new_object(asyncio.Handle)
        handle._callback = callback
        handle._args = args
        handle._loop = self
        handle._context = contextvars.copy_context() if context is None else context
        handle._cancelled = False
        handle._repr = None
        handle._source_traceback = None
        self._ready.append(handle)
        return handle

    # Signals

    def add_signal_handler(  # type: ignore[override]
        self, sig: Any, callback: Any, *args: Any
    ) -> None:
        """See ``AbstractEventLoop.add_signal_handler``."""
        if sig == signal.SIGCHLD and (watcher := fast_watcher(callback)) is not None:
            callback = functools.partial(reap_for, watcher)
        super().add_signal_handler(sig, callback, *args)

    def _handle_signal(self, sig: int) -> None:
        if sig == signal.SIGCHLD:
            process.reapAllProcesses()
        super()._handle_signal(sig)  # type: ignore[misc]

    def remove_signal_handler(self, sig: int) -> bool:
        """See ``AbstractEventLoop.remove_signal_handler``."""
        removed = super().remove_signal_handler(sig)
        if removed and not self.is_closed():
            self.reactor.signal_handler_removed(sig)
        return removed

    # Transports

    def _make_socket_transport(
        self,
        sock: Any,
        protocol: Any,
        waiter: Any = None,
        *,
        extra: Any = None,
        server: Any = None,
        **further: Any,
    ) -> Any:
        return SocketTransport(self, sock, protocol, waiter, extra, server, **further)

    def _make_ssl_transport(self, rawsock: Any, *args: Any, **kwargs: Any) -> Any:
        transport = super()._make_ssl_transport(  # type: ignore[misc]
            rawsock, *args, **kwargs
        )
        self._transports[rawsock.fileno()].max_size = MOST_AT_ONCE
        return transport

    def _make_datagram_transport(self, sock: Any, *args: Any, **kwargs: Any) -> Any:
        transport = super()._make_datagram_transport(  # type: ignore[misc]
            sock, *args, **kwargs
        )
        # Datagrams of other address families may be larger.
        if sock.family in INTERNET:
            transport.max_size = MOST_AT_ONCE
        return transport

    def _make_read_pipe_transport(self, *args: Any, **kwargs: Any) -> Any:
        transport = super()._make_read_pipe_transport(  # type: ignore[misc]
            *args, **kwargs
        )
        transport.max_size = MOST_AT_ONCE
        return transport


def check_loop(loop: Any) -> None:
    """
    Check that a loop can become the loop of a reactor.

    :raises UnsupportedReactorError: if it cannot; the message says why.
    """
    name = f"{type(loop).__module__}.{type(loop).__qualname__}"
    advice = "pass an asyncio.SelectorEventLoop(), or None for a new one"
    if not isinstance(loop, asyncio.SelectorEventLoop):
        why = "does not wait in a selector, which the reactor would replace"
        if name.startswith("uvloop."):
            why = "waits in libuv, which no reactor can take part in"
        elif "Proactor" in name:
            why = "waits in a completion port, which no reactor can take part in"
        raise UnsupportedReactorError(f"{name} {why}: {advice}")
    if isinstance(loop, EngineEventLoop) and hasattr(loop, "reactor"):
        raise UnsupportedReactorError(
            f"{loop!r} has a reactor already: install it with install(loop)"
        )
    for method in ("run_forever", "_run_once"):
        if not isinstance(loop, EngineEventLoop) and (
            getattr(type(loop), method) is not getattr(asyncio.BaseEventLoop, method)
        ):
            raise UnsupportedReactorError(
                f"{name} has a {method}() of its own, and may not wait in its "
                f"selector: {advice}"
            )
    if loop.is_closed():
        raise UnsupportedReactorError(f"{loop!r} is closed: {advice}")
    if loop.is_running() and events._get_running_loop() is not loop:
        raise UnsupportedReactorError(
            f"{loop!r} runs in another thread: install the reactor in that one, "
            "or pass a loop that does not run"
        )


def adopt(loop: Any, reactor: AsyncioEngineReactor) -> EngineEventLoop:
    """
    Turn ``loop`` into an :class:`EngineEventLoop`.  It keeps everything that it watches
    and has scheduled.

    :param loop: a loop that :func:`check_loop` has accepted.
    """
    for transport in loop._transports.values():
        if isinstance(transport, selector_events._SelectorSocketTransport):  # type: ignore[attr-defined]
            transport.max_size = MOST_AT_ONCE
    former = loop._selector
    selector = EngineSelector(reactor, loop)
    for key in former.get_map().values():
        selector.register(key.fileobj, key.events, key.data)
    loop._selector = selector
    former.close()
    cls = type(loop)
    if not isinstance(loop, EngineEventLoop):
        loop.__class__ = (
            EngineEventLoop
            if cls is asyncio.SelectorEventLoop
            # A subclass may have a call_soon of its own, which it keeps.
            else type(
                cls.__name__, (EngineEventLoop, cls), {"call_soon": cls.call_soon}
            )
        )
    loop.reactor = reactor
    handle = loop._signal_handlers.get(signal.SIGCHLD)
    if handle is not None and fast_watcher(handle._callback) is not None:
        loop.add_signal_handler(signal.SIGCHLD, handle._callback)
    adopted: EngineEventLoop = loop
    return adopted


__all__ = ["EngineEventLoop", "adopt", "check_loop"]
