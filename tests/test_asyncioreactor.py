"""
The reactor that is an asyncio event loop as well: the interfaces of Twisted and of
asyncio, and both together.

CPython's and Twisted's own tests run in test_asyncio_suite.py and
test_twisted_suite.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet import asyncioreactor as twisteds
from twisted.internet import main
from twisted.internet.defer import Deferred
from twisted.internet.error import (
    ReactorAlreadyRunning,
    ReactorNotRestartable,
)
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.threads import deferToThreadPool

from tests import libkqueue
from tests.support import (
    A_FEW,
    DEADLINE,
    Watcher,
    dispose,
    each_of,
    make_certificate,
    reactor_classes,
)
from twisted_rtsig.installation import installer_named
from twisted_rtsig.notifiers import UnsupportedReactorError

if sys.platform == "win32" or not reactor_classes():
    pytest.skip("it is for Linux, BSD and macOS", allow_module_level=True)

import fcntl

from twisted_rtsig import asyncioreactor
from twisted_rtsig.asyncio_support.loop import EngineEventLoop
from twisted_rtsig.asyncio_support.selector import EngineSelector
from twisted_rtsig.asyncio_support.watched import Watched
from twisted_rtsig.asyncioreactor import (
    AsyncioEngineReactor,
    AsyncioReactor,
    RealtimeSignalAsyncioReactor,
)

CLASSES: list[type[AsyncioEngineReactor]] = []
if sys.platform.startswith("linux"):
    CLASSES.append(RealtimeSignalAsyncioReactor)
    if libkqueue.path() is not None:

        class KQueueAsyncioReactor(AsyncioEngineReactor, libkqueue.KQueueReactor):
            """A reactor on kqueue, as on BSD and macOS."""

        CLASSES.append(KQueueAsyncioReactor)
CLASSES.append(AsyncioReactor)

MakeReactor = Callable[..., AsyncioEngineReactor]


@pytest.fixture(params=each_of(CLASSES), ids=lambda each: each.__name__)
def make(request: Any) -> Iterator[MakeReactor]:
    """Makes reactors, by default each with a new loop, and disposes of them."""
    made: list[AsyncioEngineReactor] = []

    def make(loop: Any = None) -> AsyncioEngineReactor:
        made.append(request.param(loop or asyncio.SelectorEventLoop()))
        return made[-1]

    yield make
    for reactor in made:
        dispose(reactor)
        loop = reactor._asyncioEventloop
        # Such a task belongs to a child watcher, for example.
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.close()


@pytest.fixture
def reactor(make: MakeReactor) -> AsyncioEngineReactor:
    return make()


def loop_of(reactor: Any) -> Any:
    return reactor._asyncioEventloop


def run(reactor: Any, start: Callable[[], Any], **options: Any) -> None:
    """Run the reactor until it is stopped, and fail if that takes too long."""
    late = reactor.callLater(DEADLINE, reactor.crash)
    reactor.callWhenRunning(start)
    reactor.run(**{"installSignalHandlers": False, **options})
    assert late.active(), "it did not happen"
    late.cancel()


class Echo(Protocol):
    def dataReceived(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)


def echo_port(reactor: Any) -> int:
    """The port of a server of Twisted."""
    port = reactor.listenTCP(0, Factory.forProtocol(Echo), interface="127.0.0.1")
    number: int = port.getHost().port
    return number


@contextlib.asynccontextmanager
async def asyncio_echo() -> AsyncIterator[int]:
    """The port of a server of asyncio, which is closed in the end."""

    connections = 0

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while data := await reader.read(1000):
            writer.write(data)
        writer.close()
        await writer.wait_closed()
        connections -= 1

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        while connections:
            await asyncio.sleep(0.001)


def talk(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as client:
        for turn in range(10):
            client.sendall(b"%d" % turn)
            assert client.recv(10) == b"%d" % turn
    return "talked"


# Twisted and asyncio in one loop


def test_servers_and_threads_of_twisted_and_of_asyncio(
    reactor: AsyncioEngineReactor,
) -> None:
    outcomes: list[Any] = []

    async def main() -> None:
        pool = reactor.getThreadPool()
        async with asyncio_echo() as asyncios_port:
            for port in (echo_port(reactor), asyncios_port):
                outcomes.append(await asyncio.to_thread(talk, port))
                in_pool = deferToThreadPool(reactor, pool, talk, port)
                outcomes.append(await in_pool.asFuture(asyncio.get_running_loop()))
        reactor.stop()

    run(reactor, lambda: keep(asyncio.ensure_future(main())))
    assert outcomes == ["talked"] * 4


_kept: list[Any] = []


def keep(task: Any) -> None:
    """Keep a reference to a task.  A loop has only weak ones."""
    _kept[:] = [task]


def test_the_loop_is_the_running_one_during_startup(
    reactor: AsyncioEngineReactor,
) -> None:
    """Triggers of startup and functions of ``callWhenRunning`` can use it."""
    loops: list[Any] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        reactor.stop()

    def during_startup() -> None:
        loops.append(asyncio.get_running_loop())

    reactor.addSystemEventTrigger("before", "startup", during_startup)
    run(reactor, lambda: keep(asyncio.create_task(main())))
    assert loops == [loop_of(reactor)] * 2


@pytest.mark.parametrize("how", ["call_soon", "call_later", "future", "stop"])
def test_a_call_of_twisted_wakes_asyncio(
    reactor: AsyncioEngineReactor, how: str
) -> None:
    """The loop waits without a timeout, and a call of Twisted gives it work."""
    loop = loop_of(reactor)
    future = loop.create_future()

    def finish() -> None:
        if not future.done():
            future.set_result(None)

    def act() -> None:
        if how == "call_soon":
            loop.call_soon(finish)
        elif how == "call_later":
            loop.call_later(0.001, finish)
        elif how == "future":
            finish()
        else:
            loop.stop()

    late: list[bool] = []

    def give_up() -> None:
        late.append(True)
        loop.stop()

    loop.call_soon(reactor.callLater, 0.01, act)
    timer = loop.call_later(DEADLINE, give_up)
    if how == "stop":
        loop.run_forever()
    else:
        loop.run_until_complete(future)
    timer.cancel()
    assert not late


def test_a_callback_of_asyncio_wakes_twisted(reactor: AsyncioEngineReactor) -> None:
    run(
        reactor,
        lambda: loop_of(reactor).call_later(0.01, reactor.callLater, 0, reactor.stop),
    )


def test_timers_of_twisted_and_asyncio_take_turns(
    reactor: AsyncioEngineReactor,
) -> None:
    """Each timer is set in a call of the other framework, and wakes the loop."""
    loop = loop_of(reactor)
    turns: list[int] = []

    def turn(number: int) -> None:
        turns.append(number)
        if number == 5:
            reactor.stop()
            return
        later = loop.call_later if number % 2 else reactor.callLater
        later(0.002, turn, number + 1)

    run(reactor, lambda: turn(0))
    assert turns == [0, 1, 2, 3, 4, 5]


def test_endless_work_in_one_framework_does_not_starve_the_other(
    reactor: AsyncioEngineReactor,
) -> None:
    loop = loop_of(reactor)
    port = echo_port(reactor)
    turns = [0, 0]

    def again() -> None:
        turns[0] += 1
        loop.call_soon(again)

    def and_again() -> None:
        turns[1] += 1
        reactor.callLater(0, and_again)

    async def main() -> None:
        again()
        and_again()
        assert await loop.run_in_executor(None, talk, port) == "talked"
        async with asyncio_echo() as asyncios_port:
            assert await asyncio.to_thread(talk, asyncios_port) == "talked"
        reactor.stop()

    run(reactor, lambda: keep(loop.create_task(main())))
    assert min(turns) > 10


def test_a_closed_transport_sends_its_data_first(
    reactor: AsyncioEngineReactor,
) -> None:
    loop = loop_of(reactor)
    much = os.urandom(1 << 20) * 8

    def read_all(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), DEADLINE) as client:
            return b"".join(iter(lambda: client.recv(1 << 20), b""))

    class Sender(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            transport.write(much)
            transport.close()

    async def main() -> bytes:
        server = await loop.create_server(Sender, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        data: bytes = await loop.run_in_executor(None, read_all, port)
        server.close()
        return data

    assert loop.run_until_complete(main()) == much


def test_other_threads_wake_the_loop(reactor: AsyncioEngineReactor) -> None:
    loop = loop_of(reactor)
    called: list[Any] = []

    def in_thread() -> None:
        loop.call_soon_threadsafe(called.append, threading.current_thread())
        reactor.callFromThread(called.append, threading.current_thread())
        loop.call_soon_threadsafe(reactor.callFromThread, reactor.stop)

    thread = threading.Thread(target=in_thread)
    run(reactor, thread.start)
    thread.join()
    assert called == [thread, thread]


def test_asyncio_run_in_another_thread(reactor: AsyncioEngineReactor) -> None:
    """That loop is a separate one, and has its own children."""
    outputs: list[bytes] = []

    async def child() -> None:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "print(7)"), stdout=subprocess.PIPE
        )
        outputs.append((await child.communicate())[0])

    def start() -> None:
        done = deferToThreadPool(
            reactor, reactor.getThreadPool(), lambda: asyncio.run(child())
        )

        def finish(result: Any) -> None:
            outputs.append(result)
            reactor.stop()

        done.addBoth(finish)

    run(reactor, start)
    assert outputs == [b"7\n", None]


def test_the_new_loop_of_another_thread_has_a_reactor_of_its_own() -> None:
    outcomes: list[Any] = []

    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        outcomes.append(await asyncio.to_thread(talk, echo_port(loop.reactor)))
        loop.reactor.disconnectAll()

    def in_thread() -> None:
        loop = asyncioreactor.new_event_loop()
        try:
            loop.run_until_complete(main())
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            loop.close()

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join(DEADLINE)
    assert outcomes == ["talked"]


# The interface of Twisted


def test_the_reactor_is_an_instance_of_twisteds_and_uses_none_of_its_methods(
    reactor: AsyncioEngineReactor,
) -> None:
    assert isinstance(reactor, twisteds.AsyncioSelectorReactor)
    assert reactor._asyncioEventloop is loop_of(reactor)
    dead = {
        "_onTimer",
        "_readOrWrite",
        "_reschedule",
        "_unregisterFDInAsyncio",
    }
    inherited = {
        name
        for name, value in vars(twisteds.AsyncioSelectorReactor).items()
        if inspect.isfunction(value)
        and inspect.getattr_static(type(reactor), name) is value
    }
    assert inherited <= dead


def test_the_reactor_does_not_list_or_remove_descriptors_of_asyncio(
    reactor: AsyncioEngineReactor,
) -> None:
    loop = loop_of(reactor)
    got: list[bytes] = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)

        def read() -> None:
            got.append(ours.recv(10))
            loop.stop()

        loop.add_reader(ours, read)
        loop.add_writer(ours, lambda: loop.remove_writer(ours))
        watcher = Watcher(reactor, theirs.fileno())
        reactor.addWriter(watcher)
        assert not [each for each in reactor.getReaders() if isinstance(each, Watched)]
        assert reactor.getWriters() == [watcher]
        assert reactor.removeAll() == [watcher]
        theirs.send(b"data")
        loop.call_later(DEADLINE, loop.stop)
        loop.run_forever()
        assert got == [b"data"]


def test_a_hang_up_does_not_remove_a_reader_of_asyncio(
    reactor: AsyncioEngineReactor,
) -> None:
    """As with asyncio's own selectors, the hang-up is reported in each pass."""
    loop = loop_of(reactor)
    reader, writer = os.pipe()
    os.close(writer)
    calls = 0

    def called() -> None:
        nonlocal calls
        calls += 1
        if calls > 2 * A_FEW:
            loop.remove_reader(reader)
            loop.stop()

    try:
        loop.add_reader(reader, called)
        loop.call_later(DEADLINE, loop.stop)
        loop.run_forever()
    finally:
        os.close(reader)
    assert calls > 2 * A_FEW


