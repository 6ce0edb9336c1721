"""
The parts of Twisted that this package uses although they are not public: private names,
and functions whose code the engine repeats.

The engine is faster than Twisted's own reactors because it uses attributes of Twisted's
transports and repeats the code of some of their functions.  A new release of Twisted
may change both without notice.  ``tests/test_private_names.py`` compares this module
with the installed Twisted and with the code of this package, and says which release has
changed what.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from twisted.python.versions import Version

from twisted import version  # type: ignore[attr-defined]

RESULT_IGNORED: Final[bool] = version >= Version("Twisted", 26, 10, 0)
"""
Whether the result of ``dataReceived`` is ignored.  Before Twisted 26.10 it had a
meaning, though a deprecated one, and so ``tcp.Connection._dataReceived`` must be called
there.
"""

NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "twisted.internet._newtls.ConnectionMixin": ("TLS",),
    "twisted.application.app": ("_exitWithSignal",),
    "twisted.application.app.ApplicationRunner": ("_exitSignal",),
    "twisted.internet.abstract.FileDescriptor": (
        "SEND_LIMIT",
        "_closeWriteConnection",
        "_postLoseConnection",
        "_tempDataBuffer",
        "_tempDataLen",
        "_writeDisconnected",
        "_writeDisconnecting",
        "bufferSize",
        "connected",
        "dataBuffer",
        "disconnected",
        "disconnecting",
        "offset",
        "producer",
        "reactor",
    ),
    "twisted.internet.abstract._ConsumerMixin": (
        "producerPaused",
        "streamingProducer",
    ),
    "twisted.internet.abstract._LogOwner": ("_getLogPrefix",),
    "twisted.internet.base.BaseConnector": ("reactor",),
    "twisted.internet.asyncioreactor.AsyncioSelectorReactor": ("_asyncioEventloop",),
    "twisted.internet.base.DelayedCall": (
        "_repr",
        "args",
        "called",
        "cancelled",
        "canceller",
        "creator",
        "debug",
        "delayed_time",
        "func",
        "kw",
        "resetter",
        "seconds",
        "time",
    ),
    "twisted.internet.base.ReactorBase": (
        "_addInternalReader",
        "_cancelCallLater",
        "_cancellations",
        "_eventTriggers",
        "_exitSignal",
        "_insertNewDelayedCalls",
        "_installSignalHandlers",
        "_internalReaders",
        "_justStopped",
        "_makeSignalHandling",
        "_moveCallLaterSooner",
        "_newTimedCalls",
        "_removeInternalReader",
        "_signals",
        "_signalsFactory",
        "_started",
        "_startedBefore",
        "_stopThreadPool",
        "_stopped",
        "threadCallQueue",
        "waker",
    ),
    "twisted.internet.base._ThreePhaseEvent": ("_continueFiring",),
    "twisted.internet.endpoints": ("_SystemdParser",),
    "twisted.internet.endpoints._SystemdParser": ("_sddaemon",),
    # Public, but not in the __all__ of its module.
    "twisted.internet.error": ("ConnectionAborted", "ReactorNotRestartable"),
    "twisted.internet.epollreactor.EPollReactor": ("_poller",),
    "twisted.internet.pollreactor.PollReactor": ("_poller",),
    "twisted.internet.posixbase": ("unixEnabled",),
    "twisted.internet.posixbase.PosixReactorBase": (
        "_removeAll",
        "_supportedAddressFamilies",
    ),
    "twisted.internet.posixbase._DisconnectSelectableMixin": ("_disconnectSelectable",),
    "twisted.internet._posixstdio.StandardIO": ("_writer",),
    "twisted.internet.process": ("_getFileActions", "_listOpenFDs"),
    "twisted.internet.process.Process": (
        # Twisted does not define this one: it asks the reactor for it.
        "_neverUseSpawn",
        "_reactor",
        "_trySpawnInsteadOfFork",
    ),
    "twisted.internet.process._BaseProcess": ("_execChild", "_fork"),
    "twisted.internet.tcp.Connection": (
        "_closeWriteConnection",
        "_dataReceived",
        "logstr",
        "protocol",
        "socket",
    ),
    "twisted.internet.tcp.Connector": ("_makeTransport", "bindAddress", "host", "port"),
    "twisted.internet.tcp": ("_reservedFD",),
    "twisted.internet.tcp.Port": (
        "_addressType",
        "_buildAddr",
        "_fromListeningDescriptor",
        "factory",
        "numberAccepts",
        "sessionno",
        "transport",
    ),
    "twisted.internet.tcp.Server": (
        "_addressType",
        "_fromConnectedSocket",
        "client",
        "hostname",
        "repstr",
        "server",
        "sessionno",
    ),
    "twisted.internet.tcp._SocketCloser": ("_closeSocket",),
    "twisted.internet.udp.Port": (
        "_connectedAddr",
        "_fromListeningDescriptor",
        "socket",
    ),
    "twisted.internet.unix.Connector": ("_makeTransport", "address", "checkPID"),
    "twisted.internet.unix.Port": ("_fromListeningDescriptor", "transport"),
    "twisted.internet.unix.Server": ("_fromConnectedSocket",),
    "twisted.internet.unix._SendmsgMixin": (
        "_ancillaryLevelSOLSOCKETTypeSCMRIGHTS",
        "_sendmsgQueue",
    ),
    "twisted.internet._baseprocess.BaseProcess": (
        "lostProcess",
        "pid",
        "proto",
        "status",
    ),
    "twisted.logger._file.FileLogObserver": ("_outFile",),
    "twisted.logger._observer.LogPublisher": ("_observers",),
    "twisted.protocols.tls.TLSMemoryBIOProtocol": (
        "_handshakeDone",
        "_lostTLSConnection",
    ),
    "twisted.web.http": ("_GenericHTTPChannelProtocol",),
    "twisted.web.http.HTTPChannel": ("_dataBuffer",),
    "twisted.web.http._GenericHTTPChannelProtocol": ("_channel",),
    # On Windows only
    "twisted.internet._dumbwin32proc.Process": ("_getReason",),
}
"""
The private names of Twisted, and the attributes that are in no interface of Twisted, by
the class or module that defines them.
"""

OF_ASYNCIO: Final[Mapping[str, tuple[str, ...]]] = {
    "asyncio.base_events.BaseEventLoop": (
        "_check_closed",
        "_check_running",
        "_clock_resolution",
        "_closed",
        "_debug",
        "_ready",
        "_run_once",
        "_scheduled",
        "_stopping",
        "_timer_cancelled_count",
    ),
    "asyncio.base_tasks": ("_task_get_stack", "_task_print_stack"),
    "asyncio.events": ("_get_running_loop", "_set_running_loop"),
    "asyncio.events.Handle": (
        "_args",
        "_callback",
        "_cancelled",
        "_context",
        "_loop",
        "_repr",
        "_run",
        "_source_traceback",
    ),
    "asyncio.events.TimerHandle": ("_when",),
    "asyncio.selector_events": ("_SelectorSocketTransport",),
    "asyncio.selector_events.BaseSelectorEventLoop": (
        "_csock",
        "_make_datagram_transport",
        "_make_socket_transport",
        "_make_ssl_transport",
        "_process_events",
        "_selector",
        "_transports",
    ),
    "asyncio.selector_events._SelectorSocketTransport": (
        "_empty_waiter",
        "_eof",
        "_make_empty_waiter",
        "_read_ready__data_received",
        "_read_ready__on_eof",
        "_read_ready_cb",
    ),
    "asyncio.selector_events._SelectorTransport": (
        "_buffer",
        "_conn_lost",
        "_fatal_error",
        "_force_close",
        "_protocol",
        "_sock",
    ),
    "asyncio.tasks": ("_enter_task", "_leave_task"),
    "asyncio.transports._FlowControlMixin": ("_high_water",),
    # Of the standard library; multiprocessing uses it as well.
    "subprocess": ("_args_from_interpreter_flags",),
    # Of the standard library as well.
    "socket.socket": ("_accept",),
    "ssl.SSLSocket": ("_create",),
    # Not on Windows
    "asyncio.unix_events.BaseChildWatcher": ("_callbacks",),
    "asyncio.unix_events.FastChildWatcher": ("_forks", "_lock", "_zombies"),
    "asyncio.unix_events._UnixSelectorEventLoop": (
        "_handle_signal",
        "_make_read_pipe_transport",
        "_signal_handlers",
    ),
}
"""
The private names of asyncio that the event loop of this package uses, and tasks that
await asyncio, by the class or module that defines them.  CPython's own tests of asyncio
are run on the loop: see ``tests/test_asyncio_suite.py``.
"""

_TRANSPORT = "twisted_rtsig.engine.transports.StreamTransport"
_TCP_SERVER = "twisted_rtsig.engine.transports.TCPServer"
_UNIX_TRANSPORT = "twisted_rtsig.engine.transports.UNIXTransport"
_STREAM_REACTOR = "twisted_rtsig.engine.transports.StreamReactor"
_DATAGRAM_REACTOR = "twisted_rtsig.engine.datagrams.DatagramReactor"
_TIMERS = "twisted_rtsig.engine.timers"
_TIMER_REACTOR = f"{_TIMERS}.TimerReactor"
_PROCESSES = "twisted_rtsig.engine.processes"
_REACTOR = "twisted_rtsig.engine.reactor.EngineReactor"
_ASYNCIO_REACTOR = "twisted_rtsig.asyncioreactor.AsyncioEngineReactor"
_LISTENING = "twisted_rtsig.workers.listening"
_SELECTOR = "twisted_rtsig.asyncio_support.selector.EngineSelector"

_REACTOR_BASE = "twisted.internet.base.ReactorBase"
_POSIX_REACTOR = "twisted.internet.posixbase.PosixReactorBase"


def _same_names(
    twisteds: str, ours: str, *methods: str
) -> Mapping[str, tuple[str, ...]]:
    """The methods of a class of Twisted, each mirrored under its name in a class."""
    return {f"{twisteds}.{each}": (f"{ours}.{each}",) for each in methods}


MIRRORED: Final[Mapping[str, tuple[str, ...]]] = {
    # Streams
    "twisted.internet._newtls.ConnectionMixin.write": (f"{_TRANSPORT}.write",),
    "twisted.internet.abstract.FileDescriptor.__init__": (f"{_TCP_SERVER}.__init__",),
    "twisted.internet.abstract.FileDescriptor.connectionLost": (
        f"{_TCP_SERVER}.connectionLost",
    ),
    "twisted.internet.abstract.FileDescriptor.doWrite": (
        f"{_TRANSPORT}.doWrite",
        f"{_REACTOR}._send_queued",
    ),
    "twisted.internet.abstract.FileDescriptor.startWriting": (
        f"{_TRANSPORT}.startWriting",
    ),
    "twisted.internet.abstract.FileDescriptor._isSendBufferFull": (
        f"{_TRANSPORT}.write",
    ),
    "twisted.internet.abstract.FileDescriptor._maybePauseProducer": (
        f"{_TRANSPORT}.write",
    ),
    "twisted.internet.abstract.FileDescriptor.write": (f"{_TRANSPORT}.write",),
    "twisted.internet.abstract.FileDescriptor.writeSequence": (
        f"{_TRANSPORT}.writeSequence",
    ),
    # If a callback returns an operation, the operation gets callbacks.
    "twisted.internet.defer.Deferred._runCallbacks": (
        "twisted_rtsig.coro.operations.Operation",
    ),
    "twisted.internet.tcp.BaseClient._connectDone": (
        "twisted_rtsig.engine.transports.TCPClient.tells_drained",
    ),
    "twisted.internet.tcp.BaseClient.doConnect": (
        "twisted_rtsig.engine.transports.TCPClient.tells_drained",
        f"{_TRANSPORT}.startWriting",
    ),
    "twisted.internet.tcp.Connection.__init__": (f"{_TCP_SERVER}.__init__",),
    "twisted.internet.tcp.Connection.connectionLost": (
        f"{_TCP_SERVER}.connectionLost",
    ),
    "twisted.internet.tcp.Connection._dataReceived": (f"{_REACTOR}._read_plain_input",),
    "twisted.internet.tcp.Connection.doRead": (
        f"{_TRANSPORT}.doRead",
        f"{_REACTOR}._read_plain_input",
        f"{_REACTOR}._read_repeatedly",
    ),
    "twisted.internet.tcp.Connection.writeSomeData": (
        f"{_TRANSPORT}.doWrite",
        f"{_TRANSPORT}.why_lost",
        f"{_REACTOR}._send_queued",
    ),
    "twisted.internet.tcp.Connector._makeTransport": (
        "twisted_rtsig.engine.transports.TCPConnector._makeTransport",
    ),
    "twisted.internet.tcp.Port.doRead": (
        "twisted_rtsig.engine.transports.TCPPort.doRead",
    ),
    "twisted.internet.tcp.Server.__init__": (
        f"{_TCP_SERVER}.__init__",
        f"{_TCP_SERVER}.repstr",
    ),
    "twisted.internet.tcp._AbortingMixin.abortConnection": (
        f"{_TRANSPORT}.abortConnection",
    ),
    "twisted.internet.unix.Connector._makeTransport": (
        "twisted_rtsig.engine.transports.UNIXConnector._makeTransport",
    ),
    "twisted.internet.unix._SendmsgMixin.doRead": (f"{_UNIX_TRANSPORT}.doRead",),
    "twisted.internet.unix._SendmsgMixin.writeSomeData": (
        f"{_UNIX_TRANSPORT}.doWrite",
    ),
    "twisted.python.sendmsg.recvmsg": (f"{_UNIX_TRANSPORT}.doRead",),
    # Ports and connectors
    **_same_names(
        _POSIX_REACTOR,
        _STREAM_REACTOR,
        "adoptStreamConnection",
        "adoptStreamPort",
        "connectTCP",
        "connectUNIX",
        "listenTCP",
        "listenUNIX",
    ),
    **_same_names(
        _POSIX_REACTOR,
        _DATAGRAM_REACTOR,
        "adoptDatagramPort",
        "listenMulticast",
        "listenUDP",
    ),
    # The listening sockets of workers
    "twisted.internet.tcp.Port.createInternetSocket": (f"{_LISTENING}._bound",),
    "twisted.internet.tcp.Port.startListening": (f"{_LISTENING}._bound",),
    "twisted.internet.tcp._resolveIPv6": (f"{_LISTENING}._name",),
    "twisted.internet.unix.Port.connectionLost": (
        "twisted_rtsig.workers.sockets._WorkerUNIXPort.connectionLost",
        f"{_LISTENING}.Address.close",
    ),
    "twisted.internet.unix.Port.startListening": (
        "twisted_rtsig.workers.sockets._WorkerUNIXPort.startListening",
        f"{_LISTENING}.Listening._make_unix",
    ),
    # Datagrams
    "twisted.internet.udp.Port.write": (
        "twisted_rtsig.engine.datagrams.UDPPort.write",
    ),
    # Timers
    "twisted.internet.base.DelayedCall.__init__": (f"{_TIMERS}.Timer.__init__",),
    "twisted.internet.base.DelayedCall.cancel": (f"{_TIMERS}.Timer.cancel",),
    **_same_names(
        _REACTOR_BASE,
        _TIMER_REACTOR,
        "_insertNewDelayedCalls",
        "_moveCallLaterSooner",
        "callLater",
        "getDelayedCalls",
        "runUntilCurrent",
        "timeout",
    ),
    **_same_names(_REACTOR_BASE, _REACTOR, "sigBreak", "sigInt", "sigTerm"),
    # The loop
    "twisted.internet.base.ReactorBase.crash": (f"{_ASYNCIO_REACTOR}.crash",),
    "twisted.internet.base.ReactorBase.iterate": (f"{_ASYNCIO_REACTOR}.iterate",),
    "twisted.internet.base.ReactorBase.mainLoop": (
        f"{_REACTOR}._run_passes",
        f"{_ASYNCIO_REACTOR}.mainLoop",
        f"{_SELECTOR}._run_passes",
    ),
    "twisted.internet.base.ReactorBase.run": (f"{_ASYNCIO_REACTOR}.run",),
    "twisted.internet.base.ReactorBase.startRunning": (
        f"{_REACTOR}.startRunning",
        f"{_ASYNCIO_REACTOR}.run",
        f"{_ASYNCIO_REACTOR}.startRunning",
    ),
    "twisted.internet.posixbase._PollLikeMixin._doReadOrWrite": (
        f"{_REACTOR}._read_or_write",
        f"{_REACTOR}._abandon",
    ),
    "twisted.python.log.callWithContext": (f"{_REACTOR}._in_log_context",),
    "twisted.python.log.callWithLogger": (
        f"{_REACTOR}._log_prefix",
        f"{_REACTOR}._disconnect",
    ),
    # Children
    "twisted.internet.posixbase.PosixReactorBase.spawnProcess": (
        f"{_PROCESSES}.ProcessReactor.spawnProcess",
        f"{_PROCESSES}.ProcessReactor._spawn_process",
    ),
    "twisted.internet.process.Process._trySpawnInsteadOfFork": (
        f"{_PROCESSES}.ChildProcess._trySpawnInsteadOfFork",
    ),
    "twisted.internet.process._BaseProcess.reapProcess": (f"{_PROCESSES}.reap",),
}
"""
The functions of Twisted whose code this package repeats or relies on, each with the
functions of this package that do so.
"""
