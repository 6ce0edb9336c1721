"""
The load of load.c over TLS: the same closed loop, which reads the same seconds from
standard input, and prints the same JSON.

    python benchmarks/tls_load.py PORT CONNECTIONS SIZE

Python is fast enough here, as OpenSSL does the work: the client costs less than the
servers, and its cost is not counted.
"""

from __future__ import annotations

import json
import select
import socket
import ssl
import statistics
import sys
import time

PATIENCE = 20.0


def connect(port: int) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    plain = socket.create_connection(("127.0.0.1", port), PATIENCE)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client = context.wrap_socket(plain)
    client.settimeout(None)
    return client


def receive(client: ssl.SSLSocket, size: int) -> None:
    while size:
        data = client.recv(size)
        if not data:
            raise ConnectionError("the server has closed a connection")
        size -= len(data)


def turn(clients: list[ssl.SSLSocket], size: int, seconds: float) -> dict[str, float]:
    request = b"x" * size
    by_number = {client.fileno(): client for client in clients}
    since: dict[int, float] = {}
    latencies = []
    with select.epoll() as poller:
        start = time.perf_counter()
        for number, client in by_number.items():
            poller.register(number, select.EPOLLIN)
            since[number] = time.perf_counter()
            client.sendall(request)
        while since:
            ready = poller.poll(PATIENCE)
            if not ready:
                raise TimeoutError("the server has not answered")
            for number, _ in ready:
                receive(by_number[number], size)
                end = time.perf_counter()
                latencies.append(end - since.pop(number))
                if end - start < seconds:
                    since[number] = end
                    by_number[number].sendall(request)
    percentiles = statistics.quantiles(latencies, n=100)
    return {
        "requests": len(latencies),
        "elapsed": end - start,
        "p50": percentiles[49] * 1e6,
        "p99": percentiles[98] * 1e6,
    }


def main() -> None:
    port, count, size = map(int, sys.argv[1:])
    clients = [connect(port) for _ in range(count)]
    for client in clients:
        # One echo, so that what the server sends after its handshake is read too.
        client.sendall(b"x" * size)
        receive(client, size)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(clients, size, float(line))), flush=True)


if __name__ == "__main__":
    main()
