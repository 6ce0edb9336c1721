"""
Windows: the calls of its API, the console's control events, children whose pipes report
to a completion port, and events that call methods.

Importing :mod:`twisted_rtsig.windows.calls` works on any system; calling a function of
it works on Windows only.
"""
