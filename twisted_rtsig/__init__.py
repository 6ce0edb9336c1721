"""
Reactors and a coroutine adapter for Twisted, driven by the events that the
operating system delivers.

Importing this package imports no reactor: choose one by its short name
(``twistd --reactor=rtsig``) or install it before anything imports
``twisted.internet.reactor``::

    from twisted_rtsig import rtsigreactor
    rtsigreactor.install()
"""

__version__ = "0.1.0"
