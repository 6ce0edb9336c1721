"""Fixtures for all tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support import Served, dispose
from twisted_rtsig.engine.reactor import EngineReactor


def _reactor_classes() -> list[Callable[[], EngineReactor]]:
    """The reactors of this package that this platform has."""
    if not sys.platform.startswith("linux"):
        return []
    from twisted_rtsig.epollreactor import EdgeEPollReactor
    from twisted_rtsig.rtsigreactor import RealtimeSignalReactor

    return [RealtimeSignalReactor, EdgeEPollReactor]


@pytest.fixture(params=_reactor_classes(), ids=lambda each: each.__name__)
def reactor_class(request: Any) -> Callable[[], EngineReactor]:
    """Each of this package's reactors; a file about one of them has its own."""
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
def served(reactor: EngineReactor) -> Iterator[Served]:
    it = Served(reactor)
    yield it
    it.close()
