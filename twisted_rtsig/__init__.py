"""
Reactors and a coroutine adapter for Twisted, driven by the events that the
operating system delivers.

Importing this package imports no reactor: choose one by its short name
(``twistd --reactor=rtsig-auto``) or install it before anything imports
``twisted.internet.reactor``::

    import twisted_rtsig
    twisted_rtsig.install()
"""

__version__ = "0.1.0"


def install() -> None:
    """
    Make the reactor of this package for this system the one of this process.

    See :mod:`twisted_rtsig.autoreactor`.

    :raises twisted_rtsig.notifiers.UnsupportedReactorError: if there is none, or
        if it cannot run here; the message says why.
    """
    # An import of the package alone shall load none of this.
    from twisted_rtsig import autoreactor

    autoreactor.install()
