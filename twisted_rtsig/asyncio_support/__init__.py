"""
asyncio and Twisted in one thread.

:mod:`twisted_rtsig.asyncioreactor` has one loop for both: ``loop`` is its event loop,
``selector`` the engine as what this event loop waits in, ``watched`` the descriptors
that asyncio watches, ``transports`` asyncio's transport for stream sockets, and
``children`` keeps a child watcher of asyncio from Twisted's child processes.

``deferreds`` lets tasks of asyncio await Deferreds, on any reactor.
"""
