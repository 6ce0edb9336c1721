"""Fixtures for all tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest

from tests.support import Served, dispose
from twisted_rtsig.engine.reactor import EngineReactor


@pytest.fixture
def make_reactor() -> Iterator[Callable[[], EngineReactor]]:
    """Makes reactors on realtime signals, and disposes of them after the test."""
    if not sys.platform.startswith("linux"):
        pytest.skip("realtime signals exist on Linux only")
    from twisted_rtsig.rtsigreactor import RealtimeSignalReactor

    made: list[EngineReactor] = []

    def make() -> EngineReactor:
        made.append(RealtimeSignalReactor())
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
