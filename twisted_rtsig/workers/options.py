"""The options of ``twistd workers``."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from operator import attrgetter
from typing import Any, ClassVar, Final

from twisted.application import service
from twisted.plugin import getPlugins
from twisted.python import usage

NAME: Final = "workers"
"""The name of the command."""


def _count(text: str) -> int:
    if text == "auto":
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1
    number = int(text)
    if not 1 <= number <= 250:
        raise ValueError("give a number from 1 to 250, or auto")
    return number


_count.coerceDoc = "Must be a number, or auto."  # type: ignore[attr-defined]


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise ValueError("give seconds: 0 or more")
    return seconds


_seconds.coerceDoc = "Must be a number of seconds."  # type: ignore[attr-defined]


class _Command(usage.Options):
    """
    Takes the arguments of another command without parsing them, as the workers do that.

    :param plugin: the ``IServiceMaker`` of the command.
    """

    def __init__(self, plugin: Any) -> None:
        self._plugin = plugin
        self.arguments: list[str] = []
        super().__init__()

    def parseOptions(self, options: Any = None) -> None:
        """See ``usage.Options``."""
        self.arguments = list(options or [])
        if {"--help", "--version"} & set(self.arguments):
            # These options print something and exit.
            real = self._plugin.options()
            real.parent = self.parent
            real.parseOptions(self.arguments)


class Options(usage.Options):
    """The options of ``twistd workers``."""

    synopsis = "[options] COMMAND [options of the command]"
    longdesc = (
        "Runs another command of twistd, or an application file, in several worker "
        "processes, which share the listening sockets. SIGHUP replaces the workers by "
        "new ones, SIGTTIN starts one more worker, and SIGTTOU stops one."
    )

    optFlags: ClassVar[list[Any]] = [
        [
            "shared-socket",
            None,
            "Let all workers accept from one socket, instead of one socket each.",
        ],
    ]

    optParameters: ClassVar[list[Any]] = [
        [
            "count",
            "c",
            "auto",
            "How many workers; auto is one for each CPU that this process may use.",
            _count,
        ],
        [
            "grace",
            "g",
            30.0,
            "How many seconds a worker has to finish its requests when it stops.",
            _seconds,
        ],
        [
            "start-timeout",
            None,
            60.0,
            "How many seconds a worker has to start.",
            _seconds,
        ],
        ["python", "y", None, "Run the application of this file (a .tac file)."],
    ]

    compData = usage.Completions(
        optActions={"python": usage.CompleteFiles("*.(tac|py)")}
    )

    @property
    def subCommands(self) -> Iterator[tuple[Any, ...]]:
        """Yield the other commands of ``twistd``."""
        plugins = getPlugins(service.IServiceMaker)
        for plugin in sorted(plugins, key=attrgetter("tapname")):
            if plugin.tapname != NAME:
                yield (
                    plugin.tapname,
                    None,
                    lambda plugin=plugin: _Command(plugin),
                    plugin.description,
                )

    def postOptions(self) -> None:
        """
        Check the options.

        :raises usage.UsageError: if they cannot work.
        """
        if sys.platform == "win32":
            raise usage.UsageError(
                "workers need a POSIX system, since they get their sockets over a UNIX "
                "socket, and this is Windows"
            )
        if isinstance(self["count"], str):
            self["count"] = _count(self["count"])
        if bool(self.subCommand) == (self["python"] is not None):
            raise usage.UsageError(
                "give the command that the workers are to run, as in "
                "'workers web --path .', or an application file, as in "
                "'workers -y application.tac'"
            )
        if self["python"] is not None:
            self["python"] = os.path.abspath(self["python"])
            if not os.path.exists(self["python"]):
                raise usage.UsageError(f"there is no file {self['python']}")
        twistd: Any = self.parent
        self["reactor-name"] = _reactor_name(twistd)
        # Still a name: twistd replaces it by the object that it imports.
        self["logger-name"] = twistd["logger"]
        chroot = twistd["chroot"]
        if chroot is not None and not os.path.exists(chroot + sys.executable):
            raise usage.UsageError(
                f"--chroot={chroot} has no {sys.executable}, which the workers run: "
                "install Python there at the same path, or let the program that starts "
                "twistd change the root (as systemd does with RootDirectory=)"
            )

    def command(self) -> list[str]:
        """Return the command and its arguments, which workers pass to ``twistd``."""
        if self["python"] is not None:
            return ["--python", self["python"]]
        command: Any = self.subOptions
        return [str(self.subCommand), *command.arguments]


def _reactor_name(parent: Any) -> str:
    """
    Return the short name of the installed reactor.

    :raises usage.UsageError: if it is not a reactor of this package.
    """
    from twisted_rtsig.engine.reactor import EngineReactor

    installed = sys.modules.get("twisted.internet.reactor")
    if isinstance(installed, EngineReactor):
        if "reactor" in parent:
            name: str = parent["reactor"]
            return name
        from twisted.plugins import twisted_rtsig_reactors as plugins

        for each in plugins.__all__:
            plugin = getattr(plugins, each)
            if plugin.moduleName == type(installed).__module__:
                found: str = plugin.shortName
                return found
    given = f"--reactor={parent['reactor']}" if "reactor" in parent else "the default"
    raise usage.UsageError(
        f"workers run on the reactors of twisted-rtsig only, and not on {given}: use "
        "twistd --reactor=rtsig-auto workers (or rtsig, rtsig-epoll, rtsig-kqueue, "
        "rtsig-asyncio)"
    )


def makeService(options: Options) -> Any:
    """Return the supervisor, as a service for ``twistd``."""
    from twisted.internet import reactor

    from twisted_rtsig.workers.notify import SystemdNotifier, passed_sockets

    # Before the next import: twisted.internet.endpoints would take the variables.
    sockets, names = passed_sockets()

    from twisted_rtsig.workers.supervisor import Settings, Supervisor

    twistd: Any = options.parent
    uid, gid = twistd["uid"], twistd["gid"]
    if uid is not None and gid is None:
        import pwd

        gid = pwd.getpwuid(uid).pw_gid
    log_arguments: list[str] = []
    if twistd["syslog"]:
        log_arguments += ["--syslog", "--prefix", twistd["prefix"]]
    if options["logger-name"] is not None:
        log_arguments += ["--logger", options["logger-name"]]
    arguments: list[str] = []
    # With the default, an application that changes its folder by itself stays there.
    if twistd["chroot"] is None and twistd["rundir"] != ".":
        arguments = ["--rundir", os.path.abspath(twistd["rundir"])]
    settings = Settings(
        count=options["count"],
        grace=options["grace"],
        start_timeout=options["start-timeout"],
        shared_socket=bool(options["shared-socket"]),
        reactor=options["reactor-name"],
        path=[os.path.abspath(each) for each in sys.path],
        folder=os.getcwd(),
        chroot=twistd["chroot"] is not None,
        arguments=[*arguments, *options.command()],
        log_arguments=log_arguments,
        uid=uid,
        gid=gid,
        euid=bool(twistd["euid"]),
        pidfile=twistd["pidfile"],
    )
    return Supervisor(reactor, settings, sockets, names, SystemdNotifier())


__all__ = ["NAME", "Options", "makeService"]