def test_a_descriptor_that_is_closed_while_asyncio_watches_it(
    reactor: AsyncioEngineReactor,
) -> None:
    """It is not reported, does not keep the loop busy, and can be removed."""
    loop = loop_of(reactor)
    pipe = os.pipe()
    # A high descriptor, which libkqueue does not reuse when it makes another queue.
    reader = fcntl.fcntl(pipe[0], fcntl.F_DUPFD, 200)
    loop.add_reader(reader, pytest.fail)
    loop.call_soon(loop.stop)
    loop.run_forever()
    for each in (*pipe, reader):
        os.close(each)
    loop.call_later(0.05, loop.stop)
    before = reactor.statistics()["waits"]
    loop.run_forever()
    assert reactor.statistics()["waits"] - before < A_FEW
    assert loop.remove_reader(reader)
    with pytest.raises(OSError, match="Bad file descriptor"):
        loop.add_reader(reader, pytest.fail)


def test_a_descriptor_is_reused_in_the_same_pass(
    reactor: AsyncioEngineReactor,
) -> None:
    """An event of the former file does not call or remove the new reader."""
    loop = loop_of(reactor)
    first, far = socket.socketpair()
    second, other_far = socket.socketpair()
    got: list[bytes] = []

    watched, watched_far = socket.socketpair()
    number = first.fileno()
    watcher = Watcher(reactor, watched.fileno())

    def read_new() -> None:
        got.append(first.recv(10))
        loop.stop()

    def exchange() -> None:
        # The event of the first socket was reported in this pass already.
        watched.recv(10)
        loop.remove_reader(number)
        os.dup2(second.fileno(), number)
        loop.add_reader(number, read_new)
        other_far.send(b"new")

    watcher.on_read = exchange
    with first, far, second, other_far, watched, watched_far:
        loop.add_reader(number, pytest.fail)
        reactor.addReader(watcher)
        far.send(b"old")
        watched_far.send(b"go")
        loop.call_later(DEADLINE, loop.stop)
        loop.run_forever()
        loop.remove_reader(number)
        reactor.removeReader(watcher)
    assert got == [b"new"]


