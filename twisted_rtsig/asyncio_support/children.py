"""
Children of Twisted's beside a child watcher of asyncio's that waits for all of them.

``asyncio.FastChildWatcher`` calls waitpid(2) for any child, and drops the status of
those that it does not know: Twisted's.  (The other watchers wait for their own
children only.  Python 3.14 has no watchers any more.)
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from twisted.internet.posixbase import unixEnabled
from twisted.logger import Logger

if unixEnabled:
    from twisted.internet import process

_log = Logger()


def fast_watcher(callback: object) -> Any:
    """The ``FastChildWatcher`` whose handler of SIGCHLD this is, or None."""
    owner = getattr(callback, "__self__", None)
    cls = getattr(asyncio, "FastChildWatcher", None)
    # macOS has had no waitid(2) in Python before 3.13.
    if cls is None or not isinstance(owner, cls) or not hasattr(os, "waitid"):
        return None
    return owner


def reap_for(watcher: Any) -> None:
    """As ``FastChildWatcher._do_waitpid_all``, but leave Twisted's children to it."""
    left: set[int] = set()
    while True:
        try:
            # Look only: waitpid(2) for any child would take its status away.
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid in left:
            return
        pid = ended.si_pid
        left.add(pid)
        child = process.reapProcessHandlers.get(pid)
        if child is not None:
            child.reapProcess()
            continue
        _, status = os.waitpid(pid, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status)
        with watcher._lock:
            entry = watcher._callbacks.pop(pid, None)
            if entry is None and watcher._forks:
                # It is not registered yet.
                watcher._zombies[pid] = code
                continue
        if entry is None:
            _log.warn(
                "Child process {pid} has ended with {code}, and nothing waits for it",
                pid=pid,
                code=code,
            )
        else:
            callback, args = entry
            callback(pid, code, *args)


__all__ = ["fast_watcher", "reap_for"]
