"""
Coroutines for Twisted: a protocol as one function that reads from top to bottom,
on every reactor.

See ``docs/coroutines.md``.  Importing this imports no reactor.
"""

from twisted_rtsig.asyncio_support.deferreds import (
    install as _let_asyncio_await_deferreds,
)
from twisted_rtsig.coro.capturing import OutputLimitExceeded, run_process
from twisted_rtsig.coro.channel_ends import ChannelReceiver, ChannelSender
from twisted_rtsig.coro.channels import Channel, ChannelStatistics
from twisted_rtsig.coro.clients import connect
from twisted_rtsig.coro.counts import (
    ChannelCounts,
    ServerCounts,
    Statistics,
    StreamCounts,
    TaskCounts,
    ThreadCounts,
    statistics,
)
from twisted_rtsig.coro.datagrams import DatagramSocket, open_datagrams
from twisted_rtsig.coro.errors import (
    BusyResourceError,
    Cancelled,
    ChannelClosed,
    ConnectFailed,
    DelimiterNotFound,
    EndOfChannel,
    FileEnded,
    IncompleteRead,
    IncompleteText,
    NoTaskError,
    StreamError,
    TLSError,
    TransferError,
    UnawaitedWarning,
    UnreadPlaintext,
    WouldBlock,
)
from twisted_rtsig.coro.factories import CoroutineFactory
from twisted_rtsig.coro.forgotten import get_debug, set_debug, wanted_by_environment
from twisted_rtsig.coro.futures import from_asyncio
from twisted_rtsig.coro.groups import (
    TASK_STATUS_IGNORED,
    TaskGroup,
    TaskStatus,
    run_group,
)
from twisted_rtsig.coro.inspection import format_tasks, log_tasks_on_signal
from twisted_rtsig.coro.instruments import (
    Instrument,
    add_instrument,
    remove_instrument,
)
from twisted_rtsig.coro.interfaces import TCPTransport
from twisted_rtsig.coro.limiters import CapacityLimiter, CapacityLimiterStatistics
from twisted_rtsig.coro.locks import Condition, Event, Lock, Semaphore
from twisted_rtsig.coro.monitor import Histogram, LoopMonitor, SlowStep
from twisted_rtsig.coro.opening import open_tcp, open_unix
from twisted_rtsig.coro.portals import Portal
from twisted_rtsig.coro.processes import Process, open_process
from twisted_rtsig.coro.scopes import (
    CancelScope,
    current_deadline,
    move_on_after,
    move_on_at,
    shield,
    timeout,
    timeout_at,
)
from twisted_rtsig.coro.selection import Deadline, select
from twisted_rtsig.coro.services import CoroutineService
from twisted_rtsig.coro.serving import Server, serve
from twisted_rtsig.coro.signals import SignalReceiver, open_signal_receiver
from twisted_rtsig.coro.sleeping import current_time, sleep
from twisted_rtsig.coro.spawning import coroutine, spawn
from twisted_rtsig.coro.stapled import StapledStream
from twisted_rtsig.coro.stopping import Stopped
from twisted_rtsig.coro.stream_protocols import ByteStream, ReceiveStream, SendStream
from twisted_rtsig.coro.streams import Stream
from twisted_rtsig.coro.symmetric import symmetric, transfer
from twisted_rtsig.coro.tasks import Task, current_task
from twisted_rtsig.coro.text import TextStream
from twisted_rtsig.coro.threads import from_thread, in_thread
from twisted_rtsig.coro.tls import TLSInfo
from twisted_rtsig.coro.watchdog import watch_for_blocking

__all__ = [
    "TASK_STATUS_IGNORED",
    "BusyResourceError",
    "ByteStream",
    "CancelScope",
    "Cancelled",
    "CapacityLimiter",
    "CapacityLimiterStatistics",
    "Channel",
    "ChannelClosed",
    "ChannelCounts",
    "ChannelReceiver",
    "ChannelSender",
    "ChannelStatistics",
    "Condition",
    "ConnectFailed",
    "CoroutineFactory",
    "CoroutineService",
    "DatagramSocket",
    "Deadline",
    "DelimiterNotFound",
    "EndOfChannel",
    "Event",
    "FileEnded",
    "Histogram",
    "IncompleteRead",
    "IncompleteText",
    "Instrument",
    "Lock",
    "LoopMonitor",
    "NoTaskError",
    "OutputLimitExceeded",
    "Portal",
    "Process",
    "ReceiveStream",
    "Semaphore",
    "SendStream",
    "Server",
    "ServerCounts",
    "SignalReceiver",
    "SlowStep",
    "StapledStream",
    "Statistics",
    "Stopped",
    "Stream",
    "StreamCounts",
    "StreamError",
    "TCPTransport",
    "TLSError",
    "TLSInfo",
    "Task",
    "TaskCounts",
    "TaskGroup",
    "TaskStatus",
    "TextStream",
    "ThreadCounts",
    "TransferError",
    "UnawaitedWarning",
    "UnreadPlaintext",
    "WouldBlock",
    "add_instrument",
    "connect",
    "coroutine",
    "current_deadline",
    "current_task",
    "current_time",
    "format_tasks",
    "from_asyncio",
    "from_thread",
    "get_debug",
    "in_thread",
    "log_tasks_on_signal",
    "move_on_after",
    "move_on_at",
    "open_datagrams",
    "open_process",
    "open_signal_receiver",
    "open_tcp",
    "open_unix",
    "remove_instrument",
    "run_group",
    "run_process",
    "select",
    "serve",
    "set_debug",
    "shield",
    "sleep",
    "spawn",
    "statistics",
    "symmetric",
    "timeout",
    "timeout_at",
    "transfer",
    "watch_for_blocking",
]

_let_asyncio_await_deferreds()
if wanted_by_environment():
    set_debug(True)