def test_files_are_refused_as_epoll_refuses_them(reactor: AsyncioEngineReactor) -> None:
    loop = loop_of(reactor)
    for path in (__file__, os.devnull):
        with open(path) as file:
            if sys.platform.startswith("linux"):
                with pytest.raises(PermissionError):
                    loop.add_reader(file, pytest.fail)
            assert not loop.remove_reader(file)


def test_the_selector_has_the_contract_of_the_standard_library(
    reactor: AsyncioEngineReactor,
) -> None:
    selector: EngineSelector = loop_of(reactor)._selector
    ours, theirs = socket.socketpair()
    own = len(selector.get_map())
    with theirs:
        with pytest.raises(ValueError, match="Invalid events"):
            selector.register(ours, 4)
        with pytest.raises(ValueError, match="Invalid file object"):
            selector.register("no socket", 1)
        with pytest.raises(ValueError, match="Invalid file descriptor"):
            selector.register(-1, 1)
        with pytest.raises(KeyError):
            selector.modify(ours, 1)
        with pytest.raises(KeyError):
            selector.unregister(ours)
        key = selector.register(ours, 2, "data")
        with pytest.raises(KeyError):
            selector.register(ours.fileno(), 1)
        assert selector.get_key(ours) == selector.get_key(ours.fileno()) == key
        assert selector.get_map().get(ours.fileno()) == key
        assert selector.get_map().get(99999) is None
        assert len(selector.get_map()) == own + 1
        assert ours.fileno() in list(selector.get_map())
        assert selector.select(0) == [(key, 2)]
        assert selector.select(0.01) == [(key, 2)]
        key = selector.modify(ours, 1)
        assert selector.select(0) == selector.select(0.01) == []
        theirs.send(b"data")
        assert selector.select(DEADLINE) == [(key, 1)]
        key = selector.modify(ours, 3)
        assert selector.select() == [(key, 3)]
        ours.close()
        # The selector still finds it by its former descriptor.
        assert selector.unregister(ours) == key
        assert len(selector.get_map()) == own


# Stopping


def test_stopping_the_loop_stops_the_reactor_in_order(
    reactor: AsyncioEngineReactor,
) -> None:
    order: list[str] = []
    waited_for: Deferred[None] = Deferred()

    def before() -> Deferred[None]:
        order.append("before")
        reactor.callLater(0.01, waited_for.callback, None)
        return waited_for

    reactor.addSystemEventTrigger("before", "shutdown", before)
    reactor.addSystemEventTrigger("during", "shutdown", order.append, "during")
    reactor.addSystemEventTrigger("after", "shutdown", order.append, "after")
    run(reactor, loop_of(reactor).stop)
    assert order == ["before", "during", "after"]
    with pytest.raises(ReactorNotRestartable):
        reactor.run()


def test_stopping_the_reactor_does_not_stop_a_loop_that_waits_for_a_future(
    reactor: AsyncioEngineReactor,
) -> None:
    async def main() -> str:
        reactor.startRunning(installSignalHandlers=False)
        stopped = asyncio.get_running_loop().create_future()
        reactor.addSystemEventTrigger("after", "shutdown", stopped.set_result, None)
        reactor.stop()
        await stopped
        await asyncio.sleep(0.01)
        return "finished"

    assert loop_of(reactor).run_until_complete(main()) == "finished"


def test_it_can_run_again_after_a_crash(reactor: AsyncioEngineReactor) -> None:
    for _ in range(3):
        run(reactor, lambda: loop_of(reactor).call_soon(reactor.crash))
        loop_of(reactor).run_until_complete(asyncio.sleep(0))


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_an_exit_in_a_callback_of_asyncio_stops_the_reactor(
    reactor: AsyncioEngineReactor, error: type[BaseException]
) -> None:
    """The exception stops the reactor in order, and then leaves run()."""
    ended: list[int] = []

    def end() -> None:
        raise error(7)

    reactor.addSystemEventTrigger("after", "shutdown", ended.append, 1)
    reactor.callWhenRunning(loop_of(reactor).call_soon, end)
    with pytest.raises(error):
        reactor.run(installSignalHandlers=False)
    assert ended == [1]
    assert not reactor.running


