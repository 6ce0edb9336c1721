"""Stack traces that show what the user wrote, and not what drives it."""

from __future__ import annotations

from types import TracebackType

_MACHINERY = ("twisted_rtsig.coro.", "twisted.internet.defer", "twisted.python.failure")


def without_machinery(error: BaseException) -> BaseException:
    """
    Take this package's and Twisted's drivers of coroutines out of the traceback
    of C{error} and of what led to it; return C{error}.

    An error that comes out of this package alone keeps its last line.
    """
    seen: set[int] = set()
    rest: list[BaseException | None] = [error]
    while rest:
        each = rest.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = _filtered(each.__traceback__)
            rest += [each.__cause__, each.__context__]
    return error


def _filtered(traceback: TracebackType | None) -> TracebackType | None:
    entries = []
    while traceback is not None:
        entries.append(traceback)
        traceback = traceback.tb_next
    kept = [each for each in entries if not _is_machinery(each)] or entries[-1:]
    shown: TracebackType | None = None
    for each in reversed(kept):
        shown = TracebackType(shown, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return shown


def _is_machinery(entry: TracebackType) -> bool:
    module = entry.tb_frame.f_globals.get("__name__", "")
    return isinstance(module, str) and module.startswith(_MACHINERY)
