"""Fixtures for all tests."""

from __future__ import annotations

import gc
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest

from tests.quick import starts_programs
from tests.support import (
    ON_PYPY,
    Served,
    SocketPair,
    dispose,
    each_of,
    reactor_classes,
)
from twisted_rtsig.engine.reactor import EngineReactor

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has started the tests in the background.  The programs that the tests
    # start would ignore Ctrl-C as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Import it before the objects are frozen.  Its pytest plugin would import it at the end
# of a run.  If trio is installed, hypothesis's part for trio then looks through the
# garbage collector's objects for one that refers to another, and does not find frozen
# ones.
assert hypothesis


def pytest_itemcollected(item: pytest.Item) -> None:
    if isinstance(item, pytest.Function) and starts_programs(item.function):
        item.add_marker(pytest.mark.processes)


def pytest_collection_finish() -> None:
    # The thousands of collected tests stay to the end.  To look through them for
    # garbage takes a tenth of a second each time, and many tests collect garbage.
    if not ON_PYPY:
        gc.freeze()


@pytest.fixture(params=each_of(reactor_classes()), ids=lambda each: each.__name__)
def reactor_class(request: Any) -> Callable[[], EngineReactor]:
    """Each of this package's reactors.  A file about one reactor overrides this."""
    chosen: Callable[[], EngineReactor] = request.param
    return chosen


@pytest.fixture
def make_reactor(
    reactor_class: Callable[[], EngineReactor],
) -> Iterator[Callable[[], EngineReactor]]:
    """Makes reactors, and disposes of them after the test."""
    made: list[EngineReactor] = []

    def make() -> EngineReactor:
        made.append(reactor_class())
        return made[-1]

    yield make
    for reactor in made:
        dispose(reactor)


@pytest.fixture
def reactor(make_reactor: Callable[[], EngineReactor]) -> EngineReactor:
    return make_reactor()


@pytest.fixture
def pair() -> Iterator[SocketPair]:
    """Two connected sockets, of which the first does not block."""
    one, other = socket.socketpair()
    one.setblocking(False)
    with one, other:
        yield one, other


@pytest.fixture
def served(reactor: EngineReactor) -> Iterator[Served]:
    it = Served(reactor)
    yield it
    it.close()
