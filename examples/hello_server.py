"""
A complete server: it greets its clients, and on Ctrl-C or SIGTERM it lets the connected
clients finish.

    python examples/hello_server.py [PORT]
    telnet 127.0.0.1 7777
"""

from __future__ import annotations

import sys

from twisted_rtsig import run
from twisted_rtsig.coro import Stream, serve


async def greet(stream: Stream) -> None:
    await stream.write(b"What is your name?\n")
    name = await stream.read_line(max_bytes=100)
    await stream.write(b"Hello, %b!\n" % name)


async def main(port: int) -> None:
    server = await serve(f"tcp:{port}:interface=127.0.0.1", greet)
    print("listening on port", server.port.getHost().port, flush=True)
    # Until a signal cancels this task.
    await server.serve_forever(grace=10)


if __name__ == "__main__":
    run(main, int(sys.argv[1]) if sys.argv[1:] else 7777)
