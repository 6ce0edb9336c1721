"""
asyncio and Twisted in one thread.

- :mod:`twisted_rtsig.asyncio_support.loop`,
  :mod:`twisted_rtsig.asyncio_support.selector` and
  :mod:`twisted_rtsig.asyncio_support.children` are the parts of
  :mod:`twisted_rtsig.asyncioreactor`, in which one thread runs an event loop of asyncio
  and a reactor.
- :mod:`twisted_rtsig.asyncio_support.deferreds` lets tasks of asyncio await Deferreds,
  on any reactor.
"""