def test_stop_ends_the_loop_as_in_asyncio(reactor: AsyncioEngineReactor) -> None:
    """
    Callbacks that are scheduled already are called.  Callbacks that those schedule are
    not, nor are timers that have become due meanwhile.
    """
    loop = loop_of(reactor)
    called = []

    def stop() -> None:
        called.append("stop")
        loop.call_soon(called.append, "scheduled")
        timer = loop.call_at(loop.time() - 1, called.append, "due")
        assert timer.when() < loop.time()
        loop.stop()

    def from_twisted() -> None:
        loop.call_soon(stop)
        loop.call_soon(called.append, "there")

    late = loop.call_later(DEADLINE, loop.stop)
    # By then the loop waits.
    loop.call_soon(lambda: reactor.callLater(0.01, from_twisted))
    loop.run_forever()
    assert called == ["stop", "there"]
    loop.call_soon(loop.stop)
    loop.run_forever()
    assert sorted(called[2:]) == ["due", "scheduled"]
    late.cancel()


def test_callbacks_that_raise_do_not_lose_the_others(
    reactor: AsyncioEngineReactor,
) -> None:
    loop = loop_of(reactor)
    called: list[object] = []
    loop.set_exception_handler(
        lambda loop, context: called.append(context["exception"])
    )
    error = ZeroDivisionError("of the test")

    def fail() -> None:
        raise error

    def leave() -> None:
        raise SystemExit

    def from_twisted() -> None:
        loop.call_soon(called.append, "cancelled").cancel()
        loop.call_soon(fail)
        loop.call_soon(leave)
        loop.call_soon(called.append, "after")
        loop.call_soon(loop.stop)

    late = loop.call_later(DEADLINE, loop.stop)
    loop.call_soon(lambda: reactor.callLater(0.01, from_twisted))
    with pytest.raises(SystemExit):
        loop.run_forever()
    assert called == [error]
    loop.run_forever()
    assert called == [error, "after"]
    late.cancel()


def test_call_soon_makes_the_same_handles_as_asyncio(
    reactor: AsyncioEngineReactor,
) -> None:
    """The loop has its own code to make handles."""
    loop = loop_of(reactor)
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    variable.set(1)
    context = contextvars.copy_context()
    variable.set(2)
    seen = []

    def look(*arguments: object) -> None:
        seen.append((variable.get(), arguments))

    handles = [
        loop.call_soon(look),
        loop.call_soon(look, "one", "two", context=context),
        loop.call_soon(look, "cancelled"),
        asyncio.BaseEventLoop.call_soon(loop, look, "three"),
    ]
    variable.set(3)
    handles[2].cancel()
    assert [type(each) for each in handles] == [asyncio.Handle] * 4
    assert [each.cancelled() for each in handles] == [False, False, True, False]
    for name in set(asyncio.Handle.__slots__) - {"__weakref__", "_args", "_context"}:
        if name != "_callback":
            assert getattr(handles[0], name) == getattr(handles[3], name), name
    assert "test_call_soon_makes_the_same_handles_as_asyncio.<locals>.look" in repr(
        handles[0]
    )
    loop.call_soon(loop.stop)
    loop.run_forever()
    assert seen == [(2, ()), (1, ("one", "two")), (2, ("three",))]


def test_call_soon_of_a_closed_loop(make: MakeReactor) -> None:
    loop = loop_of(make())
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        loop.call_soon(print)


def test_a_loop_keeps_its_own_call_soon(make: MakeReactor) -> None:
    scheduled = []

    class Counting(asyncio.SelectorEventLoop):
        def call_soon(  # type: ignore[override]
            self, callback: Any, *args: Any, **options: Any
        ) -> Any:
            scheduled.append(callback)
            return super().call_soon(callback, *args, **options)

    loop = loop_of(make(Counting()))
    scheduled.clear()
    loop.call_soon(loop.stop)
    loop.run_forever()
    assert scheduled == [loop.stop]


def test_an_interrupt_leaves_run_forever(
    reactor: AsyncioEngineReactor,
) -> None:
    """Twisted does not catch it in the middle of a pass."""
    loop = loop_of(reactor)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        loop.call_soon(signal.setitimer, signal.ITIMER_REAL, 0.01)
        late = loop.call_later(DEADLINE, loop.stop)
        with pytest.raises(KeyboardInterrupt):
            loop.run_forever()
        late.cancel()
    finally:
        signal.signal(signal.SIGALRM, before)
    # Then the loop and the reactor go on.
    assert loop.run_until_complete(asyncio.sleep(0, "done")) == "done"


def test_run_within_the_running_loop_is_refused(reactor: AsyncioEngineReactor) -> None:
    async def main() -> None:
        with pytest.raises(ReactorAlreadyRunning):
            reactor.run()

    loop_of(reactor).run_until_complete(main())


def test_run_with_a_closed_loop(reactor: AsyncioEngineReactor) -> None:
    loop_of(reactor).close()
    with pytest.raises(RuntimeError, match="Event loop is closed"):
        reactor.run()


def test_close_stops_the_reactor_in_order(reactor: AsyncioEngineReactor) -> None:
    loop = loop_of(reactor)
    ended: list[str] = []

    async def main() -> None:
        reactor.startRunning(installSignalHandlers=False)
        pool = reactor.getThreadPool()
        await deferToThreadPool(reactor, pool, int).asFuture(loop)
        reactor.addSystemEventTrigger("after", "shutdown", ended.append, "stopped")

    loop.run_until_complete(main())
    loop.close()
    assert ended == ["stopped"]
    assert not reactor.running
    assert reactor.getThreadPool().threads == []
    # A thread may call this before it knows of the end.
    reactor.callFromThread(pytest.fail)


def test_close_closes_all_descriptors(make: MakeReactor) -> None:
    def cycle() -> None:
        loop = loop_of(make())
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    cycle()
    before = set(os.listdir("/proc/self/fd" if os.path.exists("/proc") else "/dev/fd"))
    cycle()
    after = set(os.listdir("/proc/self/fd" if os.path.exists("/proc") else "/dev/fd"))
    assert after == before


def test_iterate_makes_calls_of_twisted_and_asyncio(
    reactor: AsyncioEngineReactor,
) -> None:
    loop = loop_of(reactor)
    called: list[str] = []
    loop.call_soon(called.append, "asyncio")
    reactor.callLater(0, called.append, "twisted")
    reactor.iterate(0)
    reactor.iterate(0)
    assert sorted(called) == ["asyncio", "twisted"]
    # It sleeps for its delay, or until there is a call to make.
    started = loop.time()
    reactor.iterate(0.05)
    assert loop.time() - started >= 0.049
    loop.call_later(0.01, called.append, "later")
    reactor.iterate(DEADLINE)
    assert called[2:] == ["later"]


