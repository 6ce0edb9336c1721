"""The declarations of Windows calls, tested without Windows."""

from __future__ import annotations

import sys

import pytest

from twisted_rtsig.iocpreactor import CompletionPortReactor
from twisted_rtsig.notifiers import UnsupportedReactorError
from twisted_rtsig.windows import calls


def test_the_layouts_are_those_of_64_bit_windows() -> None:
    """They are so on every system."""
    calls.check_layouts()


def test_a_32_bit_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    with pytest.raises(
        UnsupportedReactorError, match=r"a 64-bit Python; use --reactor=select"
    ):
        CompletionPortReactor()


@pytest.mark.skipif(sys.platform == "win32", reason="for other systems")
def test_other_systems_are_refused() -> None:
    with pytest.raises(UnsupportedReactorError, match="on Windows only"):
        CompletionPortReactor()
    with pytest.raises(NotImplementedError, match="on Windows only"):
        calls.close_handle(1)
