"""
Reactors and a coroutine adapter for Twisted, driven by the events that the
operating system delivers.

Importing this package does not import a reactor.  :func:`run` installs one and runs a
whole program::

    import twisted_rtsig

    async def main() -> None: ...

    twisted_rtsig.run(main)

Or choose one by its short name (``twistd --reactor=rtsig-auto``), or install it before
anything imports ``twisted.internet.reactor``::

    twisted_rtsig.install()
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twisted_rtsig.runner import run

__version__ = "0.1.0"


def install() -> None:
    """
    Install the reactor of this package for this system.

    See :mod:`twisted_rtsig.autoreactor`.

    :raises twisted_rtsig.notifiers.UnsupportedReactorError: if there is none, or if it
        cannot run here; the message says why.
    """
    # Imported here, so that importing the package loads none of this.
    from twisted_rtsig import autoreactor

    autoreactor.install()


def __getattr__(name: str) -> object:
    # Imported on demand, as above.  A function ``run`` here, which calls the other one,
    # would be in each traceback.
    if name == "run":
        from twisted_rtsig.runner import run

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["install", "run"]