def test_iterate_within_a_callback(reactor: AsyncioEngineReactor) -> None:
    """The loop cannot run within itself: only calls of Twisted are made."""
    called: list[str] = []

    async def main() -> None:
        reactor.callLater(0, called.append, "twisted")
        while not called:
            reactor.iterate(0)

    loop_of(reactor).run_until_complete(main())
    assert called == ["twisted"]


# The interface of asyncio


class Taken(asyncio.Protocol):
    """Keeps its transport.  ``lost`` gets its result when the connection is lost."""

    def __init__(self) -> None:
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set_result(None)


@pytest.mark.parametrize("kind", ["plain", "tls", "pipe", "datagrams", "adopted"])
def test_the_size_of_reads(make: MakeReactor, tmp_path: Path, kind: str) -> None:
    loop: Any = asyncio.SelectorEventLoop()
    if kind != "adopted":
        make(loop)
    protocols: list[Taken] = []

    def take() -> Taken:
        protocols.append(Taken())
        return protocols[-1]

    async def connect() -> None:
        server_tls = client_tls = None
        if kind == "tls":
            server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            server_tls.load_cert_chain(*make_certificate(tmp_path))
            client_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            client_tls.check_hostname = False
            client_tls.verify_mode = ssl.CERT_NONE
        server = await loop.create_server(take, "127.0.0.1", 0, ssl=server_tls)
        port = server.sockets[0].getsockname()[1]
        await loop.create_connection(take, "127.0.0.1", port, ssl=client_tls)
        # The server may accept after the client has connected.
        while sum(hasattr(each, "transport") for each in protocols) < 2:
            await asyncio.sleep(0.001)
        server.close()

    async def main() -> set[int]:
        if kind == "pipe":
            reader, writer = os.pipe()
            await loop.connect_read_pipe(take, os.fdopen(reader, "rb"))
            os.close(writer)
        elif kind == "datagrams":
            await loop.create_datagram_endpoint(take, ("127.0.0.1", 0))
        else:
            await connect()
        if kind == "adopted":
            make(loop)
        # With TLS these are the transports below those of the protocols.
        transports = [*loop._transports.values()] or [protocols[0].transport]
        sizes = {each.max_size for each in transports}
        for each in protocols:
            each.transport.close()
            await each.lost
        return sizes

    assert loop.run_until_complete(main()) == {65536}


def test_debug_mode_warns_of_slow_callbacks(
    reactor: AsyncioEngineReactor, caplog: pytest.LogCaptureFixture
) -> None:
    loop = loop_of(reactor)
    loop.set_debug(True)
    loop.slow_callback_duration = 0
    with caplog.at_level(logging.WARNING, "asyncio"):
        loop.run_until_complete(asyncio.sleep(0))
    assert "Executing <Task" in caplog.text
    # It also reports calls from other threads.
    errors: list[str] = []

    def call() -> None:
        try:
            loop.call_soon(int)
        except RuntimeError as error:
            errors.append(str(error))

    async def main() -> None:
        await asyncio.to_thread(call)

    loop.run_until_complete(main())
    loop.run_until_complete(loop.shutdown_default_executor())
    assert errors == [
        "Non-thread-safe operation invoked on an event loop other than the current one"
    ]


# Adopting


def test_an_adopted_loop_keeps_its_readers_and_callbacks(make: MakeReactor) -> None:
    loop: Any = asyncio.SelectorEventLoop()
    ours, theirs = socket.socketpair()
    got: list[Any] = []
    with ours, theirs:
        loop.add_reader(ours, lambda: got.append(ours.recv(10)))
        loop.call_soon(got.append, "soon")
        loop.call_later(0.01, got.append, "later")
        loop.call_later(0.05, loop.stop)
        theirs.send(b"data")
        former = loop._selector
        reactor = make(loop)
        assert isinstance(loop, EngineEventLoop)
        assert loop.reactor is reactor
        assert former.get_map() is None
        loop.run_forever()
        loop.remove_reader(ours)
    assert got == ["soon", b"data", "later"]


def test_a_loop_is_adopted_while_it_runs(make: MakeReactor) -> None:
    loop: Any = asyncio.SelectorEventLoop()

    async def main() -> list[str]:
        async with asyncio_echo() as asyncios_port:
            reactor = make(loop)
            port = echo_port(reactor)
            talks = [asyncio.to_thread(talk, each) for each in (port, asyncios_port)]
            outcomes = await asyncio.gather(*talks)
        reactor.disconnectAll()
        return outcomes

    assert loop.run_until_complete(main()) == ["talked", "talked"]
    loop.run_until_complete(loop.shutdown_default_executor())


def test_an_adopted_loop_of_a_subclass_stays_an_instance_of_it(
    make: MakeReactor,
) -> None:
    class Loop(asyncio.SelectorEventLoop):
        def close(self) -> None:
            closed.append(self)
            super().close()

    closed: list[Any] = []
    loop = Loop()
    make(loop)
    assert isinstance(loop, Loop)
    assert isinstance(loop, EngineEventLoop)
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert closed == [loop]


def _of_another_class() -> Any:
    class Loop(asyncio.BaseEventLoop):
        pass

    return Loop()


def _with_its_own_run_forever() -> Any:
    class Loop(asyncio.SelectorEventLoop):
        def run_forever(self) -> None: ...

    return Loop()


def _closed() -> Any:
    loop = asyncio.SelectorEventLoop()
    loop.close()
    return loop


def _like(name: str) -> Callable[[], Any]:
    def make() -> Any:
        module, _, cls = name.rpartition(".")
        return type(cls, (asyncio.BaseEventLoop,), {"__module__": module})()

    return make


@pytest.mark.parametrize(
    ("make_loop", "why"),
    [
        (_of_another_class, "does not wait in a selector"),
        (_with_its_own_run_forever, r"has a run_forever\(\) of its own"),
        (_closed, "is closed"),
        (_like("uvloop.Loop"), "waits in libuv"),
        (_like("asyncio.windows_events.ProactorEventLoop"), "waits in a completion"),
    ],
)
def test_other_loops_are_refused(
    make: MakeReactor, make_loop: Callable[[], Any], why: str
) -> None:
    loop = make_loop()
    with pytest.raises(UnsupportedReactorError, match=why) as raised:
        make(loop)
    assert "pass an asyncio.SelectorEventLoop()" in str(raised.value)
    loop.close()


