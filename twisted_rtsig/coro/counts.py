"""Statistics of a reactor: counts of its tasks, connections, servers and threads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from twisted_rtsig.coro.channels import channels
from twisted_rtsig.coro.children import processes
from twisted_rtsig.coro.factories import servers
from twisted_rtsig.coro.output import unsent_output
from twisted_rtsig.coro.scheduler import Scheduler, scheduler_for

if TYPE_CHECKING:
    from twisted.python.threadpool import ThreadPool

# Up to this many references to tasks, look for collected tasks at each call: that takes
# less than a millisecond.
_FEW = 5000


@dataclass(frozen=True)
class TaskCounts:
    """
    The tasks of a reactor: the active tasks, and totals since the reactor was first
    used with tasks.

    :ivar running: 1 if a task runs, which is the caller of :func:`statistics`; else 0.
    :ivar ready: tasks that are about to run.
    :ivar waiting: tasks that wait.  With thousands of tasks, garbage collected tasks
        count as waiting for a while.
    :ivar spawned: all tasks.
    :ivar succeeded: tasks whose function has returned.
    :ivar failed: tasks whose function has raised an error.
    :ivar cancelled: tasks that have ended because they were cancelled.
    :ivar collected: tasks that were garbage collected before they had ended, since
        nothing could resume them any more.
    """

    running: int
    ready: int
    waiting: int
    spawned: int
    succeeded: int
    failed: int
    cancelled: int
    collected: int

    @property
    def active(self) -> int:
        """Tasks that have not ended: running, ready and waiting."""
        return self.running + self.ready + self.waiting


@dataclass(frozen=True)
class StreamCounts:
    """
    The connections of a reactor that have a stream.

    :ivar open: connections that are not lost.
    :ivar made: all connections since the reactor was first used with tasks.
    :ivar unread: bytes that have arrived and were not read yet.
    :ivar unsent: bytes that were written, and that the transports hold because the
        kernel has no room for them.  Bytes held by TLS, and files that wait to be sent,
        do not count.
    """

    open: int
    made: int
    unread: int
    unsent: int


@dataclass(frozen=True)
class ServerCounts:
    """
    One server, or :class:`CoroutineFactory`.

    :ivar name: the name of its handlers in logs.
    :ivar connections: connections that are open, or whose handler has not ended.
    :ivar limits: how often each limit has refused or aborted a connection, by the name
        of its option; ``"stopping"`` for connections that arrived after the server had
        stopped.
    """

    name: str
    connections: int
    limits: Mapping[str, int]


@dataclass(frozen=True)
class ChannelCounts:
    """
    All channels of the process: channels belong to no reactor.

    :ivar open: channels that are not closed.
    :ivar buffered: values that were sent and not received yet.
    :ivar senders: sends that wait.
    :ivar receivers: receives that wait.
    """

    open: int
    buffered: int
    senders: int
    receivers: int


@dataclass(frozen=True)
class ThreadCounts:
    """
    The threads of the reactor's pool.

    :ivar busy: threads that run a function.
    :ivar idle: threads that wait for a function.
    :ivar most: the maximum number of threads.
    """

    busy: int
    idle: int
    most: int


@dataclass(frozen=True)
class Statistics:
    """
    What :func:`statistics` returns.

    :ivar processes: child processes of :func:`open_process` and :func:`run_process`
        that have not exited.
    """

    tasks: TaskCounts
    streams: StreamCounts
    servers: tuple[ServerCounts, ...]
    channels: ChannelCounts
    threads: ThreadCounts
    processes: int


def statistics(reactor: Any | None = None) -> Statistics:
    """
    Count what runs on a reactor.  For its selectables, see the ``statistics`` of this
    package's reactors.

    This looks at each stream, server, channel and process, and not at each task.  It
    must be called in the reactor's thread.

    :param reactor: an ``IReactorTime`` provider; by default the reactor of the calling
        task, or the installed reactor.
    """
    scheduler = scheduler_for(reactor)
    of = scheduler.reactor
    return Statistics(
        tasks=_task_counts(scheduler),
        streams=_stream_counts(scheduler),
        servers=tuple(
            ServerCounts(each.display_name, len(each.connections), dict(each.limits))
            for each in servers
            if each.is_on(of)
        ),
        channels=_channel_counts(),
        threads=_thread_counts(getattr(of, "threadpool", None)),
        processes=sum(
            each._scheduler is scheduler and each._status is None for each in processes
        ),
    )


def _task_counts(scheduler: Scheduler) -> TaskCounts:
    if scheduler.count_references() <= _FEW:
        scheduler.sweep()
    scheduler.count_spawned()
    spawned, succeeded, failed, cancelled = scheduler.totals.tasks
    collected = scheduler.totals.collected
    active = spawned - succeeded - failed - cancelled - collected
    ready = len(scheduler._ready)
    running = min(int(scheduler._running), active - ready)
    return TaskCounts(
        running=running,
        ready=ready,
        waiting=active - ready - running,
        spawned=spawned,
        succeeded=succeeded,
        failed=failed,
        cancelled=cancelled,
        collected=collected,
    )


def _stream_counts(scheduler: Scheduler) -> StreamCounts:
    totals = scheduler.totals
    streams = list(totals.streams)
    return StreamCounts(
        open=len(streams),
        made=totals.connections_made,
        unread=sum(each._buffer.size for each in streams),
        unsent=sum(unsent_output(each.transport) for each in streams),
    )


def _channel_counts() -> ChannelCounts:
    all_statistics = [each.statistics() for each in channels]
    return ChannelCounts(
        open=sum(not each.closed for each in all_statistics),
        buffered=sum(each.buffered for each in all_statistics),
        senders=sum(each.senders for each in all_statistics),
        receivers=sum(each.receivers for each in all_statistics),
    )


def _thread_counts(pool: ThreadPool | None) -> ThreadCounts:
    # Not getThreadPool(): that would create the pool.
    if pool is None:
        return ThreadCounts(0, 0, 0)
    return ThreadCounts(len(pool.working), len(pool.waiters), pool.max)
