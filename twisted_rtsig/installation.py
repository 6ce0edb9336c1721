"""
Finding a reactor by its short name, and installing it.

Twisted's own plugins and those of this package are searched first.  The plugins of
other packages are imported only if none of these has the name, as some of them (of
txtorcon and txi2p) import the reactor.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any, Final

from twisted.application.reactors import IReactorInstaller, getReactorTypes
from twisted.internet.error import ReactorAlreadyInstalledError
from twisted.internet.main import installReactor

from twisted_rtsig import autoreactor
from twisted_rtsig.autoreactor import reactor_class

_PLUGINS: Final = (
    "twisted.plugins.twisted_reactors",
    "twisted.plugins.twisted_rtsig_reactors",
)


def installer_named(name: str) -> Any:
    """
    Return the ``IReactorInstaller`` of a short name.

    :raises ValueError: if no reactor has this name; the message lists all names.
    """
    for installer in _installers():
        if installer.shortName == name:
            return installer
    names = sorted({each.shortName for each in getReactorTypes()})
    raise ValueError(f"no reactor is called {name!r}; there are {', '.join(names)}")


def _installers() -> Iterator[Any]:
    for plugin in _PLUGINS:
        for each in vars(importlib.import_module(plugin)).values():
            if IReactorInstaller.providedBy(each):
                yield each
    yield from getReactorTypes()


def ensure_reactor(wanted: object = None) -> Any:
    """
    Install a reactor, unless one that fits is installed already.

    :param wanted: a short name, a class of reactors, or a reactor.  None is the reactor
        of this package for this system; then any other one of this package fits as
        well.
    :return: the installed reactor.
    :raises ReactorAlreadyInstalledError: if another one is installed.  The message says
        what to do.
    :raises ValueError: if no reactor has the name.
    :raises UnsupportedReactorError: if the reactor cannot run here.
    """
    installed = sys.modules.get("twisted.internet.reactor")
    if installed is None:
        _install(wanted)
        return sys.modules["twisted.internet.reactor"]
    if not _fits(installed, wanted):
        raise ReactorAlreadyInstalledError(
            f"{type(installed).__name__} is installed already, and not "
            f"{_described(wanted)}: something has imported twisted.internet.reactor. "
            "Call twisted_rtsig.install(), or the install() of the reactor that you "
            "want, before all other imports; import the reactor within functions only; "
            "or take the installed one with run(..., reactor=reactor)"
        )
    return installed


def _install(wanted: object) -> None:
    if wanted is None:
        autoreactor.install()
    elif isinstance(wanted, str):
        installer_named(wanted).install()
    elif isinstance(wanted, type):
        installReactor(wanted())
    else:
        installReactor(wanted)


def _fits(installed: object, wanted: object) -> bool:
    if wanted is None:
        # Imported here, as pytest imports this module in every process.
        from twisted_rtsig.engine.reactor import EngineReactor

        return isinstance(installed, EngineReactor)
    if isinstance(wanted, str):
        return type(installed).__module__ in _modules_of(wanted)
    if isinstance(wanted, type):
        return type(installed) is wanted
    return installed is wanted


def _modules_of(name: str) -> Iterator[str]:
    """The modules that may define the class of the reactor with a short name."""
    if name == "rtsig-auto":
        yield reactor_class().__module__
        return
    module: str = installer_named(name).moduleName
    yield module
    # The installer named ``default`` installs a reactor of another module.
    yield importlib.import_module(module).install.__module__


def _described(wanted: object) -> str:
    if wanted is None:
        return f"{reactor_class().__name__} or another reactor of twisted-rtsig"
    if isinstance(wanted, str):
        return f"{wanted!r}, which was asked for"
    return f"{getattr(wanted, '__name__', repr(wanted))}, which was asked for"


__all__ = ["ensure_reactor", "installer_named"]