def test_a_loop_that_has_a_reactor_is_refused(make: MakeReactor) -> None:
    loop = loop_of(make())
    with pytest.raises(UnsupportedReactorError, match="has a reactor already"):
        make(loop)


def test_a_loop_that_runs_in_another_thread_is_refused(make: MakeReactor) -> None:
    loop = asyncio.SelectorEventLoop()
    running = threading.Event()
    loop.call_soon(running.set)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        assert running.wait(DEADLINE)
        with pytest.raises(UnsupportedReactorError, match="in another thread"):
            make(loop)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.parametrize(
    ("platform", "advice"),
    [
        ("win32", "use --reactor=rtsig-iocp without asyncio, or --reactor=asyncio"),
        ("sunos5", "this is sunos5: use --reactor=asyncio"),
    ],
)
def test_other_systems_are_refused(
    monkeypatch: pytest.MonkeyPatch, platform: str, advice: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.delattr("select.kqueue", raising=False)
    monkeypatch.setattr(main, "installReactor", pytest.fail)
    monkeypatch.delitem(sys.modules, "twisted.internet.reactor", raising=False)
    for act in (asyncioreactor.install, asyncioreactor.new_event_loop, AsyncioReactor):
        with pytest.raises(UnsupportedReactorError, match=advice):
            act()


# Programs: a process has one reactor, and one set of signal handlers


def program(code: str, *arguments: str) -> str:
    """The output of a program that must end with status 0 and without a warning."""
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-c", textwrap.dedent(code), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, (result.returncode, result.stdout, result.stderr)
    assert "Warning" not in result.stderr, result.stderr
    return result.stdout


def test_tasks_of_asyncio_await_deferreds() -> None:
    """The program uses no other part of this package."""
    code = """
        import asyncio, sys
        from twisted_rtsig import asyncioreactor

        async def main():
            from twisted.internet import reactor, task
            assert "twisted_rtsig.coro" not in sys.modules
            print(await task.deferLater(reactor, 0, lambda: "a result"))

        asyncioreactor.install()
        from twisted.internet import reactor
        reactor._asyncioEventloop.run_until_complete(main())
    """
    assert program(code) == "a result\n"


# The beginning of most programs.
COMMON = """
import asyncio, os, signal, sys, threading
from twisted_rtsig import asyncioreactor
from twisted.internet.protocol import ProcessProtocol

def kill_from_thread(number):
    # The thread must get the signal: it would end the sleep of the main thread.
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    threading.Thread(target=lambda: (
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number]),
        signal.raise_signal(number),
    )).start()

class Child(ProcessProtocol):
    def __init__(self, done):
        self.done = done
    def processEnded(self, reason):
        self.done(reason.value.exitCode)

# A child that closes its pipes first, so that they do not show its end.
ENDS_SILENTLY = '''if 1:
    import os, time
    for descriptor in range(3):
        os.close(descriptor)
    time.sleep(0.2)
    os._exit(3)
'''

def spawn(reactor, code, done, **options):
    reactor.spawnProcess(
        Child(done), sys.executable, [sys.executable, "-S", "-c", code], **options)
"""

INSTALL = """
asyncioreactor.install()
from twisted.internet import reactor
loop = reactor._asyncioEventloop
"""


def test_the_reactor_is_installed_and_run() -> None:
    output = program(
        COMMON
        + """if 1:
        asyncioreactor.install()
        from twisted.internet import reactor
        print(type(reactor).__module__, type(reactor).__name__)
        try:
            asyncioreactor.install()
        except Exception as error:
            print(type(error).__name__)
        reactor.callWhenRunning(reactor.stop)
        reactor.run()
        reactor._asyncioEventloop.close()
        """
    )
    assert output.splitlines() == [
        "twisted_rtsig.asyncioreactor AsyncioReactor",
        "ReactorAlreadyInstalledError",
    ]


def test_a_new_loop_installs_and_starts_its_reactor() -> None:
    """The reactor starts with the loop, and stops when the loop is closed."""
    output = program(
        COMMON
        + """if 1:
        async def main():
            from twisted.internet import reactor
            from twisted.internet.threads import deferToThread
            assert reactor is asyncio.get_running_loop().reactor
            assert reactor.running
            # Twisted's documentation asks for this call.
            reactor.startRunning(installSignalHandlers=False)
            reactor.callWhenRunning(print, "running")
            reactor.addSystemEventTrigger("after", "shutdown", print, "stopped")
            loop = asyncio.get_running_loop()
            await deferToThread(print, "in a thread").asFuture(loop)
            return "result"

        async def later():
            loop = asyncio.get_running_loop()
            print(loop.reactor is sys.modules["twisted.internet.reactor"])
            print(loop.reactor.running)

        def run(main):
            loop = asyncioreactor.new_event_loop()
            try:
                return loop.run_until_complete(main())
            finally:
                loop.close()

        print(run(main))
        # Another loop has another reactor, which nothing imports.
        run(later)
        """
    )
    assert output.splitlines() == [
        *("running", "in a thread", "stopped", "result"),
        *("False", "False"),
    ]


def test_the_first_new_loop_is_that_of_the_installed_reactor() -> None:
    output = program(
        COMMON
        + """if 1:
        asyncioreactor.install()
        from twisted.internet import reactor
        loops = [asyncioreactor.new_event_loop() for _ in range(2)]
        print([loop.reactor is reactor for loop in loops])
        for loop in loops:
            loop.close()
        """
    )
    assert output == "[True, False]\n"


def test_the_reactor_is_installed_within_asyncio_run() -> None:
    output = program(
        COMMON
        + """if 1:
        async def main():
            asyncioreactor.install()
            from twisted.internet import reactor
            loop = asyncio.get_running_loop()
            print(reactor.running, reactor._asyncioEventloop is loop)
            reactor.addSystemEventTrigger("before", "shutdown", print, "stops")
            child = loop.create_future()
            spawn(reactor, "raise SystemExit(3)", child.set_result)
            print(await child)
            fired = loop.create_future()
            reactor.callLater(0.01, fired.set_result, "fired")
            print(await fired)

        asyncio.run(main())
        print(sys.modules["twisted.internet.reactor"].running)
        """
    )
    assert output.splitlines() == ["True True", "3", "fired", "stops", "False"]


def test_the_reactor_is_installed_with_a_loop() -> None:
    output = program(
        COMMON
        + """if 1:
        from twisted_rtsig.notifiers import UnsupportedReactorError
        loop = asyncio.SelectorEventLoop()
        asyncioreactor.install(loop)
        from twisted.internet import reactor
        print(reactor._asyncioEventloop is loop)
        print(loop.run_until_complete(asyncio.sleep(0, "before")))
        reactor.callLater(0, reactor.stop)
        reactor.run()
        print(loop.run_until_complete(asyncio.sleep(0, "after")))
        loop.close()
        """
    )
    assert output.splitlines() == ["True", "before", "after"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has them")
def test_the_reactor_is_installed_with_realtime_signals() -> None:
    output = program(
        COMMON
        + """if 1:
        asyncioreactor.install(realtime_signals=True)
        from twisted.internet import reactor
        print(type(reactor).__name__, "signals" in reactor.statistics())
        reactor.callLater(0, reactor.stop)
        reactor.run()
        reactor._asyncioEventloop.close()
        """
    )
    assert output == "RealtimeSignalAsyncioReactor True\n"


def test_replace_replaces_twisteds_class() -> None:
    """This serves code that names Twisted's class and calls its install()."""
    output = program(
        COMMON
        + """if 1:
        from twisted.internet.asyncioreactor import AsyncioSelectorReactor as former
        asyncioreactor.replace()
        from twisted.internet import asyncioreactor as twisteds
        loop = asyncio.SelectorEventLoop()
        twisteds.install(eventloop=loop)
        from twisted.internet import reactor
        print(type(reactor) is twisteds.AsyncioSelectorReactor)
        print(type(reactor) is asyncioreactor.AsyncioReactor)
        print(isinstance(reactor, former), reactor._asyncioEventloop is loop)
        loop.close()
        """
    )
    assert output.splitlines() == ["True", "True", "True True"]


def test_the_short_name_of_the_reactor() -> None:
    assert installer_named("rtsig-asyncio").moduleName == "twisted_rtsig.asyncioreactor"


def test_run_uses_the_reactor_and_ends_the_tasks_of_asyncio() -> None:
    """
    Tasks and generators of asyncio that are left are ended as by asyncio.run, before
    connections are lost.
    """
    output = program(
        COMMON
        + """if 1:
        import twisted_rtsig
        from twisted_rtsig.coro import sleep

        async def numbers():
            try:
                yield 1
            finally:
                print("generator ended")

        async def left(started):
            try:
                async for _ in generator:
                    started.set_result(None)
                    await asyncio.sleep(60)
            finally:
                from twisted.internet import reactor
                print("cancelled", reactor.running)
                await asyncio.sleep(0.01)
                print("cleaned up")

        async def main(number):
            global generator, task
            from twisted.internet import reactor
            generator = numbers()
            started = asyncio.get_running_loop().create_future()
            task = asyncio.ensure_future(left(started))
            while not started.done():
                await sleep(0.001)
            return type(reactor).__name__, number

        print(twisted_rtsig.run(main, 7, reactor="rtsig-asyncio"))
        print(sys.modules["twisted.internet.reactor"]._asyncioEventloop.is_closed())
        """
    )
    assert output.splitlines() == [
        *("cancelled True", "cleaned up", "generator ended"),
        *("('AsyncioReactor', 7)", "True"),
    ]


def test_a_task_of_asyncio_that_does_not_end_is_logged() -> None:
    output = program(
        COMMON
        + """if 1:
        import twisted_rtsig
        from twisted.logger import globalLogBeginner, formatEvent
        from twisted_rtsig.coro import sleep

        def tell(event):
            if event["log_level"].name == "critical":
                print(formatEvent(event).splitlines()[0])

        globalLogBeginner.beginLoggingTo(
            [tell], redirectStandardIO=False, discardBuffer=True)

        async def stubborn():
            while not stop:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    pass

        stop = []

        async def main():
            global task
            task = asyncio.ensure_future(stubborn())
            await sleep(0.01)
            # End the task at last, since the interpreter would warn of it.
            from twisted.internet import reactor
            reactor.addSystemEventTrigger("during", "shutdown", stop.append, True)
            reactor.addSystemEventTrigger("during", "shutdown", task.cancel)
            return "returned"

        print(twisted_rtsig.run(main, reactor="rtsig-asyncio", grace=0.05))
        """
    )
    told, returned = output.splitlines()
    assert told == (
        "1 tasks of asyncio's were cancelled because the program ends, and have not "
        "ended within 0.05 s; they are dropped:"
    )
    assert returned == "returned"


# Signals and children


def test_sigint_stops_the_reactor_in_order() -> None:
    output = program(
        COMMON
        + """if 1:
        asyncioreactor.install()
        from twisted.internet import reactor
        reactor.addSystemEventTrigger("after", "shutdown", print, "stopped")
        reactor.callLater(0.01, signal.raise_signal, signal.SIGINT)
        reactor.run()
        print("returned")
        reactor._asyncioEventloop.close()
        """
    )
    assert output.splitlines() == ["stopped", "returned"]


@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="Python 3.11 has the first Runner"
)
def test_sigint_cancels_the_task_of_a_runner() -> None:
    output = program(
        COMMON
        + """if 1:
        async def main():
            loop = asyncio.get_running_loop()
            loop.call_later(0.01, signal.raise_signal, signal.SIGINT)
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                print("cancelled")
                raise
        try:
            with asyncio.Runner(loop_factory=asyncioreactor.new_event_loop) as runner:
                runner.run(main())
        except KeyboardInterrupt:
            print("interrupted")
        """
    )
    assert output.splitlines() == ["cancelled", "interrupted"]


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_handler_of_asyncio_replaces_the_reactors(number: str) -> None:
    """
    When it is removed, the reactor's handler is restored, also for a signal that
    another thread gets while the reactor sleeps.
    """
    output = program(
        COMMON
        + """if 1:
        number = signal.Signals[sys.argv[1]]
        asyncioreactor.install()
        from twisted.internet import reactor
        loop = reactor._asyncioEventloop

        def handled():
            print("handled by asyncio")
            loop.remove_signal_handler(number)
            loop.call_later(0.05, kill_from_thread, number)

        def start():
            loop.add_signal_handler(number, handled)
            loop.call_later(0.05, kill_from_thread, number)

        reactor.callWhenRunning(start)
        reactor.run()
        print("stopped")
        loop.close()
        """,
        number,
    )
    assert output.splitlines() == ["handled by asyncio", "stopped"]


def test_the_wakeup_descriptor_stays_when_asyncio_has_no_handler_left() -> None:
    """A signal that another thread gets ends the sleep."""
    output = program(
        COMMON
        + INSTALL
        + """if 1:
        def start():
            loop.add_signal_handler(signal.SIGUSR1, print)
            loop.remove_signal_handler(signal.SIGUSR1)
            loop.call_later(0.05, kill_from_thread, signal.SIGTERM)

        reactor.callWhenRunning(start)
        reactor.run()
        print("stopped")
        loop.close()
        print(signal.set_wakeup_fd(-1))
        """
    )
    assert output.splitlines() == ["stopped", "-1"]


def test_signal_handlers_of_asyncio_stay_when_the_reactor_starts_and_stops() -> None:
    output = program(
        COMMON
        + INSTALL
        + """if 1:
        loop.add_signal_handler(signal.SIGUSR1, reactor.stop)
        loop.call_later(0.05, kill_from_thread, signal.SIGUSR1)
        reactor.run()
        # It also stays at its end.
        loop.add_signal_handler(signal.SIGUSR1, loop.stop)
        loop.call_later(0.05, kill_from_thread, signal.SIGUSR1)
        loop.run_forever()
        loop.close()
        print("stopped", signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL)
        """
    )
    assert output == "stopped True\n"


# Only SIGCHLD reports the end of Twisted's children.
BY_SIGNAL = """
from twisted_rtsig.engine import processes
processes._FIRST_PAUSE = 3600
if hasattr(os, "pidfd_open"):
    pidfd_open = os.pidfd_open
    del os.pidfd_open
"""


@pytest.mark.processes
@pytest.mark.parametrize("handlers", ["none", "removed", "sigchld", "removed sigchld"])
def test_children_of_twisted_end_whatever_asyncio_does_with_signals(
    handlers: str,
) -> None:
    output = program(
        COMMON
        + BY_SIGNAL
        + INSTALL
        + """if 1:
        number = signal.SIGCHLD if "sigchld" in sys.argv[1] else signal.SIGUSR1

        def ended(code):
            print("ended", code)
            reactor.callLater(0, reactor.stop)

        def start():
            if sys.argv[1] != "none":
                loop.add_signal_handler(number, int)
            if "removed" in sys.argv[1]:
                loop.remove_signal_handler(number)
            spawn(reactor, ENDS_SILENTLY, ended)

        reactor.callWhenRunning(start)
        reactor.run()
        loop.close()
        print(signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL)
        """,
        handlers,
    )
    assert output.splitlines() == ["ended 3", "True"]


WATCHERS = ["default"]
if sys.version_info < (3, 14):
    WATCHERS += ["ThreadedChildWatcher", "SafeChildWatcher", "FastChildWatcher"]
    if hasattr(os, "pidfd_open"):
        WATCHERS.append("PidfdChildWatcher")


@pytest.mark.processes
@pytest.mark.parametrize("watcher", WATCHERS)
def test_children_of_twisted_and_asyncio(watcher: str) -> None:
    """Each framework gets the exit status of its own children."""
    output = program(
        COMMON
        + """if 1:
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        asyncioreactor.install()
        from twisted.internet import reactor
        loop = reactor._asyncioEventloop
        if sys.argv[1] != "default":
            chosen = getattr(asyncio, sys.argv[1])()
            chosen.attach_loop(loop)
            asyncio.set_child_watcher(chosen)

        async def child_of_asyncio(code):
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-S", "-c", f"raise SystemExit({code})")
            return await child.wait()

        async def child_of_twisted(code, **options):
            ended = loop.create_future()
            spawn(reactor, f"raise SystemExit({code})", ended.set_result, **options)
            return await ended

        async def main():
            print(await asyncio.gather(*(
                each for code in range(1, 5)
                for each in (child_of_asyncio(code), child_of_twisted(code))
            ), child_of_twisted(5, usePTY=True)))
            if sys.argv[1] != "default":
                asyncio.set_child_watcher(None)
                chosen.close()
            reactor.stop()

        def start():
            global task
            task = asyncio.ensure_future(main())

        reactor.callWhenRunning(start)
        reactor.run()
        loop.close()
        """,
        watcher,
    )
    assert output == "[1, 1, 2, 2, 3, 3, 4, 4, 5]\n"


@pytest.mark.processes
@pytest.mark.skipif(
    sys.version_info >= (3, 14) or not hasattr(os, "waitid"),
    reason="asyncio has no child watchers, or the system no waitid(2)",
)
@pytest.mark.parametrize("adopted", ["", "adopted"])
def test_a_child_watcher_leaves_the_children_of_twisted(adopted: str) -> None:
    """The watcher waits for any child.  It leaves those that end meanwhile, too."""
    output = program(
        COMMON
        + BY_SIGNAL
        + """if 1:
        import warnings
        from twisted.internet import process
        warnings.simplefilter("ignore", DeprecationWarning)
        # As if the child had ended just after this was called.
        process.reapAllProcesses = lambda: None
        loop = asyncio.SelectorEventLoop()
        watcher = asyncio.FastChildWatcher()
        if sys.argv[1]:
            watcher.attach_loop(loop)
        asyncioreactor.install(loop)
        from twisted.internet import reactor
        if not sys.argv[1]:
            watcher.attach_loop(loop)

        def ended(code):
            print("ended", code)
            reactor.callLater(0, reactor.stop)

        reactor.callWhenRunning(spawn, reactor, ENDS_SILENTLY, ended)
        reactor.run()
        watcher.close()
        loop.close()
        """,
        adopted,
    )
    assert output == "ended 3\n"
