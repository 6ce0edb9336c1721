"""
Twisted's child processes next to a child watcher of asyncio that reaps all children.

``asyncio.FastChildWatcher`` calls waitpid(2) for any child, and drops the status of the
children that it does not know, which are Twisted's.  (The other watchers wait only for
their own children.  Since Python 3.14 there are no watchers.)
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
    """
    Return the ``FastChildWatcher`` whose handler of SIGCHLD ``callback`` is.

    :return: None if it is another callback.
    """
    owner = getattr(callback, "__self__", None)
    cls = getattr(asyncio, "FastChildWatcher", None)
    # On macOS, Python before 3.13 has no os.waitid.
    if cls is None or not isinstance(owner, cls) or not hasattr(os, "waitid"):
        return None
    return owner


def reap_for(watcher: Any) -> None:
    """Like ``FastChildWatcher._do_waitpid_all``, but let Twisted reap its children."""
    left: set[int] = set()
    while True:
        try:
            # Do not reap it yet: waitpid(2) for any child would consume its status.
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
                # The child is not registered yet.
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
